"""lora.plan: what a step takes, what fits, and one sentence for each mistake."""

import dataclasses
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from tiny import give_tokenizer

import lora
from lora.__main__ import main
from lora.kernels.scratch import mine
from lora.models.budget import (
    CUBLAS,
    Keeping,
    Widths,
    _leaving,
    account,
    decoded_bytes,
    graph_fits,
    host_bytes,
    in_8_bits,
    keep_on_gpu,
)
from lora.models.host import host_room, stays
from lora.models.llama import LlamaConfig
from lora.models.outline import outline
from lora.models.save import save_pretrained
from lora.models.tokenizer import Tokenizer
from lora.train.ceilings import CARDS, card_of, measure, step_seconds
from lora.train.dryrun import count, even_batch

GIB = 2**30
LARGE = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8,
    head_dim=128, max_length=131072, eps=1e-5, rope_theta=500000.0,
)  # fmt: skip
SMALL = LlamaConfig(
    vocab_size=300, hidden_size=64, intermediate_size=160, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16,
    max_length=256,
)  # fmt: skip


def written(config: LlamaConfig, folder: Path, **more: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_json() | {"dtype": "bfloat16"} | more))
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(LARGE, tmp_path_factory.mktemp("8b"))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return written(SMALL, tmp_path / "small")


@pytest.mark.parametrize(
    ("batch", "length", "budget", "measured", "whole", "recorded"),
    [(4, 2048, "36GiB", 30.67, 32, True), (4, 2048, "8.2GiB", 7.86, 1, True), (1, 512, None, 8.13, 32, True)],
)
def test_peaks_are_those_measured_on_an_h100(
    large: Path, batch: int, length: int, budget: str | None, measured: float, whole: int, recorded: bool
) -> None:
    """Figures of bench_step.py and bench_plan.py, LOG.md: `measured` is of when no weights stayed decoded."""
    plan = lora.plan(large, batch, length, budget=budget, card="h100")
    assert (plan.peak - plan.parts["weights that stay decoded"]) / GIB == pytest.approx(measured, rel=0.03)
    assert plan.parts["weights that stay decoded"] == plan.decoded * decoded_bytes(WIDTHS, 2)
    assert plan.peak / GIB == pytest.approx({"36GiB": 35.64, "8.2GiB": 7.88, None: 20.96}[budget], rel=0.03)
    assert plan.decoded == {"36GiB": 13, "8.2GiB": 0, None: 32}[budget]
    assert (plan.keep.count("all"), plan.recorded, plan.by) == (whole, recorded, "account")
    assert plan.fits and plan.peak == sum(plan.parts.values())
    assert set(plan.keep) <= {"all", "host"}


def test_a_step_of_70b_fits_into_48_gb(tmp_path: Path) -> None:
    """42.6 GiB were measured with all states on the host (LOG.md, 2026-11-24), before buffers were shared."""
    peaks = []
    for layers in (4, 8):  # each adds as much
        shape = dataclasses.replace(LARGE, hidden_size=8192, intermediate_size=28672, num_layers=layers, num_heads=64)
        peaks.append(lora.plan(written(shape, tmp_path / f"{layers}"), 1, 2048, card="h100", keep="host").peak)
    peak = peaks[0] + 19 * (peaks[1] - peaks[0])
    assert peak < 48e9 and peak / GIB == pytest.approx(42.6, rel=0.03)


def test_methods_differ_as_they_should(large: Path) -> None:
    qlora, dense = (lora.plan(large, 1, 512, card="h100", method=m) for m in ("qlora", "lora"))
    weights = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    assert dense.parts["dense weights"] - qlora.parts["dense weights"] == pytest.approx(2 * weights, rel=1e-3)
    assert qlora.parts["4-bit weights"] == pytest.approx(4.127 / 8 * weights, rel=2e-3)
    assert qlora.parts["optimizer states"] == 2 * qlora.parts["gradients"] == 8 * 41_943_040
    assert lora.plan(large, 1, 512, card="h100", optim_bits=8).parts["optimizer states"] < 2.1 * 41_943_040


