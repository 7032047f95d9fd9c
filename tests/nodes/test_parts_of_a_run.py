"""Parts of a schedule, given schedules, solvers that add noise and two experts, beside the host's."""

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import BasicScheduler, SamplerCustom, SplitSigmas
from helpers import relative
from safetensors.torch import load_file, save_file
from wan21 import host
from wan21.nodes.sampler import Wan21Sampler, check_names
from wan21.wan.refusal import Refusal
from wan21.wan.sample import SampleJob

import nodes as host_nodes

EMPTY = {"samples": torch.zeros(1, 16, 2, 4, 6)}
TEACACHE = {"cache__multiplier": 2.0, "cache__profile": "t2v_1.3b"}
HOST_NAMES = {"euler": "euler", "lcm": "lcm", "dpm++_sde": "dpmpp_sde"}


def video(seed=9):
    return {"samples": torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(seed))}


def by_host(model, positive, negative, latent, sigmas, cfg, solver, seed=3):
    sampler = comfy.samplers.sampler_object(HOST_NAMES[solver])
    return SamplerCustom.execute(
        model, True, seed, cfg, positive, negative, sampler, torch.tensor(sigmas), latent
    ).result[0]["samples"]


# --- solvers that add noise on the way --------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["lcm", "dpm++_sde"])
@pytest.mark.parametrize(
    "scale, denoise, steps", [(1.0, 1.0, 4), (4.0, 1.0, 8), (4.0, 0.5, 3), (1.0, 1.0, 1)]
)
def test_a_solver_that_adds_noise_equals_the_hosts(models, prompts, sample, solver, scale, denoise, steps):
    latent = EMPTY if denoise == 1 else video()
    ours, _ = sample(
        models["t2v"], *prompts, latent, solver=solver, guidance_scale=scale, denoise=denoise, steps=steps
    )
    sigmas = SampleJob(steps, scale, 3.0, solver, denoise).sigmas
    assert relative(ours["samples"], by_host(models["t2v"], *prompts, latent, sigmas, scale, solver)) < 2e-5


@pytest.mark.parametrize("solver", ["lcm", "dpm++_sde"])
def test_its_noise_is_of_the_seed(models, prompts, sample, solver):
    job = {"solver": solver, "steps": 4}
    first, again = (sample(models["t2v"], *prompts, EMPTY, **job)[0]["samples"] for _ in range(2))
    assert torch.equal(first, again)
    assert relative(sample(models["t2v"], *prompts, EMPTY, **job, seed=4)[0]["samples"], first) > 0.1


def test_four_steps_of_a_distilled_model_are_those_of_its_authors(models, prompts, sample):
    for solver in ("euler", "lcm"):
        job = {"solver": solver, "steps": 4, "flow_shift": 5.0, "guidance_scale": 1.0}
        _, report = sample(models["t2v"], *prompts, EMPTY, **job)
        assert report.endswith("timesteps: 1000 937.5 833.333 625")


@pytest.mark.parametrize("solver", ["lcm", "dpm++_sde"])
def test_a_mask_holds_for_it_too(models, prompts, sample, solver):
    mask = torch.zeros(1, 32, 48)
    mask[..., 24:] = 1
    latent = video() | {"noise_mask": mask}
    ours, _ = sample(models["t2v"], *prompts, latent, solver=solver, steps=4)
    sigmas = SampleJob(4, 4.0, 3.0, solver).sigmas
    assert relative(ours["samples"], by_host(models["t2v"], *prompts, latent, sigmas, 4.0, solver)) < 2e-5


