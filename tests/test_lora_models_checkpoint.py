"""Folders of safetensors: parts stay together, nothing outside is read, and damage anywhere is one clear error."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import give_tokenizer

import lora
from lora.models.checkpoint import weights


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 4-bit weights in many shards."""
    path = tmp_path_factory.mktemp("four")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.1, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path / "dense")
    give_tokenizer(path / "dense")
    model, tokenizer = lora.load(path / "dense", quantize="nf4", device="cpu")
    lora.save_pretrained(model, tokenizer, path / "one")
    lora.save_pretrained(model, tokenizer, path / "many", shard=6000)
    return path


def test_the_parts_of_a_weight_come_together(four: Path) -> None:
    for folder in ("one", "many"):
        groups = dict(weights(four / folder))
        part = groups["model.layers.0.self_attn.q_proj.weight"]
        assert {name.rpartition("q_proj.weight")[2] for name in part} == {
            "", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4",
        }  # fmt: skip
        assert list(groups["model.norm.weight"]) == ["model.norm.weight"]


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_any_quant_storage_is_read(storage: torch.dtype, four: Path, tmp_path: Path) -> None:
    shutil.copytree(four / "one", tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    stored = load_file(file)
    for name in [n for n in stored if n + ".absmax" in stored]:
        stored[name] = stored[name].view(-1).view(storage).view(-1, 1)
    save_file(stored, file)
    ids = torch.randint(1, 250, (1, 9))
    assert torch.equal(lora.load(tmp_path / "out", device="cpu")[0](ids), lora.load(four / "one", device="cpu")[0](ids))


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "..", "", "sub/model.safetensors"])
def test_an_index_cannot_lead_out_of_the_folder(file: str, four: Path, tmp_path: Path) -> None:
    shutil.copytree(four / "many", tmp_path / "out")
    shutil.copy(four / "one" / "model.safetensors", tmp_path / "secret.safetensors")
    index = tmp_path / "out" / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["model.norm.weight"] = file
    index.write_text(json.dumps(table))
    with pytest.raises(ValueError, match="only files beside it are read"):
        lora.load(tmp_path / "out")


def test_wrong_shapes_are_listed_together(four: Path, tmp_path: Path) -> None:
    shutil.copytree(four / "dense", tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    stored = load_file(file)
    for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
        stored[name] = stored[name][:-1].clone()
    save_file(stored, file)
    with pytest.raises(ValueError, match=r"up_proj\.weight has shape \(63, 64\).*norm\.weight has shape \(63,\)"):
        lora.load(tmp_path / "out")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_and_cut_bytes_are_a_clear_error_or_the_same_shapes(data: st.DataObject, four: Path) -> None:
    source = four / data.draw(st.sampled_from(["one", "many", "dense"]))
    name = data.draw(st.sampled_from(sorted(p.name for p in source.iterdir() if p.name != "generation_config.json")))
    bad = four / "bad"
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(source, bad)
    raw = bytearray((bad / name).read_bytes())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        reach = min(len(raw), 4000)  # headers: a flipped bit of a weight is another weight, which no reader can see
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, reach - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (bad / name).write_bytes(raw)
    want, _ = lora.load(source, device="cpu")
    try:
        got, _ = lora.load(bad, device="cpu")
    except (ValueError, FileNotFoundError) as e:
        assert str(e) and "\n" not in str(e).strip()
    else:  # what changed was no structure: the model is whole
        shapes = {n: t.shape for n, t in got.state_dict().items()}
        assert shapes.keys() == want.state_dict().keys() or name == "config.json"


def test_what_is_written_wrongly_is_noticed_and_not_kept(
    four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = lora.load(four / "dense", device="cpu")
    write = type(model).write

    def swapped(self: object, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # of one shape, so that nothing else notices
            name = name.replace("q_proj", "?").replace("k_proj", "q_proj").replace("?", "k_proj")
        return write(model, name, tensor)

    monkeypatch.setattr(type(model), "write", swapped)
    with pytest.raises(ValueError, match="was not written: loaded again, it gives logits .* away"):
        lora.save_pretrained(model, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.iterdir())
    lora.save_pretrained(model, tokenizer, tmp_path / "out", verify=False)
