"""Moving pictures for pages: frames of a video with what it was made of, in a file that browsers play."""

import io
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

FRAME_MS, FIRST_MS, LAST_MS = 80, 700, 700  # how long a frame is shown; the first and the last stay
QUALITIES = (86, 80, 72, 64, 54, 44)
EDGE = 8  # pixels between what is drawn over a picture and its edge
INK, PAPER = "white", (20, 20, 24)


@dataclass(frozen=True)
class Card:
    """What is drawn over the frames of a video.

    Attributes:
        label: words in the upper left corner.
        caption: words at the bottom.
        inputs: what the video was made of: each a list of frames (one for a still), small above the caption.
    """

    label: str = ""
    caption: str = ""
    inputs: list[list[Image.Image]] = field(default_factory=list)


def drawn(frames, card, side):
    """The frames [Pillow images] as squares of `side` pixels with the card over them."""
    return [_drawn(frame, card, side, index) for index, frame in enumerate(frames)]


def _drawn(frame, card, side, index):
    picture = frame.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(picture)
    if card.label:
        _words(draw, (EDGE, EDGE), card.label, side // 16, "la")
    bottom = side - EDGE
    if card.caption:
        bottom = _words(draw, (EDGE, bottom), card.caption, side // 18, "ld") - EDGE
    small = side // 4
    for place, source in enumerate(card.inputs):
        still = source[min(index, len(source) - 1)].convert("RGB").resize((small, small))
        left, top = EDGE + place * (small + EDGE), bottom - small
        draw.rectangle((left - 2, top - 2, left + small + 1, top + small + 1), fill=INK)
        picture.paste(still, (left, top))
    return picture


def _words(draw, place, text, size, anchor):
    """Write on a dark ground, with `anchor` (Pillow's) at `place`; return the upper edge of the ground."""
    font = ImageFont.load_default(size)
    pad = size // 3
    at = place[0] + pad, place[1] + (pad if anchor == "la" else -pad)
    left, top, right, bottom = draw.textbbox(at, text, font=font, anchor=anchor)
    box = (left - pad, top - pad, right + pad, bottom + pad)
    draw.rounded_rectangle(box, radius=pad, fill=PAPER)
    draw.text(at, text, font=font, fill=INK, anchor=anchor)
    return box[1]


def webp(frames, most_bytes, frame_ms=FRAME_MS):
    """Bytes of an endless animated WebP of at most `most_bytes`, in the best quality that fits."""
    times = [FIRST_MS, *[frame_ms] * (len(frames) - 2), LAST_MS]
    for quality in QUALITIES:
        data = io.BytesIO()
        options = {"duration": times, "loop": 0, "quality": quality, "method": 6}
        frames[0].save(data, "WEBP", save_all=True, append_images=frames[1:], **options)
        if data.tell() <= most_bytes:
            return data.getvalue()
    raise ValueError(f"{len(frames)} frames take more than {most_bytes} bytes at quality {QUALITIES[-1]}")
