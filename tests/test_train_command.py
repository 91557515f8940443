"""`lora train --resume` and `lora verify`: exit codes, one sentence, the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from lora.__main__ import main


def words(stories: Path, folder: Path, *more: str) -> list[str]:
    file = folder / "data.jsonl"
    if not file.exists():
        rows = [{"prompt": f"{i} cats cost $", "completion": str(3 * i)} for i in range(1, 13)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["train", "--model", str(stories), "--data", str(file), "--device", "cpu", "--lora.r", "2", "--json"]
    return [*given, "--max_steps", "6", "--batch", "2", "--save_every", "2", "--progress", "false", *more]


def test_a_terminated_command_saves_exits_with_143_and_goes_on(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = words(stories, tmp_path, "--lora.dropout", "0.1", "--method", "lora")
    assert main([*given, "--out", str(tmp_path / "whole")]) == 0
    slow = (
        "import sys, time; from lora.train.steps import Steps; plain = Steps.take\n"
        "def take(*a):\n    time.sleep(0.5)\n    return plain(*a)\n"
        "Steps.take = take\nfrom lora.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    )
    # as many threads as here: their number is part of what makes the bits
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    out = tmp_path / "cut"
    started = subprocess.Popen(
        [sys.executable, "-P", "-c", slow, *given, "--out", str(out)], env=env, stderr=subprocess.PIPE, text=True
    )
    for _ in range(600):
        if (out / "log.jsonl").exists() and (out / "log.jsonl").read_text().count("\n") >= 2:
            break
        time.sleep(0.1)
    started.send_signal(signal.SIGTERM)
    _, error = started.communicate(timeout=60)
    assert started.returncode == 143 and "Traceback" not in error
    assert "interrupted SIGTERM after step" in error and f"--resume {out}" in error
    assert main(["train", "--resume", str(out), "--json"]) == 0
    capsys.readouterr()
    files = [d / "adapter/adapter_model.safetensors" for d in (tmp_path / "whole", out)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_verify_passes_a_run_and_exits_with_2_where_bits_differ(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main([*words(stories, tmp_path), "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["verify", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: steps 5 to 6 repeated with the same bits\n"
    log = (out / "log.jsonl").read_text()
    (out / "log.jsonl").write_text(log.replace('"loss": ', '"loss": 1'))
    assert main(["verify", str(out), "--steps", "4"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith(f"lora: error: {out}: steps 3 to 6 differ: loss of step 3 was 1")
    assert "the environment is the same" in error[-1]
    assert main(["verify", str(tmp_path)]) == 2
    assert "is no run directory: it holds no run.json" in capsys.readouterr().err


def test_a_written_config_repeats_the_run(stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, given in (("a", words(stories, tmp_path)), ("b", ["train", "--config", str(tmp_path / "a/config.yaml")])):
        assert main([*given, "--out", str(tmp_path / name)]) == 0
    digests = [json.loads((tmp_path / name / "run.json").read_text())["weights_after"] for name in "ab"]
    assert digests[0] == digests[1]
    capsys.readouterr()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["train"], "lora train needs --model, --data, --out, or --resume DIR"),
        (["train", "--resume", "nowhere"], "nowhere is no run directory"),
        (["train", "--resume", "x", "--lr", "1e-3", "--model", "y"], "takes every setting from x; leave out"),
    ],
)
def test_a_call_that_cannot_work_is_refused(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(given) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_run_is_logged_elsewhere_too(
    name: str, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stand-ins for the two packages; like the real ones they write into the run's folder as soon as they are made."""
    got: list[tuple[str, int, float]] = []
    ended: list[int] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            Path(folder).mkdir(parents=True)

        def add_scalar(self, key: str, value: float, step: int) -> None:
            got.append((key, step, value))

        def log(self, entry: dict[str, float], step: int) -> None:
            got.extend((key, step, value) for key, value in entry.items())

        def close(self) -> None:
            ended.append(1)

        finish = close

    def init(**given: str) -> Writer:
        assert (given["project"], given["name"]) == ("lora", "run") and Path(given["dir"]).is_dir()
        return Writer(f"{given['dir']}/wandb")

    modules = {"torch.utils.tensorboard": {"SummaryWriter": Writer}, "wandb": {"init": init}}
    for module, inside in modules.items():
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**inside))
    out = tmp_path / "run"
    given = [*words(stories, tmp_path), "--out", str(out), "--log_to", name]
    assert (
        main([*given, "--max_length", "513"]) == 2 and not out.exists()
    )  # a run that is refused leaves nothing behind
    assert main(given) == 0 and (out / name).is_dir() and ended == [1]
    losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines() if '"loss"' in line]
    assert [value for key, step, value in got if key == "loss"] == losses and len(losses) == 6


def test_data_is_refused_before_a_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "1", "a": "2"}\n')
    given = ["--model", str(tmp_path / "no model"), "--data", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "run")]
    for command in (["train", *given], ["sweep", *given, "--lr", "1e-3"]):
        assert main(command) == 2
        assert 'as in {"prompt": "q", "completion": "a"}' in capsys.readouterr().err
