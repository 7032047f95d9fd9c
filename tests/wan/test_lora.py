"""LoRA files in every dialect change the weights that the formulas, written out here, say."""

import json
import math
import time

import numpy as np
import pytest
import torch
from wan21.wan import lora as wl
from wan21.wan.config import WanConfig
from wan21.wan.dit import WanModel

SMALL = dict(dim=8, ffn_dim=12, num_heads=2, num_layers=2, text_dim=6, freq_dim=4)
G = torch.Generator().manual_seed(0)


def shapes_of(**config):
    with torch.device("meta"):
        model = WanModel(WanConfig(**(SMALL | config)), torch.nn)
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}


T2V = shapes_of(in_dim=16)
I2V = shapes_of(in_dim=36, image_dim=1280)


def rand(*shape):
    return torch.randn(*shape, generator=G)


def merged(lora, weights, strength=1.0):
    """All weights with the patches of a matched LoRA applied."""
    out = {k: w.clone() for k, w in weights.items()}
    for key, patch in lora.patches:
        wl.apply_patch(patch, out[key], strength)
    return out


def check(state_dict, expected, strength=1.0, shapes=T2V, metadata=None):
    """The LoRA changes the weights to `expected` (numpy float64 by key) and nothing else."""
    weights = {k: rand(*s) for k, s in shapes.items()}
    lora = wl.match_lora(state_dict, shapes, metadata)
    assert lora.unmatched == {}
    assert lora.matched == list(state_dict)
    result = merged(lora, weights, strength)
    for key, weight in weights.items():
        w = weight.double().numpy()
        want = expected[key](w) if key in expected else w
        assert np.allclose(result[key].numpy(), want, atol=1e-5), key
        assert key in expected or torch.equal(result[key], weight)


def f64(t):
    return t.double().numpy()


