"""Factors laid out for their base's product: twin against the definition, kernel against twin."""

import math

import pytest
import torch
from torch import Tensor

from lora.kernels.lay import LAYERS, lay


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device("cpu") if request.param == "torch" else request.getfixturevalue("triton_device")


both = pytest.mark.parametrize("device", ["torch", "triton"], indirect=True)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("sizes", "ranks", "biased", "K", "rows", "room"),
    [
        ((70,), (16,), (True,), 1500, 16, 64),
        ((33, 5, 40), (5, 3, 16), (False, False, False), 70, 30, 24),
        ((33, 5, 40), (5, 0, 2), (True, False, True), 1024, 7, 100),
        ((3, 40), (0, 7), (False, True), 9, 64, 64),
        ((3, 4), (0, 0), (True, False), 9, 64, 64),
    ],
)
def test_factors_come_where_the_products_read_them(
    sizes: tuple[int, ...],
    ranks: tuple[int, ...],
    biased: tuple[bool, ...],
    K: int,
    rows: int,
    room: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    a = [torch.randn(r, K, device=device) for r in ranks]
    b = [torch.randn(n, r, device=device) for n, r in zip(sizes, ranks, strict=True)]
    biases = [torch.randn(n, device=device).to(dtype) if has else None for n, has in zip(sizes, biased, strict=True)]
    sa, sb = [0.7, 0.0, -2.0][: len(sizes)], [3.0, 0.3, 1.0][: len(sizes)]
    stacked = torch.full((rows, K + 3), math.nan, dtype=dtype, device=device)
    spread = torch.full((sum(sizes), room + 5), math.nan, dtype=dtype, device=device)
    lay(a, b, biases, sa, sb, stacked[:, :K], spread[:, 5:])
    assert stacked[:, K:].isnan().all() and spread[:, :5].isnan().all()
    want = torch.cat([*(one * s for one, s in zip(a, sa, strict=True)), a[0].new_zeros(rows - sum(ranks), K)])
    assert torch.equal(stacked[:, :K], want.to(dtype))
    wide = torch.block_diag(*(one * s for one, s in zip(b, sb, strict=True))).to(dtype)
    column = torch.cat([spread.new_zeros(n) if x is None else x for n, x in zip(sizes, biases, strict=True)])
    R = sum(ranks)
    rest = spread[:, 5 + R :]
    assert torch.equal(spread[:, 5 : 5 + R], wide) and not rest[:, 1:].any()
    assert torch.equal(rest[:, :1], column[:, None][:, : rest.shape[1]])
    for out, which in ((stacked[:, :K], "stacked"), (spread[:, 5:], "spread")):  # one of them alone
        once = out.clone().fill_(math.nan)
        lay(a, b, biases, sa, sb, **{which: once})
        assert torch.equal(once, out)


def test_what_does_not_fit_is_refused() -> None:
    a, b = [torch.zeros(4, 9)], [torch.zeros(5, 4)]

    def call(stacked: Tensor | None = None, spread: Tensor | None = None, times: int = 1) -> None:
        lay(a * times, b * times, [None] * times, [1.0] * times, [1.0] * times, stacked, spread)

    with pytest.raises(ValueError, match=r"a are \[\(4, 9\)\]; they do not fit into \(3, 9\)"):
        call(torch.zeros(3, 9))
    with pytest.raises(ValueError, match=r"a are .* do not fit into \(4, 8\)"):
        call(torch.zeros(4, 8))
    with pytest.raises(ValueError, match=r"4 columns; they do not fit into \(5, 3\)"):
        call(spread=torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"do not fit into \(6, 64\)"):
        call(spread=torch.zeros(6, 64))
    with pytest.raises(ValueError, match="4 layers; one launch lays out the factors of at most 3"):
        call(torch.zeros(64, 9), times=LAYERS + 1)
