"""LoRA files: what they hold, which of it fits a model, and the arithmetic of each kind.

O output width, I input width, r rank. A `Patch` changes one parameter W of the model:
W + strength * delta, or for DoRA W + strength * (magnitude * (W + delta) / |W + delta| - W).

Sources: LoRA https://arxiv.org/abs/2106.09685, rank-stabilised LoRA https://arxiv.org/abs/2312.03732, DoRA
https://arxiv.org/abs/2402.09353, LoHa and LoKr https://arxiv.org/abs/2309.14859.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .files.bad_file import listed
from .files.kinds import LORA, not_a
from .files.limits import FLOATS
from .files.lora_alpha import Scaling
from .files.lora_keys import TEXT_PREFIXES, parameter_of, split_lora_key
from .refusal import Refusal

KINDS = {
    "low_rank": ("up", "down", "mid"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
}
# Ends of keys of kinds that are not read here.
UNREAD_KINDS = {
    ".oft_blocks": "OFT or BOFT",
    ".oft_diag": "OFT or BOFT",
    ".oft_R.weight": "OFT (PEFT's)",
    ".oft_r": "OFT (PEFT's)",
    ".a1.weight": "GLoRA",
    ".vera_lambda_b": "VeRA",
    ".ia3_l": "IA3",
    ".on_input": "IA3",
    ".set_weight": "whole weights (set_weight)",
}
LARGEST = 1e9  # number in a LoRA's tensors
OTHER_SIZE = "made for layers of another size"
NO_FACTORS = "the factors that belong to it are missing"
ODD_FACTORS = "its factors are incomplete or do not fit each other"
DAMAGED = (NO_FACTORS, ODD_FACTORS)
DIFFERENCES = ("diff", "diff_b", "diff_m", "up_bias")  # the tensor of these roles is itself the change
Shapes = Mapping[str, tuple[int, ...]]  # by parameter of a model
_IMAGE_BRANCH = re.compile(r"(^|\.)(img_emb|k_img|v_img|norm_k_img|image_embedder)(\.|$)")


class UnreadKind(Refusal):
    """A LoRA of a kind that is not read here."""


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


def delta(
    patch: Patch,
    shape: Sequence[int],
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What a patch adds to a parameter of `shape` at strength 1, before DoRA's norm."""
    parts = [None if t is None else t.to(device=device, dtype=dtype) for t in patch.factors]
    product = {"low_rank": _low_rank, "loha": _loha, "lokr": _lokr, "difference": lambda d: d}[patch.kind]
    return (product(*parts) * patch.scale).reshape(shape)


