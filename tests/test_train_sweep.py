"""Several adapters at once: each equals its solo run, one that fails does not touch the others."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import lora
from lora.__main__ import main
from lora.layer import adapted
from lora.train.guard import Interrupted
from lora.train.members import Member, grid
from lora.train.sweep import sweep

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
    for wrong in ({"neftune": 5.0}, {"eval_every": 2}, {"save_every": 5}, {"compute": "fp8"}, {"lora_plus": 16.0}):
        [(key, value)] = wrong.items()
        with pytest.raises(ValueError, match=f"{key}={value} is not for a sweep"):
            sweep(model, tokenizer, DATA, members=MEMBERS, config=quiet(**wrong))
    lora.wrap(model, r=2)
    with pytest.raises(ValueError, match="has some already"):
        sweep(model, tokenizer, DATA, members=MEMBERS, config=quiet())
    assert len(grid([1e-4, 2e-4], [8, 16], [32.0], [0, 1, 2])) == 12


def test_a_folder_that_cannot_be_written_is_refused_before_training(stories: Path, tmp_path: Path) -> None:
    model, tokenizer = lora.load(stories, device="cpu")
    (tmp_path / "file").write_text("mine")
    ran: list[int] = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(OSError, match="sweep cannot be written, so nothing was trained: "):
        sweep(model, tokenizer, DATA, members=MEMBERS, config=quiet(out=str(tmp_path / "file" / "sweep")))
    assert not ran and (tmp_path / "file").read_text() == "mine"


def test_what_cannot_be_written_at_the_end_is_named_and_the_rest_is_whole(stories: Path, tmp_path: Path) -> None:
    model, tokenizer = lora.load(stories, device="cpu")
    out, lost = tmp_path / "sweep", MEMBERS[1].name

    def stand_in_the_way(*_: Any) -> None:
        (out / lost).write_text("mine")

    model.model.norm.register_forward_pre_hook(stand_in_the_way)
    with pytest.raises(OSError, match=f"the sweep ended, and {lost} could not be written to .*; the rest is whole"):
        sweep(model, tokenizer, DATA, members=MEMBERS, config=quiet(out=str(out)))
    for m in (MEMBERS[0], MEMBERS[2]):
        again, _ = lora.load(stories, device="cpu")
        lora.attach(again, out / m.name / "adapter")
    table = json.loads((out / "sweep.json").read_text())
    assert not table["finished"] and len(table["members"]) == 3 and (out / lost).read_text() == "mine"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_sweep_after_its_step_and_the_adapters_are_written(
    number: int, stories: Path, tmp_path: Path
) -> None:
    model, tokenizer = lora.load(stories, device="cpu")
    out, calls = tmp_path / "sweep", []

    def cut(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 1 + 2 * 2 + 1:  # the probe, two steps of two batches, the first batch of the third
            os.kill(os.getpid(), number)

    model.model.norm.register_forward_pre_hook(cut)
    with pytest.raises(Interrupted, match="after step 3: the adapters lie under .*sweep as they stood") as e:
        sweep(model, tokenizer, DATA, DATA[:3], members=MEMBERS, config=quiet(out=str(out)))
    assert e.value.code == 128 + number
    table = json.loads((out / "sweep.json").read_text())
    assert not table["finished"] and [len(x["losses"]) for x in table["members"]] == [3, 3, 3]
    for m in MEMBERS:
        again, _ = lora.load(stories, device="cpu")
        lora.attach(again, out / m.name / "adapter")


def test_a_signal_while_a_sweep_is_evaluated_does_not_wait_for_its_end(stories: Path, tmp_path: Path) -> None:
    model, tokenizer = lora.load(stories, device="cpu")
    out, batches = tmp_path / "sweep", []

    def cut(module: Any, args: Any) -> None:
        if not module.training:
            batches.append(1)
            if len(batches) == 3:  # of two a member: one is measured, the second half so
                os.kill(os.getpid(), signal.SIGTERM)

    model.model.embed_tokens.register_forward_pre_hook(cut)
    with pytest.raises(Interrupted, match="SIGTERM after step 5: the adapters lie under"):
        sweep(model, tokenizer, DATA, DATA[:3], members=MEMBERS, config=quiet(out=str(out)))
    table = json.loads((out / "sweep.json").read_text())
    assert len(batches) == 3 and not table["finished"]
    assert sorted(x["eval_loss"] is None for x in table["members"]) == [False, True, True]
    assert len(list(out.glob("*/adapter/adapter_model.safetensors"))) == 3


def test_memory_that_runs_out_in_the_probe_says_what_to_do(stories: Path) -> None:
    model, tokenizer = lora.load(stories, device="cpu")

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")

    model.model.norm.register_forward_pre_hook(full)
    with pytest.raises(RuntimeError, match=r"3 times 2 rows of up to \d+ tokens, does not.*take fewer adapters"):
        sweep(model, tokenizer, DATA, members=MEMBERS, config=quiet())
    assert all(layer.by_row is None for _, layer in adapted(model))


def test_every_step_is_logged_with_the_losses_of_all(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = lora.load(stories, device="cpu")
    out, members = tmp_path / "sweep", [*MEMBERS[:2], Member(lr=50.0, r=2, seed=3)]
    config = quiet(out=str(out), progress=True, max_steps=8, schedule="constant", warmup=0.0)
    found = {x.member: x for x in sweep(model, tokenizer, DATA, members=members, config=config).results}
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == list(range(1, 9))
    for i, m in enumerate(members[:2]):
        assert [x["losses"][i] for x in lines] == found[m].losses
    assert lines[-1]["losses"][2] is None and lines[-1]["loss"] == pytest.approx(sum(lines[-1]["losses"][:2]) / 2)
    assert "step 8" in capsys.readouterr().err


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
