"""Every kind of adapter tensor: wrapped, trained, counted, switched off, merged, kept; peft reads it and is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import IDS, SMALL, gpt2, logits, seeded, shake
from tiny import llama as small_llama
from torch import nn

import lora
from lora.layer import adapted

WIDE: dict[str, Any] = SMALL | {"initializer_range": 0.1}
PADS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama(**more: Any) -> nn.Module:
    return small_llama(initializer_range=0.1, **more)


def biased() -> nn.Module:
    return llama(attention_bias=True, mlp_bias=True)


def tied() -> nn.Module:
    return llama(tie_word_embeddings=True)


def gemma3(tied: bool = True) -> nn.Module:
    config = transformers.Gemma3TextConfig(**WIDE, head_dim=8, tie_word_embeddings=tied, **PADS)
    return seeded(config, transformers.Gemma3ForCausalLM)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**WIDE, num_local_experts=3, num_experts_per_tok=2)
    return seeded(config, transformers.MixtralForCausalLM)


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(**WIDE, head_dim=8, num_local_experts=3, num_experts_per_tok=2, **PADS)
    return seeded(config, transformers.GptOssForCausalLM)


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
Case = tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any]]
# base, options of lora.wrap, options of peft.LoraConfig
CASES: dict[str, Case] = {
    "linear": (small_llama, {"targets": ["q_proj", "up_proj"]}, {"target_modules": ["q_proj", "up_proj"]}),
    "all_linear": (small_llama, {}, {"target_modules": "all-linear"}),
    "conv1d": (gpt2, {}, {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "embedding": (small_llama, {"targets": ["embed_tokens", "q_proj"]}, {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": (small_llama, {"targets": ["lm_head", "v_proj"]}, {"target_modules": ["lm_head", "v_proj"]}),
    "rslora": (
        small_llama,
        {"rslora": True, "targets": ["q_proj"]},
        {"use_rslora": True, "target_modules": ["q_proj"]},
    ),
    "patterns": (
        small_llama,
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"model.layers.1.mlp.up_proj": 5.0}},
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"model.layers.1.mlp.up_proj": 5},
        },
    ),
    "one_layer": (
        small_llama,
        {"targets": ["model.layers.1.mlp.up_proj"]},
        {"target_modules": ["model.layers.1.mlp.up_proj"]},
    ),
    "excluded": (
        small_llama,
        {"targets": ["q_proj"], "exclude": ["model.layers.0.*"]},
        {"target_modules": ["q_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]},
    ),
    "whole_head": (
        small_llama,
        {"targets": ["q_proj"], "train_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "layer_numbers": (
        small_llama,
        {"targets": ["*.1.self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ),
    "tokens": (
        llama,
        {"targets": ["q_proj"], "train_tokens": [3, 5, 40]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 40]},
    ),
    "tokens, tied": (
        tied,
        {"targets": ["q_proj"], "train_tokens": [0, 5, 7]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [0, 5, 7]},
    ),
    "tokens, scaled table, tied": (
        gemma3,
        {"targets": ["q_proj"], "train_tokens": [5, 7]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 7]},
    ),
    "a whole norm": (
        llama,
        {"targets": ["q_proj"], "train_modules": ["model.norm"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]},
    ),
    "tokens of two modules": (
        llama,
        {"targets": ["q_proj"], "train_tokens": {"embed_tokens": [5], "lm_head": [1, 2]}},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5], "lm_head": [1, 2]}},
    ),
    "tokens in no order": (
        llama,
        {"targets": ["q_proj"], "train_tokens": [40, 3, 5]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [40, 3, 5]},
    ),
    "scaled table": (
        lambda: gemma3(tied=False),
        {"targets": ["embed_tokens", "q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ),
    "biases of targets": (
        biased,
        {"targets": ["q_proj", "up_proj"], "bias": "lora_only"},
        {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"},
    ),
    "biases of targets, conv1d": (
        gpt2,
        {"targets": ["c_attn"], "bias": "lora_only"},
        {"target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True},
    ),
    "all biases": (
        gpt2,
        {"targets": ["c_attn"], "bias": "all"},
        {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True},
    ),
    "all biases and a whole head": (
        biased,
        {"targets": ["q_proj"], "bias": "all", "train_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["lm_head"]},
    ),
    "biases and DoRA": (
        biased,
        {"targets": ["q_proj"], "bias": "lora_only", "dora": True},
        {"target_modules": ["q_proj"], "bias": "lora_only", "use_dora": True},
    ),
    "a bias of B": (
        llama,
        {"targets": ["q_proj"], "lora_bias": True},
        {"target_modules": ["q_proj"], "lora_bias": True},
    ),
    "a bias of B beside one": (
        biased,
        {"targets": ["q_proj"], "lora_bias": True, "rslora": True},
        {"target_modules": ["q_proj"], "lora_bias": True, "use_rslora": True},
    ),
    "experts": (
        mixtral,
        {"targets": ["q_proj"], "parameters": EXPERTS},
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
    ),
    "experts, one parameter": (
        mixtral,
        {"targets": ["q_proj"], "parameters": EXPERTS[1:]},
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]},
    ),
    "experts and no layers": (
        mixtral,
        {"targets": [], "parameters": EXPERTS},
        {"target_modules": [], "target_parameters": EXPERTS},
    ),
    "a router": (
        mixtral,
        {"targets": ["q_proj"], "parameters": ["gate.weight", *EXPERTS]},
        {"target_modules": ["q_proj"], "target_parameters": ["gate.weight", *EXPERTS]},
    ),
    "experts of other ranks": (
        mixtral,
        {"targets": ["q_proj"], "parameters": EXPERTS, "rank_pattern": {"experts.down_proj": 2}, "rslora": True},
        {
            "target_modules": ["q_proj"],
            "target_parameters": EXPERTS,
            "rank_pattern": {"experts.down_proj": 2},
            "use_rslora": True,
        },
    ),
    "transposed experts": (
        gpt_oss,
        {"targets": ["q_proj"], "parameters": EXPERTS},
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
    ),
}
every_case = pytest.mark.parametrize("case", list(CASES))


def wrapped(case: str) -> Any:
    make, options, _ = CASES[case]
    return lora.wrap(make(), r=4, alpha=12.0, **options)


@every_case
def test_peft_reads_what_we_save(case: str, tmp_path: Path) -> None:
    base = logits(CASES[case][0]())
    model = shake(wrapped(case))
    want = logits(model)
    lora.save(model, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(CASES[case][0](), tmp_path / "a").eval()
    assert (logits(theirs) - want).abs().max() <= 1e-6 * max(1.0, float(want.abs().max()))
    assert (want - base).abs().max() > 1e-3


@every_case
def test_we_read_what_peft_saves(case: str, tmp_path: Path) -> None:
    make, _, options = CASES[case]
    base = logits(make())
    theirs = shake(peft.get_peft_model(make(), peft.LoraConfig(r=4, lora_alpha=12, **options)).eval())
    want = logits(theirs)
    theirs.save_pretrained(tmp_path / "a")
    model = lora.attach(make(), tmp_path / "a")
    assert (logits(model) - want).abs().max() <= 1e-6 * max(1.0, float(want.abs().max()))
    assert (want - base).abs().max() > 1e-3
    assert not any(p.requires_grad for p in model.parameters())


@every_case
def test_what_we_save_comes_back_bit_for_bit(case: str, tmp_path: Path) -> None:
    model = shake(wrapped(case))
    folder = lora.save(model, tmp_path / "a")
    fresh, before = CASES[case][0](), torch.get_rng_state()
    back = lora.attach(fresh, folder, "again", trainable=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(logits(back), logits(model))
    ours = load_file(folder / "adapter_model.safetensors")
    theirs = load_file(lora.save(back, tmp_path / "b") / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert (folder / "adapter_config.json").read_bytes() == (tmp_path / "b" / "adapter_config.json").read_bytes()
    assert [tuple(p.shape) for p in back.parameters() if p.requires_grad] == [
        tuple(p.shape) for p in model.parameters() if p.requires_grad
    ]


@every_case
def test_it_trains_beside_an_untouched_base_and_is_taken_out_again(case: str) -> None:
    base = CASES[case][0]()
    want = logits(base)
    keys = list(base.state_dict())
    model = wrapped(case)
    assert torch.equal(logits(model), want)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    status = lora.status(model)
    assert status.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(row.trainable for row in status.rows) == status.trainable and str(status)

    shake(model)
    with lora.disabled(model):
        assert torch.equal(logits(model), want)
    model.train()
    learned = [p for p in model.parameters() if p.requires_grad]
    steps = torch.optim.AdamW(learned, lr=2e-3)
    losses = []
    for _ in range(3):
        loss = model(IDS, labels=IDS).loss
        steps.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in learned)
        steps.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)

    tuned = logits(model.eval())
    assert (tuned - want).abs().max() > 1e-3
    lora.merge(model)
    assert (logits(model) - tuned).abs().max() < 1e-5 * max(1.0, float(tuned.abs().max()))
    with lora.disabled(model):
        assert torch.equal(logits(model), want)
    lora.unmerge(model)
    assert torch.equal(logits(model), tuned)
    lora.detach(model, "default")
    assert torch.equal(logits(model), want) and list(model.state_dict()) == keys


@every_case
def test_unloaded_it_is_a_plain_model_with_its_ties(case: str) -> None:
    base, model = CASES[case][0](), shake(wrapped(case))
    want = logits(model)
    lora.merge(model, unload=True)
    assert not list(adapted(model)) and list(model.state_dict()) == list(base.state_dict()) or "bias of B" in case
    assert (logits(model) - want).abs().max() < 1e-5 * max(1.0, float(want.abs().max()))
    one, other = ((m.get_input_embeddings().weight, m.get_output_embeddings().weight) for m in (base, model))
    assert (one[0] is one[1]) == (other[0] is other[1])
