"""Real models against numbers that transformers computed: stories260k, babyllama-char and SmolLM2-135M-Instruct."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

import lora
from lora.models.generate import generate_ids, prompt_ids
from lora.models.llama import Llama
from lora.models.tokenizer import Tokenizer

Loaded = tuple[Llama, Tokenizer]


@pytest.fixture(scope="module", params=["stories260k", "babyllama-char"])
def folder(request: pytest.FixtureRequest, stories: Path) -> Path:
    return stories.with_name(request.param)


@pytest.fixture(scope="module")
def small(folder: Path) -> Loaded:
    return lora.load(folder, device="cpu")


@pytest.fixture(scope="module")
def small_truth(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "expected.json").read_text())


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Loaded:
    return lora.load(smollm2_gguf, device="cpu")


@pytest.fixture(scope="module")
def smollm2_truth(smollm2_files: Path) -> dict[str, Any]:
    return json.loads((smollm2_files / "expected.json").read_text())


def data_file(models: Path, name: str) -> Path:
    """A data file that lies beside the folder of models."""
    file = models.parents[1] / "data" / name
    if not file.is_file():
        pytest.skip(f"real test material is not here: {file}")
    return file


@torch.no_grad()
def nll_of_blocks(model: Llama, blocks: list[list[int]]) -> tuple[float, int]:
    """Mean NLL of all positions but the first of each block, and how many they are."""
    total, count = 0.0, 0
    for block in blocks:
        logits = model(torch.tensor([block]))[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(block[1:]), reduction="sum").item()
        count += len(block) - 1
    return total / count, count


# ---- stories260k, babyllama-char ----
def test_small_models_have_their_published_size(small: Loaded, small_truth: dict[str, Any]) -> None:
    assert sum(p.numel() for p in small[0].parameters()) == small_truth["parameters"]


def test_small_token_ids_are_the_reference(small: Loaded, small_truth: dict[str, Any]) -> None:
    for case in small_truth["tokenizer"]:
        assert small[1].encode(case["text"]) == case["ids"]
        assert small[1].decode(case["ids"]) == case["decoded"]


@torch.no_grad()
def test_small_logits_are_the_reference(small: Loaded, small_truth: dict[str, Any]) -> None:
    want = small_truth["logits"]
    assert small[1].encode(want["text"]) == want["ids"]
    last = small[0](torch.tensor([want["ids"]]))[0, -1]
    assert (last[:16] - torch.tensor(want["last_position"])).abs().max() < 1e-3
    top = last.topk(5)
    assert top.indices.tolist() == [t["id"] for t in want["top5"]]
    assert (top.values - torch.tensor([t["logit"] for t in want["top5"]])).abs().max() < 1e-3


@torch.no_grad()
def test_small_logits_sum_to_the_reference(small: Loaded, small_truth: dict[str, Any]) -> None:
    want = small_truth["logits"]
    total = small[0](torch.tensor([want["ids"]])).double().sum().item()
    assert total == pytest.approx(want["sum_of_all_logits"], rel=1e-5)


def test_small_greedy_ids_are_the_reference(small: Loaded, small_truth: dict[str, Any]) -> None:
    for case in small_truth["greedy"]:
        prompt = case["prompt_ids"] if "prompt_ids" in case else small[1].encode(case["prompt"])
        made = generate_ids(small[0], [prompt], len(case["new_ids"]))
        assert made[0] == case["new_ids"]


def test_small_perplexity_is_the_reference(small: Loaded, small_truth: dict[str, Any], stories: Path) -> None:
    file = data_file(stories, "tinystories-sample/valid.jsonl")
    model, tokenizer = small
    stories = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    blocks = [tokenizer.encode(story)[: model.config.max_length] for story in stories]
    nll, count = nll_of_blocks(model, blocks)
    want = small_truth["perplexity"]["tinystories_sample_valid"]
    assert (len(blocks), count) == (want["stories"], want["tokens_scored"])
    assert nll == pytest.approx(want["nll"], abs=1e-4)
    assert math.exp(nll) == pytest.approx(want["ppl"], abs=1e-3)


def test_small_evaluate_gives_the_same_perplexity(small: Loaded, stories: Path) -> None:
    file = data_file(stories, "tinystories-sample/valid.jsonl")
    model, tokenizer = small
    short = [json.loads(line)["text"][:240] for line in file.read_text().splitlines()]
    blocks = [[*tokenizer.encode(story), tokenizer.eos] for story in short]
    nll, count = nll_of_blocks(model, blocks)
    report = lora.evaluate(model, tokenizer, [{"prompt": "", "completion": s} for s in short], ["nll", "perplexity"])
    assert sum(r.tokens or 0 for r in report.rows) == count
    assert report.metrics["nll"] == pytest.approx(nll, abs=1e-5)
    assert report.metrics["perplexity"] == pytest.approx(math.exp(nll), rel=1e-5)


# ---- SmolLM2-135M-Instruct ----
def test_smollm2_has_its_published_size(smollm2: Loaded) -> None:
    model = smollm2[0]
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.config.tied and model.config.rope_theta == 100000.0 and model.config.eps == 1e-5


def test_smollm2_token_ids_are_the_reference(smollm2: Loaded, smollm2_truth: dict[str, Any]) -> None:
    for case in smollm2_truth["tokenizer"]:
        assert smollm2[1].encode(case["text"]) == case["ids"]


def test_smollm2_chat_is_the_reference(smollm2: Loaded, smollm2_truth: dict[str, Any]) -> None:
    tokenizer, want = smollm2[1], smollm2_truth["chat"]
    assert tokenizer.render(want["messages"], prompt=True) == want["rendered"]
    assert prompt_ids(tokenizer, want["messages"]) == want["ids"]


def test_smollm2_folder_and_file_hold_one_tokenizer(smollm2: Loaded, smollm2_files: Path) -> None:
    ours, theirs = smollm2[1], Tokenizer.from_directory(smollm2_files)
    assert (ours.eos, ours.bos, ours.vocab_size, ours.add_bos) == (theirs.eos, theirs.bos, theirs.vocab_size, False)
    assert set(theirs.stop) <= set(ours.stop)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert ours.render(chat, prompt=True) == theirs.render(chat, prompt=True)


def test_smollm2_tokenizer_equals_its_own_on_random_text(smollm2: Loaded, smollm2_files: Path) -> None:
    published = tokenizers.Tokenizer.from_file(str(smollm2_files / "tokenizer.json"))
    draw = random.Random(0)
    ranges = [(32, 126)] * 4 + [(9, 13), (48, 57), (160, 591), (0x370, 0x5FF), (0x3040, 0x9FFF), (0x1F300, 0x1FAFF)]
    ranges += [(0x300, 0x36F), (0x2000, 0x206F), (0xE000, 0xE010)]
    words = ["<|im_start|>", "<|im_end|>", " the", "I'll", "  ", "\r\n", "1234", "<|endoftext|>", "<repo_name>"]
    for _ in range(1000):
        parts = [
            draw.choice(words) if draw.random() < 0.1 else chr(draw.randint(*draw.choice(ranges)))
            for _ in range(draw.randint(0, 60))
        ]
        text = "".join(parts)
        ids = smollm2[1].encode(text)
        assert ids == published.encode(text, add_special_tokens=False).ids, repr(text)
        assert smollm2[1].decode(ids, special=True) == text


@torch.no_grad()
def test_smollm2_logits_are_the_reference(smollm2: Loaded, smollm2_truth: dict[str, Any]) -> None:
    want = smollm2_truth["logits"]
    logits = smollm2[0](torch.tensor([want["ids"]]))[0]
    top = logits[-1].topk(5)
    assert top.indices.tolist() == [t["id"] for t in want["last_position_top5"]]
    assert (top.values - torch.tensor([t["logit"] for t in want["last_position_top5"]])).abs().max() < 1e-3
    assert logits.abs().max().item() == pytest.approx(want["max_abs"], abs=1e-3)
    assert logits.double().sum().item() == pytest.approx(want["sum_of_all_logits"], rel=1e-5)


def test_smollm2_greedy_ids_are_the_reference(smollm2: Loaded, smollm2_truth: dict[str, Any]) -> None:
    model, tokenizer = smollm2
    want = smollm2_truth["greedy"][0]
    assert generate_ids(model, [tokenizer.encode(want["prompt"])], 24)[0] == want["new_ids"][:24]


def test_smollm2_answers_a_chat_as_the_reference(smollm2: Loaded, smollm2_truth: dict[str, Any]) -> None:
    model, tokenizer = smollm2
    want = smollm2_truth["greedy"][1]
    made = generate_ids(model, [prompt_ids(tokenizer, smollm2_truth["chat"]["messages"])], 24, tokenizer.stop)
    assert made[0] == want["new_ids"][:24]


@torch.no_grad()
def test_smollm2_perplexity_equals_transformers_on_the_same_blocks(smollm2: Loaded, smollm2_files: Path) -> None:
    file = data_file(smollm2_files, "tinyshakespeare/train.txt")
    model, tokenizer = smollm2
    ids = tokenizer.encode(file.read_text()[:20_000], special=False)[:2048]
    blocks = [ids[i : i + 512] for i in range(0, 2048, 512)]
    nll, count = nll_of_blocks(model, blocks)
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(smollm2_files))
    theirs.load_state_dict(model.state_dict(), assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)  # was on meta too
    want, total = 0.0, 0
    for block in blocks:
        logits = theirs.eval()(torch.tensor([block])).logits[0, :-1]
        want += torch.nn.functional.cross_entropy(logits, torch.tensor(block[1:]), reduction="sum").item()
        total += len(block) - 1
    assert count == total == 2044
    assert math.exp(nll) == pytest.approx(math.exp(want / total), abs=1e-3)
