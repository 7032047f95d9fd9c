"""Endless training clips with a known motion: procedural scenes under a moving camera, a moving shape, or a
scene that changes (`weather.py`).

Every scene is computed here from random numbers (skies, hills, houses, 1/f textures, soft shapes); no
photograph or other third-party picture is used, so the checkpoint carries nobody else's licence.

What a name means: the CAMERA moves. "pan left" moves the camera left, so the content goes right; "zoom in"
makes the content grow; "rotate clockwise" turns the PICTURE clockwise on the screen. The speed per frame
is fixed relative to the picture, whose shorter side is 64 units: pan 1 unit, shape 1.5 units, rotation 2
degrees, zoom 1.5^(1/16).

    B batch    F frames    H W height, width of a frame    h w of the canvas that holds the whole scene
"""

import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .portraits import enriched
from .weather import weathered

CAMERA = (
    "pan left",
    "pan right",
    "pan up",
    "pan down",
    "zoom in",
    "zoom out",
    "rotate clockwise",
    "rotate counterclockwise",
    "still",
)
COLOURS = {  # red, green, blue in [-1, 1]
    "red": (0.75, -0.8, -0.8),
    "green": (-0.75, 0.4, -0.7),
    "blue": (-0.8, -0.5, 0.8),
    "yellow": (0.85, 0.7, -0.75),
    "orange": (0.9, 0.05, -0.85),
    "purple": (0.1, -0.75, 0.45),
    "white": (0.92, 0.92, 0.92),
    "black": (-0.9, -0.9, -0.9),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = ("left", "right", "up", "down")
OBJECT_ACTIONS = ("move", "grow", "shrink", "bounce")
SCENES = ("night", "snow", "waves")  # falls, falls, and run over the lower part
SCENE_SHARE = 1 / 7  # of the clips that are trained on
HELD_OUT = 10**9  # seeds from here on are never trained on
FACES = 7 * 10**9  # added to the seed, for what is drawn over a scene

STEP = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x, y; y points down
SIDE = 64  # units along the shorter side
PAN, OBJECT_SPEED = 1.0, 1.5  # units per frame
TURN = math.radians(2)  # per frame
ZOOM = 1.5 ** (1 / 16)  # factor per frame
DENSITY = 1.3  # canvas pixels per frame pixel: resampling softens no motion more than another


@dataclass(frozen=True)
class Motion:
    """What a clip shows: `name` is one of CAMERA, of SCENES, or of OBJECT_ACTIONS done by the named shape."""

    kind: str  # "camera", "scene" or "object"
    name: str
    colour: str | None = None
    shape: str | None = None
    direction: str | None = None  # of the action "move"


def clips(seed, count, frames=17, height=64, width=64, motions=None, device="cpu", scenes=SCENE_SHARE):
    """Clips and what happens in them; the same arguments give the same clips.

    Args:
        seed: From HELD_OUT on for what must never be trained on.
        motions: Motions or names of camera motions, repeated to `count`; None draws them.
        scenes: of those drawn to be trained on, the part that are scenes that change.

    Returns:
        (video float32 [count, 3, frames, height, width] in [-1, 1], list of Motion)
    """
    rng = random.Random(seed)
    gen = torch.Generator(device).manual_seed(seed)
    if motions is None:
        # Numbers on held-out clips stay comparable: what came to the training later is not in them.
        motions = [random_motion(rng, scenes * (seed < HELD_OUT)) for _ in range(count)]
    motions = [as_motion(motions[i % len(motions)]) for i in range(count)]
    rows, columns = units(height, width, device)
    view = camera_path(motions, frames, Random(gen).uniform(count, 1.0, 1.25))  # [B, F, 2, 3]
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    points = torch.stack((x, y, torch.ones_like(x)), -1)  # [H, W, 3]
    places = torch.einsum("bfij,hwj->bfhwi", view.to(device), points)  # x, y in the scene
    reach = [float(places[..., axis].abs().max()) + 0.5 for axis in (0, 1)]
    is_object = torch.tensor([m.kind == "object" for m in motions], device=device)
    pixels_per_unit = min(height, width) / SIDE * DENSITY
    canvas = scene(gen, count, reach, pixels_per_unit, plain=is_object)
    if seed < HELD_OUT:
        own = Random(torch.Generator(device).manual_seed(seed + FACES))
        canvas = enriched(own, canvas, ~is_object, reach, pixels_per_unit)
    where = [i for i, m in enumerate(motions) if m.kind == "object"]
    if where:
        colour = torch.tensor([COLOURS[motions[i].colour] for i in where], device=device)
        canvas[where] = contrasting(canvas[where], colour)
    grid = (places / places.new_tensor(reach)).flatten(1, 2)  # [B, F H, W, 2]
    video = F.grid_sample(canvas, grid, padding_mode="border", align_corners=True)
    video = video.unflatten(2, (frames, height))
    if where:
        video[where] = draw_objects(gen, video[where], [motions[i] for i in where], rows, columns)
    return weathered(video, motions, rows, columns), motions


def images(seed, count, height=64, width=64, device="cpu"):
    """Single pictures [count, 3, height, width] in [-1, 1]: the first frames of clips."""
    return clips(seed, count, 1, height, width, device=device)[0][:, :, 0]


def as_motion(motion):
    return Motion("camera", motion) if isinstance(motion, str) else motion


def random_motion(rng, scenes=0.0):
    """Half of the camera, half of a shape, but for a part `scenes` of all, which are scenes that change."""
    if scenes and rng.random() < scenes:
        return Motion("scene", rng.choice(SCENES))
    if rng.random() < 0.5:
        return Motion("camera", rng.choice(CAMERA))
    action = "move" if rng.random() < 0.8 else rng.choice(OBJECT_ACTIONS[1:])
    direction = rng.choice(DIRECTIONS) if action == "move" else None
    return Motion("object", action, rng.choice([*COLOURS]), rng.choice(SHAPES), direction)


def units(height, width, device):
    """Centres of the pixels' rows and columns, in units from the middle of the picture."""
    step = SIDE / min(height, width)
    return [(torch.arange(n, device=device) - (n - 1) / 2) * step for n in (height, width)]


def camera_path(motions, frames, first_zoom):
    """Matrices [B, F, 2, 3] from a place on the screen to the place in the scene seen there, in units."""
    t = torch.arange(frames, dtype=torch.float32)
    paths = []
    for motion, start in zip(motions, first_zoom.tolist()):
        move, _, way = motion.name.partition(" ")
        zoom, angle, shift = torch.full_like(t, start), 0 * t, torch.zeros(2, frames)
        if move == "pan":
            shift = torch.tensor(STEP[way])[:, None] * PAN * (t - t.mean()) / start
        elif move == "zoom":
            zoom = start * ZOOM ** (t if way == "in" else -t)
        elif move == "rotate":  # the scene is read against the turn of the picture
            angle = TURN * t * (-1 if way == "clockwise" else 1)
        cos, sin = angle.cos() / zoom, angle.sin() / zoom
        paths.append(torch.stack((cos, -sin, shift[0], sin, cos, shift[1]), -1).unflatten(-1, (2, 3)))
    return torch.stack(paths)


class Random:
    """Draws shaped to broadcast over [B, C, h, w]."""

    def __init__(self, gen):
        self.gen = gen

    def uniform(self, shape, low, high):
        return torch.rand(shape, generator=self.gen, device=self.gen.device) * (high - low) + low

    def each(self, count, low, high):
        """One number a scene, [B, 1, 1, 1]."""
        return self.uniform((count, 1, 1, 1), low, high)

    def chance(self, count, probability):
        return (self.each(count, 0, 1) < probability).float()

    def colour(self, count):
        """[B, 3, 1, 1]: half from all colours, half from the named ones; some of it greyed."""
        named = torch.tensor([*COLOURS.values()], device=self.gen.device)
        pick = torch.randint(len(named), (count,), generator=self.gen, device=self.gen.device)
        free = self.uniform((count, 3, 1, 1), -0.95, 0.95)
        colour = torch.where(self.chance(count, 0.4) > 0, named[pick][:, :, None, None], free)
        grey = colour.mean(1, keepdim=True)
        return grey + (colour - grey) * self.each(count, 0.2, 1.1)

    def noise(self, count, fields, h, w, pixels_per_unit, exponent):
        """[B, fields, h, w] of unit variance whose amplitude falls as frequency^-exponent [B, 1, 1, 1]."""
        fy = torch.fft.fftfreq(h, 1 / pixels_per_unit, device=self.gen.device)
        fx = torch.fft.rfftfreq(w, 1 / pixels_per_unit, device=self.gen.device)
        f2 = fy[:, None] ** 2 + fx**2 + (1 / 96) ** 2  # cycles per unit, squared
        spectrum = torch.randn(count, fields, h, w // 2 + 1, 2, generator=self.gen, device=self.gen.device)
        falloff = f2 ** (-exponent / 2) * torch.exp(-f2 * 3)  # and softened like a lens does
        field = torch.fft.irfft2(torch.view_as_complex(spectrum) * falloff, s=(h, w))
        return field / field.std((2, 3), keepdim=True)


def scene(gen, count, reach, pixels_per_unit, plain):
    """Scenes [B, 3, h, w] over +-reach (x, y) units.

    A third are landscapes, the others colour fields of 1/f noise under soft shapes.

    Args:
        plain: [B] bool; these get no shapes and no fine texture, so that a moving one stands out.
    """
    rnd = Random(gen)
    w, h = (2 * math.ceil(r * pixels_per_unit) + 1 for r in reach)
    x = torch.linspace(-reach[0], reach[0], w, device=gen.device)[None, None, None]
    y = torch.linspace(-reach[1], reach[1], h, device=gen.device)[None, None, :, None]
    plain = plain.float()[:, None, None, None]
    fine = rnd.noise(count, 3, h, w, pixels_per_unit, rnd.each(count, 1.1, 1.9) + 0.5 * plain)
    smooth = rnd.noise(count, 2, h, w, pixels_per_unit, rnd.each(count, 2.0, 2.8))
    is_land = rnd.chance(count, 0.4)
    image = torch.where(is_land > 0, sky(rnd, count, y, smooth), colour_field(rnd, count, smooth, fine))
    image = hills(rnd, image, is_land, y, smooth, fine * (1 - 0.6 * plain))
    image = landmarks(rnd, image, is_land * (1 - plain), x, y)
    for _ in range(4):
        shown = rnd.chance(count, 0.55) * (1 - is_land) * (1 - plain)
        image = soft_shape(rnd, image, shown, x, y, fine[:, :1])
    contrast = rnd.each(count, 0.65, 1.1)
    return (image * contrast + rnd.each(count, -0.15, 0.15)).clamp(-1, 1)


def blend(image, colour, alpha):
    return image + (colour - image) * alpha


def sky(rnd, count, y, smooth):
    """A vertical gradient with a few clouds."""
    top, bottom = rnd.colour(count) * 0.6 + 0.15, rnd.colour(count) * 0.5 + 0.35
    image = blend(top, bottom, ((y + 32) / 64).clamp(-0.3, 1.3))
    clouds = ((smooth[:, :1] - 0.2) * 0.5).clamp(0, 0.7) * rnd.each(count, 0, 1)
    return blend(image, 0.85, clouds)


def colour_field(rnd, count, smooth, fine):
    """Noise along random colour axes, most of it in brightness as in photographs."""
    image = rnd.colour(count) * 0.7 + smooth[:, :1] * (rnd.colour(count) - rnd.colour(count)) * 0.3
    image = image + smooth[:, 1:] * rnd.uniform((count, 3, 1, 1), -0.25, 0.25)
    light = rnd.each(count, 0, 1) ** 2 * 0.3
    image = image + fine[:, :1] * light + fine[:, 1:2] * light * rnd.uniform((count, 3, 1, 1), -0.5, 0.5)
    patch = ((smooth[:, 1:] - rnd.each(count, -1, 1)) * rnd.each(count, 1, 5)).sigmoid()
    return blend(image, rnd.colour(count) + fine[:, 2:] * light, patch * rnd.chance(count, 0.4))


def hills(rnd, image, shown, y, smooth, fine):
    """Three ridges, the nearest the lowest; each a colour with some texture and shading."""
    count, h = len(image), fine.shape[2]
    horizon = rnd.each(count, -10, 8)
    for layer in range(3):
        source = smooth[:, layer % 2] if layer < 2 else fine[:, 2] * 0.4
        ridge = source[:, h * (layer + 1) // 5][:, None, None] * rnd.each(count, 1, 7)
        alpha = ((y - horizon - ridge) / 1.2 + 0.5).clamp(0, 1)
        depth = ((y - horizon) / 40).clamp(0, 1)
        texture = fine[:, layer : layer + 1] * rnd.each(count, 0, 0.22)
        colour = rnd.colour(count) * 0.75 + texture - depth * rnd.each(count, -0.2, 0.4)
        image = blend(image, colour, alpha * shown)
        horizon = horizon + rnd.each(count, 5, 14)
    return image


def landmarks(rnd, image, shown, x, y):
    """A sun, and three things of a body and a top: houses (square, roof) or trees (trunk, crown)."""
    count = len(image)
    ones = torch.ones(count, 1, 1, 1, device=image.device)
    sun = shape_distance(0 * ones, x - rnd.each(count, -26, 26), y - rnd.each(count, -28, -8), 0, ones * 5)
    image = blend(image, rnd.colour(count) * 0.3 + 0.7, soft_edge(sun, 2.5) * shown * rnd.chance(count, 0.6))
    for _ in range(3):
        there = shown * rnd.chance(count, 0.7)
        is_tree, size = rnd.chance(count, 0.5), rnd.each(count, 4, 9)
        dx, dy = x - rnd.each(count, -34, 34), y - rnd.each(count, 2, 24)
        body = torch.maximum(dx.abs() - size * (1 - 0.75 * is_tree), dy.abs() - size * 0.8)
        image = blend(image, rnd.colour(count), soft_edge(body, 1.3) * there)
        top = shape_distance(2 - 2 * is_tree, dx, dy + size * 1.45, 0, size * 1.3)
        image = blend(image, rnd.colour(count) - dx / size * 0.12, soft_edge(top, 1.3) * there)
    return image


def soft_shape(rnd, image, shown, x, y, texture):
    """One circle, square or triangle: shaded, textured, and some of them striped or chequered."""
    count = len(image)
    kind = rnd.each(count, 0, 3).floor()
    size = rnd.each(count, 2, 4.5) ** 2
    x, y = x - rnd.each(count, -36, 36), y - rnd.each(count, -36, 36)
    inside = soft_edge(shape_distance(kind, x, y, rnd.each(count, -3.2, 3.2), size), rnd.each(count, 1.2, 4))
    angle, period = rnd.each(count, 0, 6.3), rnd.each(count, 0.35, 0.9)
    along, across = (x * angle.cos() + y * angle.sin()), (y * angle.cos() - x * angle.sin())
    stripes = (along * period).sin()
    pattern = torch.where(rnd.chance(count, 0.5) > 0, stripes, stripes * (across * period).sin())
    pattern = (pattern * 1.5 + 0.5).clamp(0, 1) * rnd.chance(count, 0.35)
    colour = blend(rnd.colour(count), rnd.colour(count), pattern)
    colour = colour + along / size * rnd.each(count, 0, 0.25) + texture * rnd.each(count, 0, 0.12)
    return blend(image, colour, inside * shown)


def shape_distance(kind, x, y, angle, size):
    """Signed distance, about, to a shape of SHAPES by number; a triangle points up at angle 0."""
    if not isinstance(angle, int):
        x, y = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    circle = (x * x + y * y + 1e-6).sqrt() - size
    square = torch.maximum(x.abs(), y.abs()) - size * 0.88
    triangle = torch.maximum(y - 0.6 * size, 0.866 * x.abs() - 0.5 * y - 0.6 * size)
    return torch.where(kind == 0, circle, torch.where(kind == 1, square, triangle))


def soft_edge(distance, width):
    return (0.5 - distance / width).clamp(0, 1)


def contrasting(canvas, colour):
    """Of each picture, its channels rolled, or its negative: the one furthest from `colour` [B, 3]."""
    versions = torch.stack((canvas, canvas.roll(1, 1), canvas.roll(2, 1), -canvas))  # [4, B, 3, h, w]
    thumbs = F.avg_pool2d(versions.flatten(0, 1), 8).unflatten(0, (4, -1))
    distance = (thumbs - colour[:, :, None, None]).square().mean(2).sqrt().flatten(2)
    best = distance.quantile(0.1, dim=2).argmax(0)
    return versions[best, torch.arange(len(canvas), device=canvas.device)] * 0.85


def draw_objects(gen, video, motions, rows, columns):
    """Paints each clip's shape [B, 3, F, H, W] where its action has it at each frame."""
    rnd, (count, _, frames) = Random(gen), video.shape[:3]
    t = torch.arange(frames, device=video.device, dtype=video.dtype)
    size = rnd.uniform((count, 1), 9, 14) * torch.ones(frames, device=video.device)  # [B, F]
    place = rnd.uniform((count, 2, 1), -1, 1) * torch.ones(frames, device=video.device)  # [B, 2, F]
    anywhere = rnd.uniform((count,), 0, 1) < 0.5
    room = torch.stack((columns.max(), rows.max()))[:, None]
    for i, motion in enumerate(motions):
        ahead = torch.tensor(STEP.get(motion.direction, (0, 0)), device=video.device)[:, None]
        # Half of the paths lie in the middle; the others start anywhere, so that where a shape is does not
        # tell where it goes.
        start = room * 0.5 if anywhere[i] else room - 15 - ahead.abs() * OBJECT_SPEED * (frames - 1) / 2
        since = t if anywhere[i] else t - t.mean()
        place[i] = place[i] * start.clamp_min(1) + ahead * OBJECT_SPEED * since
        if motion.name == "bounce":
            place[i, 1] = place[i, 1] - 16 * (t * math.pi / 8).sin().abs() + 8
        if motion.name in ("grow", "shrink"):  # both pass through the same sizes
            size[i] = size[i] * ZOOM ** ((t - t.mean()) * (1 if motion.name == "grow" else -1))
    x = columns - place[:, 0, :, None, None]  # [B, F, 1, W]
    y = rows[:, None] - place[:, 1, :, None, None]
    kind = torch.tensor([SHAPES.index(m.shape) for m in motions], device=video.device)[:, None, None, None]
    alpha = soft_edge(shape_distance(kind, x, y, 0, size[..., None, None]), 1.6)  # [B, F, H, W]
    colour = torch.tensor([COLOURS[m.colour] for m in motions], device=video.device)[:, :, None, None, None]
    shade = -(x + y) / size[..., None, None] * 0.1  # lit from the upper left
    return blend(video, (colour + shade[:, None]).clamp(-1, 1), alpha[:, None])
