"""The decoder's step against the model's own forward; on a GPU, the recorded step against the CPU's tokens."""

import copy
import dataclasses
import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch

import lora
from lora.adapter import Bias
from lora.kernels import attend
from lora.layer import adapted
from lora.models import decode, reading
from lora.models.decode import Decoder
from lora.models.decoders import decoder_for
from lora.models.generate import generate_ids, pick
from lora.models.llama import Llama, LlamaConfig
from lora.models.reading import groups_of

CONFIG = LlamaConfig(
    vocab_size=101, hidden_size=128, intermediate_size=192, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32,
    max_length=256,
)  # fmt: skip
FAMILIES = {
    "llama": CONFIG,
    "qwen2": dataclasses.replace(CONFIG, attention_bias=True),
    "qwen3": dataclasses.replace(CONFIG, qk_norm=True),
    "mistral": dataclasses.replace(CONFIG, windows=(6, 6, 6)),
    "mixed": dataclasses.replace(CONFIG, windows=(None, 9, None), mlp_bias=True, output_bias=True),
}
PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17, 18]]


@pytest.fixture(params=[False, True], ids=["called", "buffered"])
def buffered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether factors go through buffers on a CPU too."""
    if request.param:
        monkeypatch.setattr(reading, "BUFFERED", {"cpu", "cuda"})
    return request.param


def another(model: Llama, name: str, r: int) -> None:
    lora.wrap(model, r=r, name=name).eval()
    for key, p in model.named_parameters():
        if key.endswith(f".{name}.b"):
            torch.nn.init.normal_(p, std=0.3)


def tiny(adapters: bool = True, config: LlamaConfig = CONFIG, seed: int = 3) -> Llama:
    torch.manual_seed(seed)
    model = Llama(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.ndim == 1 else 0.0, std=0.15)
    lora.quantize(model)
    if adapters:
        lora.wrap(model, r=4)
        for name, p in model.named_parameters():
            if name.endswith(".b"):
                torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def by_forward(model: Llama, prompt: list[int], new: int) -> list[int]:
    """Greedy tokens, the whole row computed anew for each."""
    ids = list(prompt)
    device = model.model.norm.weight.device
    with torch.no_grad():
        for _ in range(new):
            ids.append(int(model(torch.tensor([ids], device=device))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_those_of_the_whole_forward(family: str, buffered: bool) -> None:
    model = tiny(config=FAMILIES[family])
    assert Decoder(model, 1, 16).plain
    want = [by_forward(model, prompt, 12) for prompt in PROMPTS]
    assert generate_ids(model, PROMPTS, 12) == want
    assert len({tuple(row) for row in want}) == 3


@torch.no_grad()
def test_logits_of_a_step_equal_those_of_the_whole_forward(buffered: bool) -> None:
    model = tiny()
    ids = torch.randint(101, (2, 9))
    decoder = Decoder(model, 2, 16)
    logits = decoder.begin(ids[:, :4], torch.ones(2, 4, dtype=torch.bool))
    for i in range(4, 9):
        torch.testing.assert_close(logits, model(ids[:, :i])[:, -1], rtol=1e-4, atol=1e-4)
        decoder.take(ids[:, i])
        logits = decoder.step()
    assert decoder.written(5) == ids[:, 4:].tolist()


def test_another_adapter_no_adapter_and_a_merge_are_noticed(buffered: bool) -> None:
    model = tiny()
    first = generate_ids(model, PROMPTS, 12)
    with lora.disabled(model):
        base = generate_ids(model, PROMPTS, 12)
        assert base == [by_forward(model, p, 12) for p in PROMPTS]
    assert base != first == generate_ids(model, PROMPTS, 12)
    lora.merge(model)
    assert generate_ids(model, PROMPTS, 12) == [by_forward(model, p, 12) for p in PROMPTS]


def train_on(model: Llama) -> None:
    for key, p in model.named_parameters():
        if key.endswith(".b"):
            p.mul_(-2)


def put_factors_elsewhere(model: Llama) -> None:
    for key, p in model.named_parameters():
        if key.endswith(".b"):
            p.data = -p.data


def cut_a_rank_in_place(model: Llama) -> None:
    for _, layer in adapted(model):
        layer.adapters["default"].a.data = layer.adapters["default"].a.data[:2]
        layer.adapters["default"].b.data = layer.adapters["default"].b.data[:, :2]


def add_an_adapter_to(model: Llama) -> None:
    another(model, "more", 3)
    lora.activate(model, ["default", "more"])


def wrap_anew(model: Llama) -> None:
    lora.detach(model, "default")
    another(model, "default", 9)


def hook(model: Llama) -> None:
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda m, x, y: 2 * y)


def hook_a_base_whose_hooks_were_all_taken_off(model: Llama) -> None:
    base = model.model.layers[1].mlp.up_proj.base
    base._forward_pre_hooks = OrderedDict()
    base.register_forward_pre_hook(lambda m, x: (2 * x[0],))


def put_in_another_base(model: Llama) -> None:
    model.model.layers[1].mlp.up_proj.base = (
        tiny(adapters=False, seed=8).model.layers[1].mlp.up_proj.to(model.lm_head.weight.device)
    )


def put_weights_elsewhere(model: Llama) -> None:
    layer = model.model.layers[1].mlp.down_proj.base
    for name in ("weight", "absmax", "nested_absmax"):
        layer._buffers[name] = layer._buffers[name].flip(0)
    layer.nested_offset.data = 3 * layer.nested_offset.data


def put_in_a_dense_layer(model: Llama) -> None:
    layer = torch.nn.Linear(128, 128, bias=False, device=model.lm_head.weight.device)
    torch.nn.init.normal_(layer.weight, std=0.15)
    model.model.layers[0].self_attn.o_proj = layer


def put_in_another_norm(model: Llama) -> None:
    model.model.layers[2].input_layernorm = copy.deepcopy(model.model.layers[2].input_layernorm)
    model.model.layers[2].input_layernorm.weight.mul_(3)


def exchange_two_layers(model: Llama) -> None:
    a = model.model.layers[0].mlp
    a.gate_proj, a.up_proj = a.up_proj, a.gate_proj


def exchange_two_blocks(model: Llama) -> None:
    blocks = list(model.model.layers)
    model.model.layers[0], model.model.layers[2] = blocks[2], blocks[0]


def scale(model: Llama) -> None:
    model.model.layers[1].mlp.gate_proj.adapters["default"].scale *= 3


def add_a_bias(model: Llama) -> None:
    bias = Bias(None, 192, 1.0, model.lm_head.weight.device)
    torch.nn.init.normal_(bias.value)
    model.model.layers[1].mlp.gate_proj.adapters["default"].bias = bias


def merge_and_change(model: Llama) -> None:
    lora.merge(model)
    model.model.layers[0].mlp.up_proj.merged.weight.mul_(2)


CHANGES: list[Callable[[Llama], object]] = [
    train_on, put_factors_elsewhere, cut_a_rank_in_place, add_an_adapter_to, wrap_anew, hook,
    hook_a_base_whose_hooks_were_all_taken_off, put_in_another_base, put_weights_elsewhere, put_in_a_dense_layer,
    put_in_another_norm, exchange_two_layers, exchange_two_blocks, scale, add_a_bias, merge_and_change,
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("where", ["cpu", "gpu"])
def test_what_changed_since_the_last_prompt_is_noticed(
    where: str, change: Callable[[Llama], object], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = request.getfixturevalue("gpu") if where == "gpu" else torch.device("cpu")
    monkeypatch.setattr(reading, "BUFFERED", {"cpu", "cuda"})
    walked: list[int] = []
    monkeypatch.setattr(decode, "groups_of", lambda model: walked.append(1) or groups_of(model))
    model = tiny().to(device)
    ids = torch.tensor([[5, 6, 7]])
    decoder = Decoder(model, 1, 32)

    def read() -> torch.Tensor:
        got = decoder.begin(ids, torch.ones_like(ids, dtype=torch.bool)).clone()
        torch.testing.assert_close(got, model(ids.to(device))[:, -1], rtol=1e-3, atol=1e-3)
        return got

    before = [read() for _ in range(4)]
    assert len(walked) == 2  # the third finds all as it was
    change(model)
    after = [read() for _ in range(4)]
    assert (after[0] - before[0]).abs().max() > 0.05
    assert len(walked) <= 4 or change is add_a_bias


@torch.no_grad()
def test_adapters_used_before_are_known_at_a_glance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BUFFERED", {"cpu", "cuda"})
    walked: list[int] = []
    monkeypatch.setattr(decode, "groups_of", lambda model: walked.append(1) or groups_of(model))
    model = tiny()
    another(model, "second", 7)
    ids = torch.tensor([[5, 6, 7]])
    decoder = Decoder(model, 1, 32)
    for _ in range(6):
        for name in ("default", "second"):
            lora.activate(model, name)
            got = decoder.begin(ids, torch.ones_like(ids, dtype=torch.bool))
            torch.testing.assert_close(got, model(ids)[:, -1], rtol=1e-3, atol=1e-3)
    assert len(walked) == 3 and len(decoder.known) == 2


def test_a_detached_adapter_is_not_held(buffered: bool) -> None:
    model = tiny()
    decoder = Decoder(model, 1, 32)
    ids = torch.tensor([[5, 6, 7]])
    for _ in range(3):
        decoder.begin(ids, torch.ones_like(ids, dtype=torch.bool))
    held = weakref.ref(model.model.layers[0].mlp.up_proj.adapters["default"])
    decoder.known.clear()  # on a GPU what is known is a graph, which holds nothing
    lora.detach(model, "default")
    gc.collect()
    assert held() is None


def test_adapters_are_switched_and_added_up_in_one_decoder(buffered: bool) -> None:
    model = tiny()
    another(model, "small", 3)
    another(model, "large", 20)
    decoder = Decoder(model, 1, 32)
    ids = torch.tensor([[5, 6, 7]])
    seen = []
    for names in ("default", "small", ["small", "large"], "large", "default"):
        lora.activate(model, names)
        logits = decoder.begin(ids, torch.ones_like(ids, dtype=torch.bool))
        with torch.no_grad():
            torch.testing.assert_close(logits, model(ids)[:, -1], rtol=1e-4, atol=1e-4)
        seen.append(logits)
    assert torch.equal(seen[0], seen[-1]) and not torch.allclose(seen[0], seen[1], atol=1e-2)
    if buffered:  # ranks 4 and 3 are padded to 16, 20 and 23 to 32
        assert len(decoder.recordings) == 2


@torch.no_grad()
def test_a_smaller_adapter_leaves_nothing_of_a_larger_one_in_the_buffers(buffered: bool) -> None:
    model = tiny(adapters=False)
    another(model, "small", 5)
    another(model, "large", 16)
    ids = torch.tensor([[5, 6, 7]])
    decoder = Decoder(model, 1, 32)
    for name in ("large", "small"):
        lora.activate(model, name)
        logits = decoder.begin(ids, torch.ones_like(ids, dtype=torch.bool))
        torch.testing.assert_close(logits, model(ids)[:, -1], rtol=1e-4, atol=1e-4)


def test_layers_that_are_not_4_bit_or_dora_or_hooked_are_called(buffered: bool) -> None:
    torch.manual_seed(4)
    model = tiny(adapters=False)
    dense = torch.nn.Linear(128, 128, bias=False)
    torch.nn.init.normal_(dense.weight, std=0.15)
    model.model.layers[0].self_attn.o_proj = dense
    lora.wrap(model, r=2, dora=True, targets=["*.layers.1.*_proj"], name="d")
    for name, p in model.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(p, std=0.3)
    model.eval()
    seen: list[int] = []
    model.model.layers[2].mlp.up_proj.register_forward_hook(lambda *a: seen.append(1))
    want = [by_forward(model, p, 12) for p in PROMPTS]
    seen.clear()
    assert generate_ids(model, PROMPTS, 12) == want and len(seen) == 12


def test_more_than_fits_is_refused() -> None:
    decoder = Decoder(tiny(), 1, 6)
    ids = torch.tensor([[5, 6, 7, 8]])
    with pytest.raises(ValueError, match="1 prompts of 4 tokens and 3 new ones do not fit"):
        decoder.begin(ids, torch.ones_like(ids, dtype=torch.bool), new=3)
    decoder.begin(ids, torch.ones_like(ids, dtype=torch.bool), new=2)
    decoder.take()
    decoder.step(greedy=True)
    with pytest.raises(RuntimeError, match="a token more than the 6"):
        decoder.take()


def test_nan_in_the_logits_is_an_error_not_a_text() -> None:
    model = tiny()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(RuntimeError, match="NaN or inf in row 0 of 3"):
            generate_ids(model, PROMPTS, 5, temperature=temperature)


def test_a_trained_copy_of_a_whole_block_is_not_looked_past() -> None:
    model = tiny(adapters=False)
    lora.wrap(model, r=2, train_modules=["model.layers.1.mlp"]).eval()
    copy = model.model.layers[1].mlp.adapters["default"]
    for p in copy.parameters():
        torch.nn.init.normal_(p, std=0.4)
    assert not Decoder(model, 1, 16).plain
    assert generate_ids(model, PROMPTS, 12) == [by_forward(model, p, 12) for p in PROMPTS]


def test_a_trained_copy_of_all_blocks_is_not_looked_past() -> None:
    model = tiny(adapters=False)
    lora.wrap(model, r=2, train_modules=["model"]).eval()
    for p in model.model.adapters["default"].parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.ndim == 1 else 0.0, std=0.2)
    assert not Decoder(model, 1, 16).plain


def test_a_trained_norm_is_not_looked_past() -> None:
    model = tiny(adapters=False)
    lora.wrap(model, r=2, train_modules=["model.norm"]).eval()
    torch.nn.init.normal_(model.model.norm.adapters["default"].weight)
    assert generate_ids(model, PROMPTS, 12) == [by_forward(model, p, 12) for p in PROMPTS]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gpu_gives_the_tokens_of_the_cpu_in_float32(gpu: torch.device, family: str) -> None:
    model = tiny(config=FAMILIES[family])
    want = generate_ids(model, PROMPTS, 40)
    model.to(gpu)
    assert generate_ids(model, PROMPTS, 40) == want
    decoder = decoder_for(model, 3, 48)
    assert decoder.batch == 4 and True in decoder.now.steps
    for _ in range(2):  # the second records the prompts, the third replays them
        assert generate_ids(model, PROMPTS, 40) == want and decoder_for(model, 3, 48) is decoder
    assert len(decoder.now.prompts) == 1
    with lora.disabled(model):
        assert generate_ids(model, PROMPTS, 40) != want
    assert generate_ids(model, PROMPTS, 40) == want
    moved = copy.deepcopy(model)
    assert generate_ids(moved, PROMPTS, 40) == want and decoder_for(moved, 3, 48) is not decoder


def test_up_to_64_rows_give_the_tokens_of_each_alone(gpu: torch.device) -> None:
    model = tiny()
    prompts = [[(7 * i + j) % 100 for j in range(1 + i % 5)] for i in range(64)]
    alone = [generate_ids(model, [prompt], 10)[0] for prompt in prompts]
    model.to(gpu)
    for batch in (1, 2, 3, 8, 17, 64):
        for _ in range(3):  # at once, recorded, replayed
            assert generate_ids(model, prompts[:batch], 10, batch=batch) == alone[:batch]


@torch.no_grad()
def test_neither_a_prompt_nor_a_token_waits_for_the_gpu(gpu: torch.device) -> None:
    model = tiny().to(gpu)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    real = torch.ones_like(ids, dtype=torch.bool)
    real[1, 0] = False
    decoder = Decoder(model, 2, 64)
    draw = torch.Generator(gpu).manual_seed(1)
    for turn in range(4):
        if turn == 3:
            torch.cuda.set_sync_debug_mode("error")
        try:
            decoder.begin(ids, real, [17], 20)
            decoder.take()
            for i in range(6):
                decoder.ended(i)
                decoder.step(greedy=True)
            for _ in range(6):
                decoder.take(pick(decoder.step(), 0.7, 20, 0.9, draw))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(decoder.written(13)[0]) == 13


def test_a_row_in_shares_gives_the_tokens_of_the_cpu(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    prompts = [[i % 100 for i in range(150)], [7] * 131]
    want = generate_ids(model, prompts, 60)
    monkeypatch.setattr(attend, "SHORT", 64)
    model.to(gpu)
    assert generate_ids(model, prompts, 60) == want
    assert decoder_for(model, 2, 210).work is not None


def test_adapters_are_switched_without_another_recording(gpu: torch.device) -> None:
    model = tiny()
    another(model, "second", 7)
    want = {}
    for name in ("default", "second"):
        lora.activate(model, name)
        want[name] = generate_ids(model, PROMPTS, 24)
    assert want["default"] != want["second"]
    model.to(gpu)
    for name in ("default", "second", "default", "second"):
        lora.activate(model, name)
        assert generate_ids(model, PROMPTS, 24) == want[name]
    decoder = decoder_for(model, 3, 32)
    assert len(decoder.recordings) == 1
    with lora.disabled(model):
        base = generate_ids(model, PROMPTS, 24)
    assert base not in want.values() and len(decoder.recordings) == 2
    assert generate_ids(model, PROMPTS, 24) == want["second"] and len(decoder.recordings) == 2


def test_a_recorded_step_reads_factors_trained_further(gpu: torch.device) -> None:
    model = tiny().to(gpu)
    before = generate_ids(model, PROMPTS, 24)
    decoder = decoder_for(model, 3, 32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".b"):
                p.mul_(-1)
    after = generate_ids(model, PROMPTS, 24)
    assert after != before and decoder_for(model, 3, 32) is decoder and len(decoder.recordings) == 1
    assert after == [by_forward(model, p, 24) for p in PROMPTS]


def test_weights_that_moved_leave_no_recording_behind(gpu: torch.device) -> None:
    model = tiny().to(gpu)
    want = generate_ids(model, PROMPTS, 12)
    decoder = decoder_for(model, 3, 20)
    held = [decoder.logits, *(t.clone() for t in model.buffers())]  # so that the old places are taken
    for module in model.modules():
        for name, buffer in list(module._buffers.items()):
            module._buffers[name] = None if buffer is None else buffer.clone()
    assert generate_ids(model, PROMPTS, 12) == want and len(held) > 0
    assert decoder_for(model, 3, 20) is decoder and len(decoder.recordings) == 1


def test_draws_on_a_gpu_follow_their_seed_and_stop(gpu: torch.device) -> None:
    model = tiny().to(gpu)
    draws = [generate_ids(model, PROMPTS, 40, temperature=0.7, top_k=20, top_p=0.9, seed=s) for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert generate_ids(model, PROMPTS, 40, temperature=3.0, top_k=1) == generate_ids(model, PROMPTS, 40)
    free = generate_ids(model, PROMPTS[:1], 100)[0]
    stop = free[37]
    assert generate_ids(model, PROMPTS[:1], 100, [stop])[0] == free[: free.index(stop)]


def test_a_decoder_is_kept_for_each_of_a_few_shapes(gpu: torch.device) -> None:
    model = tiny().to(gpu)
    first = decoder_for(model, 1, 90)
    assert decoder_for(model, 1, 97) is first and decoder_for(model, 3, 90) is not first
    assert decoder_for(model, 1, 20) is first and decoder_for(model, 1, 200) is not first
    assert decoder_for(model, 20, 90).batch == 24  # the fourth shape: the oldest goes
    assert decoder_for(model, 3, 90) is not None and len(model.__dict__["_decoders"]) == 3


def test_prompts_of_every_length_up_to_the_models_own(gpu: torch.device) -> None:
    model = tiny()
    for T, new in ((33, 95), (97, 31), (200, 56), (255, 1)):  # padded to 64 and 128; then no room for padding is left
        prompt = [[i % 100 for i in range(T)]]
        want = generate_ids(model.cpu(), prompt, new)
        assert generate_ids(model.to(gpu), prompt, new) == want


def test_bfloat16_on_a_gpu_follows_its_own_forward(gpu: torch.device) -> None:
    model = tiny().bfloat16().to(gpu)
    ids = torch.randint(101, (2, 30), device=gpu)
    decoder = Decoder(model, 2, 64)
    exact, errors = copy.deepcopy(model).float(), []
    with torch.no_grad():
        logits = decoder.begin(ids[:, :5], torch.ones(2, 5, dtype=torch.bool, device=gpu))
        for i in range(5, 30):
            right, forward = exact(ids[:, :i])[:, -1], model(ids[:, :i])[:, -1].float()
            errors.append([float((found - right).norm()) for found in (logits, forward)])
            decoder.take(ids[:, i])
            logits = decoder.step()
    # the step rounds codes, the forward whole weights: one as good as the other, over all steps
    stepped, plain = torch.tensor(errors).norm(dim=0)
    assert stepped <= 1.5 * plain, errors


@pytest.mark.parametrize("stop_at", [0, 7, 8, 30])
def test_a_row_ends_before_its_stop_token(stop_at: int) -> None:
    model = tiny()
    row = generate_ids(model, PROMPTS[:1], 40)[0]
    stop = row[stop_at]
    assert generate_ids(model, PROMPTS[:1], 40, [stop])[0] == row[: row.index(stop)]
