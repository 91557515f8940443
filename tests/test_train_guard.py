"""Runs that go wrong, and settings that cannot work: one clear sentence, and nothing bad saved, nothing lost."""

import json
import math
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import give_tokenizer

import lora
from lora.models.llama import LlamaConfig
from lora.models.tokenizer import Tokenizer
from lora.train.guard import Divergence, Interrupted, LossScale
from lora.train.log import Log
from lora.train.schedule import learning_rate
from lora.train.sinks import ready, tensorboard, wandb

DATA = [{"prompt": f"{i} cats", "completion": " sat" * (1 + i % 5)} for i in range(9)]


def fresh(stories: Path, **options: Any) -> tuple[Any, Any]:
    model, tokenizer = lora.load(stories, device="cpu")
    torch.manual_seed(1)
    return lora.wrap(model, **({"r": 4} | options)), tokenizer


def quiet(**more: Any) -> lora.TrainConfig:
    return lora.TrainConfig(**({"progress": False, "lr": 5e-3, "batch": 3, "max_steps": 4} | more))


def is_finite(folder: Path) -> bool:
    from safetensors.torch import load_file

    files = list(folder.rglob("*.safetensors"))
    return all(t.isfinite().all() for f in files for t in load_file(f).values() if t.is_floating_point())


# ---- numbers ----
# at 1.0 LoRA finds its way back on some machines, so it is not here
@pytest.mark.parametrize(("lr", "method"), [(10.0, "lora"), (10.0, "full"), (1.0, "full")])
def test_a_learning_rate_of_ten_ends_in_a_sentence_and_saves_nothing_bad(
    lr: float, method: str, stories: Path, tmp_path: Path
) -> None:
    if method == "lora":
        model, tokenizer = fresh(stories)
    else:
        model, tokenizer = lora.load(stories, device="cpu")
        model.requires_grad_(True)
    settings = quiet(lr=lr, max_steps=40, save_every=1, out=str(tmp_path / "run"), schedule="constant", warmup=0.0)
    with pytest.raises(RuntimeError, match=r"step \d+: .*(diverged at learning rate|not finite)") as e:
        lora.fit(model, tokenizer, DATA, config=settings)
    assert "nothing was saved from it" in str(e.value)
    held = {p.name for p in (tmp_path / "run").iterdir()}
    assert held == {"checkpoints", "config.yaml", "log.jsonl", "run.json"}
    found = re.search(r"step (\d+):", str(e.value))
    assert found and all(int(p.name[5:]) < int(found[1]) for p in (tmp_path / "run/checkpoints").iterdir())
    assert is_finite(tmp_path / "run") and not json.loads((tmp_path / "run/run.json").read_text())["finished"]


def test_a_run_of_two_steps_that_diverges_says_so(stories: Path) -> None:
    model, tokenizer = fresh(stories)
    with pytest.raises(RuntimeError, match="step 2: .*diverged at learning rate"):
        lora.fit(model, tokenizer, DATA, config=quiet(lr=10.0, max_steps=2, schedule="constant", warmup=0.0))


def test_a_run_of_two_steps_whose_second_has_hard_rows_did_not_diverge(stories: Path) -> None:
    hard = [{"prompt": "a", "completion": "qzxj" * 9}] * 3  # worse than a guess for a model of stories
    easy = [{"prompt": "Once upon a time, there was a little", "completion": " girl named Lily."}] * 3
    model, tokenizer = fresh(stories)
    run = lora.fit(model, tokenizer, [*easy, *hard], config=quiet(lr=1e-4, max_steps=2, seed=2))
    first, second = (h["loss"] for h in run.history if "loss" in h)
    assert first < math.log(512) < second, "the seed draws the hard rows first"


