"""The training loop: its loss, what it changes, what it writes, and that a mistake leaves nothing behind."""

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import lora
from lora.models import llama
from lora.models.budget import Chosen
from lora.models.llama import Llama
from lora.models.tokenizer import Tokenizer
from lora.render import render
from lora.train.loop import keep_within

Loaded = tuple[Llama, Tokenizer]
TRAIN_NAMES = {"loss", "grad_norm", "learning_rate", "mean_token_accuracy", "num_tokens", "epoch", "step"}
EVAL_NAMES = {
    "eval_loss",
    "eval_mean_token_accuracy",
    "eval_num_tokens",
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
    "epoch",
    "step",
}
END_NAMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}


def fresh(stories: Path, quantize: str | None = None, **options: Any) -> Loaded:
    model, tokenizer = lora.load(stories, quantize=quantize, device="cpu")
    torch.manual_seed(1)
    lora.wrap(model, **({"r": 4} | options))
    return model, tokenizer


def rows(n: int = 8) -> list[dict[str, str]]:
    """Rows of very different length, so that a mean of means would show."""
    draw = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "Lily", "played", "outside"]
    return [
        {"prompt": " ".join(draw.choices(words, k=1 + i % 3)), "completion": " " + " ".join(draw.choices(words, k=k))}
        for i, k in enumerate(draw.choices([1, 2, 5, 20, 40], k=n))
    ]


def quiet(**settings: Any) -> lora.TrainConfig:
    return lora.TrainConfig(**({"progress": False, "lr": 5e-3} | settings))


