"""How close to a plain copy do RMSNorm, RoPE, SwiGLU and cross entropy come, forward and backward, on a GPU?

Shapes of an 8B Llama: 8192 tokens of 4096, 32 + 8 heads of 128, intermediate 14336, vocabulary 128256, bfloat16.
gb_s counts the fewest bytes that must move; share divides it by the copy bandwidth measured first.  Rivals in the
same run: torch.compile of the plain formula, and Liger's own functions where liger_kernel is installed.
  - A backward is compared with the explicit backward formula, compiled, given what ours is given (x, r and so on):
    that is all its compiler could save anyway, and spares it the guesses of a traced autograd.
  - Liger's backward is its forward and backward under one graph less its forward.  Its RMSNorm always makes dw, so
    it stands beside ours with dw; its RoPE and its backward of SwiGLU write over their inputs, ours does not.
  - Cross entropy over given logits that become their gradient counts one reading and one writing.  The row must be
    read twice; where the second reading misses the cache, 67 % is the most there is.
All under CUDA graphs, inputs rotating through several times the cache; linear cross entropy, eager.

usage: python benchmarks/bench_elementwise.py [--sweep] [--only NAME] [--save]
"""

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from lora.kernels import cross_entropy, norm, rope, swiglu

from result import finish  # isort: skip  (beside this script)
from timing import copies, copy_gb_s, eager_ms, graph_ms  # isort: skip

B, T, D, I, V, H_Q, H_K, HEAD = 4, 2048, 4096, 14336, 128256, 32, 8, 128
M, CHUNK, EPS = B * T, 1024, 1e-5
LIGER = importlib.util.find_spec("liger_kernel") is not None
Tensors = tuple[Tensor, ...]


# The plain formulas, for torch.compile.
def norm_formula(x: Tensor, w: Tensor) -> Tensors:
    x32 = x.float()
    r = torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + EPS)
    return (x32 * r).to(x.dtype) * w, r


def norm_add_formula(x: Tensor, residual: Tensor, w: Tensor) -> Tensors:
    s = x + residual
    return *norm_formula(s, w), s


def norm_backward_formula(dy: Tensor, x: Tensor, w: Tensor, r: Tensor) -> Tensor:
    x32, g = x.float(), dy.float() * w.float()
    return (r * (g - x32 * (g * x32).mean(dim=-1, keepdim=True) * r * r)).to(x.dtype)


def norm_add_backward_formula(dy: Tensor, ds: Tensor, x: Tensor, w: Tensor, r: Tensor) -> Tensor:
    x32, g = x.float(), dy.float() * w.float()
    return (r * (g - x32 * (g * x32).mean(dim=-1, keepdim=True) * r * r) + ds.float()).to(x.dtype)


def norm_backward_dw_formula(dy: Tensor, x: Tensor, w: Tensor, r: Tensor) -> Tensors:
    return norm_backward_formula(dy, x, w, r), (dy.float() * x.float() * r).sum(dim=0).to(w.dtype)


def rope_formula(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensors:
    half = q.shape[-1] // 2
    parts = [(x[..., :half], x[..., half:]) for x in (q, k)]
    return tuple(torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1) for a, b in parts)


