"""Our DiT inside a standard MODEL."""

import json
from functools import partial

import comfy.ldm.common_dit
import comfy.model_base
import comfy.model_management
import torch
from comfy.ldm.modules import attention as host_attention
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from comfy.quant_ops import QuantizedTensor

from ..wan.attention import best_kernels, choose_attention, sdpa
from ..wan.chunked import block_executor
from ..wan.config import CLIP_TOKENS
from ..wan.dit import WanModel
from ..wan.memory import StepSize, step_bytes
from ..wan.option import Call
from ..wan.refusal import Refusal
from ..wan.teacache import NO_PROFILE, check_coefficients
from .patches import patch_inside_blocks, scaled_frequencies
from .progress import check_cancelled

CALL = "wan21_call"  # in transformer_options: the `Call` of our sampler's step
TEXTS = "wan21_texts"  # in transformer_options: text features by pass name, of passes that do not run
NEED = "wan21_need"  # in a conditioning: bytes that a step of our sampler takes
UNPACKING_BYTES = 13  # the most of any GGUF kind, measured; a result in 16 bits among them
COEFFICIENTS_KEY = "teacache_coefficients"  # in a checkpoint's metadata
COEFFICIENTS_SUFFIX = ".teacache.json"  # of the file beside a checkpoint, after its whole name

# torch.compile compiles what is computed (the embeddings, one block for all, the head). The walk between them
# is the host's and the options' Python, which reads transformer_options: TorchCompileModel drops every guard
# on those, so traced code would never see a change in them.
_untraced = partial(torch.compiler.disable, recursive=False)


def has_own_attention(transformer_options):
    """Whether another pack or the host's start options name an attention other than PyTorch's."""
    plain = [host_attention.attention_pytorch]
    if comfy.model_management.get_torch_device().type == "cpu":
        plain.append(host_attention.attention_sub_quad)
    overridden = "optimized_attention_override" in transformer_options
    return overridden or host_attention.optimized_attention not in plain


@_untraced
def attention_of(transformer_options):
    """The attention the user chose for the host, as an `AttentionFn`.

    On the CPU, where the host would take its sub-quadratic default, plain SDPA is as exact and several times
    faster. On a device where the host takes it, SDPA has no kernel that spares the matrix of all scores.
    """
    if not has_own_attention(transformer_options):
        return sdpa
    chosen = host_attention.optimized_attention

    def attention(q, k, v):
        heads = q.shape[2]
        q, k, v = q.flatten(2), k.flatten(2), v.flatten(2)
        return chosen(q, k, v, heads, transformer_options=transformer_options).unflatten(-1, (heads, -1))

    return attention


def choose_attention_for(model, name):
    """The sampler's attention for a MODEL: a `wan.attention.Attention`, or None for the host's own choice.

    Raises:
        ValueError: an explicit choice cannot be had.
    """
    if name == "auto" and has_own_attention(model.model_options["transformer_options"]):
        return None
    dtype = model.model.get_dtype_inference()
    return choose_attention(name, model.load_device, dtype, config_of(model).head_dim)


@_untraced
def runner_of(transformer_options):
    """The joint walk over the blocks that stops on cancel and honours the host's block replacements."""
    replace = transformer_options.get("patches_replace", {}).get("dit", {})

    def run(num_blocks, passes, call):
        call = _untraced(call)
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
    """Our DiT behind the call that the host's samplers make.

    With an fp8 `dtype` only the matrices of the blocks are stored so; norms, biases, modulation and the
    layers outside the blocks, small and sensitive, keep `compute_dtype`.

    Args:
        stored: dtype by key, where a parameter is to be stored otherwise.
    """

    def __init__(self, config, operations, device=None, dtype=None, compute_dtype=None, stored=None):
        is_fp8 = dtype is not None and dtype.itemsize == 1
        super().__init__(config, operations, device, compute_dtype if is_fp8 else dtype)
        self.dtype = dtype
        if is_fp8:
            for layer in self.blocks.modules():
                if isinstance(layer, torch.nn.Linear):
                    _store_as(layer, "weight", dtype)
        for key, other in (stored or {}).items():
            owner, _, name = key.rpartition(".")
            _store_as(self.get_submodule(owner), name, other)

    @_untraced
    def forward(
        self, x, timestep, context, clip_fea=None, time_dim_concat=None, transformer_options=None, **kwargs
    ):
        options = {} if transformer_options is None else transformer_options
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        executor = WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return _untraced(executor.execute)(x, timestep, context, clip_fea, time_dim_concat, options, **kwargs)

    @_untraced
    def _forward(self, x, timestep, context, clip_fea, time_dim_concat, transformer_options, **kwargs):
        foreign = kwargs | {"time_dim_concat": time_dim_concat}
        for name in ("time_dim_concat", "reference_latent", "context_latents"):
            if foreign.get(name) is not None:
                raise Refusal(
                    f"the conditioning carries {name} of another Wan family, which this MODEL does not read",
                    "Load the model with the host's Load Diffusion Model",
                )
        if refusal := patch_inside_blocks(transformer_options):
            raise refusal
        height, width = x.shape[-2:]
        x = comfy.ldm.common_dit.pad_to_patch_size(x, (1, 2, 2))
        chunks = transformer_options.get("cond_or_uncond") or [0]
        names = tuple({0: "cond", 1: "uncond"}.get(c, f"cond{c}") for c in chunks)
        call = transformer_options.get(CALL) or Call(names)
        attention = attention_of(transformer_options) if call.attention is None else call.attention.function
        with best_kernels(x.device):
            v = _untraced(super().forward)(
                x,
                timestep,
                context,
                clip_fea,
                pass_names=names,
                frequencies=scaled_frequencies(call.frequencies, self.config.head_dim, transformer_options),
                attention=attention,
                runner=_composed(call, transformer_options),
                execute=block_executor(call.plan.parts),
                context_attention=call.context_attention,
                contexts={name: c.to(context) for name, c in transformer_options.get(TEXTS, {}).items()},
            )
        return v[..., :height, :width]


