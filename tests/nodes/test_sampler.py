"""Wan21Sampler: equal to the host's sampler where both can do the same, its laws, and its errors."""

import re

import comfy.model_management as management
import folder_paths
import pytest
import torch
from helpers import relative
from helpers_nodes import clip_vision, host_euler
from safetensors.torch import load_file, save_file
from wan21 import host
from wan21.nodes.kept_latent import SAMPLING_SECONDS
from wan21.nodes.sampler import Wan21Sampler
from wan21.wan.sample import SampleJob


@pytest.fixture(scope="module")
def encoded(image_to_video):
    """The start image, encoded once."""
    with torch.inference_mode():
        return image_to_video(clip_vision_start=clip_vision())


@pytest.fixture
def i2v_job(models, encoded):
    positive, negative, latent = encoded
    own = ([[text, dict(extra)] for text, extra in conditioning] for conditioning in (positive, negative))
    return (models["i2v"], *own, dict(latent))


@pytest.fixture
def t2v_job(models, prompts):
    return (models["t2v"], *prompts, {"samples": torch.zeros(1, 16, 2, 4, 6)})


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("denoise", [1.0, 0.5])
def test_euler_equals_the_hosts_sampler(i2v_job, sample, scale, denoise):
    model, positive, negative, latent = i2v_job
    if denoise < 1:
        latent = {"samples": torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(9))}
    ours, _ = sample(model, positive, negative, latent, solver="euler", guidance_scale=scale, denoise=denoise)
    sigmas = SampleJob(3, scale, 3.0, "euler", denoise).sigmas
    expected = host_euler(model, positive, negative, latent, sigmas, scale, 3)
    assert relative(ours["samples"], expected) < 2e-5


def test_conditioning_of_the_native_nodes(models, prompts, vae, picture, sample, i2v_job):
    from comfy_extras.nodes_wan import WanImageToVideo

    theirs = WanImageToVideo.execute(
        *prompts, vae, 96, 64, 9, 1, start_image=picture, clip_vision_output=clip_vision()
    ).result
    ours, _ = sample(*i2v_job)
    assert torch.equal(sample(models["i2v"], *theirs)[0]["samples"], ours["samples"])


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_same_job_same_bytes_and_seed_matters(t2v_job, sample, solver):
    first, second = (sample(*t2v_job, solver=solver)[0]["samples"] for _ in range(2))
    assert torch.equal(first, second)
    assert relative(sample(*t2v_job, solver=solver, seed=4)[0]["samples"], first) > 0.1


def test_guidance_one_runs_no_unconditional_pass(t2v_job, sample):
    model, positive, negative, latent = t2v_job
    other = [[torch.randn_like(negative[0][0]), negative[0][1]]]
    ones = [sample(model, positive, n, latent, guidance_scale=1.0) for n in (negative, other)]
    assert torch.equal(ones[0][0]["samples"], ones[1][0]["samples"])
    assert "passes: 3 cond\n" in ones[0][1]
    fives = [sample(model, positive, n, latent, guidance_scale=5.0) for n in (negative, other)]
    assert not torch.equal(fives[0][0]["samples"], fives[1][0]["samples"])
    assert "passes: 3 cond, 3 uncond\n" in fives[0][1]


def test_batch_equals_single_runs_of_the_same_noise(models, prompts, sample):
    batch = {"samples": torch.zeros(2, 16, 2, 4, 4), "batch_index": [0, 1]}
    both = sample(models["t2v"], *prompts, batch)[0]["samples"]
    for i in (0, 1):
        one = {"samples": torch.zeros(1, 16, 2, 4, 4), "batch_index": [i]}
        assert relative(both[i : i + 1], sample(models["t2v"], *prompts, one)[0]["samples"]) < 1e-5


def test_contexts_of_different_lengths(models, prompts, sample):
    """Prompts past 512 tokens make passes of unequal context: each walks alone, zero padding kept."""
    latent = {"samples": torch.zeros(1, 16, 2, 4, 4)}
    long = [[torch.cat([prompts[0][0][0]] * 2, dim=1), {}]]
    model, negative = models["t2v"], prompts[1]
    ours = sample(model, long, negative, latent, solver="euler")[0]["samples"]
    expected = host_euler(model, long, negative, latent, SampleJob(3, 4.0, 3.0, "euler").sigmas, 4.0, 3)
    assert relative(ours, expected) < 2e-5


