"""A video latent becomes frames."""

import torch
from comfy_api.latest import io

from .. import host
from . import checks
from .kept_latent import kept_until_done, video_latent
from .load import CATEGORY
from .named import named

NODE = "Wan21VAEDecode"


class Wan21VAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
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
    @named(NODE)
    def execute(cls, vae: host.VAE, latent: dict, tile_size: str) -> io.NodeOutput:
        checks.check_latent(latent["samples"])
        samples = video_latent(latent)
        checks.check_latent(samples)
        with kept_until_done(latent, "decode it with tile_size 128"):
            checks.check_vae(*host.vae_shape(vae))
            images = host.decode_video(vae, samples, tile_size, host.tell)
            images = torch.flatten(images, 0, 1)  # [B, F, H, W, 3] -> [B*F, H, W, 3]
        if spoilt := sum(not torch.isfinite(frame).all() for frame in images):
            host.tell(f"{spoilt} of {len(images)} frames hold NaN and will be black: {host.why_nan(vae)}")
        return io.NodeOutput(images)
