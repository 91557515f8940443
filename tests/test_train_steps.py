"""Every feature of the loop against a naive one in float64, one row at a time; and what must change nothing."""

import gc
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lora
from lora.batch import Example
from lora.quant.codebook import dynamic_map
from lora.quant.linear import Linear4bit
from lora.render import collate, render
from lora.tokens import Examples
from lora.train.batches import endless, longest
from lora.train.loss import blocks, noise, recomputed, token_loss
from lora.train.pack import Packs

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "Lily", "played", "outside"]


def rows(n: int = 10) -> list[dict[str, str]]:
    draw = random.Random(0)
    return [
        {"prompt": " ".join(draw.choices(WORDS, k=1 + i % 3)), "completion": " " + " ".join(draw.choices(WORDS, k=k))}
        for i, k in enumerate(draw.choices([1, 2, 5, 15, 30], k=n))
    ]


def quiet(**settings: Any) -> lora.TrainConfig:
    return lora.TrainConfig(**({"progress": False, "lr": 2e-3, "eps": 1e-4, "max_steps": 6} | settings))


def start(model: nn.Module, method: str) -> nn.Module:
    """Makes `model` ready to train from one known point, B not zero."""
    if method == "full":
        return model.requires_grad_(True)
    lora.wrap(model, r=2, alpha=4)
    draw = torch.Generator().manual_seed(3)
    for p in model.parameters():
        if p.requires_grad:
            p.data.copy_(torch.empty(p.shape).normal_(std=0.05, generator=draw))
    return model


def rate(config: lora.TrainConfig, step: int) -> float:
    """The schedules as a table, one case after the other."""
    n, peak = config.max_steps, config.lr
    rise = math.ceil(config.warmup * n)
    if step < rise:
        return peak * (step + 1) / rise
    if config.schedule == "linear":
        return peak * (n - step) / (n - rise)
    if config.schedule == "cosine":
        return peak * (1 + math.cos(math.pi * (step - rise) / (n - rise))) / 2
    left = math.ceil(config.decay * n)
    return peak * (n - step) / left if config.schedule == "wsd" and n - step < left else peak


def theirs(stories: Path, method: str) -> nn.Module:
    """transformers' model; for "qlora" with every 4-bit weight written out."""
    model = transformers.LlamaForCausalLM.from_pretrained(stories)
    if method == "qlora":
        packed, _ = lora.load(stories, quantize="nf4", device="cpu")
        for name, module in packed.named_modules():
            if isinstance(module, Linear4bit):
                model.get_submodule(name).weight.data = module.weight_as(torch.float32)
    return model


def in_8_bits(x: Tensor, signed: bool) -> Tensor:
    """What is left of a moment (n,): each run of 256 over its largest, the nearest of 256 levels, no v > 0 at 0."""
    levels = dynamic_map(signed).double()
    y = nn.functional.pad(x, (0, -x.numel() % 256)).view(-1, 256)
    most = y.abs().amax(dim=1, keepdim=True)
    share = y / most.where(most > 0, 1.0)
    code = (share[..., None] - levels).abs().argmin(dim=-1)
    if not signed:
        code = torch.where((code == 0) & (share > 0), 1, code)
    return (levels[code] * most).flatten()[: x.numel()]


