"""Names of the hub, without a network; and the bar of a long load."""

import io
import sys
import types
from pathlib import Path

import pytest
import torch

from lora.models import hub
from lora.models.load import load


def test_a_path_that_is_there_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.from_hub("a/b") == Path("a/b")


@pytest.mark.parametrize("path", ["missing", "/no/such/folder", "a/b/c", "a/b.gguf", "../x", "a/.."])
def test_what_is_no_hub_name_is_a_missing_folder(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(path)


def test_without_the_extra_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"owner/name is no folder here.*pip install 'lora-torch\[hub\]'"):
        load("owner/name")


def test_a_name_is_downloaded_without_pickles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path)

    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    assert hub.from_hub("owner/name-1.5_b") == tmp_path
    assert asked[0][0] == "owner/name-1.5_b"
    assert not any(p.endswith((".bin", ".pt", "*")) for p in asked[0][1])


def test_a_refusal_of_the_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        raise OSError("404 Client Error\nlong explanation")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    with pytest.raises(FileNotFoundError, match="owner/name is no folder here, and the hub .*: 404 Client Error$"):
        hub.from_hub("owner/name")


def test_the_bar_passes_every_weight_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(hub, "LONG", 1)
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    groups = [("a", {"a": torch.zeros(1)}), ("b", {"b": torch.zeros(1)})]
    assert list(hub.watched(iter(groups), tmp_path)) == groups
    assert "loading" in screen.getvalue()
