"""Our VAE inside the host's standard VAE, against the native one on the same file."""

import comfy.model_management
import comfy.sd
import pytest
import torch
from helpers import relative
from helpers_vae import latents
from lib.random_weights import randomise
from safetensors.torch import load_file
from wan21 import host
from wan21.host import vae_memory
from wan21.host.vae import HostWanVAE, frame_attention
from wan21.wan.vae import WanVAE
from wan21.wan.vae.layers import attend_frame
from wan21.wan.vae.memory import LONG_CHUNK, decode_bytes, encode_bytes


@pytest.fixture(scope="module")
def native_vae(files):
    return comfy.sd.VAE(sd=load_file(files["vae"]))


@pytest.fixture
def clip(picture):
    return torch.cat([picture.roll(shift, 2) for shift in range(0, 27, 3)])  # 9 frames


def test_encode_and_decode_equal_the_native_vae(vae, native_vae, clip):
    latent = vae.encode(clip)
    assert latent.shape == (1, 16, 3, 8, 12)
    assert relative(latent, native_vae.encode(clip)) < 1e-5
    video = vae.decode(latent)
    assert video.shape == (1, 9, 64, 96, 3)
    assert relative(video, native_vae.decode(latent)) < 1e-5


def test_tiled_calls_of_the_host_reach_our_tiling(vae, clip):
    whole = vae.encode(clip)
    assert relative(vae.encode_tiled(clip, tile_x=256, tile_y=256, overlap=64), whole) < 1e-6
    video = vae.decode(whole)
    assert relative(vae.decode_tiled(whole, tile_x=32, tile_y=32, overlap=8), video) < 1e-5
    assert relative(vae.decode_tiled(whole, tile_x=4, tile_y=8, overlap=2), video) < 1e-5


def test_native_image_to_video_works_with_our_vae(vae, native_vae, prompts, picture):
    from comfy_extras.nodes_wan import WanImageToVideo

    both = [
        WanImageToVideo.execute(*prompts, v, 96, 64, 9, 1, start_image=picture).result
        for v in (vae, native_vae)
    ]
    ours, theirs = (result[0][0][1]["concat_latent_image"] for result in both)
    assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precision(files, vae, picture, precision):
    other = host.load_vae(files["vae"], precision)
    assert other.first_stage_model.conv2.weight.dtype == host.DTYPES[precision]
    latent = vae.encode(picture[:, :16, :16])
    error = relative(other.decode(latent), vae.decode(latent))
    assert error == 0 if precision == "fp32" else 0 < error < 0.05


@pytest.fixture
def fast_dtype(monkeypatch):
    """The host's choice on a GPU."""
    import comfy.model_management as management

    monkeypatch.setattr(management, "vae_dtype", lambda device=None, allowed_dtypes=[]: torch.bfloat16)
    return torch.bfloat16


def computed_in(vae, run):
    """Dtypes that the convolutions of each way see in `run`."""
    seen = {"encoder": set(), "decoder": set()}
    model = vae.first_stage_model
    parts = {"encoder": model.encoder.downsamples[0], "decoder": model.decoder.middle[0]}
    handles = [
        part.register_forward_pre_hook(lambda _, given, way=way: seen[way].add(given[0].dtype))
        for way, part in parts.items()
    ]
    run()
    for handle in handles:
        handle.remove()
    return seen


def test_auto_encodes_in_float32_and_decodes_in_the_hosts_choice(files, vae, clip, fast_dtype):
    auto = host.load_vae(files["vae"])
    latent = auto.encode(clip)
    assert torch.equal(latent, vae.encode(clip))  # the session's VAE is float32, as the CPU's is
    assert torch.equal(host.encode_video(auto, clip, "128"), host.encode_video(vae, clip, "128"))
    bf16 = host.load_vae(files["vae"], "bf16")
    assert not torch.equal(bf16.encode(clip), latent)
    assert torch.equal(auto.decode(latent), bf16.decode(latent))
    say = [].append
    for tile in ("auto", "0", "128"):
        frames = [host.decode_video(v, latent, tile, say) for v in (auto, bf16)]
        assert torch.equal(*frames)
    ways = computed_in(auto, lambda: (auto.encode(clip), auto.encode_tiled(clip, 64, 64, 16)))
    assert ways == {"encoder": {torch.float32}, "decoder": set()}
    ways = computed_in(auto, lambda: (auto.decode(latent), auto.decode_tiled(latent, 4, 4, 2)))
    assert ways == {"encoder": set(), "decoder": {fast_dtype}}


def test_what_the_host_is_asked_for_follows_each_ways_dtype(files, vae, fast_dtype):
    auto, bf16 = host.load_vae(files["vae"]), host.load_vae(files["vae"], "bf16")
    pixels, latent = (1, 3, 9, 480, 832), (1, 16, 3, 60, 104)
    asked = [v.memory_used_encode(pixels, v.vae_dtype) for v in (bf16, auto, vae)]
    assert asked[0] < asked[1] == asked[2]
    asked = [v.memory_used_decode(latent, v.vae_dtype) for v in (bf16, auto, vae)]
    assert asked[0] == asked[1] < asked[2]


