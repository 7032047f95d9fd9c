"""Tables of the kinds of files that people have, and the graphs that read each sort of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..random_checkpoints import I2V, TEXT_ENCODER, VAE
from . import layouts as to
from .checkpoints import FAMILIES, LORA
from .graphs import FRAMES, HEIGHT, WIDTH, base, host_sampled, node, our_lora


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        write: one of `layouts`.
        ending: of the file's name.
        folder: below `models`, where it is not its sort's.
        from_text: whether the model takes no image.
    """

    write: Callable
    ending: str = ".safetensors"
    folder: str | None = None
    from_text: bool = False


@dataclass(frozen=True)
class Sort:
    """One sort of files, which one loader reads.

    Attributes:
        about: how it is tried.
        folder: below `models`.
        plain: name of a file in it, whose weights the kinds are written from.
        kinds: by their names in words.
        graph: ("native" or "ours", file name, `Kind`) -> (graph, link to what is compared).
        pictures: whether that is frames in [0, 1].
        is_patch: whether the file changes a model, and may change nothing.
    """

    about: str
    folder: str
    plain: str
    kinds: Mapping[str, Kind]
    graph: Callable
    pictures: bool = False
    is_patch: bool = False


def _model(which, file, kind):
    graph = base(which, file)
    if kind.folder == "checkpoints" and which == "native":
        graph["model"] = node("CheckpointLoaderSimple", ckpt_name=file)
    if not kind.from_text:
        return host_sampled(graph, ["model", 0]), ["sampled", 0]
    size = {"width": WIDTH, "height": HEIGHT, "length": FRAMES}
    graph["empty"] = node("EmptyHunyuanLatentVideo", batch_size=1, **size)
    texts = (["positive", 0], ["negative", 0])
    return host_sampled(graph, ["model", 0], texts, ["empty", 0]), ["sampled", 0]


def _vae(which, file, _):
    native = which == "native"
    graph = {
        "vae": node("VAELoader", vae_name=file)
        if native
        else node("Wan21VAELoader", vae_name=file, precision="auto"),
        "pictures": node("ProbePictures", width=WIDTH, height=HEIGHT, frames=9, seed=0),
        "encoded": node("VAEEncode", pixels=["pictures", 0], vae=["vae", 0]),
        "decoded": node("VAEDecode", samples=["encoded", 0], vae=["vae", 0]),
    }
    return graph, ["decoded", 0]


def _text(which, file, _):
    ours = node("Wan21TextEncoderLoader", text_encoder_name=file, device="default")
    graph = {
        "clip": node("ProbeCLIPLoader", clip_name=file) if which == "native" else ours,
        "text": node("CLIPTextEncode", text="a cat walks through the grass", clip=["clip", 0]),
    }
    return graph, ["text", 0]


def _lora(which, file, _):
    theirs = node("LoraLoaderModelOnly", model=["model", 0], lora_name=file, strength_model=0.7)
    lora = theirs if which == "native" else our_lora(["model", 0], file, 0.7)
    return host_sampled(base(which) | {"lora": lora}, ["lora", 0]), ["sampled", 0]


QUANTISED = ("float8_e4m3fn", "float8_e5m2", "nvfp4", "mxfp8", "int8_tensorwise", "convrot_w4a4")
PACKED = (
    "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K",
)  # fmt: skip
FROM_TEXT = ("t2v-low", "causal-forcing", "5b", "vace", "s2v")

