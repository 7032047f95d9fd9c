"""The options of Wan21Sampler on a real loaded model: their effect, their errors, and that nothing leaks."""

import json
import re
import sys
import types

import comfy.model_management as management
import pytest
import torch
from comfy.cli_args import args
from comfy.ldm.modules import attention as host_attention
from comfy.ldm.wan import model as host_wan
from helpers import grouped, relative
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from wan21 import host
from wan21.host.attention import choose_attention_for, has_own_attention, retry_of
from wan21.nodes.sampler import Wan21Sampler
from wan21.wan import backends
from wan21.wan.attention import SDPA, Attention, AttentionSize
from wan21.wan.solvers import SOLVERS

STEPS = 6
TEACACHE = dict(cache__multiplier=2.0, cache__profile="t2v_1.3b")
GROUPS = {
    "cache": ("off", {"teacache": {"multiplier": 2.0, "start_percent": 0, "profile": "auto"}}),
    "cfg_star": ("off", {"on": {"start_step": 0, "zero_init_steps": 0}}),
    "nag": ("off", {"on": {"scale": 11.0, "tau": 2.5, "alpha": 0.25}}),
    "skip_layers": ("off", {"on": {"layers": "9", "start_percent": 10, "end_percent": 90}}),
    "step_range": (
        "all",
        {
            "part": {
                "start_at_step": 0, "end_at_step": 10000, "add_noise": "enable",
                "return_with_leftover_noise": "disable",
            }
        },
    ),
    "execution": ("auto", {"custom": {"joint_pass": True, "attention": "auto"}}),
}  # fmt: skip
OPTIONAL = [
    "cache", "cfg_star", "nag", "skip_layers", "riflex", "step_range", "execution", "model_low_noise",
    "expert_boundary", "low_noise_guidance_scale", "sigmas",
]  # fmt: skip
OFF = {name: {name: off} for name, (off, _) in GROUPS.items()}


@pytest.fixture
def run(models, prompts, sample):
    """`run(**inputs)` -> (samples, report) of a short text-to-video job."""

    def go(model=None, latent=None, **inputs):
        latent = {"samples": torch.zeros(1, 16, 2, 4, 6)} if latent is None else latent
        out, report = sample(model or models["t2v"], *prompts, latent, **({"steps": STEPS} | inputs))
        return out["samples"], report

    return go


@pytest.fixture
def count_blocks(models):
    """A list that gets one entry for every call of a block of the t2v model."""
    calls = []
    blocks = models["t2v"].model.diffusion_model.blocks
    handles = [
        block.register_forward_pre_hook(lambda *_, i=i: calls.append(i)) for i, block in enumerate(blocks)
    ]
    yield calls
    for handle in handles:
        handle.remove()


def test_the_inputs_are_those_of_the_contract():
    inputs = {i.id: i for i in Wan21Sampler.define_schema().inputs}
    assert list(inputs)[-len(OPTIONAL) :] == OPTIONAL
    assert all(inputs[name].optional for name in OPTIONAL)
    for name, (off, on) in GROUPS.items():
        first, second = inputs[name].options
        assert (first.key, first.inputs) == (off, [])
        assert {second.key: {i.id: i.default for i in second.inputs}} == on
        assert all(i.optional for i in second.inputs)


def test_what_is_left_out_has_its_default_and_off_changes_no_bit(run):
    without, report = run()
    for inputs in (
        OFF,
        dict.fromkeys(GROUPS),
        {"execution": {"execution": "custom", "joint_pass": None}},
    ):
        explicit, explicit_report = run(**inputs)
        assert torch.equal(without, explicit)
        assert [line for line in report.splitlines() if "time" not in line and "memory" not in line] == [
            line for line in explicit_report.splitlines() if "time" not in line and "memory" not in line
        ]


@pytest.mark.parametrize(
    "neutral",
    [
        {"cache__multiplier": 1.0, "cache__profile": "i2v_480p"},
        {"cfg_star__start_step": STEPS},
        {"nag__scale": 1.0},
        {"nag__alpha": 0.0},
        {"riflex": "on"},
        {"riflex": "auto"},
        {"execution__joint_pass": False},
        {"execution__attention": "sdpa"},
        {"skip_layers__layers": "0", "skip_layers__start_percent": 0, "skip_layers__end_percent": 1},
    ],
    ids=str,
)
def test_settings_that_do_nothing_change_no_bit(run, neutral):
    assert torch.equal(run(**neutral)[0], run()[0])


