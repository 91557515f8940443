"""The receipt: what it counts and what it prints."""

import torch
from torch import nn

import lora


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.head = nn.Linear(64, 50, bias=False)


N_BASE = 50 * 64 + 3 * (64 * 64 + 64) + 64 * 50
N_ADAPTER = 3 * 2 * 64 * 4


def test_status_counts_parameters_and_bytes() -> None:
    s = lora.status(lora.wrap(Tiny(), r=4, targets=["layers.*"]))
    assert (s.trainable, s.total, s.quantized) == (N_ADAPTER, N_BASE + N_ADAPTER, 0)
    assert (s.trainable_bytes, s.total_bytes) == (4 * N_ADAPTER, 4 * (N_BASE + N_ADAPTER))
    assert s.adapters == s.active == ("default",) and not s.merged and s.tied == ()
    assert [row.module for row in s.rows] == ["layers.0", "layers.1", "layers.2"]
    row = s.rows[0]
    assert (row.r, row.scale, row.dropout, row.dtype, row.trainable) == (4, 8.0, 0.0, "float32", 512)
    assert row.active and row.kind == "LoRALinear" and row.base == "Linear"


def test_status_of_a_plain_model_has_no_rows() -> None:
    s = lora.status(Tiny())
    assert s.rows == () and s.adapters == () and s.trainable == s.total == N_BASE
    assert f"trainable {N_BASE:,} of {N_BASE:,} parameters (100.00 %)" in str(s)


def test_status_counts_a_4_bit_weight_by_its_weights() -> None:
    model = lora.wrap(lora.quantize(Tiny(), skip=["head"]), r=4, targets=["layers.*"])
    s = lora.status(model)
    assert s.quantized == 3 * 64 * 64 and s.total == N_BASE + N_ADAPTER and s.trainable == N_ADAPTER
    a_layer = 64 * 64 // 2 + 64 + 4 + 4  # codes, scales, their scale and offset
    shared = 4 * (16 + 256) + 256 * 2 * 4 + 2 * 9 * 32 * 4  # the code, the map of scales, and two tables of the code
    assert s.total_bytes == 4 * (N_BASE - 3 * 64 * 64 + N_ADAPTER) + 3 * a_layer + shared
    assert s.rows[0].base == "nf4 Linear4bit"
    assert f"{3 * 64 * 64:,} of them in 4 bits" in str(s)


def test_status_tells_active_from_inactive_and_merged() -> None:
    model = lora.wrap(Tiny(), r=4, targets=["layers.*"], name="first")
    lora.wrap(model, r=2, targets=["layers.0"], train_modules=["head"], name="second")
    s = lora.status(model)
    assert s.adapters == ("first", "second") and s.active == ("second",)
    assert {row.module: row.active for row in s.rows if row.adapter == "first"} == {
        f"layers.{i}": False for i in range(3)
    }
    whole = next(row for row in s.rows if row.module == "head")
    assert whole.r == 0 and whole.trainable == 64 * 50 and whole.active
    assert "first (inactive)" in str(s) and "whole" in str(s)
    assert not s.merged and lora.status(lora.merge(model.eval())).merged
    assert ", merged" in str(lora.status(model))


def test_status_table_puts_like_layers_on_one_line() -> None:
    model = nn.ModuleDict({f"block{i}": nn.ModuleDict({"up": nn.Linear(8, 8)}) for i in range(5)})
    lines = str(lora.status(lora.wrap(model, r=2))).splitlines()
    assert lines[0].split() == ["adapter", "layers", "on", "r", "scale", "dropout", "dtype", "trainable"]
    assert lines[1].split() == ["default", "up", "x5", "Linear", "2", "16", "0", "float32", "160"]
    assert len(lines) == 3 and lines[2].startswith("trainable 160 of 520 parameters (30.77 %)")


def test_status_names_tied_weights() -> None:
    model = Tiny()
    model.head.weight = model.table.weight
    s = lora.status(model)
    assert s.tied == (("table", "head"),) and "tied: table = head" in str(s)
    assert s.total == N_BASE - 64 * 50


def test_status_changes_nothing() -> None:
    model = lora.wrap(Tiny(), r=4, targets=["layers.*"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    str(lora.status(model))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
