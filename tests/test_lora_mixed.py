"""One batch, an adapter for each row; and one adapter put into another's place."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_lora_models_families import build, some_ids
from torch import Tensor, nn

import lora
from lora.models.generate import generate_ids

NAMES = ["one", "two", None, "one", "both"]


def shaken(model: nn.Module) -> Any:
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.1 if p.requires_grad else p)
    return model.requires_grad_(False)


@pytest.fixture(params=[None, "nf4"], ids=["dense", "nf4"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    build("llama", tmp_path)
    loaded, _ = lora.load(tmp_path, quantize=request.param, device="cpu")
    shaken(lora.wrap(loaded, r=3, name="one", targets=["q_proj", "embed_tokens", "up_proj"]))
    shaken(lora.wrap(loaded, r=5, name="two"))
    shaken(lora.wrap(loaded, r=2, name="both", rslora=True, targets=["embed_tokens", "o_proj"]))
    return loaded


@torch.no_grad()
def alone(model: Any, name: str | None, ids: Tensor) -> Tensor:
    if name is None:
        with lora.disabled(model):
            return model(ids)
    lora.activate(model, name)
    return model(ids)


@torch.no_grad()
def test_each_row_answers_as_with_its_adapter_alone(model: Any) -> None:
    ids = some_ids(5, 12)
    want = torch.cat([alone(model, name, ids[i : i + 1]) for i, name in enumerate(NAMES)])
    lora.activate(model, ["two", "one"])
    before = model(ids)
    with lora.mixed(model, NAMES):
        got = model(ids)
    assert (got - want).abs().max() <= 1e-5 * max(1.0, float(want.abs().max()))
    assert len({float(row.sum()) for row in got[[0, 1, 2, 4]]}) == 4
    assert torch.equal(model(ids), before)
    with lora.mixed(model, [None] * 5):
        got = model(ids)
    assert (got - alone(model, None, ids)).abs().max() <= 1e-5 * float(got.abs().max())


def test_each_row_is_generated_as_alone(model: Any) -> None:
    ids = some_ids(1, 6)[0].tolist()
    want = []
    for name in NAMES:
        if name is None:
            with lora.disabled(model):
                want += generate_ids(model, [ids], 12)
        else:
            lora.activate(model, name)
            want += generate_ids(model, [ids], 12)
    with lora.mixed(model, NAMES):
        assert generate_ids(model, [ids] * 5, 12) == want
    assert len({str(w) for w in want}) > 1


def test_gradients_reach_each_adapter_from_its_rows_alone(model: Any) -> None:
    model.requires_grad_(False)
    for name, p in model.named_parameters():
        p.requires_grad_(".adapters.one." in name)
    ids = some_ids(3, 8)
    got, want = [], []
    for rows, out in ((["one", "two", "one"], got), (None, want)):
        if rows:
            with lora.mixed(model, rows):
                model(ids)[[0, 2]].square().sum().backward()
        else:
            lora.activate(model, "one")
            model(ids[[0, 2]]).square().sum().backward()
        for p in model.parameters():
            if p.requires_grad:
                out.append(p.grad)
                p.grad = None
    for a, b in zip(got, want, strict=True):
        assert b.abs().max() > 0 and (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_what_cannot_be_mixed_is_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="'three'"), lora.mixed(model, ["one", "three"]):
        pass
    with lora.mixed(model, ["one", "two"]), pytest.raises(RuntimeError, match="want 2 rows first"):
        model(some_ids(3, 4))
    lora.wrap(model, r=2, name="dora", dora=True, targets=["v_proj"])
    lora.wrap(model, r=2, name="head", targets=["v_proj"], train_modules=["lm_head"])
    for name in ("dora", "head"):
        with pytest.raises(ValueError, match="cannot act on some rows only"), lora.mixed(model, ["one", name]):
            pass
    lora.activate(model, "one")
    lora.merge(model)
    with pytest.raises(RuntimeError, match="not merged"), lora.mixed(model, ["one"]):
        pass


# ---- swap ----
@torch.no_grad()
def test_an_adapter_takes_anothers_place_without_new_tensors(tmp_path: Path) -> None:
    build("llama", tmp_path / "base")
    other, _ = lora.load(tmp_path / "base", device="cpu")
    shaken(lora.wrap(other, r=3, alpha=5.0, rslora=True, targets=["q_proj", "down_proj"]))
    lora.save(other, tmp_path / "a")
    model, _ = lora.load(tmp_path / "base", device="cpu")
    shaken(lora.wrap(model, r=4, targets=["q_proj", "v_proj", "down_proj"]))
    ids, places = some_ids(2, 9), [p.data_ptr() for p in model.parameters()]
    assert (model(ids) - other(ids)).abs().max() > 1e-3
    lora.swap(model, tmp_path / "a")
    assert (model(ids) - other(ids)).abs().max() <= 1e-5 * float(other(ids).abs().max())
    assert [p.data_ptr() for p in model.parameters()] == places


def test_what_does_not_fit_in_its_place_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    build("llama", tmp_path / "base")
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "rank": ({"r": 5, "targets": ["q_proj"]}, "do not fit into"),
        "layer": ({"r": 2, "targets": ["k_proj"]}, "has an update of .*k_proj', and adapter 'default' none"),
        "kind": ({"r": 2, "targets": ["q_proj"], "dora": True}, "more than plain low-rank updates"),
        "whole": ({"r": 2, "targets": ["q_proj"], "train_modules": ["lm_head"]}, "more than plain low-rank updates"),
    }
    model, _ = lora.load(tmp_path / "base", device="cpu")
    shaken(lora.wrap(model, r=4, targets=["q_proj"]))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for name, (options, message) in cases.items():
        other, _ = lora.load(tmp_path / "base", device="cpu")
        lora.save(lora.wrap(other, **options), tmp_path / name)
        with pytest.raises(ValueError, match=message):
            lora.swap(model, tmp_path / name)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(KeyError, match="nobody"):
        lora.swap(model, tmp_path / "rank", "nobody")
    (tmp_path / "far").mkdir()
    torch.manual_seed(9)
    build("llama", tmp_path / "far")
    far, _ = lora.load(tmp_path / "far", device="cpu")
    with torch.no_grad():
        far.model.layers[0].self_attn.q_proj.weight.mul_(-1)
        far.model.layers[1].self_attn.q_proj.weight.mul_(-1)
        far.model.layers[2].self_attn.q_proj.weight.mul_(-1)
    lora.save(lora.wrap(far, r=4, targets=["q_proj"]), tmp_path / "foreign")
    with pytest.raises(ValueError, match="trained on another base"):
        lora.swap(model, tmp_path / "foreign")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
