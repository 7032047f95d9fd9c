"""Progress, preview and cancel of the node that runs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import latent_preview
import torch
import torch.nn.functional as F
from comfy.cli_args import LatentPreviewMethod, args
from comfy.model_patcher import ModelPatcher
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from ..wan.files.bad_file import listed
from ..wan.files.kinds import addition_in
from ..wan.refusal import printable

PREVIEW_FRAMES = 5
TINY_DECODERS = ("taew2_1", "lighttaew2_1")  # file names of TAEHV for Wan2.1 begin with these


def check_cancelled() -> None:
    """Raises the host's interrupt when the user has cancelled the job."""
    comfy.model_management.throw_exception_if_processing_interrupted()


class _Speaker(NamedTuple):
    """Who speaks, and what was said since its node began."""

    name: str
    said: list[str]


_speaker: ContextVar[_Speaker | None] = ContextVar("speaker", default=None)


@contextmanager
def speaking_as(node: str) -> Iterator[None]:
    """Inside, the log has the node's name before what `tell` says, and the node shows all of it."""
    token = _speaker.set(_Speaker(node, []))
    try:
        yield
    finally:
        _speaker.reset(token)


def tell(sentence: str) -> None:
    """Puts a sentence on the node that runs, below those it said before, and into the host's log.

    What one run of a node has said is not said again.
    """
    sentence = printable(sentence)
    name, said = _speaker.get() or _Speaker("Wan2.1:", [])
    if sentence in said:
        return
    said.append(sentence)
    logging.info("%s %s", name, sentence)
    context = get_executing_context()
    if context is not None:
        # Imported here: scripts call nodes without a server.
        from server import PromptServer  # pyright: ignore[reportAttributeAccessIssue] (not our server/)

        server = PromptServer.instance
        # The editor puts the text in place of the last one.
        server.send_progress_text("\n".join(said), context.node_id, server.client_id)


def tell_left_out(name: str, keys: list[str]) -> str:
    """Says which keys of a file the model has no place for, if there are any; gives the sentence."""
    if not keys:
        return ""
    sentence = f"{name}: {len(keys)} keys are no part of the model and are left out: {listed(keys)}"
    if addition := addition_in(keys):
        sentence += (
            f". By them the file is or holds {addition.what}: what they add is not used, the plain Wan model "
            "runs, as with ComfyUI's own loader"
        )
    tell(sentence)
    return sentence


class Progress:
    """`progress(done, total)` for the node that runs: moves its bar and stops on cancel."""

    def __init__(self):
        self.bar = comfy.utils.ProgressBar(1)

    def __call__(self, done: int, total: int) -> None:
        self.bar.update_absolute(done, total)
        check_cancelled()


def with_neighbours(latents: Tensor) -> Tensor:
    """[B, C, ..., h, w] -> [B, 9 C, ..., h, w]: each latent pixel's 3x3, nine for a channel, row by row.

    `latent_rgb_factors_reshape` of a model whose file tells a colour of each of them.
    """
    planes = latents.movedim(1, -3).flatten(0, -4)  # [B ..., C, h, w]
    height, width = latents.shape[-2:]
    planes = F.unfold(F.pad(planes, (1, 1, 1, 1), mode="replicate"), 3)  # [B ..., 9 C, h w]
    return planes.view(len(latents), *latents.shape[2:-2], -1, height, width).movedim(-3, 1)


def previewer_for(model: ModelPatcher) -> "latent_preview.LatentPreviewer | TinyPreviewer | None":
    """The maker of previews for a MODEL of ours; None when they are off.

    The host's `taesd` method looks for one of the tiny decoders of Wan2.1 only, and takes one in float16 for
    HunyuanVideo's, whose latents are scaled. Here any of them serves, in float32 as read.
    """
    if args.preview_method == LatentPreviewMethod.TAESD:
        for name in folder_paths.get_filename_list("vae_approx"):
            if name.startswith(TINY_DECODERS):
                path = folder_paths.get_full_path_or_raise("vae_approx", name)
                weights: Any = comfy.utils.load_torch_file(path, safe_load=True)
                tiny = comfy.sd.VAE(sd={key: tensor.float() for key, tensor in weights.items()})
                tiny.throw_exception_if_invalid()
                return TinyPreviewer(tiny)
    return latent_preview.get_previewer(model.load_device, model.model.latent_format)


class TinyPreviewer:
    """Frames by a tiny decoder, past the host's manager, which would take weights off the device for it."""

    def __init__(self, vae: comfy.sd.VAE):
        self.vae = vae
        self.model: Any = vae.first_stage_model

    def decode_latent_to_preview(self, x0: Tensor) -> Image.Image:
        """The first frame of a normalised latent [B, 16, T, h, w]."""
        x0 = x0[:1, :, :1].float()
        self.model.to(x0.device)
        frame = self.vae.process_output(self.model.decode(x0))[0, :, 0].movedim(0, -1)  # (H, W, 3)
        return latent_preview.preview_to_image(frame, do_scale=False)


class StepProgress:
    """`on_step(i, x0)`: moves the node's bar and sends a strip of frames of the current estimate.

    What is shown last stays on the node, so `finished` puts the result there.

    Args:
        model: a MODEL of ours.
        steps: of the whole run.
    """

    def __init__(self, model: ModelPatcher, steps: int):
        self.steps = steps
        self.bar = comfy.utils.ProgressBar(steps)
        try:
            self.previewer = previewer_for(model)
        except Exception as error:  # a picture to look at must not cost the run
            tell(f"makes no previews in this run ({error})")
            self.previewer = None

    def __call__(self, i: int, x0: Tensor) -> None:
        self.show(i + 1, x0)
        check_cancelled()

    def finished(self, x0: Tensor) -> None:
        """Shows the finished latent, normalised: without a guide frame, under its mask."""
        if self.previewer is not None:
            self.show(self.steps, x0)

    def show(self, done: int, x0: Tensor) -> None:
        preview = None
        if self.previewer is not None:
            try:
                preview = ("JPEG", self.strip(x0), latent_preview.MAX_PREVIEW_RESOLUTION)
            except Exception as error:  # as in __init__
                tell(f"makes no more previews in this run ({error})")
                self.previewer = None
        self.bar.update_absolute(done, self.steps, preview)

    def strip(self, x0: Tensor) -> Image.Image:
        """Frames spread over a latent [B, 16, T, h, w], side by side."""
        previewer: Any = self.previewer
        count = min(PREVIEW_FRAMES, x0.shape[2])
        if isinstance(previewer, latent_preview.Latent2RGBPreviewer):
            x0 = x0[:1].float().cpu()  # the host's copy from the GPU does not block, and it reads at once
        at = torch.linspace(0, x0.shape[2] - 1, count).round().int().tolist()
        frames = [previewer.decode_latent_to_preview(x0[:1, :, t : t + 1]) for t in at]
        strip = Image.new("RGB", (sum(f.width for f in frames), frames[0].height))
        left = 0
        for frame in frames:
            strip.paste(frame, (left, 0))
            left += frame.width
        return strip
