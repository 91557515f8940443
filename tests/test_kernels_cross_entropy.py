"""Cross entropy: the twin against plain autograd of its formula, the kernel against the twin."""

import pytest
import torch
from bounds import assert_as_good, dtypes, grads_of, leaf
from torch import Tensor

from lora.kernels import cross_entropy
from lora.kernels.cross_entropy import linear_cross_entropy

F64 = torch.float64


def ce_formula(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(h @ w.T, t, reduction="none")


def test_cross_entropy_equals_the_formula_and_its_gradient() -> None:
    h, w, t, g = leaf(13, 8), torch.randn(29, 8), torch.randint(29, (13,)), torch.rand(13)
    nll, hit = linear_cross_entropy(h, w, t)
    h64 = h.detach().double().requires_grad_()
    want = ce_formula(h64, w.double(), t)
    torch.testing.assert_close(nll.double(), want, rtol=1e-5, atol=1e-6)
    (got,) = grads_of(nll, g, [h])
    torch.testing.assert_close(got.double(), grads_of(want, g.double(), [h64])[0], rtol=1e-4, atol=1e-6)
    assert torch.equal(hit, (h @ w.T).argmax(dim=1) == t)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 12, 13, 100])
def test_cross_entropy_is_the_same_in_any_number_of_chunks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    h, w, t = leaf(13, 8), torch.randn(29, 8), torch.randint(29, (13,))
    whole, whole_hit = linear_cross_entropy(h, w, t)
    (dh,) = grads_of(whole, torch.ones(13), [h])
    monkeypatch.setitem(cross_entropy.BUDGET, "cpu", 4 * 29 * rows)
    nll, hit = linear_cross_entropy(h, w, t)
    torch.testing.assert_close(nll, whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grads_of(nll, torch.ones(13), [h])[0], dh, rtol=1e-5, atol=1e-6)
    assert torch.equal(hit, whole_hit)


def test_cross_entropy_keeps_a_row_with_no_weight_out_of_the_gradient() -> None:
    h, w, t = leaf(6, 8), torch.randn(29, 8), torch.randint(29, (6,))
    nll, _ = linear_cross_entropy(h, w, t)
    (dh,) = grads_of(nll, torch.tensor([1.0, 0, 1, 0, 0, 1]), [h])
    assert (dh[[1, 3, 4]] == 0).all() and (dh[[0, 2, 5]] != 0).any(dim=1).all()


def test_cross_entropy_of_huge_logits_is_finite() -> None:
    h = (torch.randn(5, 8) * 1e4).requires_grad_()
    nll, _ = linear_cross_entropy(h, torch.randn(29, 8), torch.randint(29, (5,)))
    (dh,) = grads_of(nll, torch.ones(5), [h])
    assert torch.isfinite(nll).all() and torch.isfinite(dh).all() and nll.max() > 1e3


def test_cross_entropy_without_gradient_keeps_nothing() -> None:
    nll, hit = linear_cross_entropy(torch.randn(5, 8), torch.randn(29, 8), torch.randint(29, (5,)))
    assert not nll.requires_grad and nll.dtype == torch.float32 and hit.dtype == torch.bool


def test_cross_entropy_in_bfloat16_is_as_good_as_torch() -> None:
    h, w, t = torch.randn(20, 32).bfloat16(), torch.randn(50, 32).bfloat16(), torch.randint(50, (20,))
    exact = ce_formula(h.double(), w.double(), t)
    ours, _ = linear_cross_entropy(h, w, t)
    plain = ce_formula(h, w, t).double()
    assert (ours.double() - exact).abs().max() <= (plain - exact).abs().max() + 1e-2


# ---- given logits ----
def test_plain_cross_entropy_equals_torch_and_passes_gradcheck() -> None:
    z, t = leaf(7, 19, dtype=F64), torch.randint(19, (7,))
    nll, hit = cross_entropy.cross_entropy(z, t)
    torch.testing.assert_close(nll, torch.nn.functional.cross_entropy(z, t, reduction="none"))
    assert torch.equal(hit, z.argmax(dim=1) == t) and not hit.requires_grad
    assert torch.autograd.gradcheck(lambda z: cross_entropy.cross_entropy(z, t)[0], [z])


