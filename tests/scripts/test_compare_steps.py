"""What `scripts/compare_steps.py` counts, on clips whose numbers are known."""

import compare_steps
import pytest
import torch
from wan21.training import data, metrics
from wan21.training.held_out import held_out, pictures

SIZE = (17, 64, 64)


@pytest.fixture(scope="module")
def picture():
    return pictures(0, 1, SIZE)[0]


def test_a_camera_clip_counts_for_the_camera_alone(picture):
    clip = compare_steps.Clip(picture, data.as_motion("zoom in"), 0)
    video, _ = metrics.warped(picture, "zoom in", SIZE[0])
    first, camera, shape, nearness, sharpness, seconds = compare_steps.measured(
        clip, video, video, 2.0
    ).tolist()
    assert first > 40 and camera == 1 and shape != shape
    assert nearness == pytest.approx(100) and sharpness == pytest.approx(100) and seconds == 2
    still = picture.expand_as(video)
    assert compare_steps.measured(clip, still, video, 2.0)[1] == 0


def test_a_shape_clip_counts_for_shapes_alone():
    motion = data.Motion("object", "move", "red", "circle", "left")
    [video], _ = held_out(0, 1, SIZE, [motion])
    clip = compare_steps.Clip(video[0], motion, 0)
    _, camera, shape, *_ = compare_steps.measured(clip, video, video, 1.0).tolist()
    assert camera != camera and shape == 1
    assert compare_steps.measured(clip, video.flip(0), video, 1.0)[2] == 0


def test_sharpness_falls_with_blur_and_nearness_with_noise(picture):
    clip = compare_steps.Clip(picture, data.as_motion("still"), 0)
    video = picture.expand(*SIZE[:1], -1, -1, -1)
    blurred = torch.nn.functional.avg_pool2d(video, 3, 1, 1, count_include_pad=False)
    assert compare_steps.measured(clip, blurred, video, 1.0)[4] < 90
    noisy = video + 0.1 * (torch.rand(video.shape, generator=torch.Generator().manual_seed(0)) < 0.5)
    assert compare_steps.measured(clip, noisy, video, 1.0)[3].item() == pytest.approx(23.01, abs=0.1)


def test_the_table_leaves_out_what_was_not_measured():
    text = compare_steps.as_table({"a": [30.0, 1.0, 0.5, 100.0, 100.0, float("nan")]})
    assert text.splitlines()[-1] == "| a | 30.0 dB | 100 % | 50 % |  | 100 % |  |"


def test_half_of_the_clips_move_the_camera():
    clips = compare_steps.clips_of(1, 64)
    assert [clip.motion.kind for clip in clips] == ["camera"] * 9 + ["object"] * 9
    assert len({clip.seed for clip in clips}) == 18
