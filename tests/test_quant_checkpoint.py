"""The published file layout of 4-bit weights: ours and bitsandbytes' read each other bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora.quant.checkpoint import STATE, from_tensors, to_tensors
from lora.quant.weight import Packed, quantize_tensor

NAME = "model.layers.0.mlp.up_proj.weight"


def equal(one: Packed, two: Packed) -> bool:
    return (
        (one.kind, one.shape, one.block, one.double) == (two.kind, two.shape, two.block, two.double)
        and torch.equal(one.q, two.q)
        and torch.equal(one.code, two.code)
        and all(torch.equal(s, t) and s.dtype == t.dtype for s, t in zip(one.scales, two.scales, strict=True))
    )


def written(double: bool = True, shape: tuple[int, ...] = (32, 96)) -> dict[str, Tensor]:
    return to_tensors(NAME, quantize_tensor(torch.randn(shape), double=double), torch.bfloat16)


@pytest.mark.parametrize("shape", [(32, 96), (7, 33), (5,), (3, 4, 10)])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_file_gives_back_what_was_written(kind: str, double: bool, shape: tuple[int, ...], tmp_path: Path) -> None:
    packed = quantize_tensor(torch.randn(shape), kind, 64, double)
    save_file(to_tensors(NAME, packed, torch.bfloat16), tmp_path / "w.safetensors")
    back = from_tensors(NAME, load_file(tmp_path / "w.safetensors"))
    assert equal(packed, back) and torch.equal(packed.dequantize(), back.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_file_of_bitsandbytes_is_read_bit_for_bit(
    kind: str, double: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(320, 128).to(dtype)
    q, state = functional.quantize_4bit(w, blocksize=64, quant_type=kind, compress_statistics=double)
    tensors = {NAME: q} | {f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file(tensors, tmp_path / "w.safetensors")
    packed = from_tensors(NAME, load_file(tmp_path / "w.safetensors"))
    assert packed.double == double and packed.shape == (320, 128) and packed.kind == kind
    assert torch.equal(packed.dequantize(dtype), functional.dequantize_4bit(q, state))


def test_a_layer_of_bitsandbytes_is_read_bit_for_bit() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compress_statistics=True)
    layer = layer.to("cpu")
    tensors = {f"up.{key}": value for key, value in layer.state_dict().items()}
    if not any(STATE in key for key in tensors):
        pytest.skip("this bitsandbytes quantizes no layer on a CPU")
    want = bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state).float()
    assert torch.equal(from_tensors("up.weight", tensors).dequantize(), want)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_our_file_is_read_by_bitsandbytes_bit_for_bit(kind: str, double: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    packed = quantize_tensor(torch.randn(320, 128), kind, 64, double)
    tensors = to_tensors(NAME, packed, torch.float32)
    state = functional.QuantState.from_dict(
        {key.removeprefix(NAME + "."): value for key, value in tensors.items() if key != NAME},
        device=torch.device("cpu"),
    )
    assert state.nested == double and tuple(state.shape) == (320, 128)
    assert torch.equal(functional.dequantize_4bit(tensors[NAME], state), packed.dequantize())


def test_names_and_json_are_the_published_ones() -> None:
    tensors = written()
    tail = ["", ".absmax", ".nested_absmax", ".nested_quant_map", ".quant_map", ".quant_state.bitsandbytes__nf4"]
    assert sorted(tensors) == [NAME + t for t in tail]
    assert tensors[NAME].shape == (32 * 96 // 2, 1) and tensors[NAME + ".absmax"].dtype == torch.uint8
    state = json.loads(bytes(tensors[f"{NAME}{STATE}nf4"].tolist()))
    offset = state.pop("nested_offset")
    assert torch.tensor(offset, dtype=torch.float32).item() == offset
    assert state == {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": [32, 96],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
    }
    assert not any("nested" in key for key in written(double=False))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bytes_stored_as_floats_are_read(storage: torch.dtype) -> None:
    packed = quantize_tensor(torch.randn(32, 96))
    tensors = to_tensors(NAME, packed, torch.bfloat16)
    tensors[NAME] = tensors[NAME].view(-1).view(storage).view(-1, 1)
    assert equal(from_tensors(NAME, tensors), packed)


# ---- refusals ----
def with_state(tensors: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    key = f"{NAME}{STATE}nf4"
    state = json.loads(bytes(tensors[key].tolist())) | changes
    return tensors | {key: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


def test_another_code_book_is_refused() -> None:
    tensors = written()
    tensors[f"{NAME}.quant_map"][3] += 1e-6
    with pytest.raises(ValueError, match=r"up_proj\.weight\.quant_map is not the nf4 code book"):
        from_tensors(NAME, tensors)
    with pytest.raises(ValueError, match="'nf5'"):
        from_tensors(NAME, with_state(written(), quant_type="nf5"))


@pytest.mark.parametrize("tail", ["", ".absmax"])
def test_lengths_that_do_not_fit_the_shape_are_refused(tail: str) -> None:
    tensors = written()
    tensors[NAME + tail] = tensors[NAME + tail][:-1]
    with pytest.raises(ValueError, match="up_proj.weight of shape"):
        from_tensors(NAME, tensors)


@pytest.mark.parametrize("changes", [{"shape": [32, 97]}, {"shape": [31, 96]}, {"blocksize": 128}, {"blocksize": 48}])
def test_a_state_that_does_not_fit_the_tensors_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs|block=48"):
        from_tensors(NAME, with_state(written(), **changes))


@pytest.mark.parametrize("blob", [b"", b"{", b"\xff\xfe", b"[]", b"{}", b'{"quant_type": "nf4", "blocksize": 64}'])
def test_damaged_json_is_refused(blob: bytes) -> None:
    tensors = written() | {f"{NAME}{STATE}nf4": torch.tensor(list(blob), dtype=torch.uint8)}
    with pytest.raises(ValueError, match="is not the JSON that a 4-bit weight needs"):
        from_tensors(NAME, tensors)


def test_a_weight_without_state_is_refused() -> None:
    tensors = written()
    del tensors[f"{NAME}{STATE}nf4"]
    with pytest.raises(ValueError, match="its shape and code are unknown"):
        from_tensors(NAME, tensors)


def test_another_nested_map_or_block_is_refused() -> None:
    tensors = written()
    tensors[f"{NAME}.nested_quant_map"][7] = 0.5
    with pytest.raises(ValueError, match="another map or block"):
        from_tensors(NAME, tensors)
    with pytest.raises(ValueError, match="another map or block"):
        from_tensors(NAME, with_state(written(), nested_blocksize=128))


@pytest.mark.parametrize("tail", [".absmax", ".quant_map", ".nested_quant_map"])
def test_a_missing_tensor_is_refused_by_name(tail: str) -> None:
    tensors = written()
    del tensors[NAME + tail]
    with pytest.raises(ValueError, match="up_proj.weight"):
        from_tensors(NAME, tensors)


def test_nested_scales_of_a_wrong_length_are_refused() -> None:
    tensors = written(shape=(320, 128))  # 640 scales, 3 of the second level
    tensors[f"{NAME}.nested_absmax"] = tensors[f"{NAME}.nested_absmax"][:-1]
    with pytest.raises(ValueError, match="up_proj.weight"):
        from_tensors(NAME, tensors)


def test_a_nested_state_without_offset_is_refused() -> None:
    tensors = written()
    key = f"{NAME}{STATE}nf4"
    state = json.loads(bytes(tensors[key].tolist()))
    del state["nested_offset"]
    tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(ValueError, match="up_proj.weight"):
        from_tensors(NAME, tensors)
