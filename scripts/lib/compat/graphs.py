"""A small image-to-video graph around whatever node is tried, and inputs for it by their types."""

from ..random_checkpoints import I2V, TEXT_ENCODER, VAE
from .checkpoints import LORA, SECOND

STEPS, CFG, SEED, SHIFT = 4, 3.0, 3, 5.0
WIDTH, HEIGHT, FRAMES = 64, 48, 17


class Missing(Exception):
    """The graph has nothing for a required input."""


def node(class_type, **inputs):
    """A node of an API graph."""
    return {"class_type": class_type, "inputs": inputs}


def loader(kind, name):
    """The node that loads a diffusion model, natively or with ours."""
    if kind == "native":
        return node("UNETLoader", unet_name=name, weight_dtype="default")
    return node("Wan21ModelLoader", model_name=name, weight_dtype="default")


def our_lora(model, name, strength):
    """Our LoRA loader behind a link to a MODEL."""
    return node(
        "Wan21LoraLoader", model=model, lora_name=name, strength=strength, strength_schedule="", lora_url="",
        strict=False,
    )  # fmt: skip


def base(kind, model=I2V):
    """Everything up to the conditioning and the empty latent; only the MODELs are native or ours.

    Args:
        kind: "native" or "ours".
        model: name of a file in `diffusion_models`.
    """
    text = {"clip": ["clip", 0]}
    return {
        "model": loader(kind, model),
        "model2": loader(kind, SECOND),
        "clip": node("ProbeCLIPLoader", clip_name=TEXT_ENCODER),
        "vae": node("VAELoader", vae_name=VAE),
        "positive": node("CLIPTextEncode", text="a cat walks through the grass", **text),
        "negative": node("CLIPTextEncode", text="blurry, static", **text),
        "pictures": node("ProbePictures", width=WIDTH, height=HEIGHT, frames=1, seed=0),
        "vision": node("ProbeCLIPVision", image=["pictures", 0]),
        "start": node(
            "WanImageToVideo", positive=["positive", 0], negative=["negative", 0], vae=["vae", 0],
            start_image=["pictures", 0], clip_vision_output=["vision", 0], width=WIDTH, height=HEIGHT,
            length=FRAMES, batch_size=1,
        ),
        "sigmas": node("ManualSigmas", sigmas=", ".join(map(str, our_sigmas()))),
        "sampler": node("KSamplerSelect", sampler_name="euler"),
        "noise": node("RandomNoise", noise_seed=SEED),
        "operation": node("LatentOperationTonemapReinhard", multiplier=0.5),
        "talk": node("ProbeModelPatch", kind="InfiniteTalk"),
        "uni3c": node("ProbeModelPatch", kind="Uni3C"),
        "speech": node("ProbeSpeech"),
        "zeroed": node("ConditioningZeroOut", conditioning=["start", 0]),
        "masked": node("SetLatentNoiseMask", samples=["start", 2], mask=["pictures", 1]),
        "difference": node("ModelMergeSubtract", model1=["model", 0], model2=["model2", 0], multiplier=1.0),
        "with_lora": node("LoraLoaderModelOnly", model=["model", 0], lora_name=LORA, strength_model=0.7),
    }  # fmt: skip


# Links of `base` by type; MODEL and CONDITIONING by their order.
LINKS = {
    "CLIP": ["clip", 0], "VAE": ["vae", 0], "LATENT": ["start", 2], "IMAGE": ["pictures", 0],
    "MASK": ["pictures", 1], "CLIP_VISION_OUTPUT": ["vision", 0], "SIGMAS": ["sigmas", 0],
    "SAMPLER": ["sampler", 0], "NOISE": ["noise", 0], "LATENT_OPERATION": ["operation", 0],
    "AUDIO_ENCODER_OUTPUT": ["speech", 0],
}  # fmt: skip
# Values by the input's name where the default is neutral, or made for a larger model or a longer video.
VALUES = {
    "lora_name": LORA, "double_layers": "0", "single_layers": "0", "layers": "0", "blocks": "0",
    "context_length": 9, "context_overlap": 4, "reuse_threshold": 3.0, "width": WIDTH, "height": HEIGHT,
    "length": FRAMES, "num_frames": FRAMES, "steps": STEPS, "cfg": CFG, "filename_prefix": "saved", "rank": 4,
}  # fmt: skip
# Files that a loader is given, the first that it lists.
GGUF, WHOLE = "compat-loaded.gguf", "compat-loaded-whole.safetensors"
FILES = (I2V, VAE, GGUF, WHOLE)
# Nodes that need another one before them.
BEFORE = {"SkipLayerGuidanceWanVideo": "WanVideoTeaCacheKJ"}
# Nodes that act on a part of a latent.
WITH_MASK = ("DifferentialDiffusion",)
# The same for one node; links too.
OF_NODE = {
    "UNetSelfAttentionMultiply": {"q": 1.3, "v": 0.8},
    "UNetCrossAttentionMultiply": {"q": 1.3, "v": 0.8},
    "UNetTemporalAttentionMultiply": {"self_structural": 1.3, "cross_temporal": 0.8},
    "ScaleROPE": {"scale_t": 1.5, "shift_x": 1.0},
    "CFGOverride": {"cfg": 1.5},
    "ModelNoiseScale": {"noise_scale": 1.2},
    "ModelComputeDtype": {"dtype": "bf16"},
    "EasyCache": {"start_percent": 0.0, "end_percent": 1.0},
    "LazyCache": {"start_percent": 0.0, "end_percent": 1.0},
    "ContextWindowsManual": {"context_length": 3, "context_overlap": 1, "dim": 2},
    "FreSca": {"freq_cutoff": 2},
    "DualModelGuider": {"negative": ["start", 1]},
    "LoraSave": {"model_diff": ["difference", 0]},
    "ModelSave": {"model": ["with_lora", 0]},
    "CheckpointSave": {"model": ["with_lora", 0]},
    "WanVideoTeaCacheKJ": {"rel_l1_thresh": 10.0, "start_percent": 0.0, "end_percent": 1.0},
    "WanInfiniteTalkToVideo": {"model_patch": ["talk", 0], "start_image": ["pictures", 0]},
    "WanUni3CControlnetApply": {"model_patch": ["uni3c", 0]},
    "DiTBlockLoraLoader": {"lora_name": LORA},
    "LatentInpaintTTM": {"mask": ["pictures", 1]},
    "HunyuanVideoEncodeKeyframesToCond": {"negative": ["start", 1]},
    "SkipLayerGuidanceWanVideo": {"blocks": "0", "model": ["before", 0]},
}


