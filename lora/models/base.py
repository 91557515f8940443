"""What every family shares: the face that loading, generation, loss and writing use, the cache, masks and attention.

A family is one file with a config class (`from_json`, `to_json`, `build`) and a model class, and one line in
families.py.  A language model derives from `CausalLM` and gives `hidden`, `embedding`, `norm` and the head.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from lora.kernels.causal import can_causal, causal_attention
from lora.kernels.dispatch import on_gpu
from lora.kernels.documents import document_attention
from lora.models.bits import backends
from lora.models.documents import Documents

Mask = Tensor | Documents | None  # which key a query sees: of causal_mask, or added to the scores; or by document


class Config(Protocol):
    """Shapes and constants of a model, whatever its family."""

    vocab_size: int
    max_length: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    tied: bool

    def to_json(self) -> dict[str, Any]: ...


class Model(nn.Module):
    """A model that `load` fills and `save_pretrained` writes.

    Module names are those of the checkpoints as far as possible; `read` and `write` translate the rest.
    """

    config: Any
    # Prefixes of parameters that a checkpoint may lack: they are new, drawn at random, and to be trained
    new: tuple[str, ...] = ()
    new_std: float = 0.02  # of what is drawn; biases begin at 0

    def read(self, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        """Our name and layout of a checkpoint's tensor; None for one that is computed here."""
        return name, tensor

    def write(self, name: str, tensor: Tensor) -> tuple[str, Tensor]:
        """The checkpoint's name and layout of a parameter of ours; undoes `read`."""
        return name, tensor

    def without(self, missing: Sequence[str]) -> list[str]:
        """Told which parameters a file lacks: gives up parts that the model can do without, returns the rest."""
        return list(missing)

    def tie(self) -> None:
        """Makes parameters that are one in the config share their storage."""

    def tied_name(self) -> str | None:
        """The parameter that is another's and so is left out of a file, or None."""
        return None


