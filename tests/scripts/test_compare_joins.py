"""What `scripts/compare_joins.py` counts, on clips whose numbers are known."""

import compare_joins
import pytest
import torch
from kornia.color import lab_to_rgb


def of_lab(*channels):
    """A frame [2, 2, 3] whose L* is given for each of two columns, and a* and b* for all."""
    dark, light, a, b = channels
    lab = torch.tensor([[dark, light], [a, a], [b, b]])[:, None].expand(3, 2, 2).double()
    return lab_to_rgb(lab).movedim(0, -1)


def test_new_frames_of_each_segment():
    assert compare_joins.bounds(17, 1) == [(0, 17), (17, 33), (33, 49)]
    assert compare_joins.bounds(17, 5) == [(0, 17), (17, 29), (29, 41)]


def test_drift_is_distance_of_the_mean_and_share_of_contrast():
    start, moved = of_lab(40.0, 60.0, 0.0, 0.0), of_lab(38.0, 68.0, 4.0, 0.0)
    video = torch.stack([start, start, moved])
    [(same, all_of_it), (distance, contrast)] = compare_joins.drift(video, start, [(0, 2), (2, 3)])
    assert same == pytest.approx(0, abs=1e-9) and all_of_it == pytest.approx(100)
    assert distance == pytest.approx(5, abs=1e-5) and contrast == pytest.approx(
        150, abs=1e-4
    )  # 3, 4; 15 of 10


@pytest.mark.parametrize("known, at", [(1, 3), (1, 4), (3, 1), (3, 4)])
def test_seam_is_the_largest_change_around_a_join_over_that_elsewhere(known, at):
    """Frames 0 ... 8 of a ramp; the change after frame `at` is five times as large."""
    steps = torch.full((8,), 0.01)
    steps[at] = 0.05
    video = torch.cat([torch.zeros(1), steps.cumsum(0)])[:, None, None, None].expand(9, 2, 2, 3)
    assert compare_joins.seam(video, [(0, 5), (5, 9)], known) == pytest.approx(5, rel=1e-4)


def test_a_video_without_seams_has_none():
    video = torch.arange(9.0)[:, None, None, None].expand(9, 2, 2, 3) / 10
    assert compare_joins.seam(video, [(0, 5), (5, 9)], 1) == pytest.approx(1)
