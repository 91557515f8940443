"""Attention by document: no token sees another document, on a GPU as in the reference."""

import pytest
import torch

from lora.kernels.documents import BLOCK, document_attention, ragged_of

LENGTHS = [[5, 100, 1, 22], [128]]


@pytest.mark.parametrize("window", [None, 7])
def test_a_document_is_as_if_alone(window: int | None) -> None:
    q, k, v = (torch.randn(2, h, 128, 16) for h in (4, 2, 2))
    y = document_attention(q, k, v, LENGTHS, window=window)
    for part, at in ((y[0, :, 5:105], slice(5, 105)),):
        alone = document_attention(q[:1, :, at], k[:1, :, at], v[:1, :, at], [[100]], window=window)
        torch.testing.assert_close(part, alone[0])
    other = k.clone()
    other[0, :, :5] += 1.0
    assert torch.equal(document_attention(q, other, v, LENGTHS, window=window)[0, :, 5:], y[0, :, 5:])


def test_like_batches_are_told_in_the_same_shapes() -> None:
    ends, longest = ragged_of(((3, 1, 2), (6,)), torch.device("cpu"))
    assert ends.tolist() == [0, 3, 4, 6] + 13 * [12] and ends.dtype == torch.int32 and longest == BLOCK
    many = [ragged_of((n * (900,), (900 * n,)), torch.device("cpu")) for n in range(16, 32)]
    assert {len(ends) for ends, _ in many} == {33} and {longest for _, longest in many} == {16384, 32768}
    assert ragged_of(((1025,),), torch.device("cpu")).longest == 2048
    assert ragged_of(((1024,),), torch.device("cpu")).longest == 1024


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_ragged_kernel_equals_the_reference(window: int | None, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, h, 128, 64, device="cuda", dtype=dtype, requires_grad=True) for h in (4, 2, 2))
    dy = torch.randn(2, 4, 128, 64, device="cuda", dtype=dtype)
    y = document_attention(q, k, v, LENGTHS, window=window, scale=0.2)
    got = torch.autograd.grad(y, (q, k, v), dy)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    want_y = document_attention(*exact, LENGTHS, window=window, scale=0.2)
    want = torch.autograd.grad(want_y, exact, dy.double())
    for a, b in ((y, want_y), *zip(got, want, strict=True)):
        assert float((a.double() - b).norm() / b.norm()) < 0.01
