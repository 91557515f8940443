"""One token's attention over the cache: the kernel against its twin, the twin against torch's attention."""

import pytest
import torch
from torch import Tensor

from lora.kernels.attend import attend, attend_ref
from lora.kernels.rope import rope

F64 = torch.float64


def inputs(B: int, H: int, Hkv: int, D: int, S: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    angle = torch.rand(B, D // 2) * 6
    t = {
        "q": torch.randn(B, H * D).to(dtype),
        "k": torch.randn(B, Hkv * D).to(dtype),
        "v": torch.randn(B, Hkv * D).to(dtype),
        "keys": torch.randn(B, Hkv, S, D).to(dtype),
        "values": torch.randn(B, Hkv, S, D).to(dtype),
        "at": torch.tensor([S // 2 + 1]),
        "start": torch.arange(B) % 4,
        "cos": angle.cos(),
        "sin": angle.sin(),
    }
    return {name: value.to(device) for name, value in t.items()}


def test_the_twin_equals_torchs_attention() -> None:
    t = inputs(3, 6, 2, 32, 40, F64, torch.device("cpu"))
    keys, values, at = t["keys"].clone(), t["values"].clone(), int(t["at"])
    y = attend_ref(**t)
    q, k = (
        rope(t[n].view(3, 1, -1, 32), t["cos"].double()[:, None, None], t["sin"].double()[:, None, None])[:, 0]
        for n in "qk"
    )
    keys[:, :, at], values[:, :, at] = k, t["v"].view(3, 2, 32)
    assert torch.equal(t["keys"], keys) and torch.equal(t["values"], values)
    for b in range(3):
        seen = slice(int(t["start"][b]), at + 1)
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
        at = int(t["at"])
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


def test_slots_beyond_the_token_and_before_the_start_are_not_read(triton_device: torch.device) -> None:
    t = inputs(2, 4, 2, 32, 40, torch.float32, triton_device)
    t["start"].fill_(3)
    clean = attend(**{n: v.clone() for n, v in t.items()})
    for name in ("keys", "values"):
        t[name][:, :, int(t["at"]) + 1 :] = torch.nan
        t[name][:, :, :3] = torch.nan
    assert torch.equal(attend(**t), clean)


def test_shapes_that_do_not_fit_are_refused(triton_device: torch.device) -> None:
    t = inputs(2, 4, 2, 32, 8, torch.float32, triton_device)
    with pytest.raises(ValueError, match="do not fit caches"):
        attend(**(t | {"k": t["k"][:, :32]}))