def our_sigmas():
    """The noise levels that Wan21Sampler walks for these settings."""
    from ..pack import load_pack

    load_pack()
    from wan21.wan.sigmas import flow_sigmas

    return flow_sigmas(STEPS, SHIFT, "euler")


def specs(info):
    """(name, type, options, whether it is required) of every input of a node."""
    for group in ("required", "optional"):
        for name, (kind, *options) in info["input"].get(group, {}).items():
            yield name, kind, (options[0] if options else {}), group == "required"


def inputs_for(info):
    """Inputs of a node: links into `base`, its defaults, or the values above.

    Raises:
        Missing: a required input is of a type that the graph does not hold.
    """
    inputs, models = {}, iter((["model", 0], ["model2", 0]))
    own = OF_NODE.get(info["name"], {})
    for name, kind, options, required in specs(info):
        kinds = kind.split(",") if isinstance(kind, str) else ["COMBO"]
        if name in own:
            inputs[name] = own[name]
        elif "MODEL" in kinds:
            inputs[name] = next(models)
        elif not required:
            continue
        elif "CONDITIONING" in kinds:
            inputs[name] = ["zeroed", 0] if "empty" in name else ["start", int("negative" in name)]
        elif link := next((LINKS[k] for k in kinds if k in LINKS), None):
            inputs[name] = link
        else:
            inputs |= _widget(info, name, kind, options)
    return inputs


def _widget(info, name, kind, options):
    if isinstance(kind, list) or kind == "COMBO":
        choices = kind if isinstance(kind, list) else options.get("options", [])
        if not choices:
            raise Missing(f"no file for {name}")
        wanted = (VALUES.get(name), *FILES, options.get("default"), choices[0])
        return {name: next(value for value in wanted if value in choices)}
    if kind == "COMFY_DYNAMICCOMBO_V3":
        return {name: options["options"][0]["key"]}
    if name in VALUES:
        return {name: VALUES[name]}
    if info["name"].startswith("ModelMerge") and kind == "FLOAT" and options.get("max") == 1.0:
        return {name: 0.5}
    if kind in ("INT", "FLOAT", "BOOLEAN", "STRING") or "default" in options:
        return {name: options.get("default", {"STRING": "", "BOOLEAN": False}.get(kind, 0))}
    raise Missing(f"needs {kind}")


STARTED = (["start", 0], ["start", 1])


def host_sampled(graph, model, conditioning=STARTED, latent=("start", 2)):
    """The graph with the host's KSampler at its end, as node "sampled".

    Args:
        model, latent: links.
        conditioning: links to the positive and the negative one.
    """
    positive, negative = conditioning
    return graph | {
        "sampled": node(
            "KSampler", model=model, seed=SEED, steps=STEPS, cfg=CFG, sampler_name="euler",
            scheduler="simple", positive=positive, negative=negative, latent_image=list(latent), denoise=1.0,
        )
    }  # fmt: skip


def sampled_over_our_sigmas(graph, model, conditioning=STARTED, latent=("start", 2)):
    """The same with the host's Euler over the noise levels of Wan21Sampler."""
    positive, negative = conditioning
    return graph | {
        "sampled": node(
            "SamplerCustom", model=model, add_noise=True, noise_seed=SEED, cfg=CFG, positive=positive,
            negative=negative, sampler=["sampler", 0], sigmas=["sigmas", 0], latent_image=list(latent),
        )
    }  # fmt: skip


def our_sampled(graph, model, conditioning=STARTED, latent=("start", 2)):
    """The same with Wan21Sampler."""
    positive, negative = conditioning
    return graph | {
        "sampled": node(
            "Wan21Sampler", model=model, positive=positive, negative=negative, latent=list(latent), seed=SEED,
            steps=STEPS, guidance_scale=CFG, flow_shift=SHIFT, solver="euler", denoise=1.0,
        )
    }  # fmt: skip