def test_it_solves_for_the_largest_that_fits(large: Path) -> None:
    budget = "10GiB"
    found = lora.plan(large, 2, 1024, budget=budget, card="h100", solve=("batch", "length", "rank")).largest
    for key, x in found.items():
        for step, fits in ((0, True), (1, False)):
            b, n, r = {"batch": (x + step, 1024, 16), "length": (2, x + step, 16), "rank": (2, 1024, x + step)}[key]
            assert lora.plan(large, b, n, r, budget=budget, card="h100").fits is fits, (key, x + step)
    assert lora.plan(large, budget="5GiB", card="h100", solve=("batch",)).largest == {"batch": 0}


def test_fewer_learned_tokens_need_fewer_logits(large: Path) -> None:
    few, many = (lora.plan(large, 1, 2048, card="h100", learned=share) for share in (0.05, 1.0))
    assert few.parts["chunk of logits"] < many.parts["chunk of logits"] and few.seconds < many.seconds


def test_texts_of_packed_rows_take_room_for_a_block_of_queries_each(large: Path) -> None:
    """In flash attention's backward 128 rows more for each, of dq and a sum in float32; their number is rounded up."""
    more = {"card": "h100", "keep": "input", "learned": 0.05}
    none, some, many = (lora.plan(large, 4, 2048, pack=pack, **more) for pack in (0, 16, 100))
    assert many.peak - some.peak == (448 - 64) * 128 * 4 * (4096 + 32)
    assert 0 < some.peak - none.peak <= 64 * 128 * 4 * (4096 + 32)
    assert some.recorded


