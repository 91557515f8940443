"""What tests of models share: a tokenizer small enough for any of them, and small models of transformers'."""

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor, nn

VOCAB = 41
IDS = torch.arange(14).view(2, 7) * 5 % VOCAB
SMALL: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 48, "num_key_value_heads": 2}


def give_tokenizer(folder: Path) -> None:
    """Puts a tokenizer of one token a byte, and "</s>" as token 0, into `folder`."""
    vocab = {token: i for i, token in enumerate(["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')


def seeded(config: Any, kind: Any) -> nn.Module:
    """The model of a config of transformers', the same at each call."""
    torch.manual_seed(7)
    model = kind(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):  # which begin at 0, where a mistake with them would not show
                p.normal_(std=0.1)
            elif p.dim() == 3:
                p.normal_(std=0.2)
    return model


def llama(**more: Any) -> nn.Module:
    return seeded(transformers.LlamaConfig(**SMALL, **more), transformers.LlamaForCausalLM)


def gpt2() -> nn.Module:
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=2, n_head=4, **still)
    return seeded(config, transformers.GPT2LMHeadModel)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Of IDS, from a model of ours, of transformers' or of a test's own."""
    y = model(IDS)
    return y if isinstance(y, Tensor) else y.logits


@torch.no_grad()
def shake(model: nn.Module, size: float = 0.05) -> nn.Module:
    """Moves all that trains off its start, so that it does something."""
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.randn_like(p) * size)
    return model
