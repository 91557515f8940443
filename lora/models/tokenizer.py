"""Text to ids and back, and chats to text: a `tokenizers` tokenizer with its special tokens and chat template.

Chat templates are Jinja2, run in a sandbox with the helpers that published templates use (raise_exception,
strftime_now, tojson, loop controls).  Source: transformers 5, utils/chat_template_utils.py.
"""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from lora.files import read_json


class Tokenizer:
    """ids <-> text with a model's own vocabulary.

    `stop` are the ids that end a text; `eos` the one that training appends.
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
        chat_template: str | None = None,
        source: str = "tokenizer",
    ) -> None:
        backend.no_truncation()  # files switch both on at times; a row is never cut in silence
        backend.no_padding()
        self.backend, self.source, self.chat_template = backend, source, chat_template
        self.bos, self.eos, self.pad = self._id(bos, "bos"), self._id(eos, "eos"), self._id(pad, "pad")
        self.tokens = {"bos_token": bos or "", "eos_token": eos or "", "pad_token": pad or ""}
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
        """ids of `text`; with `special`, the beginning-of-text token in front where this model uses one."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [self.bos, *ids] if special and self.add_bos and self.bos is not None else ids

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

    def render(self, messages: Sequence[dict[str, Any]], *, prompt: bool = False, **variables: Any) -> str:
        """A chat as the model's own text; with `prompt`, ready for the assistant to answer.

        Raises ValueError where the model has no chat template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError(f"{self.source} has no chat template; use prompt and completion rows, or another model")
        try:
            template = _environment().from_string(self.chat_template)
            return template.render(messages=messages, add_generation_prompt=prompt, **self.tokens, **variables)
        except jinja2.TemplateError as e:
            raise ValueError(f"the chat template of {self.source} does not take these messages: {e}") from None

    @classmethod
    def from_directory(cls, folder: Path) -> "Tokenizer":
        """From tokenizer.json, tokenizer_config.json, generation_config.json and chat_template.jinja."""
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
        template = config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = next((t["template"] for t in template if t.get("name") == "default"), None)
        if (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        stop = _optional(folder / "generation_config.json").get("eos_token_id")
        stop = stop if isinstance(stop, list) else [] if stop is None else [stop]
        return cls(
            backend,
            **tokens,
            add_bos=bool(config.get("add_bos_token")),
            stop=stop,
            chat_template=template,
            source=str(folder),
        )

    def save(self, folder: Path) -> None:
        """Writes the files that `from_directory` reads."""
        self.backend.save(str(folder / "tokenizer.json"))
        config: dict[str, Any] = {key: token for key, token in self.tokens.items() if token}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": self.add_bos}
        config |= {"clean_up_tokenization_spaces": False}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")
        ids = {"bos_token_id": self.bos, "eos_token_id": list(self.stop), "pad_token_id": self.pad}
        ids = {key: value for key, value in ids.items() if value not in (None, [])}
        (folder / "generation_config.json").write_text(json.dumps(ids, indent=1) + "\n")


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)  # Jinja's own escapes HTML

    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return env
