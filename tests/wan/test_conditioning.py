"""Frame arithmetic, masks and resizing, against the release's own construction."""

import pytest
import torch
import torch.nn.functional as F
from wan21.wan.conditioning import (
    fit_image,
    keep_aspect_size,
    known_mask,
    latent_frames,
    pixel_frames,
    pixel_video,
)


def released_mask(num_frames, known, height, width):
    """The release's steps (wan/image2video.py): one bit a pixel frame, the first four times, in fours."""
    mask = torch.zeros(1, num_frames, height // 8, width // 8)
    mask[:, known] = 1
    mask = torch.cat([mask[:, :1].repeat_interleave(4, dim=1), mask[:, 1:]], dim=1)
    return mask.view(1, -1, 4, height // 8, width // 8).transpose(1, 2)


@pytest.mark.parametrize("num_frames", [1, 5, 81, 129])
def test_start_mask(num_frames):
    assert torch.equal(known_mask(num_frames, 32, 48), released_mask(num_frames, [0], 32, 48))


@pytest.mark.parametrize("start_frames", [5, 9, 77])
def test_mask_of_several_start_frames(start_frames):
    expected = released_mask(81, [*range(start_frames)], 32, 48)
    assert torch.equal(known_mask(81, 32, 48, start_frames=start_frames), expected)


@pytest.mark.parametrize("num_frames", [5, 81])
def test_end_mask(num_frames):
    mask = known_mask(num_frames, 32, 48, end=True)
    assert torch.equal(mask, released_mask(num_frames, [0, -1], 32, 48))
    assert mask[0, :, -1, 0, 0].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("num_frames", [5, 81])
def test_end_alone_mask(num_frames):
    """Wan2GP's form: one pixel frame more, first and last counted four times."""
    bits = torch.zeros(num_frames + 1)
    bits[0] = bits[-1] = 1
    bits = torch.cat([bits[:1].repeat(4), bits[1:-1], bits[-1:].repeat(4)])
    mask = known_mask(num_frames, 16, 16, end=True, end_alone=True)
    assert torch.equal(mask[0, :, :, 0, 0], bits.view(-1, 4).T)
    assert mask.shape[2] == latent_frames(num_frames) + 1


def test_frames():
    assert [latent_frames(n) for n in (1, 5, 81)] == [1, 2, 21]
    assert [pixel_frames(n) for n in (1, 2, 21)] == [1, 5, 81]


@pytest.mark.parametrize(
    "image, budget, expected",
    [
        ((832, 480), (832, 480), (832, 480)),
        ((1920, 1080), (832, 480), (848, 480)),
        ((1080, 1920), (832, 480), (480, 848)),
        ((100, 100), (64, 64), (64, 64)),
        ((4000, 10), (64, 64), (1280, 16)),
    ],
)
def test_keep_aspect(image, budget, expected):
    assert keep_aspect_size(*image, *budget) == expected


def test_keep_aspect_stays_near_the_area():
    for width in range(200, 4000, 137):
        w, h = keep_aspect_size(width, 1000, 832, 480)
        assert w % 16 == h % 16 == 0
        assert abs(w * h / (832 * 480) - 1) < 0.04
        assert abs((w / h) / (width / 1000) - 1) < 0.06


@pytest.fixture
def image():
    return torch.rand(1, 40, 60, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mode", ["crop", "stretch", "pad"])
def test_the_right_size_is_left_alone(image, mode):
    assert fit_image(image, 60, 40, mode) is image


def test_crop_takes_the_middle(image):
    assert torch.equal(fit_image(image, 40, 40, "crop"), image[:, :, 10:50])
    assert torch.equal(fit_image(image, 60, 20, "crop"), image[:, 10:30])
    assert fit_image(image[:, :8, :8], 832, 16, "crop").shape == (len(image), 16, 832, 3)  # 0.15 pixels high


def test_pad_centres_on_grey(image):
    padded = fit_image(image, 80, 40, "pad")
    assert torch.equal(padded[:, :, 10:70], image)
    assert padded[:, :, :10].eq(0.5).all() and padded[:, :, 70:].eq(0.5).all()


def test_stretch_is_antialiased_bicubic(image):
    small = fit_image(image, 30, 20, "stretch")
    expected = F.interpolate(image.movedim(-1, 1), (20, 30), mode="bicubic", antialias=True)
    assert torch.equal(small, expected.clamp(0, 1).movedim(1, -1))


def test_unknown_mode_is_named(image):
    with pytest.raises(ValueError, match="resize_mode is 'zoom'; it is one of crop, stretch, pad"):
        fit_image(image, 30, 20, "zoom")


def test_pixel_video(image):
    start, end = image, image[0].flip(0)
    video = pixel_video(start, 9, end)
    assert video.shape == (9, 40, 60, 3)
    assert torch.equal(video[:1], start) and torch.equal(video[-1], end)
    assert video[1:-1].eq(0.5).all()
    assert pixel_video(start, 9)[1:].eq(0.5).all()
    several = pixel_video(torch.cat([start] * 5), 9)
    assert torch.equal(several[4:5], start) and several[5:].eq(0.5).all()