def rope_backward_formula(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> Tensors:
    return rope_formula(dq, dk, cos, -sin)


def swiglu_formula(g: Tensor, u: Tensor) -> Tensor:
    return torch.nn.functional.silu(g) * u


def swiglu_backward_formula(dh: Tensor, g: Tensor, u: Tensor) -> Tensors:
    sigma = torch.sigmoid(g.float())
    dg = dh.float() * u.float() * sigma * (1 + g.float() * (1 - sigma))
    return dg.to(g.dtype), (dh.float() * g.float() * sigma).to(g.dtype)


def softmax_formula(z: Tensor, t: Tensor) -> Tensors:
    logp = torch.log_softmax(z.float(), dim=-1)
    at = logp.gather(1, t[:, None])
    onehot = torch.arange(z.shape[1], device=z.device) == t[:, None]
    return -at[:, 0], at[:, 0] >= logp.amax(dim=1), (logp.exp() - onehot.float()).to(z.dtype)


def nll_formula(z: Tensor, t: Tensor) -> Tensors:
    logp = torch.log_softmax(z.float(), dim=-1)
    at = logp.gather(1, t[:, None])
    return -at[:, 0], at[:, 0] >= logp.amax(dim=1)


def nll_backward_formula(z: Tensor, t: Tensor, stats: Tensor, g: Tensor) -> Tensor:
    p = (z.float() - stats[:, :1]).exp() / stats[:, 1:]
    onehot = torch.arange(z.shape[1], device=z.device) == t[:, None]
    return ((p - onehot.float()) * g[:, None]).to(z.dtype)


# Inputs.
def values(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def weight_and_r() -> Tensors:
    return values(D), torch.rand(M, 1, device="cuda") + 0.5


def tables() -> Tensors:
    angle = torch.rand(1, T, 1, HEAD // 2, device="cuda") * 6
    return angle.cos().bfloat16(), angle.sin().bfloat16()


def halves() -> Tensors:
    return values(M, 2 * I).split(I, dim=1)


def words(n: int) -> Tensor:
    return torch.randint(V, (n,), device="cuda")


def statistics() -> Tensors:
    z, t = values(CHUNK, V), words(CHUNK)
    return z, t, cross_entropy.statistics(z, t)[2], torch.rand(CHUNK, device="cuda")


# Liger, by its autograd functions.
def liger(op: str, *inputs: Tensor) -> Any:
    from liger_kernel.ops import rms_norm as rms_file
    from liger_kernel.ops import rope as rope_file
    from liger_kernel.ops import swiglu as swiglu_file

    if op == "rms_norm":
        return rms_file.LigerRMSNormFunction.apply(*inputs, EPS)
    if op == "swiglu":
        return swiglu_file.LigerSiLUMulFunction.apply(*inputs)
    q, k, cos, sin = inputs
    wide = [torch.cat((t, t), dim=-1).view(1, T, HEAD) for t in (cos, sin)]
    return rope_file.LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), *wide)[:2]


def liger_ms(op: str, make: Callable[[], Tensors], sets: int, backward: bool) -> float:
    """Milliseconds of Liger's forward, or of its forward and backward less its forward."""
    inputs = [make() for _ in range(sets)]
    with torch.no_grad():
        forward = graph_ms(lambda i: liger(op, *inputs[i]), sets)
    if not backward:
        return forward
    learned = 2  # x and w, q and k, g and u
    for group in inputs:
        for t in group[:learned]:
            t.requires_grad_()
    with torch.no_grad():
        out = liger(op, *inputs[0])
    grads = [torch.randn_like(t) for t in (out if isinstance(out, tuple) else (out,))]

    def both(i: int) -> Tensors:
        return torch.autograd.grad(liger(op, *inputs[i]), inputs[i][:learned], grads)

    return graph_ms(both, sets) - forward


@dataclass(frozen=True)
class Case:
    """One operation in one direction; `ours` and `formula` take what `make` makes."""

    name: str
    nbytes: int
    make: Callable[[], Tensors]
    ours: Callable[..., object]
    formula: Callable[..., object]
    liger: str = ""
    liger_make: Callable[[], Tensors] | None = None


ROWS, HEADS, GATE, LOGITS = 2 * M * D, 2 * M * (H_Q + H_K) * HEAD, 2 * M * I, 2 * CHUNK * V  # bytes of one tensor
CASES = [
    Case(
        "rms_norm forward",
        2 * ROWS,
        lambda: (values(M, D), values(D)),
        lambda x, w: norm.rms_norm_forward(x, None, w, EPS),
        norm_formula,
        "rms_norm",
    ),
    Case(
        "rms_norm_add forward",
        4 * ROWS,
        lambda: (values(M, D), values(M, D), values(D)),
        lambda x, residual, w: norm.rms_norm_forward(x, residual, w, EPS),
        norm_add_formula,
    ),
    Case(
        "rms_norm backward",
        3 * ROWS,
        lambda: (values(M, D), values(M, D), *weight_and_r()),
        lambda dy, x, w, r: norm.rms_norm_backward(dy, None, x, w, r),
        norm_backward_formula,
    ),
    Case(
        "rms_norm backward dw",
        3 * ROWS,
        lambda: (values(M, D), values(M, D), *weight_and_r()),
        lambda dy, x, w, r: norm.rms_norm_backward(dy, None, x, w, r, want_dw=True),
        norm_backward_dw_formula,
        "rms_norm",
        lambda: (values(M, D), values(D)),
    ),
    Case(
        "rms_norm_add backward",
        4 * ROWS,
        lambda: (values(M, D), values(M, D), values(M, D), *weight_and_r()),
        norm.rms_norm_backward,
        norm_add_backward_formula,
    ),
    Case(
        "rope forward",
        2 * HEADS,
        lambda: (values(B, T, H_Q, HEAD), values(B, T, H_K, HEAD), *tables()),
        lambda q, k, cos, sin: rope._turn((q, k), cos, sin, back=False),
        rope_formula,
        "rope",
    ),
    Case(
        "rope backward",
        2 * HEADS,
        lambda: (values(B, T, H_Q, HEAD), values(B, T, H_K, HEAD), *tables()),
        lambda q, k, cos, sin: rope._turn((q, k), cos, sin, back=True),
        rope_backward_formula,
        "rope",
    ),
    Case(
        "swiglu forward",
        3 * GATE,
        lambda: (values(M, I), values(M, I)),
        swiglu.swiglu_forward,
        swiglu_formula,
        "swiglu",
    ),
    Case("swiglu forward halves", 3 * GATE, halves, swiglu.swiglu_forward, swiglu_formula),
    Case(
        "swiglu backward",
        5 * GATE,
        lambda: (values(M, I), values(M, I), values(M, I)),
        swiglu.swiglu_backward,
        swiglu_backward_formula,
        "swiglu",
        lambda: (values(M, I), values(M, I)),
    ),
    Case(
        "swiglu backward halves",
        5 * GATE,
        lambda: (values(M, I), *halves()),
        lambda dh, g, u: swiglu.swiglu_backward(dh, g, u, out=dh.new_empty(M, 2 * I).split(I, dim=1)),
        swiglu_backward_formula,
    ),
    Case(
        "cross_entropy overwrite",
        2 * LOGITS,
        lambda: (values(CHUNK, V), words(CHUNK)),
        lambda z, t: cross_entropy._overwrite(z, t, True),
        softmax_formula,
    ),
    Case(
        "cross_entropy forward",
        LOGITS,
        lambda: (values(CHUNK, V), words(CHUNK)),
        cross_entropy.statistics,
        nll_formula,
    ),
    Case("cross_entropy backward", 2 * LOGITS, statistics, cross_entropy.gradient, nll_backward_formula),
]


def set_count(case: Case) -> int:
    return copies(sum(t.nbytes for t in case.make()))


@torch.no_grad()
def ms_of(call: Callable[..., object], case: Case, sets: int) -> float:
    inputs = [case.make() for _ in range(sets)]
    return graph_ms(lambda i: call(*inputs[i]), sets)


def rivals(case: Case, sets: int) -> dict[str, float | None]:
    row: dict[str, float | None] = {
        "compile_ms": ms_of(torch.compile(case.formula, dynamic=False), case, sets),
        "liger_ms": None,
    }
    if LIGER and case.liger:
        row["liger_ms"] = liger_ms(case.liger, case.liger_make or case.make, sets, "backward" in case.name)
    return row


def show(name: str, row: dict[str, Any]) -> None:
    cells = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if v is not None)
    print(f"{name:26s} " + "  ".join(cells), flush=True)