def naive(stories: Path, tokenizer: Any, config: lora.TrainConfig, method: str) -> tuple[list[Any], dict[str, Tensor]]:
    """(loss, gradient norm, rate) of each step and the weights at the end: float64, row by row, AdamW by hand."""
    model = start(theirs(stories, method), method).double()
    examples: Any = render(rows(), tokenizer, config.max_length or 512, learn=config.learn, overlong=config.overlong)
    examples = Packs(examples, config.max_length or 0) if config.pack else examples
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    m, v = ({n: torch.zeros_like(p) for n, p in params.items()} for _ in range(2))
    torch.manual_seed(config.seed)
    found = []
    groups: Iterator[Any] = endless(examples, config.batch, config.accumulate, config.seed)
    for step in range(config.max_steps or 0):
        _, group = next(groups)
        texts = [e for part in group for unit in part for e in getattr(unit, "examples", [unit])]
        count = sum(sum(e.learned[1:]) for e in texts)
        total = 0.0
        for e in texts:
            x = model.get_input_embeddings()(torch.tensor([e.ids]))
            if config.neftune:
                u = torch.rand(x.shape, dtype=torch.float32) * 2 - 1
                x = x + u * config.neftune / math.sqrt(x.shape[1] * x.shape[2])
            logp = model(inputs_embeds=x).logits[0].log_softmax(-1)
            loss = torch.zeros((), dtype=torch.float64)
            for k in range(1, len(e.ids)):
                if e.learned[k]:
                    smooth = config.label_smoothing
                    loss = loss - (1 - smooth) * logp[k - 1, e.ids[k]] - smooth * logp[k - 1].mean()
            (loss / count).backward()
            total += loss.item() / count
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in params.values() if p.grad is not None))
        shrink = min(1.0, config.clip / (norm + 1e-6)) if config.clip else 1.0
        lr = rate(config, step)
        found.append((total, norm, lr))
        for n, p in params.items():
            g = p.grad * shrink
            m[n] = config.beta1 * m[n] + (1 - config.beta1) * g
            v[n] = config.beta2 * v[n] + (1 - config.beta2) * g**2
        for n, p in params.items():
            own = lr * config.lora_plus if n.endswith(".b") else lr
            up = m[n] / (1 - config.beta1 ** (step + 1))
            down = (v[n] / (1 - config.beta2 ** (step + 1))).sqrt() + config.eps
            p.data = p.data * (1 - own * config.weight_decay) - own * up / down
            p.grad = None
        if config.optim_bits == 8:
            for moment, signed in ((m, True), (v, False)):
                kept = in_8_bits(torch.cat([x.flatten() for x in moment.values()]), signed)
                for n, x in zip(moment, kept.split([x.numel() for x in moment.values()]), strict=True):
                    moment[n] = x.view_as(moment[n])
    return found, params


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", {"batch": 4}),
        ("lora", {"batch": 2, "accumulate": 3, "schedule": "linear", "warmup": 0.3}),
        ("lora", {"batch": 4, "schedule": "constant", "warmup": 0.0, "clip": 0.3}),
        ("lora", {"batch": 3, "schedule": "wsd", "decay": 0.5, "warmup": 0.1}),
        ("lora", {"batch": 4, "lora_plus": 16.0, "weight_decay": 0.1}),
        ("lora", {"batch": 4, "label_smoothing": 0.1}),
        ("lora", {"batch": 1, "accumulate": 4, "neftune": 5.0}),
        ("lora", {"batch": 4, "recompute": True, "clip": 0.0}),
        ("full", {"batch": 2, "accumulate": 2, "schedule": "wsd", "weight_decay": 0.1, "lr": 5e-4}),
        ("full", {"batch": 4, "label_smoothing": 0.2, "recompute": True, "lr": 5e-4}),
        ("lora", {"batch": 2, "accumulate": 2, "lora_plus": 4.0, "label_smoothing": 0.1, "schedule": "linear"}),
        ("qlora", {"batch": 4}),
        ("qlora", {"batch": 2, "accumulate": 2, "recompute": True, "beta1": 0.8, "beta2": 0.95}),
        ("qlora", {"pack": True, "max_length": 128, "batch": 2, "learn": "all"}),
        ("lora", {"pack": True, "max_length": 128, "batch": 1, "accumulate": 2, "label_smoothing": 0.1}),
        ("lora", {"batch": 4, "max_length": 24, "overlong": "split"}),
        ("lora", {"batch": 4, "learn": "all", "max_length": 24, "overlong": "cut_right"}),
        ("full", {"batch": 4, "pack": True, "max_length": 128, "lr": 5e-4}),
        ("qlora", {"batch": 4, "optim_bits": 8, "weight_decay": 0.1}),
    ],
    ids=str,
)
def test_the_loop_equals_a_naive_one_in_float64(method: str, settings: dict[str, Any], stories: Path) -> None:
    config = quiet(**settings)
    model, tokenizer = lora.load(stories, quantize="nf4" if method == "qlora" else None, device="cpu")
    run = lora.fit(start(model, method), tokenizer, rows(), config=config)
    want, weights = naive(stories, tokenizer, config, method)
    lines = [h for h in run.history if "loss" in h]
    assert len(lines) == len(want)
    for got, (loss, norm, lr) in zip(lines, want, strict=True):
        assert got["loss"] == pytest.approx(loss, abs=1e-5)
        assert got["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert got["learning_rate"] == pytest.approx(lr)
    mine = dict(model.named_parameters())
    for name, w in weights.items():
        off = (mine[name].double() - w).abs()
        if config.optim_bits == 8:  # a moment in the middle of two levels may fall to either: 1 weight in 500 here
            assert (off >= 2e-5).double().mean() < 0.01 and off.max() < 1e-3, name
        else:
            assert off.max() < 2e-5, name


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_recompute_gives_the_same_bits_with_dropout(quantize: str | None, stories: Path) -> None:
    found = []
    for again in (False, True):
        model, tokenizer = lora.load(stories, quantize=quantize, device="cpu")
        torch.manual_seed(1)
        lora.wrap(model, r=2, dropout=0.2)
        calls = []
        blocks(model)[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        run = lora.fit(model, tokenizer, rows(), config=quiet(recompute=again, neftune=2.0, probe=False, batch=4))
        trained = [p.clone() for p in model.parameters() if p.requires_grad]
        found.append(([h["loss"] for h in run.history if "loss" in h], trained))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def alive() -> list[Tensor]:
    gc.collect()
    return [t for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter)]  # not another test's fake ones


def test_recompute_keeps_less(stories: Path) -> None:
    model, tokenizer = lora.load(stories, device="cpu")
    lora.wrap(model, r=2)
    batch = collate(render(rows(), tokenizer, 512))
    held = []
    for on in (False, True):
        sizes: dict[int, int] = {}

        def keep(t: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        before = {t.untyped_storage().data_ptr() for t in alive()}
        with recomputed(model, on), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = token_loss(model, batch)
        for t in alive():  # what a block of lean.py keeps is held by the block, not by autograd
            if t.untyped_storage().data_ptr() not in before:
                keep(t)
        held.append(sum(sizes.values()))
        del loss
    assert held[1] < 0.5 * held[0]


def test_noise_is_as_large_as_the_row_is_long_and_only_where_asked(stories: Path) -> None:
    model, _ = lora.load(stories, device="cpu")
    ids, real = torch.ones(2, 50, dtype=torch.long), torch.ones(2, 50, dtype=torch.bool)
    real[1, 5:] = False
    table = model.model.embed_tokens
    plain = table(ids)
    with noise(model, 3.0, real):
        moved = table(ids) - plain
    d = plain.shape[-1]
    for row, n in ((0, 50), (1, 5)):
        bound = 3.0 / math.sqrt(n * d)
        assert 0.95 * bound < moved[row].abs().max() <= bound * (1 + 1e-5)
        assert abs(moved[row].mean()) < 0.1 * bound
    assert torch.equal(table(ids), plain)
    with noise(model, 0.0, real):
        assert torch.equal(table(ids), plain)


# ---- 16 bits ----
def curve(stories: Path, dtype: str, method: str) -> list[dict[str, Any]]:
    model, tokenizer = lora.load(stories, device="cpu", dtype=dtype)
    run = lora.fit(start(model, method), tokenizer, rows(), config=quiet(batch=4, lr=5e-4))
    return [h for h in run.history if "loss" in h]


@pytest.mark.parametrize(
    ("dtype", "method", "near"), [("bfloat16", "lora", 0.05), ("float16", "lora", 0.01), ("bfloat16", "full", 0.15)]
)
def test_sixteen_bits_follow_float32(dtype: str, method: str, near: float, stories: Path) -> None:
    found = curve(stories, dtype, method)
    for a, b in zip(curve(stories, "float32", method), found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=near)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=near)
    if dtype == "float16":
        assert all(h["loss_scale"] == 2**16 and h["skipped"] == 0 for h in found)


def test_a_gradient_that_overflows_in_float16_halves_the_scale_and_leaves_the_step_out(stories: Path) -> None:
    """This model's largest gradient is above 1 and 2**16 times it is above float16's 65504."""
    model, tokenizer = lora.load(stories, device="cpu", dtype="float16")
    start(model, "full")
    before = [p.clone() for p in model.parameters()]
    run = lora.fit(model, tokenizer, rows(), config=quiet(batch=4, max_steps=1))
    first = run.history[0]
    assert first["loss_scale"] == 2**15 and first["skipped"] == 1 and not math.isfinite(first["grad_norm"])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    after = curve(stories, "float16", "full")
    assert [h["skipped"] for h in after] == [1] * 6 and after[-1]["loss"] < after[2]["loss"]


# ---- between the steps ----
def test_the_probe_runs_the_longest_batch_first_and_changes_nothing(stories: Path) -> None:
    found = []
    for probe in (False, True):
        model, tokenizer = lora.load(stories, device="cpu")
        torch.manual_seed(1)
        lora.wrap(model, r=2, dropout=0.3)
        lengths: list[int] = []
        model.model.embed_tokens.register_forward_pre_hook(lambda _, a, n=lengths: n.append(a[0].shape[1]))
        run = lora.fit(model, tokenizer, rows(), config=quiet(batch=3, probe=probe, neftune=1.0))
        losses = [(h["loss"], h["grad_norm"]) for h in run.history if "loss" in h]
        found.append((losses, lengths, [p.clone() for p in model.parameters()]))
    assert found[0][0] == found[1][0]
    assert found[1][1][0] == max(len(e.ids) for e in render(rows(), tokenizer, 512)) and found[1][1][1:] == found[0][1]
    assert all(torch.equal(a, b) for a, b in zip(found[0][2], found[1][2], strict=True))


def test_the_longest_rows_are_found_without_making_the_others() -> None:
    made: list[int] = []

    class Counted(Examples):
        def __getitem__(self, i: Any) -> Any:
            made.append(i)
            return super().__getitem__(i)

    store, sizes = Counted(), [3, 9, 5, 9, 2, 7]
    for row, n in enumerate(sizes):
        store.append(Example((1,) * n, (False, *(True,) * (n - 1)), row))
    store.freeze()
    assert [e.row for e in longest(store, 3)] == [1, 3, 5] and made == [1, 3, 5]
    assert len(longest(store, 99)) == 6
    [pack] = longest(Packs(store, 12), 1)
    assert {1} <= {e.row for e in pack.examples}  # the row that holds the longest text


def test_memory_that_runs_out_in_the_probe_says_what_to_do(stories: Path, tmp_path: Path) -> None:
    model, tokenizer = lora.load(stories, device="cpu")
    lora.wrap(model, r=2)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")

    model.model.norm.register_forward_pre_hook(full)
    with pytest.raises(RuntimeError, match=r"longest batch, 4 rows of up to \d+ tokens.*20.00 GiB.; take a smaller"):
        lora.fit(model, tokenizer, rows(), config=quiet(batch=4, out=str(tmp_path / "run")))
    assert not (tmp_path / "run/adapter").exists()


def test_early_stopping_ends_and_the_best_weights_come_back(stories: Path, tmp_path: Path) -> None:
    model, tokenizer = lora.load(stories, device="cpu")
    torch.manual_seed(1)
    lora.wrap(model, r=8)
    other = [{"prompt": "Lily", "completion": " was a happy little girl who liked to play."}] * 3
    config = quiet(batch=4, max_steps=60, lr=2e-2, eval_every=2, patience=3, best=True, save_every=1, keep_last=1,
                   out=str(tmp_path / "run"), schedule="constant")  # fmt: skip
    run = lora.fit(model, tokenizer, rows(), other, config)
    losses = {h["step"]: h["eval_loss"] for h in run.history if "eval_loss" in h}
    best = min(losses, key=lambda k: losses[k])
    assert run.steps == best + 6 < 60 and max(losses) == run.steps
    again = lora.evaluate(model, tokenizer, other, ("nll",))
    assert again.metrics["nll"] == pytest.approx(losses[best], abs=1e-5)
    fresh, _ = lora.load(stories, device="cpu")
    lora.attach(fresh, tmp_path / "run/adapter")
    assert lora.evaluate(fresh, tokenizer, other, ("nll",)).metrics == again.metrics
    certificate = json.loads((tmp_path / "run/run.json").read_text())
    assert certificate["best_step"] == best and certificate["steps"] == run.steps
    assert f"step-{best:08d}" in [p.name for p in (tmp_path / "run/checkpoints").iterdir()]


def test_evaluation_by_text_is_logged_and_kept(stories: Path, tmp_path: Path) -> None:
    model, tokenizer = lora.load(stories, device="cpu")
    model.requires_grad_(True)
    data = [{"prompt": "Lily said", "completion": " seven"}] * 4
    config = quiet(batch=4, max_steps=30, lr=3e-3, eval_every=15, eval_generate=2, out=str(tmp_path / "run"))
    run = lora.fit(model, tokenizer, data, data[:3], config)
    found = [h["eval_exact_match"] for h in run.history if "eval_loss" in h]
    assert found[-1] == 1.0 and len(found) == 2
    kept = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in kept] == [15, 15, 30, 30]
    assert kept[-1]["answer"].strip() == "seven" and kept[-1]["reference"] == " seven"


