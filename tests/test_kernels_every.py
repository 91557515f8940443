"""What is asked of every kernel alike: one small call of each.

No byte before or behind an output changes, every byte inside is written, two runs give the same bits; tensors on two
devices and a wish for Triton where it cannot run are refused.  `make memcheck` runs this file under NVIDIA's memory
checker, which needs few cases: a new kernel adds one here (the last test counts them).
"""

import importlib
import os
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import lora.kernels
from lora.kernels import (
    adamw,
    attend,
    choose,
    code4,
    code8,
    cross_entropy,
    dispatch,
    dropout,
    encode4,
    feed,
    fp8,
    gate8,
    gemv4,
    lay,
    norm,
    pair,
    rope,
    side,
    swiglu,
    thin,
    weight8,
)
from lora.kernels import gate as gate_file
from lora.kernels.linear4 import Weight4, linears4
from lora.kernels.op import Op
from lora.quant.codebook import codebook, dynamic_map
from lora.quant.weight import Packed, quantize_tensor

PAD = 512  # bytes before and behind a buffer: more than the widest access of a thread, and a multiple of all of them
Put = Callable[[Tensor], Tensor]  # where the inputs of a case go: the device under test, or a second one
Call = Callable[[], list[Tensor]]
CASES: dict[str, Callable[[Put], Call]] = {}


def case(make: Callable[[Put], Call]) -> Callable[[Put], Call]:
    CASES[make.__name__] = make
    return make


def half(*shape: int) -> Tensor:
    return torch.randn(*shape).half()


def by_the_twin(w: Tensor, double: bool) -> Packed:
    """`w` in 4 bits, whatever the test asks of the kernels."""
    with patch.dict(os.environ, LORA_KERNELS="torch"):
        return quantize_tensor(w, block=64, double=double)


# ---- one call of each kernel, in odd shapes ----
def encoded(put: Put, kind: str, w: Tensor) -> Call:
    code = codebook(kind)
    w, cells, code = put(w), put(encode4.decision_cells(code)), put(code)
    return lambda: list(encode4.quantize4(w, code, 64, cells))


@case
def quantize(put: Put) -> Call:
    return encoded(put, "nf4", half(7, 143))


@case
def quantize_fp4(put: Put) -> Call:
    return encoded(put, "fp4", torch.randn(7, 143))


@case
def quantize_words(put: Put) -> Call:
    return encoded(put, "nf4", torch.randn(14, 143).bfloat16())


@case
def quantize_nested(put: Put) -> Call:
    levels = dynamic_map()
    absmax, sums = put(torch.rand(700)), put(torch.rand(3, dtype=torch.float64))
    thresholds = put((levels[:-1] + levels[1:]) / 2)
    return lambda: list(code8.quantize8(absmax, sums, thresholds))