def test_the_hosts_flag_for_the_vae_holds_for_both_ways(files, monkeypatch):
    from comfy.cli_args import args

    monkeypatch.setattr(args, "bf16_vae", True)
    flagged = host.load_vae(files["vae"])
    model = flagged.first_stage_model
    assert model.encode_dtype == model.decode_dtype == flagged.vae_dtype == torch.bfloat16


def test_decode_stops_on_cancel(vae, clip):
    import comfy.model_management as management

    latent = vae.encode(clip)
    expected = vae.decode(latent)
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        vae.decode(latent)
    assert torch.equal(vae.decode(latent), expected)


def test_encode_goes_on_in_tiles_when_memory_runs_out(vae):
    wide = torch.rand(5, 32, 640, 3, generator=torch.Generator().manual_seed(0))
    tiled = vae.encode_tiled(wide, tile_x=256, tile_y=256, overlap=64)
    seen = []

    def run_out(module, args):
        seen.append(args[0].shape[-1])
        if args[0].shape[-1] == 640:
            raise torch.OutOfMemoryError("no memory for whole frames")

    handle = vae.first_stage_model.encoder.downsamples[0].register_forward_pre_hook(run_out)
    latent = vae.encode(wide)
    handle.remove()
    tries = seen.count(640)  # a GPU with room tries more frames at once first
    assert tries in (1, 2) and 0 < max(seen[tries:]) < 640
    assert torch.equal(latent, tiled)


