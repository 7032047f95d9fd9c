"""Our VAE inside a standard VAE."""

from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd

from ...wan import checkpoint
from ...wan.vae import WanVAE
from .model import DTYPES
from .progress import Progress


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


def latent_device():
    """Where the host keeps latents between nodes."""
    return comfy.model_management.intermediate_device()
