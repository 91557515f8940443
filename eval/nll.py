"""Negative log-likelihood of what is learned, token by token: the loss of training and the measure of evaluation.

    nll_i = -log p(token_i | tokens before it)      perplexity = exp(Σ nll / number of tokens), pooled over all rows

Logits are made only where a learned token is predicted.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora.kernels.cross_entropy import linear_cross_entropy
from lora.models.base import CausalLM, refuse_encoder
from lora.render import Batch, Example, collate
from lora.tokens import lengths_of


def token_nll(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """NLL in nats (n,) float32 of each learned token, with gradient, and whether it was the likeliest (n,) bool.

    Takes our models, and any that maps input_ids and attention_mask to something with logits (transformers').
    """
    if isinstance(model, CausalLM):
        h = model.hidden(batch.ids, positions=batch.positions, documents=batch.documents)
        h = h.reshape(-1, h.shape[-1]).index_select(0, batch.at)  # (n, d)
        head = model.lm_head
        if type(head) is nn.Linear and not head.weight.requires_grad and model.softcap is None:
            return linear_cross_entropy(h, head.weight, batch.target)
        logits = model.logits(h).float()
    else:
        refuse_encoder(model, "a token's likelihood")
        if batch.documents is not None:
            raise ValueError(f"a packed batch needs a model of lora.load's, and {type(model).__name__} is none; pad it")
        logits = model(input_ids=batch.ids, attention_mask=batch.real.long()).logits
        logits = logits.reshape(-1, logits.shape[-1]).index_select(0, batch.at).float()
    nll = nn.functional.cross_entropy(logits, batch.target, reduction="none")
    return nll, logits.argmax(dim=-1) == batch.target


@torch.no_grad()
def row_nll(model: nn.Module, examples: Sequence[Example], batch: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Per row: summed NLL (rows,) float64, learned tokens (rows,) int64, likeliest ones among them (rows,) int64."""
    device = next(model.parameters()).device
    total = torch.zeros(len(examples), dtype=torch.float64)
    count = torch.zeros(len(examples), dtype=torch.int64)
    hits = torch.zeros(len(examples), dtype=torch.int64)
    lengths = lengths_of(examples)
    order = sorted(range(len(examples)), key=lengths.__getitem__)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch):
            group = order[start : start + batch]
            b = collate([examples[i] for i in group]).to(device)
            nll, hit = token_nll(model, b)
            where = torch.tensor(group)[b.owner.cpu()]
            total.index_add_(0, where, nll.double().cpu())
            count.index_add_(0, where, torch.ones_like(where))
            hits.index_add_(0, where, hit.long().cpu())
    finally:
        if was_training:
            model.train()
    return total, count, hits
