"""One update: two factors, a scale, and what may stand beside them.

    s B A x        A (r, in), B (out, r), float32

`factors` gives the plain LoRA that an update is, and it is run, merged and saved as that one:
    plain       A, B
    PiSSA       [A ; A0], [B | -B0]      A0, B0 where A and B began (init.py)
    parts       A of all parts stacked, B of each in its own rows and columns, zero elsewhere (parts.py)
Beside it DoRA's lengths of rows (dora.py), and a bias: the base's learned anew, or one of B's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora.dora import squared_lengths
from lora.init import init_embedding, init_linear, init_pissa
from lora.kernels.dropout import counted
from lora.kernels.lowrank import add_low_rank


class Bias(nn.Module):
    """A bias learned beside the base's, which keeps its own: `shift` is what it adds.

    With `start`, the base's bias (n,), `value` begins as that and stands in its place; without, it begins at 0 and
    comes on top, times `scale`.
    """

    start: Tensor | None

    def __init__(self, start: Tensor | None, n: int, scale: float, device: torch.device) -> None:
        super().__init__()
        first = torch.zeros(n, device=device) if start is None else start.detach().float().clone()
        self.value = nn.Parameter(first)
        self.register_buffer("start", None if start is None else first.clone(), persistent=False)
        self.scale = scale

    def shift(self) -> Tensor:
        """(n,) float32."""
        return self.value * self.scale if self.start is None else self.value - self.start


class Adapter(nn.Module):
    """The two factors of one update, its scale and its dropout; and for some kinds what the module says.

    With `rows`, the output rows of each part, `a` holds the parts' A one on another (parts * r, in) and `b` their
    rows of B (rows of all parts, r).
    """

    parts = 1  # adapters in it: see ByRow
    magnitude: nn.Parameter | None  # (out,) float32, DoRA only
    length2: Tensor  # |W|² of the base's rows, DoRA only
    a0: Tensor | None  # PiSSA only
    b0: Tensor | None
    bias: Bias | None
    row: Tensor | None  # where each value of `b` stands in the whole B; parts only
    column: Tensor

    def __init__(
        self,
        r: int,
        n_in: int,
        n_out: int,
        scale: float,
        dropout: float,
        device: torch.device,
        rows: Sequence[Tensor] = (),
    ) -> None:
        super().__init__()
        n_rows, n_parts = (sum(map(len, rows)), len(rows)) if rows else (n_out, 1)
        self.a = nn.Parameter(torch.empty(n_parts * r, n_in, dtype=torch.float32, device=device))
        self.b = nn.Parameter(torch.empty(n_rows, r, dtype=torch.float32, device=device))
        self.scale, self.dropout, self.n_out, self.stacked = scale, dropout, n_out, 1
        self.register_parameter("magnitude", None)
        self.bias = None
        for key in ("a0", "b0", "row"):
            self.register_buffer(key, None)
        if rows:
            part = torch.cat([torch.full((len(x),), i) for i, x in enumerate(rows)])  # (rows of all parts,)
            column = part[:, None] * r + torch.arange(r)
            self.register_buffer("row", torch.cat(list(rows)).to(device)[:, None], persistent=False)
            self.register_buffer("column", column.to(device), persistent=False)

    def begin(self, init: str, base: nn.Module) -> None:
        """Fills the factors, as `init` of LoRAConfig says, for `base`."""
        if isinstance(base, nn.Embedding):
            init_embedding(self.a, self.b)
        elif init == "kaiming":
            init_linear(self.a, self.b)
        else:
            init_pissa(self.a, self.b, self.scale, base, init)
            self.a0, self.b0 = self.a.detach().clone(), self.b.detach().clone()

    def decompose(self, base: nn.Module) -> None:
        """Makes this a DoRA adapter of `base`."""
        self.register_buffer("length2", squared_lengths(base), persistent=False)
        self.magnitude = nn.Parameter(self.length2.clamp(min=1e-30).sqrt())

    @property
    def r(self) -> int:
        """The rank that trains: of each part, of each expert."""
        return self.b.shape[1] // self.stacked

    @property
    def rank(self) -> int:
        """The rank of `factors`."""
        parts = 1 if self.row is None else self.a.shape[0] // self.r
        return self.r * (parts if self.a0 is None else 2)

    def is_plain(self) -> bool:
        """Whether `a`, `b` and the scale are all there is."""
        return self.magnitude is None and self.bias is None and self.a0 is None and self.row is None

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank) of the plain LoRA that this is, lengths and bias aside."""
        a: Tensor = self.a
        b: Tensor = self.b
        if self.row is not None:
            b = b.new_zeros(self.n_out, a.shape[0]).index_put((self.row, self.column), b)
        if self.a0 is not None and self.b0 is not None:
            a, b = torch.cat((a, self.a0.to(a))), torch.cat((b, -self.b0.to(b)), dim=1)
        return a, b

    def low(self) -> tuple[Tensor, Tensor, float]:
        """What a base that adds the update in its own pass needs of it."""
        return *self.factors(), self.scale

    def delta(self) -> Tensor:
        """s B A, (out, in) float32."""
        a, b = (t.detach().float() for t in self.factors())
        return (b @ a).mul_(self.scale)

    def extra_repr(self) -> str:
        return f"r={self.r}, scale={self.scale:g}, dropout={self.dropout:g}"


class ByRow:
    """Adapters side by side: each sees its own rows of the batch, so that several run in one pass over the base.

    `members` are (adapter or None, first row, row behind the last), in order and without a gap.  Where all have as many
    rows, `stack` may give their factors once more as a (k, r, in), b (k, out, r) and scales (k,) of the same memory,
    which the fused blocks take (kernels/fold.py).
    """

    magnitude, dropout, bias = None, 0.0, None

    def __init__(
        self, members: Sequence[tuple[Adapter | None, int, int]], stack: tuple[Any, Any, Any] | None = None
    ) -> None:
        self.members = tuple(members)
        self.parts, self.stack = len(self.members), stack

    def is_plain(self) -> bool:
        return all(adapter is not None and adapter.is_plain() for adapter, _, _ in self.members)

    def low(self) -> tuple[Any, Any, Any] | None:
        only = self.members[0][0]
        return self.stack if self.parts > 1 or only is None else only.low()

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """y (B, ..., out) with each row's own update on x (B, ..., in) added."""
        self.check(x)
        each = [add_all(y[i:j], x[i:j], [adapter] if adapter else [], False) for adapter, i, j in self.members]
        return torch.cat(each)

    def check(self, x: Tensor) -> None:
        if x.shape[0] != self.members[-1][2]:
            raise RuntimeError(
                f"adapters by row want {self.members[-1][2]} rows first in a layer's input, not {x.shape[0]}"
            )


def add_all(y: Tensor, x: Tensor, adapters: Sequence[Adapter | ByRow], training: bool) -> Tensor:
    """y with the updates of `adapters` on x added."""
    for adapter in adapters:
        if isinstance(adapter, ByRow):
            y = adapter.add(y, x)
            continue
        a, b = adapter.factors()
        drop, h = None, x
        if adapter.dropout and training:
            drop = counted(x, adapter.dropout)
            h = nn.functional.dropout(x, adapter.dropout, training) if drop is None else x
        y = add_low_rank(y, h.to(y.dtype), a.to(y.dtype), b.to(y.dtype), adapter.scale, drop)
        if adapter.bias is not None:
            y = y + adapter.bias.shift().to(y.dtype)
    return y
