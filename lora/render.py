"""Rows to token ids and a mask of what is learned: one renderer for training, evaluation and generation.

Prompt and completion: the ids of the prompt exactly as generation will see them, then the completion and one
end-of-text token; the last two are learned.  Where the prompt's last token would merge with the completion's
first in one piece of text, the two are encoded apart, as they will be at inference.  Plain text: all of it and one
end-of-text token.

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
from lora.lengths import OVERLONG, LengthReport, shorten
from lora.models.tokenizer import Tokenizer
from lora.proof import prove
from lora.rows import Row, given_in, where_of
from lora.tokens import Examples

LEARN = ("assistant", "last", "all")


def length_limit(model: Any, asked: int | None = None) -> int:
    """The longest row in tokens: what was asked, else what the model (ours or transformers') was built for."""
    config = model.config
    for limit in (asked, getattr(config, "max_length", None), getattr(config, "max_position_embeddings", None)):
        if limit:
            return limit
    return 2**31


def render(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    max_length: int,
    *,
    learn: str = "assistant",
    overlong: str = "error",
    proof: bool = False,
    report: LengthReport | None = None,
) -> Examples:
    """Every row as an Example, or what `overlong` makes of one longer than `max_length` tokens (`lora.lengths`).

    `learn`: "assistant", the completion or every answer; "last", the last answer of a chat; "all", every token.
    `proof` reads each mask back as text (`lora.proof`).  `report` is filled in, if one is given.

    Raises ValueError naming the row when it is too long, when nothing in it would be learned, when the chat template
    refuses it, or when the proof fails.
    """
    if learn not in LEARN:
        raise ValueError(f"learn={learn!r}: one of {', '.join(LEARN)}")
    if overlong not in OVERLONG:
        raise ValueError(f"overlong={overlong!r}: one of {', '.join(OVERLONG)}")
    examples = Examples()
    report = LengthReport(max_length, overlong) if report is None else report
    for i, row in enumerate(rows):
        where = where_of(rows, i)
        try:
            e = render_row(row, tokenizer, i, learn)
            if proof:
                prove(row, e, tokenizer, learn)
            if report.add(where, e):
                examples.append(e)
            elif overlong != "error":
                kept = shorten(e, max_length, overlong, tokenizer.bos)
                report.cut(e, kept)
                for part in kept:
                    examples.append(part)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    report.check()
    if not len(examples):
        raise ValueError(f"none of {len(rows)} rows is left: all are longer than {max_length} tokens ({overlong})")
    return examples.freeze()


def render_row(row: Row, tokenizer: Tokenizer, i: int = 0, learn: str = "assistant") -> Example:
    """One row, whole, as an Example.

    Raises ValueError when nothing in it would be learned, or the chat template refuses it.
    """
    if "messages" in row:
        ids, learned = _chat(row, tokenizer, learn)
    else:
        ids, learned = _pair(row, tokenizer) if "prompt" in row else _text(row, tokenizer)
    if learn == "all":
        learned = [True] * len(ids)
    learned[0] = False  # nothing stands before the first token, so nothing predicts it
    if not any(learned):
        raise ValueError(f"none of its {len(ids)} tokens would be learned")
    return Example(tuple(ids), tuple(learned), i)


def _text(row: Row, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    ids = tokenizer.encode(row["text"])
    if tokenizer.eos is not None and ids[-1:] != [tokenizer.eos]:
        ids.append(tokenizer.eos)
    return ids, [True] * len(ids)


def _pair(row: Row, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    prompt = tokenizer.encode(row["prompt"])
    whole = tokenizer.encode(row["prompt"] + row["completion"])
    if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
        whole = prompt + tokenizer.encode_on(row["completion"])
    if tokenizer.eos is not None and whole[-1] != tokenizer.eos:
        whole.append(tokenizer.eos)
    return whole, [i >= len(prompt) for i in range(len(whole))]


def _chat(row: Row, tokenizer: Tokenizer, learn: str) -> tuple[list[int], list[bool]]:
    text, spans = tokenizer.render_generated(row["messages"], **given_in(row))
    if spans is None:
        spans = _turns(row, text, tokenizer)
    # cut where an answer begins, as generation cuts: what it was asked is encoded apart from what it says
    ids: list[int] = []
    learned: list[bool] = []
    done = 0
    for turn, (start, end) in enumerate(spans, start=1):
        asked = tokenizer.encode_on(text[done:start]) if done else tokenizer.encode(text[:start], special=False)
        said = tokenizer.encode_on(text[start:end])
        stop = next((k for k, t in enumerate(said) if t in tokenizer.stop), len(said) - 1)
        ids += asked + said
        taught = learn != "last" or turn == len(spans)
        learned += [False] * len(asked) + [taught and k <= stop for k in range(len(said))]
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
