"""Decoder: one token a row at a time, over a key-value cache of fixed size, on a GPU as one CUDA graph a token.

A token of an 8B model is some six hundred launches of a few microseconds: launched from Python they take thirty times
as long as they run.  So the step is recorded once and replayed.  Nothing in it asks the host: the slot to write, the
position and the token are tensors that the step itself moves on.  Trained factors are read where they lie, so further
training needs no new recording; other active adapters, a merge or another shape do, and are noticed.
On a CPU the same step runs directly.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lora.kernels.attend import attend
from lora.kernels.norm import rms_norm_add
from lora.kernels.swiglu import swiglu
from lora.layer import adapted, together
from lora.models.base import Cache, CausalLM
from lora.models.llama import MLP, Attention, Block, Llama, RMSNorm


class Decoder:
    """The state of `batch` rows of up to `length` tokens: fill it with `begin`, then call `step` for token by token."""

    def __init__(self, model: CausalLM, batch: int, length: int) -> None:
        device, _ = model.place()
        self.model: Any = model
        self.batch, self.length, self.made_for = batch, length, recording_of(model)
        self.cache: Cache = model.new_cache(batch, length)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)  # the slot that the next token takes
        self.start = torch.zeros(batch, dtype=torch.int64, device=device)  # a row's first real slot
        self.token = torch.zeros(batch, dtype=torch.int64, device=device)
        self.logits: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.seen: list[Tensor] = []  # the tokens so far, kept for models that must start again (`restart`)
        self.plain = plain(model, length)
        if self.plain:
            self.inv_freq = model.config.inv_freq().to(device)

    def begin(self, ids: Tensor, real: Tensor) -> Tensor:
        """Reads prompts ids (B, T), padded on the left where `real` (B, T) is False; logits (B, V) of what follows."""
        T = ids.shape[1]
        self.cache.used = 0
        self.seen = [ids]
        self.at.fill_(T)
        self.start.copy_((~real).sum(dim=1))
        positions = (real.cumsum(dim=1) - 1).clamp(min=0)
        padding = None if bool(real.all()) else real
        return self.model.logits(self.model.hidden(ids, padding, positions, self.cache)[:, -1]).float()

    def step(self, token: Tensor) -> Tensor:
        """Takes a token (B,) into the cache; logits (B, V) float32 of the one behind it, valid until the next step."""
        self.token.copy_(token)
        if not self.plain:
            self.logits = self._plain_step()
        elif self.token.device.type != "cuda":
            self.logits = self._step()
        elif self.graph is None:
            self._record()
        else:
            self.graph.replay()
        assert self.logits is not None
        return self.logits

    def _record(self) -> None:
        at = self.at.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step()  # compiles what is not compiled yet, which a recording must not
        torch.cuda.current_stream().wait_stream(side)
        self.at.copy_(at)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits = self._step()
        self.graph = graph
        graph.replay()  # a recording runs nothing

    def _step(self) -> Tensor:
        """One token through all layers; moves `at` on."""
        decoder = self.model.model
        x = decoder.embed_tokens(self.token)  # (B, d)
        angle = (self.at - self.start)[:, None].float() * self.inv_freq  # (B, D / 2)
        cos, sin = angle.cos(), angle.sin()
        more = torch.zeros_like(x)  # what the block before adds to x, added inside the next norm
        block: Any
        for i, block in enumerate(decoder.layers):
            a, mlp = block.self_attn, block.mlp
            h, x = _norm_add(block.input_layernorm, more, x)
            q, k, v = together(h, a.q_proj, a.k_proj, a.v_proj)
            more = a.o_proj(attend(q, k, v, self.cache.kv[i, 0], self.cache.kv[i, 1], self.at, self.start, cos, sin))
            h, x = _norm_add(block.post_attention_layernorm, more, x)
            more = mlp.down_proj(swiglu(*together(h, mlp.gate_proj, mlp.up_proj)))
        h, _ = _norm_add(decoder.norm, more, x)
        self.at += 1
        return self.model.lm_head(h).float()

    def _plain_step(self) -> Tensor:
        """The same by the model's own forward, for a model whose blocks are not those of llama.py (any more)."""
        used = self.cache.used
        limit = self.model.restart()
        if limit is not None:
            self.seen.append(self.token[:, None].clone())
            if bool((used - self.start == limit).any()):  # this token is the first beyond the limit of its row
                ids = torch.cat(self.seen, dim=1)
                return self.begin(ids, torch.arange(used + 1, device=ids.device) >= self.start[:, None])
        real = torch.arange(used + 1, device=self.start.device) >= self.start[:, None]
        positions = (used - self.start)[:, None]
        h = self.model.hidden(self.token[:, None], real, positions, self.cache)
        return self.model.logits(h[:, -1]).float()


def plain(model: CausalLM, length: int) -> bool:
    """Whether the step of this file is the model's own: Llama's blocks, no norms on q and k, no window in reach.

    A whole attention or MLP may have been replaced by a trained copy, which the step would look past.
    """
    if type(model) is not Llama or model.config.qk_norm:
        return False
    if any(w is not None and w < length for w in model.config.windows):
        return False
    return all((type(b), type(b.self_attn), type(b.mlp)) == (Block, Attention, MLP) for b in model.model.layers)  # type: ignore[union-attr]


def _norm_add(norm: nn.Module, more: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """norm(x + more), and x + more; in one pass where the norm is the model's own."""
    if type(norm) is RMSNorm:
        return rms_norm_add(more, x, norm.weight, norm.eps)
    x = x + more
    return norm(x), x


def recording_of(model: CausalLM) -> tuple[object, ...]:
    """What a recording depends on besides its shapes: where weights lie, and which adapters take part."""
    layers = tuple((x.active, x.off, x.merged is not None, x.by_row) for _, x in adapted(model))
    return (*layers, *(t.data_ptr() for t in (*model.parameters(), *model.buffers())))


def decoder_for(model: CausalLM, batch: int, length: int) -> Decoder:
    """The model's decoder for this shape: the one of the last call where it still fits, else a new one.

    Lengths are rounded up to 128 tokens, so that prompts of like length share a recording.
    """
    length = min(-(-length // 128) * 128, model.config.max_length)
    kept = model.__dict__.get("_decoder")
    if kept is not None and (kept.batch, kept.length, kept.made_for) == (batch, length, recording_of(model)):
        return kept
    model.__dict__["_decoder"] = None  # its cache goes before another is made
    made = Decoder(model, batch, length)
    if made.token.device.type == "cuda":
        model.__dict__["_decoder"] = made
    return made
