"""What commands are, and the flags that several of them have."""

import difflib
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import jsonargparse
from jsonargparse import Namespace

# What others call a setting: transformers' and TRL's arguments, peft's, mlx-lm's, torchtune's
_ELSEWHERE = {
    "learning_rate": "lr", "num_train_epochs": "epochs", "num_epochs": "epochs", "iters": "max_steps",
    "per_device_train_batch_size": "batch", "batch_size": "batch", "micro_batch_size": "batch",
    "gradient_accumulation_steps": "accumulate", "grad_accumulation_steps": "accumulate",
    "max_seq_length": "max_length", "max_seq_len": "max_length", "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "warmup_ratio": "warmup", "warmup_steps": "warmup", "lr_scheduler_type": "schedule", "lr_scheduler": "schedule",
    "adam_beta1": "beta1", "adam_beta2": "beta2", "adam_epsilon": "eps", "max_grad_norm": "clip",
    "gradient_checkpointing": "recompute", "packing": "pack", "sample_packing": "pack", "output_dir": "out",
    "eval_steps": "eval_every", "save_steps": "save_every", "logging_steps": "log_every",
    "save_total_limit": "keep_last",
    "early_stopping_patience": "patience", "load_best_model_at_end": "best", "report_to": "log_to",
    "neftune_noise_alpha": "neftune", "label_smoothing_factor": "label_smoothing", "loraplus_lr_ratio": "lora_plus",
    "resume_from_checkpoint": "resume", "model_name_or_path": "model", "model_name": "model", "base_model": "model",
    "dataset": "data", "dataset_name": "data", "train_file": "data", "validation_file": "valid",
    "eval_dataset": "valid",
    "rank": "lora.r", "r": "lora.r", "lora_r": "lora.r", "lora_rank": "lora.r", "alpha": "lora.alpha",
    "lora_alpha": "lora.alpha", "dropout": "lora.dropout", "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets", "lora_target_modules": "lora.targets", "targets": "lora.targets",
    "use_dora": "lora.dora", "use_rslora": "lora.rslora", "load_in_4bit": "method", "quantize": "method",
    "mask_prompt": "learn",
}  # fmt: skip


class ArgumentParser(jsonargparse.ArgumentParser):
    """jsonargparse's, whose mistakes are one sentence as all others are."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Says it on stderr and exits with 2."""
        parser: Any = getattr(ex, "subcommand_parser", None) or self
        known = [word for action in parser._actions for word in action.option_strings]
        prog = parser.prog.replace(" [options]", "")
        print(f"lora: error: {_sentence(message, known)}; see {prog} --help", file=sys.stderr)
        self.exit(2)


def _sentence(message: str, known: list[str]) -> str:
    """jsonargparse's lines in one; `known` are the flags that there are."""
    unknown = re.match(r"unrecognized arguments: +(--[^ =]+)", message, re.IGNORECASE)
    if unknown:
        word = unknown[1].removeprefix("--").replace("-", "_")
        here = f"--{_ELSEWHERE.get(word, '')}"
        near = [here] if here in known else difflib.get_close_matches(f"--{word}", known, n=1, cutoff=0.7)
        return f"{unknown[1]} is not known" + (f", and {near[0]} is" if near else "")
    missing = re.match(r"the following arguments are required: (\w+)\.(.*)", message)
    if missing:
        return f"lora {missing[1]} needs {missing[2].replace(f'{missing[1]}.', '')}"
    key, value = re.search(r'Parser key "([^"]+)"', message), re.search(r"(?:Given|Got) value: (.*)", message)
    kinds = re.findall(r"Expected a <class '(\w+)'>", message)
    if key and value and kinds:
        wanted = " or ".join("null" if kind == "NoneType" else kind for kind in kinds)
        return f"--{key[1]} {value[1].strip()}: {wanted} was expected"
    return " ".join(message.split())


Commands = dict[str, tuple[Callable[[], ArgumentParser], Callable[[Namespace], None]]]  # name: arguments, and the call


def model_flags(p: ArgumentParser, quantize: bool = True, required: bool = True) -> None:
    kind: Any = {"type": str, "required": True} if required else {"type": str | None, "default": None}
    p.add_argument("--model", **kind, help="model folder or .gguf file")
    if quantize:
        p.add_argument("--quantize", choices=("nf4", "fp4"), default=None, help="pack linear layers while loading")
    p.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of dense weights"
    )
    p.add_argument("--device", type=str, default="auto", help="cpu, cuda, or auto")


def columns_flag(p: ArgumentParser) -> None:
    said = """what the data calls its parts: '{"prompt": "question", "completion": "answer"}'"""
    p.add_argument("--columns", type=dict[str, str] | None, default=None, help=said)


def json_flag(p: ArgumentParser) -> None:
    p.add_argument("--json", action="store_true", help="print one line of JSON instead of text")


def dtype_device(a: Namespace) -> dict[str, Any]:
    return {"dtype": a.dtype, "device": a.device}


def numbers(a: Namespace, key: str, kind: Callable[[str], Any]) -> list[Any]:
    """The numbers of a flag that takes several, commas between them."""
    try:
        return [kind(part) for part in a[key].split(",")]
    except ValueError:
        raise ValueError(f"--{key} {a[key]}: numbers with commas between them, 1e-4,2e-4 say") from None
