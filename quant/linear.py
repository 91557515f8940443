"""Linear4bit: a frozen linear layer on a packed weight, and `quantize_module`, which puts it into a model."""

import fnmatch
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lora.kernels.code4 import byte_table
from lora.kernels.dropout import Drop
from lora.kernels.gemv4 import permute_table
from lora.kernels.linear4 import Low, Weight4, linear4
from lora.quant.codebook import codebook
from lora.quant.linear8 import Linear8bit, quantize8
from lora.quant.weight import Packed, check_block, quantize_tensor

_SCALES = ("absmax", "nested_map", "nested_absmax", "nested_offset")


class Linear4bit(nn.Module):
    """y = x Wᵀ + bias with W (N, K) in 4 bits, decoded when used and never kept.

    Computes in the dtype of x.  The weight lies in plain buffers: `weight` uint8, `absmax` (uint8 when doubly
    quantized, else float32), and `code` and the nested scales in float32.  `.to(device)` moves them;
    `.to(dtype)`, `.half()` and `.bfloat16()` cast the bias and leave every scale as it is.
    """

    weight: Tensor
    code: Tensor
    table: Tensor
    permute: Tensor
    bias: Tensor | None

    def __init__(self, packed: Packed, bias: Tensor | None = None) -> None:
        super().__init__()
        if len(packed.shape) != 2:
            raise ValueError(f"a linear layer needs a matrix, and this weight has shape {packed.shape}")
        self.out_features, self.in_features = packed.shape
        self.kind, self.block, self.nested = packed.kind, packed.block, packed.double
        self.register_buffer("weight", packed.q)
        self.register_buffer("code", packed.code, persistent=False)
        table, permute = _tables(packed.code)
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("permute", permute, persistent=False)  # for decoding a token
        for name, scale in zip(_SCALES, packed.scales, strict=False):
            self.register_buffer(name, scale, persistent=name != "nested_map")
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    def packed(self) -> Packed:
        """The weight as bytes and scales (the same memory)."""
        scales = tuple(getattr(self, name) for name in (_SCALES if self.nested else _SCALES[:1]))
        return Packed(self.kind, (self.out_features, self.in_features), self.block, self.weight, self.code, scales)

    def weight_as(self, dtype: torch.dtype) -> Tensor:
        """The decoded weight (N, K), a fresh tensor."""
        return self.packed().dequantize(dtype)

    def forward(self, x: Tensor, low: Low | None = None, drop: Drop | None = None) -> Tensor:
        """x (..., K) -> (..., N); `low` is (a (r, K), b (N, r), s) of a low-rank update added in the same pass.

        `drop` is its dropout, only where `can_linear16` says so.
        """
        return linear4(x, self.weight4(), self.bias_as(x.dtype), low, drop)

    def weight4(self) -> Weight4:
        """The weight as the kernels take it (the same memory)."""
        scales = tuple(getattr(self, name) for name in (_SCALES if self.nested else _SCALES[:1]))
        shape = (self.out_features, self.in_features)
        return Weight4(self.weight.view(-1), scales, self.table, self.permute, self.block, shape)

    def bias_as(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)

    def _apply(self, fn, recurse=True):
        # nn.Module would cast float buffers along with parameters; a scale in 16 bits is another weight
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        bits = 8 * self.packed().nbytes / (self.in_features * self.out_features)
        return f"{self.in_features}, {self.out_features}, {self.kind}, block={self.block}, {bits:.3f} bit/weight"


_made = WeakTensorKeyDictionary()  # of a code, while it lives


def _tables(code: Tensor) -> tuple[Tensor, Tensor]:
    """byte_table and permute_table of a code: some 30 launches on a GPU, made once for all layers that share it."""
    if code not in _made:
        with torch.inference_mode(False):  # or, first asked for there, no backward could save them ever after
            _made[code] = byte_table(code), permute_table(code)
    return _made[code]


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer with its weight stored (in, out): known by shape of class, not by import."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", None) is not None


def is_skipped(name: str, skip: Sequence[str]) -> bool:
    """Whether a dotted module name is one of `skip`: the whole name, its last parts, or a glob."""
    return any(name == s or name.endswith("." + s) or fnmatch.fnmatchcase(name, s) for s in skip)


def quantize_module(
    model: nn.Module, kind: str = "nf4", *, block: int = 64, double: bool = True, skip: Sequence[str] = ("lm_head",)
) -> nn.Module:
    """Replaces every linear layer of `model` by its 4-bit form, in place, and returns the model.

    `kind` is "nf4" or "fp4", or "int8" for a byte a weight, which knows no blocks (`lora.quant.linear8`).
    `skip` names layers to leave alone: full names, last parts ("lm_head") or globs.  A layer whose weight is
    shared with another module (a tied head) is left alone too, since packing it would not free the other.
    GPT-2's Conv1D becomes a Linear4bit on the transposed weight: the same function.

    Raises ValueError when nothing was quantized, or a weight holds NaN or inf (named).
    """
    if kind != "int8":
        check_block(block)
        codebook(kind)
    if isinstance(model, nn.Linear) or is_conv1d(model):
        raise TypeError("the model is itself a linear layer, which cannot replace itself; put it into a module first")
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[parameter.data_ptr()] = users.get(parameter.data_ptr(), 0) + 1
    done: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is not nn.Linear and not is_conv1d(module):
            continue
        if is_skipped(name, skip) or users[module.weight.data_ptr()] > 1:
            continue
        if id(module) not in done:
            weight = module.weight.T.contiguous() if is_conv1d(module) else module.weight
            bias, where = getattr(module, "bias", None), f"{name}.weight"
            made: nn.Module
            if kind == "int8":
                made = Linear8bit(*quantize8(weight, where), bias)
            else:
                made = Linear4bit(quantize_tensor(weight, kind, block, double, name=where), bias)
            done[id(module)] = made.train(module.training)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, done[id(module)])
    if not done:
        raise ValueError(
            f"nothing was quantized: {type(model).__name__} has no linear layer outside skip={tuple(skip)}"
        )
    return model
