"""Chat templates of the families against transformers: the same text, the same refusals; and what of it is learned.

The templates in data/chat_templates are written for these tests after each family's published format.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

from lora.models.chat_template import render_template
from lora.models.generate import prompt_ids
from lora.models.tokenizer import Tokenizer
from lora.render import Example, render
from lora.rows import prompt_of, read_rows, reference_of

FOLDER = Path(__file__).parent / "data/chat_templates"


@dataclass(frozen=True)
class Case:
    """A template's special tokens, and `turn`, how an answer reads with what is learned around it."""

    turn: str
    eos: str
    bos: str | None = None
    stop: tuple[str, ...] = ()
    strips: bool = False
    refuses: tuple[str, ...] = ()  # of CHATS, with an error of its own
    moves: tuple[str, ...] = ()  # of CHATS, whose system text or tools go elsewhere as turns follow


ORDER = ("two questions", "tool call", "tools in two turns")
CASES = {
    "chatml_tools": Case("{}<|im_end|>", "<|im_end|>"),
    "llama2": Case(" {} </s>", "</s>", "<s>", strips=True, refuses=ORDER),
    "llama3": Case("{}<|eot_id|>", "<|eot_id|>", "<|begin_of_text|>", strips=True),
    "mistral_v3": Case(
        " {}</s>", "</s>", "<s>", strips=True, refuses=("two questions",), moves=("system", "tools in two turns")
    ),
    "gemma2": Case("{}<end_of_turn>", "<eos>", "<bos>", ("<end_of_turn>",), True, ("system", *ORDER)),
    "gemma3": Case("{}<end_of_turn>", "<eos>", "<bos>", ("<end_of_turn>",), True, ORDER),
    "phi3": Case("{}<|end|>", "<|endoftext|>", "<s>", ("<|end|>",)),
    "phi4": Case("{}<|im_end|>", "<|im_end|>", "<|endoftext|>"),
    "zephyr": Case("{}</s>", "</s>", "<s>"),
    "falcon3": Case("{}<|endoftext|>", "<|endoftext|>"),
    "deepseek": Case("{}<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"),
    "command_r": Case("{}<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", strips=True, refuses=ORDER),
    "vicuna": Case(" {}</s>", "</s>", "<s>"),
    "alpaca": Case("{}</s>", "</s>", "<s>"),
    "generation": Case("{}<|im_end|>", "<|im_end|>"),
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Answer in one word."}
CALL: dict[str, Any] = {"id": "abc123def", "type": "function"}
CALL |= {"function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}}
RESULT = {"role": "tool", "name": "weather", "content": '{"sky": "<grey & wet>"}', "tool_call_id": "abc123def"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city, for 'today' & <later>",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Zürich, 東京, …"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
# transformers hands templates the keys that are None until some version before 5.23
HANDS_NONE = int(transformers.__version__.split(".")[1]) < 23 or transformers.__version__.startswith("4.")
NOTHING: dict[str, Any] = {} if HANDS_NONE else {"content": None}
ASKED = [user("Weather in Zürich?"), {"role": "assistant", **NOTHING, "tool_calls": [CALL]}, RESULT]
CHATS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [user("Name a colour."), says("Blue.")]},
    "system": {"messages": [SYSTEM, user("Name a colour."), says("Blue.")]},
    "turns": {"messages": [user("One?"), says("Blue."), user("Two?"), says("Red,\n\nor teal."), user("3"), says("No")]},
    "unanswered": {"messages": [user("One?"), says("Blue."), user("Two?")]},
    "unicode": {"messages": [user("naïve 日本 🙂"), says("語 🙂 é"), user("\u2028 <b>&amp;</b> {{ x }}"), says("Да")]},
    "two questions": {"messages": [user("One?"), user("Two?"), says("Blue.")]},
    "tools": {"messages": [user("Name a colour."), says("Blue.")], "tools": [TOOL, TOOL]},
    "tool call": {"messages": [*ASKED, says("Grey.")], "tools": [TOOL]},
    "tools in two turns": {"messages": [*ASKED, says("Grey."), user("And now?"), says("Wet.")], "tools": [TOOL]},
}


def template(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def write(folder: Path, case: Case, text: str | dict[str, str], *, jinja: bool = True) -> Any:
    """Saves transformers' tokenizer, of one token a byte and the case's special ones, to `folder`; returns it."""
    special = list(dict.fromkeys(t for t in (case.bos, case.eos, *case.stop) if t))
    vocab = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    named = {"eos_token": case.eos} | ({"bos_token": case.bos} if case.bos else {})
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=text, **named)
    theirs.save_pretrained(folder, save_jinja_files=jinja)
    stop = [vocab[t] for t in (case.eos, *case.stop)]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    return theirs


@pytest.fixture(params=CASES)
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any, Tokenizer]:
    name = request.param
    theirs = write(tmp_path, CASES[name], template(name))
    return name, theirs, Tokenizer.from_directory(tmp_path)


