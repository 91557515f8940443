"""Documents: which tokens of a packed batch belong together. They share neither attention nor positions."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """The documents of a batch (B, T) of packed rows, one behind the other.

    `lengths[b]` are those of row b and sum to T; padding, at either end, is of documents too, none longer than the
    longest text: every token sees at least itself, and no position is one that no text has.  `window`, where given,
    is how many keys of its own document a token sees, itself counted.
    """

    lengths: tuple[tuple[int, ...], ...]
    window: int | None = None

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

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """Positions (B, T) int64, from 0 in each document."""
        return torch.tensor([[i for n in row for i in range(n)] for row in self.lengths], device=device)

    def numbers(self, device: torch.device | str = "cpu") -> Tensor:
        """The place in its row of each token's document, (B, T) int64."""
        return torch.tensor([[d for d, n in enumerate(row) for _ in range(n)] for row in self.lengths], device=device)

    def cu_seqlens(self, device: torch.device | str = "cpu") -> Tensor:
        """Where the documents begin in the flattened (B * T), and its end, (documents + 1,) int32: as flash-attention
        and its kin take them."""
        ends = torch.tensor([n for row in self.lengths for n in row], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return torch.cat((torch.zeros(1, dtype=torch.int32), ends)).to(device)
