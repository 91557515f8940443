"""A kernel's launch as an operator that tracers see, and that costs nothing where nobody traces.

    @op("lora::swiglu", mutates=("h",))
    def _forward_op(g: Tensor, u: Tensor, h: Tensor) -> None: ...

torch.compile, torch.export, fake tensors and dispatch modes cannot look into a launch: for them it is a
torch.library.custom_op with a fake.  Without them the function is called as it is.  The way through the custom_op costs
20 us a call, and the first one of a process imports torch's compiler, 856 modules: 4 s of an 8B load that takes one
(LOG.md, 2026-11-27).

What the custom_op does besides is kept: what is written is marked as changed, so that a backward that saved it says so,
and a tensor that learns takes the way through it, which raises in the backward: an op has no gradient of its own.
"""

from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

T = TypeVar("T")

PLAIN = (Tensor, nn.Parameter)  # another type has ideas of its own about operators: a fake, a distributed one


def op(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., T]], "Op[T]"]:
    """Declares a launch as the operator `name`, which writes into its arguments called `mutates`.

    An op that returns anything needs a fake (`register_fake`): the shapes of its results without their values.
    """
    return lambda launch: Op(name, mutates, launch)


class Op(Generic[T]):
    """Calls `launch`, or where somebody traces, the custom_op `registered` that was made of it."""

    def __init__(self, name: str, mutates: tuple[str, ...], launch: Callable[..., T]) -> None:
        names = launch.__code__.co_varnames
        self.launch, self.written = launch, tuple(names.index(m) for m in mutates)
        self.registered = torch.library.custom_op(name, mutates_args=mutates)(launch)
        self.register_fake = self.registered.register_fake

    def __call__(self, *args: Any) -> T:
        if torch.compiler.is_compiling() or _watched() or not _plain(args, torch.is_grad_enabled()):
            return self.registered(*args)
        made = self.launch(*args)
        for i in self.written:
            if args[i] is not None:
                increment_version(args[i])
        return made


def _watched() -> bool:
    """Whether somebody sees every operator: a dispatch mode (fake tensors, make_fx), torch.func, torch.jit.trace."""
    c: Any = torch._C
    return (
        c._len_torch_dispatch_stack() > 0 or c._are_functorch_transforms_active() or c._get_tracing_state() is not None
    )


def _plain(args: Iterable[object], learning: bool) -> bool:
    """Whether all tensors among `args`, and in lists among them, are plain ones that no gradient is asked for."""
    for t in args:
        if isinstance(t, Tensor):
            if type(t) not in PLAIN or (learning and t.requires_grad):
                return False
        elif isinstance(t, list | tuple) and not _plain(t, learning):
            return False
    return True
