"""Start images for the pictures on our pages, drawn here: no photograph, nobody else's picture.

Each scene is a square Pillow image of SIDE pixels; `SCENES` has them by name.
"""

import math
import random

from PIL import Image, ImageDraw, ImageFilter

SIDE = 800
STEP = 4  # pixels between the points of a ridge


def gradient(size, top, bottom):
    """A picture whose colour changes from top to bottom."""
    shades = Image.new("RGB", (1, 256))
    for y in range(256):
        shades.putpixel((0, y), tuple(round(a + (b - a) * y / 255) for a, b in zip(top, bottom)))
    return shades.resize(size, Image.Resampling.BICUBIC)


def bay(time=0.3):
    """A boat sails over a bay while the sun sets; `time` in [0, 1]."""
    picture = gradient((SIDE, SIDE), (250, 196, 122), (226, 96, 110))
    draw = ImageDraw.Draw(picture)
    sun, level = (round(SIDE * 0.64), round(SIDE * (0.26 + 0.24 * time))), round(SIDE * 0.62)
    draw.circle(sun, 92, (255, 232, 170))
    ridge(draw, level, 150, 0.0, (150, 84, 128))
    ridge(draw, level, 84, 2.1, (98, 62, 116))
    water = gradient((SIDE, SIDE - level), (232, 132, 124), (40, 62, 112))
    picture.paste(water, (0, level))
    for k in range(9):  # the sun on the water, broken by waves
        half = 88 - 7 * k + 14 * math.sin(5 * k + 8 * time)
        y = level + 14 + 30 * k
        draw.rounded_rectangle((sun[0] - half, y, sun[0] + half, y + 9), 5, (255, 218, 160))
    boat(draw, SIDE * (0.2 + 0.5 * time), level + 128 + 8 * math.sin(7 * time))
    return picture


def night():
    """A moon over blue mountains and a lake, a hut with a lit window on the shore."""
    picture = gradient((SIDE, SIDE), (18, 24, 62), (96, 92, 150))
    draw, level = ImageDraw.Draw(picture), 560
    for x, y in points(60, 400):
        draw.circle((x, y), 2, (214, 218, 240))
    draw.circle((560, 170), 78, (250, 244, 214))
    ridge(draw, level, 300, 0.6, (74, 76, 138))
    ridge(draw, level, 170, 3.1, (46, 50, 104))
    picture.paste(gradient((SIDE, SIDE - level), (70, 84, 150), (16, 24, 62)), (0, level))
    for k in range(6):
        half, y = 70 - 9 * k, level + 24 + 34 * k
        draw.rounded_rectangle((560 - half, y, 560 + half, y + 10), 5, (196, 200, 220))
    draw.polygon([(0, 800), (0, 640), (260, 596), (440, 668), (520, 800)], (24, 40, 54))
    house(draw, (210, 612), 130, (92, 62, 58), (58, 34, 44), (255, 206, 110))
    for x, height in ((64, 190), (330, 150), (388, 190)):
        fir(draw, (x, 648), height, (16, 54, 56))
    return picture


