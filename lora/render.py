"""Rows to token ids and a mask of what is learned: one renderer for training, evaluation and generation.

Prompt and completion: the ids of the prompt exactly as generation will see them, then the completion and one
end-of-text token; the last two are learned.  Where the prompt's last token would merge with the completion's
first in one piece of text, the two are encoded apart, as they will be at inference.

Chats: the whole chat is rendered by the model's own template, with the row's tools and documents.  Where the template
marks what the assistant says by {% generation %} blocks, those are the turns.  Otherwise a turn's text is what the
template adds between "up to here, assistant to answer" and "with the answer"; no template needs patching for it.  An
assistant turn is learned up to and with its first stop token; padding and what the template adds behind it never.
"""

from collections.abc import Sequence
from typing import Any

from lora.batch import Batch as Batch
from lora.batch import Example as Example
from lora.batch import collate as collate
from lora.models.tokenizer import Tokenizer
from lora.rows import Row, given_in


def length_limit(model: Any, asked: int | None = None) -> int:
    """The longest row in tokens: what was asked, else what the model (ours or transformers') was built for."""
    config = model.config
    for limit in (asked, getattr(config, "max_length", None), getattr(config, "max_position_embeddings", None)):
        if limit:
            return limit
    return 2**31


def render(rows: Sequence[Row], tokenizer: Tokenizer, max_length: int) -> list[Example]:
    """Every row as an Example.

    Raises ValueError naming the row when it is longer than `max_length` tokens (its learned tokens would be cut
    away: shorten it, leave it out or raise the limit), when nothing in it would be learned, or when the chat template
    refuses it.
    """
    examples = []
    for i, row in enumerate(rows):
        try:
            ids, learned = _chat(row, tokenizer) if "messages" in row else _pair(row, tokenizer)
        except ValueError as e:
            raise ValueError(f"row {i}: {e}") from None
        learned[0] = False  # nothing stands before the first token, so nothing predicts it
        if not any(learned):
            raise ValueError(f"row {i}: none of its {len(ids)} tokens would be learned")
        if len(ids) > max_length:
            cut = sum(learned[max_length:])
            raise ValueError(
                f"row {i} has {len(ids)} tokens and the limit is {max_length}; cutting it would lose {cut} of its "
                f"{sum(learned)} learned tokens: shorten the row, leave it out, or raise max_length"
            )
        examples.append(Example(tuple(ids), tuple(learned), i))
    return examples


def _pair(row: Row, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    prompt = tokenizer.encode(row["prompt"])
    whole = tokenizer.encode(row["prompt"] + row["completion"])
    if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
        whole = prompt + tokenizer.encode_on(row["completion"])
    if tokenizer.eos is not None and whole[-1] != tokenizer.eos:
        whole.append(tokenizer.eos)
    return whole, [i >= len(prompt) for i in range(len(whole))]


def _chat(row: Row, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    text, spans = tokenizer.render_generated(row["messages"], **given_in(row))
    if spans is None:
        spans = _turns(row, text, tokenizer)
    # cut where an answer begins, as generation cuts: what it was asked is encoded apart from what it says
    ids: list[int] = []
    learned: list[bool] = []
    done = 0
    for start, end in spans:
        asked = tokenizer.encode_on(text[done:start]) if done else tokenizer.encode(text[:start], special=False)
        said = tokenizer.encode_on(text[start:end])
        stop = next((k for k, t in enumerate(said) if t in tokenizer.stop), len(said) - 1)
        ids += asked + said
        learned += [False] * len(asked) + [k <= stop for k in range(len(said))]
        done = end
    rest = tokenizer.encode_on(text[done:])
    return ids + rest, learned + [False] * len(rest)


def _turns(row: Row, text: str, tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """(start, end) of each assistant turn in the rendered chat."""
    messages, given = row["messages"], given_in(row)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.render(messages[:i], prompt=True, **given)
        after = tokenizer.render(messages[: i + 1], **given)
        if i == 0 and not after.startswith(before):
            raise ValueError(
                f"the chat begins with an answer, and the chat template of {tokenizer.source} then puts a turn of its "
                "own before it; begin with a system or user turn"
            )
        if not text.startswith(after):  # Phi-3's template ends a chat, not a turn, with an end-of-text token
            after = after.removesuffix(tokenizer.tokens.get("eos_token", ""))
        if not after.startswith(before) or not text.startswith(after):
            raise ValueError(
                f"the chat template of {tokenizer.source} writes turn {i} otherwise once it is answered or followed by "
                "others, so what to learn cannot be told; split the chat so that this turn is its last, or write the "
                "row as prompt and completion"
            )
        spans.append((len(before), len(after)))
    return spans
