"""The ComfyUI layer: one file per station of the road, and the list of node classes."""

from comfy_api.latest import ComfyExtension, io

from .image_to_video import Wan21ImageToVideo
from .load import Wan21ModelLoader, Wan21TextEncoderLoader, Wan21VAELoader
from .sampler import Wan21Sampler
from .vae_decode import Wan21VAEDecode


class Wan21Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            Wan21ModelLoader,
            Wan21TextEncoderLoader,
            Wan21VAELoader,
            Wan21ImageToVideo,
            Wan21Sampler,
            Wan21VAEDecode,
        ]
