"""Adapters added up: against dense sums in float64, against peft, and on a model."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lora
from lora.__main__ import main
from lora.format import rank_and_scale, read_adapter, sort_adapter


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.one, self.two = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(self.embed(ids))))


def adapter(folder: Path, seed: int, net: Net | None = None, **how) -> Path:
    net = lora.wrap(net or Net(), **how)
    torch.manual_seed(seed)
    for p in net.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    return lora.save(net, folder)


def updates(folder: Path) -> dict[str, Tensor]:
    config, tensors = read_adapter(folder)
    parts = sort_adapter(tensors, folder).updates
    scales = {path: rank_and_scale(config, path, f, folder)[1] for path, f in parts.items()}
    return {path: f["b"].double() @ f["a"].double() * scales[path] for path, f in parts.items()}


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    one = adapter(tmp_path / "a", 1, r=2, alpha=6, targets=["one", "two", "embed"])
    return [one, adapter(tmp_path / "b", 2, r=3, alpha=4, targets=["one", "embed"], rslora=True)]


def test_cat_is_the_sum(two: list[Path], tmp_path: Path) -> None:
    made = lora.combine(two, tmp_path / "c", [0.5, -2.0])
    a, b, c = updates(two[0]), updates(two[1]), updates(tmp_path / "c")
    assert made.r == 5 and made.error == 0.0 and c.keys() == a.keys()
    for path, got in c.items():
        want = 0.5 * a[path] - 2.0 * b.get(path, torch.zeros_like(a[path]))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_the_model_answers_as_with_both(two: list[Path], tmp_path: Path) -> None:
    both, one, ids = Net(), Net(), torch.arange(11)
    for name, folder in zip(("a", "b"), two, strict=True):
        lora.attach(both, folder, name=name)
    lora.activate(both, ["a", "b"])
    lora.combine(two, tmp_path / "c")
    lora.attach(one, tmp_path / "c")
    torch.testing.assert_close(one(ids), both(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_svd_is_the_best_of_its_rank_and_tells_its_error(two: list[Path], tmp_path: Path, rank: int) -> None:
    made = lora.combine(two, tmp_path / "c", method="svd", rank=rank)
    a, b, c = updates(two[0]), updates(two[1]), updates(tmp_path / "c")
    lost = size = 0.0
    for path, got in c.items():
        want = a[path] + b.get(path, torch.zeros_like(a[path]))
        s = torch.linalg.svdvals(want)
        assert torch.linalg.matrix_rank(got) <= rank
        assert float((got - want).norm()) == pytest.approx(float(s[rank:].norm()), abs=1e-5)
        assert made.errors[path] == pytest.approx(float((got - want).norm() / want.norm()), abs=1e-5)
        lost, size = lost + float((got - want).norm() ** 2), size + float(want.norm() ** 2)
    assert made.error == pytest.approx((lost / size) ** 0.5, abs=1e-5) and made.r == rank


def test_one_adapter_at_a_lower_rank(two: list[Path], tmp_path: Path) -> None:
    made = lora.combine(two[:1], tmp_path / "c", method="svd", rank=1)
    assert 0 < made.error < 1 and made.r == 1 and "of the sum" in str(made)


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_peft_combines_alike(method: str, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"]), "a")
    model.add_adapter("b", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "up_proj"]))
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.2)
    model.save_pretrained(tmp_path)
    model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "c", method, **({"svd_rank": 3} if method == "svd" else {}))
    made = lora.combine(
        [tmp_path / "a", tmp_path / "b"], tmp_path / "ours", [0.7, 0.4], method, 3 if method == "svd" else None
    )
    assert made.r == (3 if method == "svd" else 6)
    got = updates(tmp_path / "ours")
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            torch.testing.assert_close(got[name].float(), module.get_delta_weight("c"), rtol=1e-4, atol=1e-5)


def test_other_bases_are_refused(two: list[Path], tmp_path: Path) -> None:
    other = adapter(tmp_path / "o", 3, net=Net(seed=9), r=2, targets=["one"])
    with pytest.raises(ValueError, match="different bases"):
        lora.combine([two[0], other], tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_what_does_not_add_up_is_refused(two: list[Path], tmp_path: Path) -> None:
    dora = adapter(tmp_path / "d", 4, r=2, targets=["one"], dora=True)
    with pytest.raises(ValueError, match="DoRA"):
        lora.combine([two[0], dora], tmp_path / "c")
    whole = adapter(tmp_path / "w", 5, r=2, targets=["one"], train_modules=["two"])
    with pytest.raises(ValueError, match="whole"):
        lora.combine([two[0], whole], tmp_path / "c")


@pytest.mark.parametrize(
    "how",
    [
        {"weights": [1.0]}, {"weights": [0.0, 0.0]}, {"weights": [float("nan"), 1.0]}, {"method": "linear"},
        {"rank": 2}, {"method": "svd", "rank": 0},
    ],
)  # fmt: skip
def test_wrong_calls_say_so(two: list[Path], tmp_path: Path, how: dict) -> None:
    with pytest.raises(ValueError, match="weights|method|rank"):
        lora.combine(two, tmp_path / "c", **how)
    assert not (tmp_path / "c").exists()


def test_the_command(two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["combine", *map(str, two), "--out", str(tmp_path / "c"), "--weights", "0.5,0.5", "--method", "svd"]
    assert main([*words, "--rank", "2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["r"] == 2 and 0 < said["error"] < 1 and len(said["errors"]) == 3
    assert main([*words, "--rank", "2"]) == 2 and "not overwritten" in capsys.readouterr().err
