"""Imports go downwards only: kernels < quant < lora < eval < train; the face and the commands are the roof."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {"kernels": 0, "quant": 1, "lora": 2, "eval": 3, "train": 4}
ROOF = {ROOT / "lora/__init__.py", ROOT / "lora/__main__.py", *(ROOT / "lora/commands").glob("*.py")}
FILES = [p for d in FLOORS for p in (ROOT / d).rglob("*.py") if p not in ROOF]


def floor_of(module: str) -> int:
    """The floor of a dotted module name `lora...`."""
    part = module.split(".")[1] if "." in module else "lora"
    return FLOORS[part if part in FLOORS else "lora"]


def imports(text: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return [name for name in found if name.split(".")[0] == "lora"]


def upward(text: str, floor: int) -> list[str]:
    return [name for name in imports(text) if name == "lora" or floor_of(name) > floor]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_from_its_floor_and_below(path: Path) -> None:
    assert upward(path.read_text(), FLOORS[path.relative_to(ROOT).parts[0]]) == []


def test_an_upward_import_is_caught() -> None:
    assert upward("from lora.train.loop import fit", FLOORS["quant"]) == ["lora.train.loop"]
    assert upward("import lora.eval.nll", FLOORS["lora"]) == ["lora.eval.nll"]
    assert upward("from lora.quant.linear import Linear4bit", FLOORS["lora"]) == []


def test_the_links_make_one_package_of_a_bare_checkout() -> None:
    for folder in ("quant", "kernels", "train", "eval"):
        link = ROOT / "lora" / folder
        assert link.is_dir() and link.resolve() == ROOT / folder


def test_importing_lora_costs_torch_and_nothing_above() -> None:
    import subprocess
    import sys

    code = (
        "import sys, lora; print([m for m in ('tokenizers', 'rich', 'jsonargparse', 'lora.train') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
