"""Cuts, duplicates and motion between two frames."""

import torch
from wan21.frames.spans import Span, frame_changes, plan_spans


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def blobs(seed, size=64):
    """A smooth random picture [size, size, 3]."""
    small = noise(1, 3, 6, 6, seed=seed)
    return torch.nn.functional.interpolate(small, size=size, mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0)


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