# ---- defaults ----
def test_the_default_rate_is_tenfold_for_an_adapter(stories: Path) -> None:
    from lora.train.advice import default_lr

    model, tokenizer = lora.load(stories, device="cpu")
    model.requires_grad_(True)
    full = default_lr(model)
    assert full == pytest.approx(5e-5 * (2000 / 64) ** 0.781, rel=0.05)
    model.requires_grad_(False)
    assert default_lr(lora.wrap(model, r=2)) == pytest.approx(10 * full, rel=0.05)
    run = lora.fit(model, tokenizer, rows(), config=quiet(lr=None, max_steps=1, warmup=0.0, schedule="constant"))
    assert run.history[0]["learning_rate"] == default_lr(model)


def test_an_adapter_too_small_and_a_batch_too_large_are_noted(stories: Path) -> None:
    model, tokenizer = lora.load(stories, device="cpu")
    lora.wrap(model, r=1, targets=["layers.0.self_attn.k_proj"])
    with pytest.warns(UserWarning, match=r"tokens are learned by 96 parameters of rank 1.*r=\d+ would hold them"):
        lora.fit(model, tokenizer, rows(40), config=quiet(max_steps=1))
    model, tokenizer = lora.load(stories, device="cpu")
    lora.wrap(model, r=16)
    with pytest.warns(UserWarning, match="64 rows to a step: beyond about 32"):
        lora.fit(model, tokenizer, rows(70), config=quiet(max_steps=1, batch=16, accumulate=4))
    with pytest.warns(UserWarning, match=r"\d\d texts in packed rows to a step: beyond about 32"):
        lora.fit(model, tokenizer, rows(70), config=quiet(max_steps=1, batch=16, pack=True, max_length=256))


