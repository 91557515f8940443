"""Decoder: prompts, then one token a row at a time, over a key-value cache of fixed size; on a GPU as CUDA graphs.

A token of an 8B model is some three hundred launches of a few microseconds: launched from Python they take many times
as long as they run.  So the step is recorded once and replayed, and with it the greedy choice.  Nothing in it asks the
host: the slot to write, the token and the rows that have ended are tensors that the step itself moves on.  Prompts are
recorded too, a length that comes the second time.  Trained factors are read anew for each prompt; adapters of other
ranks or on other layers, a merge or another shape need a recording of their own, and a few are kept.
On a CPU the same step runs directly.
"""

import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora.kernels.attend import attend, new_work
from lora.kernels.choose import choose, note
from lora.kernels.dispatch import can_overlap
from lora.kernels.rope import rope2
from lora.kernels.scratch import mine
from lora.models.base import Cache, CausalLM, attention, causal_mask
from lora.models.reading import Group, Key, Reading, groups_of, key_of, plain
from lora.models.watch import Watch

ASK = 4  # tokens between two questions to a GPU whether all rows have ended
PROMPT = 32  # prompts on a GPU are padded to a multiple of so many tokens, so that they share recordings
RECORDED = 4096  # tokens of all prompts together, up to which launches matter
PROMPTS = 8  # shapes of prompts recorded at once
RECORDINGS = 4  # sets of adapters' shapes recorded at once
KNOWN = 16  # sets of adapters whose copy is recorded


class Recording:
    """What has been recorded of a model for one state of it: places of weights, and ranks of adapters."""

    def __init__(self, model: Any, groups: Sequence[Group]) -> None:
        self.reading = Reading(model, groups)
        self.steps: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # greedy: the graph and its logits
        self.prompts: OrderedDict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = OrderedDict()
        self.seen: set[object] = set()
        self.scratch: list[Tensor] = []  # buffers that graphs write to, which others may have outgrown


class Known(NamedTuple):
    """A model as it was looked at before."""

    look: list[object]
    key: Key  # of its recording
    copy: Callable[[], object]  # of its adapters' factors into that one's buffers


