"""Our Llama against transformers': logits, gradients, config dialects, shards, rotary frequencies, padding."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import give_tokenizer

import lora
from lora.models.llama import LlamaConfig
from lora.models.save import save_pretrained

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "no grouping": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "explicit head_dim": {"head_dim": 24},
    "odd sizes": {"hidden_size": 72, "intermediate_size": 107, "num_hidden_layers": 3},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    "another theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 123456.0}},
    "another eps": {"rms_norm_eps": 1e-2},
}


def tiny(folder: Path, shard: str = "5GB", **settings: Any) -> transformers.LlamaForCausalLM:
    """A random Llama of transformers, saved into `folder` beside a tokenizer of one token a byte."""
    sizes = {"vocab_size": 272, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = transformers.LlamaConfig(**(sizes | heads | {"initializer_range": 0.1} | settings))
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for p in model.parameters():
        if p.dim() == 1:  # biases begin at 0 and norms at 1, where mistakes with them would not show
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder, max_shard_size=shard)
    give_tokenizer(folder)
    return model


def some_ids(rows: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(1, 257, (rows, length))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@torch.no_grad()
def test_logits_equal_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = tiny(tmp_path, **settings)
    ours, _ = lora.load(tmp_path, device="cpu")
    ids = some_ids()
    assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-5


@torch.no_grad()
def test_a_sharded_checkpoint_gives_the_same_logits(tmp_path: Path) -> None:
    theirs = tiny(tmp_path, shard="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ours, tokenizer = lora.load(tmp_path, device="cpu")
    ids = some_ids()
    assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-5
    save_pretrained(ours, tokenizer, tmp_path / "ours", dtype=torch.float32, shard=60_000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    again, _ = lora.load(tmp_path / "ours", device="cpu")
    assert torch.equal(again(ids), ours(ids))


@torch.no_grad()
def test_what_we_write_transformers_reads(tmp_path: Path) -> None:
    tiny(tmp_path / "a", attention_bias=True, rope_parameters=LLAMA3, head_dim=24)
    ours, tokenizer = lora.load(tmp_path / "a", device="cpu")
    lora.save_pretrained(ours, tokenizer, tmp_path / "b", dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    ids = some_ids()
    assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-5
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    assert reader("naïve text")["input_ids"] == tokenizer.encode("naïve text")


def test_both_dialects_of_the_config_mean_the_same(tmp_path: Path) -> None:
    plain = {"vocab_size": 10, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    plain |= {"num_attention_heads": 4, "max_position_embeddings": 64}
    scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    old = LlamaConfig.from_json(plain | {"rope_theta": 10000.0, "rope_scaling": scaling, "torch_dtype": "float32"})
    new = LlamaConfig.from_json(plain | {"rope_parameters": LLAMA3, "dtype": "float32"})
    assert old == new
    assert new.rope_theta == 10000.0 and new.rope_scaling == scaling
    assert new.num_kv_heads == 4 and new.head_dim == 16 and not new.tied
    older = LlamaConfig.from_json(plain | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    newer = LlamaConfig.from_json(plain | {"rope_parameters": {"rope_type": "linear", "factor": 2.0}})
    assert torch.equal(older.inv_freq(), newer.inv_freq())
    default = LlamaConfig.from_json(plain | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}})
    assert default.rope_theta == 7.0 and default.rope_scaling is None


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_the_stored_dtype_is_read_under_both_names(key: str, tmp_path: Path) -> None:
    tiny(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(config | {key: "float16"}))
    model, _ = lora.load(tmp_path, device="cpu")
    assert model.lm_head.weight.dtype == torch.float32  # a CPU computes in float32 whatever the file says
    half, _ = lora.load(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16


def test_config_survives_its_own_json() -> None:
    scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    config = LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=7, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=6,
        max_length=5, eps=1e-5, rope_theta=3.0, rope_scaling=scaling, attention_bias=True, output_bias=True, tied=True,
    )  # fmt: skip
    assert LlamaConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_inverse_frequencies_of_llama_3_2_1b() -> None:
    config = LlamaConfig.from_json(
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "rope_theta": 5e5,
            "rope_scaling": LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192},
        }
    )
    got = config.inv_freq()[[0, 13, 14, 15, 16, 17, 18, 31]]
    want = [1, 0.00483942, 0.00321145, 0.00129055, 0.000429557, 9.70829e-05, 1.94616e-05, 9.41831e-08]
    torch.testing.assert_close(got, torch.tensor(want), rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "dynamic"),
    ],
)
def test_a_config_we_cannot_honour_is_refused(change: dict[str, Any], message: str) -> None:
    good = {"vocab_size": 10, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    good |= {"num_attention_heads": 4}
    LlamaConfig.from_json(good)
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_json(good | change)


@pytest.mark.parametrize("name", ["plain", "tied", "biases", "llama3 rope"])
def test_gradients_equal_transformers(name: str, tmp_path: Path) -> None:
    theirs = tiny(tmp_path, **SETTINGS[name]).requires_grad_(True)
    ours, _ = lora.load(tmp_path, device="cpu")
    ours.requires_grad_(True)
    ids = some_ids(2, 24)
    torch.nn.functional.cross_entropy(ours(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs(ids, labels=ids).loss.backward()
    want = {key: p.grad for key, p in theirs.named_parameters()}
    got = {key: p.grad for key, p in ours.named_parameters()}
    assert want.keys() == got.keys()
    for key, grad in got.items():
        assert (grad - want[key]).abs().max() < 1e-5, key


def test_adapter_gradients_equal_those_on_transformers(tmp_path: Path) -> None:
    theirs = tiny(tmp_path)
    ours, _ = lora.load(tmp_path, device="cpu")
    for model in (ours, theirs):
        lora.wrap(model, r=4)
        draw = torch.Generator().manual_seed(1)
        for p in model.parameters():
            if p.requires_grad:
                p.data.copy_(0.1 * torch.randn(p.shape, generator=draw))
    ids = some_ids(2, 24)
    torch.nn.functional.cross_entropy(ours(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs(ids, labels=ids).loss.backward()
    want = {key: p.grad for key, p in theirs.named_parameters() if p.requires_grad}
    got = {key: p.grad for key, p in ours.named_parameters() if p.requires_grad}
    assert want.keys() == got.keys() and len(got) == 2 * 7 * 2
    for key, grad in got.items():
        assert grad.abs().max() > 0
        assert (grad - want[key]).abs().max() < 1e-5, key


@torch.no_grad()
def test_left_padded_rows_equal_single_rows(tmp_path: Path) -> None:
    tiny(tmp_path)
    model, _ = lora.load(tmp_path, device="cpu")
    rows = [some_ids(1, n)[0] for n in (3, 11, 17, 1)]
    ids = torch.zeros(4, 17, dtype=torch.int64)
    real = torch.zeros(4, 17, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, 17 - len(row) :], real[i, 17 - len(row) :] = row, True
    logits = model(ids, padding=real, positions=(real.cumsum(1) - 1).clamp(min=0))
    for i, row in enumerate(rows):
        assert (logits[i, 17 - len(row) :] - model(row[None])[0]).abs().max() < 1e-5
    assert torch.isfinite(logits).all()


@torch.no_grad()
def test_right_padding_needs_no_mask(tmp_path: Path) -> None:
    tiny(tmp_path)
    model, _ = lora.load(tmp_path, device="cpu")
    ids = some_ids(1, 9)
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.int64)], dim=1)
    assert (model(padded)[:, :9] - model(ids)).abs().max() < 1e-5


@pytest.mark.parametrize("pieces", [(1,) * 20, (7, 1, 12), (20,)])
@torch.no_grad()
def test_the_cache_gives_what_one_pass_gives(pieces: tuple[int, ...], tmp_path: Path) -> None:
    tiny(tmp_path)
    model, _ = lora.load(tmp_path, device="cpu")
    ids = some_ids(2, 20)
    cache = model.new_cache(2, 20)
    parts = [model(part, cache=cache) for part in ids.split(pieces, dim=1)]
    assert cache.used == 20
    assert (torch.cat(parts, dim=1) - model(ids)).abs().max() < 1e-5


def test_more_tokens_than_the_model_was_built_for_are_refused(tmp_path: Path) -> None:
    tiny(tmp_path)
    model, _ = lora.load(tmp_path, device="cpu")
    with pytest.raises(ValueError, match=r"129 tokens.*128"):
        model(some_ids(1, 129))