def test_evaluations_that_take_longer_than_the_steps_and_rows_of_padding_are_noted(
    stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora.train.advice.LONG_EVALUATION", 100)
    model, tokenizer = lora.load(stories, device="cpu")
    lora.wrap(model, r=16)
    many = rows(40)
    with pytest.warns(
        UserWarning, match=r"an evaluation reads [\d,]+ tokens, and .*validation rows than 40, or a larg"
    ):
        lora.fit(model, tokenizer, many, many, quiet(max_steps=2, batch=8, eval_every=1, lr=1e-4))
    lora.fit(model, tokenizer, many, many, quiet(max_steps=6, batch=8, lr=1e-4))  # no warning, which would be an error
    with pytest.warns(UserWarning, match=r"packed rows of 4,096 tokens are \d+% full, and the padding is computed too"):
        lora.fit(model, tokenizer, rows(3), config=quiet(max_steps=1, pack=True, max_length=4096, batch=1))


def test_a_model_of_transformers_takes_every_feature_as_ours_does(stories: Path) -> None:
    ours, tokenizer = lora.load(stories, device="cpu")
    theirs = transformers.LlamaForCausalLM.from_pretrained(stories)
    config = quiet(batch=4, recompute=True, label_smoothing=0.1, neftune=5.0, lora_plus=4.0)
    runs = [lora.fit(start(m, "lora"), tokenizer, rows(), rows(3), config) for m in (ours, theirs)]
    for a, b in zip(*(run.history for run in runs), strict=True):
        for key in ("loss", "eval_loss"):
            assert a.get(key) == (pytest.approx(b[key], abs=1e-4) if key in b else None)
    assert "forward" not in vars(blocks(theirs)[0])  # recompute has left


def test_recompute_needs_blocks() -> None:
    said = "recompute=True runs a model's blocks again, and Linear has no list of them"
    with pytest.raises(ValueError, match=said), recomputed(nn.Linear(2, 2)):
        pass
