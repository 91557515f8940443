"""generate: text from a model, greedy or sampled, many prompts at once, with a key-value cache.

Prompts of different length are padded on the left, where a mask hides the padding and positions count from each
prompt's own first token, so that a row gives the same tokens alone and in a batch.
"""

import itertools
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from lora.models.base import CausalLM, refuse_encoder
from lora.models.decoders import decoder_for
from lora.models.tokenizer import Tokenizer
from lora.models.watch import every
from lora.rows import given_in

Prompt = str | Sequence[dict[str, Any]] | dict[str, Any]


def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Any,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: Sequence[int] = (),
    batch: int = 32,
) -> Any:
    """The continuation of each prompt, without the prompt and without stop tokens: a text for a text, else a list.

    Args:
        prompts: a text, or a list whose items are texts or chats ([{"role": ..., "content": ...}, ...], or an object
            of such "messages" and "tools" or "documents")
        temperature: 0 takes the likeliest token; above it, logits are divided by it and one is drawn
        top_k: draw among the k likeliest (0: all);  top_p: among the likeliest whose probabilities reach p
        seed: of the draws; None draws afresh
        stop: token ids that end a text, besides the tokenizer's own
        batch: prompts that run together

    Raises TypeError for a model that is not ours, ValueError for a prompt that is empty or does not fit.
    """
    if isinstance(prompts, str):
        return generate(model, tokenizer, [prompts], max_new_tokens, temperature=temperature, top_k=top_k,
                        top_p=top_p, seed=seed, stop=stop, batch=batch)[0]  # fmt: skip
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    ends = (*tokenizer.stop, *stop)
    made = generate_ids(
        model, ids, max_new_tokens, ends, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, batch=batch
    )
    return [tokenizer.decode(row) for row in made]


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Token ids of a text, or of a chat that waits for its answer."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    chat = prompt if isinstance(prompt, dict) else {"messages": prompt}
    text = tokenizer.render(chat["messages"], prompt=True, **given_in(chat))
    return tokenizer.encode(text, special=False)  # the template writes its own specials


def generate_ids(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Sequence[int] = (),
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    batch: int = 32,
) -> list[list[int]]:
    """New token ids for each prompt's ids, up to but not including a stop token. See `generate`."""
    refuse_encoder(model, "lora.generate")
    if not isinstance(model, CausalLM):
        raise TypeError(f"{type(model).__name__} is not a model of lora.load; use its own generate method")
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or max_new_tokens < 1:
        raise ValueError(
            f"temperature={temperature}, top_p={top_p}, top_k={top_k}, max_new_tokens={max_new_tokens}: wanted are "
            "temperature >= 0, 0 < top_p <= 1, top_k >= 0 and at least one new token"
        )
    for i, ids in enumerate(prompts):
        if not ids:
            raise ValueError(f"prompt {i} is empty; a model needs at least one token to continue from")
        if len(ids) + max_new_tokens > model.config.max_length:
            raise ValueError(
                f"prompt {i} has {len(ids)} tokens; with max_new_tokens={max_new_tokens} that passes the "
                f"{model.config.max_length} this model was built for"
            )
    device, _ = model.place()
    draw = torch.Generator(device).manual_seed(seed) if seed is not None else None
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # neighbours in length pad each other least
    made: list[list[int]] = [[] for _ in prompts]
    was_training = model.training
    if any(map(attrgetter("training"), every(model))):  # to say so to a thousand modules takes as long as a token
        model.eval()
    try:
        for start in range(0, len(order), batch):
            group = order[start : start + batch]
            rows = _run(model, [prompts[i] for i in group], max_new_tokens, set(stop), temperature, top_k, top_p, draw)
            for i, row in zip(group, rows, strict=True):
                made[i] = row
    finally:
        model.train(was_training) if was_training else None
    return made


@torch.no_grad()
def _run(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: set[int],
    temperature: float,
    top_k: int,
    top_p: float,
    draw: torch.Generator | None,
) -> list[list[int]]:
    B, T = len(prompts), max(map(len, prompts))
    ids = torch.zeros(B, T, dtype=torch.int64)
    real = torch.zeros(B, T, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, T - len(prompt) :] = torch.tensor(prompt)
        real[row, T - len(prompt) :] = True
    decoder = decoder_for(model, B, T + max_new_tokens)
    greedy = temperature == 0
    logits = decoder.begin(ids, real, sorted(stop), max_new_tokens)
    decoder.take(None if greedy else pick(logits, temperature, top_k, top_p, draw))
    made = 1
    while made < max_new_tokens and not decoder.ended(made):
        logits = decoder.step(greedy)
        if not greedy:
            decoder.take(pick(logits, temperature, top_k, top_p, draw))
        made += 1
    return [list(itertools.takewhile(lambda t: t not in stop, row)) for row in decoder.written(made)]


def pick(logits: Tensor, temperature: float, top_k: int, top_p: float, draw: torch.Generator | None) -> Tensor:
    """One token id a row (B,) from logits (B, V): the likeliest, or a draw from the cut and tempered distribution."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        value, index = logits.sort(dim=-1, descending=True)
        p = value.softmax(dim=-1)
        beyond = p.cumsum(dim=-1) - p >= top_p  # the token that reaches p stays in
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, index, beyond), -torch.inf)
    p = logits.softmax(dim=-1)
    # a race of exponential clocks, as in torch.multinomial and with its draws, but without its questions to the GPU
    return (p / torch.empty_like(p).exponential_(generator=draw)).argmax(dim=-1)
