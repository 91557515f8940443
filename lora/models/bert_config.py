"""What config.json says of a BERT or a RoBERTa, read, checked and written again; the model is in bert.py."""

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from lora.models.base import counts
from lora.models.gpt2 import ACTIVATIONS

if TYPE_CHECKING:
    from lora.models.bert import Encoder

_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "type_vocab_size",
)
_BARE = ("Model", "ForMaskedLM", "ForPreTraining", "ForNextSentencePrediction")
_CLASSES = "ForSequenceClassification"


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Shapes and constants. `dropouts` and `problem` are carried from file to file and change nothing here.

    `labels` are the names of the classes; empty: no head.  `fresh` marks a head that the file is not asked for.
    """

    model_type: ClassVar[str] = "bert"
    family: ClassVar[str] = "Bert"  # how transformers' classes begin

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    positions: int
    types: int = 2
    pad: int = 0
    eps: float = 1e-12
    activation: str = "gelu"
    init_std: float = 0.02
    labels: tuple[str, ...] = ()
    problem: str | None = None
    dropouts: tuple[float | None, float | None, float | None] = (0.1, 0.1, None)  # states, attention, before the head
    fresh: bool = dataclasses.field(default=False, compare=False)

    @classmethod
    def from_json(cls, c: dict[str, Any]) -> Self:
        """From config.json. Raises ValueError naming a key that is missing or wrong, or a setting without a place."""
        c = {"max_position_embeddings": 512, "type_vocab_size": 2} | c
        counts(c, _SIZES)
        d, heads = c["hidden_size"], c["num_attention_heads"]
        if d % heads:
            raise ValueError(f"config.json says hidden_size={d}, which num_attention_heads={heads} does not divide")
        eps, std = c.get("layer_norm_eps", 1e-12), c.get("initializer_range", 0.02)
        for key, value in (("layer_norm_eps", eps), ("initializer_range", std)):
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"config.json says {key}={value!r}, which must be a number from 0 on")
        activation = c.get("hidden_act", "gelu")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"config.json asks for hidden_act={activation!r}; {cls.model_type} has {', '.join(ACTIVATIONS)}"
            )
        for key, fine in (("is_decoder", False), ("add_cross_attention", False)):
            if c.get(key, fine) != fine:
                raise ValueError(f"config.json asks for {key}; {cls.model_type} is read as an encoder only")
        if c.get("position_embedding_type", "absolute") != "absolute":
            raise ValueError(
                f"config.json asks for position_embedding_type={c['position_embedding_type']!r}; "
                f"{cls.model_type} has 'absolute'"
            )
        states, attention, head = c.get(_DROPOUTS[0], 0.1), c.get(_DROPOUTS[1], 0.1), c.get(_DROPOUTS[2])
        return cls(
            vocab_size=c["vocab_size"],
            hidden_size=d,
            intermediate_size=c["intermediate_size"],
            num_layers=c["num_hidden_layers"],
            num_heads=heads,
            positions=c["max_position_embeddings"],
            types=c["type_vocab_size"],
            pad=cls._pad(c),
            eps=eps,
            activation=activation,
            init_std=float(std),
            labels=cls._labels(c),
            problem=c.get("problem_type"),
            dropouts=(states, attention, head),
        )

    @classmethod
    def _pad(cls, c: dict[str, Any]) -> int:
        """BERT's positions do not depend on the padding token, so files may say none."""
        pad = c.get("pad_token_id")
        return pad if type(pad) is int and pad >= 0 else 0

    @classmethod
    def _labels(cls, c: dict[str, Any]) -> tuple[str, ...]:
        """Names of the classes, () for a model without a head."""
        made = (c.get("architectures") or [cls.family + "Model"])[0]
        kind = str(made).removeprefix(cls.family)
        if kind in _BARE:
            return ()
        if kind != _CLASSES:
            known = ", ".join(cls.family + end for end in (*_BARE, _CLASSES))
            raise ValueError(f"config.json says architectures={made!r}; there are {known}")
        names = c.get("id2label")
        if names is None:
            return _names(c.get("num_labels", 2))
        if not isinstance(names, dict) or {str(i) for i in range(len(names))} != {str(key) for key in names}:
            raise ValueError(f"config.json says id2label={names!r}, which must name the classes 0, 1, 2, ...")
        names = {str(key): str(value) for key, value in names.items()}
        return tuple(names[str(i)] for i in range(len(names)))

    def with_labels(self, count: int) -> Self:
        """The same with a head for `count` classes; where the file's has another number, the file's is not used."""
        names = _names(count)
        return dataclasses.replace(self, labels=self.labels if len(self.labels) == count else names, fresh=True)

    def to_json(self) -> dict[str, Any]:
        """config.json that transformers 4 and 5 both read."""
        out = {
            "architectures": [self.family + (_CLASSES if self.labels else "Model")],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "max_position_embeddings": self.positions,
            "type_vocab_size": self.types,
            "pad_token_id": self.pad,
            "bos_token_id": None,  # else the class's own, whatever the vocabulary
            "eos_token_id": None,
            "layer_norm_eps": self.eps,
            "hidden_act": self.activation,
            "initializer_range": self.init_std,
        } | dict(zip(_DROPOUTS, self.dropouts, strict=True))
        if self.labels:
            out |= {
                "id2label": {str(i): name for i, name in enumerate(self.labels)},
                "label2id": {name: i for i, name in enumerate(self.labels)},
                "problem_type": self.problem,
            }
        return out

    def build(self) -> "Encoder":
        """The model, its parameters not filled."""
        from lora.models.bert import Bert  # which imports this file

        return Bert(self)

    @property
    def max_length(self) -> int:
        """Tokens of the longest row."""
        return self.positions

    @property
    def first(self) -> int:
        """The position of a row's first token."""
        return 0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, kw_only=True)
class RobertaConfig(BertConfig):
    """As `BertConfig`; `pad` moves the positions, whose rows 0 to `pad` are no token's."""

    model_type: ClassVar[str] = "roberta"
    family: ClassVar[str] = "Roberta"

    @classmethod
    def _pad(cls, c: dict[str, Any]) -> int:
        pad = c.get("pad_token_id", 1)
        if type(pad) is not int or not 0 <= pad < c["max_position_embeddings"] - 1:
            raise ValueError(
                f"config.json says pad_token_id={pad!r}; roberta's positions begin behind it, so it must be a whole "
                f"number from 0 to {c['max_position_embeddings'] - 2}"
            )
        return pad

    def build(self) -> "Encoder":
        from lora.models.bert import Roberta

        return Roberta(self)

    @property
    def max_length(self) -> int:
        return self.positions - self.first

    @property
    def first(self) -> int:
        return self.pad + 1


def _names(count: Any) -> tuple[str, ...]:
    if type(count) is not int or count < 1:
        raise ValueError(f"{count!r} classes: a head needs a whole number of them, at least 1")
    return tuple(f"LABEL_{i}" for i in range(count))
