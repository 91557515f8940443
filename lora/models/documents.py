"""Documents: which tokens of a packed batch belong together. They share neither attention nor positions."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lora.kernels.documents import Ragged, ragged_of


@dataclass(frozen=True)
class Documents:
    """The documents of a batch (B, T) of packed rows, one behind the other.

    `lengths[b]` are those of row b and sum to T; padding, at either end, is of documents too, none longer than the
    longest text: every token sees at least itself, and no position is one that no text has.  `window`, where given,
    is how many keys of its own document a token sees, itself counted.  `ragged` is what a GPU is told of them.
    """

    lengths: tuple[tuple[int, ...], ...]
    window: int | None = None
    ragged: Ragged | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        sums = {sum(row) for row in self.lengths}
        if len(sums) != 1 or any(n < 1 for row in self.lengths for n in row):
            raise ValueError(
                f"documents of {sorted(sums)} tokens a row: each row's lengths are at least 1, and all rows sum alike"
            )

    @property
    def longest(self) -> int:
        return max(max(row) for row in self.lengths)

    def within(self, window: int | None) -> "Documents":
        return replace(self, window=window)

    def on(self, device: torch.device) -> "Documents":
        """The documents of a batch on a device; to a GPU goes what it is told, once for all layers."""
        if device.type != "cuda" or self.ragged is not None:
            return self
        return replace(self, ragged=ragged_of(self.lengths, device))

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """Positions (B, T) int64, from 0 in each document."""
        return torch.tensor([[i for n in row for i in range(n)] for row in self.lengths], device=device)

    def numbers(self, device: torch.device | str = "cpu") -> Tensor:
        """The place in its row of each token's document, (B, T) int64."""
        return torch.tensor([[d for d, n in enumerate(row) for _ in range(n)] for row in self.lengths], device=device)
