"""Model files of any size, and a host that lists them."""

from dataclasses import replace

import torch
from helpers_checkpoint import umt5_state_dict, write_sparse
from helpers_server import FakeHost
from torch import nn
from wan21.server import installed
from wan21.wan.config import WanConfig
from wan21.wan.dit import WanModel
from wan21.wan.vae import WanVAE

FOLDERS = {
    "Wan21ModelLoader": ("model_name", "diffusion_models"),
    "Wan21TextEncoderLoader": ("text_encoder_name", "text_encoders"),
    "Wan21VAELoader": ("vae_name", "vae"),
    "CLIPVisionLoader": ("clip_name", "clip_vision"),
}
# The names in the graph, which are the release's; the files that this pack brings.
RELEASE = {
    "model": "wan2.1_i2v_480p_14B_fp16.safetensors",
    "text_encoder": "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    "vae": "wan_2.1_vae.safetensors",
    "clip_vision": "clip_vision_h.safetensors",
}
TINY = {
    "model": "wan21-tiny-i2v.safetensors",
    "text_encoder": "wan21-tiny-umt5.safetensors",
    "vae": "wan21-tiny-vae.safetensors",
}
# As wide as the release's where partners are compared, small elsewhere.
I2V = WanConfig(in_dim=36, dim=256, ffn_dim=512, num_heads=2, num_layers=2, image_dim=1280)


def dit(**changes):
    """State dict of a DiT without memory."""
    with torch.device("meta"):
        return WanModel(replace(I2V, **changes), nn).state_dict()


EXPERT = {"image_dim": None}  # of Wan2.2
FLF2V = {"image_tokens": 514}
T2V = {"in_dim": 16, "image_dim": None}
TOY = {"text_dim": 128}


def vae(dim=96):
    with torch.device("meta"):
        return WanVAE(dim=dim).state_dict()


def umt5(d_model=4096, tokenizer=True):
    extra = {"spiece_model": torch.empty(10, dtype=torch.uint8, device="meta")} if tokenizer else {}
    return umt5_state_dict(d_model=d_model) | extra


def clip_vision(width=1280, layers=32, tokens=257):
    shapes = {"embeddings.class_embedding": (width,), "embeddings.position_embedding.weight": (tokens, width)}
    shapes |= {f"encoder.layers.{i}.layer_norm1.weight": (width,) for i in range(layers)}
    return {f"vision_model.{key}": torch.empty(shape, device="meta") for key, shape in shapes.items()}


class Shelf(FakeHost):
    """A host that lists what lies in the user's folders, and then what this pack brings.

    Args:
        bundled: whether it brings anything.
    """

    def __init__(self, folder, bundled=True):
        self.own = folder / "own"
        super().__init__(folder, self.own)
        self.shelves = [self.own, *([installed.BUNDLED] if bundled else [])]
        plain = FakeHost.node_inputs
        self.node_inputs = lambda kind: self._list(*FOLDERS[kind]) if kind in FOLDERS else plain(kind)

    def _list(self, name, folder):
        paths = [path for shelf in self.shelves for path in sorted((shelf / folder).glob("*"))]
        return {name: {"type": "COMBO", "options": [path.name for path in paths if path.is_file()]}}

    def model_path(self, folder, name):
        found = [shelf / folder / name for shelf in self.shelves if (shelf / folder / name).exists()]
        if not found:
            raise FileNotFoundError(name)
        return found[0]

    def put_release(self, *parts):
        """Installs files of the release's widths under the names of the graph."""
        made = {"model": dit, "text_encoder": umt5, "vae": vae, "clip_vision": clip_vision}
        for part in parts:
            self.put_file(part, RELEASE[part], made[part]())

    def put_file(self, part, name, state_dict, **kwargs):
        """Installs a file of the user's."""
        return write_sparse(self.own / installed.FOLDERS[part] / name, state_dict, **kwargs)
