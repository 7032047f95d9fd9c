"""A decode by windows, one a device, against that of whole frames."""

import math

import pytest
import torch
from helpers import relative
from helpers_vae import latents
from lib.random_weights import randomise
from wan21.wan.vae import WanVAE
from wan21.wan.vae.fallback import decode_within_memory
from wan21.wan.vae.spread import largest_share, spread_windows
from wan21.wan.vae.tiling import margins, scaled


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


def at(window):
    return tuple(scaled(span, 8) for span in window)


def decode_window(vae, z, window, **how):
    """What one device does."""
    out = torch.empty(vae.decode_output_shape(z.shape))[(..., *at(window))].clone()
    decode_within_memory(vae, z, out, window=window, **how)
    return out


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

    def check():
        nonlocal failures
        if torch.rand((), generator=g) < 0.1 and failures:
            failures -= 1
            raise Lost

    g = torch.Generator().manual_seed(0)
    while left:
        window = left.pop(0)
        try:
            out[(..., *at(window))] = decode_window(vae, z, window, check=check)
        except Lost:
            left.append(window)
    assert not failures
    assert relative(out, expected) < 1e-5


@pytest.mark.parametrize("calls", [0, 1])  # of the last residual block that go well
def test_a_window_goes_on_in_tiles_where_memory_runs_out(vae, calls):
    """In its own place, from the first missing frame on."""
    z, said, done = latents(2, 1, 50), [], []
    window = slice(0, 1), slice(10, 50)
    left = calls

    def too_large(_, args):
        nonlocal left
        left -= 1
        if left < 0 and args[0].shape[-1] > 200:
            raise torch.OutOfMemoryError("simulated")

    hook = vae.decoder.upsamples[-1].register_forward_pre_hook(too_large)
    got = decode_window(vae, z, window, retreat=said.append, progress=lambda *count: done.append(count))
    hook.remove()
    assert relative(got, vae.decode(z)[..., 80:]) < 1e-5
    assert [sentence.split("in ")[-1] for sentence in said][:1] == ["tiles of 256 pixels"]
    assert done == sorted(done) and done[-1] == (5, 5)


@pytest.mark.parametrize("missing", [1, 4])
def test_with_less_margin_there_is_a_seam(vae, missing, monkeypatch):
    """A control: windows that read a few pixels less are not exact."""
    from wan21.wan.vae import tiling

    monkeypatch.setattr(tiling, "margins", lambda stages: [max(0, m - missing) for m in margins(stages)])
    z = latents(2, 1, 33)
    window, _ = spread_windows(vae, 1, 33, 2)
    assert relative(decode_window(vae, z, window), vae.decode(z)[(..., *at(window))]) > 1e-5


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
