"""The optimizer against torch's, the path of the learning rate, and which rows run together."""

import math

import pytest
import torch
from torch import nn

from lora.render import Example
from lora.train.batches import endless, epoch_batches, steps_per_epoch
from lora.train.optim import AdamW, learning_rate

SHAPES = [(7, 5), (3,), (64, 33), (1, 1), (600, 700)]  # the last spans two chunks of the flat buffer


def twins() -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    ours = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    return ours, [nn.Parameter(p.detach().clone()) for p in ours]


def set_grads(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for p, q in zip(ours, theirs, strict=True):
        g = torch.randn_like(p) * 0.3
        q.grad = g.clone()
        assert p.grad is not None
        p.grad.copy_(g)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_torch_over_20_steps(weight_decay: float) -> None:
    ours, theirs = twins()
    mine = AdamW(ours, betas=(0.9, 0.98), weight_decay=weight_decay)
    torchs = torch.optim.AdamW(theirs, betas=(0.9, 0.98), weight_decay=weight_decay)
    for step in range(20):
        lr = 1e-2 * (step + 1) / 20
        set_grads(ours, theirs)
        torchs.param_groups[0]["lr"] = lr
        mine.gather()
        mine.step(lr)
        torchs.step()
        mine.zero_grad()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_clip_equals_torch(limit: float) -> None:
    ours, theirs = twins()
    mine = AdamW(ours)
    set_grads(ours, theirs)
    mine.gather()
    norm = mine.clip(limit)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, limit), rtol=1e-5, atol=1e-6)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-8)


def test_clip_at_zero_changes_nothing() -> None:
    ours, theirs = twins()
    mine = AdamW(ours)
    set_grads(ours, theirs)
    assert mine.clip(0.0) > 1
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p.grad, q.grad)


def test_autograd_writes_into_the_flat_gradient_and_adds_up() -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    mine = AdamW([p])
    (p * torch.tensor([3.0, 4.0])).sum().backward()
    p.sum().backward()
    mine.gather()
    assert mine.grad.tolist() == [4.0, 5.0]
    mine.zero_grad()
    assert p.grad is not None and p.grad.tolist() == [0.0, 0.0] and mine.grad.tolist() == [0.0, 0.0]


def test_a_gradient_that_someone_replaced_is_gathered() -> None:
    p = nn.Parameter(torch.zeros(3))
    mine = AdamW([p])
    p.grad = torch.tensor([1.0, 2.0, 3.0])
    mine.gather()
    assert mine.grad.tolist() == [1.0, 2.0, 3.0]


def test_gradients_set_to_none_do_not_leave_old_ones_behind() -> None:
    p = nn.Parameter(torch.zeros(2))
    mine = AdamW([p])
    p.sum().backward()
    mine.zero_grad()
    mine.gather()
    assert mine.grad.tolist() == [0.0, 0.0]


def test_16_bit_parameters_move_by_float32_masters() -> None:
    start = torch.full((4,), 1.0)
    low, high = nn.Parameter(start.bfloat16()), nn.Parameter(start.clone())
    mine, other = AdamW([low]), AdamW([high])
    for _ in range(20):  # each step is below half a bfloat16 unit at 1.0, so without a master nothing would move
        low.grad = torch.ones_like(low)
        assert high.grad is not None
        high.grad.fill_(1.0)
        for optimizer in (mine, other):
            optimizer.gather()
            optimizer.step(1e-3)
            optimizer.zero_grad()
    assert low.dtype == torch.bfloat16 and low.grad is None
    torch.testing.assert_close(mine.w, other.w)
    assert torch.equal(low.detach(), high.detach().bfloat16()) and (low < 1.0).all()


def test_frozen_parameters_are_left_out_and_nothing_to_train_is_an_error() -> None:
    frozen, free = nn.Parameter(torch.ones(3), requires_grad=False), nn.Parameter(torch.ones(2))
    mine = AdamW([frozen, free], weight_decay=0.5)
    assert mine.w.numel() == 2
    mine.step(0.1)
    assert frozen.tolist() == [1.0] * 3
    with pytest.raises(ValueError, match="no parameter to train"):
        AdamW([frozen])


# ---- learning rate ----
def test_learning_rate_rises_in_a_line_and_falls_by_a_cosine() -> None:
    path = [learning_rate(step, 100, 2.0, 0.1) for step in range(100)]
    assert path[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert path[10] == 2.0 and path[55] == pytest.approx(1.0)
    assert all(a > b for a, b in zip(path[10:], path[11:], strict=False)) and 0 < path[-1] < 0.002
    assert path[32] == pytest.approx(1 + math.cos(math.pi * 22 / 90))


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 1.0])
def test_learning_rate_is_never_zero_nor_above_the_peak(steps: int, warmup: float) -> None:
    path = [learning_rate(step, steps, 1.0, warmup) for step in range(steps)]
    assert all(0 < lr <= 1 for lr in path) and max(path) == 1.0


# ---- batches ----
def examples(n: int) -> list[Example]:
    lengths = torch.randint(1, 200, (n,)).tolist()
    return [Example(tuple(range(k)), (True,) * k, row) for row, k in enumerate(lengths)]


CASES = [(1, 1), (5, 2), (64, 2), (65, 2), (100, 3), (257, 4), (1000, 7), (33, 1)]


@pytest.mark.parametrize(("n", "batch"), CASES)
def test_an_epoch_holds_every_row_once(n: int, batch: int) -> None:
    batches = epoch_batches(examples(n), batch, seed=3, epoch=0)
    assert sorted(e.row for b in batches for e in b) == list(range(n))
    assert all(1 <= len(b) <= batch for b in batches)


@pytest.mark.parametrize("accumulate", [1, 2, 3, 8])
@pytest.mark.parametrize(("n", "batch"), CASES)
def test_steps_per_epoch_is_the_real_number(n: int, batch: int, accumulate: int) -> None:
    rows = examples(n)
    steps = steps_per_epoch(n, batch, accumulate)
    walk = endless(rows, batch, accumulate, seed=0)
    epochs = [next(walk)[0] for _ in range(2 * steps + 1)]
    assert epochs == [0] * steps + [1] * steps + [2]


def test_batches_are_the_same_for_the_same_seed_and_differ_between_epochs_and_seeds() -> None:
    rows = examples(200)

    def order(seed: int, epoch: int) -> list[list[int]]:
        return [[e.row for e in b] for b in epoch_batches(rows, 4, seed, epoch)]

    state = torch.get_rng_state()
    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's own randomness is not drawn from


def test_rows_of_like_length_run_together() -> None:
    rows = examples(512)
    batches = epoch_batches(rows, 8, seed=0, epoch=0)
    padded = sum(len(b) * max(len(e.ids) for e in b) for b in batches)
    assert padded < 1.1 * sum(len(e.ids) for e in rows)