# One low-rank layer under each of its names: (name of the layer, down, up, alpha or None)
PEFT_FACTORS = ("lora_A.weight", "lora_B.weight", None)
DIFFSYNTH_FACTORS = ("lora_A.default.weight", "lora_B.default.weight", None)
KOHYA_FACTORS = ("lora_down.weight", "lora_up.weight", "alpha")
DIALECTS = {
    "wan": ("blocks.1.self_attn.q", *PEFT_FACTORS),
    "DiffSynth": ("blocks.1.self_attn.q", *DIFFSYNTH_FACTORS),
    "DiffSynth, pipe": ("pipe.dit.blocks.1.self_attn.q", *DIFFSYNTH_FACTORS),
    "ComfyUI": ("diffusion_model.blocks.1.self_attn.q", *PEFT_FACTORS),
    "ComfyUI, kohya factors": ("diffusion_model.blocks.1.self_attn.q", *KOHYA_FACTORS),
    "diffusers": ("transformer.blocks.1.attn1.to_q", *PEFT_FACTORS),
    "diffusers, bare": ("blocks.1.attn1.to_q", *PEFT_FACTORS),
    "diffusers, old": ("transformer.blocks.1.attn1.to_q", "lora.down.weight", "lora.up.weight", None),
    "PEFT": ("base_model.model.blocks.1.self_attn.q", "lora_A.weight", "lora_B.weight", "alpha"),
    "PEFT over diffusers": ("base_model.model.transformer.blocks.1.attn1.to_q", *PEFT_FACTORS),
    "kohya, musubi": ("lora_unet_blocks_1_self_attn_q", *KOHYA_FACTORS),
    "kohya over diffusers": ("lora_unet_blocks_1_attn1_to_q", *KOHYA_FACTORS),
    "Fun": ("lora_unet__blocks_1_self_attn_q", *KOHYA_FACTORS),
    "SimpleTuner": ("lycoris_blocks_1_attn1_to_q", *KOHYA_FACTORS),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("strength", [1.0, -0.7])
def test_low_rank_in_each_dialect(dialect, strength):
    layer, down_name, up_name, alpha = DIALECTS[dialect]
    down, up = rand(2, 8), rand(8, 2)
    file = {f"{layer}.{down_name}": down, f"{layer}.{up_name}": up}
    scale = 1.0
    if alpha:
        file[f"{layer}.{alpha}"] = torch.tensor(5.0)
        scale = 5.0 / 2
    change = strength * scale * f64(up) @ f64(down)
    check(file, {"blocks.1.self_attn.q.weight": lambda w: w + change}, strength)


# Every layer of a block and outside: diffusers' name, Wan's name.
LAYERS = {
    "blocks.0.attn1.to_k": "blocks.0.self_attn.k",
    "blocks.0.attn1.to_v": "blocks.0.self_attn.v",
    "blocks.0.attn1.to_out.0": "blocks.0.self_attn.o",
    "blocks.0.attn2.to_q": "blocks.0.cross_attn.q",
    "blocks.0.attn2.to_k": "blocks.0.cross_attn.k",
    "blocks.0.attn2.to_v": "blocks.0.cross_attn.v",
    "blocks.0.attn2.to_out.0": "blocks.0.cross_attn.o",
    "blocks.0.attn2.add_k_proj": "blocks.0.cross_attn.k_img",
    "blocks.0.attn2.add_v_proj": "blocks.0.cross_attn.v_img",
    "blocks.0.ffn.net.0.proj": "blocks.0.ffn.0",
    "blocks.0.ffn.net.2": "blocks.0.ffn.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "proj_out": "head.head",
}


@pytest.mark.parametrize("spelling", ["diffusers", "wan", "kohya diffusers", "kohya wan"])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_is_found(layer, spelling):
    name = layer if "diffusers" in spelling else LAYERS[layer]
    if "kohya" in spelling:
        name = "lora_unet_" + name.replace(".", "_")
    key = LAYERS[layer] + ".weight"
    rows, columns = I2V[key]
    down, up = rand(3, columns), rand(rows, 3)
    file = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    check(file, {key: lambda w: w + f64(up) @ f64(down)}, shapes=I2V)


def test_mixed_ranks_each_with_its_alpha():
    file, expected = {}, {}
    for rank, layer in ((1, "self_attn.q"), (3, "self_attn.k"), (4, "cross_attn.o")):
        down, up = rand(rank, 8), rand(8, rank)
        name = f"diffusion_model.blocks.0.{layer}"
        file |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        file[f"{name}.alpha"] = torch.tensor(2.0)
        change = 2.0 / rank * f64(up) @ f64(down)
        expected[f"blocks.0.{layer}.weight"] = lambda w, change=change: w + change
    check(file, expected)
    assert [patch.rank for _, patch in wl.match_lora(file, T2V).patches] == [1, 3, 4]


def test_the_alpha_of_lycoris_holds_its_rank_stabilisation():
    """lycoris/modules/locon.py: it scales by alpha / sqrt(rank), and stores alpha * rank / sqrt(rank)."""
    down, up = rand(4, 8), rand(8, 4)
    name = "lycoris_blocks_0_cross_attn_v"
    file = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(3.0 * 4 / 4**0.5),
    }
    change = 3.0 / 4**0.5 * f64(up) @ f64(down)
    metadata = {"ss_network_args": json.dumps({"rs_lora": "True"})}
    check(file, {"blocks.0.cross_attn.v.weight": lambda w: w + change}, metadata=metadata)


def test_rank_stabilised_by_pefts_configuration():
    down, up = rand(4, 8), rand(8, 4)
    name = "transformer.blocks.0.attn2.to_v"
    file = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    change = 3.0 / 4**0.5 * f64(up) @ f64(down)
    config = {"transformer.use_rslora": True, "transformer.lora_alpha": 3}
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    check(file, {"blocks.0.cross_attn.v.weight": lambda w: w + change}, metadata=metadata)


def test_alphas_of_pefts_configuration():
    file, expected = {}, {}
    for layer, wan, alpha in (("attn1.to_q", "self_attn.q", 6.0), ("attn2.to_k", "cross_attn.k", 1.0)):
        down, up = rand(2, 8), rand(8, 2)
        name = f"transformer.blocks.0.{layer}"
        file |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        change = alpha / 2 * f64(up) @ f64(down)
        expected[f"blocks.0.{wan}.weight"] = lambda w, change=change: w + change
    config = {
        "transformer.r": 2,
        "transformer.lora_alpha": 6,
        "transformer.alpha_pattern": {"blocks.0.attn2.to_k": 1},
    }
    check(file, expected, metadata={"lora_adapter_metadata": json.dumps(config)})


def test_loha():
    a1, b1, a2, b2 = rand(12, 2), rand(2, 8), rand(12, 2), rand(2, 8)
    name = "lora_unet_blocks_0_ffn_0"
    file = dict(zip([f"{name}.hada_{r}" for r in ("w1_a", "w1_b", "w2_a", "w2_b")], (a1, b1, a2, b2)))
    file[f"{name}.alpha"] = torch.tensor(1.0)
    change = 0.5 * (f64(a1) @ f64(b1)) * (f64(a2) @ f64(b2))
    check(file, {"blocks.0.ffn.0.weight": lambda w: w + change})


