"""Loading: quantizing on the way in, pre-quantized folders, and a sentence for every damaged or foreign checkpoint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import give_tokenizer
from torch import nn

import lora
from lora.quant.linear import Linear4bit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose widths 4-bit blocks divide, with a tokenizer of one token a byte."""
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    give_tokenizer(path)
    return path


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def assert_same(a: nn.Module, b: nn.Module) -> None:
    x, y = state(a), state(b)
    assert x.keys() == y.keys()
    assert all(torch.equal(t, y[key]) and t.dtype == y[key].dtype for key, t in x.items())


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("kind", "block"), [("nf4", 64), ("fp4", 64), ("nf4", 128)])
def test_quantizing_while_loading_equals_quantizing_after(kind: str, block: int, double: bool, folder: Path) -> None:
    during, _ = lora.load(folder, quantize=kind, block=block, double=double, device="cpu")
    after, _ = lora.load(folder, device="cpu")
    lora.quantize(after, kind, block=block, double=double)
    assert_same(during, after)
    assert sum(isinstance(m, Linear4bit) for m in during.modules()) == 14
    assert not during.training and not any(p.requires_grad for p in during.parameters())


@pytest.mark.parametrize("double", [True, False])
def test_a_gpu_packs_what_is_loaded_on_it_into_the_bytes_of_a_cpu(
    double: bool, folder: Path, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_KERNELS", "triton")  # or an error: nothing may be packed before it is on the GPU
    there, _ = lora.load(folder, quantize="nf4", double=double, dtype="float32")
    monkeypatch.setenv("LORA_KERNELS", "auto")
    here, _ = lora.load(folder, quantize="nf4", double=double, device="cpu")
    assert {p.device.type for p in [*there.parameters(), *there.buffers()]} == {"cuda"}
    assert_same(there.cpu(), here)


def test_skipped_layers_stay_dense(folder: Path) -> None:
    model, _ = lora.load(folder, quantize="nf4", skip=("lm_head", "o_proj", "model.layers.0.*"), device="cpu")
    packed = {name for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    assert packed == {f"model.layers.1.{n}" for n in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
    )}  # fmt: skip


@pytest.mark.parametrize("double", [True, False])
def test_a_written_4_bit_model_reloads_bit_for_bit(double: bool, folder: Path, tmp_path: Path) -> None:
    model, tokenizer = lora.load(folder, quantize="nf4", double=double, device="cpu")
    lora.save_pretrained(model, tokenizer, tmp_path / "q", dtype=torch.float32)
    again, other = lora.load(tmp_path / "q", device="cpu")
    assert_same(model, again)
    assert other.encode("naïve") == tokenizer.encode("naïve") and other.eos == tokenizer.eos


@torch.no_grad()
def test_a_written_4_bit_model_loads_in_transformers(folder: Path, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, tokenizer = lora.load(folder, quantize="nf4", device="cpu")
    lora.save_pretrained(model, tokenizer, tmp_path / "q", dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32, device_map="cpu")
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            w = theirs.get_submodule(name).weight
            decoded = bitsandbytes.functional.dequantize_4bit(w.data, w.quant_state).float()
            assert torch.equal(decoded, layer.weight_as(torch.float32)), name
    ids = torch.randint(1, 257, (2, 16))  # after the comparison of weights: a forward repacks theirs in place
    want = model(ids)
    assert (theirs(ids).logits - want).abs().max() < 3e-2 * want.abs().max()  # its CPU path rounds on the way


# ---- damage ----
Change = Callable[[Path], Any]


def config_of(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def tensors_of(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def pickled(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")


def index_of(path: Path, where: Any) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


Q = "model.layers.0.self_attn.q_proj.weight"
DAMAGE: dict[str, tuple[Change, str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), "holds no config.json"),
    "config cut": (lambda p: cut(p / "config.json", 40), r"config\.json is not valid JSON"),
    "config a list": (lambda p: (p / "config.json").write_text("[]"), "holds no JSON object"),
    "architecture": (lambda p: config_of(p, model_type="mamba"), "model_type 'mamba' is not known"),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), r"holds no tokenizer\.json"),
    "tokenizer cut": (lambda p: cut(p / "tokenizer.json", 300), r"tokenizer\.json is not a tokenizer"),
    "tokenizer config cut": (lambda p: cut(p / "tokenizer_config.json", 5), r"tokenizer_config\.json is not valid"),
    "special not in vocabulary": (
        lambda p: (p / "tokenizer_config.json").write_text('{"eos_token": "<eot>"}'),
        "'<eot>' is not in the vocabulary",
    ),
    "large vocabulary": (lambda p: config_of(p, vocab_size=200), "257 tokens and the model 200 rows"),
    "no heads": (lambda p: config_of(p, num_attention_heads=0), "num_attention_heads=0, which must be a whole number"),
    "key heads below 0": (lambda p: config_of(p, num_key_value_heads=-1), "num_key_value_heads=-1, which must be"),
    "a billion layers": (lambda p: config_of(p, num_hidden_layers=10**9), "asks for 1,000,000,000 layers of width 64"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), r"holds no model\.safetensors"),
    "pickle": (pickled, r"pytorch_model\.bin is a pickle"),
    "weights cut in the data": (lambda p: cut(p / "model.safetensors", 50_000), "damaged or cut short"),
    "weights cut in the header": (lambda p: cut(p / "model.safetensors", 100), "damaged or cut short"),
    "weights empty": (lambda p: cut(p / "model.safetensors", 0), "damaged or cut short"),
    "missing": (lambda p: tensors_of(p, lambda t: t.pop(Q)), f"1 tensors are missing .{Q}"),
    "extra": (lambda p: tensors_of(p, lambda t: t.update(more=torch.ones(2))), "1 have no place .more"),
    "shape": (lambda p: tensors_of(p, lambda t: t.update({Q: torch.ones(64, 63)})), rf"{Q} has shape \(64, 63\)"),
    "absent shard": (lambda p: index_of(p, {Q: "model-00001-of-00002.safetensors"}), "the download is incomplete"),
    "empty index": (lambda p: index_of(p, {}), "holds no weight_map"),
    "index cut": (lambda p: (p / "model.safetensors.index.json").write_text("{"), r"index\.json is not valid JSON"),
    "tied but different": (lambda p: config_of(p, tie_word_embeddings=True), "two that differ"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_folder_is_refused_by_name(change: Change, message: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(folder, path)
    change(path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        lora.load(path, device="cpu")


def test_what_readers_compute_themselves_may_be_in_the_file(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(folder, path)
    tensors_of(path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert_same(lora.load(path, device="cpu")[0], lora.load(folder, device="cpu")[0])


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        lora.load(tmp_path / "none")


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="neither a folder"):
        lora.load(tmp_path / "a.bin")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "int8"}, "int8"), ({"quantize": "int4"}, "int4"), ({"quantize": "nf4", "block": 48}, "48")],
)
def test_a_setting_we_do_not_have_is_refused(options: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        lora.load(folder, device="cpu", **options)
