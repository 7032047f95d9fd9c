"""Our DiT and VAE, ComfyUI's native ones and diffusers', on the same weights: who is compared in a benchmark.

Weights are random, made once on the device, and shared by all who are built. `comfy` must be importable
(`pack.load_host`). Nobody imports a peer that is not asked for.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from wan21.wan.config import WanConfig

from .random_weights import randomise

OURS = "ours"
PEERS = ("native", "diffusers")
DiT = Callable[..., Tensor]  # (x, timestep, context, clip_fea=None) -> velocity of each sample


def dits(
    config: WanConfig, names: Iterable[str], device: torch.device | str, dtype: torch.dtype
) -> dict[str, DiT]:
    """DiTs by name, of `OURS` and `PEERS`, on the same random weights; arguments as of `random_dit`."""
    ours = random_dit(config, device, dtype)
    return {name: ours if name == OURS else peer_dit(name, ours, dtype) for name in names}


def random_dit(
    config: WanConfig, device: torch.device | str, dtype: torch.dtype, operations: type | None = None
) -> nn.Module:
    """Our DiT with random weights.

    Args:
        config: the sizes.
        device: of the weights.
        dtype: of the weights and to compute in. The patch embedding stays float32, as in the release.
        operations: classes of the layers; by default those that our loader takes on this device.
    """
    from wan21.host.operations import casting_operations, lending
    from wan21.wan.dit import WanModel

    layers = operations or lending(casting_operations(torch.device(device)))
    return randomise(WanModel(config, layers, device=device, dtype=dtype))


def peer_dit(name: str, ours: nn.Module, dtype: torch.dtype) -> DiT:
    """The peer of this name on the weights of our DiT.

    x is float32, as for ours; the text and the CLIP features are in `dtype`.
    """
    make = {"native": _native_dit, "diffusers": _diffusers_dit}[name]
    return make(ours, dtype)


def _native_dit(ours: nn.Module, dtype: torch.dtype) -> DiT:
    import comfy.ops
    from comfy.ldm.wan.model import WanModel

    config: Any = ours.config
    names = ("in_dim", "dim", "ffn_dim", "num_heads", "num_layers", "text_dim")
    sizes = {name: getattr(config, name) for name in names}
    with torch.device("meta"):
        model = WanModel(
            model_type="i2v" if config.image_dim else "t2v",
            operations=comfy.ops.disable_weight_init,
            device="meta",
            dtype=dtype,
            **sizes,
        )
    model.load_state_dict(ours.state_dict(), assign=True)
    model.eval().requires_grad_(False)

    def call(x: Tensor, timestep: Tensor, context: Tensor, clip_fea: Tensor | None = None) -> Tensor:
        return model(x.to(dtype), timestep, context, clip_fea=clip_fea)

    return call


def _diffusers_dit(ours: nn.Module, dtype: torch.dtype) -> DiT:
    from diffusers import WanTransformer3DModel
    from wan21.wan.files.keys import to_wan_dit_keys

    config: Any = ours.config
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            in_channels=config.in_dim,
            text_dim=config.text_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
            image_dim=config.image_dim,
            added_kv_proj_dim=config.dim if config.image_dim else None,
        )
    empty = dict(model.state_dict())
    theirs = {id(tensor): key for key, tensor in empty.items()}
    renamed = {theirs[id(tensor)]: key for key, tensor in to_wan_dit_keys(dict(empty)).items()}
    weights = ours.state_dict()
    state = {key: weights[renamed[key]].reshape(tensor.shape) for key, tensor in empty.items()}
    model.load_state_dict(state, assign=True)
    # What is no weight was left without numbers.
    model.rope = type(model.rope)(config.head_dim, model.config.patch_size, model.config.rope_max_seq_len)
    model.rope.to(weights["head.modulation"].device)
    model.patch_embedding.to(dtype)
    model.eval().requires_grad_(False)

    def call(x: Tensor, timestep: Tensor, context: Tensor, clip_fea: Tensor | None = None) -> Tensor:
        image = {} if clip_fea is None else {"encoder_hidden_states_image": clip_fea}
        return model(x.to(dtype), timestep, context, return_dict=False, **image)[0]

    return call


def vaes(
    dim: int, names: Iterable[str], device: torch.device | str, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """VAEs by name, of `OURS` and `PEERS`, on the same random weights; arguments as of `random_vae`."""
    ours = random_vae(dim, device, dtype)
    return {name: ours if name == OURS else peer_vae(name, ours) for name in names}


def random_vae(dim: int, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """Our VAE with random weights.

    Args:
        dim: channels of the first level; 96 in the release.
        device, dtype: of the weights, and of what it is given.
    """
    from wan21.wan.vae import WanVAE

    return randomise(WanVAE(dim, device=device, dtype=dtype))


def peer_vae(name: str, ours: nn.Module) -> nn.Module:
    """The peer of this name on the weights of our VAE."""
    make = {"native": _native_vae, "diffusers": _diffusers_vae}[name]
    dim: Any = ours.dim
    return make(dim, ours.state_dict()).eval().requires_grad_(False)


def _native_vae(dim: int, weights: dict) -> nn.Module:
    from comfy.ldm.wan.vae import WanVAE

    levels = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]}
    with torch.device("meta"):
        model = WanVAE(dim=dim, z_dim=16, **levels)
    model.load_state_dict(weights, assign=True)
    return model


def _diffusers_vae(dim: int, weights: dict) -> nn.Module:
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    with torch.device("meta"):
        model = AutoencoderKLWan(base_dim=dim)
    model.load_state_dict(convert_wan_vae_to_diffusers(dict(weights)), assign=True)
    return model


def encode(vae: nn.Module, name: str, pixels: Tensor) -> Tensor:
    """Mean of the latent distribution of [B, 3, F, H, W] in [-1, 1], by the VAE of this name."""
    found = vae.encode(pixels)  # pyright: ignore[reportCallIssue]
    return found.latent_dist.mean if name == "diffusers" else found


def decode(vae: nn.Module, name: str, latent: Tensor) -> Tensor:
    """Pixels of raw latents [B, 16, T, h, w], by the VAE of this name; diffusers clamps them to [-1, 1]."""
    found = vae.decode(latent)  # pyright: ignore[reportCallIssue]
    return found.sample if name == "diffusers" else found


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm of `theirs`; where that is clamped to [-1, 1], ours is as well."""
    ours, theirs = ours.float(), theirs.float()
    if theirs.abs().max() <= 1:  # diffusers clamps decoded pixels
        ours = ours.clamp(-1, 1)
    return ((ours - theirs).norm() / theirs.norm()).item()
