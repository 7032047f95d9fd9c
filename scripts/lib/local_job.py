"""A sampling job in this process, without a server: our loaders and nodes on files on disk."""

from dataclasses import dataclass

from . import pack

pack.load_pack()
pack.load_host()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from wan21 import host  # noqa: E402
from wan21.nodes.image_to_video import Wan21ImageToVideo  # noqa: E402
from wan21.wan.conditioning import latent_frames  # noqa: E402

PROMPT = "The camera moves slowly closer while the wind moves what it can move."
NEGATIVE = "blurry, overexposed, static, low quality, deformed, cluttered background"


@dataclass
class Files:
    """Paths of one model's files; the VAE may be None for text-to-video."""

    model: str
    text_encoder: str
    vae: str | None = None


def add_job_arguments(parser, steps):
    """The arguments that say what is sampled."""
    parser.add_argument("--image", default=str(pack.comfyui_path() / "input" / "example.png"), help="for i2v")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--num-frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--flow-shift", type=float, default=5.0)
    parser.add_argument("--solver", default="unipc")


class LocalJob:
    """Loaded models and the conditioning of prompts.

    Args:
        files: Files.
        args: what `add_job_arguments` reads.
    """

    def __init__(self, files, args):
        self.args = args
        self.model = host.load_model(files.model)
        self.vae = host.load_vae(files.vae) if files.vae else None
        self.text_encoder = host.load_text_encoder(files.text_encoder)
        self.config = host.config_of(self.model)
        if self.config.takes_image and self.vae is None:
            raise SystemExit("An image-to-video model needs its VAE: give --vae.")

    def conditioning(self, prompt):
        """-> (positive, negative, latent) as the nodes hand them on."""
        encode = self.text_encoder
        prompts = [encode.encode_from_tokens_scheduled(encode.tokenize(t)) for t in (prompt, NEGATIVE)]
        args = self.args
        if not self.config.takes_image:
            shape = (1, 16, latent_frames(args.num_frames), args.height // 8, args.width // 8)
            return *prompts, {"samples": torch.zeros(shape)}
        pixels = np.asarray(Image.open(args.image).convert("RGB"), dtype=np.float32) / 255
        return Wan21ImageToVideo.execute(
            *prompts,
            self.vae,
            start_image=torch.from_numpy(pixels)[None],
            width=args.width,
            height=args.height,
            num_frames=args.num_frames,
            resize_mode="crop",
            add_frames_for_end_image=False,
            tile_size="auto",
        ).result
