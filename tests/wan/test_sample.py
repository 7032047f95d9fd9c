"""The sampling loop with a toy velocity: what is asked of the model, and when."""

import gc
import itertools
import weakref

import pytest
import torch
from wan21.wan.attention import SDPA, Attention
from wan21.wan.config import WanConfig
from wan21.wan.dit import Pass
from wan21.wan.execution import Execution
from wan21.wan.guidance import CfgZeroStar, ZeroInit, cfg, cfg_zero_star
from wan21.wan.memory import plans_from
from wan21.wan.option import Option
from wan21.wan.retry import FiniteOrExact, NotFinite, WithinMemory
from wan21.wan.riflex import Riflex
from wan21.wan.sample import SampleJob, sample
from wan21.wan.sigmas import FIRST_SIGMA
from wan21.wan.skip_layer import SkipLayers
from wan21.wan.solvers import SOLVERS
from wan21.wan.teacache import Profile, Residuals, TeaCache, plan_steps


@pytest.fixture
def noise():
    return torch.randn(1, 16, 2, 2, 2, generator=torch.Generator().manual_seed(0))


class Toy:
    """A denoiser of given velocities that writes down how it is called."""

    config = WanConfig(in_dim=16, dim=128, ffn_dim=64, num_heads=1, num_layers=2, text_dim=8)

    def __init__(self, velocity):
        self.velocity = velocity
        self.calls = []

    def predict(self, x, timestep, call):
        self.calls.append((x, timestep, call))
        return {name: self.velocity[name].expand_as(x) for name in call.pass_names}

    def embed_time(self, timesteps):
        return torch.tensor(timesteps)[:, None]


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_constant_velocity_is_solved_exactly(noise, solver):
    clean = torch.ones_like(noise)
    job = SampleJob(steps=6, guidance_scale=1.0, solver=solver)
    sigma = job.sigmas[0]
    velocity = {"cond": (noise - clean) / sigma}
    out, _ = sample(job, Toy(velocity), noise, torch.zeros_like(noise))
    assert torch.allclose(out, clean, atol=1e-5)


def test_guidance_combines_velocities(noise):
    velocity = {"cond": torch.tensor(2.0), "uncond": torch.tensor(0.5)}
    out, record = sample(SampleJob(steps=2, guidance_scale=3.0, solver="euler"), Toy(velocity), noise, None)
    assert torch.allclose(out, noise - 5.0, atol=1e-5)  # 0.5 + 3 * 1.5
    assert record.passes == [("cond", "uncond")] * 2


def test_guidance_one_is_the_conditional_velocity(noise):
    toy = Toy({"cond": noise})
    sample(SampleJob(steps=2, guidance_scale=1.0), toy, noise, None)
    assert [call.pass_names for _, _, call in toy.calls] == [("cond",)] * 2


def test_the_release_truncates_timesteps(noise):
    toy = Toy({"cond": noise})
    job = SampleJob(steps=30, guidance_scale=1.0, flow_shift=5.0, solver="unipc")
    sample(job, toy, noise, None)
    times = [t for _, t, _ in toy.calls]
    assert times[:5] == [999, 992, 985, 978, 969] and times[-3:] == [356, 262, 146]


def test_a_full_run_starts_from_noise_alone(noise):
    outs = [
        sample(SampleJob(2, 1.0), Toy({"cond": noise}), noise, latent)[0]
        for latent in (torch.zeros_like(noise), torch.full_like(noise, 9.0))
    ]
    assert torch.equal(*outs)


def test_a_partial_run_starts_from_the_latent(noise):
    job = SampleJob(steps=3, guidance_scale=1.0, solver="euler", denoise=0.5)
    latent = torch.full_like(noise, 4.0)
    toy = Toy({"cond": noise - latent})
    out, record = sample(job, toy, noise, latent)
    seen = [x for x, _, _ in toy.calls]
    sigma = record.sigmas[0]
    assert 0.5 < sigma < 0.9 and len(seen) == 3
    assert torch.allclose(seen[0], sigma * noise + (1 - sigma) * latent)
    assert torch.allclose(out, latent, atol=1e-5)


def test_every_step_is_reported_with_the_estimate(noise):
    steps = []
    clean = torch.zeros_like(noise)
    sample(
        SampleJob(steps=4, guidance_scale=1.0, solver="euler"),
        Toy({"cond": noise - clean}),
        noise,
        None,
        lambda i, x0: steps.append((i, x0)),
    )
    assert [i for i, _ in steps] == [0, 1, 2, 3]
    assert all(torch.allclose(x0, clean, atol=1e-5) for _, x0 in steps)


