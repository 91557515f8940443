"""The end of a token: the likeliest next one, where it goes, and whether its row has ended, in one launch.

    token = argmax(logits)      at = at + 1      out[at] = token      stopped = stopped or ends[token]

Of equal logits the first wins.  A row whose logits hold NaN or +inf is marked, so that no text is made of them unseen.
"""

import torch
from torch import Tensor

from lora.kernels._triton import tl, triton
from lora.kernels.dispatch import use_triton
from lora.kernels.op import op


# ---- reference ----
def note(
    token: Tensor, logits: Tensor, taken: Tensor, at: Tensor, out: Tensor, ends: Tensor, stopped: Tensor, bad: Tensor
) -> None:
    """As `choose`, with a token (B,) drawn by the caller."""
    taken.copy_(token)
    at += 1
    out.scatter_(1, at[:, None], taken[:, None])
    stopped |= ends[taken]
    bad |= ~(logits < torch.inf).all(dim=1)  # NaN is not below either


def choose_ref(
    logits: Tensor, taken: Tensor, at: Tensor, out: Tensor, ends: Tensor, stopped: Tensor, bad: Tensor
) -> None:
    note(logits.argmax(dim=1), logits, taken, at, out, ends, stopped, bad)


# ---- kernel ----
@triton.jit
def _choose_kernel(
    logits_ptr,  # (B, V), rows apart by their stride
    taken_ptr, at_ptr,  # (B,) i64
    out_ptr,  # (B, L) i64 contiguous
    ends_ptr,  # (V,) u8
    stopped_ptr, bad_ptr,  # (B,) u8
    V, L, stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    where = i  # also where all are -inf
    for base in range(0, V, BLOCK):
        z = tl.load(logits_ptr + b * stride + base + i, mask=base + i < V, other=-float("inf")).to(tl.float32)
        z = tl.where(z < float("inf"), z, float("inf"))  # NaN is not below either
        where = tl.where(z > best, base + i, where)
        best = tl.where(z > best, z, best)
    top = tl.max(best, axis=0)
    wrong = (top == float("inf")).to(tl.uint8)
    token = tl.min(tl.where(best == top, where, V - 1), axis=0).to(tl.int64)
    at = tl.load(at_ptr + b) + 1
    tl.store(at_ptr + b, at)
    tl.store(taken_ptr + b, token)
    tl.store(out_ptr + b * L + at, token)
    tl.store(stopped_ptr + b, tl.load(stopped_ptr + b) | tl.load(ends_ptr + token))
    tl.store(bad_ptr + b, tl.load(bad_ptr + b) | wrong)


# ---- launch ----
def choose(logits: Tensor, taken: Tensor, at: Tensor, out: Tensor, ends: Tensor, stopped: Tensor, bad: Tensor) -> None:
    """Greedy choice from logits (B, V), written over the rest: taken and at (B,) int64, out (B, L) int64, ends (V,)
    bool (the tokens that end a row), stopped and bad (B,) bool.

    at + 1 must be a column of out: it is not checked, since that would ask the GPU.
    """
    B, V = logits.shape
    if taken.shape != (B,) or at.shape != (B,) or out.shape[:1] != (B,) or ends.shape != (V,):
        raise ValueError(
            f"logits {tuple(logits.shape)} do not fit taken {tuple(taken.shape)}, at {tuple(at.shape)}, "
            f"out {tuple(out.shape)} and ends {tuple(ends.shape)}"
        )
    if logits.stride(1) != 1 or not use_triton(logits, taken, at, out, ends, stopped, bad):
        choose_ref(logits, taken, at, out, ends, stopped, bad)
    else:
        _choose(logits, taken, at, out, ends, stopped, bad)


@op("lora::choose", mutates=("taken", "at", "out", "stopped", "bad"))
def _choose(logits: Tensor, taken: Tensor, at: Tensor, out: Tensor, ends: Tensor, stopped: Tensor, bad: Tensor) -> None:
    B, V = logits.shape
    BLOCK = min(16384, triton.next_power_of_2(V))
    with torch.cuda.device_of(logits):
        _choose_kernel[(B,)](
            logits, taken, at, out, ends.view(torch.uint8), stopped.view(torch.uint8), bad.view(torch.uint8),
            V, out.shape[1], logits.stride(0), BLOCK=BLOCK, num_warps=max(1, min(32, BLOCK // 512)),
        )  # fmt: skip
