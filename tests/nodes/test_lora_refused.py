"""Wan21LoraLoader refuses, with the true reason and before a run, what would change nothing or spoil all."""

import logging

import comfy.sd
import pytest
import torch
from helpers import relative
from helpers_nodes import host_euler
from safetensors.torch import save_file
from test_gguf import pair  # noqa: F401 (fixtures)
from test_lora import load, loras, low_rank  # noqa: F401 (fixtures)
from wan21 import host

from nodes import LoraLoaderModelOnly

BLOCK = "diffusion_model.blocks.0.self_attn.q"


def broken(number):
    file = low_rank(BLOCK)
    file[f"{BLOCK}.lora_A.weight"][1, 2] = number
    return file


@pytest.mark.parametrize(
    "file, message",
    [
        ({f"{BLOCK}.oft_blocks": torch.zeros(4, 64, 64)}, "OFT or BOFT.*LoraLoaderModelOnly"),
        ({f"{BLOCK}.oft_blocks": torch.zeros(2, 4, 64, 64)}, "OFT or BOFT.*LoraLoaderModelOnly"),
        (
            {f"{BLOCK}.{n}.weight": torch.zeros(4, 4) for n in ("a1", "a2", "b1", "b2")},
            "GLoRA.*LoraLoaderMod",
        ),
        ({f"{BLOCK}.set_weight": torch.zeros(256, 256)}, "whole weights.*LoraLoaderModelOnly"),
        # What the host's loader would pass over in silence is not sent there.
        ({f"{BLOCK}.oft_diag": torch.zeros(4, 64, 64)}, "OFT or BOFT.*another kind"),
        ({"lycoris_blocks_0_self_attn_q.oft_blocks": torch.zeros(4, 64, 64)}, "OFT or BOFT.*another kind"),
        ({f"{BLOCK}.oft_R.weight": torch.zeros(8, 496)}, "OFT .PEFT.*another kind"),
        ({f"{BLOCK}.vera_lambda_b": torch.zeros(256)}, "VeRA.*another kind"),
        (broken(float("nan")), r"self_attn\.q\.lora_A\.weight holds numbers that are NaN"),
        (broken(float("inf")), r"self_attn\.q\.lora_A\.weight holds numbers that are NaN or infinite"),
        ({f"{BLOCK}.lora_B.weight": torch.zeros(256, 4)}, r"factors are incomplete.*\. Download it again"),
        (low_rank(BLOCK, 512, 512) | low_rank("diffusion_model.img_emb.proj.3", 256, 1280), "another size"),
    ],
)
def test_refused_with_the_true_reason(models, loras, file, message):  # noqa: F811
    save_file(file, loras / "bad.safetensors")
    with pytest.raises(ValueError, match=r"^Wan21LoraLoader: bad\.safetensors: .*" + message):
        load(models["i2v"], "bad.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "_orig_mod.blocks.0.self_attn.q",
        "diffusion_model._orig_mod.blocks.0.self_attn.q",
        "diffusion_model.blocks.0.self_attn_q",
        "lora_unet_blocks.0.self_attn.q",
        "transformer.blocks_0.attn1.to_q",
        "transformer_2.blocks.0.attn1.to_q",
        "generator.model.blocks.0.self_attn.q",
        "module.net.blocks.0.self_attn.q",
    ],
)
def test_names_of_compiled_modules_and_half_dotted_ones(models, loras, name):  # noqa: F811
    save_file(low_rank(name), loras / "named.safetensors")
    assert "applied: 2 of 2 keys" in load(models["t2v"], "named.safetensors", strict=True)[1]


def test_what_is_left_out_is_said_and_logged_key_by_key(models, loras, caplog):  # noqa: F811
    save_file(low_rank(BLOCK) | low_rank("diffusion_model.blocks.9.self_attn.q"), loras / "part.safetensors")
    with caplog.at_level(logging.INFO):
        load(models["t2v"], "part.safetensors")
    assert "part.safetensors: left out 2 keys, blocks past the model's" in caplog.text
    for end in ("lora_A", "lora_B"):
        assert f"lora key not loaded: diffusion_model.blocks.9.self_attn.q.{end}.weight" in caplog.text


def test_packed_weights_are_neither_saved_nor_changed_in_place(pair):  # noqa: F811
    model = host.load_model(pair[0])
    # The host runs its nodes so.
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match=r"packed as in its GGUF file.*Save from a safetensors"),
    ):
        model.state_dict_for_saving()
    layer = next(x for x in model.model.diffusion_model.modules() if getattr(x, "packed", None))
    unpacked = layer.convert_weight(layer.weight)
    with pytest.raises(ValueError, match=r"hooks carry a LoRA.*strength_schedule"):
        layer.set_weight(unpacked, inplace_update=True)


def test_a_model_packed_by_another_pack_is_named(files, loras):  # noqa: F811
    model = host.load_model(files["t2v"])
    layer = model.model.diffusion_model.blocks[0].self_attn.q
    layer.weight = torch.nn.Parameter(torch.zeros(256, 136, dtype=torch.uint8), requires_grad=False)
    save_file(low_rank(BLOCK), loras / "plain.safetensors")
    with pytest.raises(ValueError, match=r"GGUF weights in another pack's form.*LoraLoaderModelOnly"):
        load(model, "plain.safetensors")


@pytest.mark.parametrize("dtype", ["bf16", "fp8_e4m3fn"])
@pytest.mark.parametrize("kind", ["oft", "boft", "glora", "set_weight"])
def test_the_hosts_loader_does_what_the_refusal_says(files, prompts, loras, kind, dtype):  # noqa: F811
    """As on the host's own model, and beside a LoRA of ours."""
    g = torch.Generator().manual_seed(3)
    tensors = {
        "oft": {"oft_blocks": (8, 32, 32)},
        "boft": {"oft_blocks": (3, 8, 32, 32)},
        "glora": {"a1.weight": (4, 256), "a2.weight": (256, 4), "b1.weight": (4, 256), "b2.weight": (256, 4)},
        "set_weight": {"set_weight": (256, 256)},
    }[kind]
    scale = 1 / 16 if kind == "set_weight" else 0.3
    file = {f"{BLOCK}.{name}": scale * torch.randn(shape, generator=g) for name, shape in tensors.items()}
    if kind == "boft":  # the host's needs its alpha, which LyCORIS writes always
        file[f"{BLOCK}.alpha"] = torch.tensor(50.0)
    save_file(file, loras / "odd.safetensors")
    save_file(low_rank("diffusion_model.blocks.1.ffn.0", 512), loras / "low.safetensors")
    stored = {"bf16": torch.bfloat16, "fp8_e4m3fn": torch.float8_e4m3fn}[dtype]
    native = comfy.sd.load_diffusion_model(str(files["t2v"]), model_options={"dtype": stored})
    ours = host.load_model(files["t2v"], dtype)
    latent = {"samples": torch.zeros(1, 16, 2, 4, 4)}

    def effect(model):
        patched = LoraLoaderModelOnly().load_lora_model_only(model, "odd.safetensors", 1.0)[0]
        runs = (host_euler(m, *prompts, latent, [1.0, 0.5, 0.0], 3.0, 5) for m in (patched, model))
        return torch.sub(*runs)

    assert relative(effect(ours), effect(native)) < 0.25
    beside = effect(load(ours, "low.safetensors")[0])
    assert relative(beside, effect(ours)) < 0.5
