"""Which rows run together: shuffled, grouped by length so that little is padding, the same for the same seed."""

from collections.abc import Iterator, Sequence

import torch

from lora.render import Example

_WINDOW = 32  # batches sorted by length together: wide enough to pad little, narrow enough to stay random


def epoch_batches(examples: Sequence[Example], batch: int, seed: int, epoch: int) -> list[list[Example]]:
    """All examples once, in batches of at most `batch`, each of rows of like length, in random order."""
    draw = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(examples), generator=draw).tolist()
    batches = []
    for start in range(0, len(order), batch * _WINDOW):
        window = sorted(order[start : start + batch * _WINDOW], key=lambda i: len(examples[i].ids))
        batches += [window[i : i + batch] for i in range(0, len(window), batch)]
    mixed = torch.randperm(len(batches), generator=draw).tolist()
    return [[examples[i] for i in batches[k]] for k in mixed]


def steps_per_epoch(n: int, batch: int, accumulate: int) -> int:
    """Optimizer steps in one pass; the last one may hold fewer batches, and no row is dropped."""
    whole, rest = divmod(n, batch * _WINDOW)
    batches = whole * _WINDOW + -(-rest // batch)
    return -(-batches // accumulate)


def endless(
    examples: Sequence[Example], batch: int, accumulate: int, seed: int
) -> Iterator[tuple[int, list[list[Example]]]]:
    """(epoch, batches of one optimizer step), epoch after epoch."""
    epoch = 0
    while True:
        batches = epoch_batches(examples, batch, seed, epoch)
        for start in range(0, len(batches), accumulate):
            yield epoch, batches[start : start + accumulate]
        epoch += 1
