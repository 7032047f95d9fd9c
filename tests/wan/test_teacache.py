"""TeaCache: the plan against a literal simulation of the published rule, and what a reused step gives."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wan21.wan.attention import sdpa
from wan21.wan.config import SIZES, WanConfig
from wan21.wan.dit import WanModel, run_blocks
from wan21.wan.sigmas import flow_sigmas, timesteps
from wan21.wan.teacache import (
    COEFFICIENTS,
    PROFILES,
    Profile,
    Residuals,
    check_coefficients,
    choose_profile,
    plan_steps,
    relative_changes,
)

CONFIG = WanConfig(in_dim=16, dim=128, ffn_dim=64, num_heads=1, num_layers=2, text_dim=8)
IDENTITY = Profile("identity", (1.0, 0.0))


def model_like(config=CONFIG, seed=0):
    g = torch.Generator().manual_seed(seed)
    model = WanModel(config, torch.nn).eval()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g) / max(1, p[0].numel()) ** 0.5
    return model


@pytest.fixture(scope="module")
def model():
    return model_like()


@pytest.fixture(scope="module")
def embeddings(model):
    with torch.inference_mode():
        return {
            n: model.embed_time(torch.tensor(timesteps(flow_sigmas(n, 5.0), "unipc")))
            for n in (1, 2, 8, 30, 50)
        }


def published_rule(embeddings, coefficients, threshold, start_step):
    """Wan2GP's loop of May 2025 in NumPy: which steps are computed."""
    e = embeddings.double().numpy()
    rescale = np.poly1d(coefficients)
    computed, accumulated = [], 0.0
    for i in range(len(e)):
        skip = False
        if start_step < i < len(e) - 1:
            accumulated += abs(rescale(np.abs(e[i] - e[i - 1]).mean() / np.abs(e[i - 1]).mean()))
            skip = accumulated < threshold
        if not skip:
            accumulated = 0.0
        computed.append(not skip)
    return tuple(computed)


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("steps, start", [(30, 0), (50, 20), (8, 0)])
@pytest.mark.parametrize("multiplier", [1.5, 2.0, 2.5])
def test_the_plan_follows_the_published_rule(embeddings, name, steps, start, multiplier):
    e = embeddings[steps]
    plan = plan_steps(e, choose_profile(name, CONFIG, "", 0), multiplier, start)
    start_step = int(start * steps / 100)
    assert plan.compute == published_rule(e, COEFFICIENTS[name], plan.threshold, start_step)
    assert plan.wanted == int(steps / multiplier)
    assert plan.compute[0] and plan.compute[-1] and all(plan.compute[: start_step + 1])


def test_no_threshold_comes_nearer(embeddings):
    coefficients = COEFFICIENTS["i2v_480p"]
    reachable = {sum(published_rule(embeddings[30], coefficients, t, 0)) for t in np.arange(0, 3, 0.01)}
    for multiplier in (1.2, 1.5, 2.0, 3.0, 10.0):
        plan = plan_steps(embeddings[30], Profile("", coefficients), multiplier)
        assert abs(plan.computed - plan.wanted) <= min(abs(n - plan.wanted) for n in reachable)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(1, 12), st.integers(0, 100))
