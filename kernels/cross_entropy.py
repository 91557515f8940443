"""Negative log-likelihood of targets, from a linear head without ever holding all its logits, or from given logits.

    z = h Wᵀ      nll_i = log Σ_v exp z_iv - z_it       dz_i = g_i (softmax(z_i) - onehot(t_i))       dh_i = dz_i W

Rows go through the head in chunks of a byte budget.  The gradient of h is made in the same pass as the loss,
while the chunk's probabilities are at hand, so nothing is computed twice and the logits of one chunk only are
alive.  The head is frozen: its own gradient is never formed.  On a GPU one kernel reads a row of logits for its
maximum and sum, reads it again and writes dz over it, all in float32.

Bytes that must move, in tensors of n x V: 3 (read, read, write), or 2 where the second reading finds the row in the
cache; with given logits forward 1, backward 2.  For 8192 x 128256 in bfloat16 (2.1 GB a tensor) at 3.0 TB/s: 2.1 ms
(1.4); 0.7 and 1.4 ms.  The two products of the head are 17.2 TFLOP: 24.6 ms at 700 TFLOP/s.

A target outside the vocabulary is an error on a CPU and NaN from the kernel: to look first would make the GPU wait.
The idea is that of Cut Your Losses, arXiv:2411.09009, and of Liger's fused linear cross entropy; the running
maximum and sum are those of online softmax, arXiv:1805.02867.
"""

import torch
from torch import Tensor

from lora.kernels import gemm
from lora.kernels._triton import tl, triton
from lora.kernels.dispatch import on_gpu, use_triton
from lora.kernels.op import op

# Bytes of logits alive at once, float32 on a CPU, those of h on a GPU.  On a CPU 256 rows of a 49 152-word
# vocabulary: the products of 128 are slower by a tenth (LOG.md, 2026-11-27).
BUDGET = {"cpu": 48 * 2**20}
BUDGET_GPU = 2**28