def digests(model: nn.Module) -> dict[str, str]:
    """A hash of every tensor that is not an adapter's, by its name in the bare model."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        key.replace(".base", ""): hashlib.sha256(t.detach().contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
        for key, t in tensors
        if ".adapters." not in key
    }


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: p.detach().clone() for key, p in model.named_parameters() if ".adapters." in key}


@torch.no_grad()
def naive_loss(model: Llama, tokenizer: Tokenizer, data: list[dict[str, str]]) -> float:
    """Sum of NLL over all learned tokens, row by row, by their number."""
    total, count = 0.0, 0
    for e in render(data, tokenizer, 512):
        logits = model(torch.tensor([e.ids]))[0].double().log_softmax(-1)
        for k in range(1, len(e.ids)):
            if e.learned[k]:
                total -= logits[k - 1, e.ids[k]].item()
                count += 1
    return total / count


# ---- the loss ----
@pytest.mark.parametrize(("batch", "accumulate"), [(8, 1), (4, 2), (2, 4), (1, 8), (3, 3)])
def test_the_loss_of_a_step_is_the_sum_over_its_tokens(batch: int, accumulate: int, stories: Path) -> None:
    model, tokenizer = fresh(stories)
    want = naive_loss(model, tokenizer, rows())
    run = lora.fit(model, tokenizer, rows(), config=quiet(batch=batch, accumulate=accumulate, max_steps=1))
    assert run.history[0]["loss"] == pytest.approx(want, abs=1e-5)
    assert run.history[0]["num_tokens"] == sum(len(e.ids) for e in render(rows(), tokenizer, 512)) == run.tokens


def test_loss_gradient_and_step_are_the_same_however_the_rows_are_cut(stories: Path) -> None:
    found = []
    for batch, accumulate in ((8, 1), (4, 2), (2, 4)):
        model, tokenizer = fresh(stories)
        for p in model.parameters():  # b is zero at first, and hides the gradient of a
            if p.requires_grad:
                nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(3))
        config = quiet(batch=batch, accumulate=accumulate, max_steps=1, eps=1e-3)
        first = lora.fit(model, tokenizer, rows(), config=config).history[0]
        found.append((first["loss"], first["grad_norm"], adapter_tensors(model)))
    for loss, norm, weights in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-5)
        assert norm == pytest.approx(found[0][1], rel=1e-5)
        for key, w in weights.items():
            assert (w - found[0][2][key]).abs().max() < 1e-5, key


def test_the_gradient_norm_is_that_of_plain_torch_before_clipping(stories: Path) -> None:
    model, tokenizer = fresh(stories)
    run = lora.fit(model, tokenizer, rows(), config=quiet(max_steps=1, clip=1e-4))
    model, tokenizer = fresh(stories)
    total, n = torch.zeros(()), 0
    for e in render(rows(), tokenizer, 512):
        ids = torch.tensor(e.ids)
        learned = torch.tensor(e.learned)[1:]
        total = total + nn.functional.cross_entropy(
            model(ids[None])[0, :-1][learned], ids[1:][learned], reduction="sum"
        )
        n += int(learned.sum())
    (total / n).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert run.history[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_the_loss_falls(quantize: str | None, stories: Path) -> None:
    model, tokenizer = fresh(stories, quantize)
    data = [{"prompt": "Lily said", "completion": " seventeen purple zebras"}] * 8
    run = lora.fit(model, tokenizer, data, config=quiet(max_steps=20, lr=1e-2))
    losses = [h["loss"] for h in run.history if "loss" in h]
    assert losses[-1] < 0.6 * losses[0]
    assert losses[-1] == pytest.approx(naive_loss(model.eval(), tokenizer, data), rel=0.2)


# ---- what changes ----
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_only_the_adapter_changes(quantize: str | None, stories: Path) -> None:
    bare = digests(lora.load(stories, quantize=quantize, device="cpu")[0])
    model, tokenizer = fresh(stories, quantize, dropout=0.1)
    before = adapter_tensors(model)
    lora.fit(model, tokenizer, rows(), rows(3), quiet(max_steps=4, weight_decay=0.1))
    assert digests(model) == bare
    after = adapter_tensors(model)
    assert all(not torch.equal(after[key], before[key]) for key in before)


def test_the_same_seed_gives_the_same_bits(stories: Path) -> None:
    found = []
    for seed in (3, 3, 4):
        model, tokenizer = fresh(stories, dropout=0.1)
        run = lora.fit(model, tokenizer, rows(12), config=quiet(batch=2, accumulate=2, max_steps=5, seed=seed))
        found.append(([h["loss"] for h in run.history if "loss" in h], adapter_tensors(model)))
    assert found[0][0] == found[1][0] != found[2][0]
    assert all(torch.equal(w, found[1][1][key]) for key, w in found[0][1].items())


def test_a_model_of_transformers_trains_as_ours_does(stories: Path) -> None:
    ours, tokenizer = fresh(stories)
    theirs = transformers.LlamaForCausalLM.from_pretrained(stories)
    torch.manual_seed(1)
    lora.wrap(theirs, r=4)
    runs = [lora.fit(m, tokenizer, rows(), config=quiet(batch=4, max_steps=4)) for m in (ours, theirs)]
    for a, b in zip(runs[0].history[:4], runs[1].history[:4], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_full_fine_tuning_changes_every_weight_and_writes_a_model(stories: Path, tmp_path: Path) -> None:
    model, tokenizer = lora.load(stories, device="cpu")
    before = digests(model)
    model.requires_grad_(True)
    run = lora.fit(model, tokenizer, rows(), config=quiet(max_steps=2, lr=1e-3, out=str(tmp_path / "run")))
    after = digests(model)
    assert all(after[key] != before[key] for key in before)
    assert run.adapter is None
    again, _ = lora.load(tmp_path / "run/model", device="cpu")
    assert digests(again) == after


# ---- what is written ----
def test_a_run_directory_holds_adapter_log_settings_and_report(stories: Path, tmp_path: Path) -> None:
    model, tokenizer = fresh(stories)
    out = tmp_path / "deep" / "run"
    run = lora.fit(model, tokenizer, rows(), rows(3), quiet(batch=4, epochs=2, eval_every=1, out=str(out)))
    held = {p.name for p in out.iterdir()} - {"loss.png"}  # which needs matplotlib
    assert held == {"adapter", "checkpoints", "config.yaml", "log.jsonl", "report.html", "run.json"}
    assert sorted(p.name for p in tmp_path.joinpath("deep").iterdir()) == ["run"]
    assert run.adapter == out / "adapter"
    assert [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] == list(run.history)
    assert "batch: 4\n" in (out / "config.yaml").read_text()
    page = (out / "report.html").read_text()
    assert "<svg" in page and "paired over 3 rows" in page
    saved = load_file(out / "adapter/adapter_model.safetensors")
    assert len(saved) == len(adapter_tensors(model))
    other, _ = lora.load(stories, device="cpu")
    lora.attach(other, out / "adapter")
    ids = torch.randint(3, 500, (1, 9))
    assert torch.equal(other(ids), model.eval()(ids))


def test_the_log_has_trl_s_names(stories: Path) -> None:
    model, tokenizer = fresh(stories)
    run = lora.fit(model, tokenizer, rows(), rows(3), quiet(batch=4, epochs=2, eval_every=2))
    train = [h for h in run.history if "loss" in h]
    held = [h for h in run.history if "eval_loss" in h]
    end = [h for h in run.history if "train_runtime" in h]
    assert all(h.keys() >= TRAIN_NAMES for h in train) and [h["step"] for h in train] == [1, 2, 3, 4]
    assert all(h.keys() >= EVAL_NAMES for h in held) and [h["step"] for h in held] == [2, 4]
    assert len(end) == 1 and end[0].keys() >= END_NAMES and run.history[-1] is end[0]
    assert [h["epoch"] for h in train] == [0.5, 1.0, 1.5, 2.0]
    assert end[0]["train_loss"] == pytest.approx(sum(h["loss"] for h in train) / 4)
    assert held[-1]["eval_loss"] == pytest.approx(naive_loss(model.eval(), tokenizer, rows(3)), abs=1e-5)
    assert run.steps == 4 and run.tokens == train[-1]["num_tokens"]


def test_the_learning_rate_logged_is_the_one_used(stories: Path) -> None:
    model, tokenizer = fresh(stories)
    run = lora.fit(model, tokenizer, rows(), config=quiet(max_steps=10, warmup=0.2, lr=1e-3))
    got = [h["learning_rate"] for h in run.history if "loss" in h]
    want = [5e-4, 1e-3, *(5e-4 * (1 + math.cos(math.pi * k / 8)) for k in range(8))]
    assert got == pytest.approx(want)


@pytest.mark.parametrize(("n", "batch", "accumulate", "epochs", "steps"), [(8, 8, 1, 1, 1), (9, 4, 1, 1, 3),
    (9, 4, 2, 1, 2), (9, 2, 2, 2, 6), (8, 4, 1, 0.5, 1), (3, 8, 4, 1, 1)])  # fmt: skip
def test_steps_are_counted_from_epochs(
    n: int, batch: int, accumulate: int, epochs: float, steps: int, stories: Path
) -> None:
    model, tokenizer = fresh(stories)
    config = quiet(batch=batch, accumulate=accumulate, epochs=epochs)
    assert lora.fit(model, tokenizer, rows(n), config=config).steps == steps


# ---- mistakes ----
def lines(path: Path, *texts: str) -> str:
    path.write_text("".join(text + "\n" for text in texts))
    return str(path)


GOOD = '{"prompt": "a", "completion": " b"}'


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ((), "holds no rows"),
        ((GOOD, "", '{"prompt": "a"'), "line 3 is not valid JSON"),
        ((GOOD, '{"prompt": "a"}'), "line 2 has no 'completion'"),
        ((GOOD, json.dumps({"prompt": "a", "completion": " cat" * 600})), "line 2 has .* limit is 512"),
        (('{"messages": [{"role": "assistant", "content": "a"}]}',), "line 1: .* no chat template"),
        ((GOOD, '{"messages": [{"role": "assistant", "content": "a"}]}'), "line 2 is a row of messages, and .* line 1"),
    ],
)
@pytest.mark.parametrize("which", ["train", "valid"])
def test_unusable_rows_leave_nothing_behind(
    which: str, texts: tuple[str, ...], message: str, stories: Path, tmp_path: Path
) -> None:
    model, tokenizer = fresh(stories)
    before = adapter_tensors(model)
    data = {"train": rows(), "valid": rows()} | {which: lines(tmp_path / "bad.jsonl", *texts)}
    with pytest.raises(ValueError, match=message):
        lora.fit(model, tokenizer, data["train"], data["valid"], quiet(out=str(tmp_path / "run")))
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"]
    assert all(torch.equal(w, before[key]) for key, w in adapter_tensors(model).items())


def test_a_limit_of_the_run_is_kept(stories: Path) -> None:
    model, tokenizer = fresh(stories)
    with pytest.raises(ValueError, match="limit is 4"):
        lora.fit(model, tokenizer, rows(), config=quiet(max_length=4))


def test_a_model_with_nothing_to_train_is_refused(stories: Path, tmp_path: Path) -> None:
    model, tokenizer = lora.load(stories, device="cpu")
    with pytest.raises(ValueError, match="nothing to train"):
        lora.fit(model, tokenizer, rows(), config=quiet(out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_merged_model_is_refused(stories: Path, tmp_path: Path) -> None:
    model, tokenizer = fresh(stories)
    lora.merge(model)
    with pytest.raises(RuntimeError, match="merged"):
        lora.fit(model, tokenizer, rows(), config=quiet(out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_another_run_is_not_overwritten(stories: Path, tmp_path: Path) -> None:
    model, tokenizer = fresh(stories)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").write_text("mine\n")
    with pytest.raises(FileExistsError, match="run is a folder that holds"):
        lora.fit(model, tokenizer, rows(), config=quiet(out=str(tmp_path / "run")))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["log.jsonl"]
    assert (tmp_path / "run/log.jsonl").read_text() == "mine\n"


def test_a_loss_that_is_not_finite_stops_the_run(stories: Path) -> None:
    model, tokenizer = fresh(stories)
    model.model.norm.weight.data[3] = math.nan
    with pytest.raises(RuntimeError, match=r"step 1: loss nan.* on rows \["):
        lora.fit(model, tokenizer, rows(), config=quiet(max_steps=2))


@pytest.mark.parametrize(
    "settings",
    [{"batch": 0}, {"batch": 1.5}, {"accumulate": 0}, {"lr": 0.0}, {"lr": math.nan}, {"epochs": -1}, {"warmup": 1.0},
     {"max_steps": 0}, {"max_length": 0}, {"beta2": 1.0}, {"clip": -1.0}, {"eval_every": -1}, {"weight_decay": -0.1},
     {"eps": math.inf}, {"seed": -1}, {"log_every": 0}],
    ids=str,
)  # fmt: skip
def test_a_setting_out_of_range_is_refused(settings: dict[str, Any]) -> None:
    [name] = settings
    with pytest.raises(ValueError, match=f"{name}="):
        lora.TrainConfig(**settings)


def test_8_bits_are_refused_where_no_gpu_is(stories: Path) -> None:
    with pytest.raises(ValueError, match=r"compute='fp8' was asked for, and the model is on cpu.*take compute='bf16'"):
        lora.fit(*fresh(stories), rows(), config=quiet(compute="fp8"))
    with pytest.raises(ValueError, match="compute='int8'"):
        quiet(compute="int8")


def test_a_budget_is_for_a_gpu(stories: Path, tmp_path: Path) -> None:
    model, tokenizer = fresh(stories)
    with pytest.raises(ValueError, match="budget='8GiB' is what tensors may take on a GPU, and the model is on cpu"):
        lora.fit(model, tokenizer, rows(), config=quiet(max_steps=1, budget="8GiB", out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="is kept by the Llama family's blocks, and this is Linear"):
        keep_within(nn.Linear(2, 2), quiet(budget="8GiB"))


def test_an_earlier_run_leaves_no_budget_behind(stories: Path) -> None:
    """Nor what its blocks kept: that went with its budget and its adapter."""
    model, tokenizer = fresh(stories)
    model.keeping.budget, model.keeping.chosen = 2**30, Chosen(8192, 0, ["host"] * 5)
    lora.fit(model, tokenizer, rows(), config=quiet(max_steps=1))
    assert model.keeping.budget is None and model.keeping.chosen == Chosen()


def test_blocks_run_fused_without_a_flag_and_say_so_once(
    stories: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(llama, "FUSED", {"cpu"})
    model, tokenizer = fresh(stories, "nf4")
    assert lora.TrainConfig().compute == "bf16"
    lora.fit(model, tokenizer, rows(), config=quiet(max_steps=3, progress=True))
    said = "5 blocks run fused, all kept; the frozen base: its products in float32"
    assert capsys.readouterr().err.count(said) == 1
