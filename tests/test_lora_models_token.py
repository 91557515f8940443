"""A decoder's token in five launches a block equals the same in nine: the kernels' bodies, chained."""

import pytest
import torch
from test_kernels_gemv4 import definitions
from test_kernels_token4 import memory
from test_lora_models_decode import FAMILIES, tiny
from torch import Tensor

from lora.models import reading
from lora.models.reading import Reading, groups_of

__all__ = ["definitions", "memory"]


@pytest.mark.usefixtures("definitions", "memory")
@pytest.mark.parametrize("family", ["llama", "mixed", "qwen3"])
@pytest.mark.parametrize("adapters", [True, False])
def test_a_token_in_five_launches(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch, family: str, adapters: bool
) -> None:
    monkeypatch.setattr(reading, "BUFFERED", {"cpu", "cuda"})
    monkeypatch.setattr(reading, "IN_FIVE", True)
    # the interpreter does not round bfloat16 to nearest, and these states are not too large for float16
    dtype = torch.bfloat16 if triton_device.type == "cuda" else torch.float16
    model = tiny(adapters, FAMILIES[family]).to(triton_device, dtype)
    read = Reading(model, groups_of(model))
    x = model.model.embed_tokens(torch.tensor([5, 7, 11], device=triton_device))
    if triton_device.type == "cuda":
        assert read.in_five(x) and not read.in_five(x.half())

    def mixed(q: Tensor, v: Tensor) -> Tensor:
        return torch.tanh(q) + v.repeat(1, q.shape[1] // v.shape[1])

    def attend(layer: int, a: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        y = mixed(q, v)
        shares = None if a is None else torch.stack([y[:, p::3].float() @ a[:, p::3].float().T for p in range(3)])
        return y, shares

    with torch.no_grad():
        got = read.token(x, attend)
        want = read.forward(x, lambda layer, q, k, v: mixed(q, v))
        exact = Reading(model.float(), groups_of(model)).forward(x.float(), lambda layer, q, k, v: mixed(q, v))
        error = (got.float() - exact).norm()
        assert error <= 1.1 * (want.float() - exact).norm() + 1e-3 * exact.norm(), (family, adapters)
