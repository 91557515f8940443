"""The optimizer against torch's, the path of the learning rate, and which rows run together."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lora
from lora.render import Example
from lora.train.batches import endless, epoch_order, steps_per_epoch
from lora.train.optim import AdamW
from lora.train.schedule import learning_rate

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


# ---- on the kernels ----
KINDS = {
    "float32": [torch.float32] * len(SHAPES),
    "float16": [torch.float16] * len(SHAPES),  # one buffer in 16 bits, which the step itself fills
    "mixed": [torch.float16, torch.float32, torch.float32, torch.float16, torch.float32],
}


def parameters(kind: str, device: torch.device) -> list[nn.Parameter]:
    torch.manual_seed(1)
    shapes = [*SHAPES[:-1], (30, 70)]  # the interpreter is slow
    return [nn.Parameter(torch.randn(s).to(device, d)) for s, d in zip(shapes, KINDS[kind], strict=True)]


def run(params: list[nn.Parameter], optimizer: AdamW, steps: int, seed: int, fused: bool = False) -> list[Tensor]:
    """Steps on random gradients, clipped to a quarter or so; the norms."""
    draw, norms = torch.Generator().manual_seed(seed), []
    for step in range(steps):
        for p in params:
            g = (torch.randn(p.shape, generator=draw) * 0.1).to(p.device, p.dtype)
            if p.grad is None:
                p.grad = g
            else:
                p.grad.add_(g)
        optimizer.gather()
        norms.append(optimizer.clip(1.0))
        if fused:
            optimizer.step(1e-2 / (step + 1), zero=True)
        else:
            optimizer.step(1e-2 / (step + 1))
            optimizer.zero_grad()
    return norms


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [32, 8])
def test_kernels_step_as_the_twins_do(
    kind: str, bits: int, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for path, fused in (("torch", False), ("triton", False), ("triton", True)):
        monkeypatch.setenv("LORA_KERNELS", path)
        params = parameters(kind, triton_device)
        optimizer = AdamW(params, weight_decay=0.1, bits=bits)
        norms = run(params, optimizer, 4, seed=2, fused=fused)
        assert not optimizer.grad.any() and all((p.grad is None) == (p.dtype != torch.float32) for p in params)
        results.append((optimizer.w.clone(), norms, [p.detach().clone() for p in params]))
    twin, kernel, one_pass = results
    # a gradient scaled in a pass of its own and one scaled in the step may differ by one rounding
    torch.testing.assert_close(kernel[0], twin[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kernel[1], twin[1])
    assert torch.equal(kernel[0], one_pass[0])
    assert all(torch.equal(a, b) for a, b in zip(kernel[2], one_pass[2], strict=True))
    start = 0
    for p in kernel[2]:
        assert torch.equal(p.flatten(), kernel[0][start : start + p.numel()].to(p.dtype))
        start += p.numel()


def test_clipping_twice_is_clipping_by_the_smaller(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limits in ((1.0, 0.5), (0.5, 1.0)):
        found = []
        for path in ("torch", "triton"):
            monkeypatch.setenv("LORA_KERNELS", path)
            params = parameters("float32", triton_device)
            optimizer = AdamW(params, eps=1.0)  # a step in proportion to the gradient
            torch.manual_seed(5)
            optimizer.grad.copy_(torch.randn(optimizer.grad.shape))
            norms = [optimizer.clip(limit) for limit in limits]
            optimizer.step(1.0)
            found.append((torch.stack(norms), optimizer.w))
        torch.testing.assert_close(found[0], found[1])
        assert found[0][0][0] > 10 and abs(found[0][0][1] - limits[0]) < 1e-3


def test_a_dropped_step_leaves_no_clipping_behind(triton_device: torch.device) -> None:
    params = parameters("float32", triton_device)
    optimizer = AdamW(params)
    optimizer.grad.fill_(1.0)
    optimizer.clip(0.1)
    optimizer.zero_grad()
    assert optimizer.scale is None


# ---- moments in 8 bits ----
def fitted(bits: int) -> tuple[float, Tensor]:
    """Loss and weights after 300 steps of a small regression whose inputs differ a hundredfold in size."""
    torch.manual_seed(3)
    x = torch.randn(512, 64) * torch.logspace(-1, 1, 64)
    y = torch.tanh(x @ torch.randn(64, 8) * 0.1)
    net = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 8))
    optimizer = AdamW(net.parameters(), bits=bits)
    for step in range(300):
        rows = torch.randint(0, 512, (64,))
        nn.functional.mse_loss(net(x[rows]), y[rows]).backward()
        optimizer.gather()
        optimizer.clip(1.0)
        optimizer.step(learning_rate(step, 300, 3e-3, 0.03))
        optimizer.zero_grad()
    with torch.no_grad():
        return nn.functional.mse_loss(net(x), y).item(), optimizer.w


def test_8_bits_train_as_32_do() -> None:
    (full, w), (small, w8) = fitted(32), fitted(8)
    assert full < 0.05 and small < 1.1 * full
    assert (w8 - w).norm() < 0.2 * w.norm()  # seen with five seeds: 0.14 to 0.15


def test_8_bits_take_2_bytes_a_parameter() -> None:
    optimizer = AdamW([nn.Parameter(torch.zeros(512, 256))], bits=8)
    kept = [t for t in optimizer.state_dict().values() if isinstance(t, Tensor) and t is not optimizer.w]
    assert sum(t.numel() * t.element_size() for t in kept) == 2 * 512 * 256 + 2 * 4 * 512


def test_bits_other_than_32_and_8_are_refused() -> None:
    with pytest.raises(ValueError, match="bits=16: a moment takes 32 or 8"):
        AdamW([nn.Parameter(torch.zeros(2))], bits=16)
    with pytest.raises(ValueError, match="optim_bits=4: 32 or 8"):
        lora.TrainConfig(optim_bits=4)


def test_fit_trains_with_moments_in_8_bits(stories: Path) -> None:
    rows = [{"prompt": "the cat", "completion": " sat on a mat"}] * 4
    losses = []
    for bits in (32, 8):
        model, tokenizer = lora.load(stories, device="cpu")
        torch.manual_seed(1)
        lora.wrap(model, r=4)
        config = lora.TrainConfig(max_steps=6, lr=5e-3, progress=False, optim_bits=bits)
        losses.append(
            [line["loss"] for line in lora.fit(model, tokenizer, rows, config=config).history if "loss" in line]
        )
    assert losses[0] != losses[1] and losses[1][-1] < 0.9 * losses[1][0]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


# ---- state ----
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [32, 8])
def test_a_restored_optimizer_goes_on_bit_for_bit(kind: str, bits: int, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    params = parameters(kind, cpu)
    optimizer = AdamW(params, bits=bits)
    run(params, optimizer, 3, seed=4)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    run(params, optimizer, 3, seed=5)
    others = [nn.Parameter(torch.zeros_like(p)) for p in params]
    other = AdamW(others, bits=bits)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.t == 3
    run(others, other, 3, seed=5)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    for key, value in optimizer.state_dict().items():
        same = (
            torch.equal(value, other.state_dict()[key])
            if isinstance(value, Tensor)
            else value == other.state_dict()[key]
        )
        assert same, key


def test_the_state_of_another_optimizer_is_refused_and_changes_nothing() -> None:
    def fresh(*shapes: tuple[int, ...], bits: int = 32) -> AdamW:
        return AdamW([nn.Parameter(torch.ones(shape)) for shape in shapes], bits=bits)

    mine = fresh((4, 8), (300,))
    before = copy.deepcopy(mine.state_dict())
    broken = copy.deepcopy(before) | {"w": torch.zeros(332), "v": torch.zeros(332, dtype=torch.float64)}
    cases = [
        (fresh((4, 8), (300,), bits=8).state_dict(), "optimizer state of 8 bits.*this one has 32 bits"),
        (fresh((4, 8)).state_dict(), "of 1 parameters; this one trains 2"),
        (fresh((8, 4), (300,)).state_dict(), r"parameter 0: \[8, 4\]; here it is \[4, 8\]"),
        (broken, r"'v' is \(332,\) torch.float64; it must be \(332,\) torch.float32"),
        ({"bits": 32, "t": 1}, "optimizer state of 32 bits"),
    ]
    for state, match in cases:
        with pytest.raises(ValueError, match=match):
            mine.load_state_dict(state)
    after = mine.state_dict()
    assert all(torch.equal(v, after[k]) if isinstance(v, Tensor) else v == after[k] for k, v in before.items())


def test_parameters_on_two_devices_are_refused() -> None:
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device="meta"))]
    with pytest.raises(ValueError, match="parameters on cpu, meta"):
        AdamW(params)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_captured_step_follows_the_rate(bits: int, gpu: torch.device) -> None:
    eager, captured = (parameters("float32", gpu) for _ in range(2))
    one, two = AdamW(eager, bits=bits), AdamW(captured, bits=bits)
    warm = AdamW(parameters("float32", gpu), bits=bits)
    warm.grad.fill_(0.1)
    warm.clip(0.5)
    warm.step(1e-3)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        two.clip(0.5)
        two.update()
    for step in range(5):
        g = torch.randn(one.grad.shape, device=gpu)
        one.grad.copy_(g)
        two.grad.copy_(g)
        one.clip(0.5)
        one.step(1e-2 / (step + 1))
        two.advance(1e-2 / (step + 1))
        graph.replay()
    assert torch.equal(one.w, two.w)


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
def lengths(n: int) -> list[int]:
    return torch.randint(1, 200, (n,)).tolist()


def examples(n: int) -> list[Example]:
    return [Example(tuple(range(k)), (True,) * k, row) for row, k in enumerate(lengths(n))]


CASES = [(1, 1), (5, 2), (64, 2), (65, 2), (100, 3), (257, 4), (1000, 7), (33, 1)]


@pytest.mark.parametrize(("n", "batch"), CASES)
def test_an_epoch_holds_every_row_once(n: int, batch: int) -> None:
    batches = epoch_order(lengths(n), batch, seed=3, epoch=0)
    assert sorted(i for b in batches for i in b) == list(range(n))
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
    rows = lengths(200)

    def order(seed: int, epoch: int) -> list[list[int]]:
        return epoch_order(rows, 4, seed, epoch)

    state = torch.get_rng_state()
    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's own randomness is not drawn from


def test_rows_of_like_length_run_together() -> None:
    rows = lengths(512)
    batches = epoch_order(rows, 8, seed=0, epoch=0)
    assert sum(len(b) * max(rows[i] for i in b) for b in batches) < 1.1 * sum(rows)
