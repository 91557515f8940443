"""status: the receipt. What is adapted, how, and what would train."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from lora.adapter import Adapter
from lora.experts import LoRAExperts
from lora.layer import Adapted, adapted
from lora.match import shared_storage
from lora.quant.linear import Linear4bit
from lora.quant.linear8 import Linear8bit
from lora.wrap import adapter_names


@dataclass(frozen=True)
class Row:
    """One adapted layer and one adapter on it."""

    module: str
    adapter: str
    kind: str
    base: str
    r: int
    scale: float
    dropout: float
    dtype: str
    trainable: int
    active: bool


@dataclass(frozen=True)
class Status:
    """What `lora.status` found; `print` it for a table.

    Parameters are counted as weights, a 4-bit one included; bytes are what lies in memory.
    """

    rows: tuple[Row, ...]
    adapters: tuple[str, ...]
    active: tuple[str, ...]
    merged: bool
    trainable: int
    total: int
    trainable_bytes: int
    total_bytes: int
    quantized: int
    tied: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        # layers that differ only in their number are one line
        groups: dict[tuple, list[Row]] = {}
        for row in self.rows:
            last = row.module.rpartition(".")[2]
            key = (row.adapter, last, row.kind, row.base, row.r, row.scale, row.dropout, row.dtype, row.active)
            groups.setdefault(key, []).append(row)
        head = ("adapter", "layers", "", "on", "r", "scale", "dropout", "dtype", "trainable")
        body = [
            (
                adapter + ("" if active else " (inactive)"),
                last,
                f"x{len(rows)}",
                base,
                str(r) if r else _WHOLE[kind],
                f"{scale:g}",
                f"{dropout:g}",
                dtype,
                f"{sum(row.trainable for row in rows):,}",
            )
            for (adapter, last, kind, base, r, scale, dropout, dtype, active), rows in groups.items()
        ]
        lines = []
        if body:
            width = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
            lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, width, strict=True)) for line in [head, *body]]
        share = 100 * self.trainable / max(1, self.total)
        lines.append(
            f"trainable {self.trainable:,} of {self.total:,} parameters ({share:.2f} %), "
            f"{self.total_bytes / 2**20:,.1f} MiB in memory, {self.quantized:,} of them in 4 bits"
            + (", merged" if self.merged else "")
        )
        lines += [f"tied: {' = '.join(names)}" for names in self.tied]
        return "\n".join(line.rstrip() for line in lines)


def status(model: nn.Module) -> Status:
    """The receipt of a model, wrapped or not."""
    rows: list[Row] = []
    counted: set[int] = set()  # parameters in an earlier row: tied layers train one
    merged, active = False, dict[str, None]()
    for name, layer in adapted(model):
        merged |= layer.merged is not None
        active |= dict.fromkeys(layer.active)
        for adapter, part in layer.adapters.items():
            inner = part.items() if isinstance(layer, LoRAExperts) else [("", part)]
            rows += [_row(f"{name}.{key}".rstrip("."), layer, adapter, one, counted) for key, one in inner]
    trainable = [p for p in model.parameters() if p.requires_grad]
    packed = [m.packed() for m in model.modules() if isinstance(m, Linear4bit)]
    in_bits = sum(p.shape[0] * p.shape[1] for p in packed)
    in_bits += sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear8bit))
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    return Status(
        rows=tuple(rows),
        adapters=tuple(adapter_names(model)),
        active=tuple(active),
        merged=merged,
        trainable=sum(p.numel() for p in trainable),
        total=sum(p.numel() for p in model.parameters()) + in_bits,
        trainable_bytes=sum(p.numel() * p.element_size() for p in trainable),
        total_bytes=sum(t.numel() * t.element_size() for t in tensors.values()),
        quantized=in_bits,
        tied=tuple(tuple(names) for names in shared_storage(model).values()),
    )


_WHOLE = {"TrainedModule": "whole", "TrainedTokens": "rows", "TrainedBias": "bias"}  # what stands for a rank


def _row(name: str, layer: Adapted, adapter: str, part: Any, counted: set[int]) -> Row:
    update = isinstance(part, Adapter)
    own = [p for p in part.parameters() if id(p) not in counted]
    counted |= {id(p) for p in own}
    base = layer.base
    return Row(
        module=name,
        adapter=adapter,
        kind=type(layer).__name__,
        base=f"{base.kind} {type(base).__name__}" if isinstance(base, Linear4bit) else type(base).__name__,
        r=part.r if update else 0,
        scale=part.scale if update else 1.0,
        dropout=part.dropout if update else 0.0,
        dtype=str(next(iter(part.parameters())).dtype).removeprefix("torch."),
        trainable=sum(p.numel() for p in own if p.requires_grad),
        active=adapter in layer.active,
    )