def test_a_signal_on_a_step_whose_loss_is_no_good_names_the_checkpoint_before(stories: Path, tmp_path: Path) -> None:
    model, tokenizer = fresh(stories)

    def cut(entry: dict[str, Any]) -> None:
        if entry["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    config = quiet(lr=10.0, schedule="constant", warmup=0.0, out=str(tmp_path / "run"))
    with pytest.raises(Interrupted, match="no better than a guess, and .*step-00000000 stays; go on with --resume"):
        lora.fit(model, tokenizer, DATA, config=config, sinks=[cut])


def test_a_hard_batch_is_no_divergence() -> None:
    watch = Divergence(100)
    for step, loss in enumerate([3.0, 50.0, 50.0, 3.0, 50.0, 50.0, 4.5]):
        watch.see(step, loss, 1e-4)
    for step, loss in ((8, 4.6), (9, 4.6)):
        watch.see(step, loss, 1e-4)
    with pytest.raises(RuntimeError, match="step 10: loss 4.6 is no better than a guess among 100"):
        watch.see(10, 4.6, 1e-4)


def test_a_model_gone_flat_has_diverged_however_it_began() -> None:
    watch = Divergence(512)
    for step, loss in enumerate([9.3, 17.0, 6.8, 6.2383245, 6.2383248]):
        watch.see(step, loss, 1e-4)
    with pytest.raises(RuntimeError, match="no better than a guess among 512"):
        watch.see(5, 6.2383246, 1e-4)


def test_a_run_that_begins_near_a_guess_may_stay_there() -> None:
    watch = Divergence(100)
    for step in range(10):
        watch.see(step, 4.6, 1e-4)
    for step in (10, 11):
        watch.see(step, 7.0, 1e-4)
    with pytest.raises(RuntimeError, match="step 12: loss 7 is no better"):
        watch.see(12, 7.0, 1e-4)


def test_a_loss_that_is_not_finite_names_row_and_module(stories: Path, tmp_path: Path) -> None:
    model, tokenizer = fresh(stories)
    ids = tokenizer.encode("Ω")
    model.model.embed_tokens.weight.data[ids[-1]] = math.nan
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.nan_to_num(0.0), requires_grad=False)
    data = [*DATA[:4], {"prompt": "Ω", "completion": " b"}, *DATA[5:]]
    out = tmp_path / "run"
    with pytest.raises(
        RuntimeError, match=r"step 1: loss nan.*on rows \[4\], first in the output of model.embed_tokens"
    ):
        lora.fit(model, tokenizer, data, config=quiet(batch=9, out=str(out), probe=False))
    assert is_finite(out) and not (out / "adapter").exists()


def test_a_gradient_that_is_not_finite_names_its_parameter(stories: Path) -> None:
    model, tokenizer = fresh(stories)
    name = "model.layers.2.mlp.up_proj.adapters.default.a"
    model.get_parameter(name).register_hook(lambda g: g * math.inf)
    with pytest.raises(RuntimeError, match=f"step 1: .*not finite.*first in the gradient of {name}"):
        lora.fit(model, tokenizer, DATA, config=quiet())


def test_the_loss_scale_grows_shrinks_and_gives_up() -> None:
    scale = LossScale(True)
    for _ in range(2000):
        scale.went_well()
    assert scale.value == 2.0**17 and scale.good == 0
    for _ in range(17):
        scale.overflowed()
    with pytest.raises(RuntimeError, match="overflow even unscaled; load the model in bfloat16"):
        scale.overflowed()
    plain = LossScale(False)
    for _ in range(2001):
        plain.went_well()
    assert plain.value == 1.0


# ---- disks ----
@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 10 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_runs_full_is_said_and_what_was_saved_stays(small_disk: Path, stories: Path) -> None:
    out = small_disk / "run"
    model, tokenizer = fresh(stories, r=16)
    size = sum(p.numel() for p in model.parameters() if p.requires_grad) * 4
    filler = small_disk / "filler"

    def fill(entry: dict[str, Any]) -> None:
        if entry["step"] == 2 and not filler.exists():
            free = os.statvfs(small_disk)
            filler.write_bytes(b"0" * (free.f_bavail * free.f_frsize - size))

    with pytest.raises(OSError, match=r"checkpoint of step 2 .*(No space|space).*; .*step-00000000 is whole and stays"):
        lora.fit(model, tokenizer, DATA, config=quiet(save_every=2, out=str(out)), sinks=[fill])
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000000"]
    filler.unlink()
    again, tokenizer = fresh(stories, r=16)
    lora.fit(again, tokenizer, DATA, resume=out)
    whole, tokenizer = fresh(stories, r=16)
    lora.fit(whole, tokenizer, DATA, config=quiet())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


def test_a_disk_that_is_full_at_the_end_loses_nothing(small_disk: Path, stories: Path) -> None:
    filler = small_disk / "filler"

    def fill(entry: dict[str, Any]) -> None:
        if "train_runtime" in entry and not filler.exists():
            free = os.statvfs(small_disk)
            filler.write_bytes(b"0" * (free.f_bavail * free.f_frsize))

    for kind, save_every, left in (
        ("lora", 3, "step-00000003 is whole: make room, then go on with --resume"),
        ("lora", 0, "no checkpoint was kept"),
    ):
        out = small_disk / f"{kind}{save_every}"
        model, tokenizer = fresh(stories)
        with pytest.raises(
            OSError, match=f"the run ended, and .* could not be written to the end: .*space.*; .*{left}"
        ):
            lora.fit(model, tokenizer, DATA, config=quiet(save_every=save_every, out=str(out)), sinks=[fill])
        assert not (out / "adapter").exists() and not json.loads((out / "run.json").read_text())["finished"]
        filler.unlink()
        if save_every:
            again, tokenizer = fresh(stories)
            lora.fit(again, tokenizer, DATA, resume=out)
            assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
            assert (out / "adapter" / "adapter_model.safetensors").is_file()


