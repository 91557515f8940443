"""Runs that end early and go on: the same bits as if they had not, whatever killed them, and nothing lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lora
from lora.models.bits import BACKENDS, backends
from lora.train.checkpoint import checkpoints
from lora.train.guard import Interrupted
from lora.train.steps import Steps
from lora.train.verify import ORDER, _why, verify

TIMES = ("tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second", "eval_runtime",
         "eval_samples_per_second", "eval_steps_per_second")  # fmt: skip
DATA = [{"prompt": f"{i} cats", "completion": " sat" * (1 + i % 7)} for i in range(14)]
SETTINGS: dict[str, Any] = {
    "batch": 2, "accumulate": 3, "max_steps": 6, "save_every": 2, "keep_last": 2, "lr": 5e-3, "progress": False,
    "neftune": 5.0, "eval_every": 3, "lora_plus": 4.0, "schedule": "wsd", "optim_bits": 8,
}  # fmt: skip


def fresh(stories: Path, quantize: str | None = None, seed: int = 1, **options: Any) -> tuple[Any, Any]:
    model, tokenizer = lora.load(stories, quantize=quantize, device="cpu")
    torch.manual_seed(seed)
    return lora.wrap(model, **({"r": 2, "dropout": 0.1} | options)), tokenizer


def config(out: Path, **more: Any) -> lora.TrainConfig:
    return lora.TrainConfig(**(SETTINGS | {"out": str(out)} | more))


def timeless(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def same(a: Path, b: Path) -> None:
    """The two runs gave the same bytes."""
    assert (a / "adapter/adapter_model.safetensors").read_bytes() == (
        b / "adapter/adapter_model.safetensors"
    ).read_bytes()
    assert timeless(a) == timeless(b)
    first, second = (json.loads((d / "run.json").read_text()) for d in (a, b))
    assert first["finished"] and second["finished"] and first["weights_after"] == second["weights_after"]


# The run in another process; `when` names a function, and the call of it in which the process kills itself
SCRIPT = """
import os, signal, sys, json
from pathlib import Path
from test_train_resume import DATA, config, fresh
import lora, lora.train.checkpoint, lora.train.steps, lora.train.log, shutil, torch
stories, out, when, nth, resume, more = sys.argv[1:]
torch.set_num_threads(1)
owner, name = {
    "micro": (lora.train.steps.Steps, "_backward"),
    "save": (lora.train.checkpoint, "save_file"),
    "flush": (lora.train.checkpoint, "flush"),
    "prune": (lora.train.checkpoint, "prune"),
    "remove": (shutil, "rmtree"),
    "log": (lora.train.log.Log, "write"),
    "end": (lora.train.loop, "write_plot"),
    "never": (lora.train.log.Log, "flush"),
}[when]
plain, count = getattr(owner, name), 0
def deadly(*args, **kwargs):
    global count
    count += 1
    if when != "never" and count == int(nth):
        if when == "save":
            args[1].write_bytes(b"half")
        if when == "remove":
            next(args[0].rglob("*.safetensors")).unlink()
        if when == "log":
            args[0].file.write('{"loss": 1.0, "st'); args[0].file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*args, **kwargs)
setattr(owner, name, deadly)
if when == "prune":
    lora.train.steps.prune = deadly