# --- given sigmas -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "lcm", "dpm++_sde"])
# exponential: its first step goes from almost pure noise to a fifth of it, where one rounding more shows.
@pytest.mark.parametrize(
    "scheduler, denoise", [("simple", 1.0), ("beta", 1.0), ("normal", 0.6), ("exponential", 1.0)]
)
def test_sigmas_of_a_scheduler_are_those_of_sampler_custom(
    models, prompts, sample, solver, scheduler, denoise
):
    sigmas = BasicScheduler.execute(models["t2v"], scheduler, 4, denoise).result[0]
    latent = EMPTY if denoise == 1 else video()
    ours, report = sample(models["t2v"], *prompts, latent, solver=solver, sigmas=sigmas, steps=99)
    expected = by_host(models["t2v"], *prompts, latent, sigmas.tolist(), 4.0, solver)
    assert relative(ours["samples"], expected) < 2e-5
    assert "note: sigmas are connected: steps, flow_shift and denoise are not used" in report
    assert f"solver: {solver}, 4 steps, guidance 4, sigmas as given" in report


@pytest.mark.parametrize("solver", ["euler", "lcm", "dpm++_sde"])
@pytest.mark.parametrize("sigmas", [[1.0, 0.5], [0.7, 0.3, 0.1]])
def test_sigmas_that_end_early_leave_their_noise_as_in_sampler_custom(
    models, prompts, sample, solver, sigmas
):
    """They had been taken to 0."""
    latent = EMPTY if sigmas[0] == 1 else video()
    ours, report = sample(models["t2v"], *prompts, latent, solver=solver, sigmas=torch.tensor(sigmas))
    assert relative(ours["samples"], by_host(models["t2v"], *prompts, latent, sigmas, 4.0, solver)) < 2e-5
    assert f"note: the sigmas end at {sigmas[-1]}: the latent keeps its noise" in report


@pytest.mark.parametrize("solver", ["euler", "lcm", "dpm++_sde"])
def test_a_schedule_that_begins_just_below_one_is_the_hosts(models, prompts, sample, solver):
    """ddim_uniform's had been refused; and dpm++_sde had begun lower where only a whole 1 is replaced."""
    for sigmas in (
        BasicScheduler.execute(models["t2v"], "ddim_uniform", 4, 1.0).result[0],
        torch.tensor([0.9968, 0.5, 0.0]),  # as OptimalStepsScheduler and SDTurboScheduler
        torch.tensor([0.99999, 0.7, 0.0]),
    ):
        ours, report = sample(models["t2v"], *prompts, EMPTY, solver=solver, sigmas=sigmas)
        expected = by_host(models["t2v"], *prompts, EMPTY, sigmas.tolist(), 4.0, solver)
        assert relative(ours["samples"], expected) < 2e-5
        assert ("the sigmas begin at 0.9604 and the latent is empty" in report) == (sigmas[0] < 0.99)


def test_one_that_begins_far_below_needs_a_video(models, prompts, sample):
    sigmas = BasicScheduler.execute(models["t2v"], "ddim_uniform", 1, 1.0).result[0]
    with pytest.raises(ValueError, match=r"level is 0\.01578 .*latent is empty.*\(sigmas from 1, step 0"):
        sample(models["t2v"], *prompts, EMPTY, sigmas=sigmas)


@pytest.mark.parametrize("step", [1, 3])
def test_split_sigmas_are_two_halves(models, prompts, sample, step):
    whole = BasicScheduler.execute(models["t2v"], "simple", 5, 1.0).result[0]
    high, low = SplitSigmas.execute(whole, step).result
    job = {"solver": "euler"}
    once, _ = sample(models["t2v"], *prompts, EMPTY, sigmas=whole, **job)
    first, _ = sample(models["t2v"], *prompts, EMPTY, sigmas=high, **job)
    second, report = sample(
        models["t2v"], *prompts, first, sigmas=low, step_range__add_noise="disable", **job
    )
    assert relative(second["samples"], once["samples"]) < 2e-5 and "keeps its noise" not in report


