"""Negative log-likelihood of targets under a linear head, without ever holding all the logits.

    z = h Wᵀ      nll_i = log Σ_v exp z_iv - z_it       dh_i = g_i (softmax(z_i) - onehot(t_i)) W

Rows go through in chunks of a byte budget.  The gradient of h is made in the same pass as the loss,
while the chunk's probabilities are at hand, so nothing is computed twice and 4 bytes a logit are alive
for one chunk only.  The head is frozen: its own gradient is never formed.
The idea is that of Cut Your Losses, arXiv:2411.09009, and of Liger's fused linear cross entropy.
"""

import torch
from torch import Tensor

from lora.kernels import gemm

# Bytes of float32 logits alive at once.  On a CPU 128 rows of a 49 152-word vocabulary: the C library gives larger
# blocks back to the system at every free, and a softmax into fresh pages takes three times as long.
BUDGET = {"cpu": 24 * 2**20}
BUDGET_GPU = 2**28


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, target):
        n, V = h.shape[0], weight.shape[0]
        rows = max(1, BUDGET.get(h.device.type, BUDGET_GPU) // (4 * V))
        nll = torch.empty(n, dtype=torch.float32, device=h.device)
        hit = torch.empty(n, dtype=torch.bool, device=h.device)
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        for start in range(0, n, rows):
            part, t = h[start : start + rows], target[start : start + rows, None]
            logp = torch.log_softmax(gemm.linear(part, weight).float(), dim=-1)  # (rows, V)
            at = logp.gather(1, t)
            nll[start : start + rows] = -at[:, 0]
            hit[start : start + rows] = at[:, 0] >= logp.amax(dim=1)
            if dh is not None:
                p = logp.exp_()
                p.scatter_add_(1, t, torch.full_like(at, -1.0))
                dh[start : start + rows] = gemm.matmul(p.to(weight.dtype), weight)
        ctx.mark_non_differentiable(hit)
        ctx.save_for_backward(*(() if dh is None else (dh,)))
        return nll, hit

    @staticmethod
    def backward(ctx, *grads):
        (dh,) = ctx.saved_tensors
        return dh * grads[0][:, None].to(dh.dtype), None, None


def linear_cross_entropy(h: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """NLL in nats (n,) float32 and whether the target was the likeliest (n,) bool.

    h (n, d) hidden states, weight (V, d) of a frozen head, target (n,) int64.
    """
    return _LinearCrossEntropy.apply(h, weight, target)