def test_report_names_what_was_run(t2v_job, sample):
    latent, report = sample(*t2v_job)
    assert f"time: {latent[SAMPLING_SECONDS]:.1f} s" in report
    for line in (
        "model: t2v, 2 blocks, width 256",
        "size: 48x32, 5 frames",
        "latent: 2 frames of 6x4, 12 tokens",
        "seed: 3",
        "solver: unipc, 3 steps, guidance 4, shift 3, denoise 1",
        "timesteps: 999 ",
        "s per step",
        "memory: ",
    ):
        assert line in report
    assert "note:" not in report


def test_seed_minus_one_is_drawn_reported_and_not_cached(t2v_job, sample):
    latent, report = sample(*t2v_job, seed=-1)
    seed = int(re.search(r"seed: (\d+)", report)[1])
    assert torch.equal(latent["samples"], sample(*t2v_job, seed=seed)[0]["samples"])
    prints = [Wan21Sampler.fingerprint_inputs(seed=-1) for _ in range(2)]
    assert prints[0] != prints[1]
    assert Wan21Sampler.fingerprint_inputs(seed=7) == Wan21Sampler.fingerprint_inputs(seed=7)


def test_plain_i2v_reads_the_start_image_only_and_says_so(models, image_to_video, picture, sample):
    both = {"clip_vision_start": clip_vision(seed=1), "clip_vision_end": clip_vision(seed=2)}
    one = {"clip_vision_start": clip_vision(seed=1)}
    with_end, report = sample(models["i2v"], *image_to_video(**both))
    alone, plain_report = sample(models["i2v"], *image_to_video(**one))
    assert torch.equal(with_end["samples"], alone["samples"])
    assert "start image only" in report and "note" not in plain_report
    flf = [sample(models["flf2v"], *image_to_video(end_image=picture, **c)) for c in (both, one)]
    assert not torch.equal(flf[0][0]["samples"], flf[1][0]["samples"])
    assert "clip_vision_end is missing" in flf[1][1]


def test_patches_that_do_not_apply_are_said(models, prompts, sample):
    from comfy_extras.nodes_cfg import CFGZeroStar
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    model = ModelSamplingSD3().patch(CFGZeroStar.execute(models["t2v"]).result[0], 2.0)[0]
    _, report = sample(model, *prompts, {"samples": torch.zeros(1, 16, 2, 4, 4)})
    assert "sampler_post_cfg_function set on the MODEL" in report
    assert "ModelSampling (its shift) set on the MODEL" in report


def test_wrappers_that_do_not_apply_are_said(models, prompts, sample):
    from comfy.patcher_extension import WrappersMP

    model = models["t2v"].clone()
    model.set_model_unet_function_wrapper(lambda apply, args: pytest.fail("called"))
    model.add_wrapper(WrappersMP.PREDICT_NOISE, lambda *_: pytest.fail("called"))
    _, report = sample(model, *prompts, {"samples": torch.zeros(1, 16, 2, 4, 4)})
    assert "model_function_wrapper set on the MODEL" in report
    assert "a predict_noise wrapper set on the MODEL" in report


def _with_context_windows(model):
    from comfy_extras.nodes_context_windows import WanContextWindowsManualNode

    return WanContextWindowsManualNode.execute(
        model, 81, 30, "standard_static", 1, False, "pyramid", True
    ).result[0]


def _with_attention_patch(model):
    patched = model.clone()
    patched.set_model_attn2_patch(lambda args: args["x"])
    return patched


def _with_cache(name):
    def add(model):
        from comfy_extras import nodes_easycache

        return getattr(nodes_easycache, name).execute(model, 0.2, 0.15, 0.95, False).result[0]

    return add


@pytest.mark.parametrize(
    "patch, message",
    [
        (_with_cache("EasyCacheNode"), "EasyCache or LazyCache.*set cache to teacache"),
        (_with_cache("LazyCacheNode"), "EasyCache or LazyCache"),
        (_with_context_windows, "Context Windows"),
        (_with_attention_patch, "attn2_patch"),
    ],
)
def test_patches_that_would_spoil_the_result(models, prompts, sample, monkeypatch, patch, message):
    monkeypatch.setattr(host, "run_sampling", lambda *_: pytest.fail("sampling began"))
    with pytest.raises(ValueError, match=r"^Wan21Sampler: .*" + message):
        sample(patch(models["t2v"]), *prompts, {"samples": torch.zeros(1, 16, 2, 4, 4)})


