"""A weight in NF4 with double quantisation, by bitsandbytes: 0.516 bytes per parameter.

The weight, flattened row by row, is cut into blocks of 64 values. A value is stored as the number of the nearest of 16
levels times the block's absmax, two values to a byte (arXiv:2305.14314, section 3). Each absmax, less the mean of all,
is itself stored as the number of one of 256 levels times the largest in its group of 256 blocks. Bytes and values are
those of `bitsandbytes.functional.quantize_4bit(…, blocksize=64, quant_type="nf4", compress_statistics=True)`.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

import torch
from torch import Tensor, nn

from nemo_dpo.config import ConfigError

BLOCK = 64  # values that share an absmax
GROUP = 256  # blocks whose absmax share a scale


@functools.cache
def bitsandbytes_functional() -> Any:
    """The module `bitsandbytes.functional`, imported on first use: an optional package that takes seconds to import.

    Raises:
        ConfigError: it cannot be imported.
    """
    # It warns that it lacks a kernel for products with a 4-bit weight, which nothing here calls.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError as error:
        raise ConfigError(
            f"a base model in 4 bits needs bitsandbytes, which cannot be imported ({error}); "
            "install it (pip install bitsandbytes) or train without quantization"
        ) from error


@functools.cache
def _absmax_levels(device: torch.device) -> Tensor:
    # The 256 levels of an absmax, fp32: the same for every weight, so one copy per device.
    return bitsandbytes_functional().create_dynamic_map().to(device)


class UnpackableError(ValueError):
    """A weight holds what four bits cannot."""


class Nf4Weight(nn.Module):
    """A packed matrix. All its buffers are bytes, so that a cast of the module that holds it cannot change them.

    Attributes:
        shape: [rows, columns] of the matrix.
        dtype: of the matrix that was packed, and of what `dequantize` gives.
        packed: [⌈values / 2⌉] uint8, the first value of two in the high bits.
        absmax: [blocks] uint8.
        scales: bytes of 1 + [groups] fp32: the mean of the blocks' absmax, then the scale of each group.
    """

    packed: Tensor
    absmax: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor) -> None:
        """Pack `weight` [rows, columns], fp32, fp16 or bf16, on its own device.

        Raises:
            ConfigError: bitsandbytes is missing.
            ValueError: the dtype is another one.
            UnpackableError: the sum of the blocks' absmax is not finite.
        """
        super().__init__()
        packed, state = bitsandbytes_functional().quantize_4bit(
            weight.detach(), blocksize=BLOCK, quant_type="nf4", compress_statistics=True
        )
        if not state.offset.isfinite():
            raise UnpackableError(
                f"a weight of shape {list(weight.shape)} cannot be quantized: it holds an infinity, a NaN or values "
                "that float32 cannot add up; the checkpoint is damaged"
            )
        self.shape, self.dtype = weight.shape, weight.dtype
        scales = torch.cat([state.offset.view(1), state.state2.absmax])
        buffers = {"packed": packed.flatten(), "absmax": state.absmax, "scales": scales.view(torch.uint8)}
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    @property
    def nbytes(self) -> int:
        """Memory it takes, statistics included."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def dequantize(self) -> Tensor:
        """The matrix [rows, columns] as stored, in `dtype`. A new tensor at every call."""
        flat = bitsandbytes_functional().dequantize_4bit(self.packed, self._quant_state()).flatten()
        return flat[: self.shape.numel()].view(self.shape)

    def _quant_state(self) -> Any:
        """bitsandbytes' description of the packed values, in a shape that its CPU kernel is right about.

        With AVX-512 the kernel of 0.50 takes the wrong absmax where a row of a multiple of 16 values is no whole number
        of blocks (48, 96); it is right where a row is one block, and shares rows out over threads. A matrix that is no
        whole number of blocks is one row, with the padding of an odd one: an odd row would be compiled by torch.
        """
        quant_state, values = bitsandbytes_functional().QuantState, 2 * self.packed.numel()
        mean, scales = self.scales.view(torch.float32).split([1, self.scales.numel() // 4 - 1])
        levels = _absmax_levels(self.packed.device)
        return quant_state(
            absmax=self.absmax,
            shape=(values // BLOCK, BLOCK) if values % BLOCK == 0 else (1, values),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=self.dtype,
            offset=mean,
            state2=quant_state(absmax=scales, code=levels, blocksize=GROUP, dtype=torch.float32),
        )