model, tokenizer = fresh(Path(stories))
how = {"resume": out} if resume == "yes" else {"config": config(Path(out), **json.loads(more))}
lora.fit(model, tokenizer, DATA, DATA[:3], **how)
"""


def process(stories: Path, out: Path, when: str, nth: int, resume: bool, **more: Any) -> int:
    root = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    words = [sys.executable, "-P", "-c", SCRIPT, str(stories), str(out), when, str(nth), "yes" if resume else "no"]
    words.append(json.dumps(more))
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


@pytest.fixture(scope="module")
def whole(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never stopped, in a process of its own like the others."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert process(stories, out, "never", 1, False) == 0
    return out


@pytest.mark.parametrize(
    ("when", "nth"),
    [("micro", 12), ("save", 1), ("save", 3), ("flush", 2), ("prune", 3), ("remove", 1), ("log", 6), ("end", 1)],
)
def test_a_killed_run_goes_on_to_the_same_bytes(
    when: str, nth: int, whole: Path, stories: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert process(stories, out, when, nth, False) == -signal.SIGKILL
    assert process(stories, out, "never", 1, True) == 0
    same(out, whole)
    assert not list((out / "checkpoints").glob(".*"))


def test_a_run_killed_again_and_again_goes_on(whole: Path, stories: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert process(stories, out, "micro", 11, False) == -signal.SIGKILL
    for when, nth in (("micro", 3), ("save", 1), ("micro", 6), ("log", 3)):
        assert process(stories, out, when, nth, True) == -signal.SIGKILL
    assert process(stories, out, "never", 1, True) == 0
    same(out, whole)


def test_a_killed_run_of_packed_rows_goes_on_to_the_same_bytes(stories: Path, tmp_path: Path) -> None:
    packs: dict[str, Any] = {"pack": True, "max_length": 32, "batch": 1, "accumulate": 2}
    assert process(stories, tmp_path / "whole", "never", 1, False, **packs) == 0
    for when, nth in (("micro", 6), ("save", 3)):  # in the middle of an accumulation, and of a checkpoint
        out = tmp_path / when
        assert process(stories, out, when, nth, False, **packs) == -signal.SIGKILL
        assert process(stories, out, "never", 1, True) == 0
        same(out, tmp_path / "whole")


# ---- signals ----
class Signalled:
    """A sink that sends a signal when it sees a step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def __call__(self, entry: dict[str, Any]) -> None:
        if entry["step"] == self.step and "loss" in entry:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_leaves(number: int, code: int, stories: Path, tmp_path: Path) -> None:
    fits = []
    for name in ("whole", "cut"):
        model, tokenizer = fresh(stories)
        out = tmp_path / name
        if name == "whole":
            fits.append(lora.fit(model, tokenizer, DATA, DATA[:3], config(out, save_every=0)))
            continue
        handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
        with pytest.raises(Interrupted, match="after step 3: saved as .*step-00000003") as e:
            lora.fit(model, tokenizer, DATA, DATA[:3], config(out, save_every=0), sinks=[Signalled(3, number)])
        assert e.value.code == code
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
        model, tokenizer = fresh(stories, seed=9)
        fits.append(lora.fit(model, tokenizer, DATA, DATA[:3], resume=out))
    same(tmp_path / "whole", tmp_path / "cut")
    assert [h.get("loss") for h in fits[0].history] == [h.get("loss") for h in fits[1].history]
    assert fits[0].tokens == fits[1].tokens


@pytest.mark.parametrize("step", [3, 6])
def test_a_signal_within_an_evaluation_does_not_wait_for_its_end(step: int, stories: Path, tmp_path: Path) -> None:
    """The evaluation is made up for by the run that goes on, which may be cut short within it again."""
    held, more = DATA[:7], {"eval_generate": 2, "best": True, "patience": 9}
    model, tokenizer = fresh(stories)
    lora.fit(model, tokenizer, DATA, held, config(tmp_path / "whole", **more))
    armed: list[int] = []  # filled when the step is logged, which is before its evaluation
    batches: list[int] = []  # of the evaluation

    def cut(settings: dict[str, Any]) -> None:
        model, tokenizer = fresh(stories, seed=9 if "resume" in settings else 1)

        def look(module: Any, args: Any) -> None:
            if not module.training and armed:
                batches.append(1)
                os.kill(os.getpid(), signal.SIGTERM)

        model.model.embed_tokens.register_forward_pre_hook(look)
        with pytest.raises(Interrupted, match=f"SIGTERM after step {step}: saved as .*step-0000000{step}"):
            lora.fit(model, tokenizer, DATA, held, sinks=[lambda e: armed.append(1) if e["step"] == step else None],
                     **settings)  # fmt: skip

    cut({"config": config(tmp_path / "cut", **more)})
    assert len(batches) == 1  # of four
    assert json.loads((checkpoints(tmp_path / "cut/checkpoints")[-1] / "state.json").read_text())["progress"]["owed"]
    cut({"resume": tmp_path / "cut"})
    assert len(batches) == 2
    model, tokenizer = fresh(stories, seed=9)
    lora.fit(model, tokenizer, DATA, held, resume=tmp_path / "cut")
    same(tmp_path / "whole", tmp_path / "cut")
    assert (tmp_path / "whole/samples.jsonl").read_bytes() == (tmp_path / "cut/samples.jsonl").read_bytes()


