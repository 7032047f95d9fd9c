"""Before any training the VAE is already a code for clips, and its latents tell the four frames apart."""

import copy

import pytest
import torch
from wan21.training import data, linear_start, metrics, train_vae
from wan21.wan.vae import WanVAE

CLIP = (13, 64, 64)  # frames, height, width


@pytest.fixture(scope="module")
def started():
    patch = pytest.MonkeyPatch()
    patch.setattr(linear_start, "SIZES", ((8, 9, 64, 64),))
    vae = WanVAE(dim=8)
    norm = train_vae.LatentNorm()
    train_vae.initialize(vae)
    linear_start.start_linear(vae, norm)
    patch.undo()
    return vae.requires_grad_(False), norm.eval()


def test_clips_come_back(started):
    vae, norm = started
    for motion in ("still", "pan left", data.Motion("object", "move", "red", "circle", "up")):
        video = data.clips(data.HELD_OUT + 5, 1, *CLIP, motions=[motion])[0]
        back = vae.decode(norm(vae.encode(video)))
        assert metrics.psnr(back / 2, video / 2) > 22, motion


def test_latents_are_of_unit_variance(started):
    vae, norm = started
    z = norm(vae.encode(data.clips(linear_start.SEED, 8, 9, 64, 64)[0]))
    assert z.mean().abs() < 0.2 and z.std() == pytest.approx(1, abs=0.2)


def test_latents_tell_the_four_frames_apart(started):
    """One picture added to one of the four frames: where it was added matters, not only that it was."""
    vae, norm = started
    motion = data.Motion("object", "move", "white", "square", "left")
    video = data.clips(data.HELD_OUT + 6, 1, 9, 64, 64, motions=[motion])[0]
    bump = 0.05 * torch.linspace(-6, 6, 64).sin()
    plain, moved = norm(vae.encode(video)), []
    for frame in range(5, 9):
        other = video.clone()
        other[:, :, frame] += bump
        moved.append((norm(vae.encode(other)) - plain)[:, :, 2].flatten())
    strength = torch.linalg.svdvals(torch.stack(moved))
    assert strength[1] > 0.1 * strength[0]


def test_latents_vary_as_pixels_do_and_decode_to_the_same(started):
    vae, norm = (copy.deepcopy(part) for part in started)
    train_vae.fold(vae, norm, batches=4)
    video = data.clips(data.HELD_OUT + 7, 2, 9, 64, 64)[0]
    before, metric = vae.decode(vae.encode(video)), train_vae.pixel_metric(vae, vae.encode(video), 0)
    train_vae.weigh_by_pixels(vae, batches=2, power=1)
    z = vae.encode(video)
    assert (vae.decode(z) - before).abs().max() < 1e-3
    flat = train_vae.standardized(z).transpose(0, 1).flatten(1)
    assert flat.mean(1).abs().max() < 0.4 and (flat.std(1).log().abs() < 0.7).all()
    uneven = torch.linalg.eigvalsh(metric)
    even = torch.linalg.eigvalsh(train_vae.pixel_metric(vae, z, 0))
    assert uneven[-1] / uneven[1] > 20 > 4 > even[-1] / even[1]