def linear_rows() -> list[dict[str, Any]]:
    """Loss and gradient of 8192 hidden states under a head of 128256 words: ours, torch's, compiled, Liger's."""
    h, w, t = values(M, D).requires_grad_(), values(V, D) * 0.02, words(M)

    def step(nll: Callable[[], Tensor]) -> Callable[[int], None]:
        def once(_: int) -> None:
            h.grad = None
            nll().backward()

        return once

    def plain() -> Tensor:
        return torch.nn.functional.cross_entropy((h @ w.T).float(), t)

    calls = {
        "ours": lambda: cross_entropy.linear_cross_entropy(h, w, t)[0].mean(),
        "torch": plain,
        "compile": torch.compile(plain, dynamic=False),
    }
    if LIGER:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Fused

        def fused() -> Tensor:
            out = Fused.apply(h, w, t)
            return out[0] if isinstance(out, tuple) else out

        calls["liger"] = fused
    rows = []
    for who, nll in calls.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ms = eager_ms(step(nll), 1)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        row = {"ms": round(ms, 3), "tflop_s": round(4 * M * V * D / ms / 1e9, 1), "peak_gib": round(peak, 2)}
        show(f"linear_cross_entropy {who}", row)
        rows.append({"op": "linear_cross_entropy forward and backward", "who": who, **row})
    return rows


