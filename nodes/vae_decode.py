"""A video latent becomes frames."""

from contextlib import contextmanager

import torch
from comfy_api.latest import io

from ..wan import preflight
from ..wan.conditioning import END_LATENT_ALONE, SAMPLING_SECONDS
from . import host
from .load import CATEGORY

NODE = "Wan21VAEDecode"
WORTH_KEEPING = 60  # seconds of sampling


class Wan21VAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=NODE,
            display_name="Wan2.1 VAE Decode",
            category=CATEGORY,
            description="Decode a video latent, streamed straight into the frames it returns.",
            search_aliases=["vae decode", "wan decode", "decode tiled"],
            inputs=[
                io.Vae.Input("vae"),
                io.Latent.Input("latent"),
                io.Combo.Input(
                    "tile_size",
                    options=["auto", "0", "128", "256"],
                    default="auto",
                    tooltip="Pixels of a tile; 0 decodes whole frames, auto does so where the free memory "
                    "allows. Tiles have no seam and do not flicker; they need less memory and more time.",
                ),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, vae, latent, tile_size) -> io.NodeOutput:
        samples = latent["samples"]
        preflight.check_vae(NODE, *host.vae_shape(vae))
        preflight.check_latent(NODE, samples, multiple=8)
        if latent.get(END_LATENT_ALONE):
            samples = samples[:, :, :-1]  # the end image itself: a guide, not a frame
            preflight.check_latent(NODE, samples, multiple=8)
        with kept_until_decoded(samples, latent.get(SAMPLING_SECONDS, 0)):
            images = host.decode_video(vae, samples, tile_size, lambda sentence: host.tell(NODE, sentence))
        return io.NodeOutput(torch.flatten(images, 0, 1))  # [B, F, H, W, 3] -> [B*F, H, W, 3]


@contextmanager
def kept_until_decoded(samples, seconds):
    """Keeps a latent that took long in a file until the block has succeeded; an error names the file.

    It is written first, so that a crash of the whole host leaves it as well.
    """
    if seconds <= WORTH_KEEPING:
        yield
        return
    try:
        kept = host.KeptLatent(samples)
    except OSError as error:
        host.tell(NODE, f"could not keep the latent in the output folder ({error}); decodes without")
        yield
        return
    try:
        yield
    except Exception as error:
        raise RuntimeError(
            f"{NODE}: {str(error).rstrip('.')}. The latent ({seconds / 60:.0f} min of sampling) is kept in "
            f"{kept.path}. To resume: move it to ComfyUI's input folder, load it with LoadLatent, and decode "
            "it with tile_size 128."
        ) from error
    except BaseException:  # the host's cancel
        host.tell(NODE, f"cancelled; the latent is kept in {kept.path}")
        raise
    kept.remove()
