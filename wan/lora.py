"""LoRA files: what they hold, which of it fits a model, and the arithmetic of each kind.

O output width, I input width, r rank. A `Patch` changes one parameter W of the model:
W + strength * delta, or for DoRA W + strength * (magnitude * (W + delta) / |W + delta| - W).

Sources: LoRA https://arxiv.org/abs/2106.09685, rank-stabilised LoRA https://arxiv.org/abs/2312.03732, DoRA
https://arxiv.org/abs/2402.09353, LoHa and LoKr https://arxiv.org/abs/2309.14859.
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .files.kinds import LORA, not_a
from .files.lora_keys import TEXT_PREFIXES, parameter_of, split_lora_key
from .refusal import Refusal

KINDS = {
    "low_rank": ("up", "down", "mid"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
}
NAMES_SHOWN = 10
_IMAGE_BRANCH = re.compile(r"(^|\.)(img_emb|k_img|v_img|norm_k_img|image_embedder)(\.|$)")


class Patch(NamedTuple):
    """One change to one parameter.

    Attributes:
        kind: low_rank, loha, lokr or difference.
        factors: its tensors in the order of `KINDS`, None where absent; one for a difference.
        scale: alpha / r, alpha / sqrt(r) if rank-stabilised, or 1.
        magnitude: DoRA's, [O, 1, ...] or [1, I, ...], else None.
    """

    kind: str
    factors: tuple[Tensor | None, ...]
    scale: float = 1.0
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int | None:
        """r, or None where nothing is factorised."""
        inner = {"low_rank": (1,), "loha": (1,), "lokr": (2, 5)}.get(self.kind, ())
        found = [self.factors[i].shape[0] for i in inner if self.factors[i] is not None]
        return found[0] if found else None


def delta(patch: Patch, shape, device=None, dtype=torch.float32) -> Tensor:
    """What a patch adds to a parameter of `shape` at strength 1, before DoRA's norm."""
    parts = [None if t is None else t.to(device=device, dtype=dtype) for t in patch.factors]
    product = {"low_rank": _low_rank, "loha": _loha, "lokr": _lokr, "difference": lambda d: d}[patch.kind]
    return (product(*parts) * patch.scale).reshape(shape)


