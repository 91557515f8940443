"""Chat templates: Jinja2 programs that come with a model and write a chat as its text, run in a sandbox.

They see what transformers gives them: messages, tools, documents, add_generation_prompt, the special tokens that the
model has, raise_exception, strftime_now, tojson, loop controls, and {% generation %} ... {% endgeneration %} around
what the assistant says.  Source: transformers 5, utils/chat_template_utils.py.
"""

import datetime
import functools
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes, parser, utils

_BEGIN, _END = "\ufdd0", "\ufdd1"  # code points that Unicode keeps out of texts


def render_template(template: str, messages: Sequence[dict[str, Any]], **variables: Any) -> str:
    """What `template` writes for `messages`; keys of a message that are None are left out, as transformers does.

    Raises ValueError where the template is no template, refuses the messages, or fails on them.
    """
    messages = [{key: value for key, value in m.items() if value is not None} for m in messages]
    try:
        return _compiled(template).render(messages=messages, **variables)
    except Exception as e:  # a template is a program, and may fail as any program can
        raise ValueError(str(e) or type(e).__name__) from None


def render_generated(
    template: str, messages: Sequence[dict[str, Any]], **variables: Any
) -> tuple[str, list[tuple[int, int]] | None]:
    """The rendered text, and (start, end) in it of each generation block, None where the template has no such block."""
    text = render_template(template, messages, **variables)
    if not re.search(r"\{%[-+]?\s*generation\b", template):
        return text, None
    marked = render_template(template, messages, **variables, _generation=_BEGIN, _endgeneration=_END)
    pieces = re.split(f"[{_BEGIN}{_END}]", marked)
    marks = re.sub(f"[^{_BEGIN}{_END}]", "", marked)
    if "".join(pieces) != text or marks != (_BEGIN + _END) * (len(pieces) // 2):
        raise ValueError("generation blocks stand inside each other, or change what the template writes")
    ends = list(itertools.accumulate(map(len, pieces)))
    return text, list(zip(ends[:-1:2], ends[1::2], strict=True))


class _Generation(jinja2.ext.Extension):
    """Writes a block between two variables, which are undefined, so empty, unless `render_generated` sets them."""

    tags = {"generation"}

    def parse(self, parser: parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.Name(name, "load")]) for name in ("_generation", "_endgeneration"))
        return nodes.Scope([begin, *body, end]).set_lineno(line)


class _Namespace(utils.Namespace):
    """Jinja's, without names that mean something to Python: a template could pass itself off as a safe function."""

    def __init__(*args: Any, **attributes: Any) -> None:
        utils.Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **attributes).items():
            args[0][name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.sandbox.SecurityError(f"a template may not set the attribute {name!r}")
        super().__setitem__(name, value)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(format: str) -> str:  # noqa: A002  templates may name it
    return datetime.datetime.now().strftime(format)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = _to_json
    env.globals |= {"raise_exception": _raise, "strftime_now": _now, "namespace": _Namespace}
    return env.from_string(template)
