"""The decoder's training leaves the encoder alone, goes on where it was, and is measured by what can tell."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from wan21.training import data, metrics, train_decoder, train_vae
from wan21.training.files import stored
from wan21.training.progress import Stage
from wan21.wan.vae import WanVAE

SCHEDULE = replace(train_vae.CPU, dim=8, refine_steps=4)


@pytest.fixture
def vae(monkeypatch):
    monkeypatch.setattr(train_decoder, "SIZES", {(1, 5, 16, 16): 1})
    monkeypatch.setattr(train_decoder, "MEASURED", (1, 5, 16, 16))
    with torch.inference_mode(False), torch.enable_grad():
        vae = WanVAE(dim=8)
        train_vae.initialize(vae)
        yield vae


def test_the_encoder_and_its_latents_stay(vae, tmp_path):
    video = data.clips(1, 1, 5, 16, 16)[0]
    before, weights = vae.encode(video), {k: v.clone() for k, v in vae.state_dict().items()}
    train_decoder.refine(Stage(tmp_path, "vae_refined"), vae, SCHEDULE)
    assert torch.equal(vae.encode(video), before)
    changed = {k.split(".")[0] for k, v in vae.state_dict().items() if not torch.equal(v, weights[k])}
    assert changed == {"conv2", "decoder"}


def test_killed_it_goes_on_to_the_same_weights(vae, tmp_path, monkeypatch):
    once = WanVAE(dim=8)
    once.load_state_dict(vae.state_dict())
    train_decoder.refine(Stage(tmp_path / "once", "vae_refined"), once, SCHEDULE)
    monkeypatch.setattr(Stage, "should_save", True)
    loss, calls = train_decoder.decoder_loss, []

    def killed(output, target):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss(output, target)

    monkeypatch.setattr(train_decoder, "decoder_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        train_decoder.refine(Stage(tmp_path / "twice", "vae_refined"), vae, SCHEDULE)
    train_decoder.refine(Stage(tmp_path / "twice", "vae_refined"), vae, SCHEDULE)
    for name, expected in once.state_dict().items():
        assert torch.equal(vae.state_dict()[name], expected), name


def test_the_file_keeps_what_it_says(vae, tmp_path):
    path = tmp_path / "vae.safetensors"
    told = {
        "license": "Apache-2.0",
        "training_commit": "old",
        "training_seconds": '{"vae": 5, "vae_refined": 7}',
    }
    save_file(stored(vae.state_dict()), path, metadata=told)
    again = train_decoder.shipped(path)
    with torch.no_grad():
        again.decoder.head[2].bias += 1
    train_decoder.rewrite(path, again, 10)
    assert torch.equal(load_file(path)["decoder.head.2.bias"], again.decoder.head[2].bias.half())
    with safe_open(path, "pt") as file:
        told = file.metadata()
    assert told["license"] == "Apache-2.0" and told["training_commit"] != "old"
    assert json.loads(told["training_seconds"]) == {"vae": 5, "vae_refined": 17}


def test_what_is_soft_and_what_flickers_is_told():
    clip = data.clips(2, 1, 5, 32, 32, motions=["pan left"])[0][0].transpose(0, 1) / 2 + 0.5  # (F, 3, H, W)
    same = metrics.quality([(clip, clip)])
    assert same["ssim"] > 0.999 and same["edges"] == same["flicker"] == 1
    soft = torch.nn.functional.avg_pool2d(clip, 5, 1, 2, count_include_pad=False)
    soft = metrics.quality([(soft, clip)])
    assert soft["edges"] < 0.8 and soft["ssim"] < 0.98
    lit = clip + 0.05 * torch.tensor([1.0, -1, 1, -1, 1])[:, None, None, None]
    lit = metrics.quality([(lit, clip)])
    assert lit["flicker"] > 1.5 and lit["edges"] == pytest.approx(1)
    assert lit["first"] == pytest.approx(26.02, abs=0.01) == lit["psnr"]


def test_a_clip_that_stands_still_does_not_decide_the_flicker_of_all():
    moving = data.clips(2, 1, 5, 32, 32, motions=["pan left"])[0][0].transpose(0, 1) / 2 + 0.5  # (F, 3, H, W)
    still = moving[:1].expand(5, -1, -1, -1)
    restless = still + 1e-4 * torch.tensor([1.0, -1, 1, -1, 1])[:, None, None, None]
    assert metrics.quality([(moving, moving), (restless, still)])["flicker"] == pytest.approx(1, abs=0.1)