def apply_patch(patch: Patch, weight: Tensor, strength: float | Tensor, dtype=torch.float32) -> Tensor:
    """Change `weight` in place and return it; products are taken in `dtype`. A tensor `strength` is 0-D."""
    change = delta(patch, weight.shape, weight.device, dtype)
    if patch.magnitude is not None:
        whole = change.add_(weight)
        axes = [i for i, side in enumerate(patch.magnitude.shape) if side == 1]
        norm = torch.linalg.vector_norm(whole, dim=axes, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
        change = whole.mul_(patch.magnitude.to(whole) / norm).sub_(weight)
    return weight.add_((change * strength).to(weight.dtype))


def _low_rank(up, down, mid):
    if mid is not None:
        return _tucker(mid, up.flatten(1), down.flatten(1).T)
    return up.flatten(1) @ down.flatten(1)  # (O, I...)


def _loha(w1_a, w1_b, w2_a, w2_b, t1, t2):
    if t1 is None:
        return (w1_a @ w1_b) * (w2_a @ w2_b)  # (O, I...)
    return _tucker(t1, w1_a.T, w1_b.T) * _tucker(t2, w2_a.T, w2_b.T)


def _lokr(w1, w1_a, w1_b, w2, w2_a, w2_b, t2):
    w1 = w1_a @ w1_b if w1 is None else w1
    if w2 is None:
        w2 = w2_a @ w2_b if t2 is None else _tucker(t2, w2_a.T, w2_b.T)
    return torch.kron(w1[(...,) + (None,) * (w2.ndim - 2)], w2)


def _tucker(core, a, b):
    """core [r, r, k...] with a [O, r] and b [I, r] -> [O, I, k...]."""
    return torch.einsum("pq...,op,iq->oi...", core, a, b).contiguous()  # as torch.kron wants it


# --- what fits a model --------------------------------------------------------------------------------


@dataclass
class Lora:
    """A LoRA as far as it fits a model.

    Attributes:
        patches: (parameter of the model, Patch), in the file's order.
        matched: keys of the file that are used.
        unmatched: those that are not -> why.
    """

    patches: list[tuple[str, Patch]] = field(default_factory=list)
    matched: list[str] = field(default_factory=list)
    unmatched: dict[str, str] = field(default_factory=dict)


def match_lora(
    state_dict: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None
) -> Lora:
    """Find what a LoRA file changes in a model.

    Args:
        state_dict: the file's tensors, in any dialect of `lora_keys`.
        shapes: the model's parameters by Wan's own names, as of `WanModel.state_dict()`.
        metadata: the file's; rank stabilisation and PEFT's alphas are read from it.

    Raises:
        WrongKind: the file is no LoRA at all; says what it is.
    """
    lora, layers, origin = Lora(), {}, {}
    for key, tensor in state_dict.items():
        split = split_lora_key(key)
        if split is None:
            lora.unmatched[key] = "not a tensor of a LoRA"
        elif split in origin:
            lora.unmatched[key] = f"the same as {origin[split]}"
        else:
            origin[split] = key
            layers.setdefault(split[0], {})[split[1]] = tensor
    if not layers:
        raise not_a(LORA, state_dict)
    scaling = _Scaling(metadata or {})
    for module, tensors in layers.items():
        patches, reasons = _layer_patches(module, tensors, shapes, scaling)
        lora.patches += patches
        for role in tensors:
            key = origin[module, role]
            if role in reasons:
                lora.unmatched[key] = reasons[role]
            else:
                lora.matched.append(key)
    return lora


def _layer_patches(module, tensors, shapes, scaling):
    """Patches of one layer, and a reason for each role that gives none."""
    patches, reasons = [], {}
    left = set(tensors)
    for kind, roles in KINDS.items():
        used = left & {*roles, "alpha", "magnitude", "up_bias"}
        if not left & set(roles):
            continue
        left -= used
        patch = Patch(kind, tuple(tensors.get(role) for role in roles))
        target = parameter_of(module, roles[0])
        reason = _missing(target, shapes) or _misfit(patch, shapes[target])
        if reason is None:
            scale = scaling.of(module, tensors.get("alpha"), patch.rank)
            patch = patch._replace(scale=scale)
            if "magnitude" in tensors:
                patch, reason = _with_magnitude(patch, tensors["magnitude"], shapes[target])
        if reason:
            reasons |= dict.fromkeys(used, reason)
            continue
        patches.append((target, patch))
        if "up_bias" in tensors:
            left.add("up_bias")
    for role in sorted(left):
        if role not in ("diff", "diff_b", "diff_m", "up_bias"):
            reasons[role] = (
                _missing(f"{module}.weight", shapes) or "the factors that belong to it are missing"
            )
            continue
        target = parameter_of(module, role)
        scale = patches[0][1].scale if role == "up_bias" and patches else 1.0
        patch = Patch("difference", (tensors[role],), scale)
        reason = _missing(target, shapes) or _misfit(patch, shapes[target])
        if reason:
            reasons[role] = reason
        else:
            patches.append((target, patch))
    return patches, reasons


def _missing(parameter, shapes):
    """Why a model has no such parameter, or None if it has."""
    if parameter in shapes:
        return None
    if parameter.startswith(TEXT_PREFIXES):
        return "text-encoder keys; only the diffusion model is changed"
    if _IMAGE_BRANCH.search(parameter) and "img_emb.proj.0.weight" not in shapes:
        return "image-branch keys on a model without image branch"
    blocks = 1 + max((int(k.split(".")[1]) for k in shapes if k.startswith("blocks.")), default=-1)
    block = re.match(r"blocks\.(\d+)\.", parameter)
    if block and int(block[1]) >= blocks:
        return f"blocks past the model's {blocks}"
    return "no such layer in this model"


def _misfit(patch, shape):
    """Why the factors do not make a tensor of `shape`, or None if they do."""
    try:
        factors = tuple(None if t is None else t.to("meta") for t in patch.factors)
        made = delta(patch._replace(factors=factors), (-1,)).numel()
        if patch.kind == "difference":
            fits = tuple(patch.factors[0].shape) == tuple(shape)
        else:
            fits = made == math.prod(shape) and _rows(patch) == shape[0]
    except (RuntimeError, AttributeError, TypeError, IndexError, ValueError):
        return "its factors are incomplete or do not fit each other"
    return None if fits else "made for layers of another size"


def _rows(patch):
    """Output width that the factors make."""
    f = patch.factors
    if patch.kind == "low_rank":
        return f[0].shape[0]
    if patch.kind == "loha":
        return f[0].shape[0] if f[4] is None else f[0].shape[1]
    first = f[0] if f[0] is not None else f[1]
    second = f[3] if f[3] is not None else (f[4] if f[6] is None else f[4].T)
    return first.shape[0] * second.shape[0]


def _with_magnitude(patch, magnitude, shape):
    """A DoRA's patch: its norm is per output ([O], PEFT; [O, 1], LyCORIS) or per input ([1, I])."""
    sides = tuple(magnitude.shape)
    if sides[:1] == (shape[0],) and magnitude.numel() == shape[0]:
        axis = 0
    elif len(shape) > 1 and sides[:2] == (1, shape[1]) and magnitude.numel() == shape[1]:
        axis = 1
    else:
        return patch, f"its DoRA magnitude {sides} does not fit a layer of {tuple(shape)}"
    view = [1] * len(shape)
    view[axis] = shape[axis]
    return patch._replace(magnitude=magnitude.reshape(view)), None


class _Scaling:
    """alpha / r of a layer, by the file's own alphas or else PEFT's configuration in its metadata."""

    def __init__(self, metadata):
        try:  # written by diffusers' save_lora_weights
            config = json.loads(metadata.get("lora_adapter_metadata") or "{}")
            config = {key.rpartition(".")[2]: value for key, value in config.items()}
        except (ValueError, AttributeError):
            config = {}
        self.stabilised = config.get("use_rslora", False)
        self.default = config.get("lora_alpha")
        self.patterns = config.get("alpha_pattern") or {}

    def of(self, module, alpha, rank):
        if rank is None:
            return 1.0
        if alpha is not None:  # LyCORIS writes one that holds its rank stabilisation already
            return alpha.flatten()[0].item() / rank
        alpha = next((a for name, a in self.patterns.items() if _names(name, module)), self.default)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.stabilised else rank)


