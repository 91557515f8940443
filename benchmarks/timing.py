"""How the GPU benchmarks time: medians of CUDA-graph replays over rotating inputs, and the card's two ceilings."""

from collections.abc import Callable

import torch
from triton.testing import do_bench

CACHE = 50 * 2**20  # bytes of an H100's L2; inputs must rotate through several times that


def copies(nbytes: int) -> int:
    """How many sets of inputs of `nbytes` to rotate through, so that none is still in the cache when it comes again."""
    return max(2, -(-8 * CACHE // nbytes))


def recorded(call: Callable[[int], object], sets: int, repeats: int) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `repeats` times call(i), i going round through range(sets)."""
    for i in range(min(3, sets)):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(repeats):
            call(i % sets)
    return graph


def graph_ms(call: Callable[[int], object], sets: int, repeats: int = 0) -> float:
    """Median milliseconds of call(i), i going round through range(sets), inside one CUDA graph."""
    repeats = repeats or max(8, sets)
    graph = recorded(call, sets, repeats)
    return do_bench(graph.replay, warmup=20, rep=100, return_mode="median") / repeats


def eager_ms(call: Callable[[int], object], sets: int) -> float:
    """Median milliseconds of call(i) launched from Python, i going round through range(sets)."""
    turn = iter(range(10**9))
    return do_bench(lambda: call(next(turn) % sets), warmup=20, rep=100, return_mode="median")


def copy_gb_s() -> float:
    """Copy bandwidth of this card now, bytes read plus bytes written, GB/s."""
    x = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    y = torch.empty_like(x)
    return 2 * x.numel() / do_bench(lambda: y.copy_(x), warmup=20, rep=100, return_mode="median") / 1e6


def matmul_tflop_s(n: int = 8192) -> float:
    """bfloat16 matrix product of this card now, TFLOP/s."""
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / do_bench(lambda: a @ b, warmup=20, rep=100, return_mode="median") / 1e9
