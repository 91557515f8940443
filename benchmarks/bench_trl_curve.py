"""Does a run learn what TRL's SFTTrainer with peft learns, step by step?

One small Llama in float32 on the CPU, the same 400 rows in the same order, the same first adapter, LoRA r=8 on all
linears, batch 4, accumulate 2, AdamW with decay, linear schedule, clip 1: 50 steps.  Only the completion is learned.
TRL gets our token ids and labels, so that what is compared is the loop.  Passes where no loss is further apart than
1e-4.

usage: python benchmarks/bench_trl_curve.py MODEL_FOLDER [--steps 50] [--save]      (needs the extra `trl`)
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import lora
from lora.batch import Example, Pack
from lora.render import length_limit, render
from lora.train.batches import endless

from result import finish  # isort: skip  (beside this script)

BATCH, ACCUMULATE, LR, DECAY, R, ALPHA, NEAR = 4, 2, 2e-3, 0.1, 8, 16, 1e-4
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "Lily",
    "Tom",
    "sat",
    "ran",
    "played",
    "on",
    "in",
    "mat",
    "garden",
    "and",
    "then",
    "happy",
    "big",
    "red",
    "ball",
    "with",
]


def rows(n: int) -> list[dict[str, str]]:
    """Made-up sentences of very different length."""
    draw = random.Random(0)
    return [
        {
            "prompt": " ".join(draw.choices(WORDS, k=draw.randint(1, 12))),
            "completion": " " + " ".join(draw.choices(WORDS, k=draw.choice([1, 3, 8, 20, 40]))),
        }
        for _ in range(n)
    ]


def ours(folder: str, first: Path, data: list[dict[str, str]], steps: int) -> list[dict[str, Any]]:
    model, tokenizer = lora.load(folder, device="cpu", dtype="float32")
    lora.attach(model, first, trainable=True)
    config = lora.TrainConfig(
        batch=BATCH, accumulate=ACCUMULATE, max_steps=steps, lr=LR, warmup=0.0, schedule="linear", weight_decay=DECAY,
        progress=False,
    )  # fmt: skip
    return [h for h in lora.fit(model, tokenizer, data, config=config).history if "loss" in h]


def theirs(folder: str, first: Path, examples: list[Example | Pack], steps: int) -> list[dict[str, Any]]:
    import pyarrow
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, first, is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    labels = [[t if k else -100 for t, k in zip(e.ids, e.learned, strict=True)] for e in examples]
    table = pyarrow.table({"input_ids": [list(e.ids) for e in examples], "labels": labels})
    dataset = Dataset(table, fingerprint="rows")  # without one datasets pickles the table, which newer pyarrow refuses
    found: list[dict[str, Any]] = []

    class Keep(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                found.append(dict(logs))

    with tempfile.TemporaryDirectory() as out:
        settings = SFTConfig(
            output_dir=out, per_device_train_batch_size=BATCH, gradient_accumulation_steps=ACCUMULATE, max_steps=steps,
            learning_rate=LR, weight_decay=DECAY, lr_scheduler_type="linear", warmup_steps=0, max_grad_norm=1.0,
            adam_beta2=0.999, logging_steps=1, logging_nan_inf_filter=False, save_strategy="no", report_to="none",
            max_length=None, bf16=False, gradient_checkpointing=False, use_cpu=True, disable_tqdm=True,
            train_sampling_strategy="sequential", dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        trainer = SFTTrainer(model, settings, train_dataset=dataset, processing_class=tokenizer, callbacks=[Keep()])
        trainer.train()
    return found


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", help="folder of a small Llama")
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--save", action="store_true")
    a = p.parse_args()
    data = rows(a.steps * BATCH * ACCUMULATE)
    model, tokenizer = lora.load(a.model, device="cpu", dtype="float32")
    torch.manual_seed(0)
    lora.wrap(model, r=R, alpha=ALPHA)
    examples = render(data, tokenizer, length_limit(model))
    order = endless(examples, BATCH, ACCUMULATE, lora.TrainConfig().seed)
    sorted_rows = [e for _ in range(a.steps) for part in next(order)[1] for e in part]
    if len(sorted_rows) != len(data):
        raise RuntimeError(f"{len(data)} rows were ordered into {len(sorted_rows)}")
    with tempfile.TemporaryDirectory() as folder:
        first = lora.save(model, Path(folder) / "first", base=a.model)
        mine, peers = ours(a.model, first, data, a.steps), theirs(a.model, first, sorted_rows, a.steps)
    table = []
    for x, y in zip(mine, peers, strict=True):
        table.append(
            {
                "step": x["step"], "ours": x["loss"], "trl": float(y["loss"]), "norm_ours": x["grad_norm"],
                "norm_trl": float(y["grad_norm"]), "lr_gap": abs(x["learning_rate"] - float(y["learning_rate"])),
            }
        )  # fmt: skip
        print("step {step:3d}  loss {ours:.6f} {trl:.6f}  norm {norm_ours:.6f} {norm_trl:.6f}".format(**table[-1]))
    loss = max(abs(r["ours"] - r["trl"]) for r in table)
    mean = abs(sum(r["ours"] - r["trl"] for r in table)) / len(table)  # a drift to one side shows here
    norm = max(abs(r["norm_ours"] - r["norm_trl"]) / r["norm_trl"] for r in table)
    summary = {"largest_loss_gap": loss, "mean_loss_residual": mean, "largest_relative_norm_gap": norm}
    print(json.dumps(summary | {"within": NEAR, "passes": loss <= NEAR}))
    finish("trl_curve", [summary, *table], a.save)
    return 0 if loss <= NEAR else 1


if __name__ == "__main__":
    sys.exit(main())
