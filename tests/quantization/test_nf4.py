"""Nf4Weight: bitsandbytes' bytes and values, bit by bit, and what both mean."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from nemo_dpo.config import ConfigError
from nemo_dpo.quantization import nf4
from nemo_dpo.quantization.nf4 import Nf4Weight, UnpackableError

functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes, of the extra `qlora`, is missing")

# arXiv:2305.14314, appendix E.
LEVELS = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]
DTYPES = [torch.float32, torch.bfloat16]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def with_zero_block() -> Tensor:
    matrix = normal(4, 64)
    matrix[2] = 0
    return matrix


MATRICES = {
    "whole blocks": normal(24, 128),
    "more than one group of blocks": normal(300, 64),
    "blocks across rows": normal(128, 96),
    "rows shorter than a block": normal(32, 24),
    "a part of a block at the end": normal(5, 100),
    "only a part of a block": normal(3, 16),
    "rows of a multiple of 16, a part of a block": normal(3, 48),
    "odd": normal(7, 33),
    "one value": normal(1, 1),
    "zeros": torch.zeros(8, 64),
    "zeros, a part of a block": torch.zeros(5, 20),
    "a block of zeros": with_zero_block(),
    "denormal": 1e-40 * normal(8, 64),
    "denormal beside normal": torch.cat([1e-40 * normal(4, 64), normal(4, 64)]),
    "large": 1e37 * normal(8, 64),  # the sum of the absmax is just below the largest float32
}


def unpacked_levels(weight: Nf4Weight) -> Tensor:
    """Number of the level of each value, in order."""
    pairs = torch.stack([weight.packed >> 4, weight.packed & 15], 1)
    return pairs.flatten()[: weight.shape.numel()].long()


def unpacked_absmax(weight: Nf4Weight) -> Tensor:
    """[blocks] fp32, as stored."""
    mean, *scales = weight.scales.view(torch.float32)
    levels = functional.create_dynamic_map()
    return torch.stack([levels[int(a)] * scales[n // 256] + mean for n, a in enumerate(weight.absmax)])


def slowly_dequantized(weight: Nf4Weight) -> Tensor:
    absmax = unpacked_absmax(weight).repeat_interleave(64)[: weight.shape.numel()]
    return (torch.tensor(LEVELS)[unpacked_levels(weight)] * absmax).to(weight.dtype).view(weight.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MATRICES)
def test_bytes_are_those_of_bitsandbytes(name: str, dtype: torch.dtype) -> None:
    matrix = MATRICES[name].to(dtype)
    packed, state = functional.quantize_4bit(matrix, blocksize=64, quant_type="nf4", compress_statistics=True)
    weight = Nf4Weight(matrix)
    assert torch.equal(weight.packed, packed.flatten())
    assert torch.equal(weight.absmax, state.absmax)
    assert torch.equal(weight.scales.view(torch.float32), torch.cat([state.offset.view(1), state.state2.absmax]))
    assert torch.equal(functional.create_dynamic_map(), state.state2.code)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MATRICES)
def test_values_are_those_of_bitsandbytes(name: str, dtype: torch.dtype) -> None:
    matrix = MATRICES[name].to(dtype)
    packed, state = functional.quantize_4bit(matrix, blocksize=64, quant_type="nf4", compress_statistics=True)
    found = Nf4Weight(matrix).dequantize()
    assert (found.shape, found.dtype) == (matrix.shape, dtype)
    assert torch.equal(found, slowly_dequantized(Nf4Weight(matrix)))
    if matrix.shape[1] % 64 == 0:  # elsewhere bitsandbytes' CPU kernel is wrong, see Nf4Weight._quant_state
        assert torch.equal(found, functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("name", [name for name in MATRICES if "zeros" not in name and "denormal" not in name])
def test_each_value_goes_to_the_nearest_level(name: str) -> None:
    matrix = MATRICES[name]
    blocks = torch.nn.functional.pad(matrix.flatten(), (0, -matrix.numel() % 64)).view(-1, 64)
    scaled = (blocks / blocks.abs().amax(1, keepdim=True)).flatten()[: matrix.numel()]
    distances = (scaled[:, None] - torch.tensor(LEVELS)).abs()
    chosen = distances[torch.arange(matrix.numel()), unpacked_levels(Nf4Weight(matrix))]
    # A value half way between two levels may go to either: its distances then differ by the rounding of the division.
    assert (chosen - distances.amin(1)).max() <= 2e-7


def test_a_block_by_hand() -> None:
    """absmax 8. 4 / 8 = 0.5 is nearest to level 12 (0.4407), 2 / 8 = 0.25 to level 10 (0.2461), −6 / 8 to level 1."""
    matrix = torch.zeros(2, 32)
    matrix[0, :4] = torch.tensor([8.0, 4.0, 2.0, -6.0])
    matrix[1, -1] = -8.0
    weight = Nf4Weight(matrix)
    assert weight.packed.tolist() == [0xFC, 0xA1, *[0x77] * 29, 0x70]
    # One block: its absmax is the mean, what is left is 0, and so is the scale of its group.
    assert weight.scales.view(torch.float32).tolist() == [8.0, 0.0]
    expected = torch.zeros(2, 32)
    expected[0, :4] = 8 * torch.tensor([1.0, LEVELS[12], LEVELS[10], LEVELS[1]])
    expected[1, -1] = -8.0
    assert torch.equal(weight.dequantize(), expected)


def test_absmax_of_two_blocks_by_hand() -> None:
    """absmax 1 and 3: mean 2, rests −1 and 1. There is a level 1.0 and none at −1: the lowest is −0.99297."""
    weight = Nf4Weight(torch.tensor([[1.0], [3.0]]).expand(2, 64).contiguous())
    assert weight.scales.view(torch.float32).tolist() == [2.0, 1.0]
    assert weight.absmax.tolist() == [0, 255]
    assert weight.packed.tolist() == [0xFF] * 64
    # The 64 levels of the highest decade are the middles of equal parts of [0.1, 1].
    assert weight.dequantize()[0, 0].item() == pytest.approx(2 - (1 - 0.9 / 64 / 2), rel=1e-6)
    assert weight.dequantize()[1, 0].item() == 3.0


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (576, 1536), (5, 100)])
def test_memory(rows: int, columns: int) -> None:
    weight = Nf4Weight(normal(rows, columns).bfloat16())
    blocks = -(-rows * columns // 64)
    assert weight.nbytes == rows * columns // 2 + blocks + 4 * (1 + -(-blocks // 256))
    assert weight.nbytes <= 0.6 * rows * columns


@pytest.mark.parametrize("dim", [0, 1])
def test_shares_of_whole_blocks_have_the_levels_of_the_whole(dim: int) -> None:
    """Column (0) and row (1) parallel shares; only the statistics of the absmax are each share's own."""
    matrix = normal(64, 256)
    whole, shares = Nf4Weight(matrix), [Nf4Weight(share.contiguous()) for share in matrix.chunk(2, dim)]
    levels = torch.cat([unpacked_levels(share).view(share.shape) for share in shares], dim)
    assert torch.equal(levels, unpacked_levels(whole).view(whole.shape))
    found = torch.cat([share.dequantize() for share in shares], dim)
    # The wider half of the levels of an absmax lies 0.9 / 64 of its group's scale apart; here that scale is about 1.
    assert 0 < (found - whole.dequantize()).abs().max() <= 0.02


def test_it_moves_as_a_module_and_a_cast_leaves_it_alone() -> None:
    weight = Nf4Weight(normal(8, 64))
    before = weight.dequantize()
    assert torch.equal(weight.bfloat16().dequantize(), before)
    assert weight.state_dict() == {}
    assert {buffer.device.type for buffer in weight.to("meta").buffers()} == {"meta"}


def test_every_call_gives_a_new_tensor() -> None:
    weight = Nf4Weight(normal(8, 64))
    first = weight.dequantize()
    kept = first.clone()
    first.zero_()
    assert torch.equal(weight.dequantize(), kept)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        Nf4Weight(normal(2, 64).double())


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
def test_what_float32_cannot_add_up_is_refused(value: float) -> None:
    with pytest.raises(UnpackableError, match=r"shape \[2, 64\] cannot be quantized: .* the checkpoint is damaged"):
        Nf4Weight(torch.full((2, 64), value))


def test_missing_bitsandbytes_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    nf4.bitsandbytes_functional.cache_clear()
    with pytest.raises(ConfigError, match=r"needs bitsandbytes, .* \(pip install bitsandbytes\)"):
        Nf4Weight(normal(2, 64))
