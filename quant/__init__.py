"""Weights in fewer bits: code books, block scales, the packed weight and the frozen layer that stands on it."""

from lora.quant.codebook import CODEBOOKS as CODEBOOKS
from lora.quant.linear import Linear4bit as Linear4bit
from lora.quant.linear import quantize_module as quantize_module
from lora.quant.weight import Packed as Packed
from lora.quant.weight import quantize_tensor as quantize_tensor
