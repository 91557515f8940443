"""Eight-bit weights: the numbers of bitsandbytes, gradients, and checkpoints in its layout, read and written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import give_tokenizer

import lora
from lora.quant.linear8 import Linear8bit, quantize8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny8")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=257, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(path)
    give_tokenizer(path)
    return path


def test_bytes_and_scales_equal_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    w = torch.randn(37, 70)
    w[3] = 0
    theirs = bnb.functional.int8_vectorwise_quant(w.half())
    q, top = quantize8(w.half())
    assert torch.equal(q, theirs[0]) and torch.equal(top, theirs[1])
    value = bnb.functional.int8_vectorwise_dequant(*theirs[:2])
    assert (Linear8bit(q, top).weight_as(torch.float32) - value).abs().max() <= 1e-6 * w.abs().max()


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (0, 5)])
def test_forward_and_gradient_are_those_of_the_decoded_weight(shape: tuple[int, ...]) -> None:
    w, bias = torch.randn(7, 5, dtype=torch.float64), torch.randn(7)
    layer = Linear8bit(*quantize8(w), bias)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    want = torch.nn.functional.linear(x, layer.weight_as(torch.float32), bias)
    assert torch.allclose(y, want, atol=1e-6)
    g = torch.randn_like(y)
    (a,) = torch.autograd.grad(y, x, g, retain_graph=True)
    (b,) = torch.autograd.grad(want, x, g)
    assert torch.allclose(a, b, atol=1e-6)
    assert (layer.weight_as(torch.float64) - w).abs().max() <= w.abs().max() / 254 * 1.0001


def test_casting_a_model_leaves_scales_in_float32() -> None:
    layer = Linear8bit(*quantize8(torch.randn(4, 6)), torch.zeros(4)).bfloat16()
    assert layer.SCB.dtype == torch.float32 and layer.weight.dtype == torch.int8
    assert layer.bias is not None and layer.bias.dtype == torch.bfloat16


def test_nan_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"up_proj\.weight holds NaN or inf"):
        quantize8(torch.tensor([[1.0, torch.nan]]), "up_proj.weight")


@torch.no_grad()
def test_loading_in_8_bits_stays_close_and_is_written_and_read_bit_equal(folder: Path, tmp_path: Path) -> None:
    dense, tokenizer = lora.load(folder, device="cpu")
    packed, _ = lora.load(folder, quantize="int8", device="cpu")
    ids = torch.randint(1, 250, (2, 20))
    assert sum(isinstance(m, Linear8bit) for m in packed.modules()) == 14
    assert packed.model.layers[0].self_attn.q_proj.bias is not None
    assert (packed(ids) - dense(ids)).abs().max() < 0.1 * dense(ids).abs().max()
    lora.save_pretrained(packed, tokenizer, tmp_path / "out", dtype=torch.float32)
    again, _ = lora.load(tmp_path / "out", device="cpu")
    assert torch.equal(again(ids), packed(ids))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.SCB"].dtype == torch.float32
    assert stored["model.layers.0.mlp.up_proj.weight_format"].item() == 0


def test_an_adapter_learns_on_8_bits_and_merges(folder: Path) -> None:
    model, _ = lora.load(folder, quantize="int8", device="cpu")
    ids = torch.randint(1, 250, (2, 12))
    lora.wrap(model, r=4)
    (model(ids).float() ** 2).mean().backward()
    learned = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in learned)
    assert lora.status(model).quantized == sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear8bit))
    with torch.no_grad():
        for p in learned:
            p.add_(0.05 * torch.randn_like(p))
        want = model(ids)
        lora.merge(model)
        assert (model(ids) - want).abs().max() < 1e-4


def test_a_layout_that_is_not_by_rows_is_refused(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = lora.load(folder, quantize="int8", device="cpu")
    lora.save_pretrained(model, tokenizer, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    stored = load_file(file)
    stored["model.layers.0.mlp.up_proj.weight_format"] = torch.tensor(2, dtype=torch.uint8)
    save_file(stored, file)
    with pytest.raises(ValueError, match=r"up_proj\.weight is no int8 matrix stored row by row"):
        lora.load(tmp_path / "out")


def theirs8(weight: torch.Tensor, bias: torch.Tensor | None = None):
    """A layer of bitsandbytes in 8 bits, quantized by bitsandbytes."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=bias is not None, has_fp16_weights=False)
    layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return layer.to("cpu")


def test_a_checkpoint_of_bitsandbytes_is_read_bit_equal(folder: Path, tmp_path: Path) -> None:
    model = transformers.Qwen2ForCausalLM.from_pretrained(folder)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            bias = None if module.bias is None else module.bias.data
            model.set_submodule(name, theirs8(module.weight.data, bias))
    state = {k: v.contiguous() for k, v in model.state_dict().items() if not k.startswith("lm_head")}
    state |= {"lm_head.weight": model.lm_head.weight.detach().clone()}
    out = tmp_path / "theirs"
    shutil.copytree(folder, out)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
    (out / "config.json").write_text(json.dumps(config))
    read, _ = lora.load(out, device="cpu")
    layers = {name: m for name, m in read.named_modules() if isinstance(m, Linear8bit)}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(layer.weight, state[f"{name}.weight"]), name
        assert torch.equal(layer.SCB, state[f"{name}.SCB"]), name


def test_our_checkpoint_is_read_by_bitsandbytes_bit_equal(folder: Path, tmp_path: Path) -> None:
    packed, tokenizer = lora.load(folder, quantize="int8", device="cpu")
    lora.save_pretrained(packed, tokenizer, tmp_path / "out", dtype=torch.float32)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, ours in packed.named_modules():
        if not isinstance(ours, Linear8bit):
            continue
        theirs = theirs8(torch.randn(ours.out_features, ours.in_features), ours.bias)
        theirs.load_state_dict({k.removeprefix(f"{name}."): v for k, v in stored.items() if k.startswith(f"{name}.")})
        assert torch.equal(theirs.weight.data, ours.weight) and torch.equal(theirs.weight.SCB, ours.SCB), name
        x = torch.randn(3, ours.in_features)
        # bitsandbytes rounds the input to 8 bits too
        torch.testing.assert_close(theirs(x).float(), ours(x), rtol=0, atol=0.05 * float(ours(x).abs().max()))


def test_a_model_in_memory_becomes_what_loading_makes_of_it(folder: Path) -> None:
    dense, _ = lora.load(folder, device="cpu")
    assert lora.quantize(dense, "int8") is dense
    loaded, _ = lora.load(folder, quantize="int8", device="cpu")
    a, b = dense.state_dict(), loaded.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert type(dense.lm_head) is torch.nn.Linear
    ids = torch.randint(1, 250, (1, 9))
    assert torch.equal(dense(ids), loaded(ids))
