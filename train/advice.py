"""What the evidence says about learning rate, adapter size and batch size.

Source: Schulman et al., LoRA Without Regret (Thinking Machines, 2025), and the formula of their Tinker cookbook: one
study, of models from 1 to 70 B parameters.  Outside that range it is a starting point, no more.
"""

from collections.abc import Sequence

from torch import nn

from lora.batch import Example, Pack
from lora.layer import adapted, updates
from lora.models.base import CausalLM

LARGE_BATCH = 32  # rows to a step beyond which an adapter falls behind full fine-tuning


def method_of(model: nn.Module) -> str:
    """ "lora" where what trains belongs to an adapter, else "full"."""
    inside = {id(p) for _, layer in adapted(model) for p in layer.adapters.parameters() if p.requires_grad}
    return "lora" if inside else "full"


def default_lr(model: nn.Module) -> float:
    """Highest learning rate for AdamW, from what trains and the width of the model.

        full    5e-5 (2000 / width) ** P        adapters    ten times that
        P = 0.781 for Llama, 0.0775 for Qwen; of other families the one that gives less

    The tenfold was a fit over 14 models (9.8); it does not depend on the rank, since the update is scaled by alpha / r
    with alpha = 32.  Runs of less than about 100 steps take up to 15.  Rounded to two digits.
    Source: the module's.
    """
    config = model.config
    width = getattr(config, "hidden_size", None)
    if width is None and isinstance(model, CausalLM):
        width = getattr(model.norm().weight, "shape", (None,))[-1]
    if not isinstance(width, int):
        raise ValueError(f"lr=None goes by the width of the model, which {type(model).__name__} does not say; give lr")
    family = str(getattr(config, "model_type", ""))
    powers = {"llama": (0.781,), "qwen": (0.0775,)}.get(family[:5].rstrip("0123456789"), (0.781, 0.0775))
    full = min(5e-5 * (2000 / width) ** power for power in powers)
    return float(f"{full * (10 if method_of(model) == 'lora' else 1):.1e}")


def warnings_for(model: nn.Module, examples: Sequence[Example | Pack], rows_a_step: int) -> list[str]:
    """Sentences on an adapter too small for its data, and on batches that hurt it; none for full fine-tuning."""
    if method_of(model) != "lora":
        return []
    said = []
    trained = [a for _, _, a in updates(model) if a.a.requires_grad]
    size = sum(a.a.numel() + a.b.numel() for a in trained)
    learned = sum(e.n_learned for e in examples)
    if trained and learned > size:
        r = max(a.r for a in trained)
        said.append(
            f"{learned:,} tokens are learned by {size:,} parameters of rank {r}: where tokens outnumber parameters "
            f"an adapter may run full, and loss stops falling early; r={_rank(r * learned / size)} would hold them"
        )
    rows_a_step = min(rows_a_step, len(examples))
    if rows_a_step > LARGE_BATCH:
        said.append(
            f"{rows_a_step} rows to a step: beyond about {LARGE_BATCH} an adapter learns less from the same rows than "
            "full fine-tuning does, whatever its rank; a smaller batch with more steps is the better use of them"
        )
    return said


def _rank(least: float) -> int:
    """The power of two from `least` up."""
    r = 1
    while r < least:
        r *= 2
    return r
