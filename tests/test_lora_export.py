"""An exported adapter computes the same under every loader's rule of scale; what cannot be said is refused."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import lora
from lora.__main__ import main
from lora.export import Finding, export

RANKS: dict[str, Any] = {"rank_pattern": {"q_proj": 3, "up_proj": 8}, "alpha_pattern": {"v_proj": 7.0}}


def base() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def adapter(folder: Path, **settings: Any) -> tuple[Path, torch.Tensor]:
    """A peft adapter with factors that show, and its logits."""
    options = {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "up_proj"]} | RANKS
    model = peft.get_peft_model(base(), peft.LoraConfig(**(options | settings)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder, model.eval()(IDS).logits


IDS = torch.arange(40).view(2, 20) % 60


@pytest.mark.parametrize("target", ["peft", "vllm", "sglang", "llama.cpp"])
@torch.no_grad()
def test_the_export_computes_the_same_in_peft_and_here(target: str, tmp_path: Path) -> None:
    folder, want = adapter(tmp_path / "a")
    export(folder, tmp_path / "out", target, base="someone/base")
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "out").eval()
    assert (theirs(IDS).logits - want).abs().max() < 1e-5
    ours = lora.attach(base(), tmp_path / "out")
    assert (ours(IDS).logits - want).abs().max() < 1e-5
    assert (want - base()(IDS).logits).abs().max() > 0.1


@torch.no_grad()
def test_every_rule_of_scale_gives_one(tmp_path: Path) -> None:
    folder, _ = adapter(tmp_path / "a")
    export(folder, tmp_path / "out", "vllm")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    ranks = {t.shape[1] for key, t in tensors.items() if "lora_B" in key}
    assert ranks == {8} == {config["r"]} and config["lora_alpha"] == 8 and not config["use_rslora"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


def test_what_a_loader_would_have_done_is_said(tmp_path: Path) -> None:
    folder, _ = adapter(tmp_path / "a")
    said = {
        target: [str(f) for f in export(folder, tmp_path / target, target, base="b")]
        for target in ("peft", "vllm", "sglang", "llama.cpp")
    }
    assert said["peft"] == []
    assert [s.split(": ")[1].split(" ")[0] for s in said["vllm"]] == ["alpha_pattern", "rank_pattern"]
    assert "scale would be alpha / r" in said["sglang"][0]
    assert "scale would be alpha / rank(B)" in said["llama.cpp"][0]
    assert all(isinstance(f, Finding) and not f.refuses for f in export(folder, tmp_path / "x", "sglang"))


def test_a_plain_adapter_has_no_findings(tmp_path: Path) -> None:
    plain = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    folder, _ = adapter(tmp_path / "a", **plain)
    for target in ("vllm", "sglang"):
        assert export(folder, tmp_path / target, target) == []


@torch.no_grad()
def test_a_fused_projection_is_cut(tmp_path: Path) -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv_proj, self.out = nn.Linear(16, 24), nn.Linear(24, 5)

    class Cut(nn.Module):
        def __init__(self, other: Fused) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = nn.Linear(16, 12), nn.Linear(16, 4), nn.Linear(16, 8)
            for layer, w in zip(self.children(), other.qkv_proj.weight.split([12, 4, 8]), strict=True):
                layer.weight.copy_(w)

    fused = Fused()
    cut = Cut(fused)
    lora.wrap(fused, r=3, targets=["qkv_proj"], rslora=True)
    fused.qkv_proj.adapters["default"].b.normal_()
    folder = lora.save(fused, tmp_path / "a")
    rows = {"q_proj": 12, "k_proj": 4, "v_proj": 8}
    export(folder, tmp_path / "out", split={"qkv_proj": rows})
    x = torch.randn(4, 16)
    lora.attach(cut, tmp_path / "out")
    parts = [layer(x) - layer.base(x) for layer in (cut.q_proj, cut.k_proj, cut.v_proj)]
    whole = fused.qkv_proj(x) - fused.qkv_proj.base(x)
    assert (torch.cat(parts, dim=-1) - whole).abs().max() < 1e-6 * max(1.0, float(whole.abs().max()))
    with pytest.raises(ValueError, match="names 20 rows, and qkv_proj has 24"):
        export(folder, tmp_path / "no", split={"qkv_proj": {"q_proj": 12, "k_proj": 8}})
    with pytest.raises(ValueError, match="no module of .* ends so"):
        export(folder, tmp_path / "no", split={"gate_up": {"gate": 12}})


def test_what_a_target_cannot_hold_is_refused_and_nothing_written(tmp_path: Path) -> None:
    whole, _ = adapter(tmp_path / "a", modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"vllm would refuse: lm_head is trained whole"):
        export(whole, tmp_path / "out", "vllm")
    plain, _ = adapter(tmp_path / "b")
    with pytest.raises(ValueError, match=r"base_model_name_or_path is empty; give base"):
        export(plain, tmp_path / "out", "llama.cpp")
    with pytest.raises(ValueError, match=r"choose one of peft, vllm, sglang, llama\.cpp"):
        export(plain, tmp_path / "out", "ollama")
    with pytest.raises(FileNotFoundError):
        export(tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(FileExistsError):
        export(plain, tmp_path / "out")


WHOLE = "is trained whole"
# what the adapter has, and what each loader makes of it: refused by a word, mended by one, or read as it is
FINDINGS: dict[str, tuple[dict[str, Any], dict[str, str | None]]] = {
    "plain": ({}, {"vllm": None, "sglang": None, "llama.cpp": None}),
    "whole module": ({"train_modules": ["lm_head"]}, dict.fromkeys(("vllm", "sglang", "llama.cpp"), WHOLE)),
    "embedding": (
        {"targets": ["embed_tokens", "q_proj"]},
        {"vllm": "is an embedding", "sglang": "is an embedding", "llama.cpp": None},
    ),
    "dora": ({"dora": True}, dict.fromkeys(("vllm", "sglang", "llama.cpp"), "is a DoRA adapter")),
    "biases": ({"bias": "lora_only"}, dict.fromkeys(("vllm", "sglang", "llama.cpp"), "biases are trained")),
    "a bias of B": ({"lora_bias": True}, dict.fromkeys(("vllm", "sglang", "llama.cpp"), "biases are trained")),
    "tokens": ({"train_tokens": [3]}, dict.fromkeys(("vllm", "sglang", "llama.cpp"), "rows of tokens are trained")),
    "stacked": (
        {"parameters": ["lm_head.weight"]},
        {
            "vllm": "they would stay the base's",
            "sglang": "is a stacked parameter",
            "llama.cpp": "is a stacked parameter",
        },
    ),
    "too large a rank": ({"r": 513}, {"vllm": "rank 513 is above 512", "sglang": None, "llama.cpp": None}),
    "pissa": ({"init": "pissa"}, {"vllm": None, "sglang": None, "llama.cpp": None}),
}


@pytest.mark.parametrize("kind", FINDINGS)
def test_each_loader_is_known_for_what_it_refuses(kind: str, tmp_path: Path) -> None:
    options, said = FINDINGS[kind]
    biased = transformers.LlamaConfig(**{**base().config.to_dict(), "attention_bias": True})
    model = transformers.LlamaForCausalLM(biased)
    lora.save(lora.wrap(model, **({"r": 4, "targets": ["q_proj"]} | options)), tmp_path / "a")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    for target, word in said.items():
        if word is None:
            assert export(tmp_path / "a", tmp_path / target, target, base="b") == []
            continue
        with pytest.raises(ValueError, match=word) as e:
            export(tmp_path / "a", tmp_path / target, target, base="b")
        assert f"{target} would " in str(e.value) and not (tmp_path / target).exists()
    export(tmp_path / "a", tmp_path / "peft")  # peft reads all that we write
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before


def test_the_command_says_what_it_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = adapter(tmp_path / "a")
    assert main(["export", str(folder), str(tmp_path / "out"), "--target", "sglang", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said["mended"]) == 2 and "use_rslora is not read" in said["mended"][0]
    assert main(["export", str(folder), str(tmp_path / "out")]) == 2
    assert "holds" in capsys.readouterr().err
