"""Which output rows of a fused projection are its q, k, v, or its gate and up.

    c_attn             GPT-2     q | k | v, each a third
    qkv_proj           Phi-3     q | k | v, heads of queries, then of keys, then of values
    gate_up_proj       Phi-3     gate | up
    query_key_value    Falcon    for each key head: its queries, its k, its v

An update of some parts alone (loralib's MergedLinear) is the plain LoRA
    A = [A_q ; A_v]      B = [B_q  0 ]  in the rows of q
                             [ 0  B_v]  in the rows of v,  zero elsewhere
of the ranks' sum: that is how it runs here, and how it is saved, for peft and others.
Source: modeling files of transformers 5.23.
"""

from typing import Any

import torch
from torch import Tensor, nn

FUSED = ("c_attn", "qkv_proj", "gate_up_proj", "query_key_value")


def parts_of(model: nn.Module, path: str, n_rows: int) -> dict[str, Tensor]:
    """{part: its rows (n,), int64} of the fused projection `path`, which has `n_rows` outputs.

    Raises ValueError for a projection that is none of FUSED, or whose rows are not what the model's config says.
    """
    kind, c = path.rpartition(".")[2], getattr(model, "config", None)
    if kind not in FUSED:
        raise ValueError(f"parts names {path!r}, whose rows are not known; known are {', '.join(FUSED)}")
    rows = torch.arange(n_rows)
    if kind == "gate_up_proj":
        return dict(zip(("gate", "up"), rows.tensor_split(2), strict=True))
    if kind == "c_attn":
        return dict(zip(("q", "k", "v"), rows.tensor_split(3), strict=True))
    heads = _first(c, "num_heads", "num_attention_heads", "n_head")
    if kind == "qkv_proj":
        kv = _first(c, "num_kv_heads", "num_key_value_heads") or heads
        wide = n_rows // ((heads or 0) + 2 * (kv or 0) or n_rows + 1)
        if not heads or wide * (heads + 2 * kv) != n_rows:
            raise ValueError(f"{path!r} has {n_rows} rows, which {heads} heads and {kv} key heads do not divide")
        return dict(zip(("q", "k", "v"), rows.split([heads * wide, kv * wide, kv * wide]), strict=True))
    kv = _falcon_heads(c, heads)
    if not heads or heads % kv or n_rows % (heads + 2 * kv):
        raise ValueError(f"{path!r} has {n_rows} rows, which {heads} heads and {kv} key heads do not divide")
    grouped = rows.view(kv, heads // kv + 2, -1)  # (key heads, queries of each + 2, head_dim)
    return {"q": grouped[:, :-2].flatten(), "k": grouped[:, -2].flatten(), "v": grouped[:, -1].flatten()}


def _falcon_heads(c: Any, heads: Any) -> int:
    """Key heads; transformers' config names them only for the new decoder."""
    if hasattr(c, "new"):  # ours
        return int(c.num_kv_heads)
    if getattr(c, "new_decoder_architecture", False):
        return int(c.num_kv_heads)
    return 1 if getattr(c, "multi_query", False) else int(heads or 1)


def _first(c: Any, *names: str) -> Any:
    return next((getattr(c, name) for name in names if getattr(c, name, None) is not None), None)
