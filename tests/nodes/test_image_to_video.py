"""Wan21ImageToVideo against the native nodes and the release's formulas."""

import pytest
import torch
from helpers import relative
from helpers_nodes import clip_vision
from wan21.nodes.image_to_video import Wan21ImageToVideo
from wan21.nodes.kept_latent import END_LATENT_ALONE
from wan21.wan.conditioning import fit_image
from wan21.wan.refusal import Refusal


def model_input(model, conditioning, latent):
    """What the DiT is given beside the noise: mask and normalised image latent, [1, 20, T, h, w]."""
    noise = torch.zeros_like(latent["samples"])
    return model.model.concat_cond(noise=noise, device=noise.device, **conditioning[0][1])


def test_equals_the_native_node(models, prompts, vae, picture, image_to_video):
    from comfy_extras.nodes_wan import WanImageToVideo

    ours = image_to_video()
    theirs = WanImageToVideo.execute(*prompts, vae, 96, 64, 9, 1, start_image=picture).result
    for i in (0, 1):
        assert torch.equal(
            model_input(models["i2v"], ours[i], ours[2]), model_input(models["i2v"], theirs[i], theirs[2])
        )
    assert torch.equal(ours[2]["samples"], theirs[2]["samples"])


@pytest.mark.parametrize("channels", [1, 3])
def test_end_image_as_last_frame_equals_the_native_node(
    models, prompts, vae, picture, image_to_video, channels
):
    from comfy_extras.nodes_wan import WanFirstLastFrameToVideo

    picture = picture[..., :channels]
    end = picture.flip(2)
    ours = image_to_video(
        start_image=picture,
        end_image=end,
        clip_vision_start=clip_vision(seed=1),
        clip_vision_end=clip_vision(seed=2),
    )
    theirs = WanFirstLastFrameToVideo.execute(
        *prompts, vae, 96, 64, 9, 1, start_image=picture, end_image=end,
        clip_vision_start_image=clip_vision(seed=1), clip_vision_end_image=clip_vision(seed=2),
    ).result  # fmt: skip
    assert torch.equal(
        model_input(models["flf2v"], ours[0], ours[2]), model_input(models["flf2v"], theirs[0], theirs[2])
    )
    features = [r[0][0][1]["clip_vision_output"].penultimate_hidden_states for r in (ours, theirs)]
    assert features[0].shape[1] == 514 and torch.equal(*features)


@pytest.fixture
def clip(picture):
    return torch.cat([picture.roll(3 * i, 2) for i in range(9)])


@pytest.mark.parametrize("frames", [5, 9])
@pytest.mark.parametrize("size", [(96, 64), (104, 56)])
def test_several_start_frames_equal_the_native_nodes(
    models, prompts, vae, clip, image_to_video, frames, size
):
    from comfy_extras.nodes_wan import WanFirstLastFrameToVideo, WanImageToVideo

    width, height = size
    start, end = fit_image(clip[-frames:], width, height, "crop"), fit_image(clip[:1], width, height, "crop")
    options = dict(start_image=clip[-frames:], width=width, height=height, num_frames=17)
    native = (*prompts, vae, width, height, 17, 1)
    for node, inputs, ours in (
        (WanImageToVideo, {}, image_to_video(**options)),
        (WanFirstLastFrameToVideo, {"end_image": end}, image_to_video(**options, end_image=clip[:1])),
    ):
        theirs = node.execute(*native, start_image=start, **inputs).result
        assert torch.equal(
            model_input(models["i2v"], ours[0], ours[2]), model_input(models["i2v"], theirs[0], theirs[2])
        )
        assert torch.equal(ours[2]["samples"], theirs[2]["samples"])


@pytest.mark.parametrize("frames, known", [(2, 1), (4, 1), (7, 5), (8, 5)])
def test_start_frames_that_fill_no_latent_are_left_out_in_front(clip, image_to_video, caplog, frames, known):
    with caplog.at_level("INFO"):
        ours = image_to_video(start_image=clip[-frames:])
    assert (
        f"start_image holds {frames} frames and 4n+1 can be known: the video begins with the last {known}"
        in (caplog.text)
    )
    expected = image_to_video(start_image=clip[-known:])
    for key in ("concat_latent_image", "concat_mask"):
        assert torch.equal(ours[0][0][1][key], expected[0][0][1][key])


