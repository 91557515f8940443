"""What the evidence says about learning rate, adapter size and batch size.

Source: Schulman et al., LoRA Without Regret (Thinking Machines, 2025), and the formula of their Tinker cookbook: one
study, of models from 1 to 70 B parameters.  Outside that range it is a starting point, no more.
"""

from collections.abc import Sequence

from torch import nn

from lora.batch import Example, Pack
from lora.layer import adapted, updates
from lora.models.base import CausalLM
from lora.tokens import lengths_of
from lora.train.pack import Packs

LONG_EVALUATION = 100_000  # tokens, below which nobody waits
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


def warnings_for(
    model: nn.Module, examples: Sequence[Example | Pack], rows_a_step: int, held_out: Sequence[Example], between: int
) -> list[str]:
    """Sentences on what makes a run worse or longer than it need be.

    Of an adapter: too small for its data, batches that hurt it.  Of any run: evaluations on `held_out` that take longer
    than the `between` steps from one to the next, packed rows that are mostly padding.
    """
    said = []
    lengths = lengths_of(held_out)
    trained_on = sum(lengths_of(examples)) * min(1.0, rows_a_step / len(examples)) * between
    if sum(lengths) > max(LONG_EVALUATION, 3 * trained_on):  # a step costs three times its forward pass
        said.append(
            f"an evaluation reads {sum(lengths):,} tokens, and the steps from one to the next train on "
            f"{trained_on:,.0f}: most of the time goes into evaluating; take fewer validation rows than "
            f"{len(lengths):,}, or a larger eval_every"
        )
    if isinstance(examples, Packs) and examples.filled < 0.5:
        said.append(
            f"packed rows of {examples.size:,} tokens are {examples.filled:.0%} full, and the padding is computed too; "
            "take a smaller max_length"
        )
    return said + (_of_adapters(model, examples, rows_a_step) if method_of(model) == "lora" else [])


def _of_adapters(model: nn.Module, examples: Sequence[Example | Pack], rows_a_step: int) -> list[str]:
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
    together, what = min(rows_a_step, len(examples)), "rows"
    if isinstance(examples, Packs):  # each row holds several
        together, what = round(together * len(examples.examples) / len(examples)), "texts in packed rows"
    if together > LARGE_BATCH:
        said.append(
            f"{together} {what} to a step: beyond about {LARGE_BATCH} an adapter learns less from the same rows than "
            "full fine-tuning does, whatever its rank; a smaller batch with more steps is the better use of them"
        )
    return said


def _rank(least: float) -> int:
    """The power of two from `least` up."""
    r = 1
    while r < least:
        r *= 2
    return r