def learned(example: Example, tokenizer: Tokenizer) -> list[str]:
    """The text of each unbroken run of learned tokens."""
    runs: list[list[int]] = []
    for k, (i, learn) in enumerate(zip(example.ids, example.learned, strict=True)):
        if learn and not example.learned[k - 1]:
            runs.append([])
        if learn:
            runs[-1].append(i)
    return [tokenizer.decode(run, special=True) for run in runs]


def compare(theirs: Any, ours: Tokenizer, chat: dict[str, Any]) -> str | None:
    """Renders `chat` in both, with and without a prompt for the answer; returns the error, where both refuse it."""
    error = None
    for prompt in (False, True):
        try:
            want = theirs.apply_chat_template(
                chat["messages"], **_given(chat), tokenize=False, add_generation_prompt=prompt
            )
        except Exception as e:
            error = str(e)
            with pytest.raises(ValueError) as ours_too:
                ours.render(chat["messages"], **_given(chat), prompt=prompt)
            assert error and error in str(ours_too.value)
        else:
            assert ours.render(chat["messages"], **_given(chat), prompt=prompt) == want
    return error


def _given(chat: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in chat.items() if key != "messages"}


# ---- the same text and the same refusals ----
def test_every_family_writes_what_transformers_writes(both: tuple[str, Any, Tokenizer]) -> None:
    name, theirs, ours = both
    refused = {kind for kind, chat in CHATS.items() if compare(theirs, ours, chat) is not None}
    own = set(CASES[name].refuses)
    if name not in ("chatml_tools", "llama3", "mistral_v3"):  # the others do not know calls without a text
        refused -= {"tool call", "tools in two turns"}
        own -= {"tool call", "tools in two turns"}
    assert refused == own


def test_smollm2_writes_what_transformers_writes(smollm2_files: Path) -> None:
    theirs, ours = transformers.AutoTokenizer.from_pretrained(smollm2_files), Tokenizer.from_directory(smollm2_files)
    texts = [kind for kind in CHATS if "tool call" not in kind and "two turns" not in kind]
    assert [compare(theirs, ours, CHATS[kind]) for kind in texts] == [None] * len(texts)
    for kind in texts:
        ids = theirs.apply_chat_template(CHATS[kind]["messages"], return_dict=False)
        asked = theirs.apply_chat_template(CHATS[kind]["messages"], return_dict=False, add_generation_prompt=True)
        [example] = render([CHATS[kind]], ours, 512)
        assert list(example.ids) == ids and prompt_ids(ours, CHATS[kind]["messages"]) == asked


@pytest.mark.parametrize(
    ("name", "chat", "sentence"),
    [
        ("gemma2", "system", "System role not supported"),
        ("gemma3", "two questions", "Conversation roles must alternate user/assistant/user/assistant/..."),
        ("llama2", "two questions", "Conversation roles must alternate user/assistant/user/assistant/..."),
        ("mistral_v3", "two questions", "After the optional system message, conversation roles must alternate"),
    ],
)
def test_a_refusal_is_in_the_templates_own_words_and_names_the_row(
    name: str, chat: str, sentence: str, tmp_path: Path
) -> None:
    theirs = write(tmp_path, CASES[name], template(name))
    ours = Tokenizer.from_directory(tmp_path)
    assert sentence in (compare(theirs, ours, CHATS[chat]) or "")
    with pytest.raises(ValueError) as refused:
        render([CHATS["plain"], CHATS[chat]], ours, 4096)
    assert str(refused.value).startswith("row 1: ") and sentence in str(refused.value)


def test_llama3_writes_todays_date_or_the_one_it_is_given(tmp_path: Path) -> None:
    theirs = write(tmp_path, CASES["llama3"], template("llama3"))
    ours = Tokenizer.from_directory(tmp_path)
    messages = CHATS["plain"]["messages"]
    assert f"Today Date: {datetime.now():%d %b %Y}\n" in ours.render(messages)
    given: dict[str, Any] = {"date_string": "1 Apr 2031"}
    assert ours.render(messages, **given) == theirs.apply_chat_template(messages, tokenize=False, **given)