@pytest.mark.parametrize(
    "sigmas, message",
    [
        ([14.6, 3.0, 0.0], "Wan2.1 is a flow model.*the MODEL that is sampled"),
        ([1.0, 0.5, 0.5, 0.0], "each must be below the one before"),
        ([0.0, 0.5, 1.0], "each must be below the one before"),
        ([1.0], "holds 1 numbers"),
        ([], "holds 0 numbers"),
        ([1.0, float("inf"), 0.0], "between 1 and 0"),
        ([1.0, float("nan"), 0.0], "one is no number.*kl_optimal has none for a single step"),
        ([1.0, 0.999999, 0.5, 0.0], "begins at 0.9999.* in place of 1: no step lies between"),
    ],
)
def test_what_is_no_schedule_is_named(models, prompts, sample, sigmas, message, monkeypatch):
    monkeypatch.setattr(host, "run_sampling", lambda *_: pytest.fail("sampling began"))
    with pytest.raises(ValueError, match=f"^Wan21Sampler: sigmas .*{message}"):
        sample(models["t2v"], *prompts, EMPTY, solver="dpm++_sde", sigmas=torch.tensor(sigmas))


# --- parts ------------------------------------------------------------------------------------------------


def halves(sample, model, prompts, latent, change, **job):
    first, _ = sample(
        model, *prompts, latent, step_range__end_at_step=change,
        step_range__return_with_leftover_noise="enable", **job,
    )  # fmt: skip
    return sample(
        model, *prompts, first, step_range__start_at_step=change, step_range__add_noise="disable", **job
    )


@pytest.mark.parametrize("change", [1, 2, 4])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_two_halves_are_the_whole(models, prompts, sample, change, scale):
    job = {"solver": "euler", "steps": 5, "guidance_scale": scale}
    whole = sample(models["t2v"], *prompts, EMPTY, **job)[0]["samples"]
    second, report = halves(sample, models["t2v"], prompts, EMPTY, change, **job)
    assert relative(second["samples"], whole) < 2e-5
    assert f"{5 - change} steps" in report and "note" not in report


def test_halves_of_a_solver_that_looks_back_differ_and_say_so(models, prompts, sample):
    for solver in ("unipc", "dpm++"):
        job = {"solver": solver, "steps": 8}
        whole = sample(models["t2v"], *prompts, EMPTY, **job)[0]["samples"]
        second, report = halves(sample, models["t2v"], prompts, EMPTY, 4, **job)
        assert 2e-5 < relative(second["samples"], whole) < 0.1
        assert f"note: {solver} looks back at earlier steps" in report


@pytest.mark.parametrize(
    "start, end, noise, leftover",
    [(0, 2, "enable", "enable"), (2, 10000, "enable", "disable"), (1, 3, "enable", "disable"),
     (1, 4, "disable", "enable"), (0, 99, "disable", "disable")],
)  # fmt: skip
def test_a_part_equals_the_hosts(models, prompts, sample, start, end, noise, leftover):
    """KSamplerAdvanced makes its own schedule, so that ours is given that."""
    latent = video()
    theirs = host_nodes.KSamplerAdvanced().sample(
        models["t2v"], noise, 3, 4, 4.0, "euler", "simple", *prompts, latent, start, end, leftover
    )[0]["samples"]
    sigmas = BasicScheduler.execute(models["t2v"], "simple", 4, 1.0).result[0]
    part = dict(start_at_step=start, end_at_step=end, add_noise=noise, return_with_leftover_noise=leftover)
    ours, _ = sample(
        models["t2v"],
        *prompts,
        latent,
        solver="euler",
        sigmas=sigmas,
        step_range={"step_range": "part", **part},
    )
    assert relative(ours["samples"], theirs) < 2e-5


def test_a_part_without_steps_or_start_is_named(models, prompts, sample):
    with pytest.raises(ValueError, match="start_at_step is 3 and end_at_step 10000 of 3 steps; no step lies"):
        sample(models["t2v"], *prompts, video(), step_range__start_at_step=3)
    with pytest.raises(ValueError, match=r"the first noise level is 0\.\d+ and the latent is empty"):
        sample(models["t2v"], *prompts, EMPTY, step_range__start_at_step=2)


def test_the_guide_stays_between_two_halves(models, prompts, image_to_video, picture, sample):
    positive, negative, latent = image_to_video(end_image=picture, add_frames_for_end_image=True)
    job = {"solver": "euler", "steps": 4}
    whole = sample(models["i2v"], positive, negative, latent, **job)[0]["samples"]
    second, _ = halves(sample, models["i2v"], (positive, negative), latent, 2, **job)
    assert whole.shape[2] == 3 and relative(second["samples"], whole) < 2e-5


