"""Bytes to floats against a rule written in numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lora.kernels.code4 import byte_table, dequantize4, dequantize_scales
from lora.quant.codebook import codebook, dynamic_map
from lora.quant.weight import BLOCKS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def decoded(q: Tensor, absmax: np.ndarray, code: Tensor, block: int, n: int) -> np.ndarray:
    """The n float32 values of bytes q: high half first, one float32 product."""
    byte = q.numpy()
    index = np.stack((byte >> 4, byte & 15), axis=1).reshape(-1)[:n]
    return code.numpy()[index] * absmax[np.arange(n) // block]


def random_bytes(n: int) -> Tensor:
    return torch.randint(256, ((n + 1) // 2,), dtype=torch.uint8)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_dequantize_equals_the_numpy_rule(kind: str, dtype: torch.dtype, block: int) -> None:
    code = codebook(kind)
    for n in (1, 2, 31, block - 1, block, block + 1, 3 * block, 5 * block + 7, 4097):
        q, absmax = random_bytes(n), torch.rand(-(-n // block)) * 3
        got = dequantize4(q, absmax, byte_table(code), block, n, dtype)
        want = torch.from_numpy(decoded(q, absmax.numpy(), code, block, n)).to(dtype)
        assert got.dtype == dtype and got.shape == (n,)
        assert torch.equal(got, want)


def test_dequantize_of_more_than_one_chunk_equals_the_numpy_rule() -> None:
    n, code = 2 * 2**20 + 64 * 3 + 5, codebook("nf4")
    q, absmax = random_bytes(n), torch.rand(-(-n // 64))
    want = torch.from_numpy(decoded(q, absmax.numpy(), code, 64, n))
    assert torch.equal(dequantize4(q, absmax, byte_table(code), 64, n, torch.float32), want)
    assert torch.equal(dequantize4(q, absmax, byte_table(code), 64, n, torch.bfloat16), want.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_into_a_buffer_leaves_what_lies_behind_it_alone(dtype: torch.dtype) -> None:
    n, code = 999, codebook("nf4")
    q, absmax = random_bytes(n), torch.rand(-(-n // 64))
    room = torch.full((2 * q.numel() + 50,), 7.0, dtype=dtype)
    got = dequantize4(q, absmax, byte_table(code), 64, n, dtype, out=room)
    assert got.data_ptr() == room.data_ptr()
    assert torch.equal(got, dequantize4(q, absmax, byte_table(code), 64, n, dtype))
    assert (room[2 * q.numel() :] == 7.0).all()


@pytest.mark.parametrize("b", [1, 255, 256, 257, 700, 1024])
def test_nested_scales_are_a_product_then_a_sum(b: int) -> None:
    q, absmax2, offset = torch.randint(256, (b,), dtype=torch.uint8), torch.rand(-(-b // 256)), torch.tensor(0.0527)
    product = dynamic_map().numpy()[q.numpy()] * absmax2.numpy()[np.arange(b) // 256]
    want = product.astype(np.float32) + offset.numpy()
    got = dequantize_scales(q, dynamic_map(), absmax2, offset)
    assert want.dtype == np.float32
    assert torch.equal(got, torch.from_numpy(want))
