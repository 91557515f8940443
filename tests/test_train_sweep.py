"""Several adapters at once: each equals its solo run, one that fails does not touch the others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lora
from lora.__main__ import main
from lora.layer import adapted
from lora.train.sweep import Member, grid, sweep

DATA = [{"prompt": f"{i} cats", "completion": " sat on a mat" * (1 + i % 4)} for i in range(11)]
MEMBERS = [
    Member(lr=1e-3, r=2, alpha=4, seed=1),
    Member(lr=5e-3, r=8, alpha=16, seed=1),
    Member(lr=2e-3, r=4, alpha=32, seed=7),
]


def quiet(**more: Any) -> lora.TrainConfig:
    return lora.TrainConfig(**({"progress": False, "batch": 2, "accumulate": 2, "max_steps": 5, "eps": 1e-5} | more))


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("more", [{}, {"recompute": True, "schedule": "wsd", "weight_decay": 0.1, "optim_bits": 8}])
def test_each_of_several_equals_its_solo_run(
    more: dict[str, Any], quantize: str | None, stories: Path, tmp_path: Path
) -> None:
    model, tokenizer = lora.load(stories, quantize=quantize, device="cpu")
    out = tmp_path / "sweep"
    found = sweep(model, tokenizer, DATA, DATA[:3], members=MEMBERS, config=quiet(out=str(out), **more))
    assert [x.eval_loss for x in found.results] == sorted(x.eval_loss or 0 for x in found.results)
    for x in found.results:
        m = x.member
        solo, _ = lora.load(stories, quantize=quantize, device="cpu")
        torch.manual_seed(m.seed)
        lora.wrap(solo, r=m.r, alpha=m.alpha)
        run = lora.fit(solo, tokenizer, DATA, DATA[:3], quiet(lr=m.lr, seed=m.seed, **more))
        near = 1e-5 if "optim_bits" not in more else 1e-3  # a code of 8 bits may fall to either side
        assert x.losses == pytest.approx([h["loss"] for h in run.history if "loss" in h], abs=near)
        assert x.eval_loss == pytest.approx([h["eval_loss"] for h in run.history if "eval_loss" in h][-1], abs=near)
        for (name, a), (_, b) in zip(adapted(model), adapted(solo), strict=True):
            for mine, theirs in zip(a.adapters[m.name].parameters(), b.adapters["default"].parameters(), strict=True):
                assert (mine - theirs).abs().max() < 3 * near, name  # Adam divides roundings by small gradients
        again, _ = lora.load(stories, quantize=quantize, device="cpu")
        lora.attach(again, out / m.name / "adapter")
        lora.activate(model, m.name)
        ids = torch.randint(3, 500, (1, 7))
        assert torch.equal(again.eval()(ids), model.eval()(ids))
    assert len(json.loads((out / "sweep.json").read_text())["members"]) == 3
    assert str(found).count("\n") == 3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_on_a_gpu_a_batch_of_all_is_recorded_and_each_equals_its_solo_run(
    accumulate: int, gpu: torch.device, stories: Path
) -> None:
    members = [*MEMBERS, Member(lr=50.0, r=2, seed=3)]  # one diverges, and its rows run on
    data = [{"prompt": f"{i} cats", "completion": " sat on a mat"} for i in range(12)]
    config = quiet(max_steps=10, accumulate=accumulate, warmup=0.0, schedule="constant")
    model, tokenizer = lora.load(stories, quantize="nf4", dtype="float32", device=gpu)
    found = {x.member: x for x in sweep(model, tokenizer, data, members=members, config=config).results}
    assert "at step" in found[members[-1]].failed
    for m in MEMBERS:
        solo, _ = lora.load(stories, quantize="nf4", dtype="float32", device=gpu)
        torch.manual_seed(m.seed)
        lora.wrap(solo, r=m.r, alpha=m.alpha)
        run = lora.fit(solo, tokenizer, data, config=config.replace(lr=m.lr, seed=m.seed))
        want = [h["loss"] for h in run.history if "loss" in h]
        assert found[m].losses == pytest.approx(want, abs=1e-3), m
        assert want[-1] < want[0]


def test_one_that_diverges_is_left_out_and_the_others_are_as_without_it(stories: Path) -> None:
    wild = Member(lr=50.0, r=2, seed=3)
    found = []
    for members in ([*MEMBERS[:2], wild], MEMBERS[:2]):
        model, tokenizer = lora.load(stories, device="cpu")
        config = quiet(max_steps=8, schedule="constant", warmup=0.0)
        found.append({x.member: x for x in sweep(model, tokenizer, DATA, members=members, config=config).results})
    assert "at step" in found[0][wild].failed and len(found[0][wild].losses) < 8
    for m in MEMBERS[:2]:
        assert found[0][m].losses == pytest.approx(found[1][m].losses, abs=1e-5) and not found[0][m].failed


def test_a_sweep_that_cannot_work_is_refused(stories: Path) -> None:
    model, tokenizer = lora.load(stories, device="cpu")
    with pytest.raises(ValueError, match="at least one, and no two alike"):
        sweep(model, tokenizer, DATA, members=[MEMBERS[0], MEMBERS[0]])
    with pytest.raises(ValueError, match="neftune=5.0 is not for a sweep"):
        sweep(model, tokenizer, DATA, members=MEMBERS, config=quiet(neftune=5.0))
    lora.wrap(model, r=2)
    with pytest.raises(ValueError, match="has some already"):
        sweep(model, tokenizer, DATA, members=MEMBERS, config=quiet())
    assert len(grid([1e-4, 2e-4], [8, 16], [32.0], [0, 1, 2])) == 12


def test_the_command_trains_a_grid_and_prints_a_table(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "data.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps(row) + "\n" for row in DATA))
    words = ["sweep", "--model", str(stories), "--data", str(file), "--valid", str(file), "--out", str(out)]
    words += ["--device", "cpu", "--max_steps", "2", "--batch", "2"]
    assert main([*words, "--lr", "1e-3,2e-3", "--r", "2,4"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split() == ["lr", "r", "alpha", "seed", "loss", "eval_loss"]
    assert len(list(out.glob("*/adapter/adapter_model.safetensors"))) == 4
    assert main([*words, "--lr", "fast", "--r", "2"]) == 2
    assert "--lr fast: numbers with commas between them" in capsys.readouterr().err
