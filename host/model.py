"""Our DiT inside a standard MODEL."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import comfy.ldm.common_dit
import comfy.model_base
import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from comfy.supported_models_base import BASE
from torch import Tensor

from ..wan.attention import best_kernels
from ..wan.chunked import block_executor
from ..wan.config import CLIP_TOKENS, PATCH_SIZE, WanConfig, preview_colours
from ..wan.dit import Pass, WanModel
from ..wan.memory import StepSize, step_bytes
from ..wan.option import Call
from ..wan.refusal import Refusal, printable
from ..wan.shard import WHOLE
from .attention import attention_of
from .conditioning import missing_clip_vision, refuse_more_features
from .fp16_sums import fp16_sums, refuse_overflow
from .operations import lending
from .patches import (
    changed_in_host,
    patch_inside_blocks,
    replaced_inside,
    scaled_frequencies,
    written_in_call,
)
from .prefetch import AHEAD, ahead_beside
from .products import beside_product
from .progress import tell, with_neighbours
from .runner import composed_runner, pass_name
from .stored import matrix_bytes, store_as
from .untraced import untraced

# Keys in transformer_options.
CALL = "wan21_call"  # the `Call` of our sampler's step
TEXTS = "wan21_texts"  # text features by pass name, of passes that do not run
SHARD = "wan21_shard"  # which tokens of a call are here, where workers share them
NEED = "wan21_need"  # key in a conditioning: bytes of a step of our sampler


IN_CONTEXT = Refusal(
    "the conditioning carries context_latents (Bernini), which this MODEL does not read",
    "Load the model with the host's Load Diffusion Model",
)
IN_ORIG = Refusal(
    "another node calls diffusion_model.forward_orig, which this MODEL does not have",
    "Load the model with the host's Load Diffusion Model",
)
TRAINED_ON = Refusal(
    "another node trains on the MODEL, whose layers work in place and give no gradients",
    "Load the model with the host's Load Diffusion Model to train on it",
)


class HostWanModel(WanModel):
    """Our DiT behind the call that the host's samplers make.

    With an fp8 `dtype` only the matrices of the blocks are stored so; norms, biases, modulation and the
    layers outside the blocks, small and sensitive, keep `compute_dtype`.

    Args:
        operations: namespace of layer classes, such as `torch.nn` or one of the host's.
        dtype: in which parameters are stored.
        stored: dtype by key, where a parameter is to be stored otherwise.

    Attributes:
        elsewhere: where its calls are made, if not here: see `host.remote`.
        sums_in_fp16: whether its products in fp16 are also summed in fp16.
    """

    elsewhere: Any = None
    sums_in_fp16: bool = False

    def __init__(
        self,
        config: WanConfig,
        operations: ModuleType | type,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
        stored: Mapping[str, torch.dtype] = MappingProxyType({}),
    ):
        fp8 = dtype if dtype is not None and dtype.itemsize == 1 else None
        operations = lending(operations)
        super().__init__(config, operations, device, dtype if fp8 is None else compute_dtype)
        self.dtype = dtype
        self.built_as = type(self)  # some packs change the class of a model
        _tell_sizes(self, config)
        if fp8 is not None:
            for layer in self.blocks.modules():
                if isinstance(layer, torch.nn.Linear):
                    store_as(layer, "weight", fp8)
        for key, other in stored.items():
            owner, _, name = key.rpartition(".")
            store_as(self.get_submodule(owner), name, other)

    @untraced
    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        clip_fea: Tensor | None = None,
        time_dim_concat: Tensor | None = None,
        transformer_options: dict | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The velocity of each pass, stacked in the batch as the host stacks them.

        Args:
            x: [B, 16 or 36, T, h, w]: noise, and for image models mask and image latent.
            timestep: [B], in [0, 1000].
            context: text [B, L, D].
            clip_fea: CLIP features [B, I, 1280].
            time_dim_concat: further latent frames [B, C, T', h, w] that are read and not denoised, as of
                Phantom: they stand behind the video's.
            kwargs: what the host makes of other conditioning; as in its own Wan2.1, `reference_latent` is
                not read.
            transformer_options: the host's: wrappers, patches, names of the passes; our sampler's `Call`.

        Returns:
            [B, 16, T, h, w]

        Raises:
            Refusal: an input or a patch that our DiT does not honour.
        """
        options = {} if transformer_options is None else transformer_options
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        executor = WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return untraced(executor.execute)(x, timestep, context, clip_fea, time_dim_concat, options, **kwargs)

    def embed(self, *inputs: Any) -> Pass:
        """As of `WanModel`; without CLIP features the image branch reads the text, as on the host's model."""
        embedded = super().embed(*inputs)
        if embedded.image is None and self.img_emb is not None:
            embedded.image = embedded.text
        return embedded

    def forward_orig(self, *args: Any, **kwargs: Any) -> Tensor:
        """Nothing that is called: TeaCache and MagCache of other packs put theirs here while they call the
        model, which is then refused by name.

        Raises:
            Refusal: always.
        """
        raise IN_ORIG

    @untraced
    def check_call(self, x: Tensor, conditioning: Mapping[str, Any], patched: Refusal | None) -> None:
        """Refuses a call that would not do what it is made for.

        Raises:
            Refusal: `patched`, or what else there is.
        """
        if conditioning.get("context_latents"):
            raise IN_CONTEXT
        if x.requires_grad:
            raise TRAINED_ON
        if refusal := patched or written_in_call(self):
            raise refusal

    @untraced
    def _forward(self, x, timestep, context, clip_fea, time_dim_concat, transformer_options, **kwargs):
        self.check_call(x, kwargs, patch_inside_blocks(transformer_options))
        timestep = _one_a_sample(timestep)
        frames, height, width = x.shape[-3:]
        x = comfy.ldm.common_dit.pad_to_patch_size(x, PATCH_SIZE)
        if time_dim_concat is not None:
            beside = comfy.ldm.common_dit.pad_to_patch_size(time_dim_concat.to(x), PATCH_SIZE)
            _check_beside(x, beside)
            x = torch.cat([x, beside], dim=2)
        # Packs read this; the host's model writes it.
        (f, h, w), (pf, ph, pw) = x.shape[2:], PATCH_SIZE
        transformer_options["grid_sizes"] = torch.Size((f // pf, h // ph, w // pw))
        chunks = transformer_options.get("cond_or_uncond") or [0]
        names = tuple(pass_name(chunk) for chunk in chunks)
        call = transformer_options.get(CALL) or Call(names)
        attention = attention_of(transformer_options) if call.attention is None else call.attention.function
        kernel = None if call.attention is None else call.attention.kernel
        with best_kernels(x.device, kernel), fp16_sums(self.sums_in_fp16):
            v = untraced(super().forward)(
                x,
                timestep,
                context,
                clip_fea,
                pass_names=names,
                frequencies=scaled_frequencies(call.frequencies, self.config.head_dim, transformer_options),
                attention=attention,
                runner=composed_runner(call, transformer_options, [*self.blocks]),
                execute=block_executor(call.plan.parts),
                context_attention=call.context_attention,
                contexts={name: c.to(context) for name, c in transformer_options.get(TEXTS, {}).items()},
                shard=transformer_options.get(SHARD, WHOLE),
            )
        if self.sums_in_fp16 and CALL not in transformer_options:  # our sampler looks at each step itself
            refuse_overflow(v)
        return v[:, :, :frames, :height, :width]


def _tell_sizes(model: HostWanModel, config: WanConfig) -> None:
    """Gives the model and its parts the attributes of the host's in which packs read its sizes."""
    sizes = {"dim": config.dim, "num_heads": config.num_heads, "eps": config.eps}
    every = sizes | {"qk_norm": True, "window_size": (-1, -1)}
    block = every | {"ffn_dim": config.ffn_dim, "cross_attn_norm": True}
    names = ("in_dim", "out_dim", "freq_dim", "text_dim", "num_layers")
    whole = block | {name: getattr(config, name) for name in names}
    kind = "t2v" if config.image_dim is None else "i2v"
    whole |= {"model_type": kind, "patch_size": PATCH_SIZE, "text_len": 512, "ref_conv": None}
    vars(model).update(whole)
    for part in model.blocks:
        vars(part).update(block)
        for attention in (part.self_attn, part.cross_attn):
            vars(attention).update(every | {"head_dim": config.head_dim})


def _one_a_sample(timestep: Tensor) -> Tensor:
    """Timesteps [B] of [B] or [B, 1].

    Raises:
        Refusal: another node gives one for each frame or token.
    """
    if timestep.ndim > 1 and timestep[0].numel() > 1:
        raise Refusal(
            f"another node gives the MODEL timesteps {list(timestep.shape)}, one for each frame or token (as "
            "diffusion forcing does), and it reads one for a video",
            "Remove that node, or load the model with the host's Load Diffusion Model",
        )
    return timestep.flatten()


def _check_beside(x: Tensor, beside: Tensor) -> None:
    if x.shape[1] != beside.shape[1] or x.shape[3:] != beside.shape[3:]:
        raise Refusal(
            f"time_dim_concat in the conditioning is {list(beside.shape)} and the model's input "
            f"{list(x.shape)}: channels and sides are the same (a text-to-video model, such as Phantom)",
            "Set the video's size on the node that made it, and load the model that belongs to it",
        )


class Wan21(comfy.model_base.WAN21):
    """The host's Wan2.1 base model around our DiT, with the velocity that our sampler asks for.

    Args:
        host_config: the host's of this model, with storage and compute dtype chosen.
        path: of the checkpoint.
        metadata: the checkpoint's.
        stored: as of `HostWanModel`.

    Attributes:
        dit_class: of the DiT that is built.
        file_notes: what was said of the checkpoint when it was read, in sentences.
    """

    dit_class: type[HostWanModel] = HostWanModel
    diffusion_model: HostWanModel
    file_notes: Sequence[str] = ()

    def __init__(
        self,
        host_config: BASE,
        config: WanConfig,
        path: Path,
        metadata: dict[str, str],
        device: torch.device | None = None,
        stored: Mapping[str, torch.dtype] = MappingProxyType({}),
    ):
        def build(operations, device, dtype=None, **_):
            return self.dit_class(config, operations, device, dtype, host_config.manual_cast_dtype, stored)

        super(comfy.model_base.WAN21, self).__init__(
            host_config,
            comfy.model_base.ModelType.FLOW,
            device=device,
            unet_model=build,  # pyright: ignore[reportArgumentType] (the host calls it, class or not)
        )
        self.image_to_video = config.takes_image
        self.checkpoint_path = path
        self.checkpoint_metadata = metadata
        if colours := preview_colours(metadata):
            self.latent_format.latent_rgb_factors, self.latent_format.latent_rgb_factors_bias = colours
            if len(colours[0]) > self.latent_format.latent_channels:
                self.latent_format.latent_rgb_factors_reshape = with_neighbours

    def extra_conds(self, **conditioning: Any) -> dict[str, Any]:
        """The host's, without an empty list of latents beside the video (Bernini without references)."""
        found = super().extra_conds(**conditioning)
        if not conditioning.get("context_latents"):
            found.pop("context_latents", None)
        return found

    def extra_conds_shapes(self, **conditioning: Any) -> dict[str, list]:
        """What the host hands to `memory_required` of a conditioning."""
        beside = conditioning.get("time_dim_concat")
        shapes = {} if beside is None else {"time_dim_concat": list(beside.shape)}
        return shapes | ({NEED: [conditioning[NEED]]} if NEED in conditioning else {})

    def memory_required(self, input_shape: Sequence[int], cond_shapes: dict | None = None) -> int | float:
        """Bytes of one step beside the weights: what our sampler told, or for the host's own samplers.

        These stack the passes in the batch, and our DiT walks them one after the other through each block.
        """
        cond_shapes = cond_shapes or {}
        if told := cond_shapes.get(NEED):
            return max(need for (need,) in told)
        batch, channels, frames, *sides = input_shape
        passes = 1 if batch % 2 else 2
        frames += max((shape[2] for shape in cond_shapes.get("time_dim_concat", ())), default=0)
        step = step_bytes(self.step_size((batch // passes, channels, frames, *sides), passes))
        return step + (0 if self.current_patcher is None else ahead_beside(self.current_patcher, step))

    def step_size(self, latent: tuple[int, ...], passes: int) -> StepSize:
        """What the memory of a step depends on, by the attention and weights as they are now.

        Args:
            latent: its shape, [B, C, T, h, w].
        """
        config = self.diffusion_model.config
        image_tokens = 0 if config.image_dim is None else config.image_tokens or CLIP_TOKENS
        own = "sage" if comfy.model_management.sage_attention_enabled() else "sdpa"
        itemsize = self.get_dtype_inference().itemsize
        patcher = self.current_patcher
        device = comfy.model_management.get_torch_device() if patcher is None else patcher.load_device
        of_attention, of_ffn = (
            beside_product(self._layer(name), device, itemsize) for name in ("self_attn.q", "ffn.2")
        )
        return StepSize(
            config,
            latent,
            passes,
            itemsize,
            attention=own,
            image_tokens=image_tokens,
            matrix_bytes=self.matrix_bytes(itemsize),
            attention_beside=of_attention,
            ffn_beside=of_ffn,
        )

    def matrix_bytes(self, itemsize: int) -> int:
        """Bytes for each number of the largest matrix while it is in use; see `stored.matrix_bytes`."""
        return matrix_bytes(self._layer("ffn.0"), itemsize)

    def _layer(self, name: str) -> torch.nn.Module | None:
        """The layer of this name in the first block that has it; None where another node replaced all."""
        pattern = re.compile(rf"blocks\.\d+\.(_orig_mod\.)?{re.escape(name)}")
        named = self.diffusion_model.named_modules()
        return next((layer for key, layer in named if pattern.fullmatch(key)), None)

    def velocity(self, x: Tensor, timestep: Tensor, transformer_options: dict, **conds: Any) -> Tensor:
        """`apply_model` without its change to denoised space; wrappers such as torch.compile apply.

        Args:
            x: [B, 16, T, h, w], the passes stacked in the batch.
            timestep: [B], in [0, 1000].
            conds: the host's prepared conditioning: `c_concat`, `c_crossattn`, `clip_fea`.

        Returns:
            [B, 16, T, h, w], float32
        """
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
        is_dynamic = self.current_patcher is not None and self.current_patcher.is_dynamic()
        transformer_options = transformer_options | {AHEAD: is_dynamic}
        return self.diffusion_model(
            x, timestep, context, transformer_options=transformer_options, **conds
        ).float()


def refuse_replaced(model: ModelPatcher) -> None:
    """Refuses parts that would not act, also of a MODEL that another's run takes along (DualModelGuider).

    Raises:
        Refusal: another node replaced a part of the model that our DiT does not call.
    """
    if refusal := replaced_inside(model):
        raise refusal


def refuse_unread(
    executor: Any, model: ModelPatcher, noise_shape: Any, conds: dict[str, list], *args: Any, **kwargs: Any
) -> Any:
    """A wrapper of the host's preparation of a run: refuses, before anything is loaded, what would not act.

    It says what a MODEL of the host's would do otherwise.

    Raises:
        Refusal: another node replaced a part of the model that our DiT does not call, or the conditioning
            carries what it does not read and the host's Wan2.1 would.
    """
    refuse_replaced(model)
    for sentence in changed_in_host():
        tell(sentence)
    for options in (options for cond in conds.values() for options in cond or ()):
        if options.get("context_latents"):
            raise IN_CONTEXT
        clip = options.get("clip_vision_output")
        refuse_more_features(config_of(model), clip)
        if said := missing_clip_vision(config_of(model), clip):
            tell(said)
    return executor(model, noise_shape, conds, *args, **kwargs)


def is_ours(model: ModelPatcher) -> bool:
    """Whether a MODEL is one of our loader's."""
    return isinstance(model.model, Wan21)


def config_of(model: ModelPatcher) -> WanConfig:
    """Sizes of a MODEL of ours."""
    return model.model.diffusion_model.config


def checkpoint_name(model: ModelPatcher) -> str:
    """File name of the checkpoint that a MODEL of ours was loaded from."""
    return printable(model.model.checkpoint_path.name)
