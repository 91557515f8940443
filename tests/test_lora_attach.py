"""Adapter folders: what a file holds, and that a wrong one is refused with the model as before."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import gpt2, llama, logits, shake
from torch import Tensor, nn

import lora
from lora.layer import adapted

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def test_a_file_holds_adapter_tensors_only_under_pefts_names(tmp_path: Path) -> None:
    lora.save(lora.wrap(llama(), r=4, targets=["q_proj"], name="mine"), tmp_path / "a", base="some/model")
    layers = [f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{f}.weight" for i in (0, 1) for f in "AB"]
    assert sorted(load_file(tmp_path / "a" / WEIGHTS)) == layers
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert config["peft_type"] == "LORA" and config["target_modules"] == ["q_proj"] and config["r"] == 4
    assert config["inference_mode"] is True and config["base_model_name_or_path"] == "some/model"


def test_one_of_two_adapters_is_saved_by_name(tmp_path: Path) -> None:
    model = lora.wrap(llama(), r=4, name="one")
    shake(lora.wrap(model, r=2, name="one_more", targets=["q_proj"]))
    with pytest.raises(ValueError, match="say which"):
        lora.save(model, tmp_path / "a")
    with pytest.raises(KeyError, match="two"):
        lora.save(model, tmp_path / "a", "two")
    assert not any(tmp_path.iterdir())
    lora.save(model, tmp_path / "a", "one_more")
    assert len(load_file(tmp_path / "a" / WEIGHTS)) == 4


def test_a_loaded_adapter_trains_further_when_asked(saved: Path) -> None:
    model = lora.attach(llama(), saved, trainable=True)
    assert all(p.requires_grad == (".adapters." in n) for n, p in model.named_parameters())


def test_an_adapter_made_on_16_bits_stands_on_4_bits(saved: Path) -> None:
    model = lora.quantize(llama())
    base = logits(model)
    lora.attach(model, saved)
    assert (logits(model) - base).abs().max() > 1e-3
    with lora.disabled(model):
        assert torch.equal(logits(model), base)


# ---- wrong files ----
@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A good folder of an adapter on q_proj and v_proj."""
    return lora.save(shake(lora.wrap(llama(), r=4, targets=["q_proj", "v_proj"]), size=0.1), tmp_path / "good")


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def first(tensors: dict[str, Tensor]) -> str:
    return sorted(tensors)[0]


def as_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "adapter_model.bin")


def cut(folder: Path, n: int) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:n])


def drop_prefix(t: dict[str, Tensor]) -> None:
    for key in list(t):
        t[key.removeprefix("base_model.model.")] = t.pop(key)


def other_prefix(t: dict[str, Tensor]) -> None:
    for key in list(t):
        t[key.replace("model.model.model.", "model.model.transformer.")] = t.pop(key)


def drop_layer(t: dict[str, Tensor]) -> None:
    for key in [k for k in t if "layers.1.self_attn.v_proj" in k]:
        del t[key]


def spoil(t: dict[str, Tensor]) -> None:
    t[first(t)][0, 0] = float("nan")


def reshape(t: dict[str, Tensor]) -> None:
    t[first(t)] = torch.zeros(4, 33)


