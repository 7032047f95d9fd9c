"""What nodes of other packs put below `diffusion_model` of our MODEL acts, or is refused by its name."""

import importlib
import logging
import os
import sys
import types
import unittest.mock
from pathlib import Path

import comfy.sd
import pytest
import torch
from comfy.ldm.wan import model as wan_model
from comfy.patcher_extension import PatcherInjection, WrappersMP, add_wrapper
from helpers import relative
from helpers_nodes import host_euler
from wan21 import host
from wan21.wan.memory import MemoryPlan

LATENT = {"samples": torch.zeros(1, 16, 2, 4, 4)}
SIGMAS = [1.0, 0.5, 0.0]


def ksample(model, prompts, cfg=3.0):
    return host_euler(model, *prompts, LATENT, SIGMAS, cfg, 5)


def replaced_forward(model, path):
    """As packs do it: a bound function in place of a module's `forward`, around the one that was there."""
    patched = model.clone()
    module = patched.get_model_object(f"diffusion_model.{path}")
    before = module.forward
    patched.add_object_patch(
        f"diffusion_model.{path}.forward",
        types.MethodType(lambda self, *args, **kwargs: before(*args, **kwargs) * 0.5, module),
    )
    return patched


@pytest.mark.parametrize("path", ["blocks.0.ffn", "blocks.1.norm3", "text_embedding", "blocks.0.self_attn.v"])
def test_a_replaced_forward_that_we_call_acts(models, prompts, sample, path):
    plain, patched = models["t2v"], replaced_forward(models["t2v"], path)
    assert relative(ksample(patched, prompts), ksample(plain, prompts)) > 1e-4
    ours, expected = (sample(m, *prompts, LATENT)[0]["samples"] for m in (patched, plain))
    assert relative(ours, expected) > 1e-4


@pytest.mark.parametrize(
    "path, fix",
    [
        ("forward_orig", "set cache to teacache on Wan21Sampler"),
        ("rope_embedder", "set riflex on Wan21Sampler"),
        ("blocks.0.self_attn.forward", "choose attention on Wan21Sampler"),
        ("blocks.1.cross_attn.forward", "set nag on Wan21Sampler"),
        ("blocks.1.forward", "Load Diffusion Model"),
        ("blocks.0.cross_attn", "Load Diffusion Model"),
        ("unpatchify", "Load Diffusion Model"),
    ],
)
def test_one_that_would_not_act_is_refused_by_name(models, prompts, sample, path, fix, monkeypatch):
    patched = models["t2v"].clone()
    patched.add_object_patch(f"diffusion_model.{path}", torch.nn.Identity())
    message = rf"another node replaced diffusion_model\.{path}, which .*{fix}"
    with pytest.raises(ValueError, match=message):
        sample(patched, *prompts, LATENT)
    monkeypatch.setattr("comfy.model_management.load_models_gpu", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        ksample(patched, prompts)


def negated(module, path):
    """A function in place of one of a module's, written on the module itself."""
    setattr(module.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], lambda *_, **__: None)


class CalledObject:
    """What some packs write in place of a function."""

    def __call__(self, *_, **__):
        return None


def object_put(module, path):
    setattr(module.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], CalledObject())


def hooked(module, path):
    module.get_submodule(path).register_forward_hook(lambda module, inputs, output: output)


def pre_hooked(module, path):
    module.get_submodule(path).register_forward_pre_hook(lambda module, inputs: inputs)


def injected(patcher, path):
    """As the host's bypass adapters do: written while the model is loaded."""
    module = patcher.get_model_object(f"diffusion_model.{path.removesuffix('.forward')}")
    patcher.set_injections(
        "pack",
        [
            PatcherInjection(
                lambda _: setattr(module, "forward", module.forward),
                lambda _: vars(module).pop("forward", None),
            )
        ],
    )


