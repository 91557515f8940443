"""Who computes: the torch twin or Triton."""

import pytest
import torch

from lora.kernels import _triton, dispatch
from lora.kernels.dispatch import use_triton


def test_a_cpu_tensor_goes_to_the_twin_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORA_KERNELS", raising=False)
    assert not use_triton(torch.zeros(2))
    monkeypatch.setenv("LORA_KERNELS", "torch")
    assert not use_triton(torch.zeros(2))


def test_an_explicit_wish_for_triton_is_kept_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS", "triton")
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="tensors are on cpu; move them to a GPU"):
        use_triton(torch.zeros(2))
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    assert use_triton(torch.zeros(2)) == _triton.AVAILABLE
    with pytest.raises(RuntimeError, match=r"torch\.float64; kernels take"):
        use_triton(torch.zeros(2, dtype=torch.float64))
    monkeypatch.setattr(_triton, "AVAILABLE", False)
    with pytest.raises(RuntimeError, match="not installed"):
        use_triton(torch.zeros(2))


def test_several_devices_and_unknown_wishes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="tensors on cpu, meta"):
        use_triton(torch.zeros(2), torch.zeros(2, device="meta"))
    monkeypatch.setenv("LORA_KERNELS", "cuda")
    with pytest.raises(ValueError, match="'auto', 'torch' and 'triton'"):
        use_triton(torch.zeros(2))


@pytest.mark.parametrize("early", [False, True])
def test_a_launch_begins_early_only_where_it_is_asked_to_and_can(early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.launch_early(early, torch.device("cpu")) == {"EARLY": False}
    monkeypatch.setattr(dispatch, "can_overlap", lambda device: True)
    want = {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}
    assert dispatch.launch_early(early, torch.device("cpu")) == want
