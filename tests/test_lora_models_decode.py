"""The decoder's step against the model's own forward; on a GPU, the recorded step against the CPU's tokens."""

import copy
from pathlib import Path

import pytest
import torch

import lora
from lora.models.decode import Decoder, decoder_for
from lora.models.generate import generate_ids
from lora.models.llama import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=101, hidden_size=128, intermediate_size=192, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32,
    max_length=256,
)  # fmt: skip
PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17, 18]]


def tiny(adapters: bool = True) -> Llama:
    torch.manual_seed(3)
    model = Llama(CONFIG)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.ndim == 1 else 0.0, std=0.15)
    lora.quantize(model)
    if adapters:
        lora.wrap(model, r=4)
        for name, p in model.named_parameters():
            if name.endswith(".b"):
                torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def by_forward(model: Llama, prompt: list[int], new: int) -> list[int]:
    """Greedy tokens, the whole row computed anew for each."""
    ids = list(prompt)
    device = model.model.norm.weight.device
    with torch.no_grad():
        for _ in range(new):
            ids.append(int(model(torch.tensor([ids], device=device))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_tokens_equal_those_of_the_whole_forward() -> None:
    model = tiny()
    want = [by_forward(model, prompt, 20) for prompt in PROMPTS]
    assert generate_ids(model, PROMPTS, 20) == want
    assert len({tuple(row) for row in want}) == 3


@torch.no_grad()
def test_logits_of_a_step_equal_those_of_the_whole_forward() -> None:
    model = tiny()
    ids = torch.randint(101, (2, 9))
    decoder = Decoder(model, 2, 16)
    logits = decoder.begin(ids[:, :4], torch.ones(2, 4, dtype=torch.bool))
    for i in range(4, 9):
        torch.testing.assert_close(logits, model(ids[:, :i])[:, -1], rtol=1e-4, atol=1e-4)
        logits = decoder.step(ids[:, i])


def test_another_adapter_no_adapter_and_a_merge_are_noticed() -> None:
    model = tiny()
    first = generate_ids(model, PROMPTS, 12)
    with lora.disabled(model):
        base = generate_ids(model, PROMPTS, 12)
        assert base == [by_forward(model, p, 12) for p in PROMPTS]
    assert base != first == generate_ids(model, PROMPTS, 12)
    lora.merge(model)
    assert generate_ids(model, PROMPTS, 12) == [by_forward(model, p, 12) for p in PROMPTS]


def test_a_trained_copy_of_a_whole_block_is_not_looked_past() -> None:
    model = tiny(adapters=False)
    lora.wrap(model, r=2, train_modules=["model.layers.1.mlp"]).eval()
    copy = model.model.layers[1].mlp.adapters["default"]
    for p in copy.parameters():
        torch.nn.init.normal_(p, std=0.4)
    assert not Decoder(model, 1, 16).plain
    assert generate_ids(model, PROMPTS, 12) == [by_forward(model, p, 12) for p in PROMPTS]


def test_a_trained_norm_is_not_looked_past() -> None:
    model = tiny(adapters=False)
    lora.wrap(model, r=2, train_modules=["model.norm"]).eval()
    torch.nn.init.normal_(model.model.norm.adapters["default"].weight)
    assert generate_ids(model, PROMPTS, 12) == [by_forward(model, p, 12) for p in PROMPTS]


def test_the_gpu_gives_the_tokens_of_the_cpu_in_float32(gpu: torch.device) -> None:
    model = tiny()
    want = generate_ids(model, PROMPTS, 40)
    model.to(gpu)
    assert generate_ids(model, PROMPTS, 40) == want
    decoder = decoder_for(model, 3, 48)
    assert decoder.graph is not None
    assert generate_ids(model, PROMPTS, 40) == want and decoder_for(model, 3, 48) is decoder
    with lora.disabled(model):
        assert generate_ids(model, PROMPTS, 40) != want
    assert generate_ids(model, PROMPTS, 40) == want


def test_a_recorded_step_reads_trained_factors_where_they_lie(gpu: torch.device) -> None:
    model = tiny().to(gpu)
    before = generate_ids(model, PROMPTS, 24)
    decoder = decoder_for(model, 3, 32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".b"):
                p.mul_(-1)
    after = generate_ids(model, PROMPTS, 24)
    assert after != before and decoder_for(model, 3, 32) is decoder
    assert after == [by_forward(model, p, 24) for p in PROMPTS]


def test_bfloat16_on_a_gpu_follows_its_own_forward(gpu: torch.device, tmp_path: Path) -> None:
    model = tiny().bfloat16().to(gpu)
    ids = torch.randint(101, (2, 30), device=gpu)
    decoder = Decoder(model, 2, 64)
    exact = copy.deepcopy(model).float()
    with torch.no_grad():
        logits = decoder.begin(ids[:, :5], torch.ones(2, 5, dtype=torch.bool, device=gpu))
        for i in range(5, 30):
            right, forward = exact(ids[:, :i])[:, -1], model(ids[:, :i])[:, -1].float()
            # the step rounds codes, the forward whole weights: one as good as the other
            assert (logits - right).norm() <= 2 * (forward - right).norm()
            logits = decoder.step(ids[:, i])


@pytest.mark.parametrize("stop_at", [0, 7, 8, 30])
def test_a_row_ends_before_its_stop_token(stop_at: int) -> None:
    model = tiny()
    row = generate_ids(model, PROMPTS[:1], 40)[0]
    stop = row[stop_at]
    assert generate_ids(model, PROMPTS[:1], 40, [stop])[0] == row[: row.index(stop)]
