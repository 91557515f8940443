"""What a training step takes on a GPU, tensor by tensor, and what each block keeps so that it fits.

The account of fused.py's step, in bytes, for M tokens.  Over the step lie the kept states of the blocks and the
reused buffers; on top of them comes one of these moments, the largest of which makes the peak:
    forward    of a block: its states, W_o's output, y
    head       a chunk of logits, the states before it, their gradient
    backward   of a block: dy, what is fetched or made again, and dh (MLP), or dq, dk, dv and cuDNN's own (attention)
What a block keeps (fused.KEEPS): the last blocks "all", since their turn in the backward comes first, the others
"host", or "input_host" where two blocks' states are too much.  On an H100 with an 8B model a block kept whole saves
2.8 ms of 600 for 0.77 GiB, while "no_gate" saves 0.25 ms for 0.28 GiB: so blocks are kept whole or not at all.
Source: read off fused.py and fold.py; held to a dry run by the tests, to measured peaks by benchmarks/bench_plan.py.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora.kernels.cross_entropy import chunk_rows
from lora.kernels.documents import BLOCK
from lora.kernels.fold import ROOM
from lora.kernels.fold8 import room8
from lora.kernels.scratch import mine
from lora.layer import LoRALinear
from lora.models.decoded import Decoded
from lora.models.host import Host, host_room, stays

MARGIN = 0.03  # of the card, for what nobody counts: fragments, libraries' workspaces
SPARE = 1.1  # a graph is recorded where so many times its memory is free on the card
CUBLAS = 2 * 32 * 2**20  # its workspaces on Hopper: for the thread of the forward, and for that of the backward
LAYERS = (  # of a block, by the product that they share; Phi-3 stores two of them as one layer
    ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    ("o_proj",),
    ("gate_proj", "up_proj", "gate_up_proj"),
    ("down_proj",),
)


class Widths(NamedTuple):
    """Values a token of the parts of a block, and the number of blocks."""

    states: int
    qkv: int
    attended: int
    gate: int
    blocks: int
    heads: int = 1  # of queries
    vocab: int = 0  # logits a learned token
    ranks: tuple[int, ...] = (0, 0, 0, 0)  # summed over the layers of each product
    biased: tuple[bool, ...] = (False, False, False, False)
    turned: int = 0  # q and k behind norms of their own, where they have them
    behind: bool = False  # norms behind W_o and W_d
    documents: int = 0  # of a batch of packed rows

    @property
    def own(self) -> int:
        """Values that "host" sends away, and "all" keeps beside the gate: x, q k v, attention's output, s."""
        return (2 + self.behind) * self.states + self.qkv + self.turned + self.attended

    @property
    def rooms(self) -> list[int]:
        """Columns that updates and biases add to each product (fold.Group.room)."""
        return [-(-(r + b) // ROOM) * ROOM for r, b in zip(self.ranks, self.biased, strict=True)]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(N, K) of each product's weight."""
        D, Q, HD, F = self.states, self.qkv, self.attended, self.gate
        return [(Q, D), (D, HD), (2 * F, D), (D, F)]

    @property
    def factors(self) -> int:
        """Values of a block's low-rank factors, at least: a layer's own N counts each column of B."""
        D, Q, HD, F = self.states, self.qkv, self.attended, self.gate
        r = self.ranks
        return r[0] * (D + Q // 3) + r[1] * (D + HD) + r[2] * (D + F) + r[3] * (D + F)


def widths_of(config: Any, model: Any = None) -> Widths:
    """Of a model of Llama's blocks, with the ranks of its active adapters."""
    c = config
    qkv = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    biased = (c.attention_bias, c.output_bias, c.mlp_bias, c.mlp_bias)
    block: Any = model.model.layers[0] if model is not None else None
    behind = hasattr(block, "post_feedforward_layernorm")
    norm = getattr(getattr(block, "self_attn", None), "q_norm", None)
    normed = norm is not None and not isinstance(norm, nn.Identity)
    ranks = [0, 0, 0, 0]
    for block in model.model.layers if model is not None else ():
        mine = [0, 0, 0, 0]
        for name, layer in block.named_modules():
            if isinstance(layer, LoRALinear):
                which = next((i for i, names in enumerate(LAYERS) if name.rpartition(".")[2] in names), None)
                if which is not None:
                    mine[which] += sum(a.r for a in layer.on() if hasattr(a, "r"))
        ranks = [max(a, b) for a, b in zip(ranks, mine, strict=True)]
    return Widths(
        c.hidden_size, qkv, c.num_heads * c.head_dim, c.intermediate_size, c.num_layers, c.num_heads, c.vocab_size,
        tuple(ranks), biased, (c.num_heads + c.num_kv_heads) * c.head_dim if normed else 0, behind,
    )  # fmt: skip


# ---- the account ----
def kept_bytes(w: Widths, keep: str, M: int, itemsize: int) -> int:
    """On the GPU, of one block, from its forward to its backward."""
    whole = w.own + 2 * w.gate + w.rooms[2] + w.behind * w.states
    values = {"all": whole, "no_gate": w.own, "input": w.states}.get(keep, 0)
    rows = 0 if keep.startswith("input") else _rows(w)
    return M * (itemsize * (values + sum(w.ranks)) + rows)


def _rows(w: Widths) -> int:
    """Bytes a token of float32 numbers of a pass: attention's log-sums, the norms' r."""
    D = w.attended // w.heads
    return 4 * (w.heads + 2 + 2 * w.behind + w.turned // D)


def host_bytes(w: Widths, keep: str, M: int, itemsize: int) -> int:
    """In pinned memory of the host, of one block."""
    values = {"host": w.own, "input_host": w.states}.get(keep, 0)
    return M * itemsize * values


def reused_bytes(w: Widths, M: int, itemsize: int) -> int:
    """Buffers that one block after the other writes anew, and that stay."""
    g, shapes = w.rooms, w.shapes
    weight = max(max(N * (K + room), (N + room) * K) for (N, K), room in zip(shapes, g, strict=True))
    rows = max(K + room for (_, K), room in zip(shapes, g, strict=True))
    b = max(N * room for (N, _), room in zip(shapes, g, strict=True))
    behind = w.behind * (w.states + max(g[1], g[3]))
    return itemsize * (weight + b + M * (rows + w.states + g[1] + w.qkv + g[0] + behind))


def attention_bytes(w: Widths, M: int, itemsize: int) -> int:
    """Of attention's backward, inside cuDNN: dq in float32, and dk and dv of each query head before they are summed.

    In packed rows flash attention takes as much, and has room for a block of queries more for each document.
    """
    grouped, rows = w.qkv < 3 * w.attended, M + BLOCK * w.documents
    return 4 * rows * (w.attended + w.heads) + 2 * M * itemsize * w.attended * grouped


def _forward_bytes(w: Widths, keep: str, M: int, itemsize: int) -> int:
    """Beside what blocks before this one keep, and what is still being copied to the host."""
    states = max(kept_bytes(w, keep, M, itemsize), kept_bytes(w, "all", M, itemsize))
    return states + M * itemsize * w.states


def _leaving(words: list[str], word: str) -> list[str]:
    """What blocks before the next one sent and is still being copied, after one that keeps `word` (host.py)."""
    if not word.endswith("host"):
        return []
    waits = not stays([other == "host" for other in words], word == "host")
    return [word] if waits else [*words, word]


def logit_rows(w: Widths, itemsize: int, learned: int) -> int:
    """Rows of logits that are there at once."""
    return min(learned, chunk_rows(w.vocab, itemsize)) if w.vocab else 0


def head_bytes(w: Widths, M: int, itemsize: int, learned: int) -> int:
    """Beside what blocks keep: the last states, those that are learned from, their gradient, a chunk of logits."""
    rows = logit_rows(w, itemsize, learned)
    norm = 8 * M * w.states if w.behind else 4 * M  # the last norm: Gemma's keeps two float32 copies, others r
    return itemsize * (w.states * (M + 2 * learned + rows) + rows * w.vocab) + norm + 9 * learned


def _backward_bytes(w: Widths, keep: str, M: int, itemsize: int, last: bool, first: bool, attention: int) -> int:
    """Beside what this block and those before it keep; `last` and `first` of the forward."""
    D, Q, HD, F = w.states, w.qkv, w.attended, w.gate
    g, r = w.rooms, w.ranks
    gate = 2 * F + g[2]
    again = gate + w.behind * D  # and W_d's output, where a norm stands behind it
    there = {"all": 0, "no_gate": again, "input": w.own - D + again}.get(keep, w.own + again)
    ahead = 0 if first else {"host": w.own, "input_host": D}.get(keep, 0)  # of the block that is next
    dy = (0 if w.behind else D + g[3]) + (D if last or w.behind else 0)
    mlp = D + r[2] + r[3] - w.behind * D
    if w.behind and keep != "all":  # while W_d's output goes through its norm a second time
        mlp = max(mlp, D)
    turn = HD + r[1] + Q + w.turned - gate - w.behind * D
    end = D + (D + g[3]) + r[0] - gate - w.behind * D
    values = dy + there + ahead
    rows = _rows(w) if keep.startswith("input") else 0
    part = 4 * (r[3] * (D + F) + r[2] * F)  # gradients of factors in float32, as far as they are made then
    whole = 4 * w.factors
    most = max(itemsize * M * mlp + part, itemsize * M * turn + attention + whole, itemsize * M * end + whole)
    return itemsize * M * values + most + M * rows


class Account(NamedTuple):
    """Bytes of a step on the GPU, beside the model and the optimizer."""

    kept: int  # states of blocks that are there at the peak
    reused: int  # buffers of kernels/scratch.py
    moment: str  # when the peak is: forward, head or backward
    working: int  # what that moment takes on top
    chunk: int  # of logits, part of it where the moment is the head

    @property
    def total(self) -> int:
        return self.kept + self.reused + self.working


def account(
    w: Widths, keep: Sequence[str], M: int, itemsize: int, learned: int | None = None, attention: int | None = None
) -> Account:
    """Of a step over M tokens, `learned` of them.

    `keep` is a word of fused.KEEPS for each block; `attention` what a library's backward takes, by default cuDNN's.
    """
    attention = attention_bytes(w, M, itemsize) if attention is None else attention
    below, last, leaving, under_way = 0, len(keep) - 1, list[str](), 0
    moments: list[tuple[int, int, str]] = []  # kept, working, which
    for i, word in enumerate(keep):
        moments.append((below, under_way + _forward_bytes(w, word, M, itemsize), "forward"))
        leaving = _leaving(leaving, word)
        under_way = sum(host_bytes(w, other, M, itemsize) for other in leaving)
        below += kept_bytes(w, word, M, itemsize)
        moments.append((below, _backward_bytes(w, word, M, itemsize, i == last, i == 0, attention), "backward"))
    moments.append((below, under_way + head_bytes(w, M, itemsize, M if learned is None else learned), "head"))
    kept, working, moment = max(moments, key=lambda m: m[0] + m[1])
    chunk = itemsize * w.vocab * logit_rows(w, itemsize, M if learned is None else learned)
    return Account(kept, reused_bytes(w, M, itemsize), moment, working, chunk)


# ---- the choice ----
def keep_on_gpu(
    w: Widths, M: int, itemsize: int, free: int, learned: int | None = None, host: int | None = None
) -> list[str]:
    """What each block keeps when tensors of a step over M tokens may take `free` bytes, and pinned ones `host`."""

    def fits(keep: list[str]) -> bool:
        return account(w, keep, M, itemsize, learned).total <= free

    low, high = 1, w.blocks  # blocks kept whole: the last one's states would come back as soon as they are sent
    inputs = ["input_host"] * (w.blocks - 1) + ["input"]
    if not fits(["host"] * (w.blocks - 1) + ["all"]):
        return inputs
    while low < high:
        middle = (low + high + 1) // 2
        if fits(["host"] * (w.blocks - middle) + ["all"] * middle):
            low = middle
        else:
            high = middle - 1
    if host is not None and (w.blocks - low) * host_bytes(w, "host", M, itemsize) > host:
        return inputs
    return ["host"] * (w.blocks - low) + ["all"] * low


def in_8_bits(keep: Sequence[str]) -> list[str]:
    """What blocks keep whose products are in 8 bits: all their states would cross PCIe for longer than the step takes,
    those of every second block do not; the others are made again."""
    return ["input_host" if word == "host" and i % 2 else word for i, word in enumerate(keep)]


def decoded_bytes(w: Widths, itemsize: int, eights: bool = False) -> int:
    """Of one block's weights that stay decoded; in 8 bits they do so twice."""
    if eights:
        rooms = [room8(r) for r in w.ranks]
        return sum(N * (K + room) + K * (N + room) for (N, K), room in zip(w.shapes, rooms, strict=True))
    return itemsize * sum((N + room) * (K + room) for (N, K), room in zip(w.shapes, w.rooms, strict=True))


def blocks_decoded(
    w: Widths, keep: Sequence[str], M: int, itemsize: int, free: int, room: int, eights: bool = False
) -> int:
    """How many blocks' weights may stay decoded beside a step over M tokens.

    `free` bytes are there for tensors within the budget, and `room` on the card.  Of what the card has left beside a
    step and its CUDA graph half stays free, for whatever else there is to do between steps.
    """
    total = account(w, keep, M, itemsize).total
    on_card = (room - _spare(keep) * total) / 2
    return max(0, min(w.blocks, int(min(free - total, on_card) // decoded_bytes(w, itemsize, eights))))


def graph_fits(w: Widths, keep: Sequence[str], M: int, itemsize: int, free: int, room: int) -> bool:
    """Whether a step over M tokens, with the reused buffers there, may become a CUDA graph where tensors may still take
    `free` bytes, and where `room` bytes of the card are free.

    A graph holds its memory between two steps: where some of it had to be saved, a step of another shape must still
    find as much again.
    """
    a = account(w, keep, M, itemsize)
    need = a.total - a.reused + CUBLAS
    return need <= free and _spare(keep) * need <= room


def _spare(keep: Sequence[str]) -> float:
    """A graph is recorded where so many times its memory is free on the card."""
    return SPARE * (1 if set(keep) == {"all"} else 2)


def free_bytes(device: torch.device, limit: int | None = None) -> int:
    """Bytes that tensors of this process may still take on a GPU, within `limit` bytes for all its tensors."""
    driver, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    free = driver + reserved - allocated - int(MARGIN * total)
    return free if limit is None else min(free, limit - allocated)


class Chosen(NamedTuple):
    """What blocks keep, and the largest step that it was chosen for."""

    tokens: int = 0
    documents: int = 0
    keep: Sequence[str] = ()


class Keeping:
    """What the blocks of one model keep, as its user wishes or as memory allows.

    Attributes:
        keep: a word of `fused.KEEPS` for all blocks, or one for each; None goes by what is free
        budget: bytes that tensors may take on the GPU in all; None is what is free
        recordable: whether the last step ran fused, and so can become a CUDA graph
        compute: what the frozen base's products run in, "bf16" for the dtype of the states, or "fp8"
        said: how the last step's blocks ran, and why; "" before the first
        scales8: scales of weights in 8 bits
        decoded: weights that stay decoded from step to step
    """

    def __init__(self, config: Any, model: Any = None) -> None:
        self.config, self.model = config, model  # adapters come and go on the model
        self.keep: str | list[str] | None = None
        self.budget: int | None = None
        self.recordable = False
        self.compute, self.said = "bf16", ""
        self.scales8: dict[Any, tuple[float, Tensor]] = {}
        self.host, self.decoded = Host(), Decoded()
        self.chosen = Chosen()

    @property
    def widths(self) -> Widths:
        return widths_of(self.config, self.model)._replace(documents=self.chosen.documents)

    def choose(self, x: Tensor, documents: int = 0) -> Sequence[str]:
        """What each block keeps of a step over the states x (B, T, d), of so many documents where rows are packed;
        decided anew only for a larger step."""
        tokens, blocks = x.shape[0] * x.shape[1], self.config.num_layers
        if isinstance(self.keep, list):
            return self.keep
        if self.keep is not None or not x.is_cuda:
            return [self.keep or "all"] * blocks
        known = self.chosen
        if tokens > known.tokens or documents > known.documents:
            self.forget()
            tokens, documents = max(tokens, known.tokens), max(documents, known.documents)
            w = self.widths._replace(documents=documents)
            keep = self.within(w, tokens, x)
            self.chosen = Chosen(tokens, documents, keep)
            eights = self.compute == "fp8"
            self.decoded.blocks = blocks_decoded(w, keep, tokens, x.element_size(), *self._free(x), eights)
        return self.chosen.keep

    def forget(self) -> None:
        """What was chosen is chosen anew by the next step; weights that stay decoded give their memory back."""
        self.chosen = Chosen()
        self.decoded.clear()

    def _free(self, x: Tensor) -> tuple[int, int]:
        """Bytes that a step over the states x may take within the budget, and on the card."""
        # buffers of smaller steps are written over, and x is a block's state already; cuBLAS' come with a product, and
        # once more with a graph
        there = sum(t.numel() * t.element_size() for t in (x, *mine().values()) if t.device == x.device)
        free, room = (free_bytes(x.device, limit) + there - 2 * CUBLAS for limit in (self.budget, None))
        return free, room

    def within(self, w: Widths, tokens: int, x: Tensor) -> list[str]:
        """What each block keeps in the memory that is free now, within the budget.

        Raises RuntimeError where a step does not fit into the budget even with each block's input on the host.
        """
        itemsize, (free, room) = x.element_size(), self._free(x)
        host = host_room()
        keep = keep_on_gpu(w, tokens, itemsize, free, host=None if host is None else host + self.host.nbytes())
        over = account(w, keep, tokens, itemsize, learned=1).total - free  # with as few logits as can be
        if over > 0 and self.budget is not None and free < room:
            raise RuntimeError(
                f"a step over {tokens:,} tokens takes at least {(self.budget + over) / 2**30:.2f} GiB, and the budget "
                f"is {self.budget / 2**30:.2f}; take a smaller batch, shorter rows or a larger budget"
            )
        return in_8_bits(keep) if self.compute == "fp8" else keep

    def graph_fits(self, tokens: int, itemsize: int, free: int, room: int) -> bool:
        """`graph_fits` of the last step, over so many tokens."""
        w = self.widths
        words = self.keep if isinstance(self.keep, list) else [self.keep] * w.blocks if self.keep else self.chosen.keep
        return graph_fits(w, words or ["all"] * w.blocks, tokens, itemsize, free, room)


def parse_bytes(text: str) -> int:
    """24GiB, 500MiB or 8e9 as bytes."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("GB", 10**9), ("", 1)):
        if text.endswith(unit):
            try:
                value = float(text.removesuffix(unit)) * size
            except ValueError:
                break
            if math.isfinite(value) and value > 0:
                return int(value)
            break
    raise ValueError(f"{text!r} is no size of memory; write 24GiB, 500MiB or 24GB")
