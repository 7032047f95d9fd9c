"""Wan21VAEDecode: memory, the kept latent, cancel and bad input."""

import logging
import math
from contextlib import contextmanager

import comfy.model_management as management
import folder_paths
import pytest
import torch
from helpers import relative
from wan21.nodes.kept_latent import END_LATENT_ALONE, SAMPLING_SECONDS
from wan21.nodes.vae_decode import Wan21VAEDecode

H, W, T = 20, 2, 2


@pytest.fixture
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def samples():
    return torch.randn(1, 16, T, H, W, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def whole(vae, samples):
    with torch.inference_mode():
        return vae.decode(samples)[0]


def same(images, whole):
    """Bit for bit on the CPU; on a GPU the node's chunks are longer than those of the host's call."""
    on_cpu = management.get_torch_device().type == "cpu"
    return torch.equal(images, whole) if on_cpu else relative(images, whole) < 1e-5


@pytest.fixture
def decode(vae, samples, caplog):
    """Runs the node; keywords replace the latent's entries. -> (frames, what it said)"""

    def run(tile_size="auto", vae=vae, **latent):
        caplog.set_level(logging.INFO)
        caplog.clear()
        images = Wan21VAEDecode.execute(vae, {"samples": samples} | latent, tile_size).result[0]
        return images, [record.getMessage() for record in caplog.records if "Wan21" in record.getMessage()]

    return run


@contextmanager
def before_block(vae, call):
    """Runs call(block's input) before the last residual block of the decoder."""
    block = vae.first_stage_model.decoder.upsamples[-1]
    hook = block.register_forward_pre_hook(lambda _, args: call(args[0]))
    try:
        yield
    finally:
        hook.remove()


def fails(error):
    def fail(*_, **__):
        raise error

    return fail


def test_auto_decodes_whole_frames_where_they_fit(decode, whole):
    images, said = decode()
    assert images.shape == (4 * (T - 1) + 1, H * 8, W * 8, 3)
    assert images.min() >= 0 and images.max() <= 1
    assert same(images, whole)
    assert said == []


def test_auto_takes_tiles_where_memory_is_short(vae, decode, whole, monkeypatch):
    monkeypatch.setattr(vae.patcher, "get_free_memory", lambda device: 0)
    images, said = decode()
    assert relative(images, whole) < 1e-5
    assert "decodes tiles of 64 pixels" in said[0]


@pytest.mark.parametrize("tile_size", ["0", "128"])
def test_a_chosen_tile_size_is_taken(vae, decode, whole, tile_size):
    heights = set()
    with before_block(vae, lambda x: heights.add(x.shape[-2])):
        images, said = decode(tile_size)
    assert relative(images, whole) < 1e-5 and not said
    assert heights == ({8 * H} if tile_size == "0" else {4 * H + 8})  # two halves and their margins


def test_out_of_memory_goes_on_in_smaller_tiles(vae, decode, whole):
    def limit(x):
        if x.shape[-2] > 80:
            raise torch.OutOfMemoryError("simulated")

    with before_block(vae, limit):
        images, said = decode("0")
    assert relative(images, whole) < 1e-5
    assert [sentence.split("goes on ")[1] for sentence in said] == [
        "in tiles of 128 pixels",
        "in tiles of 64 pixels",
    ]


def test_a_batch_is_a_row_of_clips(decode, whole, samples):
    images, _ = decode(samples=torch.cat([samples, samples]))
    assert same(images, torch.cat([whole, whole]))


def test_the_native_vae_is_decoded_by_the_host(files, decode, whole):
    import comfy.sd
    from safetensors.torch import load_file

    native = comfy.sd.VAE(sd=load_file(files["vae"]))
    images, said = decode(vae=native)
    assert relative(images, whole) < 1e-5 and not said
    tiled, _ = decode("128", vae=native)
    assert 0 < relative(tiled, whole) < 0.5  # the host's tiles, seams and all


def test_a_long_sampled_latent_is_a_file_until_it_is_decoded(vae, decode, samples, output):
    seen = []
    with before_block(vae, lambda _: seen.extend(output.rglob("*.latent"))):
        decode(**{SAMPLING_SECONDS: 60})
        assert seen == []
        decode(**{SAMPLING_SECONDS: 60.1})
    assert {path.parent for path in seen} == {output / "wan21"}
    assert not [*output.rglob("*.latent")]


def test_an_error_names_the_file_that_resumes(vae, decode, samples, output):
    from nodes import LoadLatent

    longer = torch.cat([samples, samples[:, :, :1]], 2)
    with before_block(vae, fails(torch.OutOfMemoryError("no more."))), pytest.raises(RuntimeError) as caught:
        decode(samples=longer, **{END_LATENT_ALONE: longer.shape[2], SAMPLING_SECONDS: 7200})
    [path] = output.rglob("*.latent")
    for words in ("Wan21VAEDecode: no more. ", "120 min", str(path), "LoadLatent", "tile_size 128"):
        assert words in str(caught.value)
    [latent] = LoadLatent().load(f"wan21/{path.name} [output]")
    assert torch.equal(latent["samples"], samples)  # without the end image, which the file cannot mark


def test_an_output_folder_that_cannot_be_written_does_not_stop_the_decode(decode, whole, output):
    (output / "wan21").write_text("a file where the folder should be")
    images, said = decode(**{SAMPLING_SECONDS: 100})
    assert same(images, whole)
    assert "could not keep the latent" in said[0]


def test_a_vae_of_another_model_does_not_cost_the_latent(decode, output):
    class OtherVAE:
        latent_channels, latent_dim = 4, 2

        def spacial_compression_encode(self):
            return 8

    with pytest.raises(RuntimeError, match=r"^Wan21VAEDecode: the VAE has 4 channels.*is kept in"):
        decode(vae=OtherVAE(), **{SAMPLING_SECONDS: 7200})
    assert len([*output.rglob("*.latent")]) == 1


def test_frames_that_do_not_fit_into_host_memory_cost_no_latent(decode, output, monkeypatch):
    monkeypatch.setattr("wan21.host.memory._free_host_bytes", lambda: 1000)
    with pytest.raises(RuntimeError, match=r"5 frames of 16x160 take .* GB of host memory.*is kept in"):
        decode(**{SAMPLING_SECONDS: 7200})


def test_a_file_that_cannot_be_removed_does_not_cost_the_frames(decode, whole, output, monkeypatch):
    monkeypatch.setattr("pathlib.Path.unlink", fails(PermissionError("in use by another program")))
    images, said = decode(**{SAMPLING_SECONDS: 100})
    assert same(images, whole)
    assert "could not remove" in said[-1] and "in use by another program" in said[-1]


def test_an_output_folder_that_is_a_link_to_elsewhere(decode, whole, output, tmp_path_factory):
    (output / "wan21").symlink_to(tmp_path_factory.mktemp("another_disk"))
    images, said = decode(**{SAMPLING_SECONDS: 100})
    assert same(images, whole)
    assert "could not keep the latent" in said[0]


def test_cancel_stops_within_a_layer_and_keeps_the_latent(vae, decode, whole, output, caplog):
    blocks = []

    def cancel(x):
        blocks.append(1)
        management.interrupt_current_processing(True)

    for tile_size in ("0", "128"):
        blocks.clear()
        with before_block(vae, cancel), pytest.raises(management.InterruptProcessingException):
            decode(tile_size, **{SAMPLING_SECONDS: 100})
        assert blocks == [1]
        assert "the latent is kept in" in caplog.records[-1].getMessage()
    assert len([*output.rglob("*.latent")]) == 2
    assert same(decode()[0], whole)


@pytest.mark.parametrize(
    ("latent", "words"),
    [
        (torch.zeros(1, 48, 2, 4, 4), ["Wan2.2"]),
        (torch.zeros(1, 4, 8, 8), ["Stable Diffusion"]),
        (torch.zeros(1, 16, 8, 8), ["image latent", "[batch, 16, frames, h, w]"]),
        (torch.zeros(1, 16, 0, 4, 4), ["empty"]),
        (torch.full((1, 16, 2, 4, 4), math.nan), ["100 %", "fp16 overflow", "--use-sage-attention"]),
        (torch.zeros(1, 16, 2, 4, 4).index_fill(4, torch.tensor(0), math.inf), ["25 %", "bf16"]),
    ],
)
def test_bad_latents_are_named_before_any_work(vae, decode, latent, words, monkeypatch):
    monkeypatch.setattr(vae.first_stage_model, "decode_part", fails(AssertionError("decoded")))
    with pytest.raises(ValueError) as caught:
        decode(samples=latent)
    assert all(word in str(caught.value) for word in ["Wan21VAEDecode", *words]), str(caught.value)


def test_an_end_image_alone_is_no_video(decode):
    with pytest.raises(ValueError, match="empty"):
        decode(samples=torch.zeros(1, 16, 1, 4, 4), **{END_LATENT_ALONE: True})


def test_sides_may_be_odd_in_latent_pixels(decode, vae):
    latent = torch.zeros(1, 16, 1, 3, 5)
    assert same(decode(samples=latent)[0], vae.decode(latent)[0])


@pytest.mark.parametrize("by_native", [False, True])
def test_frames_of_nan_are_said_with_their_cause(vae, files, decode, by_native):
    import comfy.sd
    import comfy.utils

    used = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(files["vae"]))) if by_native else vae
    bias = used.first_stage_model.decoder.head[2].bias
    whole = bias.detach().clone()
    bias.fill_(math.nan)
    try:
        images, said = decode(vae=used)
    finally:
        bias.copy_(whole)
    assert not torch.isfinite(images).any()
    why = "decoder.head.2.bias in the VAE's file holds NaN or infinite numbers. Get the file again"
    assert said == [f"Wan21VAEDecode 5 of 5 frames hold NaN and will be black: {why}"]
