"""Updates of stacked parameters: the formula in both layouts, files of every version of peft, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora
from lora.experts import LoRAExperts

E, R = 3, 2


class Experts(nn.Module):
    """Row i of x goes through expert i % E: x up[e]ᵀ down[e]ᵀ, with each weight as it is stored."""

    def __init__(self, d: int, inner: int, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.up = nn.Parameter(torch.randn(E, d, inner) if transposed else torch.randn(E, inner, d))
        self.down = nn.Parameter(torch.randn(E, inner, d) if transposed else torch.randn(E, d, inner))

    def forward(self, x: Tensor) -> Tensor:
        up, down = (w if self.is_transposed else w.transpose(1, 2) for w in (self.up, self.down))
        e = torch.arange(len(x)) % E
        return torch.einsum("nd,ndi,nio->no", x, up[e], down[e])


class Net(nn.Module):
    def __init__(self, d: int = 6, inner: int = 4, transposed: bool = False) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(d, d), Experts(d, inner, transposed)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.gate(x))


def net(**shape: Any) -> Net:
    torch.manual_seed(3)
    return Net(**shape)


def shaken(model: nn.Module) -> Any:
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 if p.requires_grad else p)
    return model


def folder(path: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    path.mkdir()
    named = {f"base_model.model.experts{key}": value.contiguous() for key, value in tensors.items()}
    save_file(named, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": R, "lora_alpha": 6, "target_modules": []} | config
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("transposed", [False, True])
def test_each_expert_gets_its_own_product(transposed: bool) -> None:
    model = shaken(lora.wrap(net(transposed=transposed), r=R, alpha=6.0, targets=[], parameters=["experts.*"]))
    part = model.experts.adapters["default"]["up"]
    plain, dense = net(transposed=transposed), model.experts.weights()
    with torch.no_grad():
        for e in range(E):
            a, b = part.a[e * R : (e + 1) * R], part.b[:, e::E]  # expert after expert; experts beside each other
            delta = 3.0 * b @ a
            want = plain.experts.up[e] + (delta.T if transposed else delta)
            torch.testing.assert_close(dense["up"][e], want, rtol=1e-6, atol=1e-6)
        plain.experts.up.copy_(dense["up"])
        plain.experts.down.copy_(dense["down"])
        x = torch.randn(7, 6)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("version", ["0.19.0", "0.18.1", "0.17.0", "0.21.2.dev0@abc", None])
@pytest.mark.parametrize("inner", [4, 6])
def test_files_of_every_version_are_read(version: str | None, inner: int, tmp_path: Path) -> None:
    """Before 0.19, in and out of a stacked parameter were changed over; of a square one only the version tells."""
    old = version in ("0.18.1", "0.17.0")
    n_in, n_out = (inner, 6) if old else (6, inner)  # of up (E, inner, 6), as the file's factors see it
    a, b = torch.randn(E * R, n_in), torch.randn(n_out, R * E)
    sums = torch.einsum("ore,eri->e" + ("io" if old else "oi"), b.view(n_out, R, E), a.view(E, R, n_in))
    said = {"peft_version": version} if version else {}
    tensors = {".lora_A.weight": a, ".lora_B.weight": b}
    where = folder(tmp_path / "a", tensors, target_parameters=["experts.up"], **said)
    model = net(inner=inner)
    if version is None and inner == 6:
        with pytest.raises(ValueError, match="as wide as high, and .* has no peft_version"):
            lora.attach(model, where)
        return
    lora.attach(model, where)
    want = net(inner=inner).experts.up + 3.0 * sums
    torch.testing.assert_close(model.experts.weights()["up"], want.detach(), rtol=1e-6, atol=1e-6)


def test_a_file_without_a_version_is_known_by_its_shapes(tmp_path: Path) -> None:
    tensors = {".lora_A.weight": torch.randn(E * R, 4), ".lora_B.weight": torch.randn(6, R * E)}  # the old layout
    model = lora.attach(net(), folder(tmp_path / "a", tensors, target_parameters=["experts.up"]))
    sums = torch.einsum(
        "ore,eri->eio", tensors[".lora_B.weight"].view(6, R, E), tensors[".lora_A.weight"].view(E, R, 4)
    )
    want = (net().experts.up + 3.0 * sums).detach()
    torch.testing.assert_close(model.experts.weights()["up"], want, rtol=1e-6, atol=1e-6)


def test_the_first_parameter_lies_innermost_in_the_file(tmp_path: Path) -> None:
    model = shaken(lora.wrap(net(), r=R, targets=[], parameters=["experts.down", "experts.up"]))
    where = lora.save(model, tmp_path / "a")
    tensors = load_file(where / "adapter_model.safetensors")
    inner = tensors["base_model.model.experts.base_layer.lora_A.weight"]
    assert torch.equal(inner, model.experts.adapters["default"]["up"].a) and len(tensors) == 4
    config = json.loads((where / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["down", "up"] and config["peft_version"] == "0.19.0"


def test_a_parameter_of_a_linear_layer_is_as_the_layer() -> None:
    x = torch.randn(5, 6)
    one, two = lora.wrap(net(), r=R, targets=["gate"]), lora.wrap(net(), r=R, targets=[], parameters=["gate.weight"])
    part, stacked = one.gate.adapters["default"], two.gate.adapters["default"]["weight"]
    with torch.no_grad():
        part.b.normal_()
        stacked.a.copy_(part.a)
        stacked.b.copy_(part.b)
    torch.testing.assert_close(two(x), one(x), rtol=1e-6, atol=1e-6)


def test_two_adapters_on_experts_add_up_and_switch() -> None:
    x, base = torch.randn(5, 6), net()
    model = shaken(lora.wrap(net(), r=R, targets=[], parameters=["experts.up"], name="one"))
    shaken(lora.wrap(model, r=1, targets=[], parameters=["experts.up", "experts.down"], name="two"))
    lora.activate(model, ["one", "two"])
    both = model.experts.weights()
    lora.activate(model, "one")
    first = model.experts.weights()
    assert set(first) == {"up"} and set(both) == {"up", "down"}
    lora.activate(model, "two")
    second = model.experts.weights()
    torch.testing.assert_close(both["up"], first["up"] + second["up"] - base.experts.up.detach(), rtol=1e-5, atol=1e-5)
    lora.detach(model, "two")
    lora.detach(model, "one")
    assert torch.equal(model(x), base(x)) and not isinstance(model.experts, LoRAExperts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameters": ["experts.upp"]}, "did you mean 'up'"),
        ({"parameters": ["experts"]}, "none that can be adapted"),
        ({"parameters": ["experts.up"], "dropout": 0.1}, "dropout is for linear layers"),
        ({"parameters": ["experts.up"], "dora": True}, "dora is for linear layers"),
        ({"parameters": ["experts.up"], "init": "pissa"}, "init='pissa' is for linear layers"),
        ({"parameters": ["gate.weight"], "targets": ["gate"]}, "'gate' was asked for as LoRALinear and LoRAExperts"),
        ({"parameters": ["experts.up"], "rank_pattern": {"gate.weight": 2}}, "matches no module|none that can be"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    model = net()
    with pytest.raises(ValueError, match=message):
        lora.wrap(model, **({"targets": ["experts"] if False else []} | options))
    assert not any("adapters" in key for key in model.state_dict())


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({".lora_A.weight": (E * R, 5), ".lora_B.weight": (4, R * E)}, {}, "maps 6 to 4, and its factors are"),
        ({".lora_A.weight": (E * R, 6)}, {}, "has .'a'. of the factors a, b"),
        ({".lora_A.weight": (E * 1, 6), ".lora_B.weight": (4, E * 1)}, {}, "rank 1, and .* says 2"),
        (
            {".lora_A.weight": (E * R, 6), ".lora_B.weight": (4, R * E)},
            {"target_parameters": ["experts.up", "experts.down"]},
            "experts.up has .. of the factors",
        ),
        ({".lora_A.weight": (E * R, 6), ".lora_B.weight": (4, R * E)}, {"target_parameters": []}, "neither linear"),
        ({".lora_A.weight": (E * R, 6), ".lora_B.weight": (4, R * E)}, {"target_parameters": "up"}, "list of names"),
    ],
)
def test_a_wrong_file_is_refused(
    tensors: dict[str, tuple[int, ...]], config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    made = {key: torch.zeros(shape) for key, shape in tensors.items()}
    config = {"target_parameters": ["experts.up"], "peft_version": "0.21.2"} | config
    model = net()
    with pytest.raises(ValueError, match=message):
        lora.attach(model, folder(tmp_path / "a", made, **config))
    assert not any("adapters" in key for key in model.state_dict())
