"""The only file that touches ComfyUI's internals.

It puts our model, VAE and text encoder into the host's standard MODEL, VAE and CLIP, and lends our
sampler the host's life cycle: device memory, model patches, progress, preview and cancel. What is used
here was read in ComfyUI 0.30.0.
"""

from contextlib import contextmanager
from functools import partial
from pathlib import Path

import comfy.ldm.common_dit
import comfy.model_base
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models_base
import comfy.text_encoders.sd3_clip
import comfy.text_encoders.wan
import comfy.utils
import folder_paths
import latent_preview
import node_helpers
import psutil
import torch
from comfy.ldm.modules import attention as host_attention
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from PIL import Image

from ..wan import checkpoint
from ..wan.attention import sdpa
from ..wan.config import CLIP_TOKENS, detect_config
from ..wan.dit import WanModel
from ..wan.preflight import Conditioning
from ..wan.vae import WanVAE

PREVIEW_FRAMES = 5
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Conditioning keys by which other nodes ask for what our sampler does not do.
UNSUPPORTED_CONDITIONING = ("area", "mask", "control", "gligen", "hooks", "start_percent", "end_percent")


def check_cancelled():
    """Raise the host's interrupt when the user has cancelled the job."""
    comfy.model_management.throw_exception_if_processing_interrupted()


# --- DiT -----------------------------------------------------------------------------------------


def attention_of(transformer_options):
    """The attention the user chose for the host, as an `AttentionFn`.

    An override by another pack and the host's start options are honoured; where the host would take its
    sub-quadratic default, plain SDPA is as exact and several times faster.
    """
    chosen = host_attention.optimized_attention
    if "optimized_attention_override" not in transformer_options and chosen in (
        host_attention.attention_sub_quad,
        host_attention.attention_pytorch,
    ):
        return sdpa

    def attention(q, k, v):
        heads = q.shape[2]
        q, k, v = q.flatten(2), k.flatten(2), v.flatten(2)
        return chosen(q, k, v, heads, transformer_options=transformer_options).unflatten(-1, (heads, -1))

    return attention


def runner_of(transformer_options):
    """The joint walk over the blocks that stops on cancel and honours the host's block replacements."""
    replace = transformer_options.get("patches_replace", {}).get("dit", {})

    def run(num_blocks, passes, call):
        transformer_options["total_blocks"] = num_blocks
        transformer_options["block_type"] = "double"
        for i in range(num_blocks):
            transformer_options["block_index"] = i
            for p in passes:
                check_cancelled()
                patch = replace.get(("double_block", i))
                p.x = call(i, p) if patch is None else _replaced(patch, i, p, call, transformer_options)

    return run


def _replaced(patch, i, p, call, transformer_options):
    def original_block(args):
        p.x = args["img"]
        return {"img": call(i, p)}

    args = {"img": p.x, "txt": p.text, "vec": p.modulation, "pe": None}
    return patch(args | {"transformer_options": transformer_options}, {"original_block": original_block})[
        "img"
    ]


class HostWanModel(WanModel):
    """Our DiT behind the call that the host's samplers make."""

    def __init__(self, config, operations, device=None, dtype=None):
        super().__init__(config, operations, device, dtype)
        self.dtype = dtype

    def forward(
        self, x, timestep, context, clip_fea=None, time_dim_concat=None, transformer_options=None, **kwargs
    ):
        options = {} if transformer_options is None else transformer_options
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        executor = WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timestep, context, clip_fea, time_dim_concat, options, **kwargs)

    def _forward(self, x, timestep, context, clip_fea, time_dim_concat, transformer_options, **kwargs):
        for name in ("time_dim_concat", "reference_latent", "context_latents"):
            if kwargs.get(name, time_dim_concat if name == "time_dim_concat" else None) is not None:
                raise ValueError(
                    f"Wan21ModelLoader: the conditioning carries {name} of another Wan family. "
                    "Load the model with the host's Load Diffusion Model"
                )
        height, width = x.shape[-2:]
        x = comfy.ldm.common_dit.pad_to_patch_size(x, (1, 2, 2))
        chunks = transformer_options.get("cond_or_uncond") or [0]
        v = super().forward(
            x,
            timestep,
            context,
            clip_fea,
            pass_names=[("cond", "uncond")[c] for c in chunks],
            attention=attention_of(transformer_options),
            runner=runner_of(transformer_options),
        )
        return v[..., :height, :width]