@pytest.mark.parametrize("frames", [2, 4, 6, 8])
@pytest.mark.parametrize("tiled", [False, True])
def test_frames_that_fill_no_latent_are_left_out_as_natively_and_said(
    vae, native_vae, clip, frames, tiled, caplog
):
    images = clip[:frames, :61, :93]  # the host cuts sides to multiples of 8
    with caplog.at_level("INFO"):
        ours = vae.encode_tiled(images, 64, 64, 16) if tiled else vae.encode(images)
    kept = (frames - 1) // 4 * 4 + 1
    assert ours.shape == (1, 16, (kept + 3) // 4, 7, 11)
    assert f"of {frames} the last {frames - kept}" in caplog.text and f"{kept} remain" in caplog.text
    if not tiled:
        assert relative(ours, native_vae.encode(images)) < 1e-5


def test_host_nodes_encode_a_clip_of_any_length(vae, native_vae, clip, prompts):
    from comfy_extras.nodes_wan import WanFirstLastFrameToVideo, WanImageToVideo

    import nodes

    for encode in (
        lambda v: nodes.VAEEncode().encode(v, clip[:7])[0]["samples"],
        lambda v: nodes.VAEEncodeForInpaint().encode(v, clip[:6], torch.zeros(1, 64, 96), 2)[0]["samples"],
        lambda v: WanFirstLastFrameToVideo.execute(
            *prompts, v, 96, 64, 8, 1, start_image=clip[:2], end_image=clip[:1]
        ).result[0][0][1]["concat_latent_image"],
        lambda v: WanImageToVideo.execute(*prompts, v, 100, 60, 8, 1, start_image=clip[:6]).result[0][0][1][
            "concat_latent_image"
        ],
    ):
        assert relative(encode(vae), encode(native_vae)) < 1e-5
    assert nodes.VAEEncodeTiled().encode(vae, clip[:7], 64, 16)[0]["samples"].shape == (1, 16, 2, 8, 12)
    batch = torch.stack([clip, clip.flip(2)])[:, :, :64]  # the host cuts the frames of a batch to 8
    assert relative(vae.encode(batch), native_vae.encode(batch)) < 1e-5


@pytest.mark.parametrize(
    "tile, overlap, message",
    [
        (64, 64, "VAE tiles of 64 x 64 pixels with an overlap of 64: it must be at least 0 and smaller"),
        (64, 96, "of 64 x 64 pixels with an overlap of 96"),
        (64, -32, "with an overlap of -32"),
        (0, 0, "VAE tiles of 0 x 0 pixels"),
        (100, 32, "tile_x = 100 pixels"),
    ],
)
def test_tiles_that_cannot_be_are_named_in_pixels(vae, clip, tile, overlap, message):
    import nodes

    with pytest.raises(ValueError, match=message):
        nodes.VAEEncodeTiled().encode(vae, clip[:1], tile, overlap)


def test_an_overlap_counts_only_where_there_are_several_tiles(vae, native_vae, clip):
    import nodes

    for tile, overlap in ((96, 96), (128, 256)):
        got, expected = (
            nodes.VAEEncodeTiled().encode(v, clip[:5], tile, overlap)[0]["samples"] for v in (vae, native_vae)
        )
        assert relative(got, expected) < 1e-5
    with pytest.raises(ValueError, match="VAE tiles of 0 x 32 pixels: both sides must be at least 8"):
        vae.decode_tiled(vae.encode(clip[:1]), tile_x=0, tile_y=4)


def test_where_the_host_slices_a_vaes_attention_ours_is_sliced(monkeypatch):
    """On AMD the host takes PyTorch's attention for models and not for a VAE; here by its own words of it."""
    management, gpu = comfy.model_management, torch.device("cuda", 0)
    monkeypatch.setattr(management, "ENABLE_PYTORCH_ATTENTION", True)
    assert frame_attention(gpu) is frame_attention(torch.device("cpu")) is attend_frame
    monkeypatch.setattr(management, "is_amd", lambda: True)
    assert frame_attention(torch.device("cpu")) is attend_frame
    plain = randomise(HostWanVAE(8, torch.float32, torch.float32))
    sliced = HostWanVAE(8, torch.float32, torch.float32, frame_attention(gpu))
    sliced.load_state_dict(plain.state_dict())
    z = latents(3, 8, 12)
    with torch.inference_mode():
        expected = plain.decode(z)
        monkeypatch.setattr(management, "get_free_memory", lambda device: 40000)  # scores of 96 pixels: 92160
        F = torch.nn.functional
        monkeypatch.setattr(F, "scaled_dot_product_attention", None)
        slices, softmax = [], F.softmax
        monkeypatch.setattr(F, "softmax", lambda x, dim: slices.append(1) or softmax(x, dim))
        assert relative(sliced.decode(z), expected) < 1e-5
    assert len(slices) == 4 * z.shape[2]


def test_a_vae_loads_with_the_hosts_attention(files, monkeypatch):
    chosen = []
    monkeypatch.setattr("wan21.host.vae.frame_attention", lambda device: chosen.append(device) or len)
    loaded = host.load_vae(files["vae"])
    assert chosen == [loaded.device] and loaded.first_stage_model.decoder.middle[1].attend is len


# --- more frames at once on a GPU ----------------------------------------------------------------------


@pytest.fixture
def on_a_gpu(monkeypatch):
    """`on_a_gpu(bytes)`: calls of the host's own nodes as on a GPU with so much free -> frames asked for."""
    in_chunks, per_chunk, asked = vae_memory.in_long_chunks, WanVAE.decode.__globals__["frames_per_chunk"], []

    def watched(chunk_frames, device):
        asked.append(chunk_frames)
        return per_chunk(chunk_frames, device)

    def switch(free):
        monkeypatch.setattr(vae_memory, "_free_bytes", lambda device: free)
        monkeypatch.setattr(
            "wan21.host.vae.in_long_chunks", lambda device, *how: in_chunks(torch.device("cuda", 0), *how)
        )
        monkeypatch.setattr("wan21.wan.vae.frames_per_chunk", watched)
        return asked

    return switch


@pytest.fixture
def few(clip):
    return clip[:, :24, :32]  # 9 frames


def needed_by(vae, way):
    """Bytes of these, four frames at once."""
    model = vae.first_stage_model
    if way == "encode":
        return encode_bytes(model, 9, 24, 32, vae.device, model.encode_dtype.itemsize, LONG_CHUNK)
    return decode_bytes(model, 3, 4, vae.device, chunk_frames=LONG_CHUNK)


@pytest.mark.parametrize("way", ["encode", "decode"])
def test_the_hosts_own_nodes_take_four_frames_at_once_where_a_gpu_has_room(vae, few, on_a_gpu, way):
    given = few if way == "encode" else vae.encode(few)
    plain, need = getattr(vae, way)(given), needed_by(vae, way)
    for free, expected in ((need, LONG_CHUNK), (need - 1, None)):
        asked = on_a_gpu(free)
        asked.clear()
        assert relative(getattr(vae, way)(given), plain) < 1e-6
        assert asked == [expected]


@pytest.mark.parametrize("way", ["encode", "decode"])
def test_where_the_room_was_not_there_it_goes_on_as_usual(vae, few, on_a_gpu, way):
    """And not in the host's tiles."""
    given = few if way == "encode" else vae.encode(few)
    plain, failed = getattr(vae, way)(given), []
    head = vae.first_stage_model.encoder.head if way == "encode" else vae.first_stage_model.decoder.head

    def runs_out(module, inputs):
        if len(failed) < 2:
            failed.append(1)
            if len(failed) == 2:
                raise torch.OutOfMemoryError("none left")

    handle = head.register_forward_pre_hook(runs_out)
    try:
        asked = on_a_gpu(1e15)
        asked.clear()
        found = getattr(vae, way)(given)
    finally:
        handle.remove()
    assert asked == [LONG_CHUNK, None] and len(failed) == 2
    assert relative(found, plain) < 1e-6


def test_what_is_no_lack_of_memory_is_raised_at_once(vae, few, on_a_gpu, monkeypatch):
    def cancelled():
        raise comfy.model_management.InterruptProcessingException

    asked = on_a_gpu(1e15)
    monkeypatch.setattr("wan21.host.vae.check_cancelled", cancelled)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        vae.encode(few)
    assert asked == [LONG_CHUNK]
    with pytest.raises(ValueError, match="Wan VAE latent of shape"):
        vae.first_stage_model.decode(torch.zeros(1, 4, 3, 8))