@_untraced
def _composed(call, transformer_options):
    """The host's runner with those of the options around it."""
    runner = _untraced(runner_of(transformer_options))
    for around in call.around:
        runner = _untraced(around(runner))

    def run(num_blocks, passes, block):
        runner(num_blocks, passes, _untraced(block))

    return _untraced(run)


def _store_as(layer, name, dtype):
    setattr(layer, f"{name}_comfy_model_dtype", dtype)  # where the host makes it only when it is loaded
    value = getattr(layer, name)
    if value is not None:
        setattr(layer, name, torch.nn.Parameter(torch.empty_like(value, dtype=dtype), requires_grad=False))


def kept_dtype(layer, name):
    """The dtype of a parameter on the device; the file's may be there until it is used."""
    value = getattr(layer, name)
    if isinstance(value, QuantizedTensor):
        return value._qdata.dtype
    if name == "weight" and getattr(layer, "packed", None):
        return value.dtype
    return getattr(layer, f"{name}_comfy_model_dtype", None) or value.dtype


class Wan21(comfy.model_base.WAN21):
    """The host's Wan2.1 base model around our DiT, with the velocity that our sampler asks for."""

    def __init__(self, model_config, config, path, metadata, device=None, stored=None):
        def build(operations, device, dtype=None, **_):
            return HostWanModel(config, operations, device, dtype, model_config.manual_cast_dtype, stored)

        super(comfy.model_base.WAN21, self).__init__(
            model_config, comfy.model_base.ModelType.FLOW, device=device, unet_model=build
        )
        self.image_to_video = config.takes_image
        self.checkpoint_path = path
        self.checkpoint_metadata = metadata

    def extra_conds_shapes(self, **conditioning):
        """What the host hands to `memory_required` of a conditioning."""
        return {NEED: [conditioning[NEED]]} if NEED in conditioning else {}

    def memory_required(self, input_shape, cond_shapes=None):
        """Bytes of one step beside the weights: what our sampler told, or for the host's own samplers.

        These stack the passes in the batch, and our DiT walks them one after the other through each block.
        """
        told = (cond_shapes or {}).get(NEED)
        if told:
            return max(need for (need,) in told)
        batch, *sides = input_shape
        passes = 1 if batch % 2 else 2
        return step_bytes(self.step_size((batch // passes, *sides), passes))

    def step_size(self, latent: tuple[int, ...], passes: int) -> StepSize:
        """Of a step on a latent of this shape, by the attention and weights as they are now."""
        config = self.diffusion_model.config
        image_tokens = 0 if config.image_dim is None else config.image_tokens or CLIP_TOKENS
        own = "sage" if comfy.model_management.sage_attention_enabled() else "sdpa"
        itemsize = self.get_dtype_inference().itemsize
        return StepSize(
            config,
            latent,
            passes,
            itemsize,
            attention=own,
            image_tokens=image_tokens,
            matrix_bytes=self.matrix_bytes(itemsize),
        )

    def matrix_bytes(self, itemsize):
        """Bytes a number of the largest matrix takes while it is used, beside its place in the weights."""
        layer = self.diffusion_model.blocks[0].ffn[0]
        if getattr(layer, "packed", None):
            return UNPACKING_BYTES
        return itemsize

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


def checkpoint_name(model):
    """File name of the checkpoint a MODEL was loaded from."""
    return model.model.checkpoint_path.name


def measured_coefficients(model):
    """TeaCache coefficients that belong to the checkpoint: beside it or in its metadata; None without any.

    Raises:
        Refusal: they are there and damaged.
    """
    beside = model.model.checkpoint_path.with_name(checkpoint_name(model) + COEFFICIENTS_SUFFIX)
    stored = model.model.checkpoint_metadata.get(COEFFICIENTS_KEY)
    if beside.is_file():
        stored, name = beside.read_text(encoding="utf-8"), beside.name
    elif stored is not None:
        name = f"{COEFFICIENTS_KEY} in the metadata of {checkpoint_name(model)}"
    else:
        return None
    try:
        return check_coefficients(json.loads(stored))
    except Refusal as error:
        raise error.about(name) from error
    except ValueError as error:  # no JSON
        raise Refusal(f"{name}: {error}", NO_PROFILE) from error