def test_a_signal_while_the_report_is_made_leaves_a_finished_run(stories: Path, tmp_path: Path) -> None:
    model, tokenizer = fresh(stories)

    def cut(module: Any, args: Any) -> None:
        if (tmp_path / "run/adapter").is_dir():
            os.kill(os.getpid(), signal.SIGTERM)

    model.model.embed_tokens.register_forward_pre_hook(cut)
    with pytest.raises(
        Interrupted, match="SIGTERM after step 6: the run had ended and .* is whole but for report.html"
    ):
        lora.fit(model, tokenizer, DATA, DATA[:3], config(tmp_path / "run"))
    assert json.loads((tmp_path / "run/run.json").read_text())["finished"]
    assert not (tmp_path / "run/report.html").exists()
    model, tokenizer = fresh(stories)
    lora.fit(model, tokenizer, DATA, DATA[:3], config(tmp_path / "whole"))
    same(tmp_path / "whole", tmp_path / "run")


def test_a_signal_within_an_accumulation_gives_it_up_and_nothing_else(stories: Path, tmp_path: Path) -> None:
    model, tokenizer = fresh(stories)
    lora.fit(model, tokenizer, DATA, None, config(tmp_path / "whole", eval_every=0))
    model, tokenizer = fresh(stories)
    calls = []

    def count(module: Any, args: Any) -> None:
        calls.append(1)
        if len(calls) == 1 + 3 + 3 + 1 + 2:  # the probe, three steps, and the second batch of the fourth's three
            os.kill(os.getpid(), signal.SIGTERM)

    handle = model.model.embed_tokens.register_forward_pre_hook(count)
    with pytest.raises(Interrupted, match="SIGTERM after step 3: saved"):
        lora.fit(model, tokenizer, DATA, None, config(tmp_path / "cut", eval_every=0))
    handle.remove()
    assert len(calls) == 10
    lora.fit(model, tokenizer, DATA, None, resume=tmp_path / "cut")
    same(tmp_path / "whole", tmp_path / "cut")


# ---- what a checkpoint holds ----
@pytest.fixture
def cut(stories: Path, tmp_path: Path) -> Path:
    """A run that was interrupted after its fourth step."""
    model, tokenizer = fresh(stories)
    with pytest.raises(Interrupted):
        lora.fit(model, tokenizer, DATA, DATA[:3], config(tmp_path / "run"), sinks=[Signalled(4, signal.SIGTERM)])
    return tmp_path / "run"


def test_the_newest_checkpoints_stay_and_hold_an_adapter(cut: Path, stories: Path) -> None:
    assert [p.name for p in checkpoints(cut / "checkpoints")] == [f"step-0000000{k}" for k in (2, 4)]
    model, _ = lora.load(stories, device="cpu")
    lora.attach(model, cut / "checkpoints/step-00000004/adapter")
    state = load_file(cut / "checkpoints/step-00000004/state.safetensors")
    held = load_file(cut / "checkpoints/step-00000004/adapter/adapter_model.safetensors")
    w = state["w"]
    for key, t in held.items():
        where = (w[: w.numel() - t.numel() + 1] == t.flatten()[0]).nonzero().flatten().tolist()
        assert any(torch.equal(w[i : i + t.numel()], t.flatten()) for i in where), key


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"config": {"lr": 1e-3}}, r"lr was 0\.005 and is 0\.001"),
        ({"config": {"batch": 4, "seed": 7}}, r"batch was 2 and is 4; seed was 42 and is 7"),
        ({"config": {"max_steps": 9}}, "max_steps was 6 and is 9"),
        ({"data": DATA[:-1]}, "training rows are other ones"),
        ({"valid": DATA[:2]}, "validation rows are other ones"),
        ({"model": {"r": 4}}, "what trains is another: .*q_proj"),
        ({"model": {"alpha": 8}}, "what trains is another: .*16.0.*4.0"),
        ({"model": {"quantize": "nf4"}}, "base model is another one"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    changed: dict[str, Any], message: str, cut: Path, stories: Path
) -> None:
    before = {p: p.read_bytes() for p in cut.rglob("*") if p.is_file()}
    model, tokenizer = fresh(stories, **changed.get("model", {}))
    weights = [p.clone() for p in model.parameters()]
    settings = config(cut, **changed["config"]) if "config" in changed else None
    with pytest.raises(ValueError, match=message):
        lora.fit(model, tokenizer, changed.get("data", DATA), changed.get("valid", DATA[:3]), settings, resume=cut)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert {p: p.read_bytes() for p in cut.rglob("*") if p.is_file()} == before


