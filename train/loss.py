"""What a step makes of a batch: the loss a token, smoothed or not, noise on the embeddings, blocks run twice.

smoothed   (1 - ε) nll + ε / V Σ_v -log p(v)                 arXiv:1512.00567, section 7; torch's label_smoothing
NEFTune    embedding + Uniform(-1, 1) α / sqrt(L d)           arXiv:2310.05914; L the row's tokens, d the width
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora.eval.nll import token_nll
from lora.models.base import CausalLM
from lora.models.llama import Llama
from lora.render import Batch

_CHUNK = 1024  # tokens whose logits exist at once: they are made again in the backward pass


def token_loss(model: nn.Module, batch: Batch, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Loss in nats (n,) float32 of each learned token, with gradient, and whether it was the likeliest (n,) bool."""
    if not smoothing:
        return token_nll(model, batch)
    head: Callable[[Tensor], Tensor] = _same
    if isinstance(model, CausalLM):
        states = model.hidden(batch.ids, positions=batch.positions, documents=batch.documents)
        head = model.logits
        states = states.reshape(-1, states.shape[-1]).index_select(0, batch.at)  # (n, d)
    else:
        logits = model(input_ids=batch.ids, attention_mask=batch.real.long()).logits
        states = logits.reshape(-1, logits.shape[-1]).index_select(0, batch.at)

    def part(h: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        y = head(h).float()  # (chunk, V)
        loss = nn.functional.cross_entropy(y, target, reduction="none", label_smoothing=smoothing)
        return loss, y.detach().argmax(dim=-1) == target

    pairs = zip(states.split(_CHUNK), batch.target.split(_CHUNK), strict=True)
    parts = [checkpoint(part, h, target, use_reentrant=False) for h, target in pairs]
    return torch.cat([loss for loss, _ in parts]), torch.cat([hit for _, hit in parts])


def _same(x: Tensor) -> Tensor:
    return x


@contextmanager
def noise(model: nn.Module, alpha: float, real: Tensor) -> Iterator[None]:
    """NEFTune in the block: `real` (B, T) bool says how many tokens each row has. Does nothing where alpha is 0."""
    if not alpha:
        yield
        return
    table: Any = model.embedding() if isinstance(model, CausalLM) else model.get_input_embeddings()  # type: ignore
    lengths = real.sum(dim=1).clamp(min=1)[:, None, None]  # (B, 1, 1)

    def add(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        size = alpha / (lengths * y.shape[-1]).sqrt()
        return y + torch.empty_like(y).uniform_(-1, 1) * size.to(y.dtype)

    handle = table.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def recomputed(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Within the block, each decoder block keeps its input alone and runs again in the backward pass.

    Dropout falls the same way twice.  Raises ValueError where the model has no list of blocks.
    """
    if not on:
        yield
        return
    layers = blocks(model)
    for layer in layers:
        layer.forward = _twice(layer.forward)
    ours = model if isinstance(model, Llama) else None  # its blocks may run as one step each, with a word of their own
    before = ours.keeping.keep if ours else None
    if ours:
        ours.keeping.keep = "input"
    try:
        yield
    finally:
        if ours:
            ours.keeping.keep = before
        for layer in layers:
            del layer.forward  # the class's own comes back


def _twice(forward: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # nothing is kept anyway, and a recorded graph must not look at the RNG
            return forward(*args, **kwargs)
        if kwargs.get("past_key_values") is not None:  # transformers': a block that runs twice would fill it twice
            kwargs["past_key_values"] = None
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder's blocks: the list of like modules that holds most of the model's parameters."""
    found: list[nn.Module] = []
    most = 0
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) and len({type(m) for m in module}) == 1:
            size = sum(t.numel() for t in [*module.parameters(), *module.buffers()])
            if size > most:
                found, most = list(module), size
    if not found:
        raise ValueError(f"recompute=True runs a model's blocks again, and {type(model).__name__} has no list of them")
    return found
