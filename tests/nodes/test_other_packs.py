"""What nodes of other packs put below `diffusion_model` of our MODEL acts, or is refused by its name."""

import importlib
import os
import sys
import types
from pathlib import Path

import comfy.sd
import pytest
import torch
from comfy.patcher_extension import PatcherInjection
from helpers import relative
from helpers_nodes import clip_vision, host_euler
from wan21 import host
from wan21.wan.memory import MemoryPlan

LATENT = {"samples": torch.zeros(1, 16, 2, 4, 4)}
SIGMAS = [1.0, 0.5, 0.0]


def ksample(model, prompts, cfg=3.0):
    return host_euler(model, *prompts, LATENT, SIGMAS, cfg, 5)


@pytest.fixture(scope="module")
def native(files):
    """The host's MODELs of the same files."""
    return {kind: comfy.sd.load_diffusion_model(str(files[kind])) for kind in ("t2v", "i2v")}


@pytest.fixture
def jobs(prompts, image_to_video):
    """(positive, negative) by kind of model; of the image model with an image and its CLIP features."""
    conds = image_to_video(width=32, height=32, num_frames=5, clip_vision_start=clip_vision())[:2]
    return {"t2v": prompts, "i2v": conds}


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
        ("forward_orig", "Remove that node; or load"),
        ("rope_embedder", "set riflex on Wan21Sampler"),
        ("blocks.0.self_attn.forward", "choose attention on Wan21Sampler"),
        ("blocks.1.cross_attn.forward", "Load Diffusion Model"),
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


@pytest.mark.parametrize(
    "write, path, said",
    [
        (negated, "forward_orig", "replaced"),
        (negated, "rope_encode", "replaced"),
        (negated, "blocks.0.self_attn.forward", "replaced"),
        (negated, "blocks.1.self_attn.qkv_fn", "replaced"),
        (negated, "blocks.1.modulate", "replaced"),
        (hooked, "blocks.1.self_attn", "hooked"),
        (pre_hooked, "blocks.0.self_attn", "hooked"),
        (injected, "blocks.0.self_attn.forward", "replaced"),
    ],
)
def test_what_is_written_on_the_model_itself_is_refused_too(files, prompts, sample, write, path, said):
    patched = host.load_model(files["t2v"])
    write(patched if write is injected else patched.model.diffusion_model, path)
    message = rf"another node {said} diffusion_model\.{path}, which "
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


def test_a_hooked_block_is_called_whole(files, prompts, sample, monkeypatch):
    """Also where memory is short and the others go by parts."""
    monkeypatch.setattr("wan21.nodes.sampler.plans_from", lambda *_: [MemoryPlan(True, 2)])
    model = host.load_model(files["t2v"])
    plain = sample(model, *prompts, LATENT)[0]["samples"]
    model.model.diffusion_model.blocks[0].register_forward_hook(lambda module, inputs, output: output * 0.5)
    assert relative(sample(model, *prompts, LATENT)[0]["samples"], plain) > 1e-2


def with_block(model, patch):
    patched = model.clone()
    patched.set_model_patch_replace(patch, "dit", "double_block", 0)
    return patched


def test_a_replaced_block_is_told_of_its_pass_and_keeps_its_input(models, prompts, sample):
    seen = []

    def patch(args, extra):
        before = args["img"].clone()
        out = extra["original_block"](args)
        options = args["transformer_options"]
        assert torch.equal(args["img"], before) and relative(out["img"], before) > 1e-3
        assert len(options.get("uuids", [0])) == len(args["img"])
        seen.append(tuple(options["cond_or_uncond"]))
        return out

    for run in (lambda m: ksample(m, prompts), lambda m: sample(m, *prompts, LATENT)[0]["samples"]):
        seen.clear()
        assert torch.equal(run(with_block(models["t2v"], patch)), run(models["t2v"]))
        assert {(0,), (1,)} == set(seen)


def muted(function, q, k, v, heads, **kwargs):
    """An attention of another pack's."""
    return function(q, k, v * 0.3, heads, **kwargs)


def fewer_tokens(args, block):
    few = block(args | {"img": args["img"][:, :4], "pe": args["pe"][:, :4]})["img"]
    return {"img": torch.cat([few, args["img"][:, 4:]], dim=1)}


def written_into(args, name):
    args[name].mul_(0.5)
    return args