PIECES = {
    "json": "{{ tools | tojson }}{{ tools | tojson(indent=2) }}{{ tools[0] | tojson(sort_keys=true) }}",
    "separators": "{{ tools | tojson(separators=(',', ':')) }}{{ tools | tojson(ensure_ascii=true) }}",
    "not given": "{{ documents is defined }}{{ documents is none }}{{ pad_token is defined }}{{ unk_token }}|",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "scope": "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{% endgeneration %}{{ a }}",
    "spaces": "  {% if true %}\n x\n  {%- endif %}  \n\n{% generation %}\n y\n{% endgeneration %}\nz",
    "namespace": "{% set ns = namespace(n=1) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "dict": "{{ dict(a=1) }}{{ namespace({'a': 2}).a }}",
    "date": "{{ strftime_now('%Y') }}{{ strftime_now(format='%m') }}",
    "none": "{% for m in messages %}{{ m.keys() | list }}{{ m.content is defined }}{% endfor %}",
    "undefined": "{{ nothing.at.all }}",
    "joined": "{{ pad_token + 'a' }}",
    "refused": "{{ raise_exception('Not \"this\": ' ~ messages | length) }}",
    "not a template": "{% for m in messages %}{{ m.role }}",
}


@pytest.mark.parametrize("text", PIECES.values(), ids=PIECES.keys())
def test_what_templates_use_is_what_transformers_gives_them(text: str, tmp_path: Path) -> None:
    theirs = write(tmp_path, CASES["phi4"], text)
    error = compare(theirs, Tokenizer.from_directory(tmp_path), CHATS["tool call"])
    if error is None:
        assert text not in (PIECES["refused"], PIECES["joined"])


# ---- where templates lie ----
SEVERAL = {"default": "command_r", "tool_use": "command_r_tools"}


@pytest.mark.parametrize("jinja", [True, False], ids=["files", "config"])
def test_of_several_templates_the_one_for_tools_is_taken_where_there_are_tools(jinja: bool, tmp_path: Path) -> None:
    several = {name: template(file) for name, file in SEVERAL.items()}
    theirs = write(tmp_path, CASES["command_r"], several, jinja=jinja)
    assert (tmp_path / "additional_chat_templates/tool_use.jinja").is_file() == jinja
    ours = Tokenizer.from_directory(tmp_path)
    documents = [{"title": "Sky", "text": "It is blue."}, {"title": "é", "text": "日本"}]
    plain, tools = CHATS["system"], CHATS["tools"]
    for chat in (plain, tools, tools | {"tools": []}, tools | {"documents": documents}):
        assert compare(theirs, ours, chat) is None
    assert "## Available Tools" in ours.render(tools["messages"], tools=tools["tools"])
    (tmp_path / "again").mkdir()
    ours.save(tmp_path / "again")
    again = Tokenizer.from_directory(tmp_path / "again")
    assert again.chat_template == ours.chat_template == several
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert compare(read, ours, tools) is None


def test_a_file_of_its_own_goes_before_the_config(tmp_path: Path) -> None:
    write(tmp_path, CASES["phi4"], "from the config", jinja=False)
    assert Tokenizer.from_directory(tmp_path).render([user("a")]) == "from the config"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.from_directory(tmp_path).render([user("a")]) == "from the file"


def test_several_templates_without_a_default_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, CASES["phi4"], {"tool_use": "a", "rag": "b"})
    ours = Tokenizer.from_directory(tmp_path)
    assert ours.render([user("a")], tools=[TOOL]) == "a"
    with pytest.raises(ValueError, match=r"it has \['rag', 'tool_use'\], none of them the default"):
        ours.render([user("a")])


# ---- what is learned ----
def answers(messages: Sequence[dict[str, Any]], case: Case) -> list[str]:
    said = [m["content"] for m in messages if m["role"] == "assistant" and m.get("content")]
    return [case.turn.format(text.strip() if case.strips else text) for text in said]


