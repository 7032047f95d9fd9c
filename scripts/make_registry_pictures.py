"""Write `docs/icon.png` and `docs/banner.png`, which the registry shows: a still and the frames it becomes.

Drawn from circles and polygons: a boat sails over a bay while the sun sets.
"""

from lib.pack import ROOT
from lib.scenes import bay, gradient
from PIL import Image, ImageDraw, ImageFilter, ImageFont

ICON = (400, 400)  # the registry wants a square of at most 400x400
BANNER = (1260, 540)  # and 21:9
TOP, BOTTOM = (38, 30, 74), (16, 78, 92)  # colours of the background
COLOURS = 160  # of the palette that keeps the files small
OVER = 2  # drawn so much larger, then reduced


def main():
    """Draw both."""
    save(icon(), "icon.png")
    save(banner(), "banner.png")


def icon():
    """Three frames fanned out behind a play button."""
    picture = background(ICON)
    for time, x, y, angle in ((1.0, 236, 176, -14), (0.6, 212, 190, -5), (0.2, 180, 206, 4)):
        lay(picture, bay(time), 244, (x, y), angle)
    play(picture, (180, 206), 48)
    return picture.resize(ICON, Image.Resampling.LANCZOS)


def banner():
    """The still, and the frames that come of it one behind the other; the pack's name above."""
    picture = background(BANNER)
    for k in reversed(range(5)):
        lay(picture, bay(0.2 * (k + 1)), 290 - 12 * k, (674 + 106 * k, 330), 0)
    lay(picture, bay(0), 310, (222, 326), 3)
    arrow(picture, (414, 330), (508, 330))
    draw = ImageDraw.Draw(picture)
    draw.text((64 * OVER, 40 * OVER), "Wan2.1 Image to Video", "white", ImageFont.load_default(62 * OVER))
    return picture.resize(BANNER, Image.Resampling.LANCZOS)


def background(size):
    """What a picture of that size lies on, drawn larger."""
    return gradient((size[0] * OVER, size[1] * OVER), TOP, BOTTOM)


def lay(picture, frame, side, centre, angle):
    """Lay a frame with round corners, a white border and a shadow on the picture.

    Args:
        side: of the frame, in pixels of the result.
        centre: (x, y) likewise.
        angle: in degrees, to the left.
    """
    side, edge = side * OVER, 6 * OVER
    card = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    shape = Image.new("L", (side, side), 0)
    ImageDraw.Draw(shape).rounded_rectangle((0, 0, side - 1, side - 1), 20 * OVER, 255)
    card.paste("white", (0, 0), shape)
    inner = shape.resize((side - 2 * edge, side - 2 * edge), Image.Resampling.LANCZOS)
    card.paste(frame.resize(inner.size, Image.Resampling.LANCZOS), (edge, edge), inner)
    card = card.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    corner = tuple(round(c * OVER - card.width / 2) for c in centre)
    shadow = Image.new("L", picture.size, 0)
    shadow.paste(card.getchannel("A").point(lambda a: a // 2), (corner[0], corner[1] + 6 * OVER))
    picture.paste("black", (0, 0), shadow.filter(ImageFilter.GaussianBlur(8 * OVER)))
    picture.paste(card, corner, card)


def play(picture, centre, radius):
    """A round button with a triangle."""
    x, y, r = (value * OVER for value in (*centre, radius))
    draw = ImageDraw.Draw(picture, "RGBA")
    draw.ellipse((x - r, y - r, x + r, y + r), (16, 24, 48, 190))
    draw.polygon([(x - r * 0.34, y - r * 0.5), (x - r * 0.34, y + r * 0.5), (x + r * 0.56, y)], "white")


def arrow(picture, start, end):
    """An arrow to the right."""
    (x, y), (to, _) = ((a * OVER, b * OVER) for a, b in (start, end))
    draw, head = ImageDraw.Draw(picture), 20 * OVER
    draw.line((x, y, to - head, y), "white", 8 * OVER)
    draw.polygon([(to - head * 1.4, y - head), (to - head * 1.4, y + head), (to, y)], "white")


def save(picture, name):
    """Write a picture to docs/ with few colours."""
    few = picture.quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.FLOYDSTEINBERG)
    few.save(ROOT / "docs" / name, optimize=True)


if __name__ == "__main__":
    main()