def test_a_damaged_checkpoint_is_refused_and_an_older_one_serves(cut: Path, stories: Path, tmp_path: Path) -> None:
    file = cut / "checkpoints/step-00000004/state.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-9] ^= 4
    file.write_bytes(raw)
    model, tokenizer = fresh(stories)
    with pytest.raises(ValueError, match="state.safetensors is damaged.*older"):
        lora.fit(model, tokenizer, DATA, DATA[:3], resume=cut)
    shutil.rmtree(cut / "checkpoints/step-00000004")
    lora.fit(model, tokenizer, DATA, DATA[:3], resume=cut / "checkpoints/step-00000002")
    whole, tokenizer = fresh(stories)
    lora.fit(whole, tokenizer, DATA, DATA[:3], config(tmp_path / "whole"))
    same(cut, tmp_path / "whole")


def test_resume_of_what_is_no_run_or_has_finished_is_refused(stories: Path, tmp_path: Path) -> None:
    model, tokenizer = fresh(stories)
    with pytest.raises(FileNotFoundError, match="holds no run to go on with"):
        lora.fit(model, tokenizer, DATA, resume=tmp_path)
    lora.fit(model, tokenizer, DATA, None, config(tmp_path / "run", eval_every=0, max_steps=1))
    with pytest.raises(ValueError, match="finished all its 1 steps"):
        lora.fit(model, tokenizer, DATA, resume=tmp_path / "run")


@pytest.mark.parametrize("kind", ["full", "nf4", "bfloat16"])
def test_full_weights_four_bits_and_sixteen_go_on_alike(kind: str, stories: Path, tmp_path: Path) -> None:
    def begin() -> tuple[Any, Any]:
        if kind == "nf4":
            return fresh(stories, "nf4")
        model, tokenizer = lora.load(stories, device="cpu", dtype="bfloat16" if kind == "bfloat16" else "float32")
        return model.requires_grad_(True), tokenizer

    more = {"lora_plus": 4.0 if kind == "nf4" else 1.0, "lr": 1e-3, "optim_bits": 32, "recompute": True}
    model, tokenizer = begin()
    lora.fit(model, tokenizer, DATA, DATA[:3], config(tmp_path / "whole", **more))
    other, _ = begin()
    with pytest.raises(Interrupted):
        lora.fit(
            other, tokenizer, DATA, DATA[:3], config(tmp_path / "cut", **more), sinks=[Signalled(3, signal.SIGINT)]
        )  # fmt: skip
    again, _ = begin()
    lora.fit(again, tokenizer, DATA, DATA[:3], resume=tmp_path / "cut")
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "cut")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


# ---- on a GPU ----
LONG = [{"prompt": f"{i} cats", "completion": " sat" * (60 + 11 * (i % 7))} for i in range(14)]
HOW: dict[str, dict[str, Any]] = {
    "recorded": {"rows": DATA, "dropout": 0.0, "neftune": 0.0},
    "recorded, long rows": {"rows": LONG, "dropout": 0.0, "neftune": 0.0},
    "padded, random": {"rows": DATA, "dropout": 0.2, "neftune": 5.0},
    "long rows, random, 8 bits": {"rows": LONG, "dropout": 0.2, "neftune": 5.0, "optim_bits": 8},
    "recompute": {"rows": LONG, "dropout": 0.2, "neftune": 0.0, "recompute": True},
    "packed": {"rows": LONG, "dropout": 0.0, "neftune": 0.0, "pack": True, "max_length": 448},
    "packed, random": {"rows": LONG, "dropout": 0.2, "neftune": 5.0, "pack": True, "max_length": 448},
    "float16": {"rows": LONG, "dropout": 0.2, "neftune": 0.0, "dtype": "float16"},
    "full": {"rows": LONG, "method": "full", "neftune": 5.0, "lora_plus": 1.0, "lr": 1e-3},
}


