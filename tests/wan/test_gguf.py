"""Unpacked GGUF blocks equal those of the gguf package bit for bit, for any bytes."""

import gguf
import numpy as np
import pytest
import torch
from helpers import relative
from wan21.wan.files import gguf as wg


def random_bytes(kind, blocks, seed):
    """Blocks of random bits, with the half-precision numbers in them finite."""
    numbers, size = wg.BLOCKS[kind]
    data = np.random.default_rng(seed).integers(0, 256, (blocks, size), dtype=np.uint8)
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,)}
    plain = {"F32": (2,), "F16": (0,), "BF16": (0,)}
    for at in halves.get(kind) or plain.get(kind) or (0, 2):
        data[:, at + 1] &= 0xBB  # an exponent bit less: no infinities and NaN
    return data.reshape(4, -1), (4, blocks // 4 * numbers)


@pytest.mark.parametrize("kind", wg.BLOCKS)
def test_equal_to_the_package_bit_for_bit(kind):
    for seed in range(3):
        data, shape = random_bytes(kind, 24, seed)
        expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
        ours = wg.dequantize(torch.from_numpy(data), kind, shape)
        assert ours.dtype == torch.float32 and np.isfinite(expected).all()
        assert np.array_equal(ours.numpy().view(np.uint32), expected.reshape(shape).view(np.uint32))
        assert data.size == wg.packed_bytes(kind, shape)
        half = wg.dequantize(torch.from_numpy(data), kind, shape, torch.bfloat16)
        assert torch.equal(half, ours.bfloat16())


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16"])
def test_weights_come_back_close(kind):
    """Quantised by the package: the error is that of the bits."""
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    data = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
    back = wg.dequantize(torch.from_numpy(data.view(np.uint8)), kind, (6, 64))
    bound = {"Q4": 0.2, "Q5": 0.1, "Q8": 0.01, "BF": 0.01, "F1": 0.001}[kind[:2]]
    assert relative(back, weight) < bound


@pytest.mark.parametrize("kind", ["IQ2_XXS", "IQ4_NL", "IQ4_XS", "TQ2_0"])
def test_other_types_are_unpacked_by_the_package(kind):
    quant = gguf.GGMLQuantizationType[kind]
    numbers, size = gguf.GGML_QUANT_SIZES[quant]
    data = np.random.default_rng(1).integers(0, 256, (4, 3 * size), dtype=np.uint8)
    expected, shape = gguf.quants.dequantize(data, quant), (4, 3 * numbers)
    assert wg.packed_bytes(kind, shape) == data.size
    ours = wg.dequantize(torch.from_numpy(data), kind, shape)
    assert ours.dtype == torch.float32 and ours.shape == shape
    assert np.array_equal(ours.numpy(), expected, equal_nan=True)
    half = wg.dequantize(torch.from_numpy(data).reshape(-1), kind, (2, 2, 3 * numbers), torch.bfloat16)
    assert torch.equal(half.flatten().nan_to_num(), ours.bfloat16().flatten().nan_to_num())


def test_the_table_of_blocks_is_the_packages():
    for kind, block in wg.BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == block


def test_what_cannot_be_read_is_named():
    with pytest.raises(ValueError, match=r"the GGUF type Q8_K is not read here\. Pick a file in one of"):
        wg.packed_bytes("Q8_K", (4, 256))
    with pytest.raises(ValueError, match=r"the GGUF type Q99 is not read here\. Pick a file in one of"):
        wg.packed_bytes("Q99", (4, 256))
    with pytest.raises(ValueError, match="rows of 100 numbers are no whole blocks of 256"):
        wg.packed_bytes("Q6_K", (4, 100))