@pytest.mark.parametrize("path", [".", "..", "small"])
def test_a_folder_is_named_from_wherever_it_is_seen(small: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = small / "inside"
    inside.mkdir()
    monkeypatch.chdir({".": small, "..": inside, "small": small.parent}[path])
    assert lora.plan(path, 2, 50, device="cuda", card="h100").name == "small"


def test_on_a_cpu_it_is_the_dry_run(small: Path) -> None:
    plan = lora.plan(small, 2, 50, r=5, device="cpu")
    model = outline(small).config.build().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    lora.quantize(model, "nf4")
    lora.wrap(model, r=5)
    assert plan.by == "dry run" and plan.keep == () and plan.device == "cpu"
    assert plan.peak == count(model, even_batch(2, 50)).peak
    stands = lora.plan(model, 2, 50, device="cpu")
    assert stands.peak == plan.peak and stands.r == 5


def test_off_the_fast_path_a_gpu_is_planned_by_dry_run(small: Path) -> None:
    full = lora.plan(small, 2, 50, method="full", device="cuda", card="h100")
    assert full.by == "dry run" and full.parts["4-bit weights"] == 0
    trained = sum(p.numel() for p in SMALL.build().parameters())
    # a float32 master and a bfloat16 copy of each
    assert full.parts["trained weights, float32"] == pytest.approx(6 * trained, rel=0.01)


def test_a_checkpoint_in_four_bits_is_planned_as_it_is_stored(tmp_path: Path) -> None:
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    settings |= {"bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["lm_head"]}
    stored = outline(written(SMALL, tmp_path / "four", quantization_config=settings))
    assert len(stored.packed) == 3 * 7 and all(k.double and k.name == "nf4" for k in stored.packed.values())
    a = lora.plan(tmp_path / "four", 2, 50, quantize=None, device="cpu", method="lora")
    b = lora.plan(written(SMALL, tmp_path / "dense"), 2, 50, device="cpu")
    assert a.parts["4-bit weights"] == b.parts["4-bit weights"] > 0


def test_a_real_4_bit_folder_says_its_blocks(small: Path, tmp_path: Path) -> None:
    model = SMALL.build()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    lora.quantize(model, "nf4", block=128, double=False)
    give_tokenizer(small)
    save_pretrained(model, Tokenizer.from_directory(small), tmp_path / "packed")
    found = outline(tmp_path / "packed").packed
    assert len(found) == 21 and {(k.name, k.block, k.double) for k in found.values()} == {("nf4", 128, False)}


def test_of_a_hub_name_config_json_alone_is_fetched(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(small)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert lora.plan("owner/name", 2, 50, device="cuda", card="h100").name == "name"
    assert asked == [("owner/name", ["config.json"])]


def test_a_gguf_is_planned_from_its_header(smollm2_gguf: Path) -> None:
    plan = lora.plan(smollm2_gguf, 8, 512, card="h100")
    assert plan.by == "account" and plan.parts["dense weights"] == pytest.approx(49152 * 576 * 2, rel=0.01)


# ---- the choice of what to keep ----
WIDTHS = Widths(4096, 6144, 4096, 14336, 32, 32, 128256, (48, 16, 32, 16))


def test_blocks_are_kept_whole_as_far_as_memory_goes() -> None:
    M = 8192
    needs = [account(WIDTHS, ["host"] * (32 - whole) + ["all"] * whole, M, 2).total for whole in range(33)]
    assert needs[1:] == sorted(needs[1:])
    assert needs[1] <= needs[0]  # the last block's states are wanted back at once, so they stay
    for whole in (1, 2, 3, 20, 32):
        assert keep_on_gpu(WIDTHS, M, 2, needs[whole]) == ["host"] * (32 - whole) + ["all"] * whole
        assert whole == 1 or keep_on_gpu(WIDTHS, M, 2, needs[whole] - 1).count("all") == whole - 1
    assert keep_on_gpu(WIDTHS, M, 2, 100 * GIB) == ["all"] * 32
    assert keep_on_gpu(WIDTHS, M, 2, 0) == ["input_host"] * 31 + ["input"]


def test_a_block_that_sends_its_input_alone_gives_the_copy_before_it_more_time() -> None:
    assert not stays([], True) and not stays([True], True) and stays([True], False)
    assert not stays([False], False) and not stays([True, False], False) and not stays([True, False], True)
    words, under_way = list[str](), []
    for word in ("host", "input_host", "host", "input_host", "input_host", "input_host", "host", "host", "all"):
        words = _leaving(words, word)
        under_way.append("+".join(words))
    assert under_way == [
        "host", "host+input_host", "host", "host+input_host", "input_host", "input_host", "host", "host", "",
    ]  # fmt: skip


def test_states_that_the_host_cannot_hold_are_made_again() -> None:
    M = 8192
    need = account(WIDTHS, ["host"] * 31 + ["all"], M, 2).total
    host = 31 * host_bytes(WIDTHS, "host", M, 2)
    assert keep_on_gpu(WIDTHS, M, 2, need, host=host) == ["host"] * 31 + ["all"]
    assert keep_on_gpu(WIDTHS, M, 2, need, host=host - 1) == ["input_host"] * 31 + ["input"]
    assert keep_on_gpu(WIDTHS, M, 2, 100 * GIB, host=0) == ["all"] * 32
    assert (host_room() or 1) > 0


def test_in_8_bits_every_second_block_keeps_its_states() -> None:
    assert in_8_bits(["host"] * 4 + ["all"]) == ["host", "input_host", "host", "input_host", "all"]
    M, whole = 8192, ["host"] * 31 + ["all"]
    assert account(WIDTHS, in_8_bits(whole), M, 2).total <= account(WIDTHS, whole, M, 2).total


def test_a_graph_needs_its_memory_twice_where_some_had_to_be_saved() -> None:
    M = 8192
    for keep, times in ((["all"] * 32, 1.1), (["host"] * 31 + ["all"], 2.2)):
        a = account(WIDTHS, keep, M, 2)
        need = a.total - a.reused + CUBLAS
        assert graph_fits(WIDTHS, keep, M, 2, need, int(times * need) + 1)
        assert not graph_fits(WIDTHS, keep, M, 2, need - 1, int(times * need) + 1)
        assert not graph_fits(WIDTHS, keep, M, 2, need, int(times * need) - 1)


# ---- time ----
def test_seconds_are_near_those_measured_on_an_h100() -> None:
    """592 ms at 8.2 GiB, 488 ms with all kept, 683 ms on one row of 8192, 50 ms of 512 (LOG.md, 2026-11-24)."""
    host, all_ = ["host"] * 31 + ["all"], ["all"] * 32
    cases = (
        (4, 2048, host, False, 0.592),
        (4, 2048, all_, True, 0.486),
        (1, 8192, host, False, 0.683),
        (1, 512, all_, True, 0.050),
    )
    for rows, length, keep, recorded, want in cases:
        spent = step_seconds(
            WIDTHS, CARDS["h100"], rows=rows, length=length, keep=keep, itemsize=2, bits4=True, trained=41_943_040,
            learned=rows * length, recorded=recorded,
        )  # fmt: skip
        assert sum(spent.values()) == pytest.approx(want, rel=0.1), (rows, length)


def test_a_slow_bus_is_waited_for() -> None:
    slow = CARDS["h100"]._replace(host=(5.0, 5.0))
    size = {"rows": 4, "length": 2048, "keep": ["host"] * 32, "itemsize": 2, "bits4": True, "trained": 1, "learned": 1}
    fast, waited = (step_seconds(WIDTHS, c, **size) for c in (CARDS["h100"], slow))  # type: ignore[arg-type]
    assert waited["waiting for the host"] > 1.0 > fast["waiting for the host"]


def test_this_machine_can_be_measured() -> None:
    card = measure(torch.device("cpu"))
    assert card.matmul > 0 and card.copy > 0 and min(card.attention) > 0 and card.source == "measured now"


# ---- the command and mistakes ----
def test_the_command_prints_a_table_and_json(large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", str(large), "--card", "h100", "--budget", "8.2GiB", "--solve", "batch"]
    assert main(words) == 0
    table = capsys.readouterr().out
    assert "peak of tensors" in table and "fits into 8.20 GiB" in table and "blocks keep: 0-30 host, 31 all" in table
    assert main([*words, "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["fits"] and got["peak"] == sum(got["parts"].values()) and got["largest"] == {"batch": 5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch=0"),
        ({"length": 1}, "length=1"),
        ({"length": 10_000}, "was built for 256"),
        ({"learned": 0.0}, "learned=0.0"),
        ({"pack": 51}, "pack=51: how many texts stand in a row of 50 tokens"),
        ({"method": "dora"}, "method='dora'"),
        ({"solve": ("width",)}, "solve='width'"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"card": "abacus"}, "card='abacus'"),
        ({"budget": "lots"}, "no size of memory"),
        ({"method": "full", "solve": ("rank",)}, "fresh adapter"),
    ],
)
def test_mistakes_get_one_sentence(small: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora.plan(small, **{"length": 50, "device": "cpu"} | options)


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Linear"):
        lora.plan(torch.nn.Linear(2, 2))
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        lora.plan(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    with pytest.raises(ValueError, match="abacus"):
        lora.plan(tmp_path)
    assert card_of("RTX 4090").memory == 24 * GIB


def test_a_budget_that_no_choice_keeps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """8,192 tokens of a model whose weights take 6 GiB of a card of 80."""
    x, keeping = torch.empty(4, 2048, 4096, dtype=torch.bfloat16, device="meta"), Keeping(LARGE)
    base, there = 6 * GIB, mine()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (74 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: base)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: base)
    least = account(WIDTHS, ["input_host"] * 31 + ["input"], 8192, 2, learned=1).total
    least += base + 2 * CUBLAS - x.numel() * x.element_size() - sum(t.nbytes for t in there.values() if t.is_meta)
    keeping.budget = least
    assert keeping.within(WIDTHS, 8192, x) == ["input_host"] * 31 + ["input"]
    keeping.budget = least - 1
    with pytest.raises(RuntimeError, match=f"8,192 tokens takes at least {least / GIB:.2f} GiB, and the budget is"):
        keeping.within(WIDTHS, 8192, x)
    keeping.budget = None
    assert keeping.within(WIDTHS, 8192, x) == ["all"] * 32
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB, 80 * GIB))
    keeping.budget = 70 * GIB  # the card is full, not the budget: the allocator has the last word
    assert keeping.within(WIDTHS, 8192, x) == ["input_host"] * 31 + ["input"]
