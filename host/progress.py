"""Progress, preview and cancel of the node that runs."""

import logging
from contextlib import contextmanager
from contextvars import ContextVar

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import latent_preview
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy_execution.utils import get_executing_context
from PIL import Image

PREVIEW_FRAMES = 5
TINY_DECODERS = ("taew2_1", "lighttaew2_1")  # TAEHV, by how its files begin


def check_cancelled():
    """Raise the host's interrupt when the user has cancelled the job."""
    comfy.model_management.throw_exception_if_processing_interrupted()


_speaker = ContextVar("speaker", default="Wan2.1:")


@contextmanager
def speaking_as(node: str):
    """In this block the node is named in the log before what `tell` says."""
    token = _speaker.set(node)
    try:
        yield
    finally:
        _speaker.reset(token)


def tell(sentence: str) -> None:
    """Put a sentence on the node that runs, in the editor, and into the host's log."""
    logging.info("%s %s", _speaker.get(), sentence)
    context = get_executing_context()
    if context is not None:
        from server import PromptServer  # no server runs where nodes are called from a script

        server = PromptServer.instance
        server.send_progress_text(sentence, context.node_id, server.client_id)


class Progress:
    """`progress(done, total)` for the node that runs: moves its bar and stops on cancel."""

    def __init__(self):
        self.bar = comfy.utils.ProgressBar(1)

    def __call__(self, done, total):
        self.bar.update_absolute(done, total)
        check_cancelled()


def previewer_for(model):
    """What the host makes previews with; None when they are off.

    The host's `taesd` method looks for one of the tiny decoders of Wan2.1 only, and takes one in float16 for
    HunyuanVideo's, whose latents are scaled. Here any of them serves, in float32 as read.
    """
    if args.preview_method == LatentPreviewMethod.TAESD:
        for name in folder_paths.get_filename_list("vae_approx"):
            if name.startswith(TINY_DECODERS):
                path = folder_paths.get_full_path_or_raise("vae_approx", name)
                weights = comfy.utils.load_torch_file(path, safe_load=True)
                tiny = comfy.sd.VAE(sd={key: tensor.float() for key, tensor in weights.items()})
                tiny.throw_exception_if_invalid()
                return TinyPreviewer(tiny)
    return latent_preview.get_previewer(model.load_device, model.model.latent_format)


class TinyPreviewer:
    """Frames by a tiny decoder, past the host's manager, which would take weights off the device for it."""

    def __init__(self, vae):
        self.vae = vae
        self.model = vae.first_stage_model

    def decode_latent_to_preview(self, x0):
        x0 = x0[:1, :, :1].float()
        self.model.to(x0.device)
        frame = self.vae.process_output(self.model.decode(x0))[0, :, 0].movedim(0, -1)  # (H, W, 3)
        return latent_preview.preview_to_image(frame, do_scale=False)


class StepProgress:
    """`on_step(i, x0)`: moves the node's bar and sends a strip of frames of the current estimate."""

    def __init__(self, model, steps):
        self.steps = steps
        self.bar = comfy.utils.ProgressBar(steps)
        try:
            self.previewer = previewer_for(model)
        except Exception as error:  # a picture to look at must not cost the run
            tell(f"makes no previews in this run ({error})")
            self.previewer = None

    def __call__(self, i, x0):
        preview = None
        if self.previewer is not None:
            try:
                preview = ("JPEG", self.strip(x0), latent_preview.MAX_PREVIEW_RESOLUTION)
            except Exception as error:  # as above
                tell(f"makes no more previews in this run ({error})")
                self.previewer = None
        self.bar.update_absolute(i + 1, self.steps, preview)
        check_cancelled()

    def strip(self, x0):
        count = min(PREVIEW_FRAMES, x0.shape[2])
        if isinstance(self.previewer, latent_preview.Latent2RGBPreviewer):
            x0 = x0[:1].float().cpu()  # the host would read pixels of a GPU before they have arrived
        at = torch.linspace(0, x0.shape[2] - 1, count).round().int().tolist()
        frames = [self.previewer.decode_latent_to_preview(x0[:1, :, t : t + 1]) for t in at]
        strip = Image.new("RGB", (sum(f.width for f in frames), frames[0].height))
        left = 0
        for frame in frames:
            strip.paste(frame, (left, 0))
            left += frame.width
        return strip
