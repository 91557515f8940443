"""GGUF files written here and read back: each block format and architecture, and foreign or cut files."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import pre_tokenizers

import lora

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "BF16", "F16", "F32")
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # a block's float16s
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
TOP |= {"lm_head.weight": "output.weight"}


def file_name(name: str) -> str:
    if name in TOP:
        return TOP[name]
    _, _, layer, rest = name.split(".", 3)
    part, _, leaf = rest.rpartition(".")
    return f"blk.{layer}.{PARTS[part]}.{leaf}"


def paired(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a projection as llama.cpp keeps them: the two halves of each rotary pair side by side."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)


def packed(w: np.ndarray, kind: str) -> np.ndarray:
    """The rows of w as blocks; of a kind that the package cannot write, random blocks with scales of both signs."""
    if kind not in SCALES:
        return gguf.quants.quantize(w, gguf.GGMLQuantizationType[kind])
    length, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    draw = np.random.default_rng(w.size)
    blocks = draw.integers(0, 256, (w.size // length, size), dtype=np.uint8)
    for at in SCALES[kind]:
        blocks[:, at : at + 2] = draw.normal(0, 2e-4, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(len(w), -1)


def write(
    path: Path,
    kind: str,
    *,
    tied: bool = False,
    pre: str = "gpt-2",
    architecture: str = "llama",
    model: str = "gpt2",
    scaling: str = "none",
    **settings: Any,
) -> Any:
    """Writes a random model; returns transformers' with the weights that the file holds once decoded."""
    wide = 256 if kind in SCALES else 64
    head_dim = wide // 2 if architecture == "qwen3" else wide // 4
    family = {"qwen2": "Qwen2", "qwen3": "Qwen3"}.get(architecture, "Llama")
    ropes: dict[str, Any] = {"rope_type": "default", "rope_theta": 5000.0}
    ropes |= {"rope_type": "linear", "factor": 4.0} if scaling == "linear" else {}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=288, hidden_size=wide, intermediate_size=2 * wide, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1, rms_norm_eps=1e-5,
        tie_word_embeddings=tied, rope_parameters=ropes, head_dim=head_dim, **settings,
    )  # fmt: skip
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval().requires_grad_(False)
    w = gguf.GGUFWriter(path, architecture)
    w.add_context_length(64)
    w.add_embedding_length(wide)
    w.add_block_count(2)
    w.add_feed_forward_length(2 * wide)
    w.add_head_count(4)
    w.add_head_count_kv(2)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(5000.0)
    if architecture == "qwen3":
        w.add_key_length(head_dim)
        w.add_value_length(head_dim)
    if scaling != "none":
        w.add_rope_scaling_type(gguf.RopeScalingType(scaling))
        w.add_rope_scaling_factor(4.0)
    w.add_tokenizer_model(model)
    w.add_tokenizer_pre(pre)
    tokens = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    w.add_token_list(tokens)
    w.add_token_types([3] + [1] * (len(tokens) - 1))
    w.add_token_merges(["t h"])
    w.add_eos_token_id(0)
    for name, p in theirs.named_parameters():
        if p.dim() == 1:  # biases begin at 0 and norms at 1, where mistakes with them would not show
            p.add_(0.1 * torch.randn_like(p))
        quant = gguf.GGMLQuantizationType["F32" if p.dim() == 1 else kind]
        raw = packed(p.numpy().copy(), quant.name)
        p.copy_(torch.from_numpy(np.array(gguf.quants.dequantize(raw, quant), dtype=np.float32)))
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else 0
        raw = paired(raw, heads) if heads and family == "Llama" else raw
        w.add_tensor(file_name(name), raw, raw_dtype=quant)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return theirs


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_file_gives_the_logits_of_its_decoded_weights(kind: str, tmp_path: Path) -> None:
    theirs = write(tmp_path / "a.gguf", kind)
    ours, tokenizer = lora.load(tmp_path / "a.gguf", device="cpu")
    for name, p in theirs.named_parameters():
        assert p.isfinite().all() and p.std() > 0.001, name
        assert torch.equal(ours.get_parameter(name), p), name
    ids = torch.randint(1, 250, (2, 20))
    want = theirs(ids).logits
    assert (ours(ids) - want).abs().max() < 1e-5 * max(1.0, float(want.abs().max()))
    text = "the thing, naïve 日本"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.backend.token_to_id("th") in tokenizer.encode("the") and tokenizer.stop == (0,)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "F32"])