def options(*chosen, **fields):
    defaults = dict(steps=6, guidance_scale=3.0, solver="euler", options=chosen)
    return SampleJob(**(defaults | fields))


def sample_again(job, toy, noise, exact=None):
    """`sample` with both denoisers around the toy -> (latent, record, what these said)"""
    said = []
    plans = plans_from(True, len(job.legs[0].pass_names))
    inner = WithinMemory(toy, plans, getattr(toy, "make_room", lambda: False), said.append)
    return *sample(job, FiniteOrExact(inner, exact, said.append), noise, None), said


@pytest.fixture
def two():
    """Velocities of two passes, neither along the other."""
    g = torch.Generator().manual_seed(5)
    return {name: torch.randn(1, 16, 2, 2, 2, generator=g) for name in ("cond", "uncond")}


def test_cfg_star_begins_at_its_step(noise, two):
    cond, uncond = two["cond"], two["uncond"]
    job = options(CfgZeroStar(start_step=4))
    out, record = sample(job, Toy(two), noise, None)
    steps = torch.tensor(record.sigmas).diff()
    plain, starred = cfg(cond, uncond, 3.0), cfg_zero_star(cond, uncond, 3.0)
    assert torch.allclose(out, noise + steps[:4].sum() * plain + steps[4:].sum() * starred, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_zero_init_leaves_the_latent_and_asks_nothing_of_the_model(noise, two, scale):
    toy = Toy(two)
    out, record = sample(options(ZeroInit(2), guidance_scale=scale), toy, noise, None)
    assert len(toy.calls) == 4 and torch.equal(toy.calls[0][0], noise)
    assert [len(names) for names in record.passes] == [0, 0, *[1 + (scale != 1)] * 4]
    v = two["cond"] if scale == 1 else cfg(two["cond"], two["uncond"], scale)
    assert torch.allclose(out, noise - record.sigmas[2] * v, atol=1e-5)


def test_options_of_the_unconditional_pass_are_named_when_there_is_none(noise, two):
    job = options(CfgZeroStar(), SkipLayers((1,)), guidance_scale=1.0)
    out, record = sample(job, Toy(two), noise, None)
    assert [note.split(" has")[0] for note in record.notes] == ["cfg_star", "skip_layers"]
    assert torch.equal(out, sample(options(guidance_scale=1.0), Toy(two), noise, None)[0])


def test_skip_layers_go_around_the_runner_in_their_steps(noise, two):
    toy = Toy(two)
    sample(options(SkipLayers((1,), start_percent=20), steps=10), toy, noise, None)
    assert [len(call.around) for _, _, call in toy.calls] == [0, 0, 1, 1, 1, 1, 1, 1, 1, 0]


RIFLEX_CASES = [
    ("off", 61, False, None), ("auto", 61, True, None), ("on", 61, True, None),
    ("auto", 2, False, "auto acts from 97 frames on; this video has 5"),
    ("auto", 24, False, "auto acts from 97 frames on; this video has 93"),
    ("auto", 25, False, "no effect on 25 latent frames"),
    ("on", 2, False, "no effect on 2 latent frames: it lowers a frequency from 46 on (181 frames)"),
]  # fmt: skip


@pytest.mark.parametrize("mode, frames, edited, note", RIFLEX_CASES)
def test_riflex_edits_frequencies_or_says_why_not(mode, frames, edited, note):
    noise = torch.zeros(1, 16, frames, 2, 2)
    toy = Toy({"cond": noise})
    chosen = () if mode == "off" else (Riflex(mode),)
    _, record = sample(options(*chosen, guidance_scale=1.0, steps=1), toy, noise, None)
    assert (toy.calls[0][2].frequencies is not None) == edited
    assert [note in n for n in record.notes] == [True] * (note is not None)


def test_teacache_plans_over_the_steps_that_run(noise, two):
    """A partial run plans its own steps, and zero-init steps are none of the model's."""
    profile = Profile("identity", (1.0, 0.0))
    job = options(ZeroInit(1), TeaCache(2.0, profile=profile), steps=8, denoise=0.5)
    toy = Toy(two)
    _, record = sample(job, toy, noise, torch.zeros_like(noise))
    told = torch.tensor(record.timesteps[1:])[:, None]
    assert record.plan == plan_steps(told, profile, 2.0)
    assert len(record.plan.compute) == 7 and len(toy.calls) == 7


def test_an_explicit_attention_reaches_the_model(noise, two):
    toy = Toy(two)
    sample(options(Execution(joint=False, attention=SDPA)), toy, noise, None)
    assert all(call.attention is SDPA and not call.plan.joint for _, _, call in toy.calls)


def sample_midpoint(x, sigmas, callback=None, noise=None):
    """The midpoint method: a second velocity half way down each step."""
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        middle = (sigma + sigma_next) / 2
        half = x + (middle - sigma) * (yield x, sigma)
        v = yield half, middle
        if callback is not None:
            callback(i, x - sigma * v, x)
        x = x + (sigma_next - sigma) * v
    return x


def test_a_solver_may_ask_between_two_noise_levels(noise, two, monkeypatch):
    """The step is then the one under way, and the model is told the noise level of the latent itself."""
    monkeypatch.setitem(SOLVERS, "midpoint", sample_midpoint)
    monkeypatch.setitem(FIRST_SIGMA, "midpoint", 1.0)
    toy = Toy(two)
    chosen = ZeroInit(1), CfgZeroStar(start_step=3), SkipLayers((0,), start_percent=50, end_percent=100)
    profile = Profile("identity", (1.0, 0.0))
    job = options(*chosen, TeaCache(1.5, profile=profile), solver="midpoint", steps=4)
    out, record = sample(job, toy, noise, None)
    sigmas = record.sigmas
    middles = [(a + b) / 2 for a, b in itertools.pairwise(sigmas)]
    asked = [sigma for pair in zip(sigmas, middles) for sigma in pair][2:]
    assert [t for _, t, _ in toy.calls] == pytest.approx([1000 * sigma for sigma in asked])
    assert [call.step for _, _, call in toy.calls] == [1, 1, 2, 2, 3, 3]
    assert [len(call.around) for _, _, call in toy.calls] == [1, 1, 2, 2, 2, 2]
    assert record.passes == [()] * 2 + [("cond", "uncond")] * 6 and len(record.seconds) == 4
    plain, starred = cfg(two["cond"], two["uncond"], 3.0), cfg_zero_star(two["cond"], two["uncond"], 3.0)
    expected = noise + (sigmas[3] - sigmas[1]) * plain - sigmas[3] * starred
    assert torch.allclose(out, expected, atol=1e-5)


def test_the_neutral_option_changes_nothing(noise, two):
    class Neutral(Option):
        pass

    toys = Toy(two), Toy(two)
    outs = [sample(options(*chosen), toy, noise, None) for toy, chosen in zip(toys, ((), (Neutral(),)))]
    assert torch.equal(outs[0][0], outs[1][0]) and outs[1][1].notes == []
    assert [call for _, _, call in toys[0].calls] == [call for _, _, call in toys[1].calls]


class Overflows(Toy):
    """Gives NaN with a quantised backend, or the host's own, in the steps named."""

    bad_steps = (0,)

    def predict(self, x, timestep, call):
        out = super().predict(x, timestep, call)
        done = len({t for _, t, _ in self.calls}) - 1
        if (call.attention is None or call.attention.quantised) and done in self.bad_steps:
            out["uncond"] = out["uncond"] * float("nan")
        return out


SAGE = Attention("sage", SDPA.function, quantised=True)


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("first, said", [(SAGE, "attention sage"), (None, "attention of the host's choice")])
@pytest.mark.parametrize("exact", [SDPA, Attention("sub-quadratic", SDPA.function)], ids=lambda a: a.name)
def test_nan_of_a_quantised_backend_redoes_the_step_with_an_exact_one(noise, two, first, said, step, exact):
    toy = Overflows(two)
    toy.bad_steps = (step,)
    out, _, notes = sample_again(options(Execution(attention=first)), toy, noise, exact)
    done = [call.attention for _, _, call in toy.calls]
    assert done == [first] * (step + 1) + [exact] * (6 - step)
    assert len(notes) == 1 and f"{said} gave NaN in step {step + 1}" in notes[0]
    assert notes[0].endswith(f"with {exact.name}")
    assert torch.equal(out, sample(options(), Toy(two), noise, None)[0])


@pytest.mark.parametrize("attention", [SDPA, None])
@pytest.mark.parametrize("exact, calls", [(None, 1), (SDPA, 2)])
def test_nan_of_the_model_ends_the_run_at_once(noise, two, attention, exact, calls):
    class Broken(Toy):
        def predict(self, x, timestep, call):
            return {k: v * float("inf") for k, v in super().predict(x, timestep, call).items()}

    toy = Broken(two)
    with pytest.raises(NotFinite, match="step 1 of 6 gave NaN or infinite"):
        sample_again(options(Execution(attention=attention)), toy, noise, exact)
    assert len(toy.calls) == calls


@pytest.mark.parametrize(
    "idle, note",
    [
        (CfgZeroStar(start_step=6), "cfg_star has no effect: it starts at step 6 of 6"),
        (
            SkipLayers((0,), start_percent=100, end_percent=100),
            "skip_layers has no effect: no step of 6 lies between 100 % and 100 %",
        ),
    ],
)
def test_what_has_no_effect_is_said(noise, two, idle, note):
    out, record = sample(options(idle), Toy(two), noise, None)
    assert [text.startswith(note) for text in record.notes] == [True]
    assert torch.equal(out, sample(options(), Toy(two), noise, None)[0])


def test_a_quantised_backend_that_works_is_kept(noise, two):
    toy = Overflows(two)
    toy.bad_steps = ()
    _, record, notes = sample_again(options(ZeroInit(1), Execution(attention=SAGE)), toy, noise, SDPA)
    assert {call.attention.name for _, _, call in toy.calls} == {"sage"} and record.notes + notes == []


def test_everything_at_once_on_an_error_leaves_no_tensor_behind(noise, two):
    """The state of the options goes with the run, also when a step fails."""
    kept = []

    class Fails(Toy):
        def predict(self, x, timestep, call):
            if len(self.calls) == 3:
                raise RuntimeError("stop")
            p = Pass(
                "cond", torch.randn(1, 4, 8), None, None, torch.zeros(1), None, torch.zeros(1), SDPA.function
            )
            runner = lambda n, passes, block: None  # noqa: E731
            for around in call.around:
                runner = around(runner)
            runner(2, [p], None)
            return super().predict(x, timestep, call)

        def embed_time(self, timesteps):
            e = torch.ones(len(timesteps), 1)
            kept.append(weakref.ref(e))
            return e

    job = options(SkipLayers((0,)), TeaCache(2.0, profile=Profile("flat", (0.0, 1.0))))
    with pytest.raises(RuntimeError, match="stop"):
        sample(job, Fails(two), noise, None)
    gc.collect()
    assert kept[0]() is None
    assert not [o for o in gc.get_objects() if type(o) is Residuals]


class RunsOut(Toy):
    """Out of memory at the calls named; `rooms` times there are weights to take off the device."""

    def __init__(self, velocity, at, rooms=0):
        super().__init__(velocity)
        self.at, self.rooms, self.tried = at, rooms, []

    def predict(self, x, timestep, call):
        self.tried.append(call.plan)
        if len(self.tried) in self.at:
            raise torch.OutOfMemoryError("no memory.")
        return super().predict(x, timestep, call)

    def make_room(self):
        self.rooms -= 1
        return self.rooms >= 0


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_out_of_memory_lowers_the_plan_and_repeats_the_step(noise, two, solver):
    toy = RunsOut(two, at=(3, 4))
    out, record, notes = sample_again(options(solver=solver), toy, noise)
    assert torch.equal(out, sample(options(solver=solver), Toy(two), noise, None)[0])
    together, parts, least = plans_from(True)
    assert toy.tried == [together] * 3 + [parts] + [least] * 4
    assert [note.split(",")[0] for note in notes] == ["out of memory in step 3"] * 2
    assert len(record.seconds) == 6


def test_out_of_memory_with_the_least_plan_takes_weights_off_or_fails(noise, two):
    toy = RunsOut(two, at=range(2, 6), rooms=4)
    sample_again(options(), toy, noise)
    assert len(toy.tried) == 10
    with pytest.raises(torch.OutOfMemoryError, match=r"no memory\. This was with the plan of least memory"):
        sample_again(options(), RunsOut(two, at=range(2, 6), rooms=3), noise)
    endless = RunsOut(two, at=range(1000), rooms=1000)
    with pytest.raises(torch.OutOfMemoryError):
        sample_again(options(), endless, noise)