def test_a_negative_that_is_not_used_may_be_anything(i2v_job, sample):
    model, positive, _, latent = i2v_job
    expected = sample(*i2v_job, guidance_scale=1.0)[0]["samples"]
    bare = [[torch.zeros(1, 512, 128), {"area": (1, 1, 0, 0)}]] * 2
    assert torch.equal(sample(model, positive, bare, latent, guidance_scale=1.0)[0]["samples"], expected)


def test_a_refinement_adds_its_time_to_what_it_refines(t2v_job, sample):
    refined = sample(*t2v_job)[0] | {SAMPLING_SECONDS: 1000.0}
    again, _ = sample(*t2v_job[:3], refined, denoise=0.5)
    assert again[SAMPLING_SECONDS] > 1000
    fresh, _ = sample(*t2v_job[:3], refined)
    assert fresh[SAMPLING_SECONDS] < 1000


def test_a_refinement_that_fails_keeps_what_it_refines(t2v_job, sample, tmp_path, monkeypatch):
    from nodes import LoadLatent

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    model, positive, negative, latent = t2v_job
    first = sample(model, positive, negative, latent)[0] | {SAMPLING_SECONDS: 3600}
    sample(model, positive, negative, first, denoise=0.5)
    assert not [*tmp_path.rglob("*.latent")]
    with pytest.raises(RuntimeError, match=r"^Wan21Sampler: .*skip_layers.*60 min.*is kept in"):
        sample(model, positive, negative, first, denoise=0.5, skip_layers__layers="99")
    [path] = tmp_path.rglob("*.latent")
    [kept] = LoadLatent().load(f"wan21/{path.name} [output]")
    assert torch.equal(kept["samples"], first["samples"])


def test_an_image_model_without_image_branch_is_told_of(files, image_to_video, sample, tmp_path):
    image_branch = re.compile("img_emb|k_img|v_img")
    weights = {key: value for key, value in load_file(files["i2v"]).items() if not image_branch.search(key)}
    metadata = {"config": '{"transformer": {"text_dim": 128}}'}
    save_file(weights, tmp_path / "wan2.2_i2v_low_noise.safetensors", metadata)
    report = sample(host.load_model(tmp_path / "wan2.2_i2v_low_noise.safetensors"), *image_to_video())[1]
    assert "Wan2.2-A14B" in report and "model_low_noise" in report


def test_cancel_stops_within_a_block_and_leaves_nothing_behind(t2v_job, sample):
    model = t2v_job[0]
    expected = sample(*t2v_job)[0]["samples"]
    blocks = model.model.diffusion_model.blocks
    calls = []

    def cancel_in_third_block(module, args):
        calls.append(module)
        if len(calls) == 3:
            management.interrupt_current_processing(True)

    handles = [block.register_forward_pre_hook(cancel_in_third_block) for block in blocks]
    with pytest.raises(management.InterruptProcessingException):
        sample(*t2v_job)
    for handle in handles:
        handle.remove()
    assert len(calls) == 3
    assert torch.equal(sample(*t2v_job)[0]["samples"], expected)


def test_progress_and_preview_strip(t2v_job, sample, monkeypatch):
    import comfy.utils
    from comfy.cli_args import LatentPreviewMethod, args

    seen = []
    monkeypatch.setattr(
        comfy.utils,
        "PROGRESS_BAR_HOOK",
        lambda value, total, preview, node_id: seen.append((value, total, preview)),
    )
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    sample(*t2v_job)
    assert [(value, total) for value, total, _ in seen] == [
        (1, 3),
        (2, 3),
        (3, 3),
        (3, 3),
    ]  # the last of the result
    kind, image, _ = seen[0][2]
    assert kind == "JPEG" and image.size == (2 * 6, 4)  # both latent frames side by side


BAD = [
    ({"latent": {"samples": torch.ones(1, 4, 8, 8)}}, r"\[1, 4, 1, 8, 8\] \(Stable Diffusion latent\)"),
    ({"latent": {"samples": torch.ones(1, 48, 2, 8, 8)}}, "Wan2.2-5B latent"),
    ({"latent": {"samples": torch.full((1, 16, 3, 8, 12), float("inf"))}}, "NaN or infinite"),
    ({"latent": {"samples": torch.zeros(1, 16, 5, 8, 12)}}, r"image in positive is 96x64, 9 frames"),
    ({"denoise": 0.5}, "denoise is 0.5 and the latent is empty"),
    ({"positive": []}, "positive is empty; .*Connect a text encode"),
    ({"positive": [[torch.zeros(1, 512, 4096), {}]]}, "text features 4096 wide; this model reads 128"),
    ({"negative": [[torch.zeros(1, 512, 128), {"area": (1, 1, 0, 0)}]]}, "negative carries area"),
    ({"positive": [[torch.zeros(1, 512, 128), {}]] * 2}, "positive holds 2 entries"),
]  # fmt: skip


