"""Latents and conditioning as other nodes make them: as in the host's samplers, or said."""

import sys
from types import SimpleNamespace

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.nested_tensor import NestedTensor
from helpers import relative
from helpers_nodes import clip_vision, host_euler
from wan21 import host
from wan21.nodes.vae_decode import Wan21VAEDecode
from wan21.wan.sample import SampleJob

import nodes as host_nodes

SIGMAS = SampleJob(3, 4.0, 3.0, "euler").sigmas


def video(frames=2, height=4, width=6, seed=9, batch=1):
    generator = torch.Generator().manual_seed(seed)
    return {"samples": torch.randn(batch, 16, frames, height, width, generator=generator)}


# --- the end image as a latent of its own ---------------------------------------------------------------


@pytest.fixture
def guided(models, image_to_video, picture):
    """A job whose end image is a latent of its own: 9 frames, 3 latents and the guide."""
    return (models["i2v"], *image_to_video(end_image=picture.flip(2), add_frames_for_end_image=True))


def test_the_guide_is_dropped_by_the_sampler(guided, sample, vae):
    latent, report = sample(*guided)
    assert guided[3]["samples"].shape[2] == 4 and latent["samples"].shape[2] == 3
    assert "size: 96x64, 9 frames" in report and "latent: 4 frames" in report
    ours = Wan21VAEDecode.execute(vae, latent, "0").result[0]
    theirs = host_nodes.VAEDecode().decode(vae, {"samples": latent["samples"]})[0]
    assert ours.shape == theirs.shape == (9, 64, 96, 3) and torch.equal(ours, theirs)


def test_the_hosts_samplers_drop_it_too(guided, sample, vae):
    model, positive, negative, latent = guided
    expected = sample(*guided, solver="euler")[0]["samples"]
    out = host_euler(model, positive, negative, latent, SIGMAS, 4.0, 3)
    assert out.shape[2] == 3 and relative(out, expected) < 2e-5
    k = host_nodes.KSampler().sample(model, 3, 2, 4.0, "euler", "simple", positive, negative, latent)[0]
    assert k["samples"].shape[2] == 3
    assert Wan21VAEDecode.execute(vae, k, "0").result[0].shape[0] == 9


def test_it_stays_while_noise_is_left_over(guided):
    model, positive, negative, latent = guided

    def part(latent, noise, first, last, leftover):
        return host_nodes.KSamplerAdvanced().sample(
            model, noise, 3, 4, 4.0, "euler", "simple", positive, negative, latent, first, last, leftover
        )[0]

    halves = part(part(latent, "enable", 0, 2, "enable"), "disable", 2, 10000, "disable")["samples"]
    whole = part(latent, "enable", 0, 10000, "disable")["samples"]
    assert halves.shape[2] == 3 and relative(halves, whole) < 1e-5


@pytest.mark.parametrize("mask", [None, "frames", "one"])
@pytest.mark.parametrize("by_host", [False, True])
def test_a_video_without_it_is_given_it_again(guided, sample, mask, by_host):
    """A second run over the result, as a refinement has it: the guide is the one of the conditioning."""
    model, positive, negative, _ = guided
    start = video(3, 8, 12)
    guide = positive[0][1]["concat_latent_image"][:, :, -1:]
    whole = {"samples": torch.cat([start["samples"], guide], dim=2)}
    if mask is not None:
        seen = torch.zeros(1, 1, 3 if mask == "frames" else 1, 8, 12)
        seen[:, :, -1:, :, 4:] = 1
        start["noise_mask"] = seen
        seen = seen.expand(1, 1, 3, 8, 12)
        whole["noise_mask"] = torch.cat([seen, torch.ones(1, 1, 1, 8, 12)], dim=2)
    if by_host:
        args = (model, 3, 3, 4.0, "euler", "simple", positive, negative)
        out = host_nodes.KSampler().sample(*args, start, 0.5)[0]["samples"]
        assert out.shape[2] == 3 and torch.isfinite(out).all()
        return
    outs = [sample(model, positive, negative, x, denoise=0.5)[0]["samples"] for x in (start, whole)]
    assert outs[0].shape[2] == 3 and torch.equal(*outs)


def test_the_previews_of_the_hosts_samplers_are_without_it(guided, monkeypatch):
    import latent_preview

    seen = []
    monkeypatch.setattr(
        latent_preview, "prepare_callback", lambda *_: lambda i, x0, x, steps: seen.append(x0.shape[2])
    )
    host_nodes.KSampler().sample(guided[0], 3, 2, 4.0, "euler", "simple", *guided[1:])
    assert seen == [3, 3]