def meadow():
    """A red-roofed house between green hills and round trees under a blue sky."""
    picture = gradient((SIDE, SIDE), (76, 150, 222), (206, 230, 240))
    draw = ImageDraw.Draw(picture)
    draw.circle((150, 150), 66, (255, 240, 170))
    for x, y, r in ((470, 150, 46), (530, 134, 62), (596, 152, 44), (250, 252, 34), (296, 246, 44)):
        draw.circle((x, y), r, (248, 250, 252))
    ridge(draw, 520, 220, 1.2, (108, 148, 176))
    ridge(draw, 620, 180, 4.0, (110, 170, 92))
    ridge(draw, SIDE, 230, 0.2, (74, 140, 66))
    house(draw, (430, 610), 190, (244, 228, 202), (196, 62, 52), (92, 120, 150))
    for x, y, r in ((180, 620, 74), (680, 640, 88)):
        draw.rectangle((x - 12, y, x + 12, y + r + 40), (110, 74, 50))
        draw.circle((x, y - r // 3), r, (40, 110, 58))
        draw.circle((x - r // 4, y - r // 2), r // 2, (66, 140, 74))
    return picture


def winter():
    """A frozen valley: white peaks, firs in the snow and a yellow tent."""
    picture = gradient((SIDE, SIDE), (140, 182, 226), (238, 226, 232))
    draw = ImageDraw.Draw(picture)
    peak(draw, (250, 150), 560, 360, (112, 136, 178))
    peak(draw, (590, 220), 560, 330, (86, 110, 156))
    ridge(draw, 640, 120, 2.0, (216, 226, 240))
    ridge(draw, SIDE, 230, 5.1, (244, 248, 252))
    for x, y, height in ((110, 690, 250), (204, 650, 170), (690, 690, 270), (602, 640, 160)):
        fir(draw, (x, y), height, (30, 88, 84))
    draw.polygon([(330, 730), (420, 590), (510, 730)], (250, 184, 40))
    draw.polygon([(395, 730), (420, 640), (445, 730)], (120, 72, 30))
    return picture


def desert():
    """Dunes in the evening, a pyramid and a balloon."""
    picture = gradient((SIDE, SIDE), (255, 176, 120), (255, 228, 170))
    draw = ImageDraw.Draw(picture)
    draw.circle((170, 330), 96, (255, 246, 206))
    draw.polygon([(360, 560), (560, 320), (760, 560)], (214, 150, 84))
    draw.polygon([(560, 320), (760, 560), (600, 560)], (166, 106, 66))
    ridge(draw, 620, 120, 2.6, (226, 158, 88))
    ridge(draw, SIDE, 240, 0.9, (196, 120, 66))
    balloon(draw, (330, 190), 92, (206, 50, 66), (250, 236, 210))
    return picture


def lighthouse():
    """A lighthouse on a green cliff above the sea."""
    picture = gradient((SIDE, SIDE), (98, 186, 226), (250, 226, 196))
    draw = ImageDraw.Draw(picture)
    for x, y, r in ((150, 170, 50), (216, 150, 68), (290, 172, 46), (660, 330, 40), (716, 322, 52)):
        draw.circle((x, y), r, (252, 250, 246))
    picture.paste(gradient((SIDE, 280), (40, 132, 170), (16, 66, 116)), (0, 520))
    draw.polygon([(330, SIDE), (400, 590), (520, 520), (SIDE, 500), (SIDE, SIDE)], (92, 152, 82))
    draw.polygon([(330, SIDE), (400, 590), (450, 640), (430, SIDE)], (146, 112, 88))
    for k in range(4):  # the tower, red and white
        (low, wide), (high, slim) = ((530 - 84 * (k + up), 62 - 7 * (k + up)) for up in (0, 1))
        tower = [(600 - wide, low), (600 - slim, high), (600 + slim, high), (600 + wide, low)]
        draw.polygon(tower, ((206, 52, 48), (250, 244, 236))[k % 2])
    draw.rectangle((574, 150, 626, 196), (255, 226, 120))
    draw.polygon([(562, 152), (600, 104), (638, 152)], (70, 60, 78))
    return picture


def autumn():
    """A barn and red and yellow trees by a field, hills behind."""
    picture = gradient((SIDE, SIDE), (164, 200, 222), (250, 226, 178))
    draw = ImageDraw.Draw(picture)
    draw.circle((640, 190), 70, (255, 238, 186))
    ridge(draw, 500, 190, 0.9, (150, 128, 150))
    ridge(draw, 600, 150, 3.4, (190, 140, 66))
    draw.rectangle((0, 600, SIDE, SIDE), (222, 178, 88))
    house(draw, (300, 640), 210, (150, 44, 40), (92, 60, 56), (248, 232, 206))
    for x, y, r, colour in (
        (90, 600, 92, (226, 120, 36)),
        (560, 610, 84, (204, 62, 40)),
        (690, 590, 98, (240, 176, 48)),
    ):
        draw.rectangle((x - 13, y, x + 13, y + r + 50), (92, 64, 50))
        draw.circle((x, y - r // 3), r, colour)
    return picture


def ridge(draw, level, height, phase, colour):
    """Hills along the horizon, down to the lower edge."""
    tops = [
        (x, level - height * (0.62 + 0.38 * math.sin(x / 97 + phase) * math.cos(x / 61 + 2 * phase)))
        for x in range(0, SIDE + 1, STEP)
    ]
    draw.polygon([(0, SIDE), *tops, (SIDE, SIDE)], colour)


def boat(draw, x, y):
    """A sailing boat whose hull is centred at (x, y)."""
    draw.polygon([(x - 10, y - 24), (x - 10, y - 250), (x - 118, y - 24)], (255, 246, 232))
    draw.polygon([(x + 8, y - 24), (x + 8, y - 220), (x + 84, y - 24)], (246, 214, 190))
    draw.polygon([(x - 130, y - 12), (x + 118, y - 12), (x + 82, y + 40), (x - 96, y + 40)], (66, 36, 66))


def house(draw, foot, width, wall, roof, window):
    """A house whose foot is centred at `foot`."""
    (x, y), half = foot, width / 2
    draw.rectangle((x - half, y - width * 0.5, x + half, y + 30), wall)
    draw.polygon(
        [(x - half * 1.25, y - width * 0.48), (x, y - width), (x + half * 1.25, y - width * 0.48)], roof
    )
    draw.rectangle((x - half * 0.3, y - width * 0.32, x + half * 0.3, y - width * 0.05), window)


def fir(draw, foot, height, colour):
    """A fir whose foot stands at `foot`."""
    x, y = foot
    for k in range(3):
        low, half = y - height * 0.26 * k, height * (0.27 - 0.06 * k)
        draw.polygon([(x - half, low), (x, low - height * 0.48), (x + half, low)], colour)


def peak(draw, top, level, half, colour):
    """A mountain with snow on it."""
    (x, y), snow = top, 0.36
    draw.polygon([(x - half, level), (x, y), (x + half, level)], colour)
    low = y + (level - y) * snow
    draw.polygon([(x - half * snow, low), (x, y), (x + half * snow, low), (x, low - 40)], (250, 252, 255))


def balloon(draw, centre, radius, colour, stripe):
    """A hot-air balloon with its basket."""
    x, y = centre
    half, low = radius * 0.86, y + radius * 0.5
    draw.polygon([(x - half, low), (x, y + radius * 1.6), (x + half, low)], colour)
    draw.circle((x, y), radius, colour)
    draw.ellipse((x - radius * 0.36, y - radius, x + radius * 0.36, y + radius * 1.2), stripe)
    draw.rectangle((x - 22, y + radius * 1.6, x + 22, y + radius * 1.6 + 34), (104, 66, 44))


def points(count, below):
    """Places of stars, always the same."""
    chance = random.Random(0)
    return [(chance.randrange(SIDE), chance.randrange(below)) for _ in range(count)]


def panned(picture, count):
    """`count` pictures of a camera that goes right, each four fifths of the scene, as "pan right" does."""
    side = SIDE * 4 // 5
    lefts = [round(k * side / 64) for k in range(count)]  # a 64th of the width per frame
    return [picture.crop((left, SIDE - side, left + side, SIDE)) for left in lefts]


def small(picture, side):
    """The scene at `side` pixels, as a camera would see it: slightly soft."""
    soft = picture.filter(ImageFilter.GaussianBlur(picture.width / side / 3))
    return soft.resize((side, side), Image.Resampling.LANCZOS)


SCENES = {scene.__name__: scene for scene in (bay, night, meadow, winter, desert, lighthouse, autumn)}
