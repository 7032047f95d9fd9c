"""Clips and start images that no training has seen, to measure the bundled checkpoint on."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from . import data, metrics

PHOTOGRAPHS = Path(__file__).with_name("photographs")  # whose they are: LICENCES.md there

CLIPS = data.HELD_OUT + 10**6  # seeds of their own: training measures itself on others


def held_out(seed, count, size, motions):
    """Clips never trained on, [count, F, 3, H, W] in [0, 1], rounded to 8 bits; and their motions."""
    video, motions = data.clips(CLIPS + seed, count, *size, motions=motions)
    return ((video.movedim(1, 2) + 1) * 127.5).round().clamp(0, 255) / 255, motions


def pictures(seed, count, size):
    """Start images on which the nine camera motions can be told apart at all."""
    kept = []
    for batch in range(100):
        video, _ = held_out(seed + batch, 8, (1, *size[1:]), ["still"])
        kept += [clip[0] for clip in video if metrics.tells_motions_apart(clip[0], size[0])]
        if len(kept) >= count:
            break
    return kept[:count]


def photographs():
    """Pictures that are not drawn here: name -> [3, 128, 128] in [0, 1]."""
    files = sorted(PHOTOGRAPHS.glob("*.png"))
    return {path.stem: torch.from_numpy(np.array(Image.open(path))).movedim(-1, 0) / 255 for path in files}