class CausalLM(Model):
    """A decoder-only language model. Call it with token ids (B, T) for logits (B, T, V)."""

    softcap: float | None = None  # logits = softcap * tanh(logits / softcap)
    lm_head: nn.Module

    def embedding(self) -> nn.Module:
        """The layer from token ids to states."""
        raise NotImplementedError

    def norm(self) -> nn.Module:
        """The norm before the head."""
        raise NotImplementedError

    def hidden(
        self,
        ids: Tensor,
        padding: Tensor | None = None,
        positions: Tensor | None = None,
        cache: "Cache | None" = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """The states (B, T, d) that the head reads.

        ids (B, T) int64.  `padding` (B, S) bool marks real tokens, S counting those in the cache; it is needed only
        when padding stands before real tokens, since attention never looks ahead.  `positions` (B, T) defaults to
        counting from the cache's end.  `documents` marks rows packed of several texts, which see nothing of each other
        and count their positions from 0; neither padding nor a cache goes with it.

        Raises ValueError where a row, or a document of it, is longer than the model was built for.
        """
        raise NotImplementedError

    def logits(self, h: Tensor) -> Tensor:
        """Logits (..., V) of states (..., d)."""
        logits = self.lm_head(h)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def forward(
        self,
        ids: Tensor,
        padding: Tensor | None = None,
        positions: Tensor | None = None,
        cache: "Cache | None" = None,
        documents: Documents | None = None,
    ) -> Tensor:
        return self.logits(self.hidden(ids, padding, positions, cache, documents))

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def tie(self) -> None:
        if self.config.tied:
            self.lm_head.weight = self.embedding().weight

    def tied_name(self) -> str | None:
        return "lm_head.weight" if self.config.tied else None

    def new_cache(self, batch: int, length: int) -> "Cache":
        """An empty cache for `batch` rows of up to `length` tokens."""
        return Cache(self.config, batch, length, *self.place())

    def restart(self) -> int | None:
        """The length beyond which a row's cached keys are no longer right and are made anew; None: they always are."""
        return None

    def place(self) -> tuple[torch.device, torch.dtype]:
        """Where the states lie, and in what."""
        weight = self.norm().weight
        assert isinstance(weight, Tensor)
        return weight.device, weight.dtype

    def where(
        self, ids: Tensor, positions: Tensor | None, cache: "Cache | None", documents: Documents | None = None
    ) -> tuple[int, Tensor]:
        """Tokens in the cache already, and the positions (B or 1, T) of `ids`; refuses a row that is too long."""
        used, T = cache.used if cache is not None else 0, ids.shape[1]
        if documents is not None:
            if cache is not None:
                raise ValueError("packed documents and a cache were asked for together; a cache holds one text a row")
            if (len(documents.lengths), sum(documents.lengths[0])) != ids.shape:
                raise ValueError(
                    f"documents of {len(documents.lengths)} rows of {sum(documents.lengths[0])} tokens were given with "
                    f"ids of shape {tuple(ids.shape)}; they must be the same"
                )
            limit = min(self.config.max_length, self.restart() or self.config.max_length)
            if documents.longest > limit:
                raise ValueError(
                    f"{documents.longest} tokens in a packed document, and packed this model takes {limit}"
                )
            return 0, documents.positions(ids.device) if positions is None else positions
        if used + T > self.config.max_length:
            raise ValueError(f"{used + T} tokens in a row, and this model was built for {self.config.max_length}")
        if positions is None:
            positions = torch.arange(used, used + T, device=ids.device)[None]
        return used, positions


def refuse_encoder(model: nn.Module, what: str) -> None:
    """Raises TypeError for a model of ours that predicts no next token."""
    if isinstance(model, Model) and not isinstance(model, CausalLM):
        raise TypeError(f"{what} needs a language model, and {type(model).__name__} is an encoder: it writes no tokens")


class Cache:
    """Keys and values of the tokens so far: per layer (B, H_kv, length, D) twice, allocated once."""

    def __init__(self, config: Config, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.num_layers, 2, batch, config.num_kv_heads, length, config.head_dim)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.used = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v (B, H_kv, T, D) behind what is there and returns all keys and values of the layer."""
        end = self.used + k.shape[2]
        self.kv[layer, 0, :, :, self.used : end] = k
        self.kv[layer, 1, :, :, self.used : end] = v
        return self.kv[layer, 0, :, :, :end], self.kv[layer, 1, :, :, :end]


def causal_mask(
    T: int, used: int, padding: Tensor | None, device: torch.device, window: int | None = None
) -> Tensor | None:
    """Which key (S = used + T of them) each of T queries sees: bool (T, S) or (B, 1, T, S); None for plain causal.

    A query sees itself and what stands before it, of that the last `window` keys (itself counted) and no padding.
    """
    S = used + T
    if padding is None and (not used or T == 1) and (window is None or window >= S):
        return None
    key = torch.arange(S, device=device)
    query = key[used:, None]
    mask = key <= query
    if window is not None:
        mask = mask & (key > query - window)
    if padding is not None:
        mask = mask[None, None] & padding[:, None, None, :]
        # a padded query sees no key at all, and softmax over nothing is NaN: let it see everything
        mask = mask | ~mask.any(dim=-1, keepdim=True)
    return mask


def seen(
    T: int,
    used: int,
    padding: Tensor | None,
    documents: Documents | None,
    device: torch.device,
    window: int | None = None,
) -> Mask:
    """What attention is told of who sees whom: by document where rows are packed, else `causal_mask`."""
    if documents is None:
        return causal_mask(T, used, padding, device, window)
    if padding is not None:
        raise ValueError("packed documents and a padding mask were given together; padding is a document of its own")
    return documents.on(device).within(window)


def attention(
    q: Tensor,  # (B, H, T, D)
    k: Tensor,  # (B, H_kv, S, D)
    v: Tensor,
    mask: Mask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(q kᵀ · scale + mask) v, (B, H, T, D); query heads of a group read the same key head.

    `scale` defaults to D ** -0.5; `softcap` squeezes the scores into ±softcap by tanh before the mask.
    """
    if isinstance(mask, Documents):
        return document_attention(
            q, k, v, mask.lengths, ragged=mask.ragged, window=mask.window, scale=scale, softcap=softcap
        )
    groups = q.shape[1] // k.shape[1]
    if on_gpu(q) and softcap is None and mask is None:
        with sdpa_kernel(backends(), set_priority=True):
            return nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=q.shape[2] > 1, scale=scale, enable_gqa=groups > 1
            )
    if mask is None and softcap is None and can_causal(q, k):
        return causal_attention(q, k, v, scale=scale)
    if groups > 1:
        k = k.repeat_interleave(groups, dim=1)
        v = v.repeat_interleave(groups, dim=1)
    causal = mask is None and q.shape[2] > 1
    if softcap is None:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    if causal:
        T, S = q.shape[2], k.shape[2]
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v


def ints(c: dict[str, Any], need: Sequence[str]) -> None:
    """Raises ValueError naming the keys of a config.json that are missing or no whole numbers."""
    missing = [key for key in need if not isinstance(c.get(key), int)]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}, or holds no whole number there")


def counts(c: dict[str, Any], need: Sequence[str]) -> None:
    """`ints`, all of them above 0."""
    ints(c, need)
    for key in need:
        if not is_count(c[key]):
            raise ValueError(f"config.json says {key}={c[key]!r}, which must be a whole number above 0")


def is_count(value: object) -> bool:
    """Whether a file's `value` can be how many there are of something that every model has."""
    return type(value) is int and value > 0


def new_embedding(rows: int, d: int) -> nn.Embedding:
    """An embedding table, at random.

    nn.Embedding would draw normal numbers, which on the meta device imports 150 MB of torch's compiler.
    """
    table = torch.empty(rows, d)
    return nn.Embedding.from_pretrained(table if table.is_meta else table.normal_(), freeze=False)