MODELS = {
    "float32": Kind(to.plain),
    "float16": Kind(to.cast("float16")),
    "bfloat16": Kind(to.cast("bfloat16")),
    "float8_e4m3fn, matrices, no scale": Kind(to.cast("float8_e4m3fn", matrices_only=True)),
    "float8_e5m2, matrices, no scale": Kind(to.cast("float8_e5m2", matrices_only=True)),
    "float8_e4m3fn, scaled (scaled_fp8)": Kind(to.scaled_fp8),
    **{f"{name} (comfy_quant)": Kind(to.quantised(name)) for name in QUANTISED},
    **{f"GGUF {name}": Kind(to.gguf_dit(name), ".gguf") for name in PACKED},
    "keys below diffusion_model.": Kind(to.prefixed("diffusion_model.")),
    "keys below model.diffusion_model.": Kind(to.prefixed("model.diffusion_model.")),
    "keys below model.model.": Kind(to.prefixed("model.model.")),
    "keys below net.": Kind(to.prefixed("net.")),
    "diffusers' keys": Kind(to.diffusers_dit),
    "two shards, diffusers' names": Kind(to.sharded, "-00001-of-00002.safetensors"),
    "all in one, in checkpoints": Kind(
        to.all_in_one({"vae": VAE, "text_encoders": TEXT_ENCODER}), folder="checkpoints"
    ),
    "extra keys": Kind(to.with_extra_keys),
    "a key missing": Kind(to.without_a_key),
    "half of the file": Kind(to.truncated),
    "a pickle (.pt)": Kind(to.pickled, ".pt"),
    **{f"family {name}": Kind(to.family(name), from_text=name in FROM_TEXT) for name in FAMILIES},
    "a VAE in this loader": Kind(to.other("vae", VAE)),
    "a text encoder in this loader": Kind(to.other("text_encoders", TEXT_ENCODER)),
    "a LoRA in this loader": Kind(to.other("loras", LORA)),
}
VAES = {
    "float32": Kind(to.plain),
    "float16": Kind(to.cast("float16")),
    "bfloat16": Kind(to.cast("bfloat16")),
    "keys below first_stage_model.": Kind(to.prefixed("first_stage_model.")),
    "keys below vae.": Kind(to.prefixed("vae.")),
    "extra key": Kind(to.with_extra_keys),
    "a key missing": Kind(to.without_a_key),
    "a pickle (.pth)": Kind(to.pickled, ".pth"),
    "the Wan2.2 VAE": Kind(
        to.of_module(
            "comfy.ldm.wan.vae2_2", "WanVAE",
            {"dim": 16, "z_dim": 48, "num_res_blocks": 2, "attn_scales": [],
             "temperal_downsample": [False, True, True]},
        )
    ),
    "TAEHV, a preview decoder": Kind(to.of_module("comfy.taesd.taehv", "TAEHV", {"latent_channels": 16})),
    "a VAE of SD or Flux": Kind(
        to.keys(("decoder.up.0.block.0.norm1.weight", (8,)), ("decoder.conv_in.weight", (8, 4, 3, 3)))
    ),
    "a diffusion model in this loader": Kind(to.other("diffusion_models", I2V)),
}  # fmt: skip
TEXT_ENCODERS = {
    "float32": Kind(to.plain),
    "float16": Kind(to.cast("float16")),
    "bfloat16": Kind(to.cast("bfloat16")),
    "float8_e4m3fn, scaled (scaled_fp8)": Kind(to.scaled_fp8),
    "GGUF Q8_0": Kind(to.gguf_umt5, ".gguf"),
    "keys below text_encoders.umt5xxl.transformer.": Kind(to.prefixed("text_encoders.umt5xxl.transformer.")),
    "the tokenizer missing": Kind(to.without("spiece_model")),
    "a key missing": Kind(to.without_a_key),
    "a plain T5": Kind(
        to.keys(
            ("encoder.block.0.layer.0.SelfAttention.q.weight", (8, 8)),
            ("encoder.block.1.layer.0.SelfAttention.q.weight", (8, 8)),
        )
    ),
    "CLIP": Kind(to.keys(("text_model.encoder.layers.0.self_attn.k_proj.weight", (8, 8)))),
    "a language model": Kind(to.keys(("model.layers.0.self_attn.q_proj.weight", (8, 8)))),
    "a diffusion model in this loader": Kind(to.other("diffusion_models", I2V)),
}
KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": True}


def _under(layer: str) -> str:
    return layer.replace(".", "_")


