"""Previews by TAEHV, Wan2.1's tiny decoder, from the host's vae_approx folder."""

import json

import comfy.latent_formats
import comfy.taesd.taehv
import folder_paths
import latent_preview
import numpy as np
import pytest
import torch
from helpers import relative
from lib import bundled
from PIL import Image
from safetensors.torch import save_file
from wan21 import host
from wan21.wan.refusal import Refusal

PICTURE = Image.new("RGB", (8, 8))


@pytest.fixture(scope="module")
def taehv():
    """Random weights in the published layout, whose sizes are fixed, rounded to float16."""
    model = comfy.taesd.taehv.TAEHV(latent_channels=16)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = (noise / parameter[0].numel() ** 0.5).half().float()
    model.decoder[22].bias.data += 0.5  # mid-grey
    return model


@pytest.fixture
def colours():
    """A colour for each latent pixel, as the host previews by default."""
    latent_preview.set_preview_method("latent2rgb")
    yield
    latent_preview.set_preview_method("default")


@pytest.fixture
def taesd_method():
    latent_preview.set_preview_method("taesd")
    yield
    latent_preview.set_preview_method("default")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    endings = folder_paths.folder_names_and_paths["vae_approx"][1]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "vae_approx", ([str(tmp_path)], endings))
    return tmp_path


def test_the_strip_is_decoded_by_taehv(models, taehv, taesd_method, folder):
    weights = {name: tensor.half().contiguous() for name, tensor in taehv.state_dict().items()}
    save_file(weights, folder / "taew2_1.safetensors")
    x0 = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    strip = host.StepProgress(models["t2v"], 3).strip(x0)
    assert strip.size == (2 * 48, 32)
    for i in range(2):
        frame = taehv.decode(x0[:, :, i : i + 1])[0, :, 0].permute(1, 2, 0).clamp(0, 1) * 255
        assert frame.std() > 10
        ours = np.asarray(strip.crop((48 * i, 0, 48 * (i + 1), 32))).astype(float)
        assert np.abs(ours - frame.numpy()).max() < 1.5


def test_without_the_file_the_host_chooses(models, taesd_method, folder):
    x0 = torch.randn(1, 16, 2, 4, 6)
    assert host.StepProgress(models["t2v"], 3).strip(x0).size == (2 * 6, 4)  # a colour per latent pixel


def test_a_tiny_decoder_is_not_the_managers(models, taehv, taesd_method, folder, monkeypatch):
    """It would take weights off the device, in the middle of a run, for a preview."""
    save_file({k: v.contiguous() for k, v in taehv.state_dict().items()}, folder / "taew2_1.safetensors")
    progress = host.StepProgress(models["t2v"], 3)
    monkeypatch.setattr("comfy.model_management.load_models_gpu", lambda *_, **__: pytest.fail("loaded"))
    assert progress.strip(torch.zeros(1, 16, 2, 4, 6)).size == (2 * 48, 32)


def test_a_preview_that_fails_ends_the_previews_and_not_the_run(models, prompts, sample, caplog, monkeypatch):
    class Broken:
        def decode_latent_to_preview(self, x0):
            tried.append(x0)
            raise torch.OutOfMemoryError("CUDA out of memory.")

    tried = []
    job = (models["t2v"], *prompts, {"samples": torch.zeros(1, 16, 2, 4, 4)})
    plain = sample(*job, steps=3)[0]["samples"]
    monkeypatch.setattr("wan21.host.progress.previewer_for", lambda model: Broken())
    with caplog.at_level("INFO"):
        assert torch.equal(sample(*job, steps=3)[0]["samples"], plain)
    assert len(tried) == 1 and "no more previews in this run (CUDA out of memory.)" in caplog.text


def test_a_broken_tiny_decoder_does_not_cost_the_run(models, prompts, sample, caplog, taesd_method, folder):
    (folder / "taew2_1.safetensors").write_bytes(b"a download that ended early")
    with caplog.at_level("INFO"):
        sample(models["t2v"], *prompts, {"samples": torch.zeros(1, 16, 2, 4, 4)})
    assert "makes no previews in this run" in caplog.text


