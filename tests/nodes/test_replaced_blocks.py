"""Blocks that nodes of other packs replace: told of what they get, and acting as on the host's own model."""

import comfy.sd
import pytest
import torch
from helpers import relative
from helpers_nodes import clip_vision
from test_other_packs import LATENT, ksample


@pytest.fixture(scope="module")
def native(files):
    """The host's MODELs of the same files."""
    return {kind: comfy.sd.load_diffusion_model(str(files[kind])) for kind in ("t2v", "i2v")}


@pytest.fixture
def jobs(prompts, image_to_video):
    """(positive, negative) by kind of model; of the image model with an image and its CLIP features."""
    sizes = {"width": 32, "height": 32, "num_frames": 5}
    return {
        "t2v": prompts,
        "i2v": image_to_video(**sizes, clip_vision_start=clip_vision())[:2],
        "i2v without CLIP": image_to_video(**sizes)[:2],
    }


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


@pytest.mark.parametrize("kind", ["t2v", "i2v", "i2v without CLIP"])
@pytest.mark.parametrize("what", BLOCK_PATCHES)
def test_what_a_replaced_block_hands_on_acts_as_on_the_hosts_model(native, models, jobs, kind, what):
    def patch(args, extra):
        return BLOCK_PATCHES[what](args, extra["original_block"])

    job, kind = jobs[kind], kind[:3]
    expected, ours = (ksample(with_block(m[kind], patch), job) for m in (native, models))
    assert relative(ours, expected) < 1e-5
    assert relative(expected, ksample(native[kind], job)) > 1e-4


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