def apply_patch(
    patch: Patch, weight: Tensor, strength: float | Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weight with a patch added to it, in place.

    Args:
        strength: a tensor is 0-D.
        dtype: of the products.
    """
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
    return torch.einsum("pq...,op,iq->oi...", core, a, b).contiguous()  # torch.kron needs that


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
    state_dict: Mapping[str, Tensor], shapes: Shapes, metadata: Mapping[str, str] | None = None
) -> Lora:
    """What a LoRA file changes in a model.

    Args:
        state_dict: the file's tensors, in any dialect of `lora_keys`.
        shapes: the model's parameters by Wan's own names, as of `WanModel.state_dict()`.
        metadata: the file's; rank stabilisation and PEFT's alphas are read from it.

    Raises:
        WrongKind: the file is no LoRA at all; says what it is.
        UnreadKind: its kind is none of `KINDS`.
        Refusal: its numbers are not finite, or it is damaged.
    """
    if kind := next(
        (name for end, name in UNREAD_KINDS.items() for k in state_dict if k.endswith(end)), None
    ):
        raise UnreadKind(f"a LoRA of the kind {kind}, which is not read here", "Pick a LoRA of another kind")
    lora, layers, origin = Lora(), {}, {}
    for key, tensor in state_dict.items():
        split = split_lora_key(key)
        if split is None:
            lora.unmatched[key] = "not a tensor of a LoRA"
        elif split[1] != "alpha" and tensor.dtype not in FLOATS:
            lora.unmatched[key] = (
                f"stored as {str(tensor.dtype).removeprefix('torch.')}, which no LoRA is read in"
            )
        elif split in origin:
            lora.unmatched[key] = f"the same as {origin[split]}"
        else:
            origin[split] = key
            layers.setdefault(split[0], {})[split[1]] = tensor
    if not layers:
        reasons = sorted({why for key, why in lora.unmatched.items() if split_lora_key(key)})
        if reasons:
            raise Refusal(f"its factors are {listed(reasons)}", "Pick a LoRA in float32, float16 or bfloat16")
        raise not_a(LORA, state_dict)
    if key := next((key for key in origin.values() if not _is_finite(state_dict[key])), None):
        raise Refusal(
            f"{key} holds numbers that are NaN or infinite, or above {LARGEST:g}",
            "Download it again, or pick another",
        )
    scaling = Scaling(metadata or {})
    blocks = 1 + max((int(k.split(".")[1]) for k in shapes if k.startswith("blocks.")), default=-1)
    for module, tensors in layers.items():
        patches, reasons = _layer_patches(module, tensors, shapes, scaling, blocks)
        lora.patches += patches
        for role in tensors:
            key = origin[module, role]
            if role in reasons:
                lora.unmatched[key] = reasons[role]
            else:
                lora.matched.append(key)
    return lora


def _is_finite(tensor: Tensor) -> bool:
    if tensor.dtype.itemsize == 1 or not tensor.is_floating_point():  # torch asks no fp8, no uint32
        tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor.float()
    return not tensor.numel() or bool(tensor.abs().amax() <= LARGEST)


def _layer_patches(
    module: str, tensors: Mapping[str, Tensor], shapes: Shapes, scaling: "Scaling", blocks: int
) -> tuple[list[tuple[str, Patch]], dict[str, str]]:
    """Patches of one layer, and a reason for each role that gives none."""
    patches, reasons = [], {}
    for target, patch, roles in _candidates(module, tensors):
        if roles & reasons.keys():  # a bias of factors that do not fit
            continue
        if reason := _reason(target, patch, shapes, blocks):
            reasons |= dict.fromkeys(roles, reason)
            continue
        if roles == {"up_bias"}:  # scaled as the factors that it belongs to
            scale = patches[0][1].scale if patches else 1.0
        else:
            scale = scaling.of(module, tensors.get("alpha"), patch.rank)
        if patch.magnitude is not None:
            patch = patch._replace(magnitude=_broadcast(patch.magnitude, shapes[target]))
        patches.append((target, patch._replace(scale=scale)))
    return patches, reasons


def _candidates(module: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Patch, frozenset[str]]]:
    """What the tensors of a layer may be: (parameter, unscaled patch, roles that it uses up).

    A patch of no factors stands for additions to factors that the file lacks.
    """
    additions = frozenset(tensors.keys() & {"alpha", "magnitude", "up_bias"})
    for kind, names in KINDS.items():
        roles = frozenset(tensors.keys() & set(names))
        if roles:
            patch = Patch(kind, tuple(map(tensors.get, names)), magnitude=tensors.get("magnitude"))
            yield parameter_of(module, names[0]), patch, roles | additions
            additions = frozenset()
    for role in sorted(additions - {"up_bias"}):
        yield f"{module}.weight", Patch("low_rank", ()), frozenset({role})
    for role in DIFFERENCES:
        if role in tensors:
            yield parameter_of(module, role), Patch("difference", (tensors[role],)), frozenset({role})


def _reason(target: str, patch: Patch, shapes: Shapes, blocks: int) -> str | None:
    """Why a patch does not fit the model, or None if it does."""
    if missing := _missing(target, shapes, blocks):
        return missing
    if not patch.factors:
        return NO_FACTORS
    return _misfit(patch, shapes[target])


def _missing(parameter: str, shapes: Shapes, blocks: int) -> str | None:
    """Why a model of so many blocks has no such parameter, or None if it has."""
    if parameter in shapes:
        return None
    if parameter.startswith(TEXT_PREFIXES):
        return "text-encoder keys; only the diffusion model is changed"
    if _IMAGE_BRANCH.search(parameter) and "img_emb.proj.0.weight" not in shapes:
        return "image-branch keys on a model without image branch"
    block = re.match(r"blocks\.(\d+)\.", parameter)
    if block and int(block[1]) >= blocks:
        return f"blocks past the model's {blocks}"
    return "no such layer in this model"


def _misfit(patch: Patch, shape: tuple[int, ...]) -> str | None:
    """Why a patch does not change a tensor of `shape`, or None if it does."""
    if any(t is not None and not t.numel() for t in patch.factors):
        return "its factors are empty (rank 0)"
    try:
        factors = tuple(None if t is None else t.to("meta") for t in patch.factors)
        made = delta(patch._replace(factors=factors), (-1,)).numel()
        if patch.kind == "difference":
            fits = [tuple(t.shape) for t in patch.factors if t is not None] == [tuple(shape)]
        else:
            fits = made == math.prod(shape) and _rows(patch) == shape[0]
    except (RuntimeError, AttributeError, TypeError, IndexError, ValueError):
        return ODD_FACTORS
    if not fits:
        return OTHER_SIZE
    if patch.magnitude is not None and _broadcast(patch.magnitude, shape) is None:
        return f"its DoRA magnitude {tuple(patch.magnitude.shape)} does not fit a layer of {tuple(shape)}"
    return None


def _rows(patch: Patch) -> int:
    """Output width that the factors make."""
    f: tuple[Any, ...] = patch.factors
    if patch.kind == "low_rank":
        return f[0].shape[0]
    if patch.kind == "loha":
        return f[0].shape[0] if f[4] is None else f[0].shape[1]
    first = f[0] if f[0] is not None else f[1]
    second = f[3] if f[3] is not None else (f[4] if f[6] is None else f[4].T)
    return first.shape[0] * second.shape[0]


def _broadcast(magnitude: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """A DoRA's magnitude with sides that broadcast over a parameter; None if it does not fit.

    Its norm is per output ([O], PEFT; [O, 1], LyCORIS) or per input ([1, I]).
    """
    sides = tuple(magnitude.shape)
    if sides[:1] == (shape[0],) and magnitude.numel() == shape[0]:
        axis = 0
    elif len(shape) > 1 and sides[:2] == (1, shape[1]) and magnitude.numel() == shape[1]:
        axis = 1
    else:
        return None
    view = [1] * len(shape)
    view[axis] = shape[axis]
    return magnitude.reshape(view)


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
    """The step that a call of the model with `sigma` belongs to.

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
