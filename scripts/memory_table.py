"""Which checkpoint and size runs on how much device memory, by the estimate of `wan/memory.py`, as a table.

    python scripts/memory_table.py

81 frames, guidance (two passes), bf16 arithmetic. Where weights are streamed, the two blocks that are fetched
ahead are taken off; of GGUF files, whose layers fetch their own, there are none. Prints Markdown, which
docs/memory.md holds.
"""

from dataclasses import replace

from lib import pack

pack.load_pack()

import torch  # noqa: E402
from lib.markdown import table  # noqa: E402
from wan21.wan.config import CLIP_TOKENS, SIZES  # noqa: E402
from wan21.wan.dit import WanModel  # noqa: E402
from wan21.wan.memory import GIB, StepSize, choose_plans, plans_from, step_bytes  # noqa: E402

DEVICES = (8, 12, 16, 24, 48, 80)
BUFFERS = 2  # blocks on the device that are fetched ahead, as of host/prefetch.py
RESERVE = 1.0 * GIB  # CUDA's context, the screen, and what ComfyUI leaves to others
CHECKPOINTS = (  # name, size, bytes a number in the matrices of the blocks; others have two
    ("14B i2v bf16", "i2v-14B", 2),
    ("14B i2v fp8", "i2v-14B", 1),
    ("14B i2v GGUF Q4_K", "i2v-14B", 144 / 256),
    ("1.3B i2v (Fun) bf16", "i2v-1.3B", 2),
    ("1.3B t2v bf16", "t2v-1.3B", 2),
)
LATENTS = {"480x832": (1, 16, 21, 60, 104), "720x1280": (1, 16, 21, 90, 160)}


def weight_bytes(config, width, prefix=""):
    """Bytes of a checkpoint whose blocks have matrices of `width` bytes a number; others have two.

    Of the tensors alone whose key begins so.
    """
    with torch.device("meta"):
        weights = WanModel(config, torch.nn).state_dict()
    of_them = {key: w for key, w in weights.items() if key.startswith(prefix)}
    packed = sum(w.numel() for key, w in of_them.items() if key.startswith("blocks.") and w.ndim == 2)
    return packed * width + 2 * (sum(w.numel() for w in of_them.values()) - packed)


def cell(size, weights, budget, ahead):
    """What happens to a job with so many bytes for weights and activations."""
    plans = plans_from(True)
    plans = (*plans, replace(plans[-1], ahead=False)) if ahead else plans
    needs = [step_bytes(size, plan) for plan in plans]
    plan = choose_plans(plans, needs, weights, budget, ahead)[0]
    need = step_bytes(size, plan)
    low = " *" if plan != plans[0] else ""
    if need + weights <= budget:
        return "resident" + low
    if need > 0.9 * budget:
        return "no"
    if ahead and not plan.ahead:
        ahead, low = 0, " **"
    return f"{max(0, budget - need - ahead) / weights:.0%}{low}"


def rows():
    """One a checkpoint and size: weights, a step, the least step, and what each device makes of it."""
    for name, release, width in CHECKPOINTS:
        config = SIZES[release]
        weights = weight_bytes(config, width)
        ahead = 0 if width < 1 else BUFFERS * weight_bytes(config, width, "blocks.0.")
        for latent_name, latent in LATENTS.items():
            size = StepSize(config, latent, image_tokens=CLIP_TOKENS if config.image_dim else 0)
            plans = plans_from(True)
            sizes = (weights, step_bytes(size, plans[0]), step_bytes(size, plans[-1]))
            cells = (cell(size, weights, d * GIB - RESERVE, ahead) for d in DEVICES)
            yield name, latent_name, *(f"{n / GIB:.1f} GiB" for n in sizes), *cells


def as_table():
    headings = ("checkpoint", "size", "weights", "step", "least", *(f"{d} GB" for d in DEVICES))
    return table(headings, rows())


if __name__ == "__main__":
    print(as_table())
