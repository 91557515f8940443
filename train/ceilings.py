"""What a machine can do at most, and how long a training step takes there: counted work over those ceilings.

    seconds = Σ products / matmul rate + attention / its own rates + bytes moved / copy bandwidth,
    forward and backward each at least as long as what goes over to the host and comes back meanwhile

Counted per token and block (fused.py; D states, Q queries keys and values, A attention's output, F the gate, i bytes
a value): products 2 Σ N K each way, one more for what is made again; norms, RoPE, gate and copies 6 D + 2 Q + 2 A + 3 F
values forward and 10 D + 2 Q + 6 F backward; products with the factors read their inputs once, dY twice; a 4-bit
weight is read and written decoded at each use.
Source: gpu-measured ceilings of benchmarks/timing.py in LOG.md; vendors' data sheets for the others, at the share of
the sheet that the H100 reaches (0.74 of products, 0.90 of copies).
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from lora.models.base import attention
from lora.models.budget import Widths, host_bytes


class Card(NamedTuple):
    """Ceilings in units of 1e12 operations and 1e9 bytes a second, and bytes of memory."""

    name: str
    matmul: float
    copy: float  # read plus written
    attention: tuple[float, float]  # forward, backward
    host: tuple[float, float]  # pinned memory: to it, and back
    memory: int
    source: str


def _sheet(name: str, tera: float, giga: float, pcie: float, gib: int) -> Card:
    matmul = 0.74 * tera
    return Card(
        name, matmul, 0.9 * giga, (0.5 * matmul, 0.4 * matmul), (pcie, pcie), gib * 2**30, "data sheet x 0.74 and 0.90"
    )


CARDS = {
    "h100": Card("H100 80GB HBM3", 729, 3019, (513, 359), (50, 50), 85_000_000_000, "measured 2026-11-24, LOG.md"),
    "h200": Card("H200", 729, 4320, (513, 359), (50, 50), 150_000_000_000, "H100's products, data sheet x 0.90"),
    "a100": _sheet("A100 80GB SXM", 312, 2039, 24, 80),
    "l40s": _sheet("L40S", 362, 864, 24, 48),
    "rtx4090": _sheet("GeForce RTX 4090", 165, 1008, 24, 24),
    "rtx3090": _sheet("GeForce RTX 3090", 71, 936, 24, 24),
    "l4": _sheet("L4", 121, 300, 12, 24),
}
LAUNCHES = 10e-3  # seconds a block and step from Python, on the H100's machine: 320 ms of 32 blocks at 512 tokens
REPLAYED = 0.2e-3  # of those of a graph
HALF = (275, 923)  # lengths at which attention, forward and backward, is half as fast as on endless rows (H100, cuDNN)
IDLE = 20e-3 / 32  # seconds a block between kernels of a large step, launched one by one


def card_of(name: str) -> Card:
    """A named card. Raises ValueError for one that is not in the table."""
    key = name.lower().replace(" ", "").replace("-", "")
    if key not in CARDS:
        raise ValueError(f"card={name!r} is not known; there are {', '.join(CARDS)}")
    return CARDS[key]


def measure(device: torch.device) -> Card:
    """The ceilings of a machine now, in about a second."""
    gpu = device.type == "cuda"
    dtype, n, size = (torch.bfloat16, 8192, 2**30) if gpu else (torch.float32, 1024, 2**25)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    matmul = 2 * n**3 / _seconds(lambda: a @ b, device) / 1e12
    x = torch.empty(size, dtype=torch.uint8, device=device).zero_()
    y = torch.empty_like(x)
    copy = 2 * size / _seconds(lambda: y.copy_(x), device) / 1e9
    B, T, H, D = (4, 2048, 32, 128) if gpu else (1, 512, 8, 64)
    q, k, v = (torch.randn(B, H, T, D, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        forward = _seconds(lambda: attention(q, k, v, None), device)
    att = attention(q, k, v, None)
    backward = _seconds(lambda: torch.autograd.grad(att, (q, k, v), att, retain_graph=True), device)
    flop = 2 * B * H * T * T * D  # two products, half of each masked
    host, memory, name = (copy / 2, copy / 2), 0, "this processor"
    if gpu:
        pinned, part = torch.empty(2**28, dtype=torch.uint8, pin_memory=True), x[: 2**28]
        away = _seconds(lambda: pinned.copy_(part, non_blocking=True), device)
        back = _seconds(lambda: part.copy_(pinned, non_blocking=True), device)
        host = (2**28 / away / 1e9, 2**28 / back / 1e9)
        name, memory = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[1]
    return Card(
        name, matmul, copy, (flop / forward / 1e12, 2.5 * flop / backward / 1e12), host, memory, "measured now"
    )  # fmt: skip


def _seconds(call: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Of a call, the least of some: the ceiling, not the average. On a GPU launches are hidden behind other calls."""
    took, calls = [], 8 if device.type == "cuda" else 1
    for _ in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append((time.perf_counter() - begin) / calls)
    return min(took[2:])


