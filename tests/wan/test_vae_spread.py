"""A decode by windows, one a device, against that of whole frames."""

import math

import pytest
import torch
from helpers import relative
from helpers_vae import latents
from lib.random_weights import randomise
from wan21.wan.vae import WanVAE
from wan21.wan.vae.spread import decode_window, largest_share, spread_windows
from wan21.wan.vae.tiling import margins


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def vae():
    return randomise(WanVAE(dim=4))


RELEASE = WanVAE(device="meta")


class Lost(Exception):
    """A device that is gone."""


@pytest.mark.parametrize(
    "devices, frames, h, w, batch",
    [
        (1, 2, 3, 4, 1),
        (2, 2, 2, 31, 1),
        (3, 1, 1, 50, 2),
        (4, 1, 18, 18, 1),
        (5, 1, 3, 2, 1),
        (8, 1, 4, 17, 1),
    ],
)
def test_windows_make_the_whole_though_one_is_lost(vae, devices, frames, h, w, batch):
    z = latents(frames, h, w, batch)
    expected = vae.decode(z)
    out = torch.full_like(expected, math.nan)
    left, failures = spread_windows(vae, h, w, devices), 1
    while left:
        rows, columns = window = left.pop(0)
        try:
            for f, pixels in decode_window(vae, z, window):
                place = out[..., rows.start * 8 : rows.stop * 8, columns.start * 8 : columns.stop * 8]
                place[:, :, f : f + pixels.shape[2]] = pixels
                if failures:
                    failures -= 1
                    raise Lost
        except Lost:
            left.append(window)
    assert relative(out, expected) < 1e-5


@pytest.mark.parametrize("missing", [1, 4])
def test_with_less_margin_there_is_a_seam(vae, missing, monkeypatch):
    """A control: windows that read a few pixels less are not exact."""
    from wan21.wan.vae import tiling

    monkeypatch.setattr(tiling, "margins", lambda stages: [max(0, m - missing) for m in margins(stages)])
    z = latents(2, 1, 33)
    (rows, columns), _ = spread_windows(vae, 1, 33, 2)
    part = torch.cat([pixels for _, pixels in decode_window(vae, z, (rows, columns))], 2)
    assert relative(part, vae.decode(z)[..., : columns.stop * 8]) > 1e-5


@pytest.mark.parametrize(
    "h, w, speed_ups",  # of 2, 3, 4 and 8 devices, at 480p and 720p
    [(60, 104, (1.86, 2.46, 3.28, 5.37)), (90, 160, (1.90, 2.63, 3.45, 5.93))],
)
def test_the_largest_share_at_released_sizes(h, w, speed_ups):
    """Against a count of all layers of the release, from outside."""
    for devices, expected in zip((2, 3, 4, 8), speed_ups):
        for sides in ((h, w), (w, h)):
            windows = spread_windows(RELEASE, *sides, devices)
            assert len(windows) == devices
            share = largest_share(RELEASE, *sides, windows)
            assert 1 / share == pytest.approx(expected, rel=0.015)


def test_windows_cover_each_pixel_once():
    for devices in range(1, 13):
        for h, w in ((1, 1), (3, 50), (60, 104)):
            seen, windows = torch.zeros(h, w), spread_windows(RELEASE, h, w, devices)
            for rows, columns in windows:
                seen[rows, columns] += 1
            assert (seen == 1).all() and len(windows) <= devices