def in_the_hosts_form(module, path):
    """A `forward` of the host's kind, on the module or by its class."""
    path, _, by_class = path.partition("#")
    part = module.get_submodule(path.removesuffix(".forward"))

    def forward(self, x, context, context_img_len=None, transformer_options=None):
        return x

    if by_class:
        part.__class__ = type("Packs", (type(part),), {"forward": forward})
    else:
        part.forward = types.MethodType(forward, part)


def of_another_class(module, path):
    module.__class__ = type("Packs", (type(module),), {})


class Around(torch.nn.Module):
    """A module of another pack around one that was there."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs) * 0.5


def set_around(module, path):
    owner, _, name = path.removesuffix(".forward").rpartition(".")
    setattr(module.get_submodule(owner), name, Around(module.get_submodule(f"{owner}.{name}")))


def added(module, path):
    owner, _, name = path.rpartition(".")
    module.get_submodule(owner).add_module(name, torch.nn.Identity())


@pytest.mark.parametrize(
    "write, path, said",
    [
        (in_the_hosts_form, "blocks.0.forward", "replaced"),
        (in_the_hosts_form, "blocks.1.cross_attn.forward", "replaced"),
        (in_the_hosts_form, "blocks.0.forward#class", "replaced"),
        (in_the_hosts_form, "blocks.1.self_attn.forward#class", "replaced"),
        (of_another_class, "__class__", "replaced"),
        (set_around, "blocks.1.self_attn.forward", "replaced"),
        (added, "blocks.0.norm1", "replaced"),
        (negated, "forward_orig", "replaced"),
        (negated, "rope_encode", "replaced"),
        (negated, "blocks.0.self_attn.forward", "replaced"),
        (negated, "blocks.1.self_attn.qkv_fn", "replaced"),
        (negated, "blocks.1.modulate", "replaced"),
        (object_put, "rope_encode", "replaced"),
        (object_put, "blocks.1.cross_attn.attend", "replaced"),
        (hooked, "blocks.1.self_attn", "hooked"),
        (pre_hooked, "blocks.0.self_attn", "hooked"),
        (injected, "blocks.0.self_attn.forward", "replaced"),
    ],
)
def test_what_is_written_on_the_model_itself_is_refused_too(files, prompts, sample, write, path, said):
    patched = host.load_model(files["t2v"])
    write(patched if write is injected else patched.model.diffusion_model, path)
    message = rf"another node {said} diffusion_model\.{path.partition('#')[0]}, which "
    for run in (ksample, lambda *args: sample(args[0], *args[1], LATENT)):
        with pytest.raises(ValueError, match=message):
            run(patched, prompts)


@pytest.mark.parametrize("path", ["blocks.0", "blocks.1.cross_attn", "blocks.0.ffn", "head", ""])
def test_other_hooks_act_as_on_the_hosts_model(files, prompts, path):
    native, ours = comfy.sd.load_diffusion_model(str(files["t2v"])), host.load_model(files["t2v"])
    for model in (native, ours):
        part = model.model.diffusion_model.get_submodule(path)
        part.register_forward_hook(lambda module, inputs, output: output * 0.5)
    assert relative(ksample(ours, prompts), ksample(native, prompts)) < 1e-5


@pytest.mark.parametrize("path", ["blocks.0", "blocks.0.ffn", "blocks.1.cross_attn", "head"])
def test_a_module_around_one_of_the_models_acts_as_on_the_hosts(files, prompts, sample, path):
    def around(module):
        if "." in path:
            set_around(module, path)
        else:
            module.head = Around(module.head)

    native, ours = comfy.sd.load_diffusion_model(str(files["t2v"])), host.load_model(files["t2v"])
    before = sample(ours, *prompts, LATENT)[0]["samples"]
    for model in (native, ours):
        around(model.model.diffusion_model)
    assert relative(ksample(ours, prompts), ksample(native, prompts)) < 1e-5
    assert relative(sample(ours, *prompts, LATENT)[0]["samples"], before) > 1e-3


def test_a_walk_put_there_for_each_call_is_refused_by_name(models, prompts, sample):
    """As the packs of TeaCache and MagCache do it."""
    cached = models["t2v"].clone()
    dit = cached.model.diffusion_model

    def wrapper(apply_model, told):
        with unittest.mock.patch.multiple(dit, forward_orig=lambda x, *args, **kwargs: x):
            return apply_model(told["input"], told["timestep"], **told["c"])

    cached.set_model_unet_function_wrapper(wrapper)
    with pytest.raises(ValueError, match=r"replaced diffusion_model\.forward_orig.*set cache to teacache"):
        ksample(cached, prompts)
    report = sample(cached, *prompts, LATENT)[1]
    assert "note: model_function_wrapper set on the MODEL by another node is not used here" in report


def nothing(executor, *args, **kwargs):
    return executor(*args, **kwargs)


@pytest.mark.parametrize(
    "put, name",
    [
        (lambda m: m.add_wrapper_with_key("predict_noise", "pack", nothing), "a predict_noise wrapper"),
        (
            lambda m: add_wrapper("predict_noise", nothing, m.model_options, is_model_options=True),
            "a predict_noise wrapper",
        ),
        (
            lambda m: add_wrapper("calc_cond_batch", nothing, m.model_options, is_model_options=True),
            "a calc_cond_batch wrapper",
        ),
        (lambda m: m.add_object_patch("apply_model", m.model.apply_model), "apply_model"),
        (lambda m: m.add_object_patch("_apply_model", m.model._apply_model), "_apply_model"),
    ],
)
def test_what_acts_around_the_hosts_steps_alone_is_said(models, prompts, sample, put, name):
    model = models["t2v"].clone()
    put(model)
    note = f"note: {name} set on the MODEL by another node is not used here"
    assert note in sample(model, *prompts, LATENT)[1]
    assert note not in sample(models["t2v"], *prompts, LATENT)[1]  # the host has put back what was there


def test_a_hooked_block_is_called_whole(files, prompts, sample, monkeypatch):
    """Also where memory is short and the others go by parts."""
    monkeypatch.setattr("wan21.nodes.sampler.plans_from", lambda *_: [MemoryPlan(True, 2)])
    model = host.load_model(files["t2v"])
    plain = sample(model, *prompts, LATENT)[0]["samples"]
    model.model.diffusion_model.blocks[0].register_forward_hook(lambda module, inputs, output: output * 0.5)
    assert relative(sample(model, *prompts, LATENT)[0]["samples"], plain) > 1e-2


def test_an_attention_override_is_told_of_its_pass(models, prompts):
    seen = []

    def override(function, q, k, v, heads, **kwargs):
        seen.append((len(q), tuple(kwargs["transformer_options"]["cond_or_uncond"])))
        return function(q, k, v, heads, **kwargs)

    patched = models["t2v"].clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    ksample(patched, prompts)
    assert set(seen) == {(1, (0,)), (1, (1,))}


def test_an_attention_put_into_the_hosts_wan_module_acts(files, models, prompts, monkeypatch):
    def run():
        return [
            ksample(m, prompts) for m in (comfy.sd.load_diffusion_model(str(files["t2v"])), models["t2v"])
        ]

    before, function = run(), wan_model.optimized_attention
    monkeypatch.setattr(
        wan_model, "optimized_attention", lambda q, k, v, heads, **kw: function(q, k, v * 0.3, heads, **kw)
    )
    native, ours = run()
    assert relative(native, before[0]) > 1e-3 and relative(ours, native) < 1e-5


@pytest.mark.parametrize("name", ["WanModel.forward_orig", "WanSelfAttention.forward", "WanAttentionBlock"])
def test_what_a_pack_changes_in_the_hosts_wan_classes_is_said(
    models, prompts, sample, name, monkeypatch, caplog
):
    assert "another pack changed" not in sample(models["t2v"], *prompts, LATENT)[1]
    kind, _, function = name.partition(".")
    if function:
        monkeypatch.setattr(getattr(wan_model, kind), function, lambda self, *args, **kwargs: None)
    else:
        monkeypatch.setattr(wan_model, kind, type("Packs", (torch.nn.Module,), {}))
    message = f"another pack changed {name} of ComfyUI's own Wan model"
    assert f"note: {message}" in sample(models["t2v"], *prompts, LATENT)[1]
    with caplog.at_level(logging.INFO):
        caplog.clear()
        ksample(models["t2v"], prompts)
    assert message in caplog.text


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
@pytest.mark.parametrize("path", ["", "blocks.0", "blocks.1.self_attn", "blocks.1.cross_attn"])
def test_sizes_are_read_where_packs_read_those_of_the_hosts_model(files, models, kind, path):
    native = comfy.sd.load_diffusion_model(str(files[kind])).model.diffusion_model.get_submodule(path)
    ours = models[kind].model.diffusion_model.get_submodule(path)
    plain = {
        k: v for k, v in vars(native).items() if isinstance(v, (bool, int, float, str, tuple)) and k[0] != "_"
    }
    assert len(plain) > 5
    assert {name: getattr(ours, name, None) for name in plain} == plain


def told_timesteps(model, change):
    """With a wrapper of another pack that changes the timesteps."""
    model = model.clone()
    model.add_wrapper_with_key(
        WrappersMP.DIFFUSION_MODEL, "pack", lambda run, x, t, *args, **kw: run(x, change(t), *args, **kw)
    )
    return model


def test_timesteps_of_frames_are_refused_and_one_in_a_row_is_read(files, models, prompts):
    native = comfy.sd.load_diffusion_model(str(files["t2v"]))
    ours, expected = (
        ksample(told_timesteps(m, lambda t: t[:, None] / 2), prompts) for m in (models["t2v"], native)
    )
    assert relative(ours, expected) < 1e-5
    with pytest.raises(ValueError, match=r"timesteps \[2, 2\], one for each frame.*Load Diffusion Model"):
        ksample(told_timesteps(models["t2v"], lambda t: torch.stack([t / 2, t], 1)), prompts)


def test_training_on_our_model_is_refused_by_name(models):
    """As the host's TrainLoraNode calls it; its bare error was on the data types of a norm."""
    with torch.inference_mode(False), pytest.raises(ValueError, match="Load Diffusion Model to train"):
        x = torch.zeros(1, 16, 1, 4, 4, requires_grad=True)
        models["t2v"].model.diffusion_model(x, torch.zeros(1), torch.zeros(1, 8, 128))