@pytest.mark.parametrize("inputs, message", BAD)
def test_bad_input_is_named_before_any_step(i2v_job, sample, inputs, message, monkeypatch):
    monkeypatch.setattr(host, "run_sampling", lambda *_: pytest.fail("sampling began"))
    job = dict(zip(("model", "positive", "negative", "latent"), i2v_job))
    with pytest.raises(ValueError, match=r"^Wan21Sampler: .*" + message):
        sample(**(job | inputs))


@pytest.mark.parametrize(
    "what, shape", [("image", (1, 16, 8, 12)), ("image", (1, 20, 3, 8, 12)), ("mask", (1, 1, 8, 12))]
)
def test_a_picture_of_a_shape_that_no_node_gives_is_named(i2v_job, sample, what, shape):
    model, positive, negative, latent = i2v_job
    key = {"image": "concat_latent_image", "mask": "concat_mask"}[what]
    given = [[text, {**values, key: torch.zeros(shape)}] for text, values in positive]
    with pytest.raises(ValueError, match=rf"the {what} in positive has the shape \[1, {shape[1]}, .*\]"):
        sample(model, given, negative, latent)


def _asked_by_host_nodes():
    from comfy import controlnet, hooks

    import nodes as host_nodes

    mask = torch.ones(1, 8, 8)

    def control(cond):
        net, picture = controlnet.ControlNet(None), torch.zeros(1, 64, 64, 3)
        net.control_model_wrapped = None  # what there is of a net without weights
        both = host_nodes.ControlNetApplyAdvanced().apply_controlnet(cond, cond, net, picture, 1.0, 0.0, 1.0)
        return both[0]

    def hooked(cond):
        settings = {"strength": 1.0, "set_cond_area": "default", "hooks": hooks.HookGroup()}
        return hooks.set_conds_props([cond, cond], **settings)[0]

    return {
        "area": lambda cond: host_nodes.ConditioningSetArea().append(cond, 64, 64, 0, 0, 1.0)[0],
        "mask": lambda cond: host_nodes.ConditioningSetMask().append(cond, mask, "default", 1.0)[0],
        "control": control,
        "hooks": hooked,
        "start_percent": lambda cond: host_nodes.ConditioningSetTimestepRange().set_range(cond, 0.1, 1.0)[0],
    }


@pytest.mark.parametrize("key", ["area", "mask", "control", "hooks", "start_percent"])
def test_what_host_nodes_ask_for_and_is_not_done_is_named(i2v_job, sample, key):
    model, positive, negative, latent = i2v_job
    asking = _asked_by_host_nodes()[key](positive)
    with pytest.raises(ValueError, match=f"^Wan21Sampler: positive carries .*{key}"):
        sample(model, asking, negative, latent)


def test_image_on_a_text_to_video_model_is_named(models, image_to_video, sample):
    with pytest.raises(ValueError, match="the model is text-to-video"):
        sample(models["t2v"], *image_to_video())


@pytest.mark.parametrize("tokens", [50, 577])
def test_wrong_clip_vision_is_named(models, image_to_video, sample, tokens):
    with pytest.raises(ValueError, match=f"CLIP vision features of {tokens} tokens x 1280"):
        sample(models["i2v"], *image_to_video(clip_vision_start=clip_vision(tokens)))


def test_a_model_of_another_loader_is_named(files, prompts, sample):
    import comfy.sd

    native = comfy.sd.load_diffusion_model(str(files["t2v"]))
    with pytest.raises(ValueError, match="was not loaded by Wan21ModelLoader"):
        sample(native, *prompts, {"samples": torch.zeros(1, 16, 2, 4, 4)})


def test_a_latent_that_overflowed_is_named(t2v_job, sample, monkeypatch):
    monkeypatch.setattr(host, "run_sampling", lambda *a: _nan_run(*a))
    with pytest.raises(ValueError, match=r"^Wan21Sampler: step 1 of \d+ gave NaN .*\. The usual causes"):
        sample(*t2v_job)


def _nan_run(model, prepared, latent, seed, run):
    class Overflow:
        config = host.config_of(model)
        embed_time = make_room = None

        def predict(self, x, timestep, call):
            return {name: x * float("nan") for name in call.pass_names}

    return run(Overflow(), latent["samples"] + 1, latent["samples"], None)