def _names(pattern, module):
    """Whether a name of PEFT's `alpha_pattern`, in diffusers' or Wan's names, means this layer."""
    name, _ = split_lora_key(f"{pattern}.alpha")
    return module == name or module.endswith("." + name)


# --- the report ---------------------------------------------------------------------------------------


def check_lora(lora: Lora, strict: bool = False) -> None:
    """Refuse a LoRA that changes nothing, and in `strict` one that does not fit in whole.

    Raises:
        Refusal: with the keys that do not fit, and why.
    """
    if not lora.patches:
        raise Refusal(
            f"none of its {len(lora.unmatched)} keys fits the model: {'; '.join(_left_out(lora))}",
            "Pick a LoRA that was trained for Wan2.1 of this size",
        )
    if strict and lora.unmatched:
        raise Refusal(
            f"{len(lora.unmatched)} keys do not fit the model: {'; '.join(_left_out(lora))}",
            "Turn strict off to apply the rest",
        )


def lora_report(lora: Lora) -> list[str]:
    """Lines on what is applied (layers, ranks, blocks) and what is left out, and why."""
    layers = {name.removesuffix(".weight").removesuffix(".bias") for name, _ in lora.patches}
    ranks = Counter(patch.rank for _, patch in lora.patches if patch.rank)
    kinds = Counter(
        "dora" if patch.magnitude is not None else patch.kind.replace("_", "-") for _, patch in lora.patches
    )
    blocks = {int(name.split(".")[1]) for name, _ in lora.patches if name.startswith("blocks.")}
    keys = len(lora.matched) + len(lora.unmatched)
    lines = [f"applied: {len(lora.matched)} of {keys} keys, {len(layers)} layers, {_counts(kinds)}"]
    if ranks:
        lines.append(f"rank: {ranks.most_common(1)[0][0] if len(ranks) == 1 else _counts(ranks)}")
    lines.append(f"blocks: {_ranges(sorted(blocks)) or 'none'}")
    outside = sorted(layer for layer in layers if not layer.startswith("blocks."))
    if outside:
        lines.append(f"outside the blocks: {_some(outside)}")
    return lines + [f"left out: {text}" for text in _left_out(lora)]


def _left_out(lora):
    by_reason = {}
    for key, reason in lora.unmatched.items():
        by_reason.setdefault(reason, []).append(key)
    return [f"{len(keys)} keys, {reason}: {_some(keys)}" for reason, keys in by_reason.items()]


def _some(names):
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def _counts(counter):
    return ", ".join(f"{count} x {name}" for name, count in counter.most_common())


def _ranges(numbers):
    """Sorted numbers -> "0-29, 31"."""
    runs = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


# --- strength over the steps --------------------------------------------------------------------------


def parse_schedule(text: str) -> list[float]:
    """A comma list of multipliers, "1, 0.5, 0"; none for an empty text.

    Raises:
        Refusal: an entry is no finite number.
    """
    entries = [entry.strip() for entry in text.split(",")] if text.strip() else []
    values = []
    for entry in entries:
        try:
            values.append(float(entry))
        except ValueError:
            values.append(math.nan)
        if not math.isfinite(values[-1]):
            raise Refusal(
                f"strength_schedule holds {entry!r}; it must be a list of numbers", "Write it like 1, 0.5, 0"
            )
    return values


def scheduled(values: list[float], step: int, steps: int) -> float:
    """The multiplier of a step, 0 to steps - 1: the list is spread over the steps (Wan2GP's meaning)."""
    return values[step * len(values) // steps]


def step_at(sigma: float, sigmas: list[float]) -> int:
    """The step in which a model is told `sigma`.

    Args:
        sigma: in [0, 1]; of the schedule, or truncated to a whole timestep (UniPC, DPM++).
        sigmas: the run's, one more than its steps.

    Returns:
        0 to len(sigmas) - 2. Between two sigmas (a solver that evaluates there) it is the step under way.
    """
    begins = sigmas[:-1]
    for i, begin in enumerate(begins):
        if abs(begin - sigma) < 1e-5:
            return i
    for i, begin in enumerate(begins):
        if abs(math.trunc(1000 * begin) / 1000 - sigma) < 1e-5:
            return i
    return max((i for i, begin in enumerate(begins) if begin > sigma), default=0)