class Wan21(comfy.model_base.WAN21):
    """The host's Wan2.1 base model around our DiT, with the velocity that our sampler asks for."""

    def __init__(self, model_config, config, device=None):
        def build(operations, device, dtype=None, **_):
            return HostWanModel(config, operations, device, dtype)

        super(comfy.model_base.WAN21, self).__init__(
            model_config, comfy.model_base.ModelType.FLOW, device=device, unet_model=build
        )
        self.image_to_video = config.takes_image

    def velocity(self, x, timestep, transformer_options, **conds):
        """`apply_model` without its change to denoised space; wrappers such as torch.compile apply."""
        wrappers = get_all_wrappers(WrappersMP.APPLY_MODEL, transformer_options)
        executor = WrapperExecutor.new_class_executor(self._velocity, self, wrappers)
        concat, text = conds.pop("c_concat", None), conds.pop("c_crossattn", None)
        return executor.execute(x, timestep, concat, text, None, transformer_options, **conds)

    def _velocity(self, x, timestep, c_concat, c_crossattn, control, transformer_options, **conds):
        dtype = self.get_dtype_inference()
        if c_concat is not None:
            x = torch.cat([x, c_concat.to(x)], dim=1)
        conds = {k: v.to(x.device, dtype) if torch.is_tensor(v) else v for k, v in conds.items()}
        context = c_crossattn.to(x.device, dtype)
        return self.diffusion_model(
            x, timestep, context, transformer_options=transformer_options, **conds
        ).float()


def is_ours(model):
    return isinstance(model.model, Wan21)


def config_of(model):
    return model.model.diffusion_model.config


def load_model(path, weight_dtype="default", disable_dynamic=False):
    """Read a Wan2.1 checkpoint of any published layout into a standard MODEL."""
    state_dict, metadata = checkpoint.read_checkpoint(path)
    state_dict = checkpoint.to_wan_dit_keys(state_dict)
    config = detect_config(state_dict, metadata)
    state_dict, metadata = comfy.utils.convert_old_quants(state_dict, "", metadata=metadata)
    model_config = comfy.model_detection.model_config_from_unet(state_dict, "", metadata=metadata)
    load_device = comfy.model_management.get_torch_device()
    _choose_dtype(model_config, state_dict, load_device, DTYPES.get(weight_dtype))

    model = Wan21(model_config, config)
    expected = {k: tuple(v.shape) for k, v in model.diffusion_model.state_dict().items()}
    checkpoint.check_keys(expected, state_dict, Path(path).name)
    patcher_class = (
        comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    )
    offload_device = comfy.model_management.unet_offload_device()
    patcher = patcher_class(model, load_device=load_device, offload_device=offload_device)
    if not comfy.model_management.is_device_cpu(offload_device):
        model.to(offload_device)
    model.load_model_weights(state_dict, "", assign=patcher.is_dynamic())
    # The host builds further patchers of this model (hooks, several GPUs) from this recipe.
    patcher.cached_patcher_init = (load_model, (path, weight_dtype))
    return patcher


def _choose_dtype(model_config, state_dict, load_device, dtype):
    """Storage and compute dtype by the host's rules; layers that cast at each call."""
    management = comfy.model_management
    supported = list(model_config.supported_inference_dtypes)
    if model_config.quant_config is not None:
        cast = management.unet_manual_cast(None, load_device, supported)
        model_config.set_inference_dtype(dtype or supported[0], cast, device=load_device)
        return
    if dtype is None:
        dtype = management.unet_dtype(
            model_params=comfy.utils.calculate_parameters(state_dict),
            supported_dtypes=supported,
            weight_dtype=comfy.utils.weight_dtype(state_dict),
        )
    cast = management.unet_manual_cast(dtype, load_device, supported)
    model_config.set_inference_dtype(dtype, cast, device=load_device)
    # The time embedding and the modulation are float32 whatever the weights are, so layers must cast.
    model_config.custom_operations = comfy.ops.manual_cast


# --- VAE -----------------------------------------------------------------------------------------


class Progress:
    """`progress(done, total)` for the node that runs: moves its bar and stops on cancel."""

    def __init__(self):
        self.bar = comfy.utils.ProgressBar(1)

    def __call__(self, done, total):
        self.bar.update_absolute(done, total)
        check_cancelled()


