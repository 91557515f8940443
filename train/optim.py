"""AdamW over one flat float32 buffer, and the learning rate's path.

    m = β1 m + (1 - β1) g        v = β2 v + (1 - β2) g²
    w = w (1 - lr λ) - lr (m / (1 - β1^t)) / (sqrt(v / (1 - β2^t)) + eps)

All trained parameters are views into one buffer and their gradients into another, so that the norm is one
reduction and the step a handful of operations, whatever the number of adapters.  A parameter in 16 bits gets a
float32 master in the buffer and is rounded from it after each step.
Source: arXiv:1711.05101, algorithm 2; numbers equal torch.optim.AdamW.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_CHUNK = 2**18  # values at a time on a CPU: five buffers of 1 MB stay in cache, where whole ones would not


class AdamW:
    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        params = [p for p in parameters if p.requires_grad]
        if not params:
            raise ValueError("no parameter to train")
        self.betas, self.eps, self.weight_decay, self.t = betas, eps, weight_decay, 0
        n, device = sum(p.numel() for p in params), params[0].device
        self.w = torch.empty(n, dtype=torch.float32, device=device)
        self.grad, self.m, self.v = torch.zeros_like(self.w), torch.zeros_like(self.w), torch.zeros_like(self.w)
        self.masters: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # 16-bit parameters, their master and gradient
        self.views: list[tuple[nn.Parameter, Tensor]] = []
        start = 0
        for p in params:
            w = self.w[start : start + p.numel()].view_as(p)
            g = self.grad[start : start + p.numel()].view_as(p)
            w.copy_(p.detach())
            if p.dtype == torch.float32:
                p.data, p.grad = w, g
                self.views.append((p, g))
            else:
                self.masters.append((p, w, g))
            start += p.numel()

    def gather(self) -> None:
        """Brings gradients that are not in the flat buffer yet into it."""
        for p, _, g in self.masters:
            if p.grad is not None:
                g.copy_(p.grad)
        for p, g in self.views:
            if p.grad is not None and p.grad.data_ptr() != g.data_ptr():  # someone put another tensor there
                g.copy_(p.grad)
                p.grad = g

    def clip(self, limit: float) -> Tensor:
        """The joint norm of all gradients, () float32, before they are scaled down to `limit` (0: left alone)."""
        norm = torch.linalg.vector_norm(self.grad)
        if limit > 0:
            self.grad.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def zero_grad(self) -> None:
        self.grad.zero_()
        for p, _, _ in self.masters:
            p.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> None:
        self.t += 1
        beta1, beta2 = self.betas
        size = -lr / (1 - beta1**self.t)
        root = math.sqrt(1 - beta2**self.t)
        chunk = _CHUNK if self.w.device.type == "cpu" else self.w.numel()
        buffers = zip(*(buffer.split(chunk) for buffer in (self.w, self.grad, self.m, self.v)), strict=True)
        for w, g, m, v in buffers:
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            if self.weight_decay:
                w.mul_(1 - lr * self.weight_decay)
            w.addcdiv_(m, v.sqrt().div_(root).add_(self.eps), value=size)
        for p, w, _ in self.masters:
            p.data.copy_(w)


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """The rate of step `step` (from 0) of `steps`: up in a line over warmup * steps steps, then a cosine to 0."""
    rise = math.ceil(warmup * steps)
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