def chunk_rows(V: int, itemsize: int, budget: int = BUDGET_GPU) -> int:
    """Rows of V logits that are alive at once on a GPU."""
    rows = max(1, budget // (itemsize * V))
    return rows if rows <= 128 else rows - rows % 128  # whole tiles of the matrix product


# ---- reference ----
def _overwrite_ref(logits: Tensor, target: Tensor, want_dz: bool) -> tuple[Tensor, Tensor, Tensor]:
    """nll (n,), hit (n,) and softmax - onehot (n, V), the last only with `want_dz`, and then over the logits."""
    dtype, t = logits.dtype, target[:, None]
    if want_dz and dtype in (torch.float32, torch.float64) and logits.device.type == "cpu":
        top, at = logits.amax(dim=1), logits.gather(1, t)[:, 0]
        p = torch.ops.aten._softmax.out(logits, -1, False, out=logits)
        # the likeliest has p = exp(0) / Σ, which gives log Σ exactly however small p of the target is
        nll = (top - at).sub_(p.amax(dim=1).log_())
        return nll, at >= top, p.scatter_add_(1, t, p.new_full(t.shape, -1.0))
    logp = torch.log_softmax(logits.float(), dim=-1)  # (n, V)
    del logits
    at = logp.gather(1, t)
    nll, hit = -at[:, 0], at[:, 0] >= logp.amax(dim=1)
    if want_dz:
        logp = logp.exp_().scatter_add_(1, t, torch.full_like(at, -1.0)).to(dtype)
    return nll, hit, logp


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.element_size() < 4 else logits


def _statistics_ref(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z = _wide(logits)
    top = z.amax(dim=1)  # (n,)
    total = (z - top[:, None]).exp_().sum(dim=1)
    z_t = z.gather(1, target[:, None])[:, 0]
    return (top - z_t) + total.log(), z_t >= top, torch.stack((top, total), dim=1)


def _gradient_ref(logits: Tensor, target: Tensor, stats: Tensor, g: Tensor) -> Tensor:
    z, (top, total) = _wide(logits), stats.unbind(dim=1)
    p = (z - top[:, None]).exp_().div_(total[:, None])  # (n, V)
    p.scatter_add_(1, target[:, None], p.new_full((p.shape[0], 1), -1.0))
    return p.mul_(g[:, None]).to(logits.dtype)


# ---- kernel ----
@triton.jit
def _row_statistics(
    row_ptr,  # (V,)
    V,
    BLOCK: tl.constexpr,
    KEEP: tl.constexpr,  # ask the cache for the row again soon
):
    # Each lane of 8 neighbours, which one thread loads at once, keeps a maximum and a sum of its own: the loop has no
    # exchange between threads, and shrinks a sum once for 8 logits
    LANES: tl.constexpr = BLOCK // 8
    col = tl.arange(0, BLOCK)
    top = tl.full((LANES,), -3.0e38, dtype=tl.float32)  # finite: -inf - -inf is NaN
    total = tl.zeros((LANES,), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        if KEEP:
            z = tl.load(row_ptr + start + col, mask=start + col < V, other=-float("inf"), eviction_policy="evict_last")
        else:
            z = tl.load(row_ptr + start + col, mask=start + col < V, other=-float("inf"))
        z = tl.reshape(z.to(tl.float32), (LANES, 8))
        higher = tl.maximum(top, tl.max(z, axis=1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher[:, None]), axis=1)
        top = higher
    largest = tl.max(top, axis=0)
    return largest, tl.sum(total * tl.exp(top - largest), axis=0)


@triton.jit
def _write_gradient(
    z_ptr,  # (V,)
    dz_ptr,  # (V,), may be z_ptr
    col,  # (BLOCK,) of V
    V,
    t,
    largest,
    inverse,  # 1 / Σ exp(z - largest)
    g,
):
    z = tl.load(z_ptr + col, mask=col < V, other=0.0, eviction_policy="evict_first").to(tl.float32)
    p = tl.exp(z - largest) * inverse
    dz = tl.where(col == t, p - 1.0, p) * g
    tl.store(dz_ptr + col, dz.to(dz_ptr.dtype.element_ty), mask=col < V, eviction_policy="evict_first")


@triton.jit
def _statistics_kernel(
    logits_ptr,  # (n, V)
    target_ptr,  # (n,) int64
    nll_ptr,  # (n,) f32
    hit_ptr,  # (n,) u8
    stats_ptr,  # (n, 2) f32: largest logit, Σ exp(z - largest); not written with OVERWRITE
    V,
    stride_n,
    OVERWRITE: tl.constexpr,  # logits become softmax - onehot
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_n
    t = tl.load(target_ptr + row)
    is_word = (t >= 0) & (t < V)
    z_t = tl.load(row_ptr + t, mask=is_word, other=0.0).to(tl.float32)
    z_t = tl.where(is_word, z_t, float("nan"))
    largest, total = _row_statistics(row_ptr, V, BLOCK, OVERWRITE)
    tl.store(nll_ptr + row, (largest - z_t) + tl.log(total))  # the difference first: z may be thousands
    tl.store(hit_ptr + row, (z_t >= largest).to(tl.uint8))
    if OVERWRITE:
        inverse = tl.where(is_word, 1.0 / total, float("nan"))
        tl.debug_barrier()  # every warp has read z_t before one writes over it
        for start in range(0, V, BLOCK):
            _write_gradient(row_ptr, row_ptr, start + tl.arange(0, BLOCK), V, t, largest, inverse, 1.0)
    else:
        tl.store(stats_ptr + 2 * row, largest)
        tl.store(stats_ptr + 2 * row + 1, total)


@triton.jit
def _gradient_kernel(
    logits_ptr,  # (n, V)
    target_ptr,  # (n,) int64
    stats_ptr,  # (n, 2) f32
    g_ptr,  # (n,) f32
    dz_ptr,  # (n, V) contiguous
    V,
    stride_n,
    blocks,  # of a row
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    t = tl.load(target_ptr + row)
    largest = tl.load(stats_ptr + 2 * row)
    total = tl.load(stats_ptr + 2 * row + 1)
    inverse = tl.where((t >= 0) & (t < V), 1.0 / total, float("nan"))
    g = tl.load(g_ptr + row)
    _write_gradient(logits_ptr + row * stride_n, dz_ptr + row * V, col, V, t, largest, inverse, g)


# ---- launch ----
def tile(V: int, most: int) -> tuple[int, int]:
    """Values and warps of a step along a row of V logits: 16 values a thread, at most `most`."""
    block = max(32, min(most, 1 << (V - 1).bit_length()))
    return block, max(1, block // 512)


def _launch(logits: Tensor, target: Tensor, overwrite: bool) -> tuple[Tensor, Tensor, Tensor]:
    n, V = logits.shape
    nll = torch.empty(n, dtype=torch.float32, device=logits.device)
    hit = torch.empty(n, dtype=torch.bool, device=logits.device)
    stats = torch.empty((0 if overwrite else n, 2), dtype=torch.float32, device=logits.device)
    # wide, so that few rows are at work at once and much of them is in the cache when OVERWRITE reads them again; the
    # same for both, so that a loss has the same bits with and without a gradient
    BLOCK, num_warps = tile(V, 16384)
    if n:
        with torch.cuda.device_of(logits):  # Triton launches on the current device, not on the tensors'
            _statistics_kernel[(n,)](
                logits, target, nll, hit.view(torch.uint8), stats, V, logits.stride(0),
                OVERWRITE=overwrite, BLOCK=BLOCK, num_warps=num_warps,
            )  # fmt: skip
    return nll, hit, stats


@op("lora::cross_entropy_overwrite", mutates=("logits",))
def _overwrite_op(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    nll, hit, _ = _launch(logits, target, overwrite=True)
    return nll, hit


@_overwrite_op.register_fake
def _(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    n = logits.shape[0]
    return logits.new_empty(n, dtype=torch.float32), logits.new_empty(n, dtype=torch.bool)


@op("lora::cross_entropy_statistics")
def _statistics_op(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _launch(logits, target, overwrite=False)


@_statistics_op.register_fake
def _(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, f32 = logits.shape[0], torch.float32
    return logits.new_empty(n, dtype=f32), logits.new_empty(n, dtype=torch.bool), logits.new_empty((n, 2), dtype=f32)


@op("lora::cross_entropy_gradient")
def _gradient_op(logits: Tensor, target: Tensor, stats: Tensor, g: Tensor) -> Tensor:
    n, V = logits.shape
    dz = torch.empty((n, V), dtype=logits.dtype, device=logits.device)
    BLOCK, num_warps = tile(V, 2048)
    blocks = -(-V // BLOCK)
    if n:
        with torch.cuda.device_of(logits):
            _gradient_kernel[(n * blocks,)](
                logits, target, stats, g, dz, V, logits.stride(0), blocks, BLOCK=BLOCK, num_warps=num_warps
            )
    return dz


@_gradient_op.register_fake
def _(logits: Tensor, target: Tensor, stats: Tensor, g: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


def _overwrite(logits: Tensor, target: Tensor, want_dz: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `_overwrite_ref`, by the kernel, softmax - onehot written over the logits."""
    if want_dz:
        return *_overwrite_op(logits, target), logits
    nll, hit, _ = _statistics_op(logits, target)
    return nll, hit, logits


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def statistics(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """nll (n,), hit (n,) and what `gradient` needs: the largest logit and Σ exp(z - largest) of each row, (n, 2)."""
    if not use_triton(logits, target):
        return _statistics_ref(logits, target)
    return _statistics_op(_rows(logits), target.contiguous())


def gradient(logits: Tensor, target: Tensor, stats: Tensor, g: Tensor) -> Tensor:
    """g_i (softmax(z_i) - onehot(t_i)), (n, V) in the dtype of the logits."""
    if not use_triton(logits, target, stats, g):
        return _gradient_ref(logits, target, stats, g)
    return _gradient_op(_rows(logits), target.contiguous(), stats, g.contiguous())


# ---- autograd ----
class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, target):
        n, V = h.shape[0], weight.shape[0]
        in_triton = use_triton(h, weight, target)
        budget = BUDGET_GPU if on_gpu(h) else BUDGET.get(h.device.type, BUDGET_GPU)
        rows = chunk_rows(V, h.element_size(), budget) if in_triton else max(1, budget // (4 * V))
        target = target.contiguous()
        nll = torch.empty(n, dtype=torch.float32, device=h.device)
        hit = torch.empty(n, dtype=torch.bool, device=h.device)
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        step = _overwrite if in_triton else _overwrite_ref
        for start in range(0, n, rows):
            chunk = slice(start, start + rows)
            # the logits get no name here: they would outlive their softmax
            nll[chunk], hit[chunk], dz = step(gemm.linear(h[chunk], weight), target[chunk], dh is not None)
            if dh is not None:
                dh[chunk] = gemm.matmul(dz, weight)
            del dz  # before the next chunk's logits
        ctx.mark_non_differentiable(hit)
        ctx.save_for_backward(*(() if dh is None else (dh,)))
        return nll, hit

    @staticmethod
    def backward(ctx, *grads):
        (dh,) = ctx.saved_tensors
        return dh * grads[0][:, None].to(dh.dtype), None, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target):
        nll, hit, stats = statistics(logits, target)
        ctx.save_for_backward(logits, target, stats)
        ctx.mark_non_differentiable(hit)
        return nll, hit

    @staticmethod
    def backward(ctx, *grads):
        logits, target, stats = ctx.saved_tensors
        return gradient(logits, target, stats, grads[0]), None


def linear_cross_entropy(h: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """NLL in nats (n,) float32 and whether the target was the likeliest (n,) bool.

    h (n, d) hidden states, weight (V, d) of a frozen head, target (n,) int64.
    """
    return _LinearCrossEntropy.apply(h, weight, target)


def cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The same of logits (n, V) that are there already, with their gradient; float64 in, float64 out."""
    if logits.dim() != 2 or target.shape != logits.shape[:1]:
        raise ValueError(
            f"logits {tuple(logits.shape)} and targets {tuple(target.shape)}; they must be (n, V) and (n,)"
        )
    return _CrossEntropy.apply(logits, target)