# --- two experts ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experts(files, tmp_path_factory):
    """Two MODELs of one kind with different weights."""
    second = {k: v.flip(0) if v.ndim == 2 else v for k, v in load_file(files["t2v"]).items()}
    path = tmp_path_factory.mktemp("experts") / "low_noise.safetensors"
    save_file(second, path, metadata={"config": '{"transformer": {"text_dim": 128}}'})
    return host.load_model(files["t2v"]), host.load_model(path)


def two_by_host(high, low, prompts, sigmas, change, scales):
    """The host's Euler, first with one MODEL and then with the other."""
    halves = [torch.tensor(sigmas[: change + 1]), torch.tensor(sigmas[change:])]
    x = EMPTY["samples"]
    for model, part, scale in zip((high, low), halves, scales):
        noise = comfy.sample.prepare_noise(x, 3) if model is high else torch.zeros_like(x)
        x = comfy.sample.sample_custom(
            model, noise, scale, comfy.samplers.sampler_object("euler"), part, *prompts, x, seed=3
        )
    return x


@pytest.mark.parametrize("low_scale", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("boundary, change", [(0.0, 3), (0.7, 5), (0.95, 2)])
def test_two_experts_are_two_samplers_of_the_host(experts, prompts, sample, low_scale, boundary, change):
    high, low = experts
    job = {"solver": "euler", "steps": 6, "guidance_scale": 4.0, "flow_shift": 5.0}
    ours, report = sample(
        high, *prompts, EMPTY, model_low_noise=low, expert_boundary=boundary,
        low_noise_guidance_scale=low_scale, **job,
    )  # fmt: skip
    sigmas = SampleJob(6, 4.0, 5.0, "euler").sigmas
    expected = two_by_host(high, low, prompts, sigmas, change, (4.0, low_scale or 4.0))
    assert relative(ours["samples"], expected) < 2e-5
    assert f"high-noise expert: t2v, 2 blocks, width 256, steps 1 to {change}, guidance 4" in report
    assert f"low-noise expert: t2v, 2 blocks, width 256, steps {change + 1} to 6" in report
    alone = sample(high, *prompts, EMPTY, **job)[0]["samples"]
    assert relative(ours["samples"], alone) > 1e-2


@pytest.mark.parametrize("solver", ["euler", "lcm", "dpm++_sde"])
def test_a_timestep_at_the_boundary_is_the_first_experts(solver):
    """It had been the second's where it was rounded to float32: 899.99998."""
    for steps, change in ((4, 2), (20, 6)):
        assert SampleJob(steps, 1.0, 3.0, solver, boundary=0.9).legs[0].steps == range(change)
    given = tuple(torch.tensor([1.0, 0.9, 0.5, 0.0]).tolist())
    assert SampleJob(solver=solver, given_sigmas=given, boundary=0.9).legs[0].steps == range(2)


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler", "lcm", "dpm++_sde"])
@pytest.mark.parametrize(
    "options", [{}, {"cache__multiplier": 2.0, "cache__profile": "t2v_1.3b"}, {"nag": True}]
)
def test_one_model_twice_is_one_model(models, prompts, sample, solver, options):
    """The solver looks back across the change; TeaCache plans for each expert, and alone may differ."""
    job = {"solver": solver, "steps": 8, "flow_shift": 5.0, "cfg_star__zero_init_steps": 1, **options}
    once = sample(models["t2v"], *prompts, EMPTY, **job)[0]["samples"]
    twice, report = sample(models["t2v"], *prompts, EMPTY, model_low_noise=models["t2v"], **job)
    if "cache__multiplier" in options:
        assert 1e-4 < relative(twice["samples"], once) < 0.5
        assert report.count("plan: ") == 2 and "plan: 0#" in report
    else:
        assert torch.equal(twice["samples"], once)


def test_each_expert_has_its_own_lora(experts, prompts, sample, tmp_path):
    high, low = experts
    g = torch.Generator().manual_seed(5)
    lora = {
        "diffusion_model.blocks.0.ffn.0.lora_down.weight": torch.randn(4, 256, generator=g),
        "diffusion_model.blocks.0.ffn.0.lora_up.weight": torch.randn(
            high.model.diffusion_model.blocks[0].ffn[0].weight.shape[0], 4, generator=g
        ),
    }
    save_file(lora, tmp_path / "lora.safetensors")

    def with_lora(model):
        return host.add_lora(model, host.read_lora(tmp_path / "lora.safetensors", model), 1.0)

    job = {"solver": "euler", "steps": 6, "flow_shift": 5.0}
    sigmas = SampleJob(6, 4.0, 5.0, "euler").sigmas
    for pair in ((with_lora(high), low), (high, with_lora(low))):
        ours, _ = sample(pair[0], *prompts, EMPTY, model_low_noise=pair[1], **job)
        assert relative(ours["samples"], two_by_host(*pair, prompts, sigmas, 3, (4.0, 4.0))) < 2e-5


def test_an_expert_without_steps_is_not_loaded_and_said(experts, prompts, sample, monkeypatch):
    high, low = experts
    used = []
    real = host.run_sampling
    monkeypatch.setattr(host, "run_sampling", lambda model, *a: used.append(model) or real(model, *a))
    _, report = sample(high, *prompts, video(), model_low_noise=low, denoise=0.3, solver="euler")
    assert used == [low] and "model (the high-noise expert) has no step here and is not loaded" in report
    used.clear()
    _, report = sample(high, *prompts, EMPTY, model_low_noise=low, steps=1)
    assert used == [high] and "model_low_noise has no step here and is not loaded" in report


def test_both_experts_are_checked_before_any_step(models, experts, files, prompts, sample, monkeypatch):
    import comfy.sd

    monkeypatch.setattr(host, "run_sampling", lambda *_: pytest.fail("sampling began"))
    high, low = experts
    native = comfy.sd.load_diffusion_model(str(files["t2v"]))
    for second, message in (
        (native, "model_low_noise was not loaded by Wan21ModelLoader"),
        (models["i2v"], "model is t2v and model_low_noise i2v: they are not experts of one model"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(high, *prompts, EMPTY, model_low_noise=second)
    patched = low.clone()
    patched.model_options["transformer_options"]["patches"] = {"attn1_patch": [lambda *a: a]}
    with pytest.raises(ValueError, match="model_low_noise: another node put attn1_patch"):
        sample(high, *prompts, EMPTY, model_low_noise=patched)


def test_a_cancel_in_the_second_expert_leaves_nothing_behind(experts, prompts, sample):
    import comfy.model_management as management

    high, low = experts
    job = {"model_low_noise": low, "steps": 6, "flow_shift": 5.0}
    expected = sample(high, *prompts, EMPTY, **job)[0]["samples"]

    def cancel(*_):
        management.interrupt_current_processing(True)

    handle = low.model.diffusion_model.blocks[0].register_forward_pre_hook(cancel)
    with pytest.raises(management.InterruptProcessingException):
        sample(high, *prompts, EMPTY, **job)
    handle.remove()
    assert torch.equal(sample(high, *prompts, EMPTY, **job)[0]["samples"], expected)


# --- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, message",
    [
        ({"teacache_multiplier": 2.0}, "there is no input teacache_multiplier.*cache.multiplier"),
        ({"cfg_star": True}, "cfg_star is True; it is one of off, on"),
        ({"cache": "teecache"}, "cache is 'teecache'; it is one of off, teacache"),
        ({"cache": "teacache", "cache.start": 1}, "no input cache.start.*multiplier, start_percent, profile"),
    ],
)
def test_inputs_that_the_host_would_drop_are_named(given, message):
    inputs = Wan21Sampler.define_schema().inputs
    check_names({"model": ["1", 0], "steps": 3, "cache": "off", "nag": "on", "nag.scale": 2.0}, inputs)
    with pytest.raises(Refusal, match=message):
        check_names(given, inputs)
