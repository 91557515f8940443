"""AdamW over one flat float32 buffer, and the learning rate's path.

    m = β1 m + (1 - β1) g        v = β2 v + (1 - β2) g²
    w = w (1 - lr λ) - lr (m / (1 - β1^t)) / (sqrt(v / (1 - β2^t)) + eps)

All trained parameters are views into one buffer and their gradients into another, so that the norm is one
reduction and the step one launch, whatever the number of adapters.  A parameter in 16 bits gets a
float32 master in the buffer and is rounded from it after each step.
Source: arXiv:1711.05101, algorithm 2; numbers equal torch.optim.AdamW.  The step itself: lora.kernels.adamw.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora.kernels.adamw import Moment8, adamw, adamw8, moment8, rates
from lora.kernels.dispatch import use_triton
from lora.quant.codebook import dynamic_map


class AdamW:
    """Takes over the storage of its parameters.  A step is gather, clip (or not), step, zero_grad.

    `bits` are those of one moment: 32, or 8, which keeps 2 bytes a parameter instead of 8.
    In a CUDA graph: capture `update`, and call `advance` before each replay.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bits: int = 32,
    ) -> None:
        params = [p for p in parameters if p.requires_grad]
        if not params:
            raise ValueError("no parameter to train")
        if bits not in (32, 8):
            raise ValueError(f"bits={bits!r}: a moment takes 32 or 8")
        if len({p.device for p in params}) > 1:
            devices = ", ".join(sorted({str(p.device) for p in params}))
            raise ValueError(f"parameters on {devices}: one flat buffer lies on one device; move the model to one")
        self.betas, self.eps, self.weight_decay, self.bits, self.t = betas, eps, weight_decay, bits, 0
        n, device = sum(p.numel() for p in params), params[0].device
        self.w = torch.empty(n, dtype=torch.float32, device=device)
        self.grad = torch.zeros_like(self.w)
        self.m, self.v = (_moment(n, bits, signed, device) for signed in (True, False))
        self.shapes = [list(p.shape) for p in params]
        self.hyper = torch.zeros(3, dtype=torch.float32, device=device)
        self.scale: Tensor | None = None  # what clip makes of the gradient, where the step multiplies by it
        self.masters: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # 16-bit parameters, their master and gradient
        self.views: list[tuple[nn.Parameter, Tensor]] = []
        dtypes = {p.dtype for p in params}
        # parameters all of one 16-bit dtype share a buffer too, which the step fills as it goes
        one = dtypes in ({torch.bfloat16}, {torch.float16})
        self.low = torch.empty(n, dtype=params[0].dtype, device=device) if one else None
        start = 0
        for p in params:
            part = slice(start, start + p.numel())
            w, g = self.w[part].view_as(p), self.grad[part].view_as(p)
            w.copy_(p.detach())
            if p.dtype == torch.float32:
                p.data, p.grad = w, g
                self.views.append((p, g))
            else:
                if self.low is not None:
                    p.data = self.low[part].view_as(p).copy_(p.detach())
                self.masters.append((p, w, g))
            start += p.numel()

    @torch.no_grad()
    def gather(self) -> None:
        """Brings gradients that are not in the flat buffer yet into it."""
        away = [(g, p.grad) for p, _, g in self.masters if p.grad is not None]
        for p, g in self.views:
            if p.grad is not None and p.grad.data_ptr() != g.data_ptr():  # someone put another tensor there
                away.append((g, p.grad))
                p.grad = g
        if away:
            torch._foreach_copy_([g for g, _ in away], [grad for _, grad in away])

    @torch.no_grad()
    def clip(self, limit: float) -> Tensor:
        """The joint norm of all gradients, () float32, before they are scaled down to `limit` (0: left alone).

        Where a kernel takes the step, it is the step that scales them, and `grad` keeps what backward wrote.
        """
        norm = torch.linalg.vector_norm(self.grad)
        if self.scale is not None:  # clipped before
            norm = norm * self.scale
        if limit > 0:
            scale = (limit / (norm + 1e-6)).clamp(max=1.0)
            if use_triton(self.grad):
                self.scale = scale if self.scale is None else self.scale * scale
            else:
                self.grad.mul_(scale)
        return norm

    def zero_grad(self) -> None:
        self.grad.zero_()
        self._forget()

    def step(self, lr: float, zero: bool = False) -> None:
        """One step at rate `lr`; `zero` does the work of zero_grad in the same pass."""
        self.advance(lr)
        self.update(zero)

    def advance(self, lr: float) -> None:
        """Counts a step and puts its rate where `update` reads it, without waiting for the device."""
        self.t += 1
        values = rates(lr, self.t, self.betas, self.weight_decay)
        # pinned memory that this step alone owns: a device that lags behind must not see a later step's values
        host = torch.tensor(values, dtype=torch.float32, pin_memory=self.hyper.is_cuda)
        self.hyper.copy_(host, non_blocking=True)

    @torch.no_grad()
    def update(self, zero: bool = False) -> None:
        """The step on the device: nothing here depends on t or lr but through `hyper`."""
        buffers: Any = (self.w, self.grad, self.m, self.v, self.hyper)
        run = adamw8 if self.bits == 8 else adamw
        run(*buffers, betas=self.betas, eps=self.eps, scale=self.scale, out16=self.low, zero=zero)
        self.scale = None
        if zero:
            self._forget()
        self._round()

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on, besides the settings: the tensors themselves, not copies."""
        state: dict[str, Any] = {"bits": self.bits, "t": self.t, "shapes": self.shapes, "w": self.w}
        for name, moment in (("m", self.m), ("v", self.v)):
            if isinstance(moment, Moment8):
                state |= {name: moment.q, f"{name}_absmax": moment.absmax}
            else:
                state[name] = moment
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on, bit for bit, where the optimizer of `state` stood; the parameters get its values too.

        Raises ValueError, and changes nothing, where `state` is of other parameters or other bits.
        """
        mine = self.state_dict()
        if state.keys() != mine.keys() or state["bits"] != self.bits:
            raise ValueError(
                f"optimizer state of {state.get('bits')} bits with {sorted(state)}; "
                f"this one has {self.bits} bits with {sorted(mine)}"
            )
        theirs = [list(shape) for shape in state["shapes"]]
        if len(theirs) != len(self.shapes):
            raise ValueError(f"optimizer state of {len(theirs)} parameters; this one trains {len(self.shapes)}")
        for i, (a, b) in enumerate(zip(theirs, self.shapes, strict=True)):
            if a != b:
                raise ValueError(f"optimizer state, parameter {i}: {a}; here it is {b}, and order counts")
        tensors = {key: value for key, value in mine.items() if isinstance(value, Tensor)}
        for key, t in tensors.items():
            got = state[key]
            if got.shape != t.shape or got.dtype != t.dtype:
                raise ValueError(
                    f"optimizer state {key!r} is {tuple(got.shape)} {got.dtype}; it must be {tuple(t.shape)} {t.dtype}"
                )
        for key, t in tensors.items():
            t.copy_(state[key])
        self.t = int(state["t"])
        if self.low is not None:
            self.low.copy_(self.w)
        self._round()

    def _round(self) -> None:
        """16-bit parameters from their masters, where the step has not written them."""
        if self.masters and self.low is None:
            torch._foreach_copy_([p.data for p, _, _ in self.masters], [w for _, w, _ in self.masters])

    def _forget(self) -> None:
        self.scale = None
        for p, _, _ in self.masters:
            p.grad = None


def _moment(n: int, bits: int, signed: bool, device: torch.device) -> Tensor | Moment8:
    if bits == 8:
        return moment8(n, dynamic_map(signed).to(device))
    return torch.zeros(n, dtype=torch.float32, device=device)


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """The rate of step `step` (from 0) of `steps`: up in a line over warmup * steps steps, then a cosine to 0."""
    rise = math.ceil(warmup * steps)
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
