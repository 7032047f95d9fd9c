"""Which checkpoint and size runs on how much device memory, by the estimate of `wan/memory.py`, as a table.

    python scripts/memory_table.py

81 frames, guidance (two passes), bf16 arithmetic. Prints Markdown; docs/memory.md holds it.
"""

from lib import pack

pack.load_pack()

import torch  # noqa: E402
from lib.markdown import table  # noqa: E402
from wan21.wan.config import CLIP_TOKENS, SIZES  # noqa: E402
from wan21.wan.dit import WanModel  # noqa: E402
from wan21.wan.memory import GIB, StepSize, choose_plans, plans_from, step_bytes  # noqa: E402

DEVICES = (8, 12, 16, 24, 48, 80)
RESERVE = 1.0 * GIB  # CUDA's context, the screen, and what ComfyUI leaves to others
CHECKPOINTS = (  # name, size, bytes a number in the matrices of the blocks; others have two
    ("14B i2v bf16", "i2v-14B", 2),
    ("14B i2v fp8", "i2v-14B", 1),
    ("14B i2v GGUF Q4_K", "i2v-14B", 144 / 256),
    ("1.3B i2v (Fun) bf16", "i2v-1.3B", 2),
    ("1.3B t2v bf16", "t2v-1.3B", 2),
)
LATENTS = {"480x832": (1, 16, 21, 60, 104), "720x1280": (1, 16, 21, 90, 160)}


def weight_bytes(config, width):
    """Bytes of a checkpoint whose blocks have matrices of `width` bytes a number; others have two."""
    with torch.device("meta"):
        weights = WanModel(config, torch.nn).state_dict()
    packed = sum(w.numel() for key, w in weights.items() if key.startswith("blocks.") and w.ndim == 2)
    return packed * width + 2 * (sum(w.numel() for w in weights.values()) - packed)


def cell(size, weights, budget):
    """What happens to a job with so many bytes for weights and activations."""
    plans = plans_from(True)
    needs = {plan: step_bytes(size, plan) for plan in plans}
    plan = choose_plans(plans, list(needs.values()), weights, budget)[0]
    low = " *" if plan != plans[0] else ""
    if needs[plan] + weights <= budget:
        return "resident" + low
    if needs[plan] > 0.9 * budget:
        return "no"
    return f"{max(0, budget - needs[plan]) / weights:.0%}{low}"


def rows():
    """One a checkpoint and size: weights, a step, the least step, and what each device makes of it."""
    for name, release, width in CHECKPOINTS:
        config = SIZES[release]
        weights = weight_bytes(config, width)
        for latent_name, latent in LATENTS.items():
            size = StepSize(config, latent, image_tokens=CLIP_TOKENS if config.image_dim else 0)
            plans = plans_from(True)
            sizes = (weights, step_bytes(size, plans[0]), step_bytes(size, plans[-1]))
            cells = (cell(size, weights, d * GIB - RESERVE) for d in DEVICES)
            yield name, latent_name, *(f"{n / GIB:.1f} GiB" for n in sizes), *cells


def as_table():
    headings = ("checkpoint", "size", "weights", "step", "least", *(f"{d} GB" for d in DEVICES))
    return table(headings, rows())


if __name__ == "__main__":
    print(as_table())