class HostWanVAE(WanVAE):
    """Our VAE with the host's progress and cancel, wherever it is called from."""

    def encode(self, x, device=None):
        return super().encode(x, device=device, progress=Progress())

    def decode(self, z, output_buffer=None):
        return super().decode(z, output_buffer=output_buffer, progress=Progress())

    def encode_tiled(self, x, **tiling):
        return super().encode_tiled(x, progress=Progress(), **tiling)

    def decode_tiled(self, z, **tiling):
        return super().decode_tiled(z, progress=Progress(), **tiling)


def load_vae(path, precision="auto"):
    """Read a Wan2.1 VAE of any published layout into a standard VAE."""
    state_dict = checkpoint.to_wan_vae_keys(checkpoint.read_checkpoint(path).state_dict)
    vae = comfy.sd.VAE(sd=dict(state_dict), dtype=DTYPES.get(precision))
    model = HostWanVAE(
        dim=state_dict["decoder.head.0.gamma"].shape[0],
        operations=comfy.ops.disable_weight_init,
        dtype=vae.vae_dtype,
    ).eval()
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    checkpoint.check_keys(expected, state_dict, Path(path).name)
    comfy.model_management.archive_model_dtypes(model)
    patcher = comfy.model_patcher.CoreModelPatcher(
        model, load_device=vae.device, offload_device=comfy.model_management.vae_offload_device()
    )
    model.load_state_dict(state_dict, assign=patcher.is_dynamic())
    vae.first_stage_model, vae.patcher, vae.handles_tiling = model, patcher, True
    return vae


def vae_shape(vae):
    """(latent channels, latent dimensions, spatial compression), for the preflight."""
    return vae.latent_channels, vae.latent_dim, vae.spacial_compression_encode()


# --- text encoder --------------------------------------------------------------------------------


def load_text_encoder(path, device="default"):
    """Read a umT5 encoder of any size and published layout into a standard CLIP."""
    state_dict = checkpoint.to_umt5_keys(checkpoint.read_checkpoint(path).state_dict)
    config = checkpoint.umt5_config(state_dict)
    tokenizer = state_dict.pop("spiece_model", None)
    if tokenizer is None:
        tokenizer = _tokenizer_beside(Path(path))
    options = {"umt5xxl_model_config": config}
    if device == "cpu":
        options["load_device"] = options["offload_device"] = torch.device("cpu")
    detected = comfy.text_encoders.sd3_clip.t5_xxl_detect(state_dict)
    return comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(
            comfy.text_encoders.wan.WanT5Tokenizer, comfy.text_encoders.wan.te(**detected)
        ),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        tokenizer_data={"spiece_model": tokenizer},
        parameters=comfy.utils.calculate_parameters(state_dict),
        state_dict=[state_dict],
        model_options=options,
    )


def _tokenizer_beside(path):
    """Bytes of the SentencePiece model beside a checkpoint that does not carry it."""
    for name in ("spiece.model", "google/umt5-xxl/spiece.model", "../tokenizer/spiece.model"):
        file = path.parent / name
        if file.is_file():
            return file.read_bytes()
    raise ValueError(
        f"{path.name} holds no tokenizer, and there is no spiece.model beside it. Put spiece.model "
        "(google/umt5-xxl on Hugging Face) into the same folder, or use ComfyUI's umt5_xxl file, which "
        "carries it"
    )


# --- sampling ------------------------------------------------------------------------------------


def describe_conditioning(name, conditioning):
    """Shapes of a CONDITIONING, for the preflight."""
    text, options = conditioning[0] if conditioning else (None, {})
    shape = {k: tuple(v.shape) for k, v in options.items() if torch.is_tensor(v)}
    clip = options.get("clip_vision_output")
    return Conditioning(
        name=name,
        entries=len(conditioning),
        text=None if text is None else tuple(text.shape),
        image_latent=shape.get("concat_latent_image"),
        mask=shape.get("concat_mask"),
        clip=None if clip is None else tuple(clip.penultimate_hidden_states.shape),
        unsupported=tuple(key for key in UNSUPPORTED_CONDITIONING if key in options),
    )


def trim_clip_vision(conditioning, config):
    """A plain i2v model reads the start image alone: cut the end image's CLIP features off.

    Returns:
        (conditioning, note or None)
    """
    clip = describe_conditioning("", conditioning).clip
    if clip is None or config.image_tokens or clip[-2] != 2 * CLIP_TOKENS:
        return conditioning, None
    if config.image_dim is None:
        return conditioning, None
    whole = conditioning[0][1]["clip_vision_output"]
    start = type(whole)()
    start.penultimate_hidden_states = whole.penultimate_hidden_states[:, :CLIP_TOKENS]
    trimmed = node_helpers.conditioning_set_values(conditioning, {"clip_vision_output": start})
    return (
        trimmed,
        "the model reads CLIP features of the start image only; those of the end image are left out",
    )