def test_a_directory_that_cannot_be_written_is_refused_before_training(stories: Path, tmp_path: Path) -> None:
    model, tokenizer = fresh(stories)
    before = [p.clone() for p in model.parameters()]
    (tmp_path / "locked").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "locked").chmod(0o555)
    places = [tmp_path / "file" / "run"]  # not even root can write below a file
    if os.geteuid():
        places.append(tmp_path / "locked" / "run")
    elif Path("/proc/1").is_dir():
        places.append(Path("/proc/run"))
    for place in places:
        with pytest.raises(OSError, match="run cannot be written, so nothing was trained: "):
            lora.fit(model, tokenizer, DATA, config=quiet(out=str(place)))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert (tmp_path / "file").read_text() == "mine"


# ---- sinks ----
def test_sinks_get_every_entry_and_a_broken_one_ends_nothing(stories: Path) -> None:
    model, tokenizer = fresh(stories)
    got: list[dict[str, Any]] = []

    def broken(entry: dict[str, Any]) -> None:
        raise ConnectionError("no network")

    with pytest.warns(UserWarning, match="a sink failed at step 1 and gets no more entries: ConnectionError"):
        run = lora.fit(model, tokenizer, DATA, DATA[:2], quiet(), sinks=[broken, got.append])
    assert got == list(run.history) and run.steps == 4


@pytest.mark.parametrize(("make", "name"), [(lambda: tensorboard("x"), "tensorboard"), (lambda: wandb("x"), "wandb")])
def test_a_sink_whose_package_is_missing_says_how_to_get_it(
    make: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=f"{name} is not installed, and a sink needs it: pip install {name}"):
        make()


def test_an_unknown_sink_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="log_to='mlflow': one of tensorboard, wandb"):
        ready("mlflow", tmp_path)


def test_without_a_terminal_there_is_a_plain_line_an_entry(capsys: pytest.CaptureFixture[str]) -> None:
    with Log(None, 2, True) as log:
        log.write({"loss": 1.25, "learning_rate": 1e-4, "step": 1, "tokens_per_second": 10.0})
    assert capsys.readouterr().err == "loss 1.25  learning_rate 0.0001  step 1  tokens_per_second 10\n"


def test_a_curve_is_drawn_where_matplotlib_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from lora.train.plot import write_plot

    assert write_plot(tmp_path / "loss.png", [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 1.0}])
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


