"""TrainedTokens: the rows of a few tokens in a table trained, all other rows and the table itself left alone.

    embedding   y = base(i), and rows[k] where i is the k-th token
    head        y = base(x), and at the tokens' places  + x (rows - base's rows)ᵀ

peft's trainable_token_indices.  A head that shares its weight with the embedding gets the same rows, one parameter.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lora.config import LoRAConfig
from lora.layer import Adapted, embed_scale


class Tokens(nn.Module):
    """Rows (n, dim) float32 of the tokens `index` (n,), and where each token of the vocabulary has its row."""

    index: Tensor
    slot: Tensor
    start: Tensor

    def __init__(self, index: Tensor, table: Tensor) -> None:
        super().__init__()
        slot = torch.full((table.shape[0],), -1)
        slot[index] = torch.arange(len(index))
        first = table.detach()[index.to(table.device)].float()
        self.register_buffer("index", index.to(table.device))
        self.register_buffer("slot", slot.to(table.device), persistent=False)  # (vocab,), -1 where a row is the base's
        self.register_buffer("start", first.clone(), persistent=False)  # (n, dim), the base's rows
        self.rows = nn.Parameter(first)


class TrainedTokens(Adapted):
    """An embedding or a head of which some tokens' rows are trained beside it."""

    def add(
        self, name: str, config: LoRAConfig, index: Tensor, shared: "dict[int, Tokens]", *, fresh: bool = True
    ) -> None:
        """`shared` collects what was made for each storage, so that tied layers get one parameter."""
        del config, fresh  # the rows begin as the base's
        table = self.base.weight
        if table.data_ptr() not in shared:
            shared[table.data_ptr()] = Tokens(index, table)
        self.adapters[name] = shared[table.data_ptr()]

    def forward(self, x: Tensor) -> Tensor:
        if self.merged is not None and not self.off:
            return self.merged(x)
        y = self.base(x)
        for tokens in self.on():
            if isinstance(self.base, nn.Embedding):
                k = tokens.slot[x]
                own = nn.functional.embedding(k.clamp(min=0), tokens.rows.to(y.dtype)) * embed_scale(self.base)
                y = torch.where((k >= 0)[..., None], own, y)
            else:
                moved = (tokens.rows - tokens.start).to(y.dtype)
                y = y.index_add(-1, tokens.index, x.to(y.dtype) @ moved.T)
        return y

    def delta(self) -> Tensor:
        """What the active adapters change of the weight (vocab, dim), float32."""
        out = torch.zeros(self.base.weight.shape, device=self.base.weight.device)
        for tokens in self.chosen():
            out[tokens.index] += tokens.rows.detach() - tokens.start
        return out

    def table(self) -> Tensor:
        """The weight with the active adapters' rows in it, in its dtype."""
        out = self.base.weight.detach().clone()
        for tokens in self.chosen():
            out[tokens.index] = tokens.rows.detach().to(out.dtype)
        return out

    def shift(self) -> None:
        return None


def refuse_overlap(layer: Any, names: tuple[str, ...], path: str) -> None:
    """Raises ValueError where two of these adapters train the same token."""
    seen: dict[int, str] = {}
    for name in names:
        for token in layer.adapters[name].index.tolist() if name in layer.adapters else ():
            if token in seen:
                raise ValueError(
                    f"adapters {seen[token]!r} and {name!r} both have a row for token {token} of {path!r}, and one row "
                    "must hold: make one of them active"
                )
            seen[token] = name
