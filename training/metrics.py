"""What a video does, measured: which camera motion, where a shape went, how like its picture it is.

F frames    H W height, width; pixels are in [0, 1]
"""

import math

import torch
import torch.nn.functional as F
from lib.quality import ssim

from . import data
from .weather import weathered

LATER = 0.5  # of the frames: what a motion has done by then can be told from what another has
# What must be seen of a drawn scene (`scene_share`). Of 324 drawn camera motions none has more than 0.26 of a
# night, which a pan into the dark resembles, and none more than 0.00 of snow or waves.
LEAST_OF_A_SCENE = {"night": 0.5, "snow": 0.05, "waves": 0.05}
MARGIN = 1.5 / 64  # of the picture at its edges, where a warp interpolates with what it does not know


def psnr(a, b, weight=None):
    """Decibels between two arrays of pixels; `weight` counts some of them only."""
    error = (a - b).square()
    mean = error.mean() if weight is None else (error * weight).sum() / weight.expand_as(error).sum()
    return -10 * math.log10(max(float(mean), 1e-10))


def quality(pairs):
    """How good decoded videos are beside their originals: [(video, original)], each [F, 3, H, W].

    Returns:
        {"psnr": dB, "first": dB of the first frame, "ssim", "edges": size of the gradients, "flicker": of the
        differences between frames, both as parts of the originals'; of all of them together, since a clip in
        which nothing moves has no part of its own}
    """
    pixels = [[v.movedim(1, -1) for v in pair] for pair in pairs]
    means = {
        "psnr": [psnr(video, original) for video, original in pairs],
        "first": [psnr(video[0], original[0]) for video, original in pairs],
        "ssim": [ssim(*pair) for pair in pixels],
    }
    found = {name: sum(values) / len(values) for name, values in means.items()}
    for size_of in (edges, flicker):
        ours, theirs = (sum(size_of(video) for video in videos) for videos in zip(*pairs, strict=True))
        found[size_of.__name__] = ours / max(theirs, 1e-6)
    return found


def edges(video):
    """The mean size of the gradient of brightness over the picture."""
    light = video.mean(1)
    return float((light.diff(dim=-1)[:, :-1].square() + light.diff(dim=-2)[..., :-1].square()).sqrt().mean())


def flicker(video):
    """The mean difference between a frame and the next."""
    return float(video.diff(dim=0).abs().mean()) if len(video) > 1 else 0.0


def warped(image, name, frames):
    """A picture under a camera motion, as far as it is known.

    Args:
        image: [3, H, W].
        name: one of `data.CAMERA`.

    Returns:
        (video [F, 3, H, W], known [F, 1, H, W] in 0, 1)
    """
    height, width = image.shape[1:]
    view = data.camera_path([data.Motion("camera", name)], frames, torch.ones(1))[0]  # screen -> scene
    view = torch.cat([view, torch.tensor([0.0, 0.0, 1.0]).expand(frames, 1, 3)], 1)  # [F, 3, 3]
    to_first = torch.linalg.inv(view[0]) @ view  # from the screen at a frame to the screen at the first
    rows, columns = data.units(height, width, "cpu")
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    points = torch.stack((x, y, torch.ones_like(x)), -1)
    places = torch.einsum("fij,hwj->fhwi", to_first[:, :2], points)  # [F, H, W, 2]
    half = data.SIDE / min(height, width) / 2  # a pixel's
    grid = places / torch.stack((columns.max() + half, rows.max() + half))
    video = F.grid_sample(image.expand(frames, -1, -1, -1), grid, padding_mode="border", align_corners=False)
    known = (grid.abs() <= 1 - 2 * MARGIN).all(-1).float()[:, None]
    return video, known


def camera_scores(image, video):
    """PSNR of the later frames of `video` [F, 3, H, W] with each motion's warp of `image` [3, H, W]."""
    first = int(len(video) * LATER)
    scores = {}
    for name in data.CAMERA:
        expected, known = warped(image, name, len(video))
        later = range(first, len(video))
        scores[name] = sum(psnr(expected[t], video[t], known[t]) for t in later) / len(later)
    return scores


def camera_motion(image, video):
    """The camera motion that explains the video best."""
    scores = camera_scores(image, video)
    return max(scores, key=scores.get)


def tells_motions_apart(image, frames=17, least=24.0):
    """Whether the picture looks clearly different under any two motions: an even colour never does."""
    videos = {name: warped(image, name, frames) for name in data.CAMERA}
    for i, a in enumerate(data.CAMERA):
        for b in data.CAMERA[:i]:
            (video_a, known_a), (video_b, known_b) = videos[a], videos[b]
            if psnr(video_a[-1], video_b[-1], known_a[-1] * known_b[-1]) > least:
                return False
    return True


def centroid(video, colour, nearness=0.5):
    """Where the colour is in each frame, in units from the middle (x, y), [F, 2].

    What has the colour in every frame is background and does not count.

    Args:
        video: [F, 3, H, W] in [0, 1].
        colour: a name of `data.COLOURS`.
    """
    target = torch.tensor(data.COLOURS[colour])[:, None, None] / 2 + 0.5
    distance = (video - target).square().mean(1).sqrt()  # [F, H, W]
    weight = (1 - distance / nearness * 2).clamp_min(0).square()
    weight = weight - weight.amin(0)
    rows, columns = data.units(*video.shape[2:], "cpu")
    total = weight.sum((1, 2)).clamp_min(1e-6)
    x = (weight * columns).sum((1, 2)) / total
    y = (weight * rows[:, None]).sum((1, 2)) / total
    return torch.stack((x, y), 1)


def object_direction(video, colour):
    """Which way a shape of this colour went, or None if it moved less than a quarter of its way."""
    place = centroid(video, colour)
    third = max(1, len(video) // 3)
    way = place[-third:].mean(0) - place[:third].mean(0)
    least = 0.25 * data.OBJECT_SPEED * (len(video) - third)
    scores = {name: float(way @ torch.tensor(step, dtype=way.dtype)) for name, step in data.STEP.items()}
    best = max(scores, key=scores.get)
    return best if scores[best] >= least else None


def scene_change(video):
    """Which of `data.SCENES` goes on in a video [F, 3, H, W] in [0, 1], or None: see `LEAST_OF_A_SCENE`."""
    found = {name: scene_share(video, name) for name in data.SCENES}
    best = max(found, key=found.get)
    return best if found[best] > LEAST_OF_A_SCENE[best] else None


def scene_share(video, name):
    """How much nearer a video is to the drawn scene than a still is: 1 the same, 0 no nearer.

    All nights, snow and waves are the same, so what they make of the video's own first frame is known.
    """
    first = video[0].unsqueeze(1)  # [3, 1, H, W]
    still = 2 * first.expand(-1, len(video), -1, -1)[None] - 1
    rows, columns = data.units(*video.shape[2:], video.device)
    drawn = weathered(still.clone(), [data.Motion("scene", name)], rows, columns)[0] / 2 + 0.5
    left, all_of_it = (video.transpose(0, 1) - drawn).square().sum(), (drawn - first).square().sum()
    return 1 - float(left / all_of_it)


def saturation(frame):
    """Mean distance of the largest and the smallest channel, of [3, H, W]."""
    return float((frame.amax(0) - frame.amin(0)).mean())
