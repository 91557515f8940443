"""Which decoder serves a call: on a GPU one that was kept, for what it has recorded, where its shape fits."""

import torch

from lora.models.base import CausalLM
from lora.models.decode import PROMPT, Decoder
from lora.models.reading import plain

DECODERS = 3  # shapes kept for a model, while their caches together take no more than
SHARE = 0.05  # of the GPU's memory


class _Kept(list[Decoder]):
    """A model's decoders; a copy of the model begins with none."""

    def __deepcopy__(self, memo: object) -> "_Kept":
        return _Kept()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Kept, ()


def decoder_for(model: CausalLM, batch: int, length: int) -> Decoder:
    """A decoder for `batch` rows of `length` tokens: on a GPU a kept one that fits, else a new one.

    There rows are rounded up to 1, 2, 4 or a multiple of 8 and lengths to a multiple of 128, so that calls of like
    shape share a recording.
    """
    device, dtype = model.place()
    if device.type != "cuda":
        return Decoder(model, batch, length)
    state = (device, dtype, plain(model))
    if state[2]:
        batch = next((n for n in (1, 2, 4) if batch <= n), -(-batch // 8) * 8)
    length = min(-(-(length + PROMPT - 1) // 128) * 128, model.config.max_length)  # with room for a prompt's padding
    kept: _Kept = model.__dict__.setdefault("_decoders", _Kept())
    kept[:] = [d for d in kept if (d.device, d.cache.kv.dtype, d.plain) == state]
    for i, decoder in enumerate(kept):
        if decoder.batch == batch and length <= decoder.length <= 2 * length:
            kept.append(kept.pop(i))
            return decoder
    c = model.config
    need = 2 * c.num_layers * batch * c.num_kv_heads * length * c.head_dim * dtype.itemsize
    room = SHARE * torch.cuda.get_device_properties(device).total_memory
    while kept and (len(kept) == DECODERS or need + sum(d.cache.kv.nbytes for d in kept) > room):
        kept.pop(0)  # its cache goes before another is made
    kept.append(Decoder(model, batch, length))
    return kept[-1]