# The knobs, with the alternatives worth a measurement: (file, name of the knob, what it returns instead).
NORM_TILES = [(1, 2), (1, 4), (1, 8), (1, 16), (2, 4), (2, 8), (4, 8)]
GATE_TILES = [(512, 2), (1024, 2), (1024, 4), (1024, 8), (2048, 4), (2048, 8), (4096, 8), (4096, 16)]
WALKS = [(1024, 4), (2048, 4), (4096, 4), (4096, 8), (4096, 16), (8192, 8), (8192, 16), (8192, 32), (16384, 32)]
SWEEP: dict[str, list[tuple[Any, str, list[Any]]]] = {
    "rms_norm forward": [(norm, "forward_tile", NORM_TILES)],
    "rms_norm_add forward": [(norm, "forward_tile", NORM_TILES)],
    "rms_norm backward": [
        (norm, "backward_tile", NORM_TILES),
        (norm, "programs_of", [132 * 4, 132 * 8, 132 * 16]),
    ],
    "rms_norm_add backward": [(norm, "backward_tile", NORM_TILES)],
    "rms_norm backward dw": [
        (norm, "backward_tile", NORM_TILES),
        (norm, "programs_of", [132 * n for n in (1, 2, 4, 6, 8)]),
    ],
    "rope forward": [(rope, "tile", [(4, 1), (8, 1), (8, 2), (8, 4), (16, 2), (16, 4), (32, 4), (32, 8)])],
    "swiglu forward": [(swiglu, "tile", GATE_TILES)],
    "swiglu backward": [(swiglu, "tile", GATE_TILES)],
    "swiglu backward halves": [(swiglu, "tile", GATE_TILES)],
    "cross_entropy overwrite": [(cross_entropy, "tile", WALKS)],
    "cross_entropy forward": [(cross_entropy, "tile", WALKS)],
    "cross_entropy backward": [(cross_entropy, "tile", WALKS)],
}


def sweep(case: Case, sets: int, copy: float) -> list[dict[str, Any]]:
    rows = []
    for file, knob, choices in SWEEP.get(case.name, []):
        for choice in choices:
            with patch.object(file, knob, return_value=choice):
                ms = ms_of(case.ours, case, sets)
            row = {"ms": round(ms, 4), "share": round(case.nbytes / ms / 1e6 / copy, 3)}
            show(f"  {case.name}", {knob: str(choice), **row})
            rows.append({"op": case.name, "knob": knob, "choice": str(choice), **row})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="time the alternatives of each knob instead of the rivals")
    parser.add_argument("--only", default="", help="only the operations whose name holds this")
    parser.add_argument("--save", action="store_true", help="write results/elementwise-gpu.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU: the CPU has no such kernels")
    torch.manual_seed(0)
    copy = copy_gb_s()
    print(f"copy {copy:.0f} GB/s, read and written; liger_kernel {'is' if LIGER else 'is not'} installed")
    rows: list[dict[str, Any]] = [{"op": "copy", "gb_s": round(copy, 1)}]
    for case in CASES:
        if args.only not in case.name:
            continue
        torch.cuda.empty_cache()
        sets = set_count(case)
        if args.sweep:
            rows += sweep(case, sets, copy)
            continue
        ms = ms_of(case.ours, case, sets)
        gb_s = case.nbytes / ms / 1e6
        row = {"ms": round(ms, 4), "gb_s": round(gb_s, 1), "share": round(gb_s / copy, 3), **rivals(case, sets)}
        show(case.name, row)
        rows.append({"op": case.name, "bytes": case.nbytes, **row})
    if args.only in "linear_cross_entropy":
        torch.cuda.empty_cache()
        if args.sweep:
            h, w, t = values(M, D).requires_grad_(), values(V, D) * 0.02, words(M)
            for budget in (2**27, 2**28, 2**29, 2**30):
                with patch.object(cross_entropy, "BUDGET_GPU", budget):
                    ms = eager_ms(lambda _: cross_entropy.linear_cross_entropy(h, w, t), 1)
                show("  linear_cross_entropy", {"BUDGET_GPU": budget, "ms": round(ms, 3)})
                rows.append({"op": "linear_cross_entropy", "knob": "BUDGET_GPU", "choice": budget, "ms": round(ms, 3)})
        else:
            rows += linear_rows()
    finish("elementwise-sweep" if args.sweep else "elementwise", rows, args.save)


if __name__ == "__main__":
    main()
