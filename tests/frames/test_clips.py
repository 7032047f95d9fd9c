"""Joined clips against weights by hand, in float64; colours against the host's formula written out."""

import pytest
import torch
from kornia.color import lab_to_rgb, rgb_to_lab
from wan21.frames.clips import blend_weights, join_clips
from wan21.frames.color import match_colors

CPU = torch.device("cpu")


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_weights_by_hand():
    assert blend_weights("linear", 1) == [0.5]
    assert blend_weights("linear", 4) == [0.2, 0.4, 0.6, 0.8]
    assert blend_weights("smooth", 1) == [0.5]
    assert blend_weights("smooth", 3) == [0.15625, 0.5, 0.84375]  # 3t²-2t³ at 1/4, 1/2, 3/4
    assert blend_weights("cut", 2) == [0, 0]
    assert all(blend_weights(blend, 0) == [] for blend in ("linear", "smooth", "cut"))


@pytest.mark.parametrize("blend, share", [("linear", (0.25, 0.5, 0.75)), ("smooth", (0.15625, 0.5, 0.84375))])
def test_overlap_is_blended(blend, share):
    first, second = noise(5, 4, 6, 3), noise(7, 4, 6, 3, seed=1)
    found = join_clips(first, second, 3, blend)
    assert found.shape == (9, 4, 6, 3) and found.dtype == torch.float64
    assert torch.equal(found[:2], first[:2]) and torch.equal(found[5:], second[3:])
    for k, weight in enumerate(share):
        expected = (1 - weight) * first[2 + k] + weight * second[k]
        assert torch.allclose(found[2 + k], expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("overlap", [0, 1, 4])
def test_cut_keeps_the_first_clip(overlap):
    first, second = noise(4, 2, 2, 3), noise(6, 2, 2, 3, seed=1)
    assert torch.equal(join_clips(first, second, overlap, "cut"), torch.cat([first, second[overlap:]]))


@pytest.mark.parametrize("blend", ["linear", "smooth", "cut"])
def test_without_overlap_one_follows_the_other(blend):
    first, second = noise(1, 2, 2, 3), noise(3, 2, 2, 3, seed=1)
    assert torch.equal(join_clips(first, second, 0, blend), torch.cat([first, second]))


def test_a_second_clip_of_overlap_alone_adds_no_frame():
    first, second = noise(4, 2, 2, 3), noise(2, 2, 2, 3, seed=1)
    found = join_clips(first, second, 2, "linear")
    assert len(found) == 4 and torch.equal(found[:2], first[:2])
    assert torch.allclose(found[3], first[3] / 3 + second[1] * 2 / 3, rtol=0, atol=1e-15)


def test_the_wider_type_is_kept():
    half, single = noise(3, 2, 2, 3).half(), noise(3, 2, 2, 3, seed=1).float()
    for first, second in ((half, single), (single, half)):
        found = join_clips(first, second, 1, "linear")
        assert found.dtype == torch.float32
        assert torch.allclose(found[2], (first[2].float() + second[0].float()) / 2, atol=1e-7)


def test_progress_counts_every_frame_and_what_it_raises_ends_the_work():
    first, second, seen = noise(3, 2, 2, 3), noise(4, 2, 2, 3), []
    join_clips(first, second, 2, "linear", progress=lambda *at: seen.append(at))
    assert seen == [(i, 5) for i in range(1, 6)]

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        join_clips(first, second, 2, "linear", progress=stop)


def lab(frames):
    return rgb_to_lab(frames.movedim(-1, 1))


def rgb(planes):
    return lab_to_rgb(planes).movedim(1, -1)


def statistics(planes):
    return planes.mean(dim=(0, 2, 3)), planes.std(dim=(0, 2, 3), unbiased=False)


def shaded(seed=0, count=2):
    """Frames of middling colours, far from the borders of RGB."""
    return 0.3 + 0.4 * noise(count, 16, 20, 3, seed=seed)


def test_colours_get_mean_and_deviation_of_the_reference():
    source, reference = shaded(1), 0.8 * shaded(2) + 0.06
    match = match_colors(source, reference, CPU)
    matched = torch.stack([match(frame) for frame in source]).double()
    for found, wanted in zip(statistics(lab(matched)), statistics(lab(reference))):
        assert torch.allclose(found, wanted, atol=2e-3)
    assert not match.limited


def test_a_known_change_of_lab_is_undone():
    frames = shaded()
    mean = lab(frames).mean(dim=(0, 2, 3), keepdim=True)
    changed = rgb((lab(frames) - mean) * 0.9 + mean + torch.tensor([3.0, -2.0, 4.0])[None, :, None, None])
    match = match_colors(changed, frames, CPU)
    assert torch.allclose(match(changed[1]).double(), frames[1], atol=1e-4)
    assert torch.allclose(match.gain.flatten(), torch.tensor(1 / 0.9), atol=1e-4)
    assert torch.allclose(match.shift.flatten(), torch.tensor([-3.0, 2.0, -4.0]), atol=1e-3)


def test_the_same_colours_stay():
    frames = shaded()
    match = match_colors(frames, frames, CPU)
    assert torch.allclose(match(frames[0]).double(), frames[0], atol=1e-5) and not match.limited


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_gain_and_shift_are_bounded(value):
    """Of a flat picture nothing is known of the contrast; a later frame may have some."""
    flat, other = torch.full((1, 8, 8, 3), value), noise(1, 8, 8, 3)
    match = match_colors(flat, other, CPU)
    assert match.limited
    assert match.gain.max() <= 1.25 and match.gain.min() >= 1 / 1.25
    assert match.shift.abs().max() <= 10
    changed = match(shaded()[0])
    assert torch.isfinite(changed).all() and changed.min() >= 0 and changed.max() <= 1


def test_two_flat_pictures_differ_in_shift_alone():
    match = match_colors(torch.full((1, 8, 8, 3), 0.5), torch.full((1, 8, 8, 3), 0.52), CPU)
    assert torch.equal(match.gain, torch.ones(3, 1, 1)) and not match.limited
    assert torch.allclose(match(torch.full((8, 8, 3), 0.5)), torch.tensor(0.52), atol=1e-4)


def test_many_joins_do_not_run_away():
    """Every clip is matched from its own frames, so that an error of one does not grow in the next."""
    clips = [shaded(seed) * 0.9**seed for seed in range(12)]
    joined = clips[0]
    for clip in clips[1:]:
        match = match_colors(clip[:1], joined[-1:], CPU)
        joined = join_clips(joined, clip, 1, "cut", match)
    assert len(joined) == 13
    means, deviations = zip(*(statistics(lab(frame[None])) for frame in joined.double()))
    raw = [statistics(lab(clip[1:])) for clip in clips[1:]]
    for (mean, deviation), found, spread in zip(raw, means[2:], deviations[2:]):
        assert (found - mean).abs().max() <= 10 + 1
        assert (spread / deviation).max() <= 1.25 + 0.01
