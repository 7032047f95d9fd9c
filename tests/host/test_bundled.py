"""What the bundled checkpoint does, through the real graphs: the picture stays and the prompt moves it."""

import pytest
import torch
from lib import bundled
from lib.comfy_client import fill, find_node
from safetensors import safe_open
from wan21.training import data, metrics
from wan21.training.host import Host

SIZE = (17, 64, 64)  # frames, height, width
SEED = data.HELD_OUT + 5 * 10**6  # pictures that neither training nor evaluation has seen
LARGEST_BYTES = 40 * 2**20


@pytest.fixture(scope="module")
def host(server):
    return Host(server)


@pytest.fixture(scope="module")
def picture():
    """A picture on which the camera motions can be told apart."""
    for seed in range(SEED, SEED + 100):
        [image] = eight_bits(data.images(seed, 1, *SIZE[1:]))
        if metrics.tells_motions_apart(image):
            return image
    raise AssertionError("no such picture")


@pytest.fixture(scope="module")
def panned(host, picture):
    return host.frames(host.graph("Wan2.1 - quick start", "pan left", SIZE, 1, Start_image=picture))


def eight_bits(pixels):
    """[-1, 1] -> [0, 1] as a file holds it."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255) / 255


def grey(pixels):
    return pixels.mean(-3, keepdim=True).expand_as(pixels)


def test_files_are_small_and_say_what_they_are():
    files = list(bundled.MODELS.rglob("*.safetensors"))
    assert {path.name for path in files} == {*bundled.FILES.values(), bundled.COLOUR_LORA}
    assert sum(path.stat().st_size for path in files) <= LARGEST_BYTES
    for path in files:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        assert metadata["license"] == "Apache-2.0"
        assert all(metadata[key] for key in ("title", "description", "trained", "training_commit"))


def test_dropdowns_offer_them(client):
    known = client.object_info()
    for node, name in (
        ("Wan21ModelLoader", "model_name"),
        ("Wan21TextEncoderLoader", "text_encoder_name"),
        ("Wan21VAELoader", "vae_name"),
        ("LoraLoaderModelOnly", "lora_name"),
    ):
        spec = known[node]["input"]["required"][name]
        options = spec[0] if isinstance(spec[0], list) else spec[1]["options"]
        assert bundled.FILES[name] in options


def test_first_frame_is_the_picture(host, picture, panned):
    alone = metrics.psnr(picture, host.reconstructed(picture[None])[0])
    assert alone > 22  # dB; below, the next line would prove little
    assert metrics.psnr(picture, panned[0]) > alone - 2


def test_motion_follows_the_prompt_and_the_picture_stays(host, picture, panned):
    videos = {"pan left": panned}
    for seed, name in enumerate(("pan up", "zoom in", "rotate clockwise", "still")):
        graph = host.graph("Wan2.1 - quick start", name, SIZE, seed, Start_image=picture)
        videos[name] = host.frames(graph)
    assert {name: metrics.camera_motion(picture, video) for name, video in videos.items()} == {
        name: name for name in videos
    }
    firsts = [video[0] for video in videos.values()]
    assert min(metrics.psnr(firsts[0], first) for first in firsts[1:]) > 28


def test_other_words_mean_the_same(host, picture):
    prompt = "The camera slowly moves to the LEFT."
    video = host.frames(host.graph("Wan2.1 - quick start", prompt, SIZE, 2, Start_image=picture))
    assert metrics.camera_motion(picture, video) == "pan left"


@pytest.mark.parametrize("alone", [False, True], ids=["last frame", "latent of its own"])
def test_end_image_is_reached(host, alone):
    clip = eight_bits(data.clips(SEED, 1, *SIZE, motions=["zoom in"])[0])[0].movedim(1, 0)  # [F, 3, H, W]
    graph = host.graph(
        "Wan2.1 first and last frame (flf2v)", "zoom in", SIZE, 3, Start_image=clip[0], End_image=clip[-1]
    )
    graph = fill(graph, "Image to video", add_frames_for_end_image=alone)
    video = host.frames(fill(graph, "Wan21Sampler", steps=20, guidance_scale=2, flow_shift=3))
    to_end, to_start = metrics.psnr(clip[-1], video[-1]), metrics.psnr(clip[0], video[-1])
    assert to_end > 20 and to_end > to_start + 3


def test_lora_drains_the_colours_and_strength_zero_changes_nothing(host, picture, panned):
    def with_lora(strength):
        graph = host.graph("Wan2.1 - quick start", "pan left", SIZE, 1, Start_image=picture)
        graph = fill(graph, "Wan21Sampler", model=["lora", 0])
        inputs = {"model": [find_node(graph, "Wan21ModelLoader"), 0], "lora_name": bundled.COLOUR_LORA}
        inputs["strength_model"] = strength
        graph["lora"] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
        return host.frames(graph)

    drained = with_lora(1.0)
    assert metrics.saturation(drained[-1]) < 0.4 * metrics.saturation(panned[-1])
    assert metrics.camera_motion(grey(picture), grey(drained)) == "pan left"
    assert torch.equal(with_lora(0.0), panned)


def test_four_steps_with_their_lora_come_near_to_twenty(host, picture):
    """From the same noise, and nearer than four steps without it; a camera motion and a shape that moves."""
    shape = data.Motion("object", "move", "red", "circle", "up")
    with_shape = eight_bits(data.clips(SEED, 1, *SIZE, motions=[shape])[0])[0, :, 0]
    gained = []
    for prompt, image in (("pan left", picture), ("zoom in", picture), ("a red circle moves up", with_shape)):
        full = host.frames(host.graph("Wan2.1 - quick start", prompt, SIZE, 1, Start_image=image))
        graph = host.graph("Wan2.1 - quick start 4 steps", prompt, SIZE, 1, Start_image=image)
        four = host.frames(graph)
        without_lora = host.frames(fill(graph, "Wan21LoraLoader", strength=0))
        gained.append(metrics.psnr(full, four) - metrics.psnr(full, without_lora))
        if image is picture:
            assert metrics.camera_motion(picture, four) == prompt
        else:
            assert metrics.object_direction(four, "red") == "up"
    assert min(gained) > 0 and sum(gained) / len(gained) > 1.5  # dB