LORAS = {
    "ComfyUI": Kind(to.plain),
    "ComfyUI, kohya's factors and alpha": Kind(to.dialect(lambda x: f"diffusion_model.{x}", **KOHYA)),
    "Wan's own names": Kind(to.dialect(str)),
    "diffusers": Kind(to.dialect(lambda x: f"transformer.{to.diffusers_layer(x)}")),
    "diffusers, bare": Kind(to.dialect(to.diffusers_layer)),
    "PEFT": Kind(to.dialect(lambda x: f"base_model.model.{x}")),
    "DiffSynth": Kind(
        to.dialect(lambda x: f"pipe.dit.{x}", "lora_A.default.weight", "lora_B.default.weight")
    ),
    "kohya, musubi": Kind(to.dialect(lambda x: f"lora_unet_{_under(x)}", **KOHYA)),
    "Wan2.1-Fun": Kind(to.dialect(lambda x: f"lora_unet__{_under(x)}", **KOHYA)),
    "SimpleTuner": Kind(to.dialect(lambda x: f"lycoris_{_under(to.diffusers_layer(x))}", **KOHYA)),
    "names of a compiled model": Kind(to.dialect(lambda x: f"diffusion_model._orig_mod.{x}")),
    "float16": Kind(to.cast("float16")),
    "bfloat16": Kind(to.cast("bfloat16")),
    "DoRA": Kind(
        to.with_layers(
            lambda r, c, randn: {
                "lora_A.weight": randn(4, c) / c**0.5, "lora_B.weight": 0.1 * randn(r, 4),
                "dora_scale": 1 + 0.1 * randn(r, 1).abs(),
            }
        )
    ),
    "LoHa": Kind(
        to.with_layers(
            lambda r, c, randn: {
                "hada_w1_a": randn(r, 4), "hada_w1_b": randn(4, c), "hada_w2_a": 0.1 * randn(r, 4),
                "hada_w2_b": 0.1 * randn(4, c),
            }
        )
    ),
    "LoKr": Kind(
        to.with_layers(
            lambda r, c, randn: {"lokr_w1": randn(4, 4), "lokr_w2": 0.02 * randn(r // 4, c // 4)}
        )
    ),
    "whole differences": Kind(
        to.with_layers(lambda r, c, randn: {"diff": 0.02 * randn(r, c), "diff_b": 0.1 * randn(r)})
    ),
    "OFT": Kind(to.with_layers(lambda r, c, randn: {"oft_blocks": 0.1 * randn(4, r // 4, r // 4)})),
    "BOFT": Kind(to.with_layers(lambda r, c, randn: {"oft_blocks": 0.1 * randn(2, 4, r // 4, r // 4)})),
    "GLoRA": Kind(
        to.with_layers(
            lambda r, c, randn: {
                "a1.weight": 0.1 * randn(4, c), "a2.weight": 0.1 * randn(c, 4),
                "b1.weight": 0.1 * randn(4, c), "b2.weight": 0.1 * randn(r, 4),
            }
        )
    ),
    "some keys of no layer": Kind(to.with_strange_keys),
    "a model of another size": Kind(
        to.with_layers(
            lambda r, c, randn: {"lora_A.weight": randn(4, 3 * c), "lora_B.weight": randn(3 * r, 4)}
        )
    ),
    "NaN in it": Kind(to.with_nan),
    "a diffusion model in this loader": Kind(to.other("diffusion_models", I2V)),
}  # fmt: skip

SORTS = {
    "diffusion models": Sort(
        "Each file is read by Load Diffusion Model (one in `checkpoints` by Load Checkpoint) and by "
        "Wan21ModelLoader, and sampled with the host's KSampler.",
        "diffusion_models", I2V, MODELS, _model,
    ),
    "VAEs": Sort(
        "Each file is read by Load VAE and by Wan21VAELoader; nine frames are encoded and decoded.",
        "vae", VAE, VAES, _vae, pictures=True,
    ),
    "text encoders": Sort(
        "Each file is read by the host's own umT5 class (its Load CLIP takes umT5-XXL alone, which has no "
        "small size) and by Wan21TextEncoderLoader; one prompt is encoded.",
        "text_encoders", TEXT_ENCODER, TEXT_ENCODERS, _text,
    ),
    "LoRAs": Sort(
        "Each file, on every matrix of the blocks, is read by LoraLoaderModelOnly on the native MODEL and by "
        "Wan21LoraLoader on ours, at strength 0.7, and sampled with the host's KSampler.",
        "loras", LORA, LORAS, _lora, is_patch=True,
    ),
}  # fmt: skip