def test_of_every_family_the_answers_and_their_stop_are_learned(both: tuple[str, Any, Tokenizer]) -> None:
    name, theirs, ours = both
    case = CASES[name]
    for kind in ("plain", "system", "turns", "unanswered", "unicode", "two questions", "tools"):
        if kind in case.refuses:
            continue
        if kind in case.moves:
            with pytest.raises(ValueError, match="row 0: .* otherwise once it is answered or followed by others"):
                render([CHATS[kind]], ours, 8192)
            continue
        [example] = render([CHATS[kind]], ours, 8192)
        assert learned(example, ours) == answers(CHATS[kind]["messages"], case), kind
        assert list(example.ids) == theirs.apply_chat_template(
            CHATS[kind]["messages"], **_given(CHATS[kind]), return_dict=False
        )


@pytest.mark.parametrize("name", ["chatml_tools", "llama3", "mistral_v3"])
def test_calls_of_tools_are_learned_as_the_template_writes_them(name: str, tmp_path: Path) -> None:
    write(tmp_path, CASES[name], template(name))
    ours = Tokenizer.from_directory(tmp_path)
    call, answer = learned(render(read_rows([CHATS["tool call"]]), ours, 8192)[0], ours)
    assert '"name": "weather"' in call and '"city": "Zürich"' in call and call.endswith(CASES[name].eos)
    assert [answer] == answers(CHATS["tool call"]["messages"], CASES[name])
    if CASES[name].moves:
        with pytest.raises(ValueError, match="row 0: .* writes turn 1 otherwise once it is answered or followed"):
            render([CHATS["tools in two turns"]], ours, 8192)
    else:
        assert len(learned(render([CHATS["tools in two turns"]], ours, 8192)[0], ours)) == 3


def test_generation_blocks_say_what_is_learned(tmp_path: Path) -> None:
    theirs = write(tmp_path, CASES["generation"], template("generation"))
    ours = Tokenizer.from_directory(tmp_path)
    row = CHATS["turns"]  # the last answer alone follows an empty thought, which no comparison of prefixes allows
    want = theirs.apply_chat_template(row["messages"], return_assistant_tokens_mask=True, return_dict=True)
    [example] = render([row], ours, 4096)
    assert list(example.ids) == want["input_ids"]
    assert [int(flag) for flag in example.learned] == want["assistant_masks"]
    with pytest.raises(ValueError, match="row 0: .*generation blocks stand inside each other"):
        ours.chat_template = "{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}"
        render([row], ours, 4096)


def test_tools_of_a_row_reach_generation(tmp_path: Path) -> None:
    write(tmp_path, CASES["chatml_tools"], template("chatml_tools"))
    ours = Tokenizer.from_directory(tmp_path)
    row = CHATS["tool call"]
    [example] = render([row], ours, 4096)
    asked = prompt_ids(ours, prompt_of(row))
    assert list(example.ids[: len(asked)]) == asked and "# Tools" in ours.decode(asked)
    assert reference_of(row) == "Grey." and reference_of({"messages": ASKED}) == ""


@pytest.mark.parametrize("bad", [{"tools": "weather"}, {"tools": ["weather"]}, {"documents": {"title": "a"}}])
def test_tools_that_are_no_objects_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="row 0: '(tools|documents)' must be a list of objects"):
        read_rows([CHATS["plain"] | bad])


# ---- the sandbox ----
ESCAPES = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "subclasses": "{{ dict.__subclasses__() }}",
    "mro": "{{ namespace.mro() }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "helper": "{{ raise_exception.__globals__['os'].system('true') }}",
    "writes a list": "{{ messages.append(1) }}",
    "writes a dict": "{{ messages[0].update(role='system') }}",
    "writes by a set": "{% set messages[0].role = 'system' %}",
    "callable namespace": "{% set ns = namespace() %}{% set ns.__call__ = 1 %}{{ ns() }}",
    "named callable": "{{ namespace(**{'__call__': 1}) }}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
    "endless": "{% for i in range(10**9) %}{{ i }}{% endfor %}",
}


@pytest.mark.parametrize("text", ESCAPES.values(), ids=ESCAPES.keys())
def test_a_template_reaches_nothing_and_changes_nothing(text: str) -> None:
    messages = [user("a")]
    with pytest.raises(ValueError, match="unsafe|may not set|no loader|Range too big|syntax|expected|undefined"):
        print(render_template(text, messages))
    assert messages == [user("a")]


def test_format_strings_reach_nothing() -> None:
    assert render_template("{{ '{0.__class__}{0.__init__}'.format(messages) }}", [user("a")]) == ""
