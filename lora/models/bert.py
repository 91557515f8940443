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

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora.layer import together
from lora.models.base import Model, new_embedding
from lora.models.bert_config import BertConfig
from lora.models.gpt2 import ACTIVATIONS
from lora.models.tokenizer import Tokenizer

_OLD = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # names of TensorFlow's files


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
