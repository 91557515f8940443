"""A dry run counts what a real run takes, to the byte; the account of budget.py counts what the fused step takes."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny import give_tokenizer
from torch._subclasses.fake_tensor import FakeTensor

import lora
from lora.kernels import causal
from lora.kernels.scratch import mine
from lora.models import llama
from lora.models.budget import account, widths_of
from lora.models.gemma import Gemma3Config
from lora.models.gpt2 import GPT2Config
from lora.models.llama import LlamaConfig
from lora.models.outline import Kind, Outline, _layer, outline, skeleton
from lora.models.phi3 import Phi3Config
from lora.models.qwen import Qwen3Config
from lora.models.save import save_pretrained
from lora.models.tokenizer import Tokenizer
from lora.quant.weight import quantize_tensor
from lora.train.dryrun import Counted, Tally, _apart, _in_8_bits, count, even_batch, fake_batch, like, without_memory
from lora.train.loop import prepare
from lora.train.optim import AdamW

LLAMA = LlamaConfig(
    vocab_size=300, hidden_size=64, intermediate_size=160, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16,
    max_length=256,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small Llama in a folder, with a tokenizer of bytes."""
    model = LLAMA.build()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    give_tokenizer(tmp_path)
    save_pretrained(model, Tokenizer.from_directory(tmp_path), tmp_path / "model", dtype=torch.float32)
    return tmp_path / "model"


def dry(folder: Path, quantize: str | None, method: str, **options: object) -> Counted:
    """Counted from config.json alone."""
    batch = even_batch(2, 50)
    with without_memory() as mode:
        model = skeleton(outline(folder), quantize)
        model = model.requires_grad_(True) if method == "full" else lora.wrap(model, r=5)
        return count(model, fake_batch(mode, batch), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("quantize", "method", "recompute"),
    [
        ("nf4", "qlora", False),
        ("nf4", "qlora", True),
        (None, "lora", False),
        (None, "full", False),
        ("int8", "lora", False),
    ],
)
def test_a_dry_run_equals_a_real_run_to_the_byte(
    folder: Path, quantize: str | None, method: str, recompute: bool
) -> None:
    model, _ = lora.load(folder, quantize=quantize, device="cpu")
    model = model.requires_grad_(True) if method == "full" else lora.wrap(model, r=5)
    real = count(model, even_batch(2, 50), recompute=recompute)
    assert dry(folder, quantize, method, recompute=recompute) == real
    assert real.kept > 0 and real.peak > real.base + real.kept


def test_it_equals_the_steps_of_lora_fit(folder: Path) -> None:
    """Counted around the loop's own step, from a real model on real rows."""
    model, tokenizer = lora.load(folder, quantize="nf4", device="cpu")
    lora.wrap(model, r=5)
    rows = [{"prompt": "", "completion": "x" * 48} for _ in range(2)]
    config = lora.TrainConfig(batch=2, max_steps=2, learn="all", probe=False, progress=False)
    steps = prepare(model, tokenizer, rows, None, config)
    length = len(steps.examples[0].ids)
    learned = steps.examples[0].n_learned / length
    o = steps.optimizer
    tally = Tally()
    tally.add([*model.parameters(), *model.buffers(), o.w, o.grad, o.m, o.v, o.hyper])
    model.train()
    with _apart(), tally:  # buffers that other tests left behind may be larger
        for _ in range(2):
            steps.step([list(steps.examples)])
    batch = even_batch(2, length, learned)
    with without_memory() as mode:
        planned = lora.wrap(skeleton(outline(folder), "nf4"), r=5)
        got = count(planned, fake_batch(mode, batch))
    assert got.peak == tally.peak


def test_fewer_bits_and_recompute_take_less(folder: Path) -> None:
    whole, again = dry(folder, "nf4", "qlora"), dry(folder, "nf4", "qlora", recompute=True)
    assert again.kept < whole.kept / 2 and again.peak < whole.peak and again.base == whole.base
    eight = dry(folder, "nf4", "qlora", bits=8)
    trained = whole.adapters // 4
    assert whole.optimizer - eight.optimizer == pytest.approx(6 * trained, rel=0.2)
    assert whole.peak - eight.peak == whole.optimizer - eight.optimizer


def test_eight_bit_states_are_as_large_as_the_optimizer_makes_them() -> None:
    p = torch.nn.Parameter(torch.zeros(1000))
    o = AdamW([p], bits=8)
    held = sum(t.numel() * t.element_size() for moment in (o.m, o.v) for t in moment[:3])
    counted = _in_8_bits(Counted(0, 0, 4000, 4000, 8000, 0, 16000), [p])
    assert counted.optimizer == held


def test_a_model_can_be_planned_as_it_stands(folder: Path) -> None:
    model, _ = lora.load(folder, quantize="nf4", device="cpu")
    lora.wrap(model, r=3, targets=["q_proj", "down_proj"])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    batch = even_batch(1, 40)
    with without_memory() as mode:
        got = count(like(model), fake_batch(mode, batch))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert got == count(model, batch)


def test_a_real_run_after_a_dry_one_finds_nothing_of_it(folder: Path) -> None:
    batch = even_batch(2, 50)
    for gpu in (False, True):
        with without_memory(gpu) as mode:
            model = lora.wrap(skeleton(outline(folder), "nf4", "float32"), r=5)
            model.hidden(torch.zeros(2, 50, dtype=torch.int64))
            count(model, fake_batch(mode, batch))
    kept = [*mine().values(), *causal._triangles.values()]
    assert not any(isinstance(t, FakeTensor) for t in kept)
    real, _ = lora.load(folder, quantize="nf4", device="cpu")
    lora.wrap(real, r=5)
    real(torch.zeros(2, 50, dtype=torch.int64)).sum().backward()
    assert all(type(p.grad) is torch.Tensor for p in real.parameters() if p.requires_grad)


