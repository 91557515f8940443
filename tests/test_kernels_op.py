"""What a kernel's operator is to a tracer, and that it is not there without one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import lora.kernels
from lora.kernels.op import op
from lora.kernels.swiglu import swiglu, swiglu_forward

calls: list[str] = []  # which launches ran


@op("lora_test::double")
def double(x: Tensor) -> Tensor:
    calls.append("double")
    return torch.mul(x.detach(), 2)


@double.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@op("lora_test::first")
def first(xs: list[Tensor]) -> Tensor:
    return xs[0].detach().clone()


@op("lora_test::fill", mutates=("out", "more"))
def fill(x: Tensor, out: Tensor | None, more: list[Tensor]) -> None:
    for t in (out, *more):
        if t is not None:
            t.detach().copy_(x)


class Seen(TorchDispatchMode):
    """Notes the operators that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Own(Tensor):
    """A type of tensor that handles operators itself."""

    handled: list[str] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        cls.handled.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.fixture(autouse=True)
def no_calls() -> None:
    calls.clear()


def through(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the calls that go through the custom_op."""
    count: list[int] = []
    registered = double.registered
    monkeypatch.setattr(double, "registered", lambda *args: (count.append(1), registered(*args))[1])
    return count


def test_a_plain_call_goes_past_the_custom_op(monkeypatch: pytest.MonkeyPatch) -> None:
    count = through(monkeypatch)
    x = torch.ones(3)
    assert torch.equal(double(x), 2 * x)
    weight = torch.nn.Parameter(x)
    with torch.no_grad():
        assert torch.equal(double(weight), 2 * x)
    with torch.inference_mode():
        double(torch.ones(3))
    assert not count and len(calls) == 3


def test_fake_tensors_in_their_mode_and_outside_take_the_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    count = through(monkeypatch)
    with FakeTensorMode() as mode:
        x = torch.empty(3, 5)
        assert double(x).shape == (3, 5)
    y = double(mode.from_tensor(torch.ones(2)))
    assert y.shape == (2,) and len(count) == 2 and not calls


def test_a_dispatch_mode_a_transform_and_another_type_of_tensor_see_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    count = through(monkeypatch)
    x = torch.ones(3)
    with Seen() as seen:
        double(x)
    assert seen.names[0] == "lora_test.double.default"
    double(x.as_subclass(Own))
    assert any("double" in name for name in Own.handled)
    assert torch.equal(torch.vmap(double)(torch.ones(2, 3)), torch.full((2, 3), 2.0))
    assert len(count) == 3


@pytest.mark.filterwarnings("ignore:`torch.jit.trace`")
def test_tracers_record_the_op() -> None:
    graph = make_fx(lambda x: double(x) + 1)(torch.ones(3))
    assert torch.ops.lora_test.double.default in [node.target for node in graph.graph.nodes]
    traced = torch.jit.trace(lambda x: double(x) + 1, torch.ones(3))
    assert torch.equal(traced(torch.full((3,), 2.0)), torch.full((3,), 5.0))
    assert "double" in str(traced.graph)


def test_the_compiler_and_export_record_the_op() -> None:
    targets: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        targets.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    def f(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        fill(double(x), out, [x])
        return out + x

    x = torch.ones(3)
    assert torch.equal(torch.compile(f, backend=backend, fullgraph=True)(x), torch.full((3,), 4.0))
    names = " ".join(map(str, targets))
    assert "lora_test.double" in names and "lora_test.fill" in names

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return double(x) + 1

    for strict in (False, True):
        exported = torch.export.export(Module(), (torch.ones(3),), strict=strict)
        assert "lora_test.double" in str(exported.graph)


def test_a_kernel_of_ours_compiles_whole_with_its_gradient(triton_device: torch.device) -> None:
    g, u = (torch.randn(3, 40, device=triton_device, requires_grad=True) for _ in range(2))
    want = torch.autograd.grad(swiglu(g, u).sum(), (g, u))
    compiled = torch.compile(lambda g, u: swiglu(g, u).sum(), backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(g, u), (g, u))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_is_written_is_marked_as_changed() -> None:
    x, out, more = torch.ones(3), torch.zeros(3), torch.zeros(3)
    fill(x, out, [more, out])
    assert (x._version, more._version) == (0, 2) and out._version == 4  # by copy_, and by the op, for each mention
    fill(x, None, [])
    w = torch.ones(3, requires_grad=True)
    y = w * out
    fill(x, out, [])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_tensor_that_learns_is_not_cut_off_without_a_word() -> None:
    w = torch.ones(3, requires_grad=True)
    for y in (double(w), first([w])):
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            y.sum().backward()


FIRST = """
import sys
import torch
from lora.kernels import code8  # noqa: F401
from lora.kernels.swiglu import swiglu
from lora.quant.weight import quantize_tensor
device = "cuda" if torch.cuda.is_available() else "cpu"
before = set(sys.modules)
packed = quantize_tensor(torch.randn(64, 64, device=device), double=True)
x = packed.dequantize().requires_grad_()
swiglu(x, x).sum().backward()
print(len([m for m in set(sys.modules) - before if m.startswith(("torch._dynamo", "torch._inductor", "sympy"))]))
"""


def test_the_first_call_of_a_process_does_not_import_the_compiler(triton_device: torch.device) -> None:
    done = subprocess.run([sys.executable, "-c", FIRST], env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 0


def test_every_launch_is_declared_in_one_way() -> None:
    for file in Path(next(iter(lora.kernels.__path__))).glob("*.py"):
        if file.name != "op.py":
            assert not re.search(r"torch\.library|is_compiling\(\) *and|FakeTensor", file.read_text()), file.name


def test_swiglu_writes_into_inference_tensors(triton_device: torch.device) -> None:
    with torch.inference_mode():
        x = torch.randn(3, 40, device=triton_device)
        out = torch.empty_like(x)
    with torch.no_grad():
        assert swiglu_forward(x, x, out) is out