@pytest.mark.parametrize("form", ["whole", "second factorised", "both factorised"])
def test_lokr(form):
    w1, w2 = rand(2, 4), rand(4, 2)
    name = "lycoris_blocks_0_attn1_to_q"
    file, scale = {f"{name}.alpha": torch.tensor(3.0)}, 3.0 / 2
    if form == "both factorised":
        a, b = rand(2, 2), rand(2, 4)
        file |= {f"{name}.lokr_w1_a": a, f"{name}.lokr_w1_b": b}
        w1 = f64(a) @ f64(b)
    else:
        file[f"{name}.lokr_w1"], w1 = w1, f64(w1)
    if form == "whole":
        file[f"{name}.lokr_w2"], w2, scale = w2, f64(w2), 1.0
    else:
        a, b = rand(4, 2), rand(2, 2)
        file |= {f"{name}.lokr_w2_a": a, f"{name}.lokr_w2_b": b}
        w2 = f64(a) @ f64(b)
    check(file, {"blocks.0.self_attn.q.weight": lambda w: w + scale * np.kron(w1, w2)})


@pytest.mark.parametrize("form", ["low rank", "low rank, Tucker", "loha, Tucker", "lokr", "lokr, Tucker"])
def test_convolution(form):
    """patch_embedding is [O, I, 1, 2, 2]; sums are written out index by index."""
    key, name = "patch_embedding.weight", "lora_unet_patch_embedding"
    kernel = (1, 2, 2)
    if form == "low rank":
        down, up = rand(2, 16, *kernel), rand(8, 2, 1, 1, 1)
        file = {"lora_down.weight": down, "lora_up.weight": up}
        change = np.tensordot(f64(up)[:, :, 0, 0, 0], f64(down), 1)
    elif form == "low rank, Tucker":
        down, mid, up = rand(2, 16, 1, 1, 1), rand(2, 2, *kernel), rand(8, 2, 1, 1, 1)
        file = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}
        change = _cores(mid, f64(up)[..., 0, 0, 0].T, f64(down)[..., 0, 0, 0])
    elif form == "loha, Tucker":
        parts = {"w1_a": rand(2, 8), "w1_b": rand(2, 16), "w2_a": rand(2, 8), "w2_b": rand(2, 16)}
        t1, t2 = rand(2, 2, *kernel), rand(2, 2, *kernel)
        file = {f"hada_{k}": v for k, v in parts.items()} | {"hada_t1": t1, "hada_t2": t2}
        p = {k: f64(v) for k, v in parts.items()}
        change = _cores(t1, p["w1_a"], p["w1_b"]) * _cores(t2, p["w2_a"], p["w2_b"])
    else:
        w1, w2 = rand(2, 4), rand(4, 4, *kernel)
        file, w2_64 = {"lokr_w1": w1}, f64(w2)
        if form == "lokr":
            file["lokr_w2"] = w2
        else:
            t, a, b = rand(2, 2, *kernel), rand(2, 4), rand(2, 4)
            file |= {"lokr_t2": t, "lokr_w2_a": a, "lokr_w2_b": b}
            w2_64 = _cores(t, f64(a), f64(b))
        change = np.kron(f64(w1)[:, :, None, None, None], w2_64)
    assert change.shape == (8, 16, *kernel)
    check({f"{name}.{k}": v for k, v in file.items()}, {key: lambda w: w + change})


def _cores(core, a, b):
    """sum over p, q of core[p, q, ...] a[p, o] b[q, i]"""
    core = f64(core)
    out = np.zeros((a.shape[1], b.shape[1], *core.shape[2:]))
    for p in range(core.shape[0]):
        for q in range(core.shape[1]):
            out += a[p][:, None, None, None, None] * b[q][None, :, None, None, None] * core[p, q]
    return out


MAGNITUDES = {
    "PEFT": ("lora_magnitude_vector", (12,), 1),
    "PEFT, adapter name": ("lora_magnitude_vector.default.weight", (12,), 1),
    "LyCORIS, per output": ("dora_scale", (12, 1), 1),
    "LyCORIS, per input": ("dora_scale", (1, 8), 0),
}


