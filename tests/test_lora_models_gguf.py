"""GGUF files written here and read back: each block format, the order of rotary rows, and foreign or cut files."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import pre_tokenizers

import lora

KINDS = {name: gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q8_0", "F16", "F32")}
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
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


def write(
    path: Path, kind: str, *, tied: bool = False, pre: str = "gpt-2", architecture: str = "llama", model: str = "gpt2"
) -> transformers.LlamaForCausalLM:
    """Writes a random Llama; returns transformers' model with the weights that the file holds once decoded."""
    config = transformers.LlamaConfig(
        vocab_size=288, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1, rms_norm_eps=1e-5,
        tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    w = gguf.GGUFWriter(path, architecture)
    w.add_context_length(64)
    w.add_embedding_length(64)
    w.add_block_count(2)
    w.add_feed_forward_length(128)
    w.add_head_count(4)
    w.add_head_count_kv(2)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(5000.0)
    w.add_tokenizer_model(model)
    w.add_tokenizer_pre(pre)
    tokens = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    w.add_token_list(tokens)
    w.add_token_types([3] + [1] * (len(tokens) - 1))
    w.add_token_merges(["t h"])
    w.add_eos_token_id(0)
    for name, p in theirs.named_parameters():
        plain = p.dim() == 1
        quant = KINDS["F32" if plain else kind]
        data = p.numpy().copy()
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else 0
        packed = gguf.quants.quantize(data, quant)
        p.copy_(torch.from_numpy(np.array(gguf.quants.dequantize(packed, quant), dtype=np.float32)))
        raw = gguf.quants.quantize(paired(data, heads) if heads else data, quant)
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
        assert torch.equal(ours.get_parameter(name), p), name
    ids = torch.randint(1, 250, (2, 20))
    assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-5
    text = "the thing, naïve 日本"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.backend.token_to_id("th") in tokenizer.encode("the") and tokenizer.stop == (0,)


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


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04 something")
    with pytest.raises(ValueError, match="does not begin with GGUF"):
        lora.load(tmp_path / "a.gguf", device="cpu")
