"""Tensors read by threads, a piece at a time: the same bytes as safetensors gives, whatever the pieces."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lora
from lora.models import checkpoint, stream
from lora.models.checkpoint import weights
from lora.quant.linear import Linear4bit

CPU = torch.device("cpu")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {
        "wide": torch.randn(33, 17),
        "sixteen": torch.randn(5, 7).bfloat16(),
        "half": torch.randn(3).half(),
        "bytes": torch.randint(0, 256, (101,), dtype=torch.uint8),
        "int8": torch.randint(-100, 100, (4, 3), dtype=torch.int8),
        "long": torch.arange(9),
        "yes": torch.tensor([True, False]),
        "point": torch.tensor(2.5),
        "none": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(("chunk", "slots", "threads"), [(7, 3, 2), (64, 1, 1), (1000, 4, 8), (1 << 20, 2, 3)])
def test_every_tensor_has_the_bytes_of_the_file(chunk: int, slots: int, threads: int, file: Path) -> None:
    want = load_file(file)
    found = stream.entries(file)
    assert found.keys() == want.keys()
    for names in (sorted(found), sorted(found, reverse=True)):
        got = list(stream.stream([found[n] for n in names], CPU, chunk, slots, threads))
        for name, t in zip(names, got, strict=True):
            assert t.dtype == want[name].dtype and t.shape == want[name].shape and torch.equal(t, want[name]), name


def test_a_file_that_becomes_shorter_while_it_is_read_is_an_error(file: Path) -> None:
    found = list(stream.entries(file).values())
    reading = stream.stream(found, CPU, 64, 1, 1)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match="model.safetensors is damaged or cut short.*ended .* bytes early"):
        list(reading)
    with pytest.raises(ValueError, match="model.safetensors is damaged or cut short"):
        stream.entries(file)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_header_is_one_clear_error_or_tensors_of_the_file(data: st.DataObject, file: Path) -> None:
    raw, bad = bytearray(file.read_bytes()), file.with_name("bad.safetensors")
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, 900))] ^= 1 << data.draw(st.integers(0, 7))
    bad.write_bytes(raw)
    try:
        found = list(stream.entries(bad).values())
    except ValueError as e:
        assert "bad.safetensors" in str(e) and "\n" not in str(e).strip()
        return
    for e, t in zip(found, stream.stream(found, CPU, 64, 2, 2), strict=True):
        assert t.shape == e.shape and t.dtype == e.dtype and 8 < e.begin <= e.end <= len(raw)


def test_leaving_early_leaves_no_thread(file: Path) -> None:
    import threading

    reading = stream.stream(list(stream.entries(file).values()), CPU, 16, 2, 4)
    next(reading)
    reading.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("weights")]


def test_a_folder_streams_as_it_maps(stories: Path) -> None:
    mapped = dict(weights(stories))
    groups = {name: list(parts) for name, parts in mapped.items()}
    files = checkpoint._files(stories)
    for name, parts in checkpoint._streamed(groups, files, CPU):
        assert all(torch.equal(t, mapped[name][key]) for key, t in parts.items())


def test_a_model_loads_on_a_gpu_as_on_a_cpu(gpu: torch.device, stories: Path, tmp_path: Path) -> None:
    for quantize in (None, "nf4", "int8"):
        there, tokenizer = lora.load(stories, quantize, dtype="float32", device=gpu)
        here, _ = lora.load(stories, quantize, dtype="float32", device="cpu")
        for (name, a), (_, b) in zip(there.state_dict().items(), here.state_dict().items(), strict=True):
            assert a.is_cuda
            if "nested" in name:  # the mean of the block scales is a sum, in whatever order
                torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-7)
            elif not name.endswith(".absmax") or quantize != "nf4":
                assert torch.equal(a.cpu(), b), name
    packed, tokenizer = lora.load(stories, "nf4", device=gpu)
    lora.save_pretrained(packed, tokenizer, tmp_path / "four", shard=100_000)
    again, _ = lora.load(tmp_path / "four", device=gpu)
    a, b = (next(m for m in model.modules() if isinstance(m, Linear4bit)) for model in (packed, again))
    assert torch.equal(a.weight, b.weight) and torch.equal(a.absmax, b.absmax)