def test_joint_pass_is_one_walk(run, count_blocks):
    run(steps=1)
    assert count_blocks == [0, 0, 1, 1]
    count_blocks.clear()
    run(steps=1, execution__joint_pass=False)
    assert count_blocks == [0, 1, 0, 1]


@pytest.mark.parametrize("joint", [True, False])
def test_teacache_computes_the_steps_of_its_plan(run, count_blocks, joint):
    samples, report = run(**TEACACHE, execution__joint_pass=joint, steps=12)
    computed, total = map(int, re.search(r"teacache: (\d+) of (\d+) steps", report).groups())
    marks = re.search(r"plan: ([#.]+)\n", report)[1]
    assert total == 12 == len(marks) and computed == marks.count("#") < 12
    assert len(count_blocks) == computed * 2 * 2
    assert "speed-up: " in report and "profile t2v_1.3b" in report
    assert 1e-4 < relative(samples, run(steps=12)[0]) < 1


def test_teacache_in_both_ways_of_walking_gives_the_same_bytes(run):
    assert torch.equal(run(**TEACACHE)[0], run(**TEACACHE, execution__joint_pass=False)[0])


def test_a_multiplier_out_of_reach_names_the_nearest(run):
    _, report = run(cache__multiplier=6.0, cache__profile="t2v_1.3b", steps=6)
    assert "asks for 1 computed steps; the nearest that can be is 2, 3.00x" in report


def test_teacache_on_a_part_of_the_schedule(run):
    latent = {"samples": torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(1))}
    _, report = run(latent=latent, denoise=0.5, **TEACACHE)
    assert re.search(rf"plan: #[#.]{{{STEPS - 2}}}#\n", report)


def test_zero_init_saves_its_steps(run, count_blocks):
    samples, report = run(cfg_star__zero_init_steps=2, cfg_star__start_step=99, **TEACACHE)
    assert "zero-init: the first 2 steps" in report and re.search(r"plan: 00#[#.]+#\n", report)
    assert count_blocks.count(0) % 2 == 0 and len(count_blocks) <= (STEPS - 2) * 4
    assert relative(samples, run()[0]) > 1e-3


def test_cfg_star_and_skip_layers_take_part(run, count_blocks):
    plain, _ = run()
    starred, report = run(cfg_star=True)
    assert relative(starred, plain) > 1e-3 and "guidance: CFG-Zero* from step 0" in report
    count_blocks.clear()
    skipped, report = run(skip_layers__layers="1", skip_layers__start_percent=0, skip_layers__end_percent=100)
    assert relative(skipped, plain) > 1e-3 and "skip layers: 1 of the unconditional pass" in report
    assert count_blocks == [0, 0, 1] * STEPS


def test_options_without_an_unconditional_pass_say_so(run):
    samples, report = run(guidance_scale=1.0, cfg_star=True, skip_layers__layers="0,1")
    assert "cfg_star has no effect at guidance_scale 1" in report
    assert "skip_layers has no effect at guidance_scale 1" in report
    assert torch.equal(samples, run(guidance_scale=1.0)[0])


def test_riflex_acts_on_a_long_clip_only(run):
    long = {"samples": torch.zeros(1, 16, 49, 2, 2)}
    plain = run(latent=long, steps=1)[0]
    lowered, report = run(latent=long, steps=1, riflex="auto")
    assert relative(lowered, plain) > 1e-4 and "note" not in report
    assert torch.equal(lowered, run(latent=long, steps=1, riflex="on")[0])
    short = {"samples": torch.zeros(1, 16, 25, 2, 2)}
    _, report = run(latent=short, steps=1, riflex="auto")
    assert "riflex has no effect on 25 latent frames" in report


# --- coefficients of the checkpoint ------------------------------------------------------------------


