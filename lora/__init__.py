"""QLoRA from scratch: `import lora; lora.wrap(model, r=16)`.

What stands above the adapters (loading, training, evaluating) is imported when it is first asked for, so that
`import lora` costs torch and nothing else.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lora.attach import attach as attach
from lora.attach import swap as swap
from lora.combine import combine as combine
from lora.config import LoRAConfig as LoRAConfig
from lora.export import export as export
from lora.merge import merge as merge
from lora.merge import unmerge as unmerge
from lora.quant.linear import quantize_module as quantize
from lora.requantize import merge_4bit as merge_4bit
from lora.save import save as save
from lora.status import status as status
from lora.wrap import activate as activate
from lora.wrap import detach as detach
from lora.wrap import disabled as disabled
from lora.wrap import mixed as mixed
from lora.wrap import wrap as wrap

if TYPE_CHECKING:
    from lora.eval.compare import compare as compare
    from lora.eval.evaluate import evaluate as evaluate
    from lora.models.generate import generate as generate
    from lora.models.load import load as load
    from lora.models.save import save_pretrained as save_pretrained
    from lora.train.config import TrainConfig as TrainConfig
    from lora.train.loop import fit as fit
    from lora.train.plan import plan as plan
    from lora.train.sweep import sweep as sweep
    from lora.train.verify import verify as verify

__version__ = "0.1.0"

_LAZY = {
    "load": "lora.models.load",
    "generate": "lora.models.generate",
    "save_pretrained": "lora.models.save",
    "evaluate": "lora.eval.evaluate",
    "compare": "lora.eval.compare",
    "fit": "lora.train.loop",
    "plan": "lora.train.plan",
    "TrainConfig": "lora.train.config",
    "sweep": "lora.train.sweep",
    "verify": "lora.train.verify",
}

__all__ = [
    "LoRAConfig",
    "TrainConfig",
    "activate",
    "attach",
    "compare",
    "detach",
    "disabled",
    "evaluate",
    "combine",
    "export",
    "fit",
    "generate",
    "load",
    "merge",
    "merge_4bit",
    "mixed",
    "plan",
    "quantize",
    "save",
    "save_pretrained",
    "status",
    "swap",
    "sweep",
    "unmerge",
    "verify",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'lora' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
