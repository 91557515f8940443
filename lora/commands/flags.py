"""What commands are, and the flags that several of them have."""

from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser, Namespace

Commands = dict[str, tuple[Callable[[], ArgumentParser], Callable[[Namespace], None]]]  # name: arguments, and the call


def model_flags(p: ArgumentParser, quantize: bool = True, required: bool = True) -> None:
    kind: Any = {"type": str, "required": True} if required else {"type": str | None, "default": None}
    p.add_argument("--model", **kind, help="model folder or .gguf file")
    if quantize:
        p.add_argument("--quantize", choices=("nf4", "fp4"), default=None, help="pack linear layers while loading")
    p.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of dense weights"
    )
    p.add_argument("--device", type=str, default="auto", help="cpu, cuda, or auto")


def json_flag(p: ArgumentParser) -> None:
    p.add_argument("--json", action="store_true", help="print one line of JSON instead of text")


def dtype_device(a: Namespace) -> dict[str, Any]:
    return {"dtype": a.dtype, "device": a.device}


def numbers(a: Namespace, key: str, kind: Callable[[str], Any]) -> list[Any]:
    """The numbers of a flag that takes several, commas between them."""
    try:
        return [kind(part) for part in a[key].split(",")]
    except ValueError:
        raise ValueError(f"--{key} {a[key]}: numbers with commas between them, 1e-4,2e-4 say") from None
