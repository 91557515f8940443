"""Damage of every kind to files from elsewhere: one clear error, or what was meant; nothing runs, nothing hangs.

Flips and cuts of a model folder's files are in test_lora_models_checkpoint.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_lora_models_gguf import write as write_gguf
from tiny import give_tokenizer
from torch import Tensor, nn

import lora

many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def small() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, a GGUF file, and an adapter of many kinds."""
    path = tmp_path_factory.mktemp("files")
    small().save_pretrained(path / "model")
    give_tokenizer(path / "model")
    torch.manual_seed(0)
    (path / "gguf").mkdir()
    with torch.no_grad():
        write_gguf(path / "gguf" / "a.gguf", "Q4_0")
    model, _ = lora.load(path / "model", device="cpu")
    options: dict[str, Any] = {"train_modules": ["norm"], "train_tokens": [3, 9]}
    lora.wrap(model, r=2, parameters=["lm_head.weight"], rank_pattern={"v_proj": 3}, lora_bias=False, **options)
    lora.save(model, path / "adapter")
    return path


def damaged(raw: bytes, data: st.DataObject, reach: int) -> bytes:
    """Cut somewhere, or with bits flipped among its first `reach` bytes."""
    if data.draw(st.booleans()):
        return raw[: data.draw(st.integers(0, len(raw) - 1))]
    out, reach = bytearray(raw), min(len(raw), reach)
    for _ in range(data.draw(st.integers(1, 4))):
        out[data.draw(st.integers(0, reach - 1))] ^= 1 << data.draw(st.integers(0, 7))
    return bytes(out)


def told(e: BaseException) -> bool:
    return bool(str(e)) and "\n" not in str(e).strip()


# ---- GGUF ----
@many
@given(data=st.data())
def test_a_damaged_gguf_is_one_clear_error_or_a_whole_model(data: st.DataObject, files: Path) -> None:
    raw = (files / "gguf" / "a.gguf").read_bytes()
    want, _ = lora.load(files / "gguf" / "a.gguf", device="cpu")
    bad = files / "bad.gguf"
    bad.write_bytes(damaged(raw, data, 12_000))  # the header and its tokenizer; weights follow
    try:
        got, _ = lora.load(bad, device="cpu")
    except (ValueError, FileNotFoundError) as e:
        assert told(e), e
    else:
        shapes = {n: t.shape for n, t in got.state_dict().items()}
        assert shapes == {n: t.shape for n, t in want.state_dict().items()}


# ---- an adapter's folder ----
def state_of(model: nn.Module) -> list[Any]:
    return [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]


@pytest.fixture(scope="module")
def base(files: Path) -> Any:
    return lora.load(files / "model", device="cpu")[0]


def attach_or_refuse(model: Any, folder: Path, want: dict[str, Tensor]) -> None:
    """Attached, it has the tensors of the good file's names and shapes; refused, the model is as before."""
    before = state_of(model)
    try:
        lora.attach(model, folder, any_base=True)
    except (ValueError, FileNotFoundError, KeyError) as e:
        assert told(e), e
        assert state_of(model) == before
    else:
        shapes = sorted(tuple(p.shape) for n, p in model.named_parameters() if ".adapters." in n)
        assert shapes == sorted(tuple(t.shape) for t in want.values())
        lora.detach(model, "default")
        assert state_of(model) == before


@many
@given(data=st.data())
def test_flipped_and_cut_bytes_of_an_adapter(data: st.DataObject, files: Path, base: Any) -> None:
    bad = files / "bad"
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(files / "adapter", bad)
    name = data.draw(st.sampled_from([CONFIG, WEIGHTS]))
    (bad / name).write_bytes(damaged((bad / name).read_bytes(), data, 6000))
    attach_or_refuse(base, bad, load_file(files / "adapter" / WEIGHTS))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text("q_proj.*(|", max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("q_proj", max_size=6), inner, max_size=3),
    max_leaves=5,
)


@many
@given(data=st.data())
def test_any_value_of_any_setting_of_an_adapter(data: st.DataObject, files: Path, base: Any) -> None:
    bad = files / "bad"
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(files / "adapter", bad)
    config = json.loads((bad / CONFIG).read_text())
    key = data.draw(st.sampled_from([*sorted(config), "layers_to_transform", "exclude_modules", "layer_replication"]))
    (bad / CONFIG).write_text(json.dumps(config | {key: data.draw(JSON)}))
    attach_or_refuse(base, bad, load_file(files / "adapter" / WEIGHTS))


