"""Small random checkpoints loaded by our nodes, for tests with the host's modules in this process."""

import pytest
import torch
from lib.random_checkpoints import FLF2V, I2V, T2V, TEXT_ENCODER, VAE, make_checkpoints


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Paths of the small checkpoints: i2v, flf2v, t2v, vae, umt5."""
    root = make_checkpoints(tmp_path_factory.mktemp("models"))
    dit = root / "diffusion_models"
    return {
        "i2v": dit / I2V,
        "flf2v": dit / FLF2V,
        "t2v": dit / T2V,
        "vae": root / "vae" / VAE,
        "umt5": root / "text_encoders" / TEXT_ENCODER,
    }


@pytest.fixture(scope="session")
def models(files):
    """Our MODELs by kind, loaded once."""
    from wan21 import host

    return {kind: host.load_model(files[kind]) for kind in ("i2v", "flf2v", "t2v")}


@pytest.fixture(scope="session")
def vae(files):
    from wan21 import host

    return host.load_vae(files["vae"])


@pytest.fixture(scope="session")
def prompts(files):
    """(positive, negative) CONDITIONING of our text encoder."""
    from wan21 import host

    with torch.inference_mode():
        clip = host.load_text_encoder(files["umt5"])
        texts = ("a cat walks through the grass", "blurry, static")
        return tuple(clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in texts)


@pytest.fixture
def picture():
    """A colourful start image [1, 64, 96, 3]."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 96), indexing="ij")
    return torch.stack([x, y, 0.5 + 0.5 * torch.sin(9 * x * y)], dim=-1)[None]


@pytest.fixture
def image_to_video(prompts, vae, picture):
    """Runs Wan21ImageToVideo on the picture; keywords replace inputs. -> (positive, negative, latent)"""
    from wan21.nodes.image_to_video import Wan21ImageToVideo

    def run(**inputs):
        defaults = dict(
            positive=prompts[0], negative=prompts[1], vae=vae, start_image=picture, width=96, height=64,
            num_frames=9, resize_mode="crop", add_frames_for_end_image=False, tile_size="auto",
        )  # fmt: skip
        return Wan21ImageToVideo.execute(**(defaults | inputs)).result

    return run


@pytest.fixture
def sample():
    """Runs Wan21Sampler; keywords replace inputs. -> (latent, report)"""
    from wan21.nodes.sampler import Wan21Sampler

    def run(model, positive, negative, latent, **inputs):
        defaults = dict(seed=3, steps=3, guidance_scale=4.0, flow_shift=3.0, solver="unipc", denoise=1.0)
        return Wan21Sampler.execute(model, positive, negative, latent, **(defaults | inputs)).result

    return run
