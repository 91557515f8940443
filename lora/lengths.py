"""How long rows are, which do not fit, and what becomes of those: nothing is cut without being told.

error            refuse, and say what cutting would lose
drop             leave the row out
cut_prompt_left  keep what is learned and as much before it as fits, and the beginning-of-text token
cut_right        keep the beginning; a row that then teaches nothing is left out
split            pieces one behind the other, each beginning with the last token of the one before, so that every
                 learned token is still learned once; pieces that teach nothing are left out
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from lora.batch import Example

OVERLONG = ("error", "drop", "cut_prompt_left", "cut_right", "split")
_QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)


def shorten(e: Example, limit: int, how: str, bos: int | None = None) -> list[Example]:
    """What `how` makes of a row longer than `limit` tokens; an empty list where it is left out.

    Raises ValueError for a row that cut_prompt_left cannot bring down to `limit` without cutting what is learned.
    """
    n = len(e.ids)
    if how == "drop":
        return []
    if how == "cut_right":
        kept = [Example(e.ids[:limit], e.learned[:limit], e.row)]
    elif how == "cut_prompt_left":
        head = 1 if e.ids[0] == bos else 0
        first = e.learned.index(True)
        start = n - limit + head  # where the rest begins
        if start >= first + (head > 0):
            raise ValueError(
                f"it has {n - first} tokens from its first learned one on, which with one before them do not fit into "
                f"{limit}, so cut_prompt_left cannot help it; use cut_right, split or drop, or raise max_length"
            )
        kept = [Example(e.ids[:head] + e.ids[start:], e.learned[:head] + e.learned[start:], e.row)]
    else:
        if limit < 2:
            raise ValueError(f"it cannot be split into pieces of {limit} token; raise max_length")
        kept = []
        for start in range(0, n - 1, limit - 1):
            learned = (False, *e.learned[start + 1 : start + limit])
            kept.append(Example(e.ids[start : start + limit], learned, e.row))
    return [k for k in kept if any(k.learned)]


@dataclass
class LengthReport:
    """Lengths of rows in tokens against `limit`, and what `overlong` did. `print` it for two or three lines."""

    limit: int
    overlong: str
    lengths: array = field(default_factory=lambda: array("q"))  # of every row, before anything was cut
    learned: int = 0  # tokens, before anything was cut
    too_long: int = 0  # rows
    at_stake: int = 0  # learned tokens beyond the limit
    lost: int = 0  # learned tokens that nobody will see
    left_out: int = 0  # rows
    pieces: int = 0  # examples that came of rows which were too long
    first: str = ""  # the first row that is too long, in a sentence

    def add(self, where: str, e: Example) -> bool:
        """Counts a row; whether it fits."""
        n = len(e.ids)
        self.lengths.append(n)
        self.learned += e.n_learned
        if n <= self.limit:
            return True
        cut = sum(e.learned[self.limit :])
        self.too_long += 1
        self.at_stake += cut
        if not self.first:
            self.first = (
                f"{where} has {n} tokens and the limit is {self.limit}; cutting it would lose {cut} of its "
                f"{e.n_learned} learned tokens"
            )
        return False

    def cut(self, before: Example, after: Sequence[Example]) -> None:
        """Counts what became of a row that was too long."""
        self.lost += before.n_learned - sum(e.n_learned for e in after)
        self.left_out += not after
        self.pieces += len(after)

    def check(self) -> None:
        """Raises ValueError where rows are too long and nothing was to be done about it."""
        if self.too_long and self.overlong == "error":
            rest = "" if self.too_long == 1 else f"; {self.too_long} of {len(self.lengths)} rows are too long, and "
            rest += "" if self.too_long == 1 else f"{self.at_stake} of {self.learned} learned tokens at stake"
            raise ValueError(
                f"{self.first}{rest}: shorten such rows, leave them out, raise max_length, or set overlong to "
                f"{', '.join(OVERLONG[1:-1])} or {OVERLONG[-1]}"
            )

    def quantiles(self) -> dict[str, int]:
        """Lengths at 0, 50, 90, 99 and 100 % of the rows, each that of a row."""
        order = sorted(self.lengths)
        return {f"{100 * q:g} %": order[round(q * (len(order) - 1))] for q in _QUANTILES} if order else {}

    def __str__(self) -> str:
        if not self.lengths:
            return f"no row came to be counted in tokens; limit {self.limit:,}"
        spread = ", ".join(f"{name} {n:,}" for name, n in self.quantiles().items())
        share = self.learned / max(1, sum(self.lengths))
        lines = [
            f"tokens a row: {spread}",
            f"{sum(self.lengths):,} tokens, {self.learned:,} of them learned ({share:.1%}); limit {self.limit:,}",
        ]
        if self.too_long and self.overlong == "error":
            lines.append(
                f"{self.too_long:,} of {len(self.lengths):,} rows are longer, and {self.at_stake:,} learned tokens lie "
                f"beyond the limit; {self.first}"
            )
        elif self.too_long:
            lines.append(
                f"{self.too_long:,} of {len(self.lengths):,} rows are longer; {self.overlong}: {self.left_out:,} left "
                f"out, {self.pieces:,} examples from the others, {self.lost:,} learned tokens lost"
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, int | str | dict[str, int]]:
        """The numbers, for machines."""
        counts = {k: getattr(self, k) for k in ("learned", "too_long", "at_stake", "lost", "left_out", "pieces")}
        both = {"rows": len(self.lengths), "tokens": sum(self.lengths), "limit": self.limit, "overlong": self.overlong}
        return both | counts | {"quantiles": self.quantiles()}
