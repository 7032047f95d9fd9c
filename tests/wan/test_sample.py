"""The sampling loop with a toy velocity: what is asked of the model, and when."""

import pytest
import torch
from wan21.wan.sample import SampleJob, sample


@pytest.fixture
def noise():
    return torch.randn(1, 16, 2, 2, 2, generator=torch.Generator().manual_seed(0))


def record_calls(calls, velocity):
    def predict(x, timestep, names):
        calls.append((timestep, names))
        return {name: velocity[name].expand_as(x) for name in names}

    return predict


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_constant_velocity_is_solved_exactly(noise, solver):
    clean = torch.ones_like(noise)
    job = SampleJob(steps=6, guidance_scale=1.0, solver=solver)
    sigma = job.sigmas[0]
    velocity = {"cond": (noise - clean) / sigma}
    out, _ = sample(job, record_calls([], velocity), noise, torch.zeros_like(noise))
    assert torch.allclose(out, clean, atol=1e-5)


def test_guidance_combines_velocities(noise):
    velocity = {"cond": torch.tensor(2.0), "uncond": torch.tensor(0.5)}
    out, record = sample(
        SampleJob(steps=2, guidance_scale=3.0, solver="euler"), record_calls([], velocity), noise, None
    )
    assert torch.allclose(out, noise - 5.0, atol=1e-5)  # 0.5 + 3 * 1.5
    assert record.passes == [("cond", "uncond")] * 2


def test_guidance_one_is_the_conditional_velocity(noise):
    calls = []
    sample(SampleJob(steps=2, guidance_scale=1.0), record_calls(calls, {"cond": noise}), noise, None)
    assert [names for _, names in calls] == [("cond",)] * 2


def test_the_release_truncates_timesteps(noise):
    calls = []
    job = SampleJob(steps=30, guidance_scale=1.0, flow_shift=5.0, solver="unipc")
    sample(job, record_calls(calls, {"cond": noise}), noise, None)
    times = [t for t, _ in calls]
    assert times[:5] == [999, 992, 985, 978, 969] and times[-3:] == [356, 262, 146]


def test_a_full_run_starts_from_noise_alone(noise):
    outs = [
        sample(SampleJob(2, 1.0), record_calls([], {"cond": noise}), noise, latent)[0]
        for latent in (torch.zeros_like(noise), torch.full_like(noise, 9.0))
    ]
    assert torch.equal(*outs)


def test_a_partial_run_starts_from_the_latent(noise):
    job = SampleJob(steps=3, guidance_scale=1.0, solver="euler", denoise=0.5)
    latent = torch.full_like(noise, 4.0)
    seen = []

    def predict(x, timestep, names):
        seen.append(x)
        return {"cond": noise - latent}

    out, record = sample(job, predict, noise, latent)
    sigma = record.sigmas[0]
    assert 0.5 < sigma < 0.9 and len(seen) == 3
    assert torch.allclose(seen[0], sigma * noise + (1 - sigma) * latent)
    assert torch.allclose(out, latent, atol=1e-5)


def test_every_step_is_reported_with_the_estimate(noise):
    steps = []
    clean = torch.zeros_like(noise)
    sample(
        SampleJob(steps=4, guidance_scale=1.0, solver="euler"),
        record_calls([], {"cond": noise - clean}),
        noise,
        None,
        lambda i, x0: steps.append((i, x0)),
    )
    assert [i for i, _ in steps] == [0, 1, 2, 3]
    assert all(torch.allclose(x0, clean, atol=1e-5) for _, x0 in steps)
