"""Whether a model stands as it stood when something of it was recorded, told in about a millisecond.

A recorded step holds on to places in memory and to how the layers were.  So each prompt must know whether a module was
replaced or hooked, an adapter switched, merged, scaled or given another rank, a tensor moved.  Asked layer by layer
that takes 12 ms for an 8B model with adapters, more than the prompt itself: 1 100 modules and 2 700 tensors, and each
attribute of a module comes by way of a function of Python's.  Here each question is put to all of them in one pass.
"""

from collections.abc import Iterable
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

from torch import nn

from lora.adapter import Adapter
from lora.layer import HOOKS, Adapted

_dict, _inside = attrgetter("__dict__"), itemgetter("_modules")  # of a module; of its __dict__
_parameters, _buffers = itemgetter("_parameters"), itemgetter("_buffers")
_layer, _update, _hooks = itemgetter("active", "off", "by_row"), itemgetter("scale", "stacked"), itemgetter(*HOOKS)


def every(model: nn.Module, but: type[nn.Module] | None = None) -> list[nn.Module]:
    """All modules, those of one depth behind each other, without such as `but`; one that stands in two places twice."""
    found, level = [model], [model]
    while level:
        level = _values(filter(None, map(_inside, map(_dict, level))))
        if but:
            level = [m for m in level if not isinstance(m, but)]
        found += level
    return found


def _values(dicts: Iterable[dict[str, Any]]) -> list[Any]:
    return [v for v in _all(dicts) if v is not None]


def _all(dicts: Iterable[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, dicts)))


class Watch:
    """The modules of a model, for as long as they are the same ones in the same places.

    They are held, but for low-rank adapters, whose memory is free as soon as they are detached.
    Not looked at: values of tensors, which recordings read anew, and attributes of modules besides the adapters'.
    """

    def __init__(self, model: nn.Module) -> None:
        self.held = every(model, Adapter)  # so that no other module gets the id of one of them
        both = [(m, m.__dict__) for m in self.held]
        self.parents = [d for m, d in both if d["_modules"] or isinstance(m, nn.ModuleList | nn.ModuleDict)]
        self.named = [d for m, d in both if isinstance(m, nn.ModuleDict)]
        self.layers = [d for m, d in both if isinstance(m, Adapted)]
        self.called = [d for m, d in both if isinstance(m, Adapted) or not d["_modules"]]
        self.owners = [d for _, d in both if any(p is not None for p in d["_parameters"].values())]
        self.buffered = [d for _, d in both if d["_buffers"]]
        inside = _all(map(_inside, self.parents))
        self.tree = list(map(id, inside))
        self.adapters = [i for i, m in enumerate(inside) if isinstance(m, Adapter)]

    def look(self) -> list[object] | None:
        """How the model stands: equal to what it was where no recording could tell the difference.

        None: modules are not the same ones in the same places any more, so that it takes a new `Watch`; or there are
        adapters with a bias, which are not looked into.
        """
        inside = _all(map(_inside, self.parents))
        if list(map(id, inside)) != self.tree:
            return None
        # an adapter may be another one with the id of one that is gone: all of it is looked at
        adapters = [inside[i].__dict__ for i in self.adapters]
        if any(map(_inside, adapters)):
            return None
        factors = _values(map(_parameters, adapters))
        parameters = factors + _values(map(_parameters, self.owners))
        buffers = _all(map(_buffers, self.buffered))
        own = _all(map(_buffers, adapters))
        if own.count(None) != len(own):
            buffers += own
        hooks = chain.from_iterable(map(_hooks, self.called))
        return [
            list(chain.from_iterable(map(_inside, self.named))),
            list(map(_layer, self.layers)),
            list(map(_update, adapters)),
            any(hooks) and [len(h) for hooked in map(_hooks, self.called) for h in hooked],
            [t.data_ptr() for t in parameters],
            [t.dtype for t in parameters],
            [t.shape for t in factors],
            [t.stride() for t in parameters if not t.is_contiguous()],
            [t if t is None else t.data_ptr() for t in buffers],
        ]
