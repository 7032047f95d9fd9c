"""Pictures from clients, decoded within limits and written as PNG for the graph."""

import io
import time
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from .problems import disk_is_full

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 64_000_000
MAX_SIDE = 16_384
DECODE_SECONDS = 10  # of the decoder's own time, which others wait for; 64 million pixels take up to 3
PIECE_BYTES = 4096  # of a JPEG decoded at a time: some hundred scans of its whole picture fit into 64 KB

ORIENTATION, TURN = 0x0112, Image.Transpose  # of EXIF
ON_SIDE = (TURN.TRANSPOSE, TURN.ROTATE_270, TURN.TRANSVERSE, TURN.ROTATE_90)
TURNS = dict(zip(range(2, 9), (TURN.FLIP_LEFT_RIGHT, TURN.ROTATE_180, TURN.FLIP_TOP_BOTTOM, *ON_SIDE)))
STRIP_PIXELS = 2_000_000  # converted at a time: a decoded picture is never held in several copies
SPARE = 2  # times the sides of the video are kept: what is cut by then is cut by whole factors
LEAST_SIDE = 512  # for CLIP vision, however small the video is


def write_png(source: Path, target: Path, size: tuple[int, int]) -> None:
    """Writes a picture as an 8-bit RGB PNG without metadata, turned as its EXIF data says. Blocking.

    An animation gives its first frame; transparent pixels are blended over black. A picture of at least four
    times the video's sides is made smaller by a whole factor, so that twice the sides are left.

    Args:
        source: a file in one of `FORMATS`.
        target: the file to write, in a folder that is made.
        size: (width, height) of the video.

    Raises:
        ValueError: not such a picture, damaged, one that takes more than `DECODE_SECONDS`, or larger than
            `MAX_PIXELS` or `MAX_SIDE`, which the header tells before any pixel is decoded.
    """
    try:
        with _InTime(source) as file, Image.open(file, formats=FORMATS) as image:
            image.decodermaxblock = PIECE_BYTES
            width, height = image.size
            if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
                raise ValueError(
                    f"the picture has {width}x{height} pixels; the most are {MAX_PIXELS:,} in all "
                    f"and {MAX_SIDE:,} a side"
                )
            turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
            sides = (size[1], size[0]) if turn in ON_SIDE else size
            factor = _factor(image.size, sides)
            image.draft(None, (width // factor, height // factor))  # a JPEG is decoded smaller
            clean = _smaller(image, _factor(image.size, sides))
            clean = clean if turn is None else clean.transpose(turn)
            target.parent.mkdir(parents=True, exist_ok=True)
            clean.save(target, "PNG", compress_level=1)
    except UnidentifiedImageError:
        raise ValueError(f"not a picture in one of the formats {', '.join(FORMATS)}") from None
    except ValueError:
        raise
    except OSError as error:
        if disk_is_full(error):
            raise  # not the picture's fault
        raise ValueError(f"the picture cannot be decoded: {error}") from error
    except Exception as error:  # of damaged metadata Pillow raises struct.error, TypeError and others
        raise ValueError(f"the picture cannot be decoded: {error}") from error


class _InTime(io.BufferedReader):
    """A file that is read for a time: a JPEG of a few MB may hold scans that take hours to decode."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path))
        self._ends = time.thread_time() + DECODE_SECONDS

    def read(self, size: int | None = -1) -> bytes:
        if time.thread_time() > self._ends:
            raise ValueError(f"the picture takes more than {DECODE_SECONDS} s to decode; save it anew")
        return super().read(size)


def _factor(size: tuple[int, int], video: tuple[int, int]) -> int:
    """By how much both sides of a picture can be divided."""
    return max(1, min(side // max(SPARE * other, LEAST_SIDE) for side, other in zip(size, video)))


def _smaller(image: Image.Image, factor: int) -> Image.Image:
    """A picture in RGB over black, its sides divided by a factor, strip by strip."""
    width, height = image.size
    image.load()
    small = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    rows = max(1, STRIP_PIXELS // width // factor) * factor
    for top in range(0, height, rows):
        strip = _in_rgb(image.crop((0, top, width, min(top + rows, height))))
        small.paste(strip.reduce(factor) if factor > 1 else strip, (0, top // factor))
    return small


def _in_rgb(strip: Image.Image) -> Image.Image:
    if strip.mode.startswith("I"):  # 16 bits; convert("RGB") would clip them at 255
        strip = strip.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if strip.has_transparency_data:
        rgba = strip.convert("RGBA")
        strip = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    return strip.convert("RGB")
