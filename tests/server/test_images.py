"""Pictures from clients."""

import io
import struct

import pytest
from PIL import Image
from wan21.server import images
from wan21.server.images import write_png


def save(path, image, kind, **options):
    image.save(path, kind, **options)
    return path


def test_exif_turns_the_picture_and_metadata_go(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees
    exif[0x010E] = "secret"
    source = save(tmp_path / "a.jpg", Image.new("RGB", (30, 20), "red"), "JPEG", exif=exif)
    write_png(source, tmp_path / "out" / "a.png")
    with Image.open(tmp_path / "out" / "a.png") as written:
        assert (
            written.size == (20, 30) and written.mode == "RGB" and not written.info and not written.getexif()
        )


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("L", 200, (200, 200, 200)),
        ("LA", (200, 255), (200, 200, 200)),
        ("LA", (200, 0), (0, 0, 0)),
        ("P", 1, (10, 200, 30)),
        ("RGBA", (10, 200, 30, 255), (10, 200, 30)),
        ("RGBA", (10, 200, 30, 0), (0, 0, 0)),
        ("RGBA", (20, 200, 40, 128), (10, 100, 20)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
        ("I;16", 200 * 257, (200, 200, 200)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb_over_black(tmp_path, mode, colour, expected):
    picture = Image.new(mode, (16, 16), colour)
    if mode == "P":
        picture.putpalette([0, 0, 0, 10, 200, 30])
    kind = "JPEG" if mode == "CMYK" else "PNG"
    write_png(save(tmp_path / "a", picture, kind), tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as written:
        assert written.mode == "RGB"
        assert written.getpixel((8, 8)) == pytest.approx(expected, abs=2 if kind == "JPEG" else 1)


def test_sixteen_bits_are_scaled(tmp_path):
    grey = Image.new("I;16", (256, 1))
    for x in range(256):
        grey.putpixel((x, 0), x * 257)
    write_png(save(tmp_path / "a.png", grey, "PNG"), tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as written:
        assert [written.getpixel((x, 0)) for x in range(256)] == [(x, x, x) for x in range(256)]


@pytest.mark.parametrize("error", [struct.error("not an integer"), TypeError("bad operand")])
def test_whatever_damaged_metadata_raises_is_the_pictures_fault(tmp_path, monkeypatch, error):
    """Met with random bytes in EXIF data; which ones changes with Pillow's version."""

    def fail(_):
        raise error

    monkeypatch.setattr(images.ImageOps, "exif_transpose", fail)
    with pytest.raises(ValueError, match="cannot be decoded"):
        write_png(save(tmp_path / "a.png", Image.new("L", (2, 2)), "PNG"), tmp_path / "b.png")


def test_too_many_pixels_are_refused_by_the_header(tmp_path, monkeypatch):
    source = save(tmp_path / "a.png", Image.new("L", (200, 100)), "PNG")
    monkeypatch.setattr(images, "MAX_PIXELS", 19_999)
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("pixels were decoded"))
    with pytest.raises(ValueError, match="200x100"):
        write_png(source, tmp_path / "b.png")


def test_what_is_no_picture_is_refused(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"
    for data in (b"", b"<svg/>", b"GIF89a", buffer.getvalue()[:60], postscript):
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(ValueError):
            write_png(tmp_path / "a", tmp_path / "b.png")
        assert not (tmp_path / "b.png").exists()
