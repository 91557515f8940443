"""A check of masks by another road than the one that made them: what is learned, read back as text.

The renderer says where answers begin and end; here only token ids and mask are looked at.  Decoded, the learned runs of
a row must be the assistant's texts, each with the token behind it that stops generation, and nothing else.
"""

from collections.abc import Sequence

from lora.batch import Example
from lora.models.tokenizer import Tokenizer
from lora.rows import Row, given_in


def prove(row: Row, e: Example, tokenizer: Tokenizer, learn: str) -> None:
    """Raises ValueError saying what a row would teach instead of what it says. `e` is the whole row, not yet cut.

    An answer must begin exactly where generation would begin it.  Around its text is allowed only what stands word for
    word in the chat template itself, as an empty thinking block does, and white space.  Of tool calls only the text
    beside them is looked at.
    """
    if e.ids[:2] == (tokenizer.bos,) * 2:
        raise ValueError(f"it begins with {tokenizer.decode(e.ids[:1], special=True)!r} twice; take one out of the row")
    if learn == "all" or "text" in row:
        if not all(e.learned[1:]):
            raise ValueError("all of it was to be learned, and part of it is not")
        return
    runs = _runs(e)
    if "messages" not in row:
        _prove_pair(row, e, runs, tokenizer)
        return
    places = [i for i, m in enumerate(row["messages"]) if m["role"] == "assistant"]
    places = places[-1:] if learn == "last" else places
    if len(runs) != len(places):
        raise ValueError(f"{len(runs)} stretches of it would be learned, and the assistant has {len(places)} turns")
    templates = _templates(tokenizer)
    blocks = any("endgeneration" in t for t in templates)  # these may ask otherwise for a turn once it is history
    for i, (start, end) in zip(places, runs, strict=True):
        message = row["messages"][i]
        text = _without_stop(message.get("content") or "", e.ids[start:end], tokenizer)
        asked = tokenizer.render(row["messages"][:i], prompt=True, **given_in(row))
        before = tokenizer.decode(e.ids[:start], special=True)
        if not blocks and before != tokenizer.decode(tokenizer.encode(asked, special=False), special=True):
            raise ValueError(
                f"turn {i} would be learned behind {before[-40:]!r}, and generation begins it behind {asked[-40:]!r}"
            )
        got = tokenizer.decode(e.ids[start : end - 1], special=True)
        if got.strip() in (text.strip(), _said(text, tokenizer).strip()):
            continue
        head, found, tail = got.partition(text.strip()) if text.strip() else (got, "it", "")
        around = (head + " " + tail).split()
        known = message.get("tool_calls") or all(any(word in t for t in templates) for word in around)
        if not (found and known):
            raise ValueError(f"it would teach {_short(got)}, and the answer is {_short(text)}")


def _prove_pair(row: Row, e: Example, runs: Sequence[tuple[int, int]], tokenizer: Tokenizer) -> None:
    start, end = runs[0]
    if len(runs) > 1 or end != len(e.ids):
        raise ValueError("the completion is not learned to its end, in one stretch")
    if not row["prompt"] and start == 1 and e.ids[0] != tokenizer.bos:
        start = 0  # the first token of a text is predicted by nothing
    text = row["completion"]
    if tokenizer.eos is not None:
        text, end = _without_stop(text, e.ids[start:end], tokenizer), end - 1
    got = tokenizer.decode(e.ids[start:end], special=True)
    if got not in (text, _said(text, tokenizer)):
        raise ValueError(f"it would teach {_short(got)}, and the completion is {_short(text)}")


def _runs(e: Example) -> list[tuple[int, int]]:
    """(start, end) of each unbroken stretch of learned tokens."""
    edges = [k for k in range(len(e.ids) + 1) if (k > 0 and e.learned[k - 1]) != (k < len(e.ids) and e.learned[k])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _without_stop(text: str, run: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of an answer, without the stop token that rows may write out; refuses a run that ends in none."""
    if run[-1] not in tokenizer.stop:
        known = [tokenizer.decode([i], special=True) for i in tokenizer.stop]
        raise ValueError(
            f"the answer {text[-40:]!r} ends in {tokenizer.decode(run[-3:], special=True)!r}, and none of {known}, at "
            "which generation stops, is learned behind it: the tuned model would never stop"
        )
    return text.removesuffix(tokenizer.decode(run[-1:], special=True))


def _said(text: str, tokenizer: Tokenizer) -> str:
    """What this vocabulary can say of a text: some drop a space in front, or fold characters together."""
    return tokenizer.decode(tokenizer.encode_on(text), special=True)


def _short(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:40]!r} ... {text[-40:]!r}"


def _templates(tokenizer: Tokenizer) -> tuple[str, ...]:
    found = tokenizer.chat_template
    return tuple(found.values()) if isinstance(found, dict) else (found,) if found else ()