def test_the_end_image_as_the_last_frame_is_no_guide(models, image_to_video, picture, sample):
    latent, _ = sample(models["i2v"], *image_to_video(end_image=picture))
    assert latent["samples"].shape[2] == 3


# --- noise masks ------------------------------------------------------------------------------------------


def host_masked(model, positive, negative, latent, sigmas):
    noise = comfy.sample.prepare_noise(latent["samples"], 3)
    return comfy.sample.sample_custom(
        model, noise, 4.0, comfy.samplers.sampler_object("euler"), torch.tensor(sigmas), positive, negative,
        latent["samples"], noise_mask=latent.get("noise_mask"), seed=3, disable_pbar=True,
    )  # fmt: skip


def half_mask(*shape):
    mask = torch.zeros(shape)
    mask[..., shape[-1] // 2 :] = 1
    mask[..., shape[-1] // 2] = 0.4
    return mask


@pytest.mark.parametrize("denoise", [1.0, 0.5])
@pytest.mark.parametrize(
    "mask",
    [half_mask(1, 32, 48), half_mask(2, 32, 48), half_mask(1, 1, 2, 4, 6)],
    ids=lambda m: list(m.shape),
)
def test_a_noise_mask_keeps_what_it_leaves_out_as_in_the_hosts_sampler(
    models, prompts, sample, mask, denoise
):
    latent = video() | {"noise_mask": mask}
    ours, report = sample(models["t2v"], *prompts, latent, solver="euler", denoise=denoise)
    sigmas = SampleJob(3, 4.0, 3.0, "euler", denoise).sigmas
    assert relative(ours["samples"], host_masked(models["t2v"], *prompts, latent, sigmas)) < 2e-5
    kept = (ours["samples"] - latent["samples"])[..., :2]
    assert kept.abs().max() < 1e-4 < (ours["samples"] - latent["samples"])[..., 4:].abs().min()
    assert "note" not in report


def test_a_mask_that_an_image_model_reads_in_place_of_its_own(models, prompts, sample):
    """Without a mask in the conditioning the host gives the model the noise mask."""
    latent = video(3, 8, 12) | {"noise_mask": half_mask(1, 64, 96)}
    known = [
        [[text, {**extra, "concat_latent_image": latent["samples"]}] for text, extra in c] for c in prompts
    ]
    ours = sample(models["i2v"], *known, latent, solver="euler")[0]["samples"]
    assert relative(ours, host_masked(models["i2v"], *known, latent, SIGMAS)) < 2e-5


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_a_mask_of_ones_changes_no_bit(models, prompts, sample, solver):
    for options in ({}, {"cfg_star__zero_init_steps": 1, "cfg_star": True}):
        job = {"solver": solver, "denoise": 0.5, "steps": 4, **options}
        plain = sample(models["t2v"], *prompts, video(), **job)[0]["samples"]
        ones = video() | {"noise_mask": torch.ones(1, 32, 48)}
        assert torch.equal(sample(models["t2v"], *prompts, ones, **job)[0]["samples"], plain)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_differential_diffusion_changes_the_mask_by_the_step(models, prompts, sample, strength):
    from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion

    model = DifferentialDiffusion.execute(models["t2v"], strength).result[0]
    latent = video() | {"noise_mask": torch.linspace(0, 1, 48).expand(1, 32, 48)}
    ours, report = sample(model, *prompts, latent, solver="euler")
    assert relative(ours["samples"], host_masked(model, *prompts, latent, SIGMAS)) < 2e-5
    plain = sample(models["t2v"], *prompts, latent, solver="euler")[0]["samples"]
    assert relative(ours["samples"], plain) > 1e-3 and "note" not in report


# --- sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", [(5, 8), (4, 7), (5, 7)])
def test_sides_that_are_multiples_of_8_are_padded_as_natively(models, files, prompts, sample, sides):
    import comfy.sd

    latent = video(2, *sides)
    ours, report = sample(models["t2v"], *prompts, latent, solver="euler")
    native = comfy.sd.load_diffusion_model(str(files["t2v"]))
    assert relative(ours["samples"], host_euler(native, *prompts, latent, SIGMAS, 4.0, 3)) < 2e-5
    tokens = 2 * (-(-sides[0] // 2)) * (-(-sides[1] // 2))
    assert f"size: {sides[1] * 8}x{sides[0] * 8}" in report and f"{tokens} tokens" in report


@pytest.mark.parametrize("sides", [(16, 24), (12, 18), (9, 13), (8, 16)])
def test_a_latent_upscaled_between_samplers_has_the_image_resized(models, image_to_video, sample, sides):
    positive, negative, empty = image_to_video(clip_vision_start=clip_vision())
    first = sample(models["i2v"], positive, negative, empty)[0]
    larger = host_nodes.LatentUpscale().upscale(first, "bilinear", sides[1] * 8, sides[0] * 8, "disabled")[0]
    ours, report = sample(models["i2v"], positive, negative, larger, solver="euler", denoise=0.5)
    sigmas = SampleJob(3, 4.0, 3.0, "euler", 0.5).sigmas
    assert (
        relative(ours["samples"], host_euler(models["i2v"], positive, negative, larger, sigmas, 4.0, 3))
        < 2e-5
    )
    assert (
        "the image in positive is 96x64" in report and f"the latent, {sides[1] * 8}x{sides[0] * 8}" in report
    )


def test_an_empty_latent_of_another_kind_is_taken_as_the_hosts_samplers_take_it(models, prompts, sample):
    four = host_nodes.EmptyLatentImage().generate(48, 32, 1)[0]
    ours, report = sample(models["t2v"], *prompts, four, solver="euler", steps=2)
    sixteen = {"samples": torch.zeros(1, 16, 1, 4, 6)}
    assert torch.equal(
        ours["samples"], sample(models["t2v"], *prompts, sixteen, solver="euler", steps=2)[0]["samples"]
    )
    assert "note: the latent [1, 4, 4, 6] of another kind is taken as [1, 16, 1, 4, 6]" in report


# --- conditioning of other nodes --------------------------------------------------------------------------


def with_values(conditioning, **values):
    return [[text, {**extra, **values}] for text, extra in conditioning]


def test_a_latent_of_video_and_sound_is_named(models, prompts, sample):
    both = NestedTensor((torch.zeros(1, 16, 2, 4, 4), torch.zeros(1, 8, 4)))
    with pytest.raises(
        ValueError, match=r"the latent holds 2 latents, as of video with sound .*Connect Wan21"
    ):
        sample(models["t2v"], *prompts, {"samples": both})


def test_an_image_model_without_an_image_runs_as_natively(models, files, prompts, sample):
    import comfy.sd

    latent = {"samples": torch.zeros(1, 16, 2, 4, 6)}
    seen = [with_values(c, clip_vision_output=clip_vision()) for c in prompts]
    ours, report = sample(models["i2v"], *seen, latent, solver="euler")
    native = comfy.sd.load_diffusion_model(str(files["i2v"]))
    for model in (models["i2v"], native):
        assert relative(ours["samples"], host_euler(model, *seen, latent, SIGMAS, 4.0, 3)) < 2e-5
    assert "positive carries no image" in report and "negative carries no image" in report


def test_clip_features_of_more_images_are_read_as_natively(models, files, image_to_video, sample):
    """By the host's samplers; ours gives a model those of one image, as it was trained, and says so."""
    import comfy.sd

    job = image_to_video(clip_vision_start=clip_vision(3 * 257))
    native = host_euler(comfy.sd.load_diffusion_model(str(files["i2v"])), *job, SIGMAS, 4.0, 3)
    assert relative(host_euler(models["i2v"], *job, SIGMAS, 4.0, 3), native) < 2e-5
    assert "those of the end image are left out" in sample(models["i2v"], *job)[1]


def test_a_first_last_frame_model_has_no_place_for_more(models, image_to_video, sample):
    job = image_to_video(clip_vision_start=clip_vision(3 * 257))
    with pytest.raises(ValueError, match=r"771 tokens.* places for 514"):
        host_euler(models["flf2v"], *job, SIGMAS, 4.0, 3)
    assert "two images only; those of the others are left out" in sample(models["flf2v"], *job)[1]


def test_without_clip_vision_it_is_said_that_the_hosts_model_reads_the_text_there(
    models, image_to_video, sample, caplog
):
    words = "without CLIP vision features the model's image branch reads the text"
    job = image_to_video()
    assert sample(models["i2v"], *job)[1].count(words) == 1
    caplog.clear()
    with caplog.at_level("INFO"):
        host_euler(models["i2v"], *job, SIGMAS, 4.0, 3)
    assert words in caplog.text
    assert words not in sample(models["i2v"], *image_to_video(clip_vision_start=clip_vision()))[1]


def test_clip_features_that_a_text_model_does_not_read_are_said(models, prompts, sample):
    seen = [with_values(c, clip_vision_output=clip_vision()) for c in prompts]
    latent = {"samples": torch.zeros(1, 16, 2, 4, 6)}
    assert "no image branch: CLIP vision is not used" in sample(models["t2v"], *seen, latent)[1]


def test_no_context_latents_ask_for_nothing(models, prompts, sample):
    """Bernini's node without references."""
    latent = {"samples": torch.zeros(1, 16, 2, 4, 6)}
    none = [with_values(c, context_latents=[]) for c in prompts]
    by_host = [host_euler(models["t2v"], *c, latent, SIGMAS, 4.0, 3) for c in (none, prompts)]
    assert torch.equal(*by_host)
    outs = [sample(models["t2v"], *c, latent)[0]["samples"] for c in (none, prompts)]
    assert torch.equal(*outs)


@pytest.mark.parametrize("key", ["reference_latents", "vace_frames", "audio_embed", "of_a_pack"])
def test_what_no_wan21_model_reads_is_said(models, files, prompts, sample, key):
    import comfy.sd

    value = [torch.ones(1, 16, 1, 4, 6)]
    foreign = [with_values(c, **{key: value}) for c in prompts]
    latent = {"samples": torch.zeros(1, 16, 2, 4, 6)}
    ours, report = sample(models["t2v"], *foreign, latent, solver="euler")
    assert torch.equal(ours["samples"], sample(models["t2v"], *prompts, latent, solver="euler")[0]["samples"])
    native = comfy.sd.load_diffusion_model(str(files["t2v"]))
    assert relative(ours["samples"], host_euler(native, *foreign, latent, SIGMAS, 4.0, 3)) < 2e-5
    assert relative(ours["samples"], host_euler(models["t2v"], *foreign, latent, SIGMAS, 4.0, 3)) < 2e-5
    assert f"note: positive carries {key}, which this model does not read" in report


@pytest.mark.parametrize("negative_too", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_frames_of_subjects_are_read_as_natively(models, files, prompts, sample, negative_too, batch):
    """Phantom: latents of pictures that stand behind the video's."""
    import comfy.sd

    subjects = video(3, seed=4)["samples"]
    positive = with_values(prompts[0], time_dim_concat=subjects)
    negative = with_values(prompts[1], time_dim_concat=subjects) if negative_too else prompts[1]
    latent = {"samples": torch.zeros(batch, 16, 2, 4, 6)}
    ours, report = sample(models["t2v"], positive, negative, latent, solver="euler")
    assert ours["samples"].shape == (batch, 16, 2, 4, 6) and "note" not in report
    native = comfy.sd.load_diffusion_model(str(files["t2v"]))
    expected = host_euler(native, positive, negative, latent, SIGMAS, 4.0, 3)
    assert relative(ours["samples"], expected) < 2e-5
    by_host = host_euler(models["t2v"], positive, negative, latent, SIGMAS, 4.0, 3)
    assert relative(by_host, expected) < 2e-5
    plain = sample(models["t2v"], *prompts, latent, solver="euler")[0]["samples"]
    assert relative(ours["samples"], plain) > 1e-3


def test_the_memory_of_frames_of_subjects_is_counted(models):
    model = models["t2v"].model
    shapes = model.extra_conds_shapes(time_dim_concat=torch.zeros(1, 16, 3, 4, 6))
    told = {k: [v] for k, v in shapes.items()}
    assert model.memory_required([2, 16, 2, 4, 6], told) == model.memory_required([2, 16, 5, 4, 6])


def test_frames_of_subjects_that_do_not_fit_are_named(models, image_to_video, prompts, sample):
    positive, negative, latent = image_to_video()
    subjects = torch.zeros(1, 16, 1, 8, 12)
    with pytest.raises(ValueError, match=r"time_dim_concat .* the model is image-to-video"):
        sample(models["i2v"], with_values(positive, time_dim_concat=subjects), negative, latent)
    with pytest.raises(ValueError, match="channels and sides are the same"):
        host_euler(
            models["t2v"],
            with_values(prompts[0], time_dim_concat=subjects),
            prompts[1],
            video(),
            SIGMAS,
            4.0,
            3,
        )


def test_in_context_latents_are_refused_before_the_model_is_loaded(models, prompts, sample, monkeypatch):
    import comfy.model_management

    context = with_values(prompts[0], context_latents=[torch.ones(1, 16, 1, 4, 6)])
    latent = {"samples": torch.zeros(1, 16, 2, 4, 6)}
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="context_latents"):
        sample(models["t2v"], context, prompts[1], latent)
    with pytest.raises(ValueError, match=r"context_latents \(Bernini\).*Load Diffusion Model"):
        host_euler(models["t2v"], context, prompts[1], latent, SIGMAS, 4.0, 3)


def test_a_range_of_the_whole_run_asks_for_nothing(models, prompts, sample):
    ranged = host_nodes.ConditioningSetTimestepRange().set_range(prompts[0], 0.0, 1.0)[0]
    latent = {"samples": torch.zeros(1, 16, 2, 4, 6)}
    outs = [sample(models["t2v"], p, prompts[1], latent)[0]["samples"] for p in (ranged, prompts[0])]
    assert torch.equal(*outs)


# --- what is said -----------------------------------------------------------------------------------------


@pytest.fixture
def node(monkeypatch):
    """Runs as node 7 of a server. -> the texts that it showed, one after the other."""
    from comfy_execution.utils import CurrentNodeContext

    texts = []
    server = SimpleNamespace(
        client_id="c", send_progress_text=lambda text, node_id, _: texts.append((node_id, text))
    )
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    with CurrentNodeContext("prompt", "7"):
        yield texts


def test_what_was_left_out_is_on_the_node_in_the_log_and_in_the_report(models, prompts, sample, node, caplog):
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    model = ModelSamplingSD3().patch(models["t2v"], 2.0)[0]
    with caplog.at_level("INFO"):
        _, report = sample(model, *prompts, video(), riflex="auto", cfg_star=True, guidance_scale=1.0)
    expected = (
        "the latent holds a video, and at denoise 1 nothing of it is used; below 1 it is the start",
        "ModelSampling (its shift) set on the MODEL by another node is not used here",
        "riflex auto acts from 97 frames on; this video has 5",
        "cfg_star has no effect at guidance_scale 1, which runs no unconditional pass",
    )
    assert ("7", "\n".join(expected)) in node  # before the first step
    *told, seconds, memory = node[-1][1].splitlines()
    assert told == list(expected) and f"time: {seconds}" in report and f"memory: {memory}" in report
    assert report.startswith("note: ")
    assert [line for line in report.splitlines() if "note" in line] == [f"note: {line}" for line in expected]
    for line in expected:
        assert f"Wan21Sampler {line}" in caplog.text


def test_a_node_repeats_nothing_and_each_run_begins_anew(node):
    for _ in range(2):
        node.clear()
        with host.speaking_as("A"):
            for sentence in ("one", "two", "one"):
                host.tell(sentence)
        assert node == [("7", "one"), ("7", "one\ntwo")]


def test_a_full_run_is_one_by_one_rule(models, prompts, sample):
    """The host takes 0.9999 and below for a part of a run; so do schedule, start and checks."""
    latent = {"samples": torch.zeros(1, 16, 2, 4, 6)}
    full = sample(models["t2v"], *prompts, latent, denoise=0.99995)[0]["samples"]
    assert torch.equal(full, sample(models["t2v"], *prompts, latent)[0]["samples"])
    with pytest.raises(ValueError, match="the latent is empty"):
        sample(models["t2v"], *prompts, latent, denoise=0.9999)


@pytest.mark.parametrize(
    "part, maker", [("text", "text encoder"), ("image", "VAE"), ("CLIP vision", "CLIP vision model")]
)
def test_nan_in_conditioning_is_blamed_on_what_made_it(models, image_to_video, sample, part, maker):
    positive, negative, latent = image_to_video(clip_vision_start=clip_vision())
    text, extra = negative[0]
    if part == "text":
        text = text.clone().index_fill_(1, torch.tensor(3), float("nan"))
    elif part == "image":
        extra = {**extra, "concat_latent_image": extra["concat_latent_image"] / 0}
    else:
        spoilt = clip_vision()
        spoilt.penultimate_hidden_states[0, 0, 0] = float("inf")
        extra = {**extra, "clip_vision_output": spoilt}
    with pytest.raises(ValueError, match=f"^Wan21Sampler: the {part} features in negative hold NaN.*{maker}"):
        sample(models["i2v"], positive, [[text, extra]], latent)
