"""The 36 properties that an adapter library is held to, each with the tests that hold it.

The list is that of what peft's own tests ask of it (testing_common.py and the files around it), with tolerances of
ours: bits where nothing is rounded, 1e-5 of float32 logits elsewhere.  What no other file tests is tested here.
"""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_lora_kinds import llama
from test_lora_models_families import build, some_ids
from tiny import IDS, logits, shake
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import lora

HERE = Path(__file__).parent
PROPERTIES: dict[int, tuple[str, str]] = {
    1: (
        "a fresh adapter changes no bit",
        "wrap::a_fresh_adapter_changes_no_bit kinds::it_trains_beside_an_untouched_base_and_is_taken_out_again",
    ),
    2: (
        "A begins in the Kaiming range and B at 0; of an embedding A at 0 and B normal",
        "wrap::factors_start_in_the_kaiming_range_and_at_zero properties::an_embedding_begins_at_zero_and_normal",
    ),
    3: (
        "the scale is alpha / r or alpha / sqrt(r), and patterns are kept to",
        "wrap::scale_is_alpha_over_r_or_its_root wrap::rank_and_alpha_patterns_override_single_layers",
    ),
    4: (
        "merged logits are the unmerged; a weight is rounded once",
        "merge::merged_computes_what_unmerged_did merge::the_merged_weight_is_the_sum_rounded_once",
    ),
    5: ("merged is not the base", "merge::merged_computes_what_unmerged_did"),
    6: ("merging twice is merging once", "merge::merging_twice_is_refused"),
    7: ("merging and unmerging gives back every bit", "merge::unmerge_gives_back_every_bit"),
    8: ("a merged model saved and loaded is the same bits", "properties::a_merged_model_comes_back_bit_for_bit"),
    9: (
        "an adapter with NaN is not merged, and the base untouched",
        "merge::a_broken_adapter_is_refused_and_the_model_unchanged",
    ),
    10: ("there is one way to merge", "merge::the_merged_weight_is_the_sum_rounded_once"),
    11: (
        "disabled is the base bit for bit, after a merge too, and enabled again as before",
        "wrap::disabled_is_the_base_bit_for_bit wrap::disabled_is_the_base_after_a_merge_too",
    ),
    12: ("disabling changes nothing of what trains", "wrap::disabled_keeps_what_is_trainable_and_ends_on_an_error"),
    13: (
        "taken off, the model is the base, modules and bits",
        "wrap::detach_puts_the_original_modules_back kinds::it_trains_beside_an_untouched_base_and_is_taken_out_again",
    ),
    14: (
        "rows of a mixed batch are as with their adapter alone, generated ones too",
        "mixed::each_row_answers_as_with_its_adapter_alone mixed::each_row_is_generated_as_alone",
    ),
    15: (
        "an unknown name is refused, and one that is taken",
        "wrap::an_unknown_name_is_refused wrap::the_same_name_twice_is_refused",
    ),
    16: (
        "saved and loaded, the same bits; keys hold no adapter's name; inference_mode is true",
        "kinds::what_we_save_comes_back_bit_for_bit attach::a_file_holds_adapter_tensors_only_under_pefts_names",
    ),
    17: (
        "a file holds the named adapter's tensors and no more, also where one name begins another",
        "attach::one_of_two_adapters_is_saved_by_name attach::a_file_holds_adapter_tensors_only_under_pefts_names",
    ),
    18: (
        "loading without first values is loading: no random number is drawn",
        "kinds::what_we_save_comes_back_bit_for_bit models_load::quantizing_while_loading_equals_quantizing_after",
    ),
    19: (
        "an active, an inactive and an unknown adapter are taken off, or refused",
        "wrap::one_of_two_adapters_is_detached_and_the_other_stays wrap::an_unknown_name_is_refused",
    ),
    20: (
        "a weighted sum is the sum of the updates",
        "combine::cat_is_the_sum combine::svd_is_the_best_of_its_rank_and_tells_its_error",
    ),
    21: ("one adapter with weight 1 is that adapter, of any kind", "properties::one_adapter_alone_is_itself"),
    22: ("weights may be negative", "properties::an_adapter_less_itself_is_nothing"),
    23: (
        "training changes the adapter, and no bit of the base",
        "wrap::training_changes_the_adapter_and_no_bit_of_the_base "
        "table::an_adapter_is_trained_kept_attached_merged_and_written",
    ),
    24: (
        "what is left out, or of another layer, stays as it is",
        "wrap::excluded_layers_are_left_out kinds::we_read_what_peft_saves",
    ),
    25: (
        "gradients are the same when states are made again",
        "train_steps::recompute_gives_the_same_bits_with_dropout",
    ),
    26: ("what trains is known after every switch", "properties::what_trains_after_each_switch"),
    27: (
        "PiSSA begins at the base, and is a plain adapter of it",
        "init::it_begins_at_the_largest_singular_values_and_leaves_the_base_alone "
        "init::saved_it_is_a_plain_adapter_of_the_unchanged_base",
    ),
    28: (
        "DoRA begins at the base, merges, and needs no dense product",
        "dora::a_fresh_adapter_changes_no_bit_and_lengths_need_no_dense_product dora::peft_and_we_read_each_other",
    ),
    29: (
        "a parameter as target is as its layer as target",
        "experts::a_parameter_of_a_linear_layer_is_as_the_layer",
    ),
    30: (
        "two parameters of one module, and several adapters on experts",
        "experts::two_adapters_on_experts_add_up_and_switch kinds::peft_reads_what_we_save",
    ),
    31: (
        "another adapter in the same tensors, of other rank and scale, compiles nothing anew",
        "mixed::an_adapter_takes_anothers_place_without_new_tensors properties::compiled_without_a_break",
    ),
    32: (
        "an activated LoRA, which there is not here, is refused and not taken for a plain one",
        "attach::a_wrong_folder_is_refused_and_the_model_as_before",
    ),
    33: (
        "trained tokens change their rows alone, merged too",
        "places::tied_tokens_are_one_parameter_and_merge_into_one_weight "
        "kinds::it_trains_beside_an_untouched_base_and_is_taken_out_again",
    ),
    34: (
        "a tie stays a tie through wrap, save, load and merge",
        "kinds::unloaded_it_is_a_plain_model_with_its_ties merge::a_tied_weight_is_refused_and_the_model_unchanged",
    ),
    35: ("compiled, no graph breaks, and outputs and gradients are the same", "properties::compiled_without_a_break"),
    36: (
        "files of old versions load",
        "properties::settings_of_old_versions_are_read experts::files_of_every_version_are_read",
    ),
}