def test_plain_cross_entropy_refuses_shapes_that_do_not_fit() -> None:
    for z, t in ((torch.zeros(2, 3, 4), torch.zeros(2, 3)), (torch.zeros(3, 4), torch.zeros(2))):
        with pytest.raises(ValueError, match=r"they must be \(n, V\) and \(n,\)"):
            cross_entropy.cross_entropy(z, t.long())


# ---- kernel ----
def softmax_gap(z: Tensor, t: Tensor) -> Tensor:
    return torch.softmax(z.double(), dim=1) - torch.nn.functional.one_hot(t, z.shape[1])


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (5, 33), (4, 1000), (2, 9001)], ids=str)
def test_the_kernel_is_as_good_as_the_twin(triton_device: torch.device, shape: tuple[int, int]) -> None:
    for dtype in dtypes():
        z, t, g = (torch.randn(shape) * 5).to(dtype), torch.randint(shape[1], shape[:1]), torch.rand(shape[0])
        exact = torch.nn.functional.cross_entropy(z.double(), t, reduction="none")
        on = [x.to(triton_device) for x in (z, t, g)]
        nll, hit, stats = cross_entropy.statistics(*on[:2])
        nll_ref, hit_ref, stats_ref = cross_entropy._statistics_ref(z, t)
        assert_as_good(nll, nll_ref, exact)
        assert torch.equal(hit.cpu(), hit_ref)
        dz = cross_entropy.gradient(*on[:2], stats, on[2])
        assert_as_good(dz, cross_entropy._gradient_ref(z, t, stats_ref, g), softmax_gap(z, t) * g.double()[:, None])
        _, _, dz_ref = cross_entropy._overwrite_ref(z.clone(), t, True)
        room = on[0].clone()
        over = cross_entropy._overwrite(room, on[1], True)
        assert over[2] is room and torch.equal(over[0], nll) and torch.equal(over[1], hit)
        assert_as_good(over[2], dz_ref, softmax_gap(z, t))