class _Sampler(comfy.samplers.Sampler):
    """Hands the host's loaded model to `run(predict, noise, latent)` in place of a k-diffusion function."""

    def __init__(self, run):
        self.run = run

    def sample(
        self, guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask=None, disable_pbar=False
    ):
        options = extra_args["model_options"]["transformer_options"]
        return self.run(partial(_predict, guider, options), noise, latent_image)


def _predict(guider, transformer_options, x, timestep, pass_names):
    """Velocity of each pass: all in one walk over the blocks where their contexts have equal shapes."""
    key = {"cond": "positive", "uncond": "negative"}
    inputs = {}
    for name in pass_names:
        conds = guider.conds[key[name]][0]["model_conds"]
        inputs[name] = {k: c.process_cond(batch_size=x.shape[0], area=None).cond for k, c in conds.items()}
    same = all(_shapes(part) == _shapes(inputs[pass_names[0]]) for part in inputs.values())
    velocities = {}
    for group in [pass_names] if same else [(name,) for name in pass_names]:
        count = len(group)
        merged = {k: torch.cat([inputs[name][k] for name in group]) for k in inputs[group[0]]}
        t = torch.full((count * x.shape[0],), timestep, device=x.device)
        options = transformer_options | {
            "cond_or_uncond": [("cond", "uncond").index(name) for name in group],
            "sigmas": t[:1] / 1000,
        }
        v = guider.inner_model.velocity(torch.cat([x] * count), t, options, **merged)
        velocities |= zip(group, v.chunk(count))
    return velocities


def _shapes(part):
    return {k: tuple(v.shape) for k, v in part.items()}


def run_sampling(model, positive, negative, latent_image, batch_index, seed, sigmas, run):
    """Run our sampling loop inside the host's: models loaded and patched, noise and latent on the device.

    Args:
        negative: None when there is no unconditional pass.
        run: `run(predict, noise, latent)` with normalised latents -> normalised latent.

    Returns:
        The latent in the VAE's own space, where the host keeps latents.
    """
    noise = comfy.sample.prepare_noise(latent_image, seed, batch_index)
    guider = comfy.samplers.CFGGuider(model)
    conds = {"positive": positive} if negative is None else {"positive": positive, "negative": negative}
    guider.inner_set_conds(conds)
    samples = guider.sample(noise, latent_image, _Sampler(run), torch.tensor(sigmas), seed=seed)
    management = comfy.model_management
    return samples.to(management.intermediate_device(), management.intermediate_dtype())


class StepProgress:
    """`on_step(i, x0)`: moves the node's bar and sends a strip of frames of the current estimate."""

    def __init__(self, model, steps):
        self.steps = steps
        self.bar = comfy.utils.ProgressBar(steps)
        self.previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def __call__(self, i, x0):
        preview = None
        if self.previewer is not None:
            preview = ("JPEG", self.strip(x0), latent_preview.MAX_PREVIEW_RESOLUTION)
        self.bar.update_absolute(i + 1, self.steps, preview)
        check_cancelled()

    def strip(self, x0):
        count = min(PREVIEW_FRAMES, x0.shape[2])
        at = torch.linspace(0, x0.shape[2] - 1, count).round().int().tolist()
        frames = [self.previewer.decode_latent_to_preview(x0[:1, :, t : t + 1]) for t in at]
        strip = Image.new("RGB", (sum(f.width for f in frames), frames[0].height))
        left = 0
        for frame in frames:
            strip.paste(frame, (left, 0))
            left += frame.width
        return strip


def ignored_patches(model):
    """What other nodes put on the MODEL that our sampler's own steps do not pass through."""
    names = [
        key
        for key in ("sampler_cfg_function", "sampler_post_cfg_function", "sampler_pre_cfg_function")
        if model.model_options.get(key)
    ]
    if "model_sampling" in model.object_patches:
        names.append("ModelSampling (its shift)")
    return names


@contextmanager
def memory_watch(device):
    """Yields a list that, after the block, holds one sentence on the memory it took."""
    said = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield said
    if device.type == "cuda":
        said.append(f"peak {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on {device}")
    else:
        said.append(f"{psutil.Process().memory_info().rss / 2**30:.2f} GiB held by the process ({device})")


def latent_device():
    """Where the host keeps latents between nodes."""
    return comfy.model_management.intermediate_device()
