"""Two clips become one, where the second begins with frames that the first ends with.

Images are [F, H, W, 3] in [0, 1].
"""

from collections.abc import Callable

import torch
from torch import Tensor

BLENDS = ("linear", "smooth", "cut")


def blend_weights(blend: str, overlap: int) -> list[float]:
    """The share of the second clip in each frame that both show.

    Args:
        blend: one of `BLENDS`. linear grows in even steps and is neither 0 nor 1 inside, smooth is its
            smoothstep (3t² - 2t³), cut keeps the first clip's frames.
        overlap: frames.

    Returns:
        `overlap` numbers in [0, 1).
    """
    if blend == "cut":
        return [0.0] * overlap
    weights = [(k + 1) / (overlap + 1) for k in range(overlap)]
    return [t * t * (3 - 2 * t) for t in weights] if blend == "smooth" else weights


def join_clips(
    first: Tensor,
    second: Tensor,
    overlap: int,
    blend: str,
    recolor: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """One clip of two, each frame written once into the result.

    Args:
        first, second: [F1, H, W, 3], [F2, H, W, 3].
        overlap: frames at the end of `first` and at the beginning of `second` that show the same; at most
            as many as either has.
        blend: of `blend_weights`.
        recolor: [H, W, 3] -> [H, W, 3], applied to the frames of `second`.
        progress: `progress(done, total)` in frames of the result.

    Returns:
        [F1 + F2 - overlap, H, W, 3] on the device of `first`, in the wider of both types.
    """
    total, start = len(first) + len(second) - overlap, len(first) - overlap
    dtype = torch.promote_types(first.dtype, second.dtype)
    result = torch.empty(total, *first.shape[1:], dtype=dtype, device=first.device)
    weights = blend_weights(blend, overlap)
    for i in range(total):
        weight = weights[i - start] if start <= i < len(first) else float(i >= start)
        if weight < 1:
            result[i] = first[i]
        if weight > 0:
            frame = second[i - start] if recolor is None else recolor(second[i - start])
            frame = frame.to(result)
            result[i] = frame if weight == 1 else torch.lerp(result[i], frame, weight)
        progress(i + 1, total)
    return result