def step_seconds(
    w: Widths,
    card: Card,
    *,
    rows: int,
    length: int,
    keep: Sequence[str],
    itemsize: int,
    bits4: bool,
    trained: int,
    learned: int,
    decoded: int = 0,
    recorded: bool = False,
    full: bool = False,
    gpu: bool = True,
) -> dict[str, float]:
    """Seconds of one step, by what they are spent on; their sum is the step.

    `trained` parameters; `full` is full fine-tuning, whose backward has weight gradients too; `recorded` steps run as
    one CUDA graph; `bits4` weights are decoded at each use, but for those of the first `decoded` blocks.
    """
    M, L = rows * length, w.blocks
    D, Q, A, F = w.states, w.qkv, w.attended, w.gate
    tera, giga = card.matmul * 1e12, card.copy * 1e9
    weight = sum(N * K for N, K in w.shapes)
    gate_up = 2 * F * D
    again = {"no_gate": gate_up, "host": gate_up, "input": weight - D * F, "input_host": weight - D * F}
    remade = sum(again.get(word, 0) for word in keep)  # weights whose product is made a second time
    passes = 2 * L * weight + remade
    stay = 2 * decoded * weight + sum(again.get(word, 0) for word in keep[:decoded])
    products = 2 * M * ((3 if full else 2) * L * weight + remade)
    scores = 2 * rows * A * length * length  # operations of attention forward
    twice = sum(word.startswith("input") for word in keep)
    there, back = (rate * 1e12 * _longer(length, half) for rate, half in zip(card.attention, HALF, strict=True))
    attention = (L + twice) * scores / there + L * 2.5 * scores / back
    forward, backward = 6 * D + 2 * Q + 2 * A + 3 * F, 10 * D + 2 * Q + 6 * F
    elementwise = M * itemsize * (L * (forward + backward) + remade // max(1, D))
    adapters = 0.0
    if any(w.ranks):
        reads = 2 * (2 * D + A + F) + 2 * (Q + 2 * D + 2 * F)
        adapters = M * itemsize * L * reads / giga
    decode = (passes - stay) * ((0.516 if bits4 else itemsize) + itemsize) / giga if bits4 or any(w.ranks) else 0.0
    head = 2 * (3 if full else 2) * learned * w.vocab * D / tera + 3 * learned * w.vocab * itemsize / giga
    spent = {
        "products": products / tera + passes * itemsize / giga,  # a few rows wait for the weight
        "attention": attention,
        "norms, RoPE, gate": elementwise / giga,
        "adapters": adapters,
        "decoding": decode,
        "head and loss": head,
        "optimizer": 32 * trained / giga,
    }
    busy = sum(spent.values())
    if gpu:
        spent["launches"] = REPLAYED * L if recorded else max(IDLE * L, (0.5 if full else 1.0) * LAUNCHES * L - busy)
    away = sum(host_bytes(w, word, M, itemsize) for word in keep)
    if away:
        # a forward is about 0.35 of a step; copies that take longer than it, or than the backward, are waited for
        to, back = (away / (rate * 1e9) for rate in card.host)
        spent["waiting for the host"] = max(0.0, to - 0.35 * busy) + max(0.0, back - 0.65 * busy)
    return spent


def _longer(length: int, half: int) -> float:
    """How much faster attention is on rows of a length than on rows of 2048."""
    return (1 + half / 2048) / (1 + half / length)