EXTRA = "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"
MAGNITUDE = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
WRONG: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), FileNotFoundError, "holds no adapter_config.json"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, "holds no adapter_model.safetensors"),
    "a pickle": (as_pickle, ValueError, "is a pickle"),
    "cut short": (lambda f: cut(f, -100), ValueError, "damaged or cut short"),
    "cut in the header": (lambda f: cut(f, 20), ValueError, "damaged or cut short"),
    "empty file": (lambda f: cut(f, 0), ValueError, "damaged or cut short"),
    "no tensors": (lambda f: edit_tensors(f, dict.clear), ValueError, "holds no tensors"),
    "corrupt config": (lambda f: (f / CONFIG).write_text('{"r": 4,'), ValueError, "not valid JSON"),
    "config a list": (lambda f: (f / CONFIG).write_text("[]"), ValueError, "peft_type"),
    "another kind": (lambda f: edit_config(f, peft_type="IA3"), ValueError, "'IA3'"),
    "no rank": (lambda f: edit_config(f, r=None), ValueError, "r is None"),
    "another rank": (lambda f: edit_config(f, r=8), ValueError, "rank 4"),
    "dora": (lambda f: edit_config(f, use_dora=True), ValueError, "lacks the lengths of its rows"),
    "biases": (lambda f: edit_config(f, bias="some"), ValueError, "bias='some'"),
    "a bias of B": (lambda f: edit_config(f, lora_bias=True), ValueError, "lacks the bias of B"),
    "an activated LoRA": (
        lambda f: edit_config(f, alora_invocation_tokens=[1, 2]),
        ValueError,
        "alora_invocation_tokens=.1, 2. is a kind of adapter that there is not here",
    ),
    "layers used twice": (lambda f: edit_config(f, layer_replication=[[0, 1], [0, 1]]), ValueError, "replication"),
    "a moved base": (lambda f: edit_config(f, init_lora_weights="olora"), ValueError, "stands on a changed base"),
    "a regex that is none": (lambda f: edit_config(f, target_modules="(q"), ValueError, "must be names"),
    "tokens without rows": (lambda f: edit_config(f, trainable_token_indices=[1]), ValueError, "no rows for that"),
    "experts of another model": (
        lambda f: edit_config(f, target_parameters=["experts.up"]),
        ValueError,
        "are not in this model",
    ),
    "no prefix": (lambda f: edit_tensors(f, drop_prefix), ValueError, "does not start with"),
    "another base": (lambda f: edit_tensors(f, other_prefix), ValueError, "for another base: 4 of its 4"),
    "an extra tensor": (lambda f: edit_tensors(f, lambda t: t.update({EXTRA: torch.ones(4, 32)})), ValueError, "9"),
    "a DoRA tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({MAGNITUDE: torch.ones(32)})),
        ValueError,
        "says use_dora: false",
    ),
    "a missing factor": (lambda f: edit_tensors(f, lambda t: t.pop(first(t))), ValueError, "lacks its factor A"),
    "a missing layer": (lambda f: edit_tensors(f, drop_layer), ValueError, "incomplete.*v_proj"),
    "another shape": (lambda f: edit_tensors(f, reshape), ValueError, "for another base.*maps 32 to 32"),
    "a NaN": (lambda f: edit_tensors(f, spoil), ValueError, "holds NaN or inf"),
    "an integer rank_pattern out of step": (
        lambda f: edit_config(f, rank_pattern={"q_proj": 8}),
        ValueError,
        "rank 4",
    ),
    "alpha of zero": (lambda f: edit_config(f, lora_alpha=0), ValueError, "alpha"),
    "dropout of one": (lambda f: edit_config(f, lora_dropout=1.0), ValueError, "dropout"),
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("wrong", list(WRONG))
def test_a_wrong_folder_is_refused_and_the_model_as_before(wrong: str, wrapped: bool, saved: Path) -> None:
    spoil_it, error, text = WRONG[wrong]
    spoil_it(saved)
    model = llama()
    if wrapped:
        shake(lora.wrap(model, r=2, name="other"))
    before, keys = logits(model), list(model.state_dict())
    trainable = [p.requires_grad for p in model.parameters()]
    modules = [id(m) for m in model.modules()]
    with pytest.raises(error, match=text) as caught:
        lora.attach(model, saved)
    assert str(saved) in str(caught.value) or wrong in ("alpha of zero", "dropout of one")
    assert torch.equal(logits(model), before) and list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert [id(m) for m in model.modules()] == modules


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        lora.attach(llama(), tmp_path / "nowhere")


def test_another_model_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="for another base"):
        lora.attach(gpt2(), saved)


def test_a_name_that_is_taken_is_refused(saved: Path) -> None:
    model = lora.attach(llama(), saved)
    before = logits(model)
    with pytest.raises(ValueError, match="already has an adapter 'default'"):
        lora.attach(model, saved)
    assert torch.equal(logits(model), before)
    lora.attach(model, saved, "second")
    assert lora.status(model).adapters == ("default", "second")


def test_a_merged_model_takes_no_adapter(saved: Path) -> None:
    model = lora.merge(lora.attach(llama(), saved))
    with pytest.raises(RuntimeError, match="merged"):
        lora.attach(model, saved, "second")


# ---- saving ----
def test_a_filled_folder_is_not_overwritten(saved: Path, tmp_path: Path) -> None:
    model = lora.attach(llama(), saved)
    held = (saved / WEIGHTS).read_bytes()
    with pytest.raises(FileExistsError, match="not overwritten"):
        lora.save(model, saved)
    assert (saved / WEIGHTS).read_bytes() == held
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(FileExistsError):
        lora.save(model, file)
    (tmp_path / "empty").mkdir()
    lora.save(model, tmp_path / "empty")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "good"]


def test_a_broken_adapter_is_not_written(tmp_path: Path) -> None:
    model = lora.wrap(llama(), r=4)
    with torch.no_grad():
        next(adapted(model))[1].adapters["default"].a[0, 0] = float("inf")
    with pytest.raises(ValueError, match="holds NaN or inf"):
        lora.save(model, tmp_path / "a")
    assert not any(tmp_path.iterdir())


def test_a_save_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    model = lora.wrap(llama(), r=4)
    with pytest.raises(TypeError):
        lora.save(model, tmp_path / "a", base=object())  # type: ignore[arg-type]  # no JSON, found after the weights
    assert not any(tmp_path.iterdir())


def test_a_model_without_adapter_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapter to save"):
        lora.save(llama(), tmp_path / "a")
    assert not any(tmp_path.iterdir())


# ---- names that end alike ----
class Alike(nn.Module):
    """`up` is also the last part of `body.up`."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.body = nn.Linear(8, 8), nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        return self.body["down"](self.body["up"](self.up(x)))


def test_the_scale_of_one_layer_does_not_reach_another_whose_name_ends_alike(tmp_path: Path) -> None:
    model, twin, x = Alike(), Alike(), torch.randn(3, 8)
    twin.load_state_dict(model.state_dict())
    lora.wrap(model, targets=["*"], r=4, alpha=8.0)
    model.up.adapters["default"].scale = 5.0
    lora.attach(twin, lora.save(shake(model), tmp_path / "a"))
    assert torch.equal(twin(x), model(x))


def test_an_adapter_on_one_of_two_layers_whose_names_end_alike_comes_back(tmp_path: Path) -> None:
    base = Alike()
    model = lora.wrap(copy.deepcopy(base), exclude=["body.*"], r=2)
    lora.attach(base, lora.save(model, tmp_path / "a"))
