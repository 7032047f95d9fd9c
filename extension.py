"""What the pack brings into ComfyUI: its nodes, its bundled models, the job API."""

from pathlib import Path

import folder_paths
from comfy_api.latest import ComfyExtension, io

from . import server
from .nodes.clips import Wan21JoinClips
from .nodes.image_to_video import Wan21ImageToVideo
from .nodes.load import Wan21ModelLoader, Wan21TextEncoderLoader, Wan21VAELoader
from .nodes.lora import Wan21LoraLoader
from .nodes.sampler import Wan21Sampler
from .nodes.upsample import Wan21SpatialUpsample, Wan21TemporalUpsample
from .nodes.vae_decode import Wan21VAEDecode
from .nodes.workers import Wan21Workers

MODELS = Path(__file__).parent / "models"  # the bundled small checkpoint


class Wan21Extension(ComfyExtension):
    """What the host asks the pack for, at start."""

    async def on_load(self) -> None:
        """Lists the bundled checkpoint after the user's own folders, and joins the host's web server."""
        for folder in sorted(path for path in MODELS.glob("*") if path.is_dir()):
            folder_paths.add_model_folder_path(folder.name, str(folder))
        server.mount()
        server.correct_answers()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Our nodes."""
        return [
            Wan21ModelLoader,
            Wan21TextEncoderLoader,
            Wan21VAELoader,
            Wan21LoraLoader,
            Wan21ImageToVideo,
            Wan21Workers,
            Wan21Sampler,
            Wan21VAEDecode,
            Wan21TemporalUpsample,
            Wan21SpatialUpsample,
            Wan21JoinClips,
        ]
