"""Bytes to floats against a rule written in numpy, bit for bit, in torch and in Triton."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lora.kernels.code4 import byte_table, dequantize4, dequantize_scales
from lora.kernels.code8 import quantize8
from lora.kernels.dispatch import INTERPRETED
from lora.kernels.encode4 import decision_cells, decisions, quantize4
from lora.quant.codebook import codebook, dynamic_map
from lora.quant.weight import BLOCKS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["torch", "triton"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the tensors lie; the test runs once on the twin and once on the kernels."""
    if request.param == "triton":
        return request.getfixturevalue("triton_device")
    monkeypatch.setenv("LORA_KERNELS", "torch")
    return torch.device("cpu")


def skip_if_not_rounded(dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    if INTERPRETED and dtype == torch.bfloat16 and "triton" in request.node.callspec.id:
        pytest.skip("Triton's interpreter does not round bfloat16 to nearest even")


def random_bytes(n: int) -> Tensor:
    return torch.randint(256, ((n + 1) // 2,), dtype=torch.uint8)


def random_scales(b: int, nested: bool) -> tuple[Tensor, ...]:
    if not nested:
        return (torch.rand(b) * 3,)
    offset = torch.tensor(0.0527)
    return (torch.randint(256, (b,), dtype=torch.uint8), dynamic_map(), torch.rand(-(-b // 256)), offset)


def scale_rule(scales: tuple[Tensor, ...]) -> np.ndarray:
    """The block scales: one float32 product, then one float32 sum."""
    if len(scales) == 1:
        return scales[0].numpy()
    byte, level, absmax2, offset = (t.numpy() for t in scales)
    product = level[byte] * absmax2[np.arange(byte.size) // 256]
    value = product + offset
    assert product.dtype == value.dtype == np.float32
    return value


def rule(q: Tensor, scales: tuple[Tensor, ...], code: Tensor, block: int, n: int) -> Tensor:
    """The n float32 values of bytes q: high half first, one float32 product."""
    byte = q.numpy()
    index = np.stack((byte >> 4, byte & 15), axis=1).reshape(-1)[:n]
    return torch.from_numpy(code.numpy()[index] * scale_rule(scales)[np.arange(n) // block])


def moved(scales: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    return tuple(t.to(device) for t in scales)


# ---- bytes to floats ----
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_dequantize_equals_the_numpy_rule(
    kind: str, dtype: torch.dtype, block: int, nested: bool, device: torch.device, request: pytest.FixtureRequest
) -> None:
    skip_if_not_rounded(dtype, request)
    code = codebook(kind)
    table = byte_table(code).to(device)
    for n in (1, 2, 31, block - 1, block + 1, 3 * block, 4097):
        q, scales = random_bytes(n), random_scales(-(-n // block), nested)
        got = dequantize4(q.to(device), moved(scales, device), table, block, n, dtype)
        assert got.dtype == dtype and got.shape == (n,)
        assert torch.equal(got.cpu(), rule(q, scales, code, block, n).to(dtype))


@pytest.mark.parametrize("exponent", [-38, -30, 30, 38])
def test_dequantize_keeps_tiny_and_huge_scales(exponent: int, device: torch.device) -> None:
    code, n = codebook("nf4"), 1000
    q, scales = random_bytes(n), ((1 + torch.rand(-(-n // 64))) * 1.2 * 10.0**exponent,)
    got = dequantize4(q.to(device), moved(scales, device), byte_table(code).to(device), 64, n, torch.float32)
    assert torch.equal(got.cpu(), rule(q, scales, code, 64, n))  # products below 1.2e-38 are subnormal, and not flushed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("block", [32, 64, 256, 4096])
def test_a_range_of_values_equals_that_part_of_the_whole(
    block: int, nested: bool, dtype: torch.dtype, device: torch.device, request: pytest.FixtureRequest
) -> None:
    skip_if_not_rounded(dtype, request)
    n, code = 2 * block + 2 * 4096 + 77, codebook("nf4")
    q, scales = random_bytes(n), random_scales(-(-n // block), nested)
    whole = rule(q, scales, code, block, n).to(dtype)
    q, table, on = q.to(device), byte_table(code).to(device), moved(scales, device)
    for start, count in (
        (0, 5),
        (2, 1),
        (block - 2, 4),
        (block, block),
        (block + 6, 3001),
        (n - 7, 7),
        (4098, n - 4098),
    ):
        for before in (16, 3):  # the second begins on no 16 bytes
            room = torch.full((before + count + count % 2 + 16,), 7.0, dtype=dtype, device=device)
            got = dequantize4(q, on, table, block, count, dtype, out=room[before:-16], start=start)
            assert torch.equal(got.cpu(), whole[start : start + count])
            assert (room[:before] == 7).all() and (room[-16:] == 7).all()
    rows = whole[3 * 200 : 7 * 200]  # of a matrix 200 wide, which is no multiple of a block
    assert torch.equal(dequantize4(q, on, table, block, 800, dtype, start=600).cpu(), rows)
    padded = torch.cat((q.new_zeros(1), q))[1:]  # bytes that begin on no 16 either
    assert torch.equal(dequantize4(padded, on, table, block, n, dtype).cpu(), whole)


def test_dequantize_of_more_than_one_chunk_equals_the_numpy_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS", "torch")  # a chunk is the twin's
    n, code = 2 * 2**20 + 64 * 3 + 5, codebook("nf4")
    q, scales = random_bytes(n), random_scales(-(-n // 64), False)
    want = rule(q, scales, code, 64, n)
    assert torch.equal(dequantize4(q, scales, byte_table(code), 64, n, torch.float32), want)
    for start in (0, 2, 34, 64 * 5 + 22):
        got = dequantize4(q, scales, byte_table(code), 64, n - start, torch.bfloat16, start=start)
        assert torch.equal(got, want[start:].bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_into_a_buffer_leaves_what_lies_behind_it_alone(dtype: torch.dtype, device: torch.device) -> None:
    n, code = 999, codebook("nf4")
    q, scales = random_bytes(n).to(device), moved(random_scales(-(-n // 64), False), device)
    table = byte_table(code).to(device)
    room = torch.full((2 * q.numel() + 50,), 7.0, dtype=dtype, device=device)
    got = dequantize4(q, scales, table, 64, n, dtype, out=room)
    assert got.data_ptr() == room.data_ptr()
    assert torch.equal(got, dequantize4(q, scales, table, 64, n, dtype))
    assert (room[2 * q.numel() :] == 7.0).all()


@pytest.mark.parametrize("b", [1, 255, 256, 257, 700, 1024])
def test_nested_scales_are_a_product_then_a_sum(b: int) -> None:
    scales = random_scales(b, True)
    got = dequantize_scales(*scales)
    assert torch.equal(got, torch.from_numpy(scale_rule(scales)))


def test_two_runs_give_the_same_bits(device: torch.device) -> None:
    w = torch.randn(3, 1111, device=device)
    code = codebook("nf4").to(device)
    (q, absmax, sums), again = quantize4(w, code, 64), quantize4(w, code, 64)
    assert torch.equal(q, again[0]) and torch.equal(absmax, again[1]) and torch.equal(sums, again[2])
    once, again = (dequantize4(q, (absmax,), byte_table(code), 64, 3333, torch.float16) for _ in range(2))
    assert torch.equal(once, again)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_the_ops_are_what_they_are_declared_to_be(nested: bool, triton_device: torch.device) -> None:
    code, n = codebook("nf4").to(triton_device), 1001
    q, scales = random_bytes(n).to(triton_device), list(moved(random_scales(16, nested), triton_device))
    out, w = torch.empty(n, device=triton_device), torch.randn(n, device=triton_device)
    checks = ("test_schema", "test_faketensor")
    args = (q, scales, byte_table(code), out, 64, n, 0)
    torch.library.opcheck(torch.ops.lora.dequantize4, args, test_utils=checks)
    torch.library.opcheck(torch.ops.lora.quantize4, (w, decision_cells(code), 64), test_utils=checks)
    thresholds = torch.linspace(-1, 1, 255, device=triton_device)
    torch.library.opcheck(torch.ops.lora.quantize8, (w, w[:3].double(), thresholds), test_utils=checks)


def test_dequantize_past_two_to_the_31_values(gpu: torch.device) -> None:
    code, n = codebook("nf4"), 2_200_000_005
    q = torch.randint(256, ((n + 1) // 2,), dtype=torch.uint8, device=gpu)
    absmax = torch.rand(-(-n // 64), device=gpu)
    table = byte_table(code).to(gpu)
    for start in (2**31 - 4096, 2**31, 2**31 + 64 * 7 + 30, n - 5001):
        count = min(6001, n - start)
        first = start // 64 * 64
        part, scale = q[first // 2 : (start + count + 1) // 2], absmax[first // 64 : -(-(start + count) // 64)]
        want = rule(part.cpu(), (scale.cpu(),), code, 64, start + count - first)[start - first :]
        got = dequantize4(q, (absmax,), table, 64, count, torch.bfloat16, start=start)
        assert torch.equal(got.cpu(), want.bfloat16())
    whole = dequantize4(q, (absmax,), table, 64, n, torch.bfloat16)
    tail = dequantize4(q, (absmax,), table, 64, 100_005, torch.bfloat16, start=n - 100_005)
    assert torch.equal(whole[-100_005:], tail)


# ---- floats to bytes ----
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_decision_cells_decide_as_the_thresholds_do(kind: str) -> None:
    code = codebook(kind)
    cells = decision_cells(code)
    thresholds, order = decisions(code)
    near = torch.cat([thresholds.nextafter(torch.tensor(x)) for x in (-2.0, 2.0)])
    edges = torch.arange(-4096, 4097) / 4096
    s = torch.cat((thresholds, near, edges, edges.nextafter(torch.tensor(2.0)), torch.randn(10**5) / 3)).clamp(-1, 1)
    s = torch.cat((s, torch.tensor([1.0000001, -1.0000001, 0.0, -0.0, 1e-39, -1e-39, 1e-8, -1e-8])))
    assert cells.dtype == (torch.int32 if kind == "nf4" else torch.int64)
    if kind == "nf4":
        f = (s * 2.0**28).to(torch.int32).long()
        cell = cells[(f >> 24) & (cells.numel() - 1)].long() & 0xFFFFFFFF
        got = torch.where((f << 8 & 0xFFFFFFFF) > cell, cell >> 4, cell) & 15
    else:
        cell = cells[(s + 1.5 * 2**25 / cells.numel()).view(torch.int32).long() & (cells.numel() - 1)]
        threshold = cell.to(torch.int32).view(torch.float32)
        got = torch.where(s > threshold, cell >> 36, cell >> 32) & 15
    assert torch.equal(got, order[torch.bucketize(s, thresholds)])


def test_a_code_with_two_thresholds_in_one_place_is_refused() -> None:
    with pytest.raises(ValueError, match="1/4096 apart"):
        decision_cells(torch.linspace(0, 1e-5, 16))


@pytest.mark.parametrize("n", [1, 63, 64, 65, 127, 2049, 5000])
def test_kernels_write_nothing_past_their_outputs(
    n: int, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers, empty = [], torch.empty

    def padded(shape: int | tuple[()], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        count = shape or 1
        buffers.append((count, torch.full((count + 64,), 77, dtype=dtype, device=device)))
        return buffers[-1][1][:count] if shape else buffers[-1][1][0]

    code = codebook("nf4").to(triton_device)
    w, cells = torch.randn(n, device=triton_device), decision_cells(code)
    levels = dynamic_map().to(triton_device)
    monkeypatch.setattr(torch, "empty", padded)
    quantize4(w, code, 64, cells)
    quantize8(w, w[:1].double(), (levels[:-1] + levels[1:]) / 2)
    monkeypatch.setattr(torch, "empty", empty)
    assert [count for count, _ in buffers] == [(n + 1) // 2, -(-n // 64), -(-n // 2048), n, -(-n // 256), 1]
    assert all((buffer[count:] == 77).all() for count, buffer in buffers)


# ---- refusals ----
def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    n = 1000
    code = codebook("nf4").to(device)
    q, table = random_bytes(n).to(device), byte_table(code)
    plain, nested = (moved(random_scales(16, nested), device) for nested in (False, True))
    f32 = torch.float32

    def refuses(match: str, *, q=q, scales=plain, table=table, block=64, n=n, dtype=f32, **rest) -> None:
        with pytest.raises(ValueError, match=match):
            dequantize4(q, scales, table, block, n, dtype, **rest)

    refuses("q is torch.int8", q=q.view(torch.int8))
    refuses(r"q is torch.uint8 of shape \(499,\); 1000 values need 500 bytes", q=q[:499])
    refuses("not contiguous", q=torch.cat((q, q))[::2])
    refuses("block=48", block=48)
    refuses("block=16", block=16)
    refuses("block=8192", block=8192)
    refuses(r"scales\[0\] holds 15 of torch.float32; 1000 values in blocks of 64 need 16", scales=(plain[0][:15],))
    refuses(r"scales\[0\] holds 16 of torch.float16", scales=(plain[0].half(),))
    refuses(r"scales\[0\] holds 16 of torch.uint8", scales=nested[:1])
    refuses(r"scales\[1\] holds 255", scales=(nested[0], nested[1][:255], *nested[2:]))
    refuses(r"scales\[2\] holds 0", scales=(*nested[:2], nested[2][:0], nested[3]))
    refuses("2 tensors of scales", scales=nested[:2])
    refuses(r"give byte_table\(code\)", table=code)
    refuses("from an even place", n=7, start=3)
    refuses("at least one", n=0)
    refuses("1002 values need 501 bytes", start=2)
    refuses("out holds 999 values of torch.float32; 1000 values need room", out=torch.empty(999, device=device))
    refuses("need room for 1000 of torch.float32", out=torch.empty(1000, dtype=torch.float16, device=device))
    refuses("tensors on .*meta", scales=(plain[0].to("meta"),))
    with pytest.raises(ValueError, match="block=100"):
        quantize4(torch.randn(100, device=device), code, 100)
    with pytest.raises(TypeError, match=r"torch\.int32 cannot be quantized"):
        quantize4(torch.zeros(128, dtype=torch.int32, device=device), code, 64)
    sums, levels = plain[0].double(), torch.linspace(-1, 1, 255, device=device)
    with pytest.raises(ValueError, match="255 thresholds"):
        quantize8(plain[0].half(), sums, levels)
    with pytest.raises(ValueError, match="with 16 thresholds"):
        quantize8(plain[0], sums, code)
    with pytest.raises(ValueError, match=r"sums are torch\.float32 of shape \(16,\)"):
        quantize8(plain[0], plain[0], levels)
