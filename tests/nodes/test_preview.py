"""Previews by TAEHV, Wan2.1's tiny decoder, from the host's vae_approx folder."""

import comfy.taesd.taehv
import folder_paths
import latent_preview
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from wan21 import host


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
