"""AdamW over one flat float32 buffer.

    m = β1 m + (1 - β1) g        v = β2 v + (1 - β2) g²
    w = w (1 - lr λ) - lr (m / (1 - β1^t)) / (sqrt(v / (1 - β2^t)) + eps)

All trained parameters are views into one buffer and their gradients into another, so that the norm is one
reduction and the step one launch, whatever the number of adapters.  A parameter in 16 bits gets a
float32 master in the buffer and is rounded from it after each step.  Parameters of one learning-rate ratio lie
together, so that LoRA+ (arXiv:2402.12354: B learns faster than A) takes a launch for each of its two rates.
Source: arXiv:1711.05101, algorithm 2; numbers equal torch.optim.AdamW.  The step itself: lora.kernels.adamw.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora.kernels.adamw import BLOCK8, Moment8, adamw, adamw8, moment8, rates
from lora.kernels.dispatch import use_triton
from lora.quant.codebook import dynamic_map


class AdamW:
    """Takes over the storage of its parameters.  A step is gather, clip (or not), step, zero_grad.

    `bits` are those of one moment: 32, or 8, which keeps 2 bytes a parameter instead of 8.  `ratio` gives what a
    parameter's learning rate is multiplied by.  `buffers` are memory (n,) to use for the weights and their gradients,
    where those lie there already, in this order.
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
        ratio: Callable[[nn.Parameter], float] | None = None,
        buffers: tuple[Tensor, Tensor] | None = None,
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
        self.groups: list[tuple[float, slice]] = []  # a ratio, and where in the buffer its parameters lie
        members: dict[float, list[nn.Parameter]] = {}
        for p in params:
            members.setdefault(float(ratio(p)) if ratio else 1.0, []).append(p)
        n = 0
        for value, group in members.items():
            start = -(-n // BLOCK8) * BLOCK8  # a block of an 8-bit moment belongs to one group
            n = start + sum(p.numel() for p in group)
            self.groups.append((value, slice(start, n)))
        params = [p for group in members.values() for p in group]
        device = params[0].device
        if buffers and any(t.shape != (n,) or t.dtype != torch.float32 for t in buffers):
            raise ValueError(
                f"buffers of {[tuple(t.shape) for t in buffers]}: these parameters need two of ({n},) float32"
            )
        self.w, self.grad = buffers or (torch.zeros(n, dtype=torch.float32, device=device) for _ in range(2))
        self.m, self.v = (_moment(n, bits, signed, device) for signed in (True, False))
        self.shapes = [list(p.shape) for p in params]
        self.hyper = torch.zeros(len(self.groups), 3, dtype=torch.float32, device=device)
        self.scale: Tensor | None = None  # what clip makes of the gradient, where the step multiplies by it
        self.masters: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # 16-bit parameters, their master and gradient
        self.views: list[tuple[nn.Parameter, Tensor]] = []
        dtypes = {p.dtype for p in params}
        # parameters all of one 16-bit dtype share a buffer too, which the step fills as it goes
        one = dtypes in ({torch.bfloat16}, {torch.float16})
        self.low = torch.zeros(n, dtype=params[0].dtype, device=device) if one else None
        firsts, i = {}, 0  # where each group's first parameter begins
        for value, part in self.groups:
            firsts[i] = part.start
            i += len(members[value])
        start = 0
        for i, p in enumerate(params):
            if i in firsts:
                start = firsts[i]
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
            scale = torch.where(norm.isfinite(), scale, 1.0)  # leaves to see which gradient it was that is not
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
        values = [rates(lr * value, self.t, self.betas, self.weight_decay) for value, _ in self.groups]
        # pinned memory that this step alone owns: a device that lags behind must not see a later step's values
        host = torch.tensor(values, dtype=torch.float32, pin_memory=self.hyper.is_cuda)
        self.hyper.copy_(host, non_blocking=True)

    @torch.no_grad()
    def update(self, zero: bool = False) -> None:
        """The step on the device: nothing here depends on t or lr but through `hyper`."""
        run: Any = adamw8 if self.bits == 8 else adamw
        for hyper, (_, part) in zip(self.hyper, self.groups, strict=True):
            buffers = (self.w[part], self.grad[part], _part(self.m, part), _part(self.v, part), hyper)
            low = None if self.low is None else self.low[part]
            run(*buffers, betas=self.betas, eps=self.eps, scale=self.scale, out16=low, zero=zero)
        self.scale = None
        if zero:
            self._forget()
        self._round()

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on, besides the settings: the tensors themselves, not copies."""
        state: dict[str, Any] = {"bits": self.bits, "t": self.t, "shapes": self.shapes, "w": self.w}
        state["ratios"] = [[value, part.start, part.stop] for value, part in self.groups]
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
        if [list(group) for group in state["ratios"]] != mine["ratios"]:
            raise ValueError(f"optimizer state with learning-rate ratios {state['ratios']}; here {mine['ratios']}")
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


def _part(moment: Tensor | Moment8, part: slice) -> Tensor | Moment8:
    """What of a moment belongs to the parameters at `part`, which begins at a block."""
    if isinstance(moment, Moment8):
        blocks = slice(part.start // BLOCK8, -(-part.stop // BLOCK8))
        return moment._replace(q=moment.q[part], absmax=moment.absmax[blocks])
    return moment[part]
