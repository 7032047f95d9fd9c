"""Pictures from clients, decoded within limits and written as PNG for the graph."""

from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 64_000_000
MAX_SIDE = 16_384


def write_png(source: Path, target: Path) -> None:
    """Writes a picture as an 8-bit RGB PNG without metadata, turned as its EXIF data says. Blocking.

    An animation gives its first frame; transparent pixels are blended over black.

    Args:
        source: a file in one of `FORMATS`.
        target: the file to write, in a folder that is made.

    Raises:
        ValueError: not such a picture, damaged, or larger than `MAX_PIXELS` or `MAX_SIDE`, which the header
            tells before any pixel is decoded.
    """
    try:
        with Image.open(source, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
                raise ValueError(
                    f"the picture has {width}x{height} pixels; the most are {MAX_PIXELS:,} in all "
                    f"and {MAX_SIDE:,} a side"
                )
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits; convert("RGB") would clip them at 255
                upright = upright.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
            if upright.has_transparency_data:
                rgba = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
            target.parent.mkdir(parents=True, exist_ok=True)
            clean = Image.new("RGB", upright.size)
            clean.paste(upright.convert("RGB"))  # without the metadata of the original
            clean.save(target, "PNG", compress_level=1)
    except UnidentifiedImageError:
        raise ValueError(f"not a picture in one of the formats {', '.join(FORMATS)}") from None
    except ValueError:
        raise
    except Exception as error:  # of damaged metadata Pillow raises struct.error, TypeError and others
        raise ValueError(f"the picture cannot be decoded: {error}") from error
