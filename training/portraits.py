"""Drawn faces, and light that falls off softly: what the scenes of `data.py` lack beside photographs.

B batch    h w of the canvas that holds the whole scene; places and sizes are in units as in `data.py`
"""

import torch

SKINS = ((0.85, 0.5, 0.25), (0.65, 0.25, -0.05), (0.3, -0.1, -0.35), (-0.2, -0.5, -0.65))  # red, green, blue


def enriched(rnd, image, shown, reach, pixels_per_unit):
    """Scenes [B, 3, h, w] over +-reach (x, y) units, with a face in a quarter and soft light in half of them.

    Args:
        rnd: a `data.Random`.
        shown: [B] bool; the others stay as they are.
    """
    count, _, h, w = image.shape
    x = torch.linspace(-reach[0], reach[0], w, device=image.device)[None, None, None]
    y = torch.linspace(-reach[1], reach[1], h, device=image.device)[None, None, :, None]
    shown = shown.float()[:, None, None, None]
    texture = rnd.noise(count, 1, h, w, pixels_per_unit, rnd.each(count, 0.8, 1.5))
    image = face(rnd, image, shown * rnd.chance(count, 0.25), x, y, texture)
    bright = lit(rnd, image, x, y)
    return (image + (bright - image) * shown * rnd.chance(count, 0.5)).clamp(-1, 1)


def lit(rnd, image, x, y):
    """A soft lamp somewhere, a little warm or cold, and dimmer corners."""
    count = len(image)
    dx, dy = x - rnd.each(count, -40, 40), y - rnd.each(count, -40, 40)
    near = torch.exp(-(dx.square() + dy.square()) / rnd.each(count, 20, 60).square())
    tint = 1 + rnd.each(count, -0.12, 0.12) * torch.tensor([1.0, 0.0, -1.0], device=x.device)[:, None, None]
    strength = rnd.each(count, 0.1, 0.45)
    factor = 1 + strength * (2 * near - 1) * tint
    return ((image + 1) * factor - 1).clamp(-1, 1)


def face(rnd, image, shown, x, y, texture):
    """A head and shoulders: hair, eyes, nose and mouth, the skin shaded from one side.

    Args:
        shown: [B, 1, 1, 1] in 0, 1.
        texture: [B, 1, h, w] of unit variance, of skin and hair.
    """
    count, device = len(image), image.device
    size = rnd.each(count, 10, 24)
    tilt = rnd.each(count, -0.3, 0.3)
    x, y = (x - rnd.each(count, -22, 22)) / size, (y - rnd.each(count, -18, 18)) / size
    x, y = x * tilt.cos() + y * tilt.sin(), y * tilt.cos() - x * tilt.sin()
    blur = 1.5 / size
    pick = torch.randint(len(SKINS), (count,), generator=rnd.gen, device=device)
    skin = torch.tensor(SKINS, device=device)[pick][:, :, None, None]
    light = x * rnd.each(count, -0.5, 0.5) - y * 0.25 - (x.square() + y.square()) * 0.25
    hair = rnd.colour(count) * 0.5 - 0.35 + texture * 0.12
    dark = skin * 0.3 - 0.65

    def paint(image, colour, x, y, wide, high, strength=1.0):
        inside = oval(x, y, wide, high, blur) * shown * strength
        return image + (colour - image) * inside

    image = paint(image, hair, x, y + 0.15, 0.95, rnd.each(count, 1.05, 1.5))
    image = paint(image, skin - 0.3 + light.clamp_min(-0.3), x, y - 1.1, 0.4, 0.7)  # neck
    image = paint(image, rnd.colour(count) + texture * 0.05, x, y - 2.2, 1.5, 0.85)  # shoulders
    image = paint(image, skin + light + texture * 0.04, x, y, 0.78, 1.0)
    fringe = rnd.each(count, -0.95, -0.6)
    image = paint(image, hair, x, y - fringe + 0.15, 0.72, 0.28)
    apart, gaze = rnd.each(count, 0.28, 0.36), rnd.each(count, -0.04, 0.04)
    iris = rnd.colour(count) * 0.5 - 0.4
    for side in (-1, 1):
        eye = x - side * apart
        image = paint(image, dark, eye, y + 0.33, 0.2, 0.05, 0.8)  # brow
        image = paint(image, 0.8, eye, y + 0.12, 0.15, 0.09)
        image = paint(image, iris, eye - gaze, y + 0.12, 0.075, 0.085)
        image = paint(image, 0.9, eye - gaze - 0.03, y + 0.15, 0.03, 0.03, 0.8)
    image = paint(image, skin - 0.3, x - 0.05, y - 0.2, 0.1, 0.12, 0.5)  # under the nose
    smile = rnd.each(count, -0.25, 0.5)
    lips = skin * 0.6 + torch.tensor([0.15, -0.35, -0.25], device=device)[:, None, None]
    return paint(image, lips, x, y - 0.5 + smile * x.square(), 0.3, rnd.each(count, 0.05, 0.12))


def oval(x, y, wide, high, blur):
    """1 inside an ellipse, 0 outside, soft over `blur`."""
    radius = ((x / wide).square() + (y / high).square() + 1e-6).sqrt()
    distance = (radius - 1) * (wide if isinstance(wide, float) else 1.0)
    return (0.5 - distance / blur).clamp(0, 1)