@many
@given(data=st.data())
def test_tensors_of_an_adapter_of_other_shapes_and_dtypes(data: st.DataObject, files: Path, base: Any) -> None:
    bad = files / "bad"
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(files / "adapter", bad)
    tensors = load_file(bad / WEIGHTS)
    names = sorted(tensors)
    one, other = data.draw(st.sampled_from(names)), data.draw(st.sampled_from(names))
    how = data.draw(st.sampled_from(["swap", "turn", "cut", "flat", "int", "drop", "more"]))
    t = tensors[one]
    change = {
        "swap": {one: tensors[other], other: t},
        "turn": {one: t.T.contiguous()},
        "cut": {one: t[:-1].clone()},
        "flat": {one: t.reshape(-1)},
        "int": {one: t.view(torch.int32)},
        "more": {one: t[None].clone()},
    }
    tensors |= change.get(how, {})
    if how == "drop":
        del tensors[one]
    save_file(tensors, bad / WEIGHTS, metadata={"format": "pt"})
    attach_or_refuse(base, bad, load_file(files / "adapter" / WEIGHTS))


# ---- a model's folder ----
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_tensors_of_a_model_of_other_shapes_and_dtypes(data: st.DataObject, files: Path) -> None:
    bad = files / "bad model"
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(files / "model", bad)
    tensors = load_file(bad / "model.safetensors")
    one = data.draw(st.sampled_from(sorted(tensors)))
    t = tensors[one]
    other = data.draw(st.sampled_from(sorted(n for n, x in tensors.items() if x.shape != t.shape)))
    change = {
        "swap": {one: tensors[other], other: t},
        "cut": {one: t[:-1].clone()},
        "flat": {one: t.reshape(-1, 1)},
        "int": {one: t.view(torch.int32)},
        "more": {one: t[None].clone()},
    }
    save_file(tensors | change[data.draw(st.sampled_from(sorted(change)))], bad / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="does not fit its config.json") as e:
        lora.load(bad, device="cpu", quantize=data.draw(st.sampled_from([None, "nf4"])))
    assert told(e.value)


# ---- nothing of a file is run ----
RUNS = "import pathlib; pathlib.Path({!r}).write_text('ran')\n"


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (RUNS.format(str(self.mark)),)


def test_a_pickle_is_never_read(files: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    shutil.copytree(files / "model", tmp_path / "model")
    shutil.copytree(files / "adapter", tmp_path / "adapter")
    model, _ = lora.load(files / "model", device="cpu")
    for folder, name, call in (
        ("model", "model.safetensors", lambda p: lora.load(p, device="cpu")),
        ("adapter", WEIGHTS, lambda p: lora.attach(model, p)),
    ):
        good = tmp_path / folder / name
        for bomb in ("pytorch_model.bin", "adapter_model.bin", "model.pt", name):  # the last under the good one's name
            good.unlink(missing_ok=True)
            torch.save(Bomb(mark), tmp_path / folder / bomb)
            with pytest.raises((ValueError, FileNotFoundError)) as e:
                call(tmp_path / folder)
            assert told(e.value)
            (tmp_path / folder / bomb).unlink()
    assert not mark.exists()
    torch.load(_bomb(tmp_path, mark), weights_only=False)  # a bomb it was
    assert mark.exists()


def _bomb(folder: Path, mark: Path) -> Path:
    torch.save(Bomb(mark), folder / "bomb.bin")
    return folder / "bomb.bin"


def test_code_beside_a_checkpoint_is_never_run(files: Path, tmp_path: Path) -> None:
    mark, folder = tmp_path / "ran", tmp_path / "model"
    shutil.copytree(files / "model", folder)
    for name in ("modeling_llama", "configuration_llama", "tokenization", "sitecustomize", "__init__", "torch", "json"):
        (folder / f"{name}.py").write_text(RUNS.format(str(mark)))
    auto = {"AutoConfig": "configuration_llama.C", "AutoModelForCausalLM": "modeling_llama.M"}
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": auto, "trust_remote_code": True}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    told = {"auto_map": {"AutoTokenizer": ["tokenization.T", None]}, "tokenizer_class": "T"}
    climbing = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('true') }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | told | {"chat_template": climbing}))
    model, loaded = lora.load(folder, device="cpu")
    want, _ = lora.load(files / "model", device="cpu")
    ids = torch.arange(6)[None]
    assert torch.equal(model(ids), want(ids)) and not mark.exists()
    with pytest.raises(ValueError, match="chat template"):
        loaded.render([{"role": "user", "content": "hi"}])
    adapter = tmp_path / "adapter"
    shutil.copytree(files / "adapter", adapter)
    (adapter / "adapter_config.json").write_text(
        json.dumps(json.loads((adapter / CONFIG).read_text()) | {"auto_mapping": {"parent_library": "modeling_llama"}})
    )
    lora.attach(model, adapter)
    assert not mark.exists()
