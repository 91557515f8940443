"""From files to what the loop runs on: read, render, prove, report, and pack. Everything is checked before step 0."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lora.batch import Example, Pack
from lora.lengths import LengthReport
from lora.models.base import CausalLM
from lora.models.tokenizer import Tokenizer
from lora.render import length_limit, render
from lora.rows import Data, Row, Rows, read_rows
from lora.tokens import Examples
from lora.train.config import TrainConfig
from lora.train.pack import Packs


@dataclass(frozen=True)
class Prepared:
    """Rows as the loop takes them: `units` are examples, or packs of them; `rows` is the data behind them."""

    rows: Rows
    examples: Examples
    units: Sequence[Example | Pack]
    report: LengthReport

    def whole_rows(self) -> list[Row]:
        """The rows that were neither cut nor left out."""
        return [self.rows[i] for i, n in enumerate(self.report.lengths) if n <= self.report.limit]

    def __str__(self) -> str:
        lines = [str(self.rows), str(self.report)]
        if isinstance(self.units, Packs):
            p = self.units
            lines.append(f"packed: {len(self.examples):,} texts in {len(p):,} rows of {p.size:,}, {p.filled:.1%} full")
        return "\n".join(lines)


def prepare(
    data: Data, model: nn.Module, tokenizer: Tokenizer, config: TrainConfig, *, held_out: bool = False
) -> Prepared:
    """Reads, renders and checks `data` as `config` says, packs it unless it is `held_out`, and says what it found on
    stderr where `config.progress` is set.

    Every mask is read back as text (`lora.proof`).

    Raises what `read_rows` and `render` raise; ValueError where a model is to be packed that cannot tell documents
    apart.
    """
    limit = length_limit(model, config.max_length)
    if config.pack and not isinstance(model, CausalLM):
        raise ValueError(
            f"pack=True needs a model of lora.load's: {type(model).__name__} would let packed texts see each other"
        )
    built = model.config.max_length if isinstance(model, CausalLM) else limit
    if limit > built and not config.pack:
        raise ValueError(f"max_length={limit}, and this model was built for rows of up to {built} tokens")
    if config.pack and isinstance(model, CausalLM):
        limit = min(limit, model.config.max_length, model.restart() or limit)
    rows = read_rows(data, config.columns)
    report = LengthReport(limit, config.overlong)
    examples = render(rows, tokenizer, limit, learn=config.learn, overlong=config.overlong, proof=True, report=report)
    assert config.max_length is not None or not config.pack
    units: Sequence[Example | Pack] = (
        Packs(examples, config.max_length or limit) if config.pack and not held_out else examples
    )
    prepared = Prepared(rows, examples, units, report)
    if config.progress:
        print(prepared, file=sys.stderr, flush=True)
    return prepared
