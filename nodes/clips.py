"""Two clips into one, the second of which goes on from the last frames of the first."""

import logging
import time

from comfy_api.latest import io
from torch import Tensor

from .. import host
from ..frames.clips import BLENDS, join_clips
from ..frames.color import MAX_GAIN, MAX_SHIFT, ColorMatch, match_colors
from ..wan.refusal import Refusal
from . import checks
from .load import CATEGORY
from .named import named

NODE = "Wan21JoinClips"
MAX_OVERLAP = 4096
COLOR_COPIES = 32  # float32 copies of a frame that a change of its colours takes at most
log = logging.getLogger(__name__)


class Wan21JoinClips(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE,
            display_name="Wan2.1 Join Clips",
            category=CATEGORY,
            description="Join two clips, the second of which goes on from the last frames of the first.",
            search_aliases=[
                "concatenate video",
                "join videos",
                "extend video",
                "long video",
                "crossfade",
                "merge clips",
                "color match",
            ],
            inputs=[
                io.Image.Input("images_1"),
                io.Image.Input("images_2"),
                io.Int.Input(
                    "overlap",
                    default=1,
                    min=0,
                    max=MAX_OVERLAP,
                    tooltip="Frames that both clips show: as many as the second took for its start_image. "
                    "The result has so many fewer than both together; 0 puts one behind the other.",
                ),
                io.Combo.Input(
                    "blend",
                    options=list(BLENDS),
                    default="linear",
                    tooltip="Over the overlap: linear fades in even steps, smooth slower at both ends; cut "
                    "keeps the frames of the first clip.",
                ),
                io.Boolean.Input(
                    "match_color",
                    default=False,
                    tooltip="Give all of images_2 the colours and contrast that images_1 has in the overlap, "
                    "within bounds.",
                ),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def validate_inputs(
        cls, overlap: int | None = None, blend: str | None = None, match_color: bool | None = None
    ) -> bool:
        """Refuses what cannot be when the prompt is queued (a linked input arrives as None).

        What is no number is refused by the host, and arrives here all the same.
        """
        check_options(overlap if isinstance(overlap, int) else None, blend, match_color)
        return True

    @classmethod
    @named(NODE)
    def execute(
        cls, images_1: Tensor, images_2: Tensor, overlap: int, blend: str, match_color: bool
    ) -> io.NodeOutput:
        check_options(overlap, blend, match_color)
        check_clips(images_1, images_2, overlap)
        started, frames = time.perf_counter(), len(images_1) + len(images_2) - overlap
        if images_1.device.type == "cpu":
            host.need_host_bytes(
                frames * max(images_1[0].nbytes, images_2[0].nbytes),
                f"{frames} frames of {_size(images_1)}",
                "Save the clips and join the files, or make them smaller",
            )
        recolor = _color_match(images_1, images_2, overlap) if match_color else None
        result = join_clips(images_1, images_2, overlap, blend, recolor, host.Progress())
        log.info(
            "%s: %d and %d frames of %s -> %d, overlap %d, %s%s, %.1f s", NODE, len(images_1), len(images_2),
            _size(images_1), frames, overlap, blend, ", colours matched" * match_color,
            time.perf_counter() - started,
        )  # fmt: skip
        return io.NodeOutput(result)


def check_options(overlap: int | None, blend: str | None, match_color: bool | None) -> None:
    """Whether the settings go together; None where a value is not known yet."""
    if overlap is not None and not 0 <= overlap <= MAX_OVERLAP:
        raise Refusal(
            f"overlap is {overlap}; both clips show 0 to {MAX_OVERLAP} frames",
            "Set the number of frames that the second clip took for its start_image",
        )
    if blend is not None and blend not in BLENDS:
        raise Refusal(f"blend is {blend!r}; it is one of {', '.join(BLENDS)}", "Choose one of them")
    if overlap == 0 and match_color:
        raise Refusal(
            "match_color is on and overlap is 0: no frame is in both clips",
            "Set overlap to 1 or more, or turn match_color off",
        )


def check_clips(images_1: Tensor, images_2: Tensor, overlap: int) -> None:
    """Whether two IMAGEs [F, H, W, 3] can be joined."""
    clips = (("images_1", images_1), ("images_2", images_2))
    for name, images in clips:
        checks.check_shape(images, name)
    if images_1.shape[1:] != images_2.shape[1:]:
        raise Refusal(
            f"images_1 is {_size(images_1)} and images_2 is {_size(images_2)}; joined clips have one size",
            "Make the second clip at the size of the first, or resize one of them with ImageScale",
        )
    for name, images in clips:
        if overlap > len(images):
            raise Refusal(
                f"overlap is {overlap} and {name} holds {len(images)} frame(s); a clip has the overlap in it",
                f"Set overlap to {len(images)} or less, the frames that the second clip took for its "
                "start_image",
            )
    for name, images in clips:
        checks.check_finite_frames(images, name)


def _color_match(images_1: Tensor, images_2: Tensor, overlap: int) -> ColorMatch:
    """The change of colour for `images_2`; bounds that were met are told."""
    device = host.frame_device(COLOR_COPIES * 4 * images_2[0].numel())
    last = images_1[len(images_1) - overlap :]
    match = match_colors(images_2[:overlap], last, device, host.check_cancelled)
    if match.limited:
        host.tell(
            "the colours of images_2 are further from those of images_1 than is matched: contrast changes "
            f"{MAX_GAIN:g} times and a mean {MAX_SHIFT:g} units of L*a*b* at most. Is overlap the number of "
            "frames that both show?"
        )
    return match


def _size(images: Tensor) -> str:
    return f"{images.shape[2]}x{images.shape[1]}"