@pytest.mark.parametrize("form", MAGNITUDES)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_dora(form, strength):
    role, shape, axis = MAGNITUDES[form]
    down, up, magnitude = rand(2, 8), rand(12, 2), rand(*shape).abs()
    name = "diffusion_model.blocks.0.ffn.0"
    file = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.{role}": magnitude}

    def expected(w):
        whole = w + f64(up) @ f64(down)
        norm = np.sqrt((whole**2).sum(axis=axis, keepdims=True))
        dora = f64(magnitude).reshape(norm.shape) * whole / norm
        return (1 - strength) * w + strength * dora

    check(file, {"blocks.0.ffn.0.weight": expected}, strength)


DIFFERENCES = {
    "diffusion_model.blocks.0.ffn.0.diff": "blocks.0.ffn.0.weight",
    "diffusion_model.blocks.0.ffn.0.diff_b": "blocks.0.ffn.0.bias",
    "diffusion_model.blocks.0.diff_m": "blocks.0.modulation",
    "diffusion_model.head.diff_m": "head.modulation",
    "lora_unet_blocks_0.diff_m": "blocks.0.modulation",
    "lora_unet_head.diff_m": "head.modulation",
    "diffusion_model.blocks.0.modulation.diff": "blocks.0.modulation",
    "blocks.0.scale_shift_table.diff": "blocks.0.modulation",
    "diffusion_model.blocks.1.norm3.diff": "blocks.1.norm3.weight",
    "diffusion_model.blocks.1.norm3.diff_b": "blocks.1.norm3.bias",
    "lora_unet_blocks_1_self_attn_norm_q.w_norm": "blocks.1.self_attn.norm_q.weight",
    "lora_unet_blocks_1_norm3.b_norm": "blocks.1.norm3.bias",
    "transformer.blocks.1.norm2.diff": "blocks.1.norm3.weight",
    "diffusion_model.patch_embedding.diff": "patch_embedding.weight",
    "diffusion_model.head.head.diff_b": "head.head.bias",
}


@pytest.mark.parametrize("key", DIFFERENCES)
def test_differences(key):
    target = DIFFERENCES[key]
    change = rand(*T2V[target])
    check({key: change}, {target: lambda w: w + 0.3 * f64(change)}, strength=0.3)


def test_low_rank_with_bias_and_difference_on_one_layer():
    down, up, bias, diff_b = rand(2, 8), rand(8, 2), rand(8), rand(8)
    name = "base_model.model.blocks.0.self_attn.v"
    file = {
        f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.lora_B.bias": bias,
        f"{name}.diff_b": diff_b, f"{name}.alpha": torch.tensor(4.0),
    }  # fmt: skip
    expected = {
        "blocks.0.self_attn.v.weight": lambda w: w + 2 * f64(up) @ f64(down),
        "blocks.0.self_attn.v.bias": lambda w: w + 2 * f64(bias) + f64(diff_b),
    }
    check(file, expected)


def low_rank(name, rows=8, columns=8, rank=2):
    return {f"{name}.lora_A.weight": rand(rank, columns), f"{name}.lora_B.weight": rand(rows, rank)}


def test_i2v_lora_on_t2v_applies_what_fits_and_says_the_rest():
    image = low_rank("diffusion_model.blocks.0.cross_attn.k_img") | low_rank("diffusion_model.img_emb.proj.1")
    size = {"diffusion_model.patch_embedding.diff": rand(8, 36, 1, 2, 2)}
    lora = wl.match_lora(low_rank("diffusion_model.blocks.0.self_attn.q") | image | size, T2V)
    assert [key for key, _ in lora.patches] == ["blocks.0.self_attn.q.weight"]
    assert lora.unmatched.keys() == image.keys() | size.keys()
    for key in image:
        assert lora.unmatched[key] == "image-branch keys on a model without image branch"
    assert lora.unmatched["diffusion_model.patch_embedding.diff"] == "made for layers of another size"


def test_t2v_lora_on_i2v_applies_in_whole_except_the_patch_embedding():
    file = low_rank("blocks.1.cross_attn.k") | {"patch_embedding.diff": rand(8, 16, 1, 2, 2)}
    lora = wl.match_lora(file, I2V)
    assert [key for key, _ in lora.patches] == ["blocks.1.cross_attn.k.weight"]
    assert list(lora.unmatched) == ["patch_embedding.diff"]


