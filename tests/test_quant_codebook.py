"""The values of the code books, to the last bit."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lora.quant.codebook import codebook, dynamic_map, fp4, nf4

NF4_WORDS = [
    "bf800000",
    "bf3239b1",
    "bf066b30",
    "beca32a0",
    "be91a24d",
    "be3d353f",
    "bdba7871",
    "00000000",
    "3da2faff",
    "3e24cae3",
    "3e7c04dd",
    "3ead033a",
    "3ee1a4b8",
    "3f1007ab",
    "3f3913b3",
    "3f800000",
]
FP4_WORDS = ["00000000", "3baaaaab", "3f2aaaab", "3f800000", "3eaaaaab", "3f000000", "3e2aaaab", "3e800000"]
NF4_THRESHOLDS = [
    *(-0.8480964, -0.61063293, -0.45999527, -0.33967943, -0.23460741, -0.13791173, -0.045525018, 0.03979015),
    *(0.12025525, 0.20352125, 0.29201377, 0.38931254, 0.5016634, 0.64278692, 0.86147842),
]


def words(values: Tensor) -> list[str]:
    return [f"{word:08x}" for word in values.contiguous().numpy().view(np.uint32)]


def test_nf4_has_the_published_words() -> None:
    assert words(nf4()) == NF4_WORDS


def test_fp4_has_the_published_words_in_code_order() -> None:
    assert words(fp4()[:8]) == FP4_WORDS
    assert torch.equal(fp4()[8:], -fp4()[:8]) and fp4()[8].item() == 0.0


def test_nf4_thresholds_are_the_midpoints() -> None:
    code = nf4()
    # the published figures carry eight decimals
    torch.testing.assert_close((code[:-1] + code[1:]) / 2, torch.tensor(NF4_THRESHOLDS), rtol=2e-7, atol=5e-9)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codebooks_equal_bitsandbytes(kind: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(codebook(kind), functional.get_4bit_type(kind, device="cpu"))


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_equals_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert words(dynamic_map(signed)) == words(functional.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_has_256_ascending_levels(signed: bool) -> None:
    levels = dynamic_map(signed)
    assert levels.shape == (256,) and levels.dtype == torch.float32
    assert (levels.diff() > 0).all() and levels[-1] == 1.0 and levels[127 if signed else 0] == 0


def test_unknown_codebook_is_refused() -> None:
    with pytest.raises(ValueError, match="int4.*fp4.*nf4"):
        codebook("int4")