@pytest.mark.parametrize(
    ("architecture", "settings"),
    [("qwen2", {}), ("qwen3", {}), ("qwen3", {"attention_bias": True}), ("qwen2", {"tied": True, "scaling": "linear"})],
    ids=["qwen2", "qwen3", "qwen3 biases", "qwen2 tied and scaled"],
)
@torch.no_grad()
def test_qwen_gives_the_logits_of_its_folder(
    architecture: str, settings: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    theirs = write(tmp_path / "a.gguf", kind, architecture=architecture, pre="qwen2", **settings)
    theirs.save_pretrained(tmp_path / "folder")
    ours, tokenizer = lora.load(tmp_path / "a.gguf", device="cpu")
    tokenizer.save(tmp_path / "folder")
    other, _ = lora.load(tmp_path / "folder", device="cpu")
    assert ours.config == other.config
    ids = torch.randint(1, 250, (2, 20))
    assert torch.equal(ours(ids), other(ids))
    want = theirs(ids).logits
    assert (ours(ids) - want).abs().max() < 1e-5 * max(1.0, float(want.abs().max()))


def test_qwen_splits_text_as_its_own_tokenizer_does(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", "F32", architecture="qwen2", pre="qwen2")
    _, tokenizer = lora.load(tmp_path / "a.gguf", device="cpu")
    merges: Any = [("t", "h")]
    theirs = transformers.Qwen2Tokenizer(vocab=tokenizer.backend.get_vocab(), merges=merges)
    for text in ("It's the 2024th\n\n  day", "e\u0301 日本 🙂\t x", "THE't th\r\n \n", " 1 22 333"):
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_a_rope_that_is_not_known_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", "F32", scaling="yarn")
    with pytest.raises(ValueError, match="rope scaling 'yarn' is not known"):
        lora.load(tmp_path / "a.gguf", device="cpu")


@torch.no_grad()
def test_a_file_without_a_head_is_tied(tmp_path: Path) -> None:
    theirs = write(tmp_path / "a.gguf", "Q8_0", tied=True)
    ours, _ = lora.load(tmp_path / "a.gguf", device="cpu")
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    ids = torch.randint(1, 250, (1, 20))
    assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-5


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", "F32", architecture="mamba")
    with pytest.raises(ValueError, match="architecture 'mamba' is not known"):
        lora.load(tmp_path / "a.gguf", device="cpu")


def test_an_unknown_pre_tokenizer_is_refused_with_the_remedy(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", "F32", pre="klingon")
    with pytest.raises(ValueError, match=r"'klingon' is not known; put the model's tokenizer\.json"):
        lora.load(tmp_path / "a.gguf", device="cpu")


def test_another_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", "F32", model="llama")
    with pytest.raises(ValueError, match="tokenizer 'llama' cannot be rebuilt"):
        lora.load(tmp_path / "a.gguf", device="cpu")


@pytest.mark.parametrize("keep", [4, 30, 2000, -40])
def test_a_cut_file_is_refused(keep: int, tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", "Q4_0")
    whole = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "b.gguf").write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=r"b\.gguf is (damaged or )?cut short"):
        lora.load(tmp_path / "b.gguf", device="cpu")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("attention.head_count", 0, r"llama\.attention\.head_count is 0; it must be a whole number above 0"),
        ("attention.head_count", 5, r"attn_q\.weight is \(64, 64\), where 5 heads"),
        ("attention.head_count_kv", 3, r"attn_k\.weight is \(32, 64\), where 3 heads"),
        ("embedding_length", 0, "embedding_length is 0"),
        ("feed_forward_length", 2**31, "mlp"),
        ("block_count", 2**30, "asks for 1,073,741,824 layers of width 64"),
        ("block_count", 1, "have no place"),
        ("block_count", 3, "tensors are missing"),
    ],
)
def test_a_count_that_its_tensors_do_not_have_is_refused(key: str, value: int, says: str, tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", "F32")
    raw, name = (tmp_path / "a.gguf").read_bytes(), f"llama.{key}".encode()
    at = raw.index(len(name).to_bytes(8, "little") + name) + 8 + len(name)
    assert raw[at : at + 4] == (4).to_bytes(4, "little"), "a 32-bit number"
    (tmp_path / "a.gguf").write_bytes(raw[: at + 4] + value.to_bytes(4, "little") + raw[at + 8 :])
    with pytest.raises(ValueError, match=says) as e:
        lora.load(tmp_path / "a.gguf", device="cpu")
    assert "a.gguf" in str(e.value)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04 something")
    with pytest.raises(ValueError, match="does not begin with GGUF"):
        lora.load(tmp_path / "a.gguf", device="cpu")