class Decoder:
    """The state of `batch` rows of up to `length` tokens.

    `begin` reads prompts; `take` appends a token to each row; `step` gives the logits of the one behind it.
    """

    def __init__(self, model: CausalLM, batch: int, length: int) -> None:
        device, _ = model.place()
        self.model: Any = model
        self.device, self.batch, self.length, self.rows = device, batch, length, batch
        self.cache: Cache = model.new_cache(batch, length)
        self.at = torch.zeros(batch, dtype=torch.int64, device=device)  # the slot of a row's last token
        self.start = torch.zeros_like(self.at)  # a row's first real slot
        self.token = torch.zeros_like(self.at)
        self.out = torch.zeros(batch, length + 1, dtype=torch.int64, device=device)  # tokens taken, by their slots
        self.ends = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
        self.stopped = torch.zeros(batch, dtype=torch.bool, device=device)
        self.bad = torch.zeros_like(self.stopped)  # rows whose logits held NaN or inf
        self.logits: Tensor = torch.empty(0)  # (B, V) of the token to come
        self.prompt: Tensor = torch.empty(0)
        self.plain = plain(model)
        self.filled = 0  # slots of a row in use, by the host's count
        self.recordings: OrderedDict[Key, Recording] = OrderedDict()
        self.watch: Watch | None = None
        self.known: list[Known] = []
        self.graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()  # those that hold the pool
        self.pool: Any = None
        self.ending: list[int] = []  # the tokens marked in `ends`
        self.asked: tuple[torch.cuda.Event, Tensor] | None = None
        if self.plain:
            angle = torch.arange(length).float()[:, None] * model.config.inv_freq().to("cpu")
            self.cos, self.sin = angle.cos().to(device), angle.sin().to(device)  # (length, D / 2) float32
            self.work = new_work(self.cache.kv[0, 0], model.config.num_heads)

    # ---- what a caller does ----
    @torch.no_grad()
    def begin(self, ids: Tensor, real: Tensor, ends: Sequence[int] = (), new: int = 1) -> Tensor:
        """Reads prompts ids (B, T), padded on the left where `real` (B, T) is False; logits (B, V) of what follows.

        `ends`: the tokens that end a row; `new`: how many will be taken.  B may be smaller than the decoder's batch.
        """
        B, T = ids.shape
        if T + new > self.length or self.batch < B:
            raise ValueError(
                f"{B} prompts of {T} tokens and {new} new ones do not fit a decoder for {self.batch} rows of "
                f"{self.length} tokens"
            )
        self.rows, self.asked = B, None
        room = -T % PROMPT if self.device.type == "cuda" and self.plain else 0
        if T + room + new > self.length or self.batch * (T + room) > RECORDED:
            room = 0
        T += room
        # one copy to the device: of each row where it starts, whether it is to spare, and its tokens
        given = torch.zeros(self.batch, 2 + T, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        given[:B, 0] = (~real).sum(dim=1)
        given[:, 0] += room
        given[:B, 2 + room :] = ids
        given[B:], given[B:, 1] = given[:1], 1  # rows to spare are as the first
        padded = bool(given[:, 0].any())
        if self.plain:
            self._find()
        if list(ends) != self.ending:
            self._mark(list(ends))
        self.cache.used = 0
        self.filled = T
        self.logits = self._prompt(given, padded)
        return self.logits[:B]

    def _mark(self, ends: list[int]) -> None:
        self.ends.zero_()
        if known := [token for token in ends if 0 <= token < self.ends.numel()]:
            self.ends[torch.tensor(known, device=self.device)] = True
        self.ending = ends

    @torch.no_grad()
    def take(self, token: Tensor | None = None) -> None:
        """Appends a token (B,) to each row; None: the likeliest by the logits."""
        self._grow()
        self._take(token)

    def _take(self, token: Tensor | None = None) -> None:
        state = (self.token, self.at, self.out, self.ends, self.stopped, self.bad)
        if token is None:
            choose(self.logits, *state)
        else:
            if len(token) < self.batch:
                token = torch.cat((token, token[:1].expand(self.batch - len(token))))
            note(token, self.logits, *state)

    @torch.no_grad()
    def step(self, greedy: bool = False) -> Tensor:
        """Logits (B, V) of what follows the tokens taken, valid until the next step.

        `greedy` takes the likeliest in the same go.
        """
        if greedy:
            self._grow()
        if self.plain and self.device.type == "cuda":
            self.logits = self._replay(greedy)
        else:
            self.logits = self._step() if self.plain else self._slow_step()
            if greedy:
                self._take()
        return self.logits[: self.rows]

    def _grow(self) -> None:
        """Counts a token; beyond the cache a GPU would write to memory that is not its own."""
        if self.filled >= self.length:
            raise RuntimeError(f"a token more than the {self.length} that this decoder was made for")
        self.filled += 1

    def ended(self, step: int) -> bool:
        """Whether all rows have ended, asked after each token `step`; of a GPU now and then, and answered later.

        The answer of the question before is waited for while the GPU works on: it never runs dry.
        """
        if not self.ending:
            return False
        if self.device.type == "cpu":
            return bool(self.stopped.all())
        if step % ASK != ASK - 1:
            return False
        before = self.asked
        answer = torch.empty((), dtype=torch.bool, pin_memory=True)
        answer.copy_(self.stopped.all(), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.asked = event, answer
        if before is None:
            return False
        before[0].synchronize()
        return bool(before[1])

    def written(self, n: int) -> list[list[int]]:
        """The last n tokens of each row.

        Raises RuntimeError where a row's logits held NaN or inf: its tokens mean nothing.
        """
        T = self.prompt.shape[1]
        got = torch.cat((self.out[: self.rows, T : T + n], self.bad[: self.rows, None]), dim=1).tolist()
        wrong = [i for i, row in enumerate(got) if row[-1]]
        if wrong:
            raise RuntimeError(
                f"the model's logits held NaN or inf in row {wrong[0]} of {len(got)}, so its tokens mean nothing; "
                "look at the weights and at the adapters that are active"
            )
        return [row[:-1] for row in got]

    # ---- recordings ----
    def _find(self) -> None:
        """The recording of the model's present state, with the factors of its active adapters."""
        look = self.watch.look() if self.watch else None
        if look is not None and (known := next((k for k in self.known if k.look == look), None)):
            self.recordings.move_to_end(known.key)
            known.copy()
            return
        groups = groups_of(self.model)
        key = key_of(self.model, groups)
        for old in [k for k in self.recordings if k[0] != key[0]]:  # of weights that lie elsewhere now
            del self.recordings[old]
        if key in self.recordings:  # the model is used again: from the next time on, a look will do
            self.recordings.move_to_end(key)
            if look is None:
                self.watch, self.known = Watch(self.model), []
                look = self.watch.look()
            copy: Callable[[], object] = functools.partial(self.now.reading.fill, groups)
            if look is not None:
                if self.device.type == "cuda":  # launches over 448 tensors take longer from Python than on a GPU
                    copy = self._record(copy)[0].replay
                self.known.append(Known(look, key, copy))
            copy()
        else:
            if len(self.recordings) == RECORDINGS:
                self.recordings.popitem(last=False)
            self.recordings[key] = Recording(self.model, groups)
        self.known = [k for k in self.known if k.key in self.recordings][-KNOWN:]

    @property
    def now(self) -> Recording:
        return next(reversed(self.recordings.values()))

    def _record(self, run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        if not self.graphs:  # with the last graph in it a pool is gone
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = run()
        self.graphs.add(graph)
        self.now.scratch += mine().values()
        return graph, result

    def _replay(self, greedy: bool) -> Tensor:
        """The step at once where it is the first, since a recording must not compile; else by its graph."""
        now = self.now

        def run() -> Tensor:
            self.logits = self._step()
            if greedy:
                self._take()
            return self.logits

        if "step" not in now.seen:
            now.seen.add("step")
            return run()
        if greedy not in now.steps:
            now.steps[greedy] = self._record(run)
        graph, logits = now.steps[greedy]
        graph.replay()
        return logits

    def _prompt(self, given: Tensor, padded: bool) -> Tensor:
        """Prompts as `begin` lays them out on the host, into the cache; logits (B, V) of what follows."""
        T = given.shape[1] - 2
        if not self.plain:
            given = given.to(self.device, non_blocking=True)
            real, positions = self._start(given)
            h = self.model.hidden(self.prompt, real if padded else None, positions, self.cache)
            return self.model.logits(h[:, -1])
        now, key = self.now, (T, padded)
        if self.device.type != "cuda" or self.batch * T > RECORDED or key not in now.seen:
            now.seen.add(key)
            return self._read(given.to(self.device, non_blocking=True), padded)
        if key not in now.prompts:
            if len(now.prompts) == PROMPTS:
                now.prompts.popitem(last=False)
            there = given.to(self.device)
            now.prompts[key] = (*self._record(lambda: self._read(there, padded)), there)
        now.prompts.move_to_end(key)
        graph, logits, there = now.prompts[key]
        there.copy_(given, non_blocking=True)
        self.prompt = there[:, 2:]
        graph.replay()
        return logits

    # ---- what is recorded ----
    def _start(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """The state of rows that `begin` has laid out; which of their slots are real (B, T), and their positions."""
        self.prompt = given[:, 2:]
        T = self.prompt.shape[1]
        self.start.copy_(given[:, 0])
        self.stopped.copy_(given[:, 1])
        self.at.fill_(T - 1)
        self.bad.fill_(False)
        positions = torch.arange(T, device=self.device) - self.start[:, None]
        return positions >= 0, positions.clamp(min=0)

    def _read(self, given: Tensor, padded: bool) -> Tensor:
        """Prompts (B, T) through all layers into the cache; logits (B, V) of what follows."""
        c = self.model.config
        real, positions = self._start(given)
        B, T = self.prompt.shape
        x = self.model.embed(self.prompt)
        turn = [table[positions][:, :, None].to(x.dtype) for table in (self.cos, self.sin)]  # (B, T, 1, D / 2)
        windows = {c.window(i) for i in range(c.num_layers)}
        masks = {w: causal_mask(T, 0, real if padded else None, self.device, w) for w in windows}
        self.cache.used = 0

        def attend_all(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.view(B, T, -1, c.head_dim) for t in (q, k, v))
            q, k = rope2(q, k, *turn)
            k, v = self.cache.extend(layer, k.transpose(1, 2), v.transpose(1, 2))  # (B, H, T, D)
            return attention(q.transpose(1, 2), k, v, masks[c.window(layer)]).transpose(1, 2).reshape(B * T, -1)

        h = self.now.reading.forward(x.view(B * T, -1), attend_all)
        return self.model.lm_head(h.view(B, T, -1)[:, -1])

    def _step(self) -> Tensor:
        """One token of each row through all layers; logits (B, V)."""
        c = self.model.config
        early = can_overlap(self.device)

        def attend_one(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.cache.kv[layer]
            place = (self.at, self.start, self.cos, self.sin, c.window(layer) or 0)
            return attend(q, k, v, keys, values, *place, self.work, early)

        h = self.now.reading.forward(self.model.model.embed_tokens(self.token), attend_one, early)
        return self.model.lm_head(h)

    def _slow_step(self) -> Tensor:
        """The same by the model's own forward, for a model whose blocks are not those of llama.py (any more)."""
        used = self.cache.used
        limit = self.model.restart()
        slots = torch.arange(used + 1, device=self.device)
        real = slots >= self.start[:, None]
        if limit is not None and bool((used - self.start == limit).any()):  # the first token beyond the row's limit
            T = self.prompt.shape[1]
            ids = torch.cat((self.prompt, self.out[:, T : used + 1]), dim=1)
            self.cache.used = 0
            positions = (real.cumsum(dim=1) - 1).clamp(min=0)
            h = self.model.hidden(ids, None if bool(real.all()) else real, positions, self.cache)
            return self.model.logits(h[:, -1])
        positions = (used - self.start)[:, None]
        h = self.model.hidden(self.token[:, None], real, positions, self.cache)
        return self.model.logits(h[:, -1])
