"""The lora command: help, one small run through every command, and one sentence for each mistake."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora.__main__ import main
from lora.commands.flags import _ELSEWHERE
from lora.commands.training import COMMANDS as TRAINING

COMMANDS = ("demo", "train", "eval", "generate", "quantize", "merge")
DEFAULTS = {
    "demo": "default: 0",
    "train": "default: cosine",
    "eval": "default: 64",
    "generate": "default: 0.0",
    "quantize": "default: nf4",
    "merge": "default: auto",
}


def data(path: Path, n: int = 12) -> Path:
    rows = [{"prompt": f"{i} cats cost $", "completion": str(3 * i)} for i in range(1, n + 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def last_json(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def run(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data.jsonl and a run of three steps on it."""
    folder = tmp_path_factory.mktemp("run")
    file = data(folder / "data.jsonl")
    words = ["train", "--model", str(stories), "--data", str(file), "--out", str(folder / "out"), "--device", "cpu"]
    assert main([*words, "--max_steps", "3", "--batch", "4", "--lora.r", "4", "--progress", "false", "--json"]) == 0
    return folder


def test_help_says_what_each_command_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        main(["--help"])
    assert e.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "merge Fold an adapter into its base" in text and "demo Quantize, tune, measure" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_defaults(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        main([command, "--help"])
    assert e.value.code == 0
    assert DEFAULTS[command] in " ".join(capsys.readouterr().out.split())


def test_the_installed_command_runs() -> None:
    code = "import sys; from lora.__main__ import main; sys.exit(main(['--help']))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)


def test_train_writes_a_run(run: Path) -> None:
    held = {p.name for p in (run / "out").iterdir()} - {"loss.png"}  # which needs matplotlib
    assert held == {"adapter", "checkpoints", "config.yaml", "log.jsonl", "report.html", "run.json"}
    assert sum('"loss"' in line for line in (run / "out/log.jsonl").read_text().splitlines()) == 3
    assert json.loads((run / "out/adapter/adapter_config.json").read_text())["r"] == 4


def test_eval_compares_base_and_tuned(
    run: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "--model", str(stories), "--data", str(run / "data.jsonl"), "--max_new_tokens", "4"]
    words += ["--adapter", str(run / "out/adapter"), "--metrics", "perplexity,mae", "--device", "cpu"]
    assert main([*words, "--quantize", "nf4", "--out", str(tmp_path / "a.html"), "--json"]) == 0
    got = last_json(capsys.readouterr().out)
    assert got.keys() == {"base", "tuned"} and got["base"].keys() == {"perplexity", "mae"}
    assert got["tuned"]["perplexity"] != got["base"]["perplexity"]
    assert "<svg" in (tmp_path / "a.html").read_text()


def test_generate_answers(run: Path, stories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--model", str(stories), "--prompt", "Once upon a time", "--max_new_tokens", "6"]
    assert main([*words, "--device", "cpu", "--json"]) == 0
    assert last_json(capsys.readouterr().out) == {"prompt": "Once upon a time", "text": ", there was a little g"}
    assert main([*words, "--device", "cpu", "--quantize", "nf4", "--adapter", str(run / "out/adapter")]) == 0
    with pytest.warns(UserWarning, match="the same model in another precision"):
        assert main([*words, "--device", "cpu", "--adapter", str(run / "out/adapter")]) == 0


def test_merge_and_quantize_write_models_that_load(
    run: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge = ["merge", "--model", str(stories), "--adapter", str(run / "out/adapter"), "--device", "cpu"]
    with pytest.warns(UserWarning, match="the same model in another precision"):
        assert main([*merge, "--out", str(tmp_path / "merged"), "--json"]) == 0
    assert last_json(capsys.readouterr().out)["max_logit_difference"] < 0.5  # bfloat16 against float32
    four = [*merge, "--quantize", "nf4", "--into", "4bit", "--out", str(tmp_path / "four"), "--json"]
    assert main([*four, "--rounding", "nearest", "--at_least", "2"]) == 2
    assert "would lose what was learned" in capsys.readouterr().err and not (tmp_path / "four").exists()
    assert main(four) == 0
    assert "stochastic rounding:" in last_json(capsys.readouterr().out)["told"]
    assert main(["generate", "--model", str(tmp_path / "four"), "--prompt", "Once", "--max_new_tokens", "2"]) == 0
    assert main(["quantize", str(tmp_path / "merged"), str(tmp_path / "packed"), "--json"]) == 0
    assert last_json(capsys.readouterr().out)["bytes"] > 10_000
    assert main(["generate", "--model", str(tmp_path / "packed"), "--prompt", "Once", "--max_new_tokens", "2"]) == 0


# ---- mistakes ----
def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence of a command that must exit with 2."""
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    said = [line for line in error.splitlines() if line.startswith("lora: error: ")]
    assert len(said) == 1 and error.splitlines()[-1] == said[0]
    return said[0]


def train(stories: Path, folder: Path, *more: str) -> list[str]:
    file = folder / "data.jsonl"
    if not file.exists():
        data(file)
    words = ["train", "--model", str(stories), "--data", str(file), "--out", str(folder / "out"), "--device", "cpu"]
    return [*words, "--max_steps", "1", "--progress", "false", *more]


def test_a_missing_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere does not exist" in refused(train(tmp_path / "nowhere", tmp_path), capsys)
    assert not (tmp_path / "out").exists()


def test_a_bad_line_is_refused(stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n')
    assert "data.jsonl line 2 is not valid JSON" in refused(train(stories, tmp_path), capsys)
    assert not (tmp_path / "out").exists()


def test_data_that_is_not_text_is_refused(stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.jsonl").write_bytes(b'{"prompt": "caf\xe9", "completion": "b"}\n')
    assert "data.jsonl" in refused(train(stories, tmp_path), capsys)


def test_missing_data_is_refused(stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = train(stories, tmp_path)
    (tmp_path / "data.jsonl").unlink()
    assert "data.jsonl is not there" in refused(words, capsys)


def test_an_unknown_metric_is_refused(stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = data(tmp_path / "data.jsonl")
    words = ["eval", "--model", str(stories), "--data", str(file), "--metrics", "bleu", "--device", "cpu"]
    assert "bleu" in refused(words, capsys)


@pytest.mark.parametrize("command", ["train", "quantize", "merge"])
def test_a_filled_folder_is_refused(
    command: str, run: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    merge = ["merge", "--model", str(stories), "--adapter", str(run / "out/adapter"), "--out", str(out)]
    quantize = ["quantize", str(stories), str(out)]
    words = {"train": train(stories, tmp_path), "quantize": quantize, "merge": merge}[command]
    assert "it is not overwritten" in refused(words, capsys)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--lora.r", "0"), "r=0"),
        (("--lora.targets", "no_such_layer"), "no_such_layer"),
        (("--lr", "-1"), "lr=-1"),
        (("--batch", "0"), "batch=0"),
    ],
)
def test_a_bad_setting_is_refused(
    more: tuple[str, ...], message: str, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(train(stories, tmp_path, *more), capsys)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_refused(
    run: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = stories.parent / "babyllama-char"
    if not other.is_dir():
        pytest.skip(f"real test material is not here: {other}")
    words = ["generate", "--model", str(other), "--adapter", str(run / "out/adapter"), "--prompt", "a"]
    assert "is for another base" in refused([*words, "--device", "cpu"], capsys)


def test_a_damaged_adapter_is_refused(
    run: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "out/adapter", tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    words = ["generate", "--model", str(stories), "--adapter", str(tmp_path / "adapter"), "--prompt", "a"]
    assert "adapter_model.safetensors" in refused([*words, "--device", "cpu"], capsys)


def test_an_unknown_flag_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        main(["generate", "--modle", "x"])
    assert e.value.code == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--learning_rate", "1e-4"], "--learning_rate is not known, and --lr is; see lora train --help"),
        (["--lora_alpha=8"], "--lora_alpha is not known, and --lora.alpha is"),
        (["--per-device-train-batch-size", "4"], "--per-device-train-batch-size is not known, and --batch is"),
        (["--save-every", "4"], "--save-every is not known, and --save_every is"),
        (["--bogus", "4"], "--bogus is not known; see"),
        (["--lr", "fast"], "--lr fast: float or null was expected; see"),
        (["--batch", "2.5"], "--batch 2.5: int was expected; see"),
        (["--method", "qlra"], "invalid choice: 'qlra' (choose from"),
    ],
)
def test_a_flag_by_another_name_is_told_ours(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        main(["train", "--model", "x", *given])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1 and err.startswith("lora: error: ") and said in err


def test_what_is_missing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sweep", "--model", "x"])
    assert "lora: error: lora sweep needs data, out, lr; see" in capsys.readouterr().err


def test_every_name_of_others_leads_to_a_setting() -> None:
    known = {word for action in TRAINING["train"][0]()._actions for word in action.option_strings}
    assert not [name for name, ours in _ELSEWHERE.items() if f"--{ours}" not in known or f"--{name}" in known]
