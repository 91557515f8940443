"""What tests of models share: a tokenizer small enough for any of them."""

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers


def give_tokenizer(folder: Path) -> None:
    """Puts a tokenizer of one token a byte, and "</s>" as token 0, into `folder`."""
    vocab = {token: i for i, token in enumerate(["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