def test_any_changes_give_a_plan(changes, multiplier, start):
    e = torch.tensor([1.0, *changes]).cumsum(0)[:, None]
    plan = plan_steps(e, IDENTITY, multiplier, start)
    assert len(plan.compute) == len(e) and plan.compute[0] and plan.compute[-1]
    if multiplier == 1:
        assert all(plan.compute)
    if start == 0 and min(changes) > 0:
        assert plan.computed >= min(plan.wanted, 2)
    assert plan.compute == published_rule(e, IDENTITY.coefficients, plan.threshold, start * len(e) // 100)


def test_even_changes_are_reused_evenly():
    e = torch.logspace(0, 1, 9, dtype=torch.float64)[:, None]  # every step changes by the same share
    plan = plan_steps(e, IDENTITY, 2)
    assert plan.wanted == 4 and plan.computed in (4, 5)
    gaps = np.diff(np.flatnonzero(plan.compute))
    assert gaps.max() - gaps.min() <= 1


def test_what_cannot_be_reached_gives_the_nearest(embeddings):
    late = plan_steps(embeddings[30], Profile("", COEFFICIENTS["t2v_14b"]), 3.0, start_percent=50)
    assert late.wanted == 10 and late.computed == 17  # 16 in any case, and the last
    assert plan_steps(embeddings[2], IDENTITY, 2.0).compute == (True, True)
    assert plan_steps(embeddings[1], IDENTITY, 2.0).compute == (True,)


@pytest.fixture
def step(model):
    """`step(around, t)` -> velocities of both passes at a timestep."""
    g = torch.Generator().manual_seed(3)
    x, text = torch.randn(2, 16, 2, 4, 4, generator=g), torch.randn(2, 5, 8, generator=g)

    def run(around, t, names=("cond", "uncond"), dtype=torch.float32):
        n = len(names)
        with torch.inference_mode():
            return model(
                x[-n:], torch.full((n,), t), text[-n:].to(dtype), pass_names=names, runner=around(run_blocks)
            )

    return run


def plan_of(marks):
    return type(plan_steps(torch.ones(1, 1), IDENTITY, 1))(tuple(m == "#" for m in marks), 0.0, 0)


def test_a_computed_step_is_bitwise_the_plain_one(step):
    cache = Residuals(plan_of("#.##"))
    plain = [step(lambda r: r, t) for t in (900.0, 500.0, 100.0)]
    for i, t, expected in ((0, 900.0, plain[0]), (2, 500.0, plain[1]), (3, 100.0, plain[2])):
        assert torch.equal(step(cache.around(i), t), expected)


def test_a_reused_step_adds_the_residual_of_its_own_pass_and_runs_the_head(model, step):
    """At the same timestep a reused step gives the computed one; at another the head still follows time."""
    cache = Residuals(plan_of("#..#"))
    computed = step(cache.around(0), 900.0)
    same = step(cache.around(1), 900.0)
    assert torch.allclose(same, computed, atol=1e-5)
    assert not torch.allclose(same[0], same[1], atol=1e-2)
    later = step(cache.around(2), 300.0)
    assert not torch.allclose(later, computed, atol=1e-3)
    # The residual does not depend on time, the head does: write it out.
    with torch.inference_mode():
        g = torch.Generator().manual_seed(3)
        x = torch.randn(2, 16, 2, 4, 4, generator=g)[:1]
        p = model.embed("cond", x, torch.tensor([300.0]), torch.zeros(1, 5, 8), None, torch.zeros(1), sdpa)
        from wan21.wan.dit import unpatchify

        expected = unpatchify(model.head(p.x + cache.residuals["cond"], p.time), (2, 2, 2))
    assert torch.equal(later[:1], expected)


def test_passes_may_walk_alone(step):
    joint, apart = Residuals(plan_of("#.#")), Residuals(plan_of("#.#"))
    step(joint.around(0), 900.0)
    for name in ("cond", "uncond"):
        step(apart.around(0), 900.0, (name,))
    assert joint.residuals.keys() == apart.residuals.keys() == {"cond", "uncond"}


def test_residuals_are_kept_only_for_a_step_that_reuses_them(step):
    cache = Residuals(plan_of("##.#"))
    step(cache.around(0), 900.0)
    assert cache.residuals == {}
    step(cache.around(1), 800.0)
    assert cache.residuals["cond"].dtype == torch.float32


def test_16_bit_models_keep_bfloat16_residuals():
    g = torch.Generator().manual_seed(4)
    cache = Residuals(plan_of("#.#"))

    class Token:
        name, text = "cond", torch.zeros(1, dtype=torch.float16)
        x = torch.randn(1, 4, 8, generator=g)

    def double(n, passes, call):
        for p in passes:
            p.x = 1e6 * p.x  # past what float16 holds

    p = Token()
    start = p.x.clone()
    with torch.inference_mode():
        cache.around(0)(double)(1, [p], None)
        assert cache.residuals["cond"].dtype == torch.bfloat16
        p.x = start.clone()
        cache.around(1)(double)(1, [p], None)
    assert p.x.dtype == torch.float32
    assert torch.allclose(p.x, 1e6 * start, rtol=1e-2)


CHOICES = [
    ("t2v-1.3B", "wan2.1_t2v_1.3B_fp16.safetensors", 832 * 480, "t2v_1.3b"),
    ("i2v-1.3B", "Wan2.1-Fun-1.3B-InP.safetensors", 832 * 480, "t2v_1.3b"),
    ("t2v-14B", "wan2.1_t2v_14B_fp16.safetensors", 1280 * 720, "t2v_14b"),
    ("i2v-14B", "wan2.1_i2v_480p_14B_fp16.safetensors", 1280 * 720, "i2v_480p"),
    ("i2v-14B", "Wan2.1-I2V-14B-720P.safetensors", 832 * 480, "i2v_720p"),
    ("i2v-14B", "mine.safetensors", 832 * 480, "i2v_480p"),
    ("i2v-14B", "mine.safetensors", 1280 * 720, "i2v_720p"),
    ("flf2v-14B", "wan2.1_flf2v_720p_14B_fp16.safetensors", 832 * 480, "i2v_720p"),
]  # fmt: skip


@pytest.mark.parametrize("size, file_name, pixels, expected", CHOICES)
def test_auto_reads_weights_name_and_resolution(size, file_name, pixels, expected):
    profile = choose_profile("auto", SIZES[size], file_name, pixels)
    assert profile == Profile(expected, COEFFICIENTS[expected])
    assert choose_profile("auto", SIZES[size], file_name, pixels, (1.0, 2.0)) == Profile(
        "measured", (1.0, 2.0)
    )


def test_every_profile_can_be_asked_for():
    for name in PROFILES[1:-1]:
        assert choose_profile(name, CONFIG, "", 0).coefficients == COEFFICIENTS[name]
    with pytest.raises(ValueError, match=r"measured and tiny\.safetensors has no coefficients"):
        choose_profile("measured", CONFIG, "tiny.safetensors", 0)
    with pytest.raises(ValueError, match="no TeaCache coefficients for a model of width 128"):
        choose_profile("auto", CONFIG, "wan2.1_i2v_480p_tiny.safetensors", 0)


@pytest.mark.parametrize("bad", [None, [], {}, "1,2", [1, "2"], [float("nan")], [True, 1.0]])
def test_coefficients_of_a_file_are_checked(bad):
    with pytest.raises(ValueError, match="must be a list of numbers"):
        check_coefficients(bad)
    assert check_coefficients([1, 2.5]) == (1.0, 2.5)


def test_relative_changes():
    assert relative_changes(torch.tensor([[1.0, 3.0], [2.0, 5.0]])) == [0.75]