@pytest.mark.parametrize("mode", ["crop", "pad", "stretch", "keep_aspect"])
def test_each_start_frame_is_resized(vae, clip, image_to_video, mode):
    got = image_to_video(start_image=clip[:5], width=64, height=64, num_frames=9, resize_mode=mode)
    width, height = (80, 48) if mode == "keep_aspect" else (64, 64)
    assert got[2]["samples"].shape[-2:] == (height // 8, width // 8)
    known = vae.encode(fit_image(clip[:5], width, height, mode))
    assert relative(got[0][0][1]["concat_latent_image"][:, :, :2], known) < 1e-5


def test_one_feature_of_several_is_read_and_that_is_said(image_to_video, caplog):
    several = clip_vision()
    several.penultimate_hidden_states = several.penultimate_hidden_states.repeat(5, 1, 1)
    with caplog.at_level("INFO"):
        image_to_video(clip_vision_start=several)
    assert "features are of 5 images: a single video reads those of the first" in caplog.text


def features(images=1, width=1280):
    import comfy.clip_vision

    output = comfy.clip_vision.Output()
    output.penultimate_hidden_states = torch.zeros(images, 257, width)
    return output


@pytest.mark.parametrize(
    "start, end, message",
    [
        (features(1), features(2), r"of 1 image\(s\) and clip_vision_end of 2"),
        (features(5), features(1), r"of 5 image\(s\) and clip_vision_end of 1"),
        (features(), features(width=1664), "clip_vision_start is 1280 wide and clip_vision_end 1664"),
    ],
)
def test_clip_features_that_do_not_go_together_are_named(image_to_video, picture, start, end, message):
    with pytest.raises(ValueError, match="^Wan21ImageToVideo: .*" + message):
        image_to_video(end_image=picture, clip_vision_start=start, clip_vision_end=end)


def test_added_end_frame_is_a_latent_of_its_own(models, vae, picture, image_to_video):
    end = picture.flip(2)
    positive, _, latent = image_to_video(end_image=end, add_frames_for_end_image=True)
    plain, _, shorter = image_to_video()
    assert latent[END_LATENT_ALONE] and END_LATENT_ALONE not in shorter
    assert latent["samples"].shape[2] == shorter["samples"].shape[2] + 1
    given = model_input(models["i2v"], positive, latent)
    assert torch.equal(given[:, :, :-1], model_input(models["i2v"], plain, shorter))
    assert given[:, :4, -1].eq(1).all()
    alone = models["i2v"].model.process_latent_in(vae.encode(end))
    assert relative(given[:, 4:, -1:], alone) < 1e-6


def test_released_lengths(image_to_video, picture):
    """81 frames are 21 latents, and 22 with an added end frame (Wan2GP's 82 pixel frames)."""
    _, _, latent = image_to_video(num_frames=81, width=16, height=16)
    assert latent["samples"].shape == (1, 16, 21, 2, 2)
    _, _, latent = image_to_video(
        num_frames=81, width=16, height=16, end_image=picture, add_frames_for_end_image=True
    )
    assert latent["samples"].shape == (1, 16, 22, 2, 2)


def test_keep_aspect_chooses_the_size(image_to_video, picture):
    _, _, latent = image_to_video(start_image=picture, width=80, height=80, resize_mode="keep_aspect")
    assert latent["samples"].shape[-2:] == (8, 12)  # 96x64: 3:2 in an area of 80x80


def test_tile_size_reaches_the_vae(vae, picture, image_to_video):
    size = {"width": 256, "height": 128, "num_frames": 1}
    latent = {
        t: image_to_video(**size, tile_size=t)[0][0][1]["concat_latent_image"] for t in ("0", "128", "256")
    }
    frame = fit_image(picture, 256, 128, "crop")
    assert torch.equal(latent["0"], vae.encode(frame))
    assert relative(latent["256"], latent["0"]) < 1e-6  # one tile
    assert torch.equal(latent["128"], vae.encode_tiled(frame, tile_x=128, tile_y=128, overlap=32))
    assert not torch.equal(latent["128"], latent["0"])


def test_prompts_are_not_changed(prompts, image_to_video):
    image_to_video(clip_vision_start=clip_vision())
    assert "concat_latent_image" not in prompts[0][0][1]


def test_alpha_channel_is_left_out_and_that_is_said(picture, image_to_video, caplog):
    rgba = torch.cat([picture, picture[..., :1]], dim=-1)
    with caplog.at_level("INFO"):
        with_alpha, without = image_to_video(start_image=rgba), image_to_video()
    assert caplog.text.count("start_image has transparency, which is left out") == 1
    assert torch.equal(*(r[0][0][1]["concat_latent_image"] for r in (with_alpha, without)))


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"num_frames": 80}, r"num_frames is 80; Wan2.1 makes 4n\+1 frames. Set 77 or 81"),
        ({"width": 100}, "width is 100; sides are multiples of 8 pixels from 16 on. Set 96 or 104"),
        ({"height": 8}, "height is 8"),
        ({"start_image": torch.zeros(11, 64, 64, 3)}, "holds 11 frames and num_frames is 9.*to 13 or more"),
        ({"end_image": torch.zeros(2, 64, 64, 3)}, "end_image holds 2 images.* WanFirstLastFrameToVideo"),
        ({"start_image": torch.zeros(0, 64, 64, 3)}, r"start_image has the shape \[0, 64, 64, 3\]"),
        ({"start_image": torch.full((1, 64, 64, 3), float("nan"))}, "start_image holds NaN"),
        ({"end_image": torch.zeros(1, 64, 64, 2)}, "end_image has 2 channels"),
        ({"num_frames": 1, "end_image": torch.zeros(1, 64, 64, 3)}, "it must be at least 5"),
        ({"clip_vision_end": clip_vision()}, "clip_vision_start is not"),
    ],
)
def test_bad_input_is_named(image_to_video, inputs, message):
    with pytest.raises(ValueError, match="^Wan21ImageToVideo: .*" + message):
        image_to_video(**inputs)


def test_wrong_vae_is_named(image_to_video):
    class OtherVAE:
        latent_channels, latent_dim = 4, 2

        def spacial_compression_encode(self):
            return 8

    with pytest.raises(ValueError, match=r"the VAE has 4 channels \(Stable Diffusion's\)"):
        image_to_video(vae=OtherVAE())


def test_sizes_are_refused_when_queued():
    for sizes, said in (
        ((832, 480, 80), "Set 77 or 81"),
        ((830, 480, 81), "multiples of 8"),
        ((100000, 480, 81), "the most is"),
    ):
        with pytest.raises(Refusal, match=said):
            Wan21ImageToVideo.validate_inputs(*sizes)
    assert Wan21ImageToVideo.validate_inputs(832, None, None) is True


def test_what_does_not_fit_into_host_memory_is_refused(image_to_video, monkeypatch):
    with pytest.raises(
        ValueError, match=r"4097 frames of 8192x8192 take 8248\.4 GB of host memory.*Set fewer"
    ):
        image_to_video(width=8192, height=8192, num_frames=4097)
    image_to_video(width=64, height=64, num_frames=5)