@pytest.mark.parametrize("config", ["gpt2", "qwen3"])
def test_other_families_run_dry(config: str, tmp_path: Path) -> None:
    made: object = GPT2Config(
        vocab_size=99, max_length=64, hidden_size=32, intermediate_size=128, num_layers=2, num_heads=4
    )
    if config == "qwen3":
        made = Qwen3Config(**dataclasses.asdict(LLAMA) | {"qk_norm": True})
    real = made.build().requires_grad_(False).eval()  # type: ignore[attr-defined]
    lora.quantize(real, "nf4")
    lora.wrap(real, r=4)
    batch = even_batch(2, 33)
    with without_memory() as mode:
        planned = lora.wrap(skeleton(Outline(tmp_path, made, torch.float32, {}), "nf4"), r=4)
        got = count(planned, fake_batch(mode, batch))
    assert got == count(real, batch)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_on_a_gpu_dropout_of_any_model_keeps_no_mask(quantize: str | None) -> None:
    config = GPT2Config(vocab_size=99, max_length=64, hidden_size=32, intermediate_size=128, num_layers=2, num_heads=4)
    kept, batch = [], even_batch(2, 40)
    for dropout in (0.0, 0.3):
        model = config.build().requires_grad_(False).bfloat16()
        if quantize:
            lora.quantize(model, quantize)
        lora.wrap(model, r=4, dropout=dropout)
        with without_memory(gpu=True) as mode:
            kept.append(count(like(model), fake_batch(mode, batch)).kept)
    # a seed of 8 bytes for each layer, and one buffer for all, as large as the widest input
    assert kept[1] - kept[0] == 2 * 4 * 8 + 2 * 40 * 128 * 2


def test_a_skeleton_holds_what_quantizing_makes() -> None:
    for shape in ((48, 64), (5, 33)):
        packed = quantize_tensor(torch.randn(shape))
        layer = _layer(Kind("nf4"), shape, torch.empty(16), torch.empty(256))
        assert layer.weight.shape == packed.q.shape and layer.absmax.shape == packed.scales[0].shape
        assert layer.nested_absmax.shape == packed.scales[2].shape
        assert layer.nested_offset.shape == packed.scales[3].shape


@pytest.mark.parametrize("keep", ["all", "no_gate", "input"])
@pytest.mark.parametrize(
    ("size", "batch", "length", "r", "quantize"),
    [
        ((3, 256, 704, 4, 2, 64, 5000), 4, 512, 8, "nf4"),
        ((4, 512, 1536, 8, 8, 64, 1000), 2, 1024, 40, None),
        ((2, 128, 384, 4, 1, 32, 60000), 1, 333, 8, "nf4"),
    ],
)
def test_the_account_of_the_fused_step_is_right(
    keep: str, size: tuple[int, ...], batch: int, length: int, r: int, quantize: str | None, tmp_path: Path
) -> None:
    """Against a dry run of the fused step, whose attention takes nothing for itself."""
    L, D, F, H, KV, hd, V = size
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_layers=L, num_heads=H, num_kv_heads=KV, head_dim=hd,
        max_length=4096,
    )  # fmt: skip
    rows = even_batch(batch, length)
    with without_memory(gpu=True) as mode:
        model = lora.wrap(skeleton(Outline(tmp_path, config, torch.bfloat16, {}), quantize, device="cuda"), r=r)
        model.keeping.keep = keep
        got = count(model, fake_batch(mode, rows), grain=512)
        widths = widths_of(config, model)
    assert model.keeping.recordable
    counted = account(widths, [keep] * L, batch * length, 2, rows.target.numel(), attention=0)
    assert counted.total == pytest.approx(got.peak - got.base, rel=0.005)


@pytest.mark.parametrize("keep", ["all", "input"])
@pytest.mark.parametrize("family", [Qwen3Config, Gemma3Config, Phi3Config])
def test_the_account_knows_what_families_add(family: type[LlamaConfig], keep: str, tmp_path: Path) -> None:
    """Norms on q and k, norms behind W_o and W_d, q k v in one layer."""
    more = {} if family is Phi3Config else {"qk_norm": True}
    config = family(
        vocab_size=1000, hidden_size=256, intermediate_size=704, num_layers=3, num_heads=4, num_kv_heads=2,
        head_dim=64, max_length=4096, **more,
    )  # fmt: skip
    rows = even_batch(4, 512)
    with without_memory(gpu=True) as mode:
        model = lora.wrap(skeleton(Outline(tmp_path, config, torch.bfloat16, {}), "nf4", device="cuda"), r=8)
        model.hidden(torch.zeros(1, 2, dtype=torch.int64))
        if not model.keeping.recordable:
            pytest.skip("these blocks take the plain path")
        model.keeping.keep = keep
        got = count(model, fake_batch(mode, rows), grain=512)
        widths = widths_of(config, model)
    counted = account(widths, [keep] * 3, 4 * 512, 2, rows.target.numel(), attention=0)
    assert counted.total == pytest.approx(got.peak - got.base, rel=0.01)


def test_on_a_gpu_the_plain_path_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with without_memory(gpu=True):
        model = lora.wrap(skeleton(Outline(tmp_path, LLAMA, torch.bfloat16, {}), "nf4", device="cuda"), r=8)
        for path, fused in (({"cuda"}, True), (set(), False)):
            monkeypatch.setattr(llama, "FUSED", path)
            model.keeping.recordable = False
            model.hidden(torch.zeros(1, 2, dtype=torch.int64))
            assert model.keeping.recordable is fused