@pytest.fixture
def own(files, tmp_path):
    """`own(metadata)` -> MODEL of a copy of the t2v checkpoint with that metadata, at `own.path`."""

    def make(**metadata):
        with safe_open(files["t2v"], "pt") as file:
            stored = file.metadata()
        save_file(load_file(files["t2v"]), make.path, metadata=stored | metadata)
        return host.load_model(make.path)

    make.path = tmp_path / "mine.safetensors"
    return make


def test_a_model_of_unknown_size_needs_its_own_coefficients(run):
    message = r"^Wan21Sampler: there are no TeaCache .* of width 256 .*Run scripts/calibrate_teacache\.py"
    with pytest.raises(ValueError, match=message):
        run(cache__multiplier=2.0)
    with pytest.raises(ValueError, match=r"measured and wan21-random-t2v\.safetensors has no coefficients"):
        run(cache__multiplier=2.0, cache__profile="measured")


def test_coefficients_in_the_metadata_and_beside_the_file(own, run):
    model = own(teacache_coefficients="[0.5, 0.0]")
    for profile in ("auto", "measured"):
        _, report = run(model, cache__multiplier=2.0, cache__profile=profile)
        assert "profile measured" in report
    beside = own.path.with_name("mine.safetensors.teacache.json")
    beside.write_text(json.dumps([0.0, 0.0, 1.0]))  # another rule: every step changes alike
    _, report = run(model, cache__multiplier=2.0)
    assert "plan: #.#.##" in report or "plan: #..#.#" in report
    beside.write_text("[1, 'x']")
    with pytest.raises(ValueError, match=r"Wan21Sampler: mine\.safetensors\.teacache\.json: "):
        run(model, cache__multiplier=2.0)


def test_damaged_metadata_is_named(own, run):
    with pytest.raises(
        ValueError, match=r"teacache_coefficients in the metadata of mine\.safetensors: .*list of numbers"
    ):
        run(own(teacache_coefficients='{"a": 1}'), cache__multiplier=2.0)


# --- errors ------------------------------------------------------------------------------------------

BAD = [
    ({"cache__multiplier": 0.5}, "cache.multiplier is 0.5; a speed-up is at least 1"),
    ({"cfg_star__zero_init_steps": STEPS}, "zero_init_steps is 6 and the model has 6 of 6 steps"),
    ({"skip_layers__layers": "1,2,9"}, "skip_layers names block 2, 9; the model has 2, from 0"),
    ({"skip_layers__layers": "first"}, "layers holds 'first'"),
    ({"skip_layers__layers": "0", "skip_layers__start_percent": 90}, "no step lies between"),
    ({"execution__attention": "flash"}, "flash, and flash_attn is not installed; get it with pip install"),
    ({"execution__attention": "sage"}, "sage, and sageattention is not installed.*can be used here: sdpa"),
    ({"execution__attention": "xformers"}, "attention is xformers, and xformers is not installed"),
    ({"execution__attention": "flash4"}, "attention is flash4, and flash_attn.cute is not installed"),
]  # fmt: skip


@pytest.mark.parametrize("inputs, message", BAD, ids=lambda value: str(value)[:40])
def test_bad_options_are_named_before_any_step(run, inputs, message, monkeypatch):
    monkeypatch.setattr(host, "run_sampling", lambda *_: pytest.fail("sampling began"))
    with pytest.raises(ValueError, match="^Wan21Sampler: .*" + message):
        run(**inputs)


def test_an_installed_backend_is_refused_on_the_cpu(run, monkeypatch):
    fake = types.ModuleType("flash_attn")
    fake.flash_attn_func = lambda q, k, v: q
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    backends._import.cache_clear()
    try:
        with pytest.raises(ValueError, match="flash, and it needs a CUDA device and the model runs on cpu"):
            run(execution__attention="flash")
    finally:
        backends._import.cache_clear()


# --- attention of the host ---------------------------------------------------------------------------


