"""The `lora` command: parse, one library call, print. A notebook can do all that stands in commands/.

Exit code 0 on success; 2 on a caller's mistake, with one sentence and no traceback, or where `verify` finds other
bits; 130 on Ctrl-C and 143 on SIGTERM, after a run was saved.
"""

import sys
import traceback
import warnings
from collections.abc import Sequence

import lora
from lora.commands import models, training
from lora.commands.flags import ArgumentParser

COMMANDS = training.COMMANDS | models.COMMANDS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    parser = ArgumentParser(prog="lora", description="QLoRA from scratch: tune, measure and use language models.")
    parser.add_argument("--version", action="version", version=f"lora {lora.__version__}")
    commands = parser.add_subcommands(required=True, dest="command")
    for name, (sub, _) in COMMANDS.items():
        made = sub()
        commands.add_subcommand(name, made, help=str(made.description).partition(".")[0])
    config = parser.parse_args(argv)
    warnings.formatwarning = lambda message, *_, **__: f"lora: note: {message}\n"  # a sentence, not a source line
    try:
        COMMANDS[config.command][1](config[config.command])
    except KeyboardInterrupt as e:
        print(f"lora: interrupted {e}".rstrip(), file=sys.stderr)
        return getattr(e, "code", 130)
    except (ValueError, TypeError, LookupError, RuntimeError, OSError, ImportError) as e:
        if not _deliberate(e):
            raise
        print(f"lora: error: {e.args[0] if isinstance(e, KeyError) else e}", file=sys.stderr)
        return 2
    return 0


def _deliberate(e: BaseException) -> bool:
    """Whether a `raise` of ours made it, a sentence for the caller. Anything else is a bug and keeps its traceback."""
    last = traceback.extract_tb(e.__traceback__)[-1]
    return isinstance(e, OSError) or (last.line or "").lstrip().startswith("raise ")


if __name__ == "__main__":
    sys.exit(main())
