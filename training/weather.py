"""What changes a whole scene while the camera stands still: night falls, snow falls, waves run.

Every clip begins with its picture as it is. Speeds are per frame, as in `data.py`. All snow falls alike and
all waves run alike: of random ones a small model has learnt the mean, coloured specks and a still sea.

    B batch    F frames    H W height, width of a frame; places and sizes are in units as in `data.py`
"""

import math

import torch
import torch.nn.functional as F

NIGHT_FRAMES = 16  # after so many it is night
NIGHT = (0.14, 0.2, 0.36)  # of the light of day, red, green, blue
FLAKES = 26  # few and large: of small ones, of which many fall through a patch of the model, it drew streaks
FADE_IN = 4  # frames until all of the snow is there, or the waves have their height
HORIZON = 2.0  # units below the middle; from here down there are waves
WAVE_HEIGHT = 2.4  # units
WAVE_PERIOD = 8  # frames
WAVE_LIGHT = 0.3  # how much lighter a crest is, and darker a trough


def weathered(video, motions, rows, columns):
    """Clips of standing scenes [B, 3, F, H, W] with what their motions of the kind "scene" name.

    Args:
        rows, columns: places of the pixels, from `data.units`.
    """
    changes = {"night": night, "snow": snow, "waves": waves}
    for i, motion in enumerate(motions):
        if motion.kind == "scene":
            video[i] = changes[motion.name](video[i], rows, columns)
    return video


def night(video, rows, columns):
    """The light fades and turns blue."""
    passed = (times(video) / NIGHT_FRAMES).clamp(0, 1)
    left = torch.tensor(NIGHT, device=video.device)[:, None] ** passed  # [3, F]
    return (video + 1) * left[:, :, None, None] - 1


def snow(video, rows, columns):
    """White flakes: the larger ones are nearer, hence faster."""
    t = times(video)
    drawn = torch.rand(5, FLAKES, 1, generator=torch.Generator().manual_seed(0))
    nearness, start, aside, sway, phase = drawn.to(video.device)
    size, speed = 1.8 + 1.8 * nearness**2, 1 + nearness
    across, high = float(columns.max()) + 2, float(rows.max()) + 2  # half of the field that they fall through
    x = across * (2 * aside - 1) + 1.5 * (t / 5 + 6.3 * phase).sin() * sway
    y = (2 * high * start + speed * t) % (2 * high) - high  # [FLAKES, F]
    shown = (t / FADE_IN).clamp(0, 1) * (0.6 + 0.4 * nearness)
    covered = torch.zeros_like(video[0])  # [F, H, W]
    for k in range(FLAKES):
        away = (rows[:, None] - y[k, :, None, None]) ** 2 + (columns - x[k, :, None, None]) ** 2
        flake = (1.3 - away.sqrt() / size[k]).clamp(0, 1) * shown[k, :, None, None]
        covered = torch.maximum(covered, flake)
    return video + (0.95 - video) * covered


def waves(video, rows, columns):
    """Below a horizon the picture sways in bands of light and dark, the nearer the wider."""
    t = times(video)[:, None]
    depth = (rows - HORIZON).clamp_min(0)  # [H]
    height = WAVE_HEIGHT * (depth / 16).clamp(0, 1) * (t / FADE_IN).clamp(0, 1)  # [F, H]
    turns = 3 * (6 + depth).log() - t / WAVE_PERIOD
    swing = (2 * math.pi * turns).sin()  # [F, H]
    aside = height * swing
    x = columns + aside[:, :, None]
    y = (rows[:, None] + 0.4 * aside[:, :, None]).expand_as(x)
    half = 0.5 * float(rows[1] - rows[0])
    grid = torch.stack((x / (columns.max() + half), y / (rows.max() + half)), -1)  # [F, H, W, 2]
    moved = F.grid_sample(video.movedim(1, 0), grid, padding_mode="border", align_corners=False)
    light = 1 + WAVE_LIGHT * (height / WAVE_HEIGHT) * swing
    return ((moved.movedim(0, 1) + 1) * light[:, :, None] - 1).clamp(-1, 1)


def times(video):
    """Frame numbers [F]."""
    return torch.arange(video.shape[1], device=video.device, dtype=video.dtype)
