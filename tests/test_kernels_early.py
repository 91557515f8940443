"""Launches that begin early, and the division of memory that lets them."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from lora.kernels import early, feed, gemv4
from lora.kernels._triton import triton


@pytest.mark.parametrize("wanted", [False, True])
def test_a_launch_begins_early_only_where_it_is_asked_to_and_can(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert early.launch_early(wanted, torch.device("cpu")) == {"EARLY": False}
    monkeypatch.setattr(early, "can_overlap", lambda device: True)
    want = {"EARLY": True, "launch_pdl": True} if wanted else {"EARLY": False}
    assert early.launch_early(wanted, torch.device("cpu")) == want


def driver(status: int, asked: list[tuple[int | None, int, int]]) -> SimpleNamespace:
    def set_attribute(function: ctypes.c_void_p, attribute: int, value: int) -> int:
        asked.append((function.value, attribute, value))
        return status

    return SimpleNamespace(cuFuncSetAttribute=set_attribute)


def test_only_kernels_of_a_token_are_divided_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int | None, int, int]] = []
    monkeypatch.setattr(early, "_driver", lambda: driver(0, asked))
    early.divide(1, 7, "somebody's kernel", {}, "hash")
    early.divide(1, 8, "_feed_kernel", {}, "hash")
    assert asked == [(8, early.CARVE_OUT, 100)]


def test_a_driver_that_refuses_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early, "_driver", lambda: driver(1, []))
    with pytest.warns(UserWarning, match=r"gemv4_kernel keeps the driver's division of memory \(error 1\)"):
        early.divide(1, 7, "gemv4_kernel", {}, "hash")


def test_kernels_that_follow_each_other_share_a_division(gpu: torch.device) -> None:
    """What the driver says of the kernels after a launch, read back."""
    x, a = torch.randn(1, 256, device=gpu).bfloat16(), torch.randn(16, 256, device=gpu).bfloat16()
    feed.feed_low(x, a, early=True)
    gemv4.down([a], [1.0], x, early=True)
    for kernel in (feed._feed_kernel, gemv4._down_kernel):
        loaded = [k for k in kernel.device_caches[torch.cuda.current_device()][0].values() if k.module is not None]
        assert loaded and kernel.fn.__name__ in early.ALIKE
        for one in loaded:
            value = ctypes.c_int(-2)
            got = early._driver().cuFuncGetAttribute(
                ctypes.byref(value), early.CARVE_OUT, ctypes.c_void_p(one.function)
            )
            assert (got, value.value) == (0, 100)
    assert early.divide in triton.knobs.runtime.kernel_load_end_hook.calls
