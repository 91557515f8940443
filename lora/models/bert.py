"""BERT and RoBERTa: encoders that see a whole row at once, with a class head where config.json has one.

    x = norm(word(ids) + position(p) + type(t))
    each layer   x = norm(x + dense(attention(query(x), key(x), value(x))))        attention looks both ways
                 x = norm(x + dense(gelu(dense(x))))
    BERT       logits = classifier(tanh(pooler(x[:, 0])))
    RoBERTa    logits = out_proj(tanh(dense(x[:, 0]))),  p from pad_token_id + 1 on
    embed      the mean of x over the real tokens, of length 1

Heads that are read: classes of a row ("...ForSequenceClassification").  Those of pre-training (`cls.*`, `lm_head.*`)
are dropped.  A row pushed to the right by padding keeps its positions: they count real tokens.

The model's own dropout (hidden_dropout_prob, attention_probs_dropout_prob, classifier_dropout) is never applied, not
even in training: this is for fine-tuning with adapters, which have a dropout of their own.

Source: arXiv:1810.04805, arXiv:1907.11692, arXiv:1908.10084 (embed); numbers equal transformers' BertModel,
RobertaModel and their ForSequenceClassification.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lora.layer import together
from lora.models.base import Model, ints, new_embedding
from lora.models.gpt2 import ACTIVATIONS
from lora.models.tokenizer import Tokenizer

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
_OLD = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # names of TensorFlow's files


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
        ints(c, _SIZES)
        for key in _SIZES:
            if type(c[key]) is not int or c[key] < 1:
                raise ValueError(f"config.json says {key}={c[key]!r}, which must be a whole number above 0")
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


class Embeddings(nn.Module):
    def __init__(self, c: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = new_embedding(c.vocab_size, c.hidden_size)
        self.position_embeddings = new_embedding(c.positions, c.hidden_size)
        self.token_type_embeddings = new_embedding(c.types, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, c.eps)

    def forward(self, ids: Tensor, positions: Tensor, types: Tensor) -> Tensor:
        x = self.word_embeddings(ids) + self.token_type_embeddings(types) + self.position_embeddings(positions)
        return self.LayerNorm(x)


class SelfAttention(nn.Module):
    def __init__(self, c: BertConfig) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        self.query = nn.Linear(c.hidden_size, c.hidden_size)
        self.key = nn.Linear(c.hidden_size, c.hidden_size)
        self.value = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        B, T, d = x.shape
        q, k, v = together(x, self.query, self.key, self.value)
        q, k, v = (t.view(B, T, -1, self.head_dim).transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.transpose(1, 2).reshape(B, T, d)


class Output(nn.Module):
    """The end of each half of a layer: norm(residual + dense(x))."""

    def __init__(self, n_in: int, c: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(n_in, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, c.eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(residual + self.dense(x))


class Attention(nn.Module):
    def __init__(self, c: BertConfig) -> None:
        super().__init__()
        self.self = SelfAttention(c)
        self.output = Output(c.hidden_size, c)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.output(self.self(x, mask), x)


class Intermediate(nn.Module):
    def __init__(self, c: BertConfig) -> None:
        super().__init__()
        self.dense, self.act = nn.Linear(c.hidden_size, c.intermediate_size), ACTIVATIONS[c.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.dense(x))


class Block(nn.Module):
    def __init__(self, c: BertConfig) -> None:
        super().__init__()
        self.attention = Attention(c)
        self.intermediate = Intermediate(c)
        self.output = Output(c.intermediate_size, c)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)


class Blocks(nn.Module):
    def __init__(self, c: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Block(c) for _ in range(c.num_layers))


class Pooler(nn.Module):
    """tanh(dense(h[:, 0])), h (B, T, d) -> (B, d)."""

    def __init__(self, c: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh(self.dense(h[:, 0]))


class RobertaHead(nn.Module):
    """out_proj(tanh(dense(h[:, 0]))), h (B, T, d) -> (B, n)."""

    def __init__(self, c: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(c.hidden_size, c.hidden_size)
        self.out_proj = nn.Linear(c.hidden_size, len(c.labels))

    def forward(self, h: Tensor) -> Tensor:
        return self.out_proj(torch.tanh(self.dense(h[:, 0])))


class Layers(nn.Module):
    """What checkpoints call `bert` or `roberta`: the embeddings, the blocks and, in some, a pooler."""

    pooler: Pooler | None

    def __init__(self, c: BertConfig, pooler: bool) -> None:
        super().__init__()
        self.embeddings = Embeddings(c)
        self.encoder = Blocks(c)
        self.pooler = Pooler(c) if pooler else None


class Encoder(Model):
    """A BERT or RoBERTa, its own dropout left out.

    Call it with token ids (B, T) for class logits (B, n), or, where it has no head, for its states (B, T, d).
    """

    config: BertConfig
    prefix: ClassVar[str]  # of the encoder's parameters in the files of models with a head
    class_heads: ClassVar[tuple[str, ...]] = ("classifier", "pooler")  # trained whole or not at all
    dropped: ClassVar[tuple[str, ...]]  # heads of pre-training

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config, self.new_std = config, config.init_std
        if config.fresh:
            self.new = ("classifier.", self.prefix + "pooler.")

    @property
    def peft_task(self) -> str | None:
        """peft's name for what the model is for."""
        return "SEQ_CLS" if self.config.labels else None

    def layers(self) -> Layers:
        raise NotImplementedError

    def embedding(self) -> nn.Module:
        """The layer from token ids to states."""
        return self.layers().embeddings.word_embeddings

    def classify(self, h: Tensor) -> Tensor:
        """Class logits (B, n) of states (B, T, d)."""
        raise NotImplementedError

    def hidden(self, ids: Tensor, padding: Tensor | None = None, token_types: Tensor | None = None) -> Tensor:
        """The last states (B, T, d) of token ids (B, T) int64.

        `padding` (B, T) bool marks real tokens, wherever they stand in the row; None: all are.  `token_types` (B, T)
        int64 numbers the text that a token is of; None: all 0.  States at padding mean nothing.

        Raises ValueError where the row is longer than the model was built for.
        """
        B, T = ids.shape
        if self.config.max_length < T:
            raise ValueError(f"{T} tokens in a row, and this model was built for {self.config.max_length}")
        layers, mask = self.layers(), None
        if padding is None:
            positions = torch.arange(T, device=ids.device)[None] + self.config.first
        else:
            positions = (padding.cumsum(dim=1) - 1).clamp(min=0) + self.config.first
            mask = padding[:, None, None, :]
            mask = mask | ~mask.any(dim=-1, keepdim=True)  # softmax over nothing is NaN
        types = torch.zeros_like(ids) if token_types is None else token_types
        x = layers.embeddings(ids, positions, types)
        for block in layers.encoder.layer:
            x = block(x, mask)
        return x

    def forward(self, ids: Tensor, padding: Tensor | None = None, token_types: Tensor | None = None) -> Tensor:
        h = self.hidden(ids, padding, token_types)
        return self.classify(h) if self.config.labels else h

    def embed(self, ids: Tensor, padding: Tensor | None = None, token_types: Tensor | None = None) -> Tensor:
        """A vector of length 1 a row, (B, d) float32: the mean of the states of its real tokens, as all-MiniLM has it.

        The dot product of two is their cosine.  Arguments are those of `hidden`.
        """
        h = self.hidden(ids, padding, token_types).float()
        real = torch.ones_like(ids, dtype=torch.bool) if padding is None else padding
        total = (h * real[:, :, None]).sum(dim=1)  # its direction is that of the mean
        return nn.functional.normalize(total / real.sum(dim=1, keepdim=True).clamp(min=1), dim=-1)

    def read(self, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        if name.startswith(self.dropped):
            return None
        for old, today in _OLD.items():
            if name.endswith(old):
                name = name.removesuffix(old) + today
        if name.startswith(("embeddings.", "encoder.", "pooler.")):  # written by the model without a head
            name = self.prefix + name
        if name.endswith(".token_type_ids") or (name.startswith(self.prefix + "pooler.") and not self.layers().pooler):
            return None
        head = name.startswith("classifier.") and not name.startswith("classifier.dense.")
        if head and self.config.fresh and tensor.shape[:1] != (len(self.config.labels),):
            return None  # a head for other classes
        return name, tensor

    def write(self, name: str, tensor: Tensor) -> tuple[str, Tensor]:
        return (name if self.config.labels else name.removeprefix(self.prefix)), tensor

    def without(self, missing: Sequence[str]) -> list[str]:
        pooler = {f"{self.prefix}pooler.dense.{leaf}" for leaf in ("weight", "bias")}
        if self.config.labels or not pooler <= set(missing):
            return list(missing)
        self.layers().pooler = None  # nothing here reads it
        return [name for name in missing if name not in pooler]


class Bert(Encoder):
    """A BERT; see `Encoder`."""

    prefix = "bert."
    dropped = ("cls.",)

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = Layers(config, pooler=True)
        if config.labels:
            self.classifier = nn.Linear(config.hidden_size, len(config.labels))

    def layers(self) -> Layers:
        return self.bert

    def classify(self, h: Tensor) -> Tensor:
        assert self.bert.pooler is not None
        return self.classifier(self.bert.pooler(h))


class Roberta(Encoder):
    """A RoBERTa; see `Encoder`."""

    prefix = "roberta."
    dropped = ("lm_head.",)

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.roberta = Layers(config, pooler=not config.labels)
        if config.labels:
            self.classifier = RobertaHead(config)

    def layers(self) -> Layers:
        return self.roberta

    def classify(self, h: Tensor) -> Tensor:
        return self.classifier(h)


def encode(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    seconds: Sequence[str] | None = None,
    *,
    length: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of texts, or of pairs of texts, as an encoder reads it: ids int64, real tokens bool, types int64, (B, T).

    Rows get the special tokens of tokenizer.json ([CLS] ... [SEP]) and padding on the right.  With `length` a longer
    row is cut to as many tokens, its last one kept; else nothing is cut.
    """
    pairs = zip(texts, seconds if seconds is not None else [None] * len(texts), strict=True)
    rows = []
    for text, second in pairs:
        row = tokenizer.backend.encode(text, second)
        keep = list(range(len(row.ids)))
        if length is not None and len(keep) > length:
            keep = [*keep[: length - 1], keep[-1]]
        rows.append([(row.ids[i], row.type_ids[i]) for i in keep])
    T = max(map(len, rows))
    pad = tokenizer.pad or 0  # never looked at: it is masked
    both = torch.tensor([row + [(pad, 0)] * (T - len(row)) for row in rows])  # (B, T, 2)
    real = torch.arange(T)[None] < torch.tensor([len(row) for row in rows])[:, None]
    return both[..., 0].to(device), real.to(device), both[..., 1].to(device)
