"""Write `docs/icon.png` and `docs/banner.png`, which the registry shows: a still and the frames it becomes.

Drawn here from circles and polygons: a boat sails over a bay while the sun sets.
"""

import math

from lib.pack import ROOT
from PIL import Image, ImageDraw, ImageFilter, ImageFont

ICON = (400, 400)  # the registry wants a square of at most 400x400
BANNER = (1260, 540)  # and 21:9
FRAME = 800  # pixels of a side, as drawn
TOP, BOTTOM = (38, 30, 74), (16, 78, 92)  # colours of the background
COLOURS = 160  # of the palette that keeps the files small
OVER = 2  # drawn so much larger, then reduced


def main():
    """Draw both."""
    save(icon(), "icon.png")
    save(banner(), "banner.png")


def scene(time):
    """The frame at `time` in [0, 1], FRAME pixels square."""
    picture = gradient((FRAME, FRAME), (250, 196, 122), (226, 96, 110))
    draw = ImageDraw.Draw(picture)
    sun, level = (round(FRAME * 0.64), round(FRAME * (0.26 + 0.24 * time))), round(FRAME * 0.62)
    draw.circle(sun, 92, (255, 232, 170))
    ridge(draw, level, 150, 0.0, (150, 84, 128))
    ridge(draw, level, 84, 2.1, (98, 62, 116))
    water = gradient((FRAME, FRAME - level), (232, 132, 124), (40, 62, 112))
    picture.paste(water, (0, level))
    for k in range(9):  # the sun on the water, broken by waves
        half = 88 - 7 * k + 14 * math.sin(5 * k + 8 * time)
        y = level + 14 + 30 * k
        draw.rounded_rectangle((sun[0] - half, y, sun[0] + half, y + 9), 5, (255, 218, 160))
    boat(draw, FRAME * (0.2 + 0.5 * time), level + 128 + 8 * math.sin(7 * time))
    return picture


def ridge(draw, level, height, phase, colour):
    """Hills along the horizon."""
    tops = [
        (x, level - height * (0.62 + 0.38 * math.sin(x / 97 + phase) * math.cos(x / 61 + 2 * phase)))
        for x in range(0, FRAME + 1, 4)
    ]
    draw.polygon([(0, level), *tops, (FRAME, level)], colour)


def boat(draw, x, y):
    """A sailing boat whose hull is centred at (x, y)."""
    draw.polygon([(x - 10, y - 24), (x - 10, y - 250), (x - 118, y - 24)], (255, 246, 232))
    draw.polygon([(x + 8, y - 24), (x + 8, y - 220), (x + 84, y - 24)], (246, 214, 190))
    draw.polygon([(x - 130, y - 12), (x + 118, y - 12), (x + 82, y + 40), (x - 96, y + 40)], (66, 36, 66))


def icon():
    """Three frames fanned out behind a play button."""
    picture = background(ICON)
    for time, x, y, angle in ((1.0, 236, 176, -14), (0.6, 212, 190, -5), (0.2, 180, 206, 4)):
        lay(picture, scene(time), 244, (x, y), angle)
    play(picture, (180, 206), 48)
    return picture.resize(ICON, Image.Resampling.LANCZOS)


def banner():
    """The still, and the frames that come of it one behind the other; the pack's name above."""
    picture = background(BANNER)
    for k in reversed(range(5)):
        lay(picture, scene(0.2 * (k + 1)), 290 - 12 * k, (674 + 106 * k, 330), 0)
    lay(picture, scene(0), 310, (222, 326), 3)
    arrow(picture, (414, 330), (508, 330))
    draw = ImageDraw.Draw(picture)
    draw.text((64 * OVER, 40 * OVER), "Wan2.1 Image to Video", "white", ImageFont.load_default(62 * OVER))
    return picture.resize(BANNER, Image.Resampling.LANCZOS)


def background(size):
    """What a picture of that size lies on, drawn larger."""
    return gradient((size[0] * OVER, size[1] * OVER), TOP, BOTTOM)


def gradient(size, top, bottom):
    """A picture whose colour changes from top to bottom."""
    shades = Image.new("RGB", (1, 256))
    for y in range(256):
        shades.putpixel((0, y), tuple(round(a + (b - a) * y / 255) for a, b in zip(top, bottom)))
    return shades.resize(size, Image.Resampling.BICUBIC)


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
