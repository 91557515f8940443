"""Every family against transformers': logits, gradients of the inputs, greedy tokens, padding, writing, reading."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import give_tokenizer
from torch import Tensor

import lora
from lora.models.families import FAMILIES
from lora.models.generate import generate_ids

SIZES = {"vocab_size": 272, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
SIZES |= {"initializer_range": 0.1, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
YARN = {"short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5], "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32} | YARN
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
LOCAL = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
LOCAL |= {"sliding_attention": {"rope_type": "default", "rope_theta": 123.0}}
RW = {"multi_query": False, "parallel_attn": False, "bias": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama 3.2": ("LlamaConfig", {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 24}),
    "llama biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "llama linear rope": ("LlamaConfig", {"rope_parameters": LINEAR, "num_key_value_heads": 1}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral window": ("MistralConfig", {"sliding_window": 7, "head_dim": 24}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2 window": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 24}),
    "qwen3 biases": ("Qwen3Config", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", {"head_dim": 24, "sliding_window": 9, "query_pre_attn_scalar": 20}),
    "gemma2 no caps": (
        "Gemma2Config",
        {"head_dim": 16, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 24, "sliding_window": 9, "num_hidden_layers": 7}),
    "gemma3 ropes": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 5, "rope_parameters": LOCAL}),
    "phi3": ("Phi3Config", {}),
    "phi3 window": ("Phi3Config", {"sliding_window": 9}),
    "phi3 partial": ("Phi3Config", {"hidden_size": 128, "partial_rotary_factor": 0.75, "tie_word_embeddings": True}),
    "phi3 longrope": (
        "Phi3Config",
        {"partial_rotary_factor": 0.75, "rope_parameters": LONG | {"partial_rotary_factor": 0.75}}
        | {"original_max_position_embeddings": 32},
    ),
    "falcon 7B": ("FalconConfig", {"multi_query": True, "parallel_attn": True}),
    "falcon 7B untied": ("FalconConfig", {"multi_query": True, "tie_word_embeddings": False, "bias": True}),
    "falcon 40B": ("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 96}),
    "falcon 11B": (
        "FalconConfig",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "rope_theta": 500042.0},
    ),
    "falcon RW": ("FalconConfig", RW | {"alibi": True}),
    "falcon RW 6 heads": ("FalconConfig", RW | {"alibi": True, "hidden_size": 96, "num_attention_heads": 6}),
    "falcon sequential": ("FalconConfig", {"multi_query": True, "parallel_attn": False}),
    "gpt2": ("GPT2Config", {}),
    "gpt2 scale by layer": ("GPT2Config", {"scale_attn_by_inverse_layer_idx": True, "n_inner": 96}),
    "gpt2 unscaled": ("GPT2Config", {"scale_attn_weights": False, "activation_function": "gelu"}),
    "gpt2 untied": ("GPT2Config", {"tie_word_embeddings": False, "activation_function": "relu"}),
}


def attention_of(name: str) -> str:
    """Which of transformers' attentions is right: its eager Falcon adds alibi twice, in the mask and to the scores."""
    return "sdpa" if CASES[name][1].get("alibi") else "eager"


def build(name: str, folder: Path) -> transformers.PreTrainedModel:
    """A random model of transformers, saved into `folder` beside a tokenizer."""
    kind, settings = CASES[name]
    config = getattr(transformers, kind)(**(SIZES | settings), attn_implementation=attention_of(name))
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for p in model.parameters():
        if p.dim() == 1:  # biases begin at 0 and norms at 1, where mistakes with them would not show
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    give_tokenizer(folder)
    return model


def some_ids(rows: int, length: int) -> Tensor:
    return torch.randint(1, 257, (rows, length))


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any, Path]:
    theirs = build(request.param, tmp_path)
    ours, _ = lora.load(tmp_path, device="cpu")
    return ours, theirs, tmp_path


