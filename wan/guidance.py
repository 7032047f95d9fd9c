"""Guidance rules: velocities of finished passes -> one velocity.

All act in velocity space (v = noise - clean), where the authors state them; a rule for denoised
images is another formula.
"""


def cfg(cond, uncond, scale):
    """Classifier-free guidance, v_u + w (v_c - v_u) (Ho and Salimans, arXiv 2207.12598).

    Args:
        cond, uncond: velocities of the same shape, float32.
        scale: w; 1 is the conditional velocity alone, for which `sample` skips the other pass.
    """
    return uncond + scale * (cond - uncond)