def test_every_property_has_its_tests() -> None:
    assert list(PROPERTIES) == list(range(1, 37))
    for number, (_, tests) in PROPERTIES.items():
        for test in tests.split():
            file, _, name = test.partition("::")
            path = HERE / (f"test_{file}.py" if file.startswith("train_") else f"test_lora_{file}.py")
            defined = {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)}
            assert f"test_{name}" in defined, f"property {number}: {test}"


# ---- what no other file tests ----
def test_an_embedding_begins_at_zero_and_normal() -> None:
    model = lora.wrap(nn.Sequential(nn.Embedding(400, 300)), targets=["0"], r=8)
    part = model[0].adapters["default"]
    assert not part.a.any() and abs(float(part.b.detach().std()) - 1) < 0.1 and abs(float(part.b.detach().mean())) < 0.1


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon 40B"])
@torch.no_grad()
def test_a_merged_model_comes_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    build(family, tmp_path / "base")
    model, tokenizer = lora.load(tmp_path / "base", device="cpu")
    ids = some_ids(2, 9)
    shake(lora.wrap(model, r=3))
    want = lora.merge(model)(ids)
    lora.save_pretrained(model, tokenizer, tmp_path / "merged", dtype=torch.float32)
    assert torch.equal(lora.load(tmp_path / "merged", device="cpu")[0](ids), want)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rslora": True},
        {"dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"train_tokens": [3]},
        {"init": "pissa"},
    ],
    ids=str,
)
def test_one_adapter_alone_is_itself(options: dict[str, Any], tmp_path: Path) -> None:
    made: Any = llama(attention_bias=True)
    model = shake(lora.wrap(made, r=3, targets=["q_proj", "v_proj"], **options))
    lora.save(model, tmp_path / "a")
    combined = lora.combine([tmp_path / "a"], tmp_path / "b", [1.0])
    assert combined.error == 0.0 and "copy" in str(combined)
    one, other = (lora.attach(llama(attention_bias=True), tmp_path / name) for name in "ab")
    assert torch.equal(logits(one), logits(other))


def test_an_adapter_less_itself_is_nothing(tmp_path: Path) -> None:
    base = llama()
    want = logits(base)
    model = shake(lora.wrap(llama(), r=3, rslora=True, targets=["q_proj", "down_proj"]))
    lora.save(model, tmp_path / "a")
    lora.combine([tmp_path / "a"] * 2, tmp_path / "none", [1.0, -1.0])
    lora.combine([tmp_path / "a"] * 3, tmp_path / "one", [1.0, -1.0, 1.0])
    assert (logits(lora.attach(base, tmp_path / "none")) - want).abs().max() <= 1e-6
    one = logits(lora.attach(llama(), tmp_path / "one"))
    assert (one - logits(model)).abs().max() <= 1e-6 < (one - want).abs().max()


