"""Which rows run together: shuffled, grouped by length so that little is padding, the same for the same seed."""

import heapq
from collections.abc import Iterator, Sequence

import torch

from lora.batch import Example, Pack
from lora.tokens import lengths_of

_WINDOW = 32  # batches sorted by length together: wide enough to pad little, narrow enough to stay random


def epoch_order(lengths: Sequence[int], batch: int, seed: int, epoch: int) -> list[list[int]]:
    """All rows once, by their places, in batches of at most `batch`, each of rows of like length, in random order."""
    draw = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=draw).tolist()
    batches = []
    for start in range(0, len(order), batch * _WINDOW):
        window = sorted(order[start : start + batch * _WINDOW], key=lambda i: lengths[i])
        batches += [window[i : i + batch] for i in range(0, len(window), batch)]
    mixed = torch.randperm(len(batches), generator=draw).tolist()
    return [batches[k] for k in mixed]


def steps_per_epoch(n: int, batch: int, accumulate: int) -> int:
    """Optimizer steps in one pass; the last one may hold fewer batches, and no row is dropped."""
    whole, rest = divmod(n, batch * _WINDOW)
    batches = whole * _WINDOW + -(-rest // batch)
    return -(-batches // accumulate)


def longest(examples: Sequence[Example | Pack], n: int) -> list[Example | Pack]:
    """The `n` of most tokens, the longest first; of packs, which are of one size, those of the longest texts.

    No other is made: all at once would take ten times the memory in which they are kept.
    """
    lengths = lengths_of(examples)  # packs come by their longest text (pack.py), and of equals the first is taken
    return [examples[i] for i in heapq.nlargest(n, range(len(examples)), key=lengths.__getitem__)]


def endless(
    examples: Sequence[Example | Pack], batch: int, accumulate: int, seed: int
) -> Iterator[tuple[int, list[list[Example | Pack]]]]:
    """(epoch, batches of one optimizer step), epoch after epoch; an example is made when its step comes."""
    epoch, lengths = 0, lengths_of(examples)
    while True:
        batches = epoch_order(lengths, batch, seed, epoch)
        for start in range(0, len(batches), accumulate):
            yield epoch, [[examples[i] for i in part] for part in batches[start : start + accumulate]]
        epoch += 1
