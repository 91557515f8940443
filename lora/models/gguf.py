"""Reading a GGUF file: its settings, its tokenizer and its tensors, one at a time.

The architectures are llama, qwen2 and qwen3.  The `gguf` package parses the header and decodes blocks (Q4_0, Q4_1,
Q5, Q8_0, K-quants, BF16, F16, F32).  Tensors are read with plain file reads, not a memory map, so that what was read
can be given back at once.  In a Llama, llama.cpp stores the rows of q_proj and k_proj with the two halves of each
rotary pair side by side; they are put back to Hugging Face's order, halves apart.  Qwen's rows are in that order.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from lora.models.base import is_count
from lora.models.llama import LlamaConfig
from lora.models.qwen import Qwen2Config, Qwen3Config
from lora.models.tokenizer import Tokenizer

_ARCHITECTURES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Splitting of text before the merges, by the file's name for it.  GPT-2's pattern is the tokenizers library's own.
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_DECODE_BYTES = 2**24  # float32 bytes decoded at a time: bounds what a large embedding needs beside itself


class GGUF:
    """An open GGUF file. Raises ImportError without the gguf package, ValueError on a file that is not one."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError:
            raise ImportError("reading .gguf files needs the gguf package: pip install 'lora-torch[gguf]'") from None
        self.path = path
        with path.open("rb") as f:
            if f.read(4) != b"GGUF":
                raise ValueError(f"{path} does not begin with GGUF; it is another kind of file")
        try:
            reader = gguf.GGUFReader(str(path))
            self.fields = {key: field.contents() for key, field in reader.fields.items()}
        except Exception as e:  # the reader fails with whatever its arrays run into
            raise ValueError(f"{path} is damaged or cut short ({type(e).__name__}: {e})") from None
        self._decode = gguf.quants.dequantize
        # (name, type, shape as torch writes it, offset, bytes); the reader itself is let go with its memory map
        self.tensors_info = [
            (t.name, t.tensor_type, tuple(int(n) for n in reversed(t.shape)), int(t.data_offset), int(t.n_bytes))
            for t in reader.tensors
        ]
        end = max((offset + size for *_, offset, size in self.tensors_info), default=0)
        if path.stat().st_size < end:
            raise ValueError(f"{path} is cut short: it has {path.stat().st_size:,} bytes and its tensors need {end:,}")

    def config(self) -> LlamaConfig:
        """The model's shapes. Raises ValueError for an unknown architecture or rope, or a missing setting."""
        architecture = self.fields.get("general.architecture")
        if architecture not in _ARCHITECTURES:
            known = ", ".join(_ARCHITECTURES)
            raise ValueError(f"{self.path}: architecture {architecture!r} is not known; there are {known}")

        def get(key: str, default: Any = None) -> Any:
            value = self.fields.get(f"{architecture}.{key}", default)
            if value is None:
                raise ValueError(f"{self.path} lacks the setting {architecture}.{key}")
            return value

        def count(key: str, default: Any = None) -> int:
            value = get(key, default)
            if not is_count(value):
                raise ValueError(f"{self.path}: {architecture}.{key} is {value!r}; it must be a whole number above 0")
            return value

        shapes = {name: shape for name, _, shape, *_ in self.tensors_info}
        if "token_embd.weight" not in shapes:
            raise ValueError(f"{self.path} holds no token_embd.weight")
        if "rope_freqs.weight" in shapes:
            raise ValueError(f"{self.path} stores Llama 3.1's rope scaling as a tensor, which is not supported yet")
        scaling = get("rope.scaling.type", "none")
        if scaling not in ("none", "linear"):
            raise ValueError(f"{self.path}: rope scaling {scaling!r} is not known; there are none and linear")
        heads, width = count("attention.head_count"), count("embedding_length")
        head_dim = count("attention.key_length", get("rope.dimension_count", width // heads))
        if get("rope.dimension_count", head_dim) != head_dim:
            raise ValueError(f"{self.path} turns a part of each head alone, which these models do not")
        own: dict[str, Any] = {}
        if architecture != "llama":
            own["attention_bias"] = "blk.0.attn_q.bias" in shapes
            own["output_bias"] = "blk.0.attn_output.bias" in shapes
            own["qk_norm"] = architecture == "qwen3"
        return _ARCHITECTURES[architecture](
            vocab_size=shapes["token_embd.weight"][0],
            hidden_size=width,
            intermediate_size=count("feed_forward_length"),
            num_layers=count("block_count"),
            num_heads=heads,
            num_kv_heads=count("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_length=count("context_length"),
            eps=round(get("attention.layer_norm_rms_epsilon"), 12),  # a float32 that means 1e-5
            rope_theta=get("rope.freq_base", 10000.0),
            rope_scaling={"rope_type": "linear", "factor": get("rope.scaling.factor")} if scaling == "linear" else None,
            tied="output.weight" not in shapes,
            **own,
        )

    def tensors(self, config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, float32 tensor) of each tensor, read and decoded when it is asked for."""
        for name, kind, shape, offset, n_bytes in self.tensors_info:
            raw = np.fromfile(self.path, dtype=np.uint8, count=n_bytes, offset=offset)
            try:
                w = self._to_float(raw, kind, shape)
            except (NotImplementedError, ValueError, KeyError) as e:
                raise ValueError(f"{self.path}: {name} is of type {kind.name}, which cannot be decoded ({e})") from None
            heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(name.split(".")[-2])
            if heads and config.model_type == "llama":
                if len(shape) != 2 or shape[0] != heads * config.head_dim:
                    raise ValueError(
                        f"{self.path}: {name} is {shape}, where {heads} heads of {config.head_dim} need "
                        f"{(heads * config.head_dim, config.hidden_size)}"
                    )
                w = w.view(heads, shape[0] // heads // 2, 2, shape[1]).transpose(1, 2).reshape(shape)
            yield _hf_name(name, self.path), w

    def _to_float(self, raw: np.ndarray, kind: Any, shape: tuple[int, ...]) -> Tensor:
        rows = raw.reshape(shape[0], -1) if len(shape) > 1 else raw.reshape(1, -1)
        out = torch.empty(shape, dtype=torch.float32)
        flat = out.view(rows.shape[0], -1)
        step = max(1, _DECODE_BYTES // (4 * flat.shape[1]))
        for start in range(0, rows.shape[0], step):
            flat[start : start + step] = torch.from_numpy(self._decode(rows[start : start + step], kind))
        return out

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the file describes: byte-level BPE from tokens, merges and token types.

        Raises ValueError for another kind: put a tokenizer.json beside the file then.
        """
        f, path = self.fields, self.path
        remedy = "put the model's tokenizer.json and tokenizer_config.json beside the file"
        lacks = [key for key in ("merges", "tokens", "token_type") if f"tokenizer.ggml.{key}" not in f]
        if f.get("tokenizer.ggml.model") != "gpt2" or lacks:
            without = f", without {lacks[0]}," if lacks else ""
            raise ValueError(
                f"{path}: tokenizer {f.get('tokenizer.ggml.model')!r}{without} cannot be rebuilt; {remedy}"
            )
        tokens, kinds = f["tokenizer.ggml.tokens"], f["tokenizer.ggml.token_type"]
        merges = [tuple(pair.split(" ", 1)) for pair in f["tokenizer.ggml.merges"]]
        backend = tokenizers.Tokenizer(
            models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, fuse_unk=False)
        )
        pre = f.get("tokenizer.ggml.pre", "default")
        backend.pre_tokenizer = _pre_tokenizer(pre, path, remedy)
        if pre == "qwen2":
            backend.normalizer = normalizers.NFC()
        backend.decoder = decoders.ByteLevel()
        # llama.cpp's types: 3 control (special), 4 user-defined; both are matched whole before the merges
        special = [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == 3]
        defined = [AddedToken(t, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == 4]
        backend.add_special_tokens(special)
        backend.add_tokens(defined)

        def token(role: str) -> str | None:
            i = f.get(f"tokenizer.ggml.{role}_token_id")
            return None if i is None else tokens[i]

        return Tokenizer(
            backend,
            bos=token("bos"),
            eos=token("eos"),
            pad=token("padding"),
            add_bos=bool(f.get("tokenizer.ggml.add_bos_token", False)),
            chat_template=f.get("tokenizer.chat_template"),
            source=str(path),
        )


def _hf_name(name: str, path: Path) -> str:
    parts = name.split(".")
    prefix = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
    stem = parts[-2]
    if stem not in _NAMES:
        raise ValueError(f"{path}: tensor {name!r} has no place in a model of Llama's blocks")
    return f"{prefix}{_NAMES[stem]}.{parts[-1]}"


def _pre_tokenizer(name: str, path: Path, remedy: str) -> pre_tokenizers.PreTokenizer:
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in ("llama-bpe", "qwen2"):
        split = pre_tokenizers.Split(tokenizers.Regex(_LLAMA3 if name == "llama-bpe" else _QWEN2), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise ValueError(f"{path}: pre-tokenizer {name!r} is not known; {remedy}")