@pytest.mark.parametrize(
    "file, reason",
    [
        (low_rank("diffusion_model.blocks.7.self_attn.q"), "blocks past the model's 2"),
        (low_rank("lora_te1_text_model_encoder_layers_0_mlp_fc1"), "text-encoder keys"),
        (low_rank("diffusion_model.vace_blocks.0.before_proj"), "no such layer"),
        (low_rank("diffusion_model.blocks.0.self_attn.q", rows=9), "another size"),
        (low_rank("diffusion_model.blocks.0.self_attn.q", columns=9), "another size"),
        ({"blocks.0.self_attn.q.lora_A.weight": rand(2, 8)}, "incomplete"),
        ({"blocks.0.self_attn.q.lora_B.weight": rand(8, 2)}, "incomplete"),
        ({"blocks.0.self_attn.q.alpha": torch.tensor(1.0)}, "factors that belong to it are missing"),
        ({"blocks.0.self_attn.q.hada_w1_a": rand(8, 2)}, "incomplete"),
        ({"blocks.0.self_attn.q.lokr_w1": rand(2, 2)}, "incomplete"),
        ({"blocks.0.self_attn.q.weight": rand(8, 8)}, "not a tensor of a LoRA"),
        ({"blocks.0.self_attn.q.reshape_weight": torch.tensor([8, 8])}, "not a tensor of a LoRA"),
        ({"blocks.0.norm3.diff": rand(9)}, "another size"),
        (low_rank("blocks.0.self_attn.q", rank=0), "its factors are empty (rank 0)"),
        (low_rank("blocks.0.self_attn.q") | {"blocks.0.self_attn.q.lora_A.weight": rand(0)}, "(rank 0)"),
        ({"blocks.0.norm3.diff": torch.zeros(8, dtype=torch.complex64)}, "stored as complex"),
        ({"blocks.0.norm3.diff": torch.zeros(8, dtype=torch.int64)}, "stored as int64"),
        ({"blocks.0.norm3.diff": torch.zeros(8, dtype=torch.bool)}, "stored as bool"),
    ],
)
def test_keys_that_do_not_fit_are_listed_with_the_reason(file, reason):
    lora = wl.match_lora(file | low_rank("blocks.0.self_attn.v"), T2V)
    assert [key for key, _ in lora.patches] == ["blocks.0.self_attn.v.weight"]
    assert lora.unmatched.keys() == file.keys()
    assert all(reason in why for why in lora.unmatched.values())


def test_a_misfit_magnitude_takes_its_layer_out():
    file = low_rank("blocks.0.self_attn.q") | {"blocks.0.self_attn.q.dora_scale": rand(5, 1)}
    lora = wl.match_lora(file, T2V)
    assert lora.patches == []
    assert lora.unmatched.keys() == file.keys()
    assert all("DoRA magnitude (5, 1) does not fit" in why for why in lora.unmatched.values())


def test_two_spellings_of_one_layer_are_used_once():
    first, second = (
        low_rank("diffusion_model.blocks.0.self_attn.q"),
        low_rank("transformer.blocks.0.attn1.to_q"),
    )
    lora = wl.match_lora(first | second, T2V)
    assert lora.matched == list(first)
    assert all("the same as diffusion_model." in why for why in lora.unmatched.values())


def test_a_file_that_is_no_lora_is_named():
    with pytest.raises(
        ValueError, match=r"not a LoRA\. It is a Wan2.1 diffusion model; load it as a diffusion model"
    ):
        wl.match_lora({k: torch.empty(s, device="meta") for k, s in T2V.items()}, T2V)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool])
def test_a_lora_of_numbers_that_none_is_stored_in_is_named(dtype):
    file = {key: value.to(dtype) for key, value in low_rank(Q, rank=2).items()}
    with pytest.raises(ValueError, match=rf"its factors are stored as {str(dtype)[6:]}, .*Pick a LoRA in"):
        wl.match_lora(file, T2V)


def test_files_stored_in_half_precision_and_fp8():
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        down, up = rand(2, 8).to(dtype), rand(8, 2).to(dtype)
        file = {"blocks.0.self_attn.q.lora_A.weight": down, "blocks.0.self_attn.q.lora_B.weight": up}
        change = f64(up.float()) @ f64(down.float())
        check(file, {"blocks.0.self_attn.q.weight": lambda w, change=change: w + change})


def peft(**config):
    return {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}


