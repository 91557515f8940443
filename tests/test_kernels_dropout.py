"""Dropout from a counter: Philox's published words, the share that stays, the kernel against its twin."""

import pytest
import torch

from lora.kernels import dispatch
from lora.kernels.dropout import Drop, dropped, keep_mask, philox

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL = torch.cuda.is_available() or dispatch.INTERPRETED


def drop(p: float = 0.1, seed: int = 1234567890123, key: int = 5) -> Drop:
    return Drop(p, torch.tensor([seed], device=DEVICE), key)


def test_philox_gives_the_published_words() -> None:
    """Known answers of the Random123 distribution, philox4x32 10: counter and key all 0, and counter and key all ones
    in their low words."""
    zero = torch.zeros(1, dtype=torch.int64)
    got = [int(w) for w in philox(zero, zero, zero, 0)]
    assert got == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.9])
def test_the_share_that_stays_and_the_mean_are_right(p: float) -> None:
    d = drop(p)
    x = torch.ones(500, 403, device=DEVICE)
    y = dropped(x, d, torch.full_like(x, torch.nan))
    n = x.numel()
    sigma = (p * (1 - p) / n) ** 0.5
    assert abs(float((y == 0).float().mean()) - p) < 5 * sigma + 1e-5
    assert float(y.mean()) == pytest.approx(1.0, abs=5 * sigma / (1 - p) + 1e-4)
    assert torch.equal(y != 0, keep_mask(500, 403, d))


def test_rows_columns_keys_and_seeds_all_matter() -> None:
    base = keep_mask(64, 64, drop(0.5))
    others = [
        keep_mask(64, 64, drop(0.5, key=6)),
        keep_mask(64, 64, drop(0.5, seed=7)),
        base.roll(1, 0),
        base.roll(1, 1),
    ]
    others.append(keep_mask(64, 64, drop(0.5, seed=1234567890123 + 2**32)))
    for other in others:
        assert 0.4 < float((base == other).float().mean()) < 0.6


@pytest.mark.skipif(not KERNEL, reason="needs a GPU, or TRITON_INTERPRET=1")
@pytest.mark.parametrize(("M", "K"), [(1, 1), (3, 100), (5, 1024), (4, 2500)])
def test_the_kernel_equals_its_twin(M: int, K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16) if torch.cuda.is_available() else (torch.float32,):
        wide = torch.randn(M, K + 8, device=DEVICE).to(dtype)
        got = []
        for wish in ("torch", "triton", "triton"):
            monkeypatch.setenv("LORA_KERNELS", wish)
            out = torch.full((M, K + 8), torch.nan, device=DEVICE, dtype=dtype)
            dropped(wide[:, :K], drop(0.3), out[:, :K])
            more = wide.flip(0).contiguous()
            dropped(wide[:, :K], drop(0.3), more[:, :K], add=True)
            assert bool(out[:, K:].isnan().all()) and torch.equal(more[:, K:], wide.flip(0)[:, K:])
            got.append((out[:, :K], more[:, :K]))
        for twin, once, again in zip(*got, strict=True):
            assert torch.equal(once, again)
            torch.testing.assert_close(once, twin, rtol=0 if dtype == torch.float32 else 8e-3, atol=1e-6)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="dropout needs two"):
        dropped(torch.zeros(2, 3), drop(), torch.zeros(2, 4))
