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


def cfg_zero_star(cond, uncond, scale):
    """CFG-Zero*: `cfg` with the unconditional velocity scaled to fit the conditional one best.

    The scale is s* = <v_c, v_u> / (|v_u|^2 + 1e-8), one for each sample, in float32 (Fan et al., arXiv
    2503.18886; `optimized_scale` in WeichenFan/CFG-Zero-star `models/wan/wan_pipeline.py`). The same
    paper's zero-init, no velocity in the first steps, is a rule about steps and stands in `sample`.

    Args:
        cond, uncond: velocities [B, ...] of the same shape.
        scale: w, as in `cfg`.
    """
    cond, uncond = cond.float(), uncond.float()
    c, u = cond.flatten(1), uncond.flatten(1)
    best = (c * u).sum(dim=1) / (u.square().sum(dim=1) + 1e-8)  # (B,)
    return cfg(cond, uncond * best.view(-1, *[1] * (cond.ndim - 1)), scale)