def test_an_override_of_another_pack_is_honoured_when_auto(models, run):
    calls = []

    def override(function, *args, **kwargs):
        calls.append(kwargs["transformer_options"]["block_index"])
        return function(*args, **kwargs)

    model = models["t2v"].clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    through, report = run(model, steps=1)
    assert "attention: the host's own choice" in report
    assert calls == [0] * 4 + [1] * 4  # self- and cross-attention of two passes in two blocks
    calls.clear()
    plain, report = run(model, steps=1, execution__attention="sdpa")
    assert "attention: " not in report and calls == [] and relative(through, plain) < 1e-5
    assert "note: optimized_attention_override set on the MODEL by another node is not used here" in report


def test_sdpa_replaces_the_hosts_own_choice_on_the_cpu_only(monkeypatch):
    """Elsewhere the host takes its sub-quadratic one where SDPA has no kernel without the whole matrix."""
    monkeypatch.setattr(host_wan, "optimized_attention", host_attention.attention_sub_quad)
    for device, own in (("cpu", False), ("mps", True)):
        found = torch.device(device)
        monkeypatch.setattr(management, "get_torch_device", lambda found=found: found)
        assert has_own_attention({}) is own


def test_auto_keeps_to_what_the_host_was_started_with(models, monkeypatch):
    """Both flags. PyTorch's attention by a flag may be any of its kernels."""
    asked, config = [], models["t2v"].model.diffusion_model.config

    def choose(name, device, dtype, size, barred, make_room):
        asked.append((name, size, dict(barred)))
        return SDPA

    def ask(name="auto"):
        assert choose_attention_for(models["t2v"], name, 5) is SDPA
        asked_for, size, barred = asked.pop()
        assert size == AttentionSize(5, config.num_heads, config.head_dim)
        return asked_for, barred

    barred = {"xformers": "ComfyUI was started with --disable-xformers"}
    monkeypatch.setattr(host.attention, "choose_attention", choose)
    monkeypatch.setattr(args, "use_pytorch_cross_attention", False)
    assert ask() == ("auto", {})
    monkeypatch.setattr(args, "disable_xformers", True)
    assert ask() == ("auto", barred)
    monkeypatch.setattr(args, "use_pytorch_cross_attention", True)
    assert ask() == ("sdpa", barred)
    assert ask("flash3") == ("flash3", barred)
    monkeypatch.undo()
    monkeypatch.setattr(args, "disable_xformers", True)
    with pytest.raises(ValueError, match="attention is xformers, and ComfyUI was started with --disable-xf"):
        choose_attention_for(models["t2v"], "xformers", 5)


def test_nan_is_done_again_after_a_quantised_attention_only(models, monkeypatch):
    model, exact = models["t2v"].clone(), Attention("flash", SDPA.function)
    quantised = Attention("sage", SDPA.function, quantised=True)
    assert retry_of(model, SDPA) is retry_of(model, exact) is retry_of(model, None) is None
    assert retry_of(model, quantised) is SDPA
    for function, again in (
        (host_attention.attention_sage, SDPA),
        (lambda *a, **kw: None, SDPA),  # of another pack, for all models
        (host_attention.attention_xformers, None),
        (host_attention.attention_flash, None),
        (host_attention.attention_pytorch, None),
    ):
        monkeypatch.setattr(host_wan, "optimized_attention", function)
        assert retry_of(model, None) is again
    model.model_options["transformer_options"]["optimized_attention_override"] = lambda *a, **kw: None
    assert retry_of(model, None) is SDPA


