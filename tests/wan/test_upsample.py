"""Lanczos against Pillow, tiles against the whole, and what lies between two frames."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from wan21.wan.upsample import (
    Span,
    even_side,
    frame_changes,
    lanczos,
    plan_spans,
    tile_spans,
    upscale_tiled,
)


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def blobs(seed, size=64):
    """A smooth random picture [size, size, 3]."""
    small = noise(1, 3, 6, 6, seed=seed)
    return torch.nn.functional.interpolate(small, size=size, mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0)


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


def test_new_frames_lie_evenly():
    assert Span(3, 4).times(4) == [0.25, 0.5, 0.75]
    assert Span(3, 5).times(2) == [0.25, 0.5, 0.75]


def test_motion_cuts_and_duplicates():
    a, b = blobs(1), blobs(2)
    moving = [a.roll(2 * i, 1) for i in range(5)]
    other = [b.roll(2 * i, 0) for i in range(3)]
    clip = torch.stack([*moving, *other])
    plan = plan_spans(*frame_changes(clip))
    assert plan == [Span(i, i + 1, cut=i == 4) for i in range(7)]
    assert not any(span.cut for span in plan_spans(*frame_changes(clip), scene_cut=1))
    assert all(span.cut for span in plan_spans(*frame_changes(clip), scene_cut=0))


def test_a_single_duplicate_is_bridged_and_a_hold_is_kept():
    frames = [blobs(1).roll(2 * i, 1) for i in range(8)]
    frames[3] = frames[2] + 1e-3 * noise(64, 64, 3)  # as a codec leaves it
    plan = plan_spans(*frame_changes(torch.stack(frames)))
    assert plan == [Span(0, 1), Span(1, 2), Span(2, 4), Span(4, 5), Span(5, 6), Span(6, 7)]
    held = [*frames[:3], *[frames[3]] * 3, *frames[4:]]
    assert plan_spans(*frame_changes(torch.stack(held))) == [Span(i, i + 1) for i in range(9)]


def test_a_duplicate_before_a_cut_or_at_the_end_is_kept():
    frames = [blobs(1).roll(2 * i, 1) for i in range(3)]
    plan = plan_spans(*frame_changes(torch.stack([*frames, frames[-1], blobs(2)])))
    assert plan == [Span(0, 1), Span(1, 2), Span(2, 3), Span(3, 4, cut=True)]
    assert plan_spans(*frame_changes(torch.stack([*frames, frames[-1]])))[-1] == Span(2, 3)


def test_a_still_clip_has_neither_cuts_nor_duplicates():
    still = blobs(3).expand(4, -1, -1, -1)
    assert plan_spans(*frame_changes(still)) == [Span(i, i + 1) for i in range(3)]


def test_animation_on_twos_moves_on_ones():
    frames = torch.stack([blobs(1).roll(4 * (i // 2), 1) for i in range(7)])
    assert plan_spans(*frame_changes(frames)) == [Span(0, 2), Span(2, 4), Span(4, 6)]