def decoded(put: Put, double: bool, start: int, width: int) -> Call:
    n = 7 * 143 + 1
    packed = by_the_twin(torch.randn(n), double)
    q, scales = put(packed.q.view(-1)), tuple(put(t) for t in packed.scales)
    table = put(code4.byte_table(packed.code))
    if not width:
        return lambda: [code4.dequantize4(q, scales, table, 64, n - start, torch.float16, start=start)]
    out = put(torch.zeros(n // width, width + 5, dtype=torch.float16))

    def call() -> list[Tensor]:
        code4.dequantize4(q, scales, table, 64, n, torch.float16, out=out[:, :width])
        return [out]

    return call


@case
def dequantize(put: Put) -> Call:
    return decoded(put, False, 0, 0)


@case
def dequantize_nested(put: Put) -> Call:
    return decoded(put, True, 66, 0)


@case
def dequantize_into_rows(put: Put) -> Call:
    return decoded(put, True, 0, 2)


@case
def rms_norm(put: Put) -> Call:
    x, w = put(half(5, 33)), put(half(33))

    def call() -> list[Tensor]:
        y, s, r = norm.rms_norm_forward(x, None, w, 1e-5)
        dx, dw = norm.rms_norm_backward(y, None, s, w, r, True, True)
        assert dx is not None and dw is not None
        return [y, r, dx, dw]

    return call


@case
def rms_norm_add(put: Put) -> Call:
    x, residual, w = put(half(5, 33)), put(half(5, 33)), put(half(33))
    dx, wide, twice = put(half(5, 33)), put(half(5, 40)), put(half(5, 33))

    def call() -> list[Tensor]:
        y, s, r = norm.rms_norm_forward(x, residual, w, 1e-5)
        norm.rms_norm_forward(x, residual, w, 1e-5, wide[:, :33], twice)
        norm.rms_norm_backward_into(y, y, s, w, r, dx)
        return [y, s, r, dx, wide, twice]

    return call


@case
def rotary(put: Put) -> Call:
    angle = torch.randn(1, 3, 1, 6)
    q, k, cos, sin = put(half(2, 3, 5, 12)), put(half(2, 3, 2, 12)), put(angle.cos().half()), put(angle.sin().half())
    v, copied = put(half(2, 3, 2, 12)), put(half(2, 3, 2, 12))

    def call() -> list[Tensor]:
        ys = rope.rope2(q, k, cos, sin)
        rope.turn_into((q, k), (q, k), cos, sin, back=True, beside=(v, copied))
        return [*ys, q, k, copied]

    return call


@case
def gate(put: Put) -> Call:
    g, u = put(half(3, 77)), put(half(3, 77))

    def call() -> list[Tensor]:
        h = swiglu.swiglu_forward(g, u)
        return [h, *swiglu.swiglu_backward(h, g, u)]

    return call


@case
def likelihood(put: Put) -> Call:
    z, t, g = put(half(3, 9001)), put(torch.tensor([0, 9000, 4097])), put(torch.rand(3))

    def call() -> list[Tensor]:
        nll, hit, stats = cross_entropy.statistics(z, t)
        return [nll, hit, stats, cross_entropy.gradient(z, t, stats, g), *cross_entropy._overwrite(z, t, True)]

    return call


@case
def adam(put: Put) -> Call:
    w, g, m, v = (put(torch.rand(1500)) for _ in range(4))
    hyper, scale, out16 = put(torch.tensor(adamw.rates(1e-2, 3))), put(torch.tensor(0.5)), put(half(1500))

    def call() -> list[Tensor]:
        adamw.adamw(w, g, m, v, hyper, scale=scale, out16=out16, zero=True)
        return [w, g, m, v, out16]

    return call


@case
def adam8(put: Put) -> Call:
    m, v = (
        adamw.Moment8(*(put(t) for t in moment[:3]), moment.zero)
        for moment in (adamw.moment8(1500, dynamic_map(signed)) for signed in (True, False))
    )
    w, g, hyper = put(torch.rand(1500)), put(torch.randn(1500)), put(torch.tensor(adamw.rates(1e-2, 1)))

    def call() -> list[Tensor]:
        adamw.adamw8(w, g, m, v, hyper)
        return [w, g, *m[:2], *v[:2]]

    return call


def of_a_token(put: Put, S: int, short: int) -> Call:
    B, H, Hkv, D = 2, 6, 2, 32
    q, k, v = put(half(B, H * D)), put(half(B, Hkv * D)), put(half(B, Hkv * D))
    keys, values = put(half(B, Hkv, S, D)), put(half(B, Hkv, S, D))
    at, start = put(torch.tensor([S - 1, S - 7])), put(torch.tensor([0, 3]))
    angle = torch.rand(S, D // 2)
    cos, sin = put(angle.cos()), put(angle.sin())
    work = None
    with patch.object(attend, "SHORT", short):
        if (zeros := attend.new_work(torch.empty(B, Hkv, S, D, device="meta"), H)) is not None:
            work = put(torch.zeros(zeros.shape))

    def call() -> list[Tensor]:
        with patch.object(attend, "SHORT", short):
            return [attend.attend(q, k, v, keys, values, at, start, cos, sin, 0, work), keys, values]

    return call


@case
def attention_of_a_token(put: Put) -> Call:
    return of_a_token(put, 70, 512)


@case
def attention_of_a_token_in_shares(put: Put) -> Call:
    return of_a_token(put, 300, 128)


@case
def fed_norm(put: Put) -> Call:
    x, more, w, a = put(half(3, 100)), put(half(3, 100)), put(half(100)), put(half(5, 100))

    def call() -> list[Tensor]:
        y, s, xa = feed.feed_norm(x, more, w, 1e-5, a)
        assert xa is not None
        return [y, s, xa, feed.feed_low(x, a)]

    return call


@case
def fed_gate(put: Put) -> Call:
    g, u, a = put(half(3, 100)), put(half(3, 100)), put(half(7, 100))
    return lambda: [t for t in feed.feed_gate(g, u, a) if t is not None]


@case
def choice(put: Put) -> Call:
    logits, ends = put(half(3, 700)), put(torch.arange(700) % 2 == 0)
    taken, at, out = put(torch.zeros(3, dtype=torch.int64)), put(torch.arange(3)), put(torch.zeros(3, 9).long())
    stopped, bad = put(torch.zeros(3, dtype=torch.bool)), put(torch.zeros(3, dtype=torch.bool))

    def call() -> list[Tensor]:
        choose.choose(logits, taken, at, out, ends, stopped, bad)
        return [taken, at, out, stopped, bad]

    return call


@case
def fringe(put: Put) -> Call:
    out, src = put(half(9, 100)), put(torch.randn(9, 5))

    def call() -> list[Tensor]:
        lay.fringe(out[:, 30:94], src)
        lay.fringe(out[:, :30], src, ones=True)
        return [out]

    return call


@case
def laid_out(put: Put) -> Call:
    a, b = ([put(torch.randn(shape)) for shape in shapes] for shapes in (((5, 70), (3, 70)), ((9, 5), (14, 3))))
    stacked, spread, bias = put(half(12, 70)), put(half(23, 80)), put(half(14))

    def call() -> list[Tensor]:
        lay.lay(a, b, [None, bias], [0.5, 2.0], [1.0, 3.0], stacked, spread[:, :64])
        return [stacked, spread]

    return call


@case
def thin_pair(put: Put) -> Call:
    dyw, t, b = put(half(70, 109)), put(half(70, 8)), [put(torch.randn(n, r)) for n, r in ((33, 5), (12, 3))]

    def call() -> list[Tensor]:
        dbs = pair.pair(dyw[:, :45], t, b, [0.5, 2.0], [0, 33], dyw[:, 45:])
        return [dyw, *dbs]

    return call


@case
def thin_product(put: Put) -> Call:
    g, u, a, out = put(half(70, 133)), put(half(70, 133)), put(half(5, 133)), put(half(70, 143))

    def call() -> list[Tensor]:
        t = thin.thin(g, u, a, out[:, :133], out[:, 133:], ones=True)
        once = out.clone()
        with patch.object(thin, "WARPS", 1):  # rows in one program
            return [t, once, thin.thin(g, None, a, out[:, :133], out[:, 133:], ones=True), out]

    return call


@case
def laid_out_side_by_side(put: Put) -> Call:
    out, b, t, bias = put(half(12, 100)), put(half(3, 12, 5)), put(half(3, 4, 7)), put(half(12))

    def call() -> list[Tensor]:
        side.spread(out[:, 30:94], b, 2, 8, 3, bias)
        side.diagonal(out[:, 6:30], t, ones=True)
        side.spread(out[:, :6], None, 0, 0, 3)
        side.diagonal(out[:, 94:], t[:, :, :1])
        return [out]

    return call


@case
def gelu_gate(put: Put) -> Call:
    dh, g, u, out = (put(half(37, 77)) for _ in range(4))
    v, tg, tu = put(half(37, 4)), put(half(37, 3)), put(half(37, 5))

    def call() -> list[Tensor]:
        gate_file.gate_forward(g, u, True, out)
        sums = gate_file.gate_backward(dh, g, u, v, tg, tu, gelu=True, keep_h=True)
        return [out, dh, g, u, *(t for t in sums if t is not None)]

    return call


@case
def drop_out(put: Put) -> Call:
    drop = dropout.Drop(0.3, put(torch.tensor([2**40 + 7])), 3)
    x, out = put(half(5, 77)), put(half(5, 77))
    return lambda: [dropout.dropped(x, drop, out, add=True)]


def bytes8(n: int, m: int, like: Tensor) -> Tensor:
    return torch.empty(n, m, dtype=torch.float8_e4m3fn, device=like.device)


@case
def fp8_rows(put: Put) -> Call:
    x, residual, w = put(half(5, 33)), put(half(5, 33)), put(half(33))

    def call() -> list[Tensor]:
        out, again = bytes8(5, 33, x), bytes8(5, 33, x)
        scale, s, r = fp8.norm8(x, residual, w, 1e-5, out)
        return [out, scale, s, r, fp8.rows8(s, again), again]

    return call


@case
def fp8_gate(put: Put) -> Call:
    g, u = put(half(5, 77)), put(half(5, 77))

    def call() -> list[Tensor]:
        out = bytes8(5, 77, g)
        return [fp8.gate8(g, u, False, out), out]

    return call


@case
def fp8_gate_backward(put: Put) -> Call:
    dh, g, u = (put(half(37, 83)) for _ in range(3))
    bg, bu, v, tg, tu = put(half(83, 3)), put(half(83, 5)), put(half(37, 2)), put(half(37, 3)), put(half(37, 5))

    def call() -> list[Tensor]:
        scale, low = gate8.gate_scales(dh, g, u, bg, bu, False)
        out, sums = bytes8(37, 166, g), gate8.new_sums(1, 83, (v, tg, tu), g.device)
        gate8.gate_round(dh, g, u, scale, out, (v, tg, tu), sums[0], False)
        return [scale, low, out, sums]

    return call


@case
def fp8_split(put: Put) -> Call:
    src, amax = put(torch.randn(9, 5)), put(torch.tensor(3.0))

    def call() -> list[Tensor]:
        out = bytes8(9, 50, src)
        fp8.split8(out, [fp8.Part(src, at=3)], "hlh", amax)
        return [out]

    return call


@case
def fp8_ride(put: Put) -> Call:
    scale, src, amax = put(torch.logspace(0, -4, 9)[:, None]), put(torch.randn(9, 5)), put(torch.tensor(3.0))

    def call() -> list[Tensor]:
        out, scales = bytes8(9, 118, src), scale.clone()
        out.view(torch.uint8).fill_(0x55)
        total = torch.empty(9, 5, device=src.device)
        fp8.ride8(out, 70, scales, [src, src], amax, 1.0, total)
        return [out, scales, total]

    return call


@case
def fp8_decode(put: Put) -> Call:
    packed = by_the_twin(torch.randn(40, 192), True)
    q, scales = put(packed.q.view(-1)), tuple(put(t) for t in packed.scales)
    weight = Weight4(q, scales, put(code4.byte_table(packed.code)), packed.q, 64, (40, 192))

    def call() -> list[Tensor]:
        outs = bytes8(40, 192, q), bytes8(192, 40, q)
        weight8.decode8(weight, 0.01, outs[0])
        weight8.decode8(weight, 0.01, outs[1], turn=True)
        return list(outs)

    return call


@case
def few_rows(put: Put) -> Call:
    packed = by_the_twin(torch.randn(40, 192), True)
    x, q, scales = put(half(3, 192)), put(packed.q.view(-1)), tuple(put(t) for t in packed.scales)
    table, permute = put(code4.byte_table(packed.code)), put(gemv4.permute_table(packed.code))
    bias, a, b = put(half(40)), put(torch.randn(5, 192)), put(half(40, 5))
    weight = Weight4(q, scales, table, permute, 64, (40, 192))
    return lambda: list(linears4(x, [weight], [bias], [(a, b, 0.5)]))


PTX = (few_rows,)


# ---- what is asked of each ----
class Room:
    """Hands out buffers filled with one byte, inside longer ones, and knows whether those were touched outside."""

    def __init__(self, byte: int, device: torch.device) -> None:
        self.byte, self.device, self.wholes = byte, device, list[Tensor]()

    def put(self, t: Tensor) -> Tensor:
        room = self.empty(t.shape, dtype=t.dtype)
        return room.copy_(t)

    def empty(self, *shape: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        """In place of torch.empty."""
        shape = shape[0] if shape and not isinstance(shape[0], int) else shape
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        whole = torch.full((nbytes + 2 * PAD,), self.byte, dtype=torch.uint8, device=self.device)
        self.wholes.append(whole)
        return whole[PAD : PAD + nbytes].view(dtype).view(shape)

    @property
    def untouched(self) -> bool:
        return all((w[:PAD] == self.byte).all() and (w[-PAD:] == self.byte).all() for w in self.wholes)


@pytest.fixture(params=CASES)
def make(request: pytest.FixtureRequest) -> Callable[[Put], Call]:
    return CASES[request.param]


def skip_ptx(make: Callable[[Put], Call]) -> None:
    if make in PTX and dispatch.INTERPRETED:
        pytest.skip("written in PTX, which Triton's interpreter does not know: test_kernels_gemv4.py stands in for it")


def test_outputs_are_written_whole_and_nothing_beside_them_and_twice_alike(
    make: Callable[[Put], Call], triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_ptx(make)
    runs = []
    for byte in (0xA5, 0x5A):  # what is not written differs between the two
        torch.manual_seed(0)
        room = Room(byte, triton_device)
        call = make(room.put)
        with monkeypatch.context() as patched:
            patched.setattr(torch, "empty", room.empty)
            got = call()
        assert room.untouched
        runs.append([t.contiguous().view(-1).view(torch.uint8).cpu() for t in got])
    assert runs[0] and all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_tensors_on_two_devices_are_refused(make: Callable[[Put], Call], triton_device: torch.device) -> None:
    inputs = 0

    def count(t: Tensor) -> Tensor:
        nonlocal inputs
        inputs += 1
        return t

    make(count)
    for odd in range(inputs if make not in PTX else 2):  # x and the codes choose the way
        turn = iter(range(inputs))
        call = make(lambda t, turn=turn, odd=odd: t.to("meta" if next(turn) == odd else triton_device))
        with pytest.raises(ValueError, match=r"tensors on .*meta.*; move them to one device"):
            call()


def test_a_wish_for_triton_where_it_cannot_run_is_refused(
    make: Callable[[Put], Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = make(lambda t: t)
    monkeypatch.setenv("LORA_KERNELS", "triton")
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="LORA_KERNELS=triton, but the tensors are on cpu; move them to a GPU"):
        call()


def test_every_operator_writes_what_it_says_and_has_a_fake(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is called here as the cases call it: by what tracers and the compiler see of it."""
    calls: dict[Op, tuple[Any, ...]] = {}
    plain = Op.__call__

    def note(self: Op, *args: Any) -> Any:
        calls.setdefault(self, torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, args))
        return plain(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Op, "__call__", note)
        for make in CASES.values():
            if not (make in PTX and dispatch.INTERPRETED):
                make(lambda t: t.to(triton_device))()
    for op, args in calls.items():
        eight = any(
            getattr(t, "dtype", None) == torch.float8_e4m3fn for t in args
        )  # torch's own check cannot compare them
        torch.library.opcheck(op.registered, args, test_utils=("test_schema", "test_faketensor")[eight:])
    all_ops = {op for module in modules() for op in vars(module).values() if isinstance(op, Op)}
    left = {op.registered._name for op in all_ops - set(calls)}
    assert left == ({"gemv4", "down"} if dispatch.INTERPRETED else set())  # those written in PTX


def modules() -> list[ModuleType]:
    names = [info.name for info in pkgutil.iter_modules(lora.kernels.__path__)]
    return [importlib.import_module(f"lora.kernels.{name}") for name in names]


def kernels() -> dict[str, Any]:
    """All Triton kernels that are launched, by module and name."""
    found = {}
    for module in modules():
        for name, value in vars(module).items():
            function = getattr(value, "fn", None)  # what triton.jit was put on
            if name.endswith("_kernel") and getattr(function, "__module__", None) == module.__name__:
                found[f"{module.__name__}.{name}"] = value
    return found


def test_there_is_a_case_for_every_kernel(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = set()

    class Recorder:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Any:
            launched.add(self.name)
            ptx = "gemv4" in self.name
            return (lambda *_, **__: None) if ptx and dispatch.INTERPRETED else self.kernel[grid]

    found = kernels()
    for module in modules():
        for name, value in list(vars(module).items()):
            for full, kernel in found.items():
                if value is kernel:
                    monkeypatch.setattr(module, name, Recorder(full, kernel))
    for make in CASES.values():
        make(lambda t: t.to(triton_device))()
    assert len(found) > 10 and launched == set(found)
