"""Pictures from clients."""

import io
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageOps
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
    write_png(source, tmp_path / "out" / "a.png", (64, 64))
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
    write_png(save(tmp_path / "a", picture, kind), tmp_path / "b.png", (64, 64))
    with Image.open(tmp_path / "b.png") as written:
        assert written.mode == "RGB"
        assert written.getpixel((8, 8)) == pytest.approx(expected, abs=2 if kind == "JPEG" else 1)


def test_sixteen_bits_are_scaled(tmp_path):
    grey = Image.new("I;16", (256, 1))
    for x in range(256):
        grey.putpixel((x, 0), x * 257)
    write_png(save(tmp_path / "a.png", grey, "PNG"), tmp_path / "b.png", (64, 64))
    with Image.open(tmp_path / "b.png") as written:
        assert [written.getpixel((x, 0)) for x in range(256)] == [(x, x, x) for x in range(256)]


@pytest.mark.parametrize("error", [struct.error("not an integer"), TypeError("bad operand")])
def test_whatever_damaged_metadata_raises_is_the_pictures_fault(tmp_path, monkeypatch, error):
    """Met with random bytes in EXIF data; which ones changes with Pillow's version."""

    def fail(_):
        raise error

    monkeypatch.setattr(Image.Image, "getexif", fail)
    with pytest.raises(ValueError, match="cannot be decoded"):
        write_png(save(tmp_path / "a.png", Image.new("L", (2, 2)), "PNG"), tmp_path / "b.png", (64, 64))


def test_too_many_pixels_are_refused_by_the_header(tmp_path, monkeypatch):
    source = save(tmp_path / "a.png", Image.new("L", (200, 100)), "PNG")
    monkeypatch.setattr(images, "MAX_PIXELS", 19_999)
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("pixels were decoded"))
    with pytest.raises(ValueError, match="200x100"):
        write_png(source, tmp_path / "b.png", (64, 64))


def test_what_is_no_picture_is_refused(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"
    for data in (b"", b"<svg/>", b"GIF89a", buffer.getvalue()[:60], postscript):
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(ValueError):
            write_png(tmp_path / "a", tmp_path / "b.png", (64, 64))
        assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_turn_is_that_of_pillow(tmp_path, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    picture = Image.effect_noise((30, 20), 80)
    source = save(tmp_path / "a.png", picture, "PNG", exif=exif)
    write_png(source, tmp_path / "b.png", (64, 64))
    with Image.open(source) as given, Image.open(tmp_path / "b.png") as written:
        assert written.convert("L").tobytes() == ImageOps.exif_transpose(given).tobytes()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "1", "I;16"])
def test_large_pictures_are_made_smaller_by_a_whole_factor(tmp_path, mode):
    """By means of squares over black, whatever strips they are read in."""
    ramp = Image.linear_gradient("L").resize((3001, 2003))
    alpha = Image.linear_gradient("L").rotate(90).resize(ramp.size)
    picture = ramp.convert("RGB")
    if mode.endswith("A"):
        picture.putalpha(alpha)
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(ramp).astype(np.uint16) * 257)
    picture = picture.convert(mode)
    source = save(tmp_path / "a", picture, "PNG")
    write_png(source, tmp_path / "b.png", (64, 64))
    write_png(source, tmp_path / "whole.png", (1920, 1080))
    with Image.open(tmp_path / "b.png") as small, Image.open(tmp_path / "whole.png") as whole:
        assert whole.size == ramp.size and small.size == (1001, 668)  # by 3: 2003 // 512
        difference = ImageChops.difference(small, whole.reduce(3))
        assert max(high for _, high in difference.getextrema()) <= 1


def test_a_jpeg_is_decoded_smaller(tmp_path):
    source = save(tmp_path / "a.jpg", Image.radial_gradient("L").resize((4096, 4096)), "JPEG")
    write_png(source, tmp_path / "b.png", (64, 64))
    with Image.open(tmp_path / "b.png") as small:
        assert small.size == (512, 512)


def test_a_tall_picture_lying_on_its_side_keeps_twice_the_videos_sides(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    source = save(tmp_path / "a.jpg", Image.new("RGB", (9600, 5400)), "JPEG", exif=exif)
    write_png(source, tmp_path / "b.png", (480, 832))
    with Image.open(tmp_path / "b.png") as small:
        assert small.size == (1350, 2400) and small.width >= 2 * 480 and small.height >= 2 * 832


def scans(side, count):
    """A grey progressive JPEG that refines each of its blocks so many times, some 90 bytes a time."""

    def segment(marker, data):
        return bytes([255, marker]) + struct.pack(">H", len(data) + 2) + data

    blocks, one_code = (side // 8) ** 2, bytes([1, *[0] * 15])
    head = segment(0xDB, b"\0" + b"\1" * 64) + segment(
        0xC2, struct.pack(">BHHB3B", 8, side, side, 1, 1, 0x11, 0)
    )
    tables = segment(0xC4, b"\0" + one_code + b"\0") + segment(0xC4, b"\x10" + one_code + b"\xe0")
    first = segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + bytes(blocks // 8)
    bits = ("0" + "1" * 14) * -(-blocks // 32767)  # runs of as many empty blocks as a code can say
    bits += "1" * (-len(bits) % 8)
    empty = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)).replace(b"\xff", b"\xff\0")
    again = segment(0xDA, bytes([1, 1, 0, 1, 1, 0])) + empty
    return b"\xff\xd8" + head + tables + first + again * count + b"\xff\xd9"


def test_a_picture_that_takes_hours_to_decode_is_given_up(tmp_path, monkeypatch):
    """One of 60 MB, within all limits, would have kept the pictures of every key waiting for an hour."""
    monkeypatch.setattr(images, "DECODE_SECONDS", 0.5)
    (tmp_path / "a.jpg").write_bytes(scans(2048, 10))
    write_png(tmp_path / "a.jpg", tmp_path / "b.png", (64, 64))
    (tmp_path / "a.jpg").write_bytes(scans(2048, 20_000))
    began = time.thread_time()
    with pytest.raises(ValueError, match=r"takes more than 0\.5 s to decode"):
        write_png(tmp_path / "a.jpg", tmp_path / "c.png", (64, 64))
    assert time.thread_time() - began < 3 and not (tmp_path / "c.png").exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from Linux")
@pytest.mark.parametrize("mode", ["1", "P", "RGB", "RGBA"])
def test_the_largest_picture_takes_little_more_than_its_own_pixels(tmp_path, mode):
    """In a process of its own: 64 million pixels had taken up to 2.6 GB."""
    colour = {"1": 1, "P": 1, "RGB": (9, 9, 9), "RGBA": (9, 9, 9, 9)}[mode]
    source = save(tmp_path / "a.png", Image.new(mode, (8000, 8000), colour), "PNG", compress_level=1)
    code = (
        "import resource, sys; from pathlib import Path; from lib import pack; pack.load_pack()\n"
        "from wan21.server.images import write_png\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak(); write_png(Path(sys.argv[1]), Path(sys.argv[2]), (832, 480)); print(peak() - before)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, source, tmp_path / "b.png"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    pixels = {"1": 64, "P": 64, "RGB": 256, "RGBA": 256}[mode]  # MB in Pillow's memory
    assert float(found.stdout.splitlines()[-1]) < pixels + 120