def test_the_kernel_walks_a_row_in_any_number_of_steps(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    z, t = torch.randn(3, 67, device=triton_device), torch.tensor([0, 66, 31], device=triton_device)
    want = torch.nn.functional.cross_entropy(z.double(), t, reduction="none")
    for block in (16, 32, 64, 128):
        monkeypatch.setattr(cross_entropy, "tile", lambda V, most, block=block: (block, 1))
        nll, _, dz = cross_entropy._overwrite(z.clone(), t, True)
        torch.testing.assert_close(nll.double(), want, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(dz.double(), softmax_gap(z, t), rtol=1e-5, atol=1e-7)
        assert dz.sum(dim=1).abs().max() < 1e-6


def test_the_kernel_is_exact_on_huge_equal_and_impossible_logits(triton_device: torch.device) -> None:
    z = torch.randn(4, 50) * 1e4
    z[1] = 3.0
    z[2, 10:] = -float("inf")
    z[3] = torch.arange(50) * 200.0 - 1e4
    t = torch.tensor([7, 49, 3, 0])
    exact = torch.nn.functional.cross_entropy(z.double(), t, reduction="none")
    nll, hit, dz = cross_entropy._overwrite(z.clone().to(triton_device), t.to(triton_device), True)
    torch.testing.assert_close(nll.cpu().double(), exact, rtol=1e-6, atol=1e-6)
    assert torch.isfinite(dz).all() and dz.sum(dim=1).abs().max() < 1e-5
    assert torch.equal(hit.cpu(), z.gather(1, t[:, None])[:, 0] == z.amax(dim=1)) and hit[1]  # any of equals is a hit
    torch.testing.assert_close(dz.cpu().double(), softmax_gap(z, t), rtol=1e-5, atol=1e-6)


def test_the_kernel_gives_nan_for_a_target_outside_the_vocabulary_and_for_nan(triton_device: torch.device) -> None:
    z = torch.randn(4, 9)
    z[3, 2] = float("nan")
    t = torch.tensor([-100, 9, 4, 4])
    nll, hit, dz = cross_entropy._overwrite(z.clone().to(triton_device), t.to(triton_device), True)
    assert nll.isnan().tolist() == [True, True, False, True] and not hit[:2].any()
    assert dz.isnan().all(dim=1).tolist() == [True, True, False, True]


@pytest.mark.parametrize("rows", [1, 3, 13, 100])
def test_linear_cross_entropy_by_the_kernel_equals_float64_in_any_number_of_chunks(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    h, w, t, g = torch.randn(13, 8), torch.randn(29, 8), torch.randint(29, (13,)), torch.rand(13)
    h64 = h.double().requires_grad_()
    want = ce_formula(h64, w.double(), t)
    monkeypatch.setitem(cross_entropy.BUDGET, "cpu", 4 * 29 * rows)
    monkeypatch.setattr(cross_entropy, "BUDGET_GPU", 4 * 29 * rows)
    on = h.to(triton_device).requires_grad_()
    nll, hit = linear_cross_entropy(on, w.to(triton_device), t.to(triton_device))
    torch.testing.assert_close(nll.cpu().double(), want, rtol=1e-5, atol=1e-5)
    (dh,) = grads_of(nll, g.to(triton_device), [on])
    torch.testing.assert_close(dh.cpu().double(), grads_of(want, g.double(), [h64])[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(hit.cpu(), (h @ w.T).argmax(dim=1) == t)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(on, w.to(triton_device), t.to(triton_device))[0], nll)


def test_plain_cross_entropy_by_the_kernel_has_torchs_gradient(triton_device: torch.device) -> None:
    z, t = torch.randn(6, 40), torch.randint(40, (6,))
    z64 = z.double().requires_grad_()
    torch.nn.functional.cross_entropy(z64, t).backward()
    wide = torch.full((6, 48), 7.0, device=triton_device)
    wide[:, :40] = z.to(triton_device)
    on = wide[:, :40].detach().requires_grad_()  # rows 48 apart
    nll, _ = cross_entropy.cross_entropy(on, t.to(triton_device))
    nll.mean().backward()
    assert on.grad is not None and z64.grad is not None
    torch.testing.assert_close(on.grad.cpu().double(), z64.grad, rtol=1e-5, atol=1e-7)
    assert torch.equal(wide[:, :40].cpu(), z) and (wide[:, 40:] == 7.0).all()
    on = z.to(triton_device).T.contiguous().T.requires_grad_()  # in columns
    again, _ = cross_entropy.cross_entropy(on, t.to(triton_device))  # sums in another order
    torch.testing.assert_close(again, nll, rtol=1e-6, atol=0)


def test_the_kernel_overwrites_its_rows_and_nothing_between(triton_device: torch.device) -> None:
    wide = torch.randn(5, 40, device=triton_device)
    before, t = wide.clone(), torch.randint(33, (5,), device=triton_device)
    _, _, dz = cross_entropy._overwrite(wide[:, :33], t, True)
    assert torch.equal(wide[:, 33:], before[:, 33:]) and torch.equal(wide[:, :33], dz)
    torch.testing.assert_close(dz.double(), softmax_gap(before[:, :33], t), rtol=1e-5, atol=1e-7)


def test_two_runs_of_the_kernel_give_the_same_bits(triton_device: torch.device) -> None:
    z, t = torch.randn(5, 1025, device=triton_device), torch.randint(1025, (5,), device=triton_device)
    runs = [cross_entropy._overwrite(z.clone(), t, True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_ops_are_declared_as_they_behave(triton_device: torch.device) -> None:
    z, t = torch.randn(5, 12, device=triton_device), torch.randint(12, (5,), device=triton_device)
    _, _, stats = torch.ops.lora.cross_entropy_statistics(z, t)
    for op, args in (
        (torch.ops.lora.cross_entropy_overwrite, (z.clone(), t)),
        (torch.ops.lora.cross_entropy_statistics, (z, t)),
        (torch.ops.lora.cross_entropy_gradient, (z, t, stats, torch.rand(5, device=triton_device))),
    ):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