def test_nan_is_not_done_again_by_sdpa_where_that_is_not_fused(models, monkeypatch):
    """On a device where the host itself takes its sub-quadratic attention, that is the exact one."""
    model = models["t2v"].clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = lambda *a, **kw: None
    monkeypatch.setattr(model, "load_device", torch.device("cuda", 0))
    monkeypatch.setattr(management, "pytorch_attention_enabled", lambda: False)
    instead = retry_of(model, None)
    q, k, v = torch.randn(3, 1, 20, 2, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    found = instead.function(q, k, v)
    monkeypatch.undo()
    assert relative(found, SDPA.function(q, k, v)) < 1e-5 and "sub-quadratic" in instead.name


# --- interplay ---------------------------------------------------------------------------------------

some = st.fixed_dictionaries(
    {
        "guidance_scale": st.sampled_from([1.0, 4.0]),
        "solver": st.sampled_from(sorted(SOLVERS)),
        "cache__multiplier": st.sampled_from([1.0, 1.5, 2.0]),
        "cache__start_percent": st.sampled_from([0, 40]),
        "cache__profile": st.sampled_from(["t2v_1.3b", "i2v_480p"]),
        "cfg_star__start_step": st.integers(0, 3),
        "cfg_star__zero_init_steps": st.integers(0, 2),
        "riflex": st.sampled_from(["auto", "on", "off"]),
        "execution__attention": st.sampled_from(["auto", "sdpa"]),
        "nag__scale": st.sampled_from([1.0, 11.0]),
        "skip_layers__layers": st.sampled_from(["0", "0,1"]),
        "skip_layers__start_percent": st.integers(0, 40),
        "skip_layers__end_percent": st.integers(50, 100),
        "denoise": st.sampled_from([1.0, 0.6]),
    }
)
LATENTS = {
    size: {"samples": torch.randn(1, 16, *size, generator=torch.Generator().manual_seed(2))}
    for size in ((2, 4, 6), (1, 6, 4), (46, 2, 2))
}
quickly = settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@quickly
@given(options=some, other=some, size=st.sampled_from([*LATENTS]), other_size=st.sampled_from([*LATENTS]))
def test_any_options_leave_nothing_behind(run, models, options, other, size, other_size):
    """A job gives the same bytes whatever ran before it, and in both ways of walking the passes."""
    first, _ = run(latent=LATENTS[size], steps=4, **options)
    run(latent=LATENTS[other_size], steps=4, **other)
    again, _ = run(latent=LATENTS[size], steps=4, **options, execution__joint_pass=False)
    assert torch.equal(first, again)
    assert "wan21_call" not in models["t2v"].model_options["transformer_options"]


@quickly
@given(options=some, off=st.sampled_from(["cache", "cfg_star", "nag", "skip_layers"]))
def test_a_group_that_is_off_is_absent_beside_any_others(run, options, off):
    """Its settings, which the editor keeps, do not matter."""
    rest = {name: value for name, value in options.items() if not name.startswith(f"{off}__")}
    kept = grouped(**options)[off] | {off: "off"}
    latent = LATENTS[(2, 4, 6)]
    assert torch.equal(
        run(latent=latent, steps=4, **rest, **{off: kept})[0], run(latent=latent, steps=4, **rest)[0]
    )


def test_a_cancelled_run_leaves_nothing_behind(models, run):
    options = TEACACHE | {"cfg_star": True, "skip_layers__layers": "1"}
    expected, _ = run(**options)
    block = models["t2v"].model.diffusion_model.blocks[1]
    calls = []

    def cancel(*_):
        calls.append(1)
        if len(calls) == 3:
            management.interrupt_current_processing(True)

    handle = block.register_forward_pre_hook(cancel)
    with pytest.raises(management.InterruptProcessingException):
        run(**options)
    handle.remove()
    assert torch.equal(run(**options)[0], expected)


def test_two_samplers_in_one_graph(run):
    """A second sampler that goes on from the first one's latent plans and caches for itself."""
    alone, _ = run(latent=LATENTS[(2, 4, 6)], denoise=0.4, **TEACACHE)
    first, _ = run(**TEACACHE)
    second, report = run(latent={"samples": first}, denoise=0.4, **TEACACHE)
    again, _ = run(latent={"samples": first}, denoise=0.4, **TEACACHE)
    assert torch.equal(second, again) and "plan: #" in report
    assert torch.equal(run(latent=LATENTS[(2, 4, 6)], denoise=0.4, **TEACACHE)[0], alone)


def test_a_solver_that_fails_drops_the_state(run, models, monkeypatch):
    import gc

    from wan21.wan.teacache import Residuals

    expected, _ = run(**TEACACHE)

    def fail(step, i, x0):
        if i == 2:
            raise RuntimeError("disk full")

    monkeypatch.setattr(host.StepProgress, "__call__", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        run(**TEACACHE)
    monkeypatch.undo()
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is Residuals]
    assert torch.equal(run(**TEACACHE)[0], expected)
