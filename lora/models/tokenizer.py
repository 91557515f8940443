"""Text to ids and back, and chats to text: a `tokenizers` tokenizer with its special tokens and chat template.

Where the files lie, and which of several chat templates is taken: as transformers 5, tokenization_utils_base.py.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from lora.files import read_json
from lora.models.chat_template import render_generated, render_template


class Tokenizer:
    """ids <-> text with a model's own vocabulary.

    `stop` are the ids that end a text; `eos` the one that training appends.  `chat_template` is one template, or
    several by name: "tool_use" is for chats with tools, "default" for the others.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
        add_bos: bool = False,
        stop: Sequence[int] = (),
        chat_template: str | dict[str, str] | None = None,
        source: str = "tokenizer",
    ) -> None:
        backend.no_truncation()  # files switch both on at times; a row is never cut in silence
        backend.no_padding()
        self.backend, self.source, self.chat_template = backend, source, chat_template
        self.bos, self.eos, self.pad = self._id(bos, "bos"), self._id(eos, "eos"), self._id(pad, "pad")
        named = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
        self.tokens = {key: token for key, token in named.items() if token is not None}
        self.stop = tuple(dict.fromkeys([*([] if self.eos is None else [self.eos]), *stop]))
        template_bos = self.bos is not None and backend.encode("a").ids[:1] == [self.bos]
        self.add_bos = template_bos or (add_bos and self.bos is not None)

    def _id(self, token: str | None, role: str) -> int | None:
        if token is None:
            return None
        found = self.backend.token_to_id(token)
        if found is None:
            raise ValueError(f"{self.source}: the {role} token {token!r} is not in the vocabulary")
        return found

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """ids of `text`; with `special`, the beginning-of-text token in front where this model uses one, and
        where the text does not write it out itself."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        wanted = special and self.add_bos and self.bos is not None and ids[:1] != [self.bos]
        return [self.bos, *ids] if wanted and self.bos is not None else ids

    def encode_on(self, text: str) -> list[int]:
        """ids of `text` as the continuation of another, without the space that some tokenizers put before a text."""
        first = self.backend.encode("a", add_special_tokens=False).tokens[:1]
        if first and first[0].startswith("\u2581"):
            line = self.encode("\n", special=False)
            both = self.encode("\n" + text, special=False)
            if both[: len(line)] == line:
                return both[len(line) :]
        return self.encode(text, special=False)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of `ids`; special tokens are left out unless asked for."""
        return self.backend.decode(list(ids), skip_special_tokens=not special)

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        prompt: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        documents: Sequence[dict[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """A chat as the model's own text; with `prompt`, ready for the assistant to answer.

        `tools` are JSON schemas, `documents` have a title and a text; a template that knows neither leaves them out.
        Raises ValueError where the model has no chat template, or the template refuses the messages.
        """
        given = {"tools": tools, "documents": documents, "add_generation_prompt": prompt} | self.tokens | variables
        return self._templated(render_template, messages, given)

    def render_generated(
        self, messages: Sequence[dict[str, Any]], **given: Any
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """`render`, and where in it the template's own generation blocks stand; None where it has none."""
        given = {"tools": None, "documents": None, "add_generation_prompt": False} | self.tokens | given
        return self._templated(render_generated, messages, given)

    def _templated(self, write: Callable[..., Any], messages: Sequence[dict[str, Any]], given: dict[str, Any]) -> Any:
        template = self.chat_template
        if isinstance(template, dict):
            template = template.get("tool_use" if "tool_use" in template and given["tools"] is not None else "default")
        if template is None:
            names = f"; it has {sorted(self.chat_template)}, none of them the default" if self.chat_template else ""
            raise ValueError(
                f"{self.source} has no chat template{names}; use prompt and completion rows, or another model"
            )
        try:
            return write(template, messages, **given)
        except ValueError as e:
            raise ValueError(f"the chat template of {self.source} does not take these messages: {e}") from None

    @classmethod
    def from_directory(cls, folder: Path) -> "Tokenizer":
        """From tokenizer.json, tokenizer_config.json, generation_config.json, and the chat templates in
        tokenizer_config.json, or before it chat_template.jinja and additional_chat_templates/<name>.jinja."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no tokenizer.json; a slow tokenizer must be converted first")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises a bare Exception
            raise ValueError(f"{path} is not a tokenizer ({e}); the file is damaged or cut short") from None
        config = _optional(folder / "tokenizer_config.json") | {}
        specials = _optional(folder / "special_tokens_map.json")
        tokens = {k: _content(config.get(f"{k}_token", specials.get(f"{k}_token"))) for k in ("bos", "eos", "pad")}
        stop = _optional(folder / "generation_config.json").get("eos_token_id")
        stop = stop if isinstance(stop, list) else [] if stop is None else [stop]
        return cls(
            backend,
            **tokens,
            add_bos=bool(config.get("add_bos_token")),
            stop=stop,
            chat_template=_chat_template(folder, config),
            source=str(folder),
        )

    def save(self, folder: Path) -> None:
        """Writes the files that `from_directory` reads."""
        self.backend.save(str(folder / "tokenizer.json"))
        config: dict[str, Any] = self.tokens | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.add_bos,
        }
        config |= {"clean_up_tokenization_spaces": False}
        template = self.chat_template
        if isinstance(template, dict):
            config["chat_template"] = [{"name": name, "template": text} for name, text in template.items()]
        elif template is not None:
            config["chat_template"] = template
        text = json.dumps(config, indent=1, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
        ids = {"bos_token_id": self.bos, "eos_token_id": list(self.stop), "pad_token_id": self.pad}
        ids = {key: value for key, value in ids.items() if value not in (None, [])}
        (folder / "generation_config.json").write_text(json.dumps(ids, indent=1) + "\n")


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _chat_template(folder: Path, config: dict[str, Any]) -> str | dict[str, str] | None:
    """One template, or several by name; those in files of their own go before those in the config."""
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    found: Any = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    if not found:
        found = config.get("chat_template")
    if isinstance(found, list):
        found = {t["name"]: t["template"] for t in found}
    return found["default"] if isinstance(found, dict) and list(found) == ["default"] else found