@pytest.fixture
def kj():
    """KJNodes' module of model nodes, where the pack lies: WAN21_TEST_PACKS names the folder of packs."""
    folder = Path(os.environ.get("WAN21_TEST_PACKS", ".")) / "ComfyUI-KJNodes"
    if not folder.is_dir():
        pytest.skip("WAN21_TEST_PACKS names no folder with ComfyUI-KJNodes")
    package = types.ModuleType("kjnodes")
    package.__path__ = [str(folder)]
    sys.modules["kjnodes"] = package
    try:
        return importlib.import_module("kjnodes.nodes.model_optimization_nodes")
    except ImportError as error:
        pytest.skip(f"ComfyUI-KJNodes does not import here: {error}")


def test_kjnodes_own_nodes_are_refused_or_act(kj, models, prompts):
    feta = kj.WanVideoEnhanceAVideoKJ().enhance(models["t2v"], 2.0, LATENT)[0]
    with pytest.raises(ValueError, match=r"replaced diffusion_model\.blocks\.0\.self_attn\.forward"):
        ksample(feta, prompts)
    nag = kj.WanVideoNAG().patch(models["t2v"], prompts[1], 11.0, 0.25, 2.5)[0]
    with pytest.raises(ValueError, match=r"replaced diffusion_model\.blocks\.0\.cross_attn\.forward"):
        ksample(nag, prompts)
    chunked = kj.WanChunkFeedForward.execute(models["t2v"], 2, 1).result[0]
    assert relative(ksample(chunked, prompts), ksample(models["t2v"], prompts)) < 1e-5
