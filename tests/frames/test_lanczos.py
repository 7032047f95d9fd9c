"""Lanczos against Pillow, and tiles against the whole."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from wan21.frames.lanczos import even_side, lanczos, tile_spans, upscale_tiled


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(64, 96), (51, 33), (7, 3)])
@pytest.mark.parametrize("scale", [1.5, 2])
@pytest.mark.parametrize("kind", ["noise", "edges"])
def test_lanczos_is_pillows(size, scale, kind):
    """To one step of 8 bits, overshoot at edges included; larger sides take several blocks."""
    pixels = noise(*size, 3) if kind == "noise" else (noise(*size, 3) > 0.5).float()
    eight_bit = (pixels * 255).round().byte()
    height, width = (even_side(side, scale) for side in size)
    expected = np.asarray(Image.fromarray(eight_bit.numpy()).resize((width, height), Image.LANCZOS))
    found = lanczos(eight_bit.permute(2, 0, 1)[None].float() / 255, height, width)[0].permute(1, 2, 0)
    assert np.abs((found * 255).round().numpy() - expected).max() <= 1


@pytest.mark.parametrize("height, width", [(60, 105), (26, 40)])
def test_lanczos_is_pillows_in_float(height, width):
    plane = 0.3 + 0.4 * noise(40, 70)  # does not overshoot, so neither clamps
    expected = np.asarray(Image.fromarray(plane.numpy()).resize((width, height), Image.LANCZOS))
    assert np.abs(lanczos(plane[None, None], height, width)[0, 0].numpy() - expected).max() < 2e-6


def test_lanczos_batch_equals_frame_by_frame():
    x = noise(3, 3, 20, 30)
    assert torch.equal(lanczos(x, 40, 60), torch.cat([lanczos(frame[None], 40, 60) for frame in x]))


@settings(deadline=None)
@given(st.integers(1, 4096), st.sampled_from([1.5, 2, 1]))
def test_sides_are_even_and_nearest(side, scale):
    found = even_side(side, scale)
    assert found % 2 == 0 and abs(found - side * scale) <= 1


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(33, 128))
def test_tiles_cover_a_side_once(length, tile):
    shares = torch.zeros(length)
    spans = tile_spans(length, tile, 32)
    for first, share in spans:
        assert first >= 0 and first + len(share) <= length and (share > 0).all()
        shares[first : first + len(share)] += share
    assert torch.allclose(shares, torch.ones(length), atol=1e-6)
    for (a, share), (b, _) in itertools.pairwise(spans):
        assert a + len(share) - b >= 32


def test_tiles_of_a_local_upscaler_equal_the_whole():
    conv = torch.nn.Conv2d(3, 12, 5, padding=2)
    model = torch.nn.Sequential(conv, torch.nn.PixelShuffle(2), torch.nn.Sigmoid())
    x, seen = noise(2, 3, 90, 70), []
    with torch.inference_mode():
        whole = upscale_tiled(model, x, 2, tile=128, overlap=32)
        assert torch.equal(whole, model(x))
        tiled = upscale_tiled(model, x, 2, tile=48, overlap=32, on_tile=lambda: seen.append(1))
    assert len(seen) > 4
    inside = (slice(None), slice(None), slice(8, -8), slice(8, -8))  # the model pads at each tile's border
    assert (tiled - whole)[inside].abs().max() < 0.1
    assert (tiled - whole)[inside].abs().mean() < 2e-3