def test_a_model_of_another_vae_shows_its_own_colours(models, tmp_path, colours):
    """As its file tells them; Wan2.1's otherwise."""
    factors = torch.randn(16, 3, generator=torch.Generator().manual_seed(2)).tolist()
    told = {"latent_rgb_factors": json.dumps({"factors": factors, "bias": [0.1, 0.0, -0.1]})}
    model = saved_again(models["t2v"], tmp_path / "own.safetensors", told)
    x0 = torch.randn(1, 16, 1, 4, 6, generator=torch.Generator().manual_seed(3)) / 8
    expected = x0[0, :, 0].movedim(0, -1) @ torch.tensor(factors) + torch.tensor([0.1, 0.0, -0.1])
    strip = np.asarray(host.StepProgress(model, 3).strip(x0)).astype(float)
    assert np.abs(strip - ((expected + 1) / 2).clamp(0, 1).numpy() * 255).max() < 1.5
    other = np.asarray(host.StepProgress(models["t2v"], 3).strip(x0)).astype(float)
    assert np.abs(strip - other).max() > 20


def test_a_colour_may_come_of_the_neighbours_too(models, tmp_path, colours):
    """Nine rows a channel; the host's previewer, for its own samplers, shows the same."""
    factors = (
        torch.randn(16, 3, 3, 3, generator=torch.Generator().manual_seed(2)) / 3
    )  # channel, y, x, colour
    rows = factors.flatten(0, 2).tolist()
    told = {"latent_rgb_factors": json.dumps({"factors": rows, "bias": [0.1, 0.0, -0.1]})}
    model = saved_again(models["t2v"], tmp_path / "own.safetensors", told)
    x0 = torch.randn(1, 16, 1, 4, 6, generator=torch.Generator().manual_seed(3)) / 8
    padded = torch.nn.functional.pad(x0[:, :, 0], (1, 1, 1, 1), mode="replicate")
    seen = torch.nn.functional.conv2d(padded, factors.movedim(3, 0), torch.tensor([0.1, 0.0, -0.1]))[0]
    expected = ((seen.movedim(0, -1) + 1) / 2).clamp(0, 1).numpy() * 255
    previewer = latent_preview.get_previewer(torch.device("cpu"), model.model.latent_format)
    for shown in (host.StepProgress(model, 3).strip(x0), previewer.decode_latent_to_preview(x0)):
        assert np.abs(np.asarray(shown).astype(float) - expected).max() < 1.5


@pytest.mark.parametrize("told", ["[]", "{}", '{"factors": [[1, 2, NaN]], "bias": []}', "[" * 99999])
def test_colours_that_are_none_are_refused_by_name(models, tmp_path, told):
    with pytest.raises(Refusal, match=r"latent_rgb_factors.*in its metadata"):
        saved_again(models["t2v"], tmp_path / "own.safetensors", {"latent_rgb_factors": told})


def saved_again(model, path, metadata):
    save_file(model.model.diffusion_model.state_dict(), path, metadata=metadata)
    return host.load_model(path)


def test_the_bundled_model_shows_what_its_vae_decodes(colours):
    vae = host.load_vae(bundled.MODELS / "vae" / bundled.VAE)
    model = host.load_model(bundled.MODELS / "diffusion_models" / bundled.MODEL)
    rows = torch.linspace(0, 1, 64)
    picture = torch.stack((rows[:, None].expand(64, 64), rows.expand(64, 64), torch.full((64, 64), 0.5)), -1)
    x0 = model.model.process_latent_in(vae.encode(picture[None]))
    strip = torch.tensor(np.asarray(host.StepProgress(model, 1).strip(x0))) / 255
    error = (strip - picture.unflatten(0, (8, 8)).unflatten(2, (8, 8)).mean((1, 3))).abs().mean()
    model.model.latent_format = comfy.latent_formats.Wan21()
    theirs = torch.tensor(np.asarray(host.StepProgress(model, 1).strip(x0))) / 255
    assert error < 0.08 < (theirs - strip).abs().mean()


def test_the_last_preview_is_of_the_finished_latent(models, prompts, sample, monkeypatch, colours):
    """A mask, a leftover noise or a guide frame makes another latent of the last step's estimate."""
    seen = []
    monkeypatch.setattr("wan21.host.progress.StepProgress.strip", lambda self, x0: seen.append(x0) or PICTURE)
    job = (models["t2v"], *prompts, {"samples": torch.zeros(1, 16, 2, 4, 4)})
    done = sample(*job, steps=3)[0]["samples"]
    assert len(seen) == 4
    assert relative(models["t2v"].model.process_latent_out(seen[-1]), done) < 1e-6