def test_logits_and_gradients_equal_transformers(pair: tuple[Any, Any, Path]) -> None:
    ours, theirs, _ = pair
    ids = some_ids(2, 40)
    probe = torch.randn(2, 40, 272)
    gradients = []
    for model, table in ((ours, ours.embedding()), (theirs, theirs.get_input_embeddings())):
        table.weight.requires_grad_()
        out = model(ids)
        logits = out if model is ours else out.logits
        (gradient,) = torch.autograd.grad((logits * probe).sum() / probe.numel() ** 0.5, table.weight)
        gradients.append((logits.detach(), gradient))
        table.weight.requires_grad_(False)
    (a, da), (b, db) = gradients
    assert (a - b).abs().max() < 1e-5
    assert (da - db).abs().max() < 1e-5


@torch.no_grad()
def test_greedy_tokens_equal_transformers_over_64(pair: tuple[Any, Any, Path], request: pytest.FixtureRequest) -> None:
    if "longrope" in request.node.name and int(transformers.__version__.split(".")[1]) < 23:
        pytest.skip(
            "transformers 5.17 gives other tokens from the original length on than 5.23, which this compares with"
        )
    ours, theirs, _ = pair
    ids = some_ids(1, 12)
    want = theirs.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generate_ids(ours, ids.tolist(), 64) == [want[0, 12:].tolist()]


@torch.no_grad()
def test_padding_changes_no_row(pair: tuple[Any, Any, Path]) -> None:
    ours, _, _ = pair
    short, long = some_ids(1, 9), some_ids(1, 21)
    for side in ("left", "right"):
        ids = torch.zeros(2, 21, dtype=torch.int64)
        real = torch.zeros(2, 21, dtype=torch.bool)
        at = slice(12, 21) if side == "left" else slice(0, 9)
        ids[0, at], ids[1] = short[0], long[0]
        real[0, at], real[1] = True, True
        positions = (real.cumsum(dim=1) - 1).clamp(min=0)
        both = ours(ids, real, positions)
        assert (both[0, at] - ours(short)[0]).abs().max() < 1e-5
        assert (both[1] - ours(long)[0]).abs().max() < 1e-5


@torch.no_grad()
def test_a_batch_gives_the_tokens_of_single_rows(pair: tuple[Any, Any, Path]) -> None:
    ours, _, _ = pair
    prompts = [some_ids(1, n)[0].tolist() for n in (3, 17, 9)]
    assert generate_ids(ours, prompts, 24) == [generate_ids(ours, [p], 24)[0] for p in prompts]


@torch.no_grad()
def test_what_we_write_transformers_reads(
    pair: tuple[Any, Any, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    ours, theirs, _ = pair
    _, tokenizer = lora.load(tmp_path, device="cpu")
    lora.save_pretrained(ours, tokenizer, tmp_path / "out", dtype=torch.float32)
    how = attention_of(request.node.callspec.params["pair"])
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation=how).eval()
    ids = some_ids(2, 40)
    assert (again(ids).logits - theirs(ids).logits).abs().max() < 1e-5
    back, _ = lora.load(tmp_path / "out", device="cpu")
    assert torch.equal(back(ids), ours(ids))
    assert {k: v for k, v in vars(back.config).items() if k != "rope_scaling"} == {
        k: v for k, v in vars(ours.config).items() if k != "rope_scaling"
    }


def test_every_family_is_tested_here_or_in_a_file_of_its_own() -> None:
    here = {getattr(transformers, kind).model_type for kind, _ in CASES.values()}
    encoders = {"bert", "roberta"}  # test_lora_models_bert.py
    old_names = {"RefinedWeb", "RefinedWebModel"}  # of falcon, in test_lora_models_falcon.py
    assert here | encoders | old_names == set(FAMILIES)


def test_an_unknown_family_is_refused_with_those_there_are(tmp_path: Path) -> None:
    build("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "mamba"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'mamba' is not known; there are .*gemma2.*qwen3"):
        lora.load(tmp_path)
