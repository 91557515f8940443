"""Data in a run: packed or padded it trains the same; what is found is said; nothing starts on data that is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_train_loop import adapter_tensors, fresh, quiet, rows
from torch import nn

import lora
from lora.__main__ import main
from lora.models.tokenizer import Tokenizer
from lora.render import render
from lora.train.data import prepare
from lora.train.pack import Packs


def awake(model: nn.Module) -> nn.Module:
    """b is zero at first, and hides the gradient of a."""
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(3))
    return model


@torch.no_grad()
def naive(model: Any, tokenizer: Tokenizer, data: Any, learn: str) -> float:
    """Σ NLL / learned tokens, one row at a time, in float64 and with nothing of ours but the token ids."""
    total, n = 0.0, 0
    for e in render(data, tokenizer, 512, learn=learn):
        logits = model.double()(torch.tensor([e.ids])).logits[0]
        learned = torch.tensor(e.learned)[1:]
        target = torch.tensor(e.ids)[1:][learned]
        total += nn.functional.cross_entropy(logits[:-1][learned], target, reduction="sum").item()
        n += int(learned.sum())
    return total / n


@pytest.mark.parametrize("learn", ["assistant", "all"])
@pytest.mark.parametrize(
    "how", [{"pack": True, "batch": 99}, {"pack": True, "batch": 1, "accumulate": 99}, {"batch": 3, "accumulate": 99}]
)
def test_packed_and_padded_losses_equal_a_naive_loop(
    learn: str, how: dict[str, Any], stories: Path, tmp_path: Path
) -> None:
    data = rows(12)
    model, tokenizer = fresh(stories)
    awake(model)
    first = lora.fit(model, tokenizer, data, config=quiet(max_steps=1, max_length=128, learn=learn, **how))
    # the same adapted model in transformers: fold the adapter into its base
    model, tokenizer = fresh(stories)
    lora.merge(awake(model))
    lora.save_pretrained(model, tokenizer, tmp_path / "merged", dtype=torch.float32)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert first.history[0]["loss"] == pytest.approx(naive(theirs, tokenizer, data, learn), abs=1e-5)


def test_packed_steps_equal_padded_steps(stories: Path) -> None:
    found = []
    for how in ({"pack": True, "batch": 99}, {"batch": 99}, {"pack": True, "batch": 1, "accumulate": 99}):
        model, tokenizer = fresh(stories)
        config = quiet(max_steps=4, max_length=96, eps=1e-3, **how)
        run = lora.fit(awake(model).to(torch.float64), tokenizer, rows(16), config=config)
        losses = [(h["loss"], h["grad_norm"], h["num_tokens"]) for h in run.history if "loss" in h]
        found.append((losses, adapter_tensors(model)))
    assert len(found[0][0]) == 4 and found[0][0][0][0] != pytest.approx(found[0][0][3][0], abs=1e-3)
    for losses, weights in found[1:]:
        for a, b in zip(losses, found[0][0], strict=True):
            assert a == pytest.approx(b, abs=1e-5)
        for key, w in weights.items():
            assert (w - found[0][1][key]).abs().max() < 1e-5, key


def test_prepare_says_what_it_found(stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = fresh(stories)
    file = tmp_path / "qa.jsonl"
    file.write_text("".join(json.dumps({"q": r["prompt"], "a": r["completion"]}) + "\n" for r in rows(20)))
    columns = {"prompt": "q", "completion": "a"}
    config = quiet(progress=True, pack=True, max_length=32, overlong="drop", columns=columns)
    prepared = prepare(file, model, tokenizer, config)
    said = capsys.readouterr().err
    assert f"{file}: 20 rows of prompt and completion (prompt from 'q', completion from 'a')\n" in said
    left = sum(n <= 32 for n in prepared.report.lengths)
    assert 0 < left < 20 and len(prepared.whole_rows()) == left == len(prepared.examples)
    assert f"drop: {20 - left} left out" in said
    assert isinstance(prepared.units, Packs)
    assert f"packed: {left} texts in {len(prepared.units)} rows of 32" in said
    held = prepare(file, model, tokenizer, config, held_out=True)
    assert held.units is held.examples


def test_a_run_takes_rows_of_every_kind_and_reports_on_those_that_fit(stories: Path, tmp_path: Path) -> None:
    model, tokenizer = fresh(stories)
    text = [{"body": r["prompt"] + r["completion"]} for r in rows(12)] + [{"body": "the cat " * 300}]
    config = quiet(max_steps=2, max_length=64, pack=True, overlong="cut_right", columns={"text": "body"})
    run = lora.fit(model, tokenizer, text, text, config.replace(out=str(tmp_path / "run")))
    assert run.steps == 2 and (tmp_path / "run/report.html").is_file()
    assert any("eval_loss" in h for h in run.history)


def test_the_command_packs_and_keeps_its_settings(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "qa.json"
    file.write_text(json.dumps([{"q": r["prompt"], "a": r["completion"]} for r in rows(20)]))
    words = ["train", "--model", str(stories), "--data", str(file), "--out", str(tmp_path / "run"), "--device", "cpu"]
    words += ["--method", "lora", "--max_steps", "2", "--batch", "2", "--pack", "true", "--max_length", "40"]
    words += ["--overlong", "split", "--learn", "last", "--columns.prompt", "q", "--columns.completion", "a"]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert "20 rows of prompt and completion (prompt from 'q', completion from 'a')" in captured.err
    assert "split: 0 left out" in captured.err and "rows of 40, " in captured.err
    kept = (tmp_path / "run/config.yaml").read_text()
    assert all(line in kept for line in ("pack: true", 'overlong: "split"', 'learn: "last"', '"prompt": "q"'))


REFUSED: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "too long": ([{"prompt": "a", "completion": " b" * 99}], {"max_length": 9}, "row 0 has .* limit is 9"),
    "mixed": ([{"prompt": "a", "completion": "b"}, {"text": "c"}], {}, "row 1 is a row of plain text, and row 0"),
    "no column": ([{"prompt": "a", "completion": "b"}], {"columns": {"prompt": "q"}}, "row 0 has no 'q'"),
    "too far": ([{"text": "a"}], {"max_length": 513}, "max_length=513, and this model was built for rows of up to 512"),
    "masked": ([{"prompt": "a", "completion": ""}], {}, "row 0 has an empty completion"),
}


@pytest.mark.parametrize(("data", "options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_nothing_is_written_for_data_that_cannot_be_used(
    data: list[dict[str, Any]], options: dict[str, Any], message: str, stories: Path, tmp_path: Path
) -> None:
    model, tokenizer = fresh(stories)
    before = adapter_tensors(model)
    with pytest.raises(ValueError, match=message):
        lora.fit(model, tokenizer, data, config=quiet(out=str(tmp_path / "run"), **options))
    assert not (tmp_path / "run").exists()
    assert all(torch.equal(t, before[key]) for key, t in adapter_tensors(model).items())


def test_a_wrong_mask_stops_a_run_before_it_begins(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = fresh(stories)
    monkeypatch.setattr(tokenizer, "stop", (99,))  # as if the files named another end than training writes
    with pytest.raises(ValueError, match="row 0: the answer .* the tuned model would never stop"):
        lora.fit(model, tokenizer, rows(), config=quiet(max_steps=1))


def test_only_our_models_are_packed(stories: Path) -> None:
    _, tokenizer = fresh(stories)
    theirs = transformers.LlamaForCausalLM.from_pretrained(stories)
    lora.wrap(theirs, r=2)
    with pytest.raises(ValueError, match="pack=True needs a model of lora.load's: LlamaForCausalLM would let"):
        lora.fit(theirs, tokenizer, rows(), config=quiet(pack=True, max_length=64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pack": True}, "pack=True needs max_length"),
        ({"overlong": "cut"}, "overlong='cut': one of error, drop"),
        ({"learn": "none"}, "learn='none': one of assistant, last, all"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora.TrainConfig(**settings)
