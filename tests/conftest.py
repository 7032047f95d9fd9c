"""The order of the tests, and what tests of several folders share: a real server, small random checkpoints.

Nothing here needs the host before a fixture is made.
"""

import pytest
import torch
from helpers import grouped
from lib.host_server import HostServer, group_lives
from lib.pack import ROOT
from lib.random_checkpoints import FLF2V, I2V, T2V, TEXT_ENCODER, VAE, make_checkpoints

# Cheap ones first; then what starts servers; last the many that are short, with which every worker can fill
# the time until the longest has ended.
ORDER = (
    ".", "wan", "frames", "net", "workers", "host", "browser", "gpu", "scripts", "server", "training",
    "nodes",
)  # fmt: skip
ON_THE_SERVER = ("host", "browser")  # one server for all of these


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Sorts by folder, and keeps in one worker what uses the one real server."""

    def folder(item):
        parts = item.path.relative_to(ROOT / "tests").parent.parts
        return parts[0] if parts else "."

    for item in items:
        if folder(item) in ON_THE_SERVER and "server" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("server"))
    items.sort(key=lambda item: ORDER.index(folder(item)))


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The running ComfyUI; its models are those that the pack brings. `server.client` talks to it."""
    previews = ["--preview-method", "auto"]
    with HostServer(tmp_path_factory.mktemp("host"), extra_args=previews) as running:
        group = running.process.pid
        yield running
    assert not group_lives(group), "the server left a process behind"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A `models` folder with the small random checkpoints."""
    return make_checkpoints(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def files(checkpoints):
    """Paths of the small checkpoints: i2v, flf2v, t2v, vae, umt5."""
    dit = checkpoints / "diffusion_models"
    return {
        "i2v": dit / I2V,
        "flf2v": dit / FLF2V,
        "t2v": dit / T2V,
        "vae": checkpoints / "vae" / VAE,
        "umt5": checkpoints / "text_encoders" / TEXT_ENCODER,
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


@pytest.fixture(scope="session")
def picture():
    """A colourful start image [1, 64, 96, 3]."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 96), indexing="ij")
    return torch.stack([x, y, 0.5 + 0.5 * torch.sin(9 * x * y)], dim=-1)[None]


@pytest.fixture(scope="session")
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
    """Runs Wan21Sampler; keywords replace inputs, groups as of `grouped`. -> (latent, report)"""
    from wan21.nodes.sampler import Wan21Sampler

    def run(model, positive, negative, latent, **inputs):
        defaults = dict(seed=3, steps=3, guidance_scale=4.0, flow_shift=3.0, solver="unipc", denoise=1.0)
        given = grouped(**(defaults | inputs))
        return Wan21Sampler.execute(model, positive, negative, latent, **given).result

    return run