def test_what_trains_after_each_switch(tmp_path: Path) -> None:
    """A switch decides what takes part, never what trains: that is decided once, by wrap or attach."""

    def trains(model: nn.Module) -> set[str]:
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        assert all(".adapters." in n for n in names)
        return {n.split(".adapters.")[1].split(".")[0] for n in names}

    model = lora.wrap(llama(), r=2, targets=["q_proj"], name="one")
    lora.save(model, tmp_path / "a")
    assert trains(model) == {"one"}
    lora.attach(model, tmp_path / "a", "two")
    assert trains(model) == {"one"}
    lora.attach(model, tmp_path / "a", "three", trainable=True)
    assert trains(model) == {"one", "three"}
    for names in ("two", ["one", "two"], "three"):
        lora.activate(model, names)
        assert trains(model) == {"one", "three"}
    with lora.disabled(model):
        assert trains(model) == {"one", "three"}
    with lora.mixed(model, ["one", "two"]):
        assert trains(model) == {"one", "three"}
    lora.unmerge(lora.merge(model))
    assert trains(model) == {"one", "three"}
    lora.detach(model, "one")
    assert trains(model) == {"three"}
    with pytest.raises(ValueError, match="already has"):
        lora.attach(model, tmp_path / "a", "two")
    assert trains(model) == {"three"}
    lora.detach(model, "three")
    assert trains(model) == set()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(41, 16), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.table(ids))))


@pytest.mark.parametrize(
    "options",
    [{}, {"dora": True}, {"init": "pissa"}, {"bias": "all"}, {"targets": ["table", "up"]}, {"train_tokens": [3]}],
    ids=str,
)
def test_compiled_without_a_break(options: dict[str, Any], tmp_path: Path) -> None:
    """Dense layers; 4-bit ones break the graph at their kernels' choice."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model: Any = shake(lora.wrap(Net(), r=4, **options))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    learned = [p for p in model.parameters() if p.requires_grad]

    def both() -> tuple[Tensor, list[Tensor]]:
        y = compiled(IDS)
        return y, list(torch.autograd.grad(y.square().sum(), learned))

    y, grads = both()
    want = model(IDS)
    torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6)
    for one, other in zip(grads, torch.autograd.grad(want.square().sum(), learned), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    shake(model)
    torch.testing.assert_close(both()[0], model(IDS), rtol=1e-6, atol=1e-6)
    if not options:
        torch.manual_seed(0)
        lora.save(shake(lora.wrap(Net(), r=2, rslora=True, targets=["up"])), tmp_path / "a")
        lora.swap(model, tmp_path / "a")
        torch.testing.assert_close(both()[0], model(IDS), rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 1
    lora.wrap(model, r=2, name="other", targets=["up"])
    counts = []
    for name in ("other", "default", "other", "default"):
        lora.activate(model, name)
        torch.testing.assert_close(compiled(IDS), model(IDS), rtol=1e-6, atol=1e-6)
        counts.append(counter.frame_count)
    assert counts[1] == counts[3]  # each set of adapters compiles once


OLD = {
    "0.2": {"enable_lora": None, "merge_weights": False},
    "0.3": {"init_lora_weights": True, "modules_to_save": None, "revision": None},
    "0.5": {"layers_pattern": None, "layers_to_transform": None, "auto_mapping": None},
    "0.10": {"loftq_config": {}, "megatron_config": None, "use_dora": False, "use_rslora": False, "rank_pattern": {}},
    "0.14": {"eva_config": None, "exclude_modules": None, "lora_bias": False, "alpha_pattern": {}},
    "0.17": {"qalora_group_size": 16, "use_qalora": False, "target_parameters": None, "trainable_token_indices": None},
}


@pytest.mark.parametrize("version", OLD)
def test_settings_of_old_versions_are_read(version: str, tmp_path: Path) -> None:
    """Each with the settings it had and no later ones; keys of tensors are the same since 0.2."""
    model = shake(lora.wrap(llama(), r=4, alpha=12.0, targets=["q_proj", "v_proj"]))
    lora.save(model, tmp_path / "a")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "lora_dropout": 0.0, "bias": "none"}
    config |= {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "inference_mode": True}
    config |= {"base_model_name_or_path": "some/model", "fan_in_fan_out": False}
    for v, more in OLD.items():
        config |= more
        if v == version:
            break
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    assert torch.equal(logits(lora.attach(llama(), tmp_path / "a")), logits(model))
    assert len(load_file(tmp_path / "a" / "adapter_model.safetensors")) == 8