# ---- settings ----
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"schedule": "cosin"}, "schedule='cosin': one of cosine, linear, constant, wsd"),
        ({"decay": 0.0}, "decay=0.0"),
        ({"schedule": "wsd", "warmup": 0.5, "decay": 0.6}, "take more than all of the steps"),
        ({"lora_plus": 0.0}, "lora_plus=0.0"),
        ({"neftune": -1.0}, "neftune=-1.0"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"save_every": -1}, "save_every=-1"),
        ({"keep_last": 0}, "keep_last=0"),
        ({"patience": 2}, "patience=2 compares evaluations; say how often with eval_every"),
        ({"best": True, "eval_every": 2}, "best=True keeps a checkpoint, and out=None"),
        ({"lr": "fast"}, "lr='fast'"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_work_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora.TrainConfig(**wrong)


def test_settings_that_do_not_fit_the_model_or_the_data_are_refused(stories: Path, tmp_path: Path) -> None:
    model, tokenizer = fresh(stories)
    for settings_, message in (
        ({"patience": 1, "eval_every": 1}, "patience=1 goes by validation rows"),
        ({"eval_generate": 1}, "eval_generate=1 goes by validation rows"),
    ):
        with pytest.raises(ValueError, match=message):
            lora.fit(model, tokenizer, DATA, config=quiet(**settings_))
    bare, tokenizer = lora.load(stories, device="cpu")
    bare.requires_grad_(True)
    with pytest.raises(ValueError, match="lora_plus=16.0 is the learning rate of adapters' B, and no adapter trains"):
        lora.fit(bare, tokenizer, DATA, config=quiet(lora_plus=16.0))


def test_schedules_end_where_they_should() -> None:
    for schedule, last in (("cosine", 0.0), ("linear", 0.0), ("constant", 1.0), ("wsd", 0.0)):
        path = [learning_rate(s, 1000, 1.0, 0.1, schedule, 0.2) for s in range(1000)]
        assert max(path) == 1.0 and path[0] == 0.01 and path[99] == 1.0
        assert path[-1] == pytest.approx(last, abs=0.006)
        assert sum(b > a for a, b in zip(path[99:], path[100:], strict=False)) == 0
    wsd = [learning_rate(s, 1000, 1.0, 0.1, "wsd", 0.2) for s in range(1000)]
    assert set(wsd[99:801]) == {1.0} and wsd[900] == 0.5


NUMBER = st.one_of(st.sampled_from([0, 1, 2, 3, -1, 0.0, 0.1, 0.5, 0.9, 1.0, 5.0, math.nan, math.inf, None, "x", True]))
FIELDS: dict[str, Any] = {
    "max_steps": st.sampled_from([2, 2, 2, 1, 0]),
    "batch": st.sampled_from([1, 2, 5, 40, 0]),
    "accumulate": st.sampled_from([1, 2, 3, -1]),
    "schedule": st.sampled_from(["cosine", "linear", "constant", "wsd", "x"]),
    "lr": st.sampled_from([None, 1e-4, 1e-2, 0.0, math.nan]),
    "warmup": st.sampled_from([0.0, 0.03, 0.5, 0.99, 1.0]),
    "decay": st.sampled_from([0.1, 0.5, 1.0, 0.0]),
    "lora_plus": st.sampled_from([1.0, 16.0, 0.5, -1.0]),
    "neftune": st.sampled_from([0.0, 5.0, math.inf]),
    "label_smoothing": st.sampled_from([0.0, 0.1, 0.9, 1.5]),
    "recompute": st.booleans(),
    "probe": st.booleans(),
    "optim_bits": st.sampled_from([8, 32, 16]),
    "clip": st.sampled_from([0.0, 1.0, -1.0]),
    "eval_every": st.sampled_from([0, 1, 2]),
    "patience": st.sampled_from([0, 1]),
    "best": st.booleans(),
    "eval_generate": st.sampled_from([0, 1]),
    "save_every": st.sampled_from([0, 1]),
    "max_length": st.sampled_from([None, 64, 3]),
    "weight_decay": st.sampled_from([0.0, 0.1]),
    "log_every": st.sampled_from([1, 2]),
    "pack": st.booleans(),
    "overlong": st.sampled_from(["error", "drop", "cut_prompt_left", "cut_right", "split", "x"]),
    "learn": st.sampled_from(["assistant", "last", "all", "x"]),
    "epochs": st.sampled_from([1.0, 0.01, -1.0]),
    "beta1": st.sampled_from([0.9, 0.0, 1.0]),
    "beta2": st.sampled_from([0.999, 0.9, math.nan]),
    "eps": st.sampled_from([1e-8, 1e-3, 0.0]),
    "budget": st.sampled_from([None, "24GiB", "much"]),
    "columns": st.sampled_from([None, {"prompt": "question"}]),
    "keep_last": NUMBER,
    "seed": NUMBER,
}


@pytest.fixture(scope="module")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    give_tokenizer(folder)
    return Tokenizer.from_directory(folder)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    chosen=st.lists(st.sampled_from(sorted(FIELDS)), max_size=7, unique=True).flatmap(
        lambda keys: st.fixed_dictionaries({k: FIELDS[k] for k in keys})
    ),
    method=st.sampled_from(["lora", "lora", "full", "qlora", "qlora", "none"]),
    quantize=st.sampled_from(["nf4", "fp4", "int8"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    valid=st.booleans(),
    kept=st.booleans(),
)
def test_two_hundred_settings_train_or_are_refused_in_a_sentence(
    chosen: dict[str, Any],
    method: str,
    quantize: str,
    dtype: torch.dtype,
    valid: bool,
    kept: bool,
    tiny_tokenizer: Tokenizer,
) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 64, "num_layers": 2, "num_heads": 4}
    model = LlamaConfig(**shape, num_kv_heads=2, head_dim=16, max_length=64).build().to(dtype)
    for p in model.parameters():
        p.data.normal_(std=0.05)
    model.requires_grad_(method == "full")
    if method == "qlora":
        lora.quantize(model, quantize, skip=("lm_head",))
    if method in ("lora", "qlora"):
        lora.wrap(model, r=8)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run" if kept else None
        try:
            config = lora.TrainConfig(
                **({"max_steps": 2, "progress": False, "out": str(out) if out else None} | chosen)
            )
            run = lora.fit(model, tiny_tokenizer, DATA, DATA[:2] if valid else None, config)
        except (ValueError, TypeError) as e:
            said = str(e)
            assert len(said) > 20 and said[0].isalnum() and "\n" not in said, said
            others = ("nothing to train", "max_length", "limit is 3", "take more than all", "which columns gives")
            assert any(f"{key}=" in said for key in chosen) or any(part in said for part in others), said
            assert out is None or not out.exists()
            return
        assert method != "none"
        assert run.steps == config.max_steps or config.patience
        assert all(math.isfinite(h["loss"]) for h in run.history if "loss" in h)
        assert all(p.isfinite().all() for p in model.parameters())
        if out:
            assert json.loads((out / "run.json").read_text())["finished"]