@pytest.mark.parametrize("how", HOW)
def test_on_a_gpu_a_run_cut_within_an_accumulation_goes_on_to_the_same_bits(
    how: str, gpu: torch.device, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"optim_bits": 32, "eval_every": 0, "batch": 2, "accumulate": 3, "max_steps": 9, "save_every": 4} | HOW[how]
    rows, dropout, dtype = more.pop("rows"), more.pop("dropout", 0.0), more.pop("dtype", "bfloat16")
    method = more.pop("method", "qlora")

    def begin() -> tuple[Any, Any]:
        torch.manual_seed(1)
        quantize = "nf4" if method == "qlora" else None
        model, tokenizer = lora.load(stories, quantize=quantize, dtype=dtype, device=gpu)
        if method == "full":
            return model.requires_grad_(True), tokenizer
        return lora.wrap(model, r=4, dropout=dropout), tokenizer

    model, tokenizer = begin()
    lora.fit(model, tokenizer, rows, None, config(tmp_path / "whole", **more))
    plain, calls = Steps._backward, []

    def cut(self: Steps, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 1 + 4 * 3 + 2:  # the probe, four steps, and the second batch of the fifth's three
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Steps, "_backward", cut)
    again, _ = begin()
    with pytest.raises(Interrupted, match="SIGTERM after step"):
        lora.fit(again, tokenizer, rows, None, config(tmp_path / "cut", **more))
    monkeypatch.setattr(Steps, "_backward", plain)
    torch.rand(100, device=gpu)  # the GPU's generator stands elsewhere now
    again, _ = begin()
    run = lora.fit(again, tokenizer, rows, None, resume=tmp_path / "cut")
    assert run.steps == 9
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "cut")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    if method != "full":
        same(tmp_path / "whole", tmp_path / "cut")


# ---- verify ----
def test_verify_repeats_a_run_and_finds_what_was_changed(whole: Path, stories: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    settings = json.loads((run / "run.json").read_text())
    settings["config"]["out"] = str(run)
    (run / "run.json").write_text(json.dumps(settings))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    model, tokenizer = fresh(stories, seed=5)
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for steps, first in ((None, 5), (3, 3), (99, 3)):
            verdict = verify(run, model, tokenizer, DATA, DATA[:3], steps=steps)
            assert verdict.equal and verdict.first == first and verdict.last == 6, verdict
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
        log = (run / "log.jsonl").read_text().splitlines()
        at = next(i for i, line in enumerate(log) if json.loads(line)["step"] == 5)
        entry = json.loads(log[at])
        log[at] = json.dumps(entry | {"loss": entry["loss"] * (1 + 1e-12)})
        (run / "log.jsonl").write_text("\n".join(log) + "\n")
        verdict = verify(run, model, tokenizer, DATA, DATA[:3])
        assert not verdict.equal and "loss of step 5 was" in verdict.sentence
        (run / "log.jsonl").write_bytes(before[run / "log.jsonl"])
        (run / "run.json").write_text(json.dumps(settings | {"weights_after": "0" * 64}))
        verdict = verify(run, model, tokenizer, DATA, DATA[:3])
        assert not verdict.equal and "the weights after step 6 are not" in verdict.sentence
    finally:
        torch.set_num_threads(torch_threads)


def test_a_difference_on_a_gpu_says_what_adds_up_in_no_fixed_order() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert _why([], cpu, config(Path("x"))) == "; the environment is the same"
    assert _why(["torch: 1, now 2"], gpu, config(Path("x"))) == f"; since the run torch: 1, now 2{ORDER}"
    assert _why([], gpu, config(Path("x"), deterministic=True)) == "; the environment is the same"


def test_a_deterministic_run_asks_torch_for_the_same_bits_and_takes_nothing_back(stories: Path, tmp_path: Path) -> None:
    seen: list[tuple[bool, bool]] = []

    def sink(entry: dict[str, Any]) -> None:
        if "loss" in entry:
            seen.append((torch.are_deterministic_algorithms_enabled(), BACKENDS[0] in backends()))

    for wanted in (True, False):
        model, tokenizer = fresh(stories)
        settings = config(tmp_path / str(wanted), max_steps=1, deterministic=wanted)
        lora.fit(model, tokenizer, DATA, config=settings, sinks=[sink])
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory
    assert seen == [(True, False), (False, True)]  # without cuDNN's attention, and with it


@pytest.mark.parametrize("pack", [False, True])
def test_a_deterministic_run_on_a_gpu_gives_the_same_bits(
    gpu: torch.device, stories: Path, tmp_path: Path, pack: bool
) -> None:
    rows = [{"prompt": "", "completion": " sat on the mat" * (20 + 7 * i)} for i in range(6)]
    made = []
    for name in ("one", "two"):
        model, tokenizer = lora.load(stories, quantize="nf4", dtype="bfloat16", device=gpu)
        torch.manual_seed(1)
        lora.wrap(model, r=4)
        settings = config(tmp_path / name, max_steps=4, accumulate=1, max_length=512, pack=pack, deterministic=True,
                          overlong="cut_right")  # fmt: skip
        lora.fit(model, tokenizer, rows, config=settings)
        made.append((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes())
    assert made[0] == made[1]