BLOCK_PATCHES = {
    "another text": lambda args, block: block(args | {"txt": args["txt"] * 0.3}),
    "a longer text": lambda args, block: block(
        args | {"txt": torch.cat([args["txt"], args["txt"] * 2], dim=1)}
    ),
    "text changed in place": lambda args, block: block(written_into(args, "txt")),
    "another modulation": lambda args, block: block(args | {"vec": args["vec"] * 0.3}),
    "modulation by its axes": lambda args, block: block(
        args | {"vec": torch.cat([args["vec"][:, :, :3], args["vec"][:, :, 3:] * 0.3], dim=2)}
    ),
    "other positions": lambda args, block: block(args | {"pe": args["pe"].roll(1, 1)}),
    "fewer tokens": fewer_tokens,
    "tokens changed in place": lambda args, block: block(written_into(args, "img")),
    "the block twice": lambda args, block: block(args | block(args)),
    "an attention for the block": lambda args, block: block(
        args | {"transformer_options": args["transformer_options"] | {"optimized_attention_override": muted}}
    ),
    "by the size of the grid": lambda args, block: {
        "img": args["img"] * (1 + args["transformer_options"]["grid_sizes"].numel() / 9)
    },
}


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
@pytest.mark.parametrize("what", BLOCK_PATCHES)
def test_what_a_replaced_block_hands_on_acts_as_on_the_hosts_model(native, models, jobs, kind, what):
    def patch(args, extra):
        return BLOCK_PATCHES[what](args, extra["original_block"])

    expected, ours = (ksample(with_block(m[kind], patch), jobs[kind]) for m in (native, models))
    assert relative(ours, expected) < 1e-5
    assert relative(expected, ksample(native[kind], jobs[kind])) > 1e-4


def test_functions_inside_a_block_are_refused_where_a_replaced_block_adds_them(models, prompts):
    def patch(args, extra):
        told = args["transformer_options"] | {"patches": {"attn1_patch": [lambda *_: None]}}
        return extra["original_block"](args | {"transformer_options": told})

    with pytest.raises(ValueError, match="another node put attn1_patch on the MODEL"):
        ksample(with_block(models["t2v"], patch), prompts)


def test_a_rule_that_skips_the_negative_pass_leaves_the_positive_alone(models, prompts, sample):
    def patch(args, extra):
        only_positive = args["transformer_options"]["cond_or_uncond"] == [0]
        return extra["original_block"](args) if only_positive else args

    patched = with_block(models["t2v"], patch)
    assert relative(ksample(patched, prompts), ksample(models["t2v"], prompts)) > 1e-4
    ours, skipped = (
        sample(m, *prompts, LATENT, **inputs)[0]["samples"]
        for m, inputs in (
            (patched, {}),
            (
                models["t2v"],
                {
                    "skip_layers__layers": "0",
                    "skip_layers__start_percent": 0,
                    "skip_layers__end_percent": 100,
                },
            ),
        )
    )
    assert torch.equal(ours, skipped)


def test_an_attention_override_is_told_of_its_pass(models, prompts):
    seen = []

    def override(function, q, k, v, heads, **kwargs):
        seen.append((len(q), tuple(kwargs["transformer_options"]["cond_or_uncond"])))
        return function(q, k, v, heads, **kwargs)

    patched = models["t2v"].clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    ksample(patched, prompts)
    assert set(seen) == {(1, (0,)), (1, (1,))}


def test_two_prompts_of_a_side_are_told_apart(models, prompts):
    """Their passes have one name in our walk, and a number of their own in `uuids`."""
    (features, extras), seen = prompts[0][0], {}
    both = [[features, dict(extras)], [features * 0.5, dict(extras)]]

    def patch(args, extra):
        options = args["transformer_options"]
        seen.setdefault(options["uuids"][0], []).append(
            (options["cond_or_uncond"][0], args["txt"].norm().item())
        )
        return extra["original_block"](args)

    ksample(with_block(models["t2v"], patch), (both, prompts[1]))
    assert sorted({side for told in seen.values() for side, _ in told}) == [0, 1] and len(seen) == 3
    assert all(len({side for side, _ in told}) == 1 for told in seen.values())
    assert all(len({round(text, 2) for _, text in told}) == 1 for told in seen.values())


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
