"""One token's attention over the cache: the kernel against its twin, the twin against torch's attention."""

import pytest
import torch
from torch import Tensor

from lora.kernels import attend as attend_file
from lora.kernels.attend import attend, attend_ref, new_work, shares_of
from lora.kernels.rope import rope

F64 = torch.float64


def inputs(B: int, H: int, Hkv: int, D: int, S: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    angle = torch.rand(S, D // 2) * 6
    t = {
        "q": torch.randn(B, H * D).to(dtype),
        "k": torch.randn(B, Hkv * D).to(dtype),
        "v": torch.randn(B, Hkv * D).to(dtype),
        "keys": torch.randn(B, Hkv, S, D).to(dtype),
        "values": torch.randn(B, Hkv, S, D).to(dtype),
        "at": torch.full((B,), S // 2 + 1),
        "start": torch.arange(B) % 4,
        "cos": angle.cos(),
        "sin": angle.sin(),
    }
    return {name: value.to(device) for name, value in t.items()}


@pytest.mark.parametrize("window", [0, 5])
def test_the_twin_equals_torchs_attention(window: int) -> None:
    t = inputs(3, 6, 2, 32, 40, F64, torch.device("cpu"))
    t["at"] = torch.tensor([21, 30, 7])  # rows need not be equally long
    keys, values = t["keys"].clone(), t["values"].clone()
    y = attend_ref(**t, window=window)
    cos, sin = (t[n][t["at"] - t["start"]].double()[:, None, None] for n in ("cos", "sin"))
    q, k = (rope(t[n].view(3, 1, -1, 32), cos, sin)[:, 0] for n in "qk")
    for b, at in enumerate(t["at"].tolist()):
        keys[b, :, at], values[b, :, at] = k[b], t["v"][b].view(2, 32)
    assert torch.equal(t["keys"], keys) and torch.equal(t["values"], values)
    for b, at in enumerate(t["at"].tolist()):
        first = int(t["start"][b])
        seen = slice(max(first, at + 1 - window) if window else first, at + 1)
        want = torch.nn.functional.scaled_dot_product_attention(
            q[b].view(2, 3, 32), keys[b, :, seen], values[b, :, seen]
        )
        torch.testing.assert_close(y[b].view(2, 3, 32).float(), want.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("B", "H", "Hkv", "D", "S"), [(1, 4, 4, 64, 9), (2, 9, 3, 64, 150), (5, 8, 1, 32, 300), (1, 32, 2, 128, 65)]
)
def test_the_kernel_equals_the_twin(triton_device: torch.device, B: int, H: int, Hkv: int, D: int, S: int) -> None:
    dtypes = [torch.float32, torch.float16] + ([torch.bfloat16] if triton_device.type == "cuda" else [])
    for dtype in dtypes:
        t = inputs(B, H, Hkv, D, S, dtype, triton_device)
        wide = {n: v.double() if v.is_floating_point() else v for n, v in t.items()}
        twin = {n: v.clone() for n, v in t.items()}
        exact, plain, got = attend_ref(**wide), attend_ref(**twin), attend(**t)
        tol = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
        assert (got.double() - exact).norm() <= 1.1 * (plain.double() - exact).norm() + tol * exact.norm() / 4
        at = int(t["at"][0])
        torch.testing.assert_close(t["keys"][:, :, at], twin["keys"][:, :, at], rtol=tol, atol=tol)
        assert torch.equal(t["values"], twin["values"])
        others = [s for s in range(S) if s != at]
        assert torch.equal(t["keys"][:, :, others], twin["keys"][:, :, others])
        assert torch.equal(got, attend(**t))


def test_the_first_token_of_a_row_sees_only_itself(triton_device: torch.device) -> None:
    t = inputs(2, 4, 2, 32, 8, torch.float32, triton_device)
    t["at"].zero_()
    t["start"].zero_()
    want = t["v"].view(2, 2, 1, 32).expand(2, 2, 2, 32).reshape(2, -1)
    torch.testing.assert_close(attend(**t), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("window", [0, 70])
def test_a_row_in_shares_equals_the_row_in_one(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(attend_file, "SHORT", 64)
    t = inputs(2, 4, 2, 32, 400, torch.float32, triton_device)
    t["at"] = torch.tensor([350, 2], device=triton_device)  # the second row is all in the first share
    t["start"] = torch.tensor([3, 2], device=triton_device)
    work = new_work(t["keys"], 4)
    assert work is not None and shares_of(4, 400) == 4
    once = {n: v.clone() for n, v in t.items()}
    got = attend(**t, window=window, work=work)
    torch.testing.assert_close(got, attend(**once, window=window), rtol=1e-5, atol=1e-6)
    assert torch.equal(got, attend(**t, window=window, work=work))  # the work is as it was
    assert torch.equal(t["keys"], once["keys"]) and torch.equal(t["values"], once["values"])


def test_rows_are_shared_out_only_where_that_fills_the_card() -> None:
    assert shares_of(8, 256) == 1 == shares_of(512, 8192)
    assert shares_of(8, 8192) == 16 and shares_of(64, 8192) == 2


def test_slots_beyond_the_token_and_before_the_start_are_not_read(triton_device: torch.device) -> None:
    t = inputs(2, 4, 2, 32, 40, torch.float32, triton_device)
    t["start"].fill_(3)
    clean = attend(**{n: v.clone() for n, v in t.items()})
    for name in ("keys", "values"):
        t[name][:, :, int(t["at"][0]) + 1 :] = torch.nan
        t[name][:, :, :3] = torch.nan
    assert torch.equal(attend(**t), clean)


def test_shapes_that_do_not_fit_are_refused(triton_device: torch.device) -> None:
    t = inputs(2, 4, 2, 32, 8, torch.float32, triton_device)
    with pytest.raises(ValueError, match="do not fit caches"):
        attend(**(t | {"k": t["k"][:, :32]}))
    with pytest.raises(ValueError, match="do not fit 2 rows"):
        attend(**(t | {"at": t["at"][:1]}))
