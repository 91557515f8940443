"""What tests share: a fixed seed, few threads, and where the real models lie."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before any kernel is defined: Triton's interpreter stands in for the GPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

from lora.kernels import _triton
from lora.kernels.dispatch import INTERPRETED
from lora.train.demo import find_weights

SHARED = Path(os.environ.get("LORA_SHARED", Path(__file__).parents[2] / "shared"))
torch.set_num_threads(max(1, (os.cpu_count() or 2) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what a GPU shows more of: `make gpu` runs it."""
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        reasons = [mark.kwargs.get("reason", "") for mark in item.iter_markers("skipif")]
        named = {"gpu", "triton_device"} & set(getattr(item, "fixturenames", ()))
        if named or "triton" in map(str, values) or any(reason.startswith("needs a GPU") for reason in reasons):
            item.add_marker("gpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def triton_device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Makes every kernel run in Triton or fail; where there is no GPU, in Triton's CPU interpreter."""
    if not _triton.AVAILABLE:
        pytest.skip("needs Triton")
    monkeypatch.setenv("LORA_KERNELS", "triton")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["torch", "triton"])
def wish(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the two ways of a kernel in turn, as LORA_KERNELS says it."""
    if request.param == "triton" and not (torch.cuda.is_available() or INTERPRETED):
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    monkeypatch.setenv("LORA_KERNELS", request.param)
    return request.param


@pytest.fixture
def gpu() -> torch.device:
    """For what only a GPU can show."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def stories() -> Path:
    """A real Llama of 0.26 M parameters, with expected.json."""
    return _shared("models/stories260k")


@pytest.fixture(scope="session")
def smollm2_files() -> Path:
    """Tokenizer, config and expected.json of SmolLM2-135M-Instruct; its weights are `smollm2_gguf`."""
    return _shared("models/smollm2-135m-instruct")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The weights of SmolLM2-135M-Instruct."""
    try:
        return find_weights()
    except FileNotFoundError as e:
        pytest.skip(str(e))


def _shared(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"real test material is not here: {SHARED / name} (set LORA_SHARED to its folder)")
    return SHARED / name