Q = "diffusion_model.blocks.0.self_attn.q"
SPOILT = {
    "no alpha in it": ({f"{Q}.alpha": rand(0)}, {}, r"the alpha of blocks\.0\.self_attn\.q holds 0 numbers"),
    "two alphas": ({f"{Q}.alpha": rand(2)}, {}, "holds 2 numbers and must be one"),
    "alpha NaN": ({f"{Q}.alpha": torch.tensor(math.nan)}, {}, "alpha holds numbers that are NaN or infinite"),
    "alpha infinite": ({f"{Q}.alpha": torch.tensor(-math.inf)}, {}, "alpha holds numbers that are NaN or"),
    "alpha vast": ({f"{Q}.alpha": torch.tensor(1e38)}, {}, r"or above 1e\+09"),
    "alpha too strong": ({f"{Q}.alpha": torch.tensor(1e8)}, {}, r"makes it 5e\+07 times as strong; up to"),
    "alpha complex": ({f"{Q}.alpha": torch.tensor(1j)}, {}, "is a complex, not a number"),
    "alpha a truth": ({f"{Q}.alpha": torch.tensor(True)}, {}, "is a bool, not a number"),
    "a factor NaN": ({f"{Q}.lora_B.weight": torch.full((8, 2), math.nan)}, {}, "lora_B.weight holds numbers"),
    "a factor vast": ({f"{Q}.lora_B.weight": torch.full((8, 2), 1e30)}, {}, r"or above 1e\+09"),
    "metadata nested": (
        {},
        {"lora_adapter_metadata": "[" * 100_000},
        "metadata` in its metadata is no JSON",
    ),
    "metadata a list": ({}, {"lora_adapter_metadata": "[1]"}, "must be a JSON table"),
    "alpha in words": ({}, peft(lora_alpha="16"), "lora_alpha in its metadata is a str, not a number"),
    "alpha a list": ({}, peft(lora_alpha=[16]), "lora_alpha in its metadata is a list"),
    "alpha a table": ({}, peft(lora_alpha={"a": 1}), "lora_alpha in its metadata is a dict"),
    "alpha of 500 digits": ({}, peft(lora_alpha=10**500), "makes it inf times as strong"),
    "alpha beyond JSON": (
        {},
        {"lora_adapter_metadata": '{"lora_alpha": NaN}'},
        "makes it nan times",
    ),
    "patterns a list": (
        {},
        peft(alpha_pattern=["blocks"]),
        "alpha_pattern in its metadata is a list",
    ),
    "a pattern's alpha": (
        {},
        peft(alpha_pattern={"attn1.to_q": None, "a": "b"}),
        "the alpha of a in its",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_strength_that_is_none_is_named(case):
    changes, metadata, words = SPOILT[case]
    with pytest.raises(ValueError, match=words):
        wl.match_lora(low_rank(Q, rank=2) | changes, T2V, metadata)


@pytest.mark.parametrize("pattern", ["", ".", "x" * 100_000, "(" * 1000, "blocks.0.self_attn.k"])
def test_patterns_that_mean_no_layer_change_nothing(pattern):
    [(_, patch)] = wl.match_lora(low_rank(Q, rank=2), T2V, peft(alpha_pattern={pattern: 7})).patches
    assert patch.scale == 1


def test_of_two_patterns_the_first_holds():
    named = {"to_q": 6, "blocks.0.attn1.to_q": 8, "q": 10}
    for patterns in (named, dict(reversed(named.items()))):
        [(_, patch)] = wl.match_lora(low_rank(Q, rank=2), T2V, peft(alpha_pattern=patterns)).patches
        assert patch.scale == {"to_q": 4, "q": 5}[next(iter(patterns))]


def test_many_keys_and_patterns_take_no_time():
    """They had been compared each with each."""
    file = {f"blocks.{i}.self_attn.q.diff_b": torch.zeros(1) for i in range(20_000)} | low_rank(Q, rank=2)
    patterns = {f"blocks.{i}.attn1.to_q": 4 for i in range(20_000)}
    began = time.process_time()
    lora = wl.match_lora(file, T2V, peft(alpha_pattern=patterns))
    assert lora.patches[-1][1].scale == 2 and time.process_time() - began < 10


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint32, torch.uint8, torch.float64])
def test_an_alpha_may_be_of_any_numbers(dtype):
    file = low_rank(Q, rank=2) | {f"{Q}.alpha": torch.ones((), dtype=torch.uint8).to(dtype)}
    [(_, patch)] = wl.match_lora(file, T2V).patches
    assert patch.scale == 0.5
