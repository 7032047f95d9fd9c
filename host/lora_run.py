"""LoRAs on the model while a run lasts: worked into each parameter at its use, at the strength of a step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import comfy.lora
import comfy.model_management
import comfy.utils
import torch
from torch import Tensor, nn

from ..wan.inplace import may_overwrite
from ..wan.lora import Patch, apply_patch, scheduled, step_at
from ..wan.refusal import Refusal
from .model import CALL
from .products import add_low_rank, takes_additions

PREFIX = "diffusion_model."


class ScheduledLora(NamedTuple):
    """What of a LoRA is worked in while a run lasts.

    Attributes:
        patches: (parameter of the model, Patch).
        values: strengths, spread over the steps of the run.
    """

    patches: list[tuple[str, Patch]]
    values: list[float]


def is_bare(model: nn.Module, key: str) -> bool:
    """Whether a parameter belongs to no layer of the host's, so that no function can act as it is fetched."""
    owner, _, name = (PREFIX + key).rpartition(".")
    return not hasattr(comfy.utils.get_attr(model, owner), f"{name}_function")


_UNKNOWN_STEP = Refusal(
    "a LoRA has a strength_schedule, and what runs the MODEL here does not tell it the step",
    "Clear strength_schedule on Wan21LoraLoader, or sample with Wan21Sampler or one of the host's samplers",
)


def _step_of(transformer_options: dict) -> tuple[int, int]:
    """(step, steps): our sampler tells them; of the host's the noise levels do, which wait for the device."""
    if call := transformer_options.get(CALL):
        return call.step, call.steps
    if transformer_options.get("sample_sigmas") is None:
        raise _UNKNOWN_STEP
    sigmas = transformer_options["sample_sigmas"].cpu().tolist()
    return step_at(float(transformer_options["sigmas"][0]), sigmas), len(sigmas) - 1


@dataclass
class ActiveLora:
    """A LoRA in a run.

    Attributes:
        patches, values: as of `ScheduledLora`.
        value: strength of the step under way; None before the first.
        is_known: whether there is one: compiled code would be made anew for each `value`.
        strength: the same, 0-D: compiled code would hold a number as a constant.
    """

    patches: list[tuple[str, Patch]]
    values: list[float]
    value: float | None = None
    is_known: bool = False
    strength: Tensor = field(default_factory=lambda: torch.zeros(()))


def beside_products(model: nn.Module, patches: Iterable[tuple[str, Patch]]) -> set[str]:
    """Layers in 8 bits whose changes can all be added to their products, which stay in 8 bits.

    Of a block; the few layers outside read float32 and are unpacked at each use anyway.

    Args:
        patches: (parameter of the model, Patch), of all LoRAs.
    """
    layers: dict[str, bool] = {}
    for key, patch in patches:
        owner, _, name = key.rpartition(".")
        if owner not in layers:
            takes = key.startswith("blocks.") and not is_bare(model, key)
            layers[owner] = takes and takes_additions(comfy.utils.get_attr(model, PREFIX + owner))
        layers[owner] = layers[owner] and _is_added(patch, name)
    return {owner for owner, beside in layers.items() if beside}


def _is_added(patch: Patch, name: str) -> bool:
    """Whether a change of a weight or bias is a sum to the product: no DoRA, no product of others."""
    if name == "bias":
        return patch.kind == "difference"
    no_core = len(patch.factors) == 3 and patch.factors[2] is None
    return patch.kind == "low_rank" and patch.magnitude is None and no_core


class HookedWeights:
    """LoRAs on the weights and biases of layers: worked into each as its layer fetches it, or, where the
    layer multiplies in 8 bits, added beside its product.

    Args:
        device: where layers compute. Factors are brought there once, not at each use.
    """

    def __init__(self, model: nn.Module, loras: list[ActiveLora], device: torch.device):
        self.model = model
        self.loras = loras
        self.device = device
        self.functions: list[tuple[nn.Module, str, Callable]] = []  # layer, name of its list, function

    def attach(self) -> None:
        """Gives each layer the functions that change what it fetches or what it gives."""
        beside = beside_products(self.model, (patch for lora in self.loras for patch in lora.patches))
        for lora in self.loras:
            for key, patch in lora.patches:
                if is_bare(self.model, key):
                    continue
                owner, _, name = key.rpartition(".")
                layer: Any = comfy.utils.get_attr(self.model, PREFIX + owner)
                if owner in beside:
                    change, patch, name = _added, self._narrow(patch), "beside"
                else:
                    change, name = _patched, f"{name}_function"
                function = partial(change, lora, _brought(patch, self.device))
                # A new list: the host's default one is shared by all layers.
                setattr(layer, name, [*getattr(layer, name), function])
                self.functions.append((layer, name, function))

    def _narrow(self, patch: Patch) -> Patch:
        """A patch in the dtype of the products, its scale in its last factor."""
        dtype: torch.dtype = self.model.get_dtype_inference()  # pyright: ignore[reportCallIssue]
        *others, last = (t.float().flatten(min(1, t.ndim - 1)) for t in patch.factors if t is not None)
        return patch._replace(factors=tuple(t.to(dtype) for t in (*others, last * patch.scale)), scale=1.0)

    def set(self) -> None:
        """Nothing to do: the functions read each strength when they are called."""

    def detach(self) -> None:
        """Takes the functions away."""
        for layer, name, function in self.functions:
            setattr(layer, name, [f for f in getattr(layer, name) if f is not function])


def _brought(patch: Patch, device: torch.device) -> Patch:
    """A patch with its tensors on a device, in the dtype of the file; as it is where there is no room."""
    try:
        factors = tuple(None if t is None else t.to(device) for t in patch.factors)
        return patch._replace(
            factors=factors, magnitude=None if patch.magnitude is None else patch.magnitude.to(device)
        )
    except Exception as error:
        if not comfy.model_management.is_oom(error):
            raise
        return patch


def _patched(lora: ActiveLora, patch: Patch, weight: Tensor) -> Tensor:
    if not lora.is_known:
        raise _UNKNOWN_STEP
    return apply_patch(patch, weight.clone(), lora.strength, weight.dtype)


def _added(lora: ActiveLora, patch: Patch, x: Tensor, y: Tensor) -> Tensor:
    if not lora.is_known:
        raise _UNKNOWN_STEP
    factors: Any = patch.factors
    if patch.kind == "low_rank":
        return add_low_rank(x, y, *factors, strength=lora.strength)
    change = factors[0].to(y) * lora.strength  # of a bias
    return y.add_(change) if may_overwrite() else y + change


class BareParameters:
    """LoRAs on parameters that no layer fetches, such as modulation: replaced when a strength changes.

    Args:
        merged: the host's patches by key, where two MODELs are merged. The host merges them into what
            it saves, and not into these parameters of a model that runs.
    """

    def __init__(self, model: nn.Module, loras: list[ActiveLora], merged: Mapping[str, list]):
        self.model = model
        self.loras = loras
        self.merged = merged
        self.values: dict[str, Tensor] = {}  # those without any LoRA

    def attach(self) -> None:
        """Keeps the values that the model has."""
        keys = [key for lora in self.loras for key, _ in lora.patches if is_bare(self.model, key)]
        for key in (*keys, *self.merged):
            value: Any = comfy.utils.get_attr(self.model, PREFIX + key)
            self.values[key] = value

    def set(self) -> None:
        """Gives each parameter the value of the step's strengths."""
        for key, value in self.values.items():
            changed = value.detach().clone()
            if changed.dtype.itemsize == 1:  # torch does not add in fp8
                changed = changed.float()
            if key in self.merged:
                changed = comfy.lora.calculate_weight(self.merged[key], changed, PREFIX + key)
            for lora in self.loras:
                for target, patch in lora.patches:
                    if target == key and lora.strength:
                        apply_patch(patch, changed, lora.strength)
            comfy.utils.set_attr_param(self.model, PREFIX + key, changed)

    def detach(self) -> None:
        """Puts the kept values back."""
        for key, value in self.values.items():
            comfy.utils.set_attr_param(self.model, PREFIX + key, value)


class LoraRun:
    """The LoRAs of one model in a sampling run: sets the strengths of each step.

    Args:
        merged: as of `BareParameters`.
        device: as of `HookedWeights`.
    """

    def __init__(
        self,
        model: nn.Module,
        loras: Sequence[ScheduledLora],
        merged: Mapping[str, list],
        device: torch.device,
    ):
        self.loras = [ActiveLora(*lora) for lora in loras]
        self.carriers = [HookedWeights(model, self.loras, device), BareParameters(model, self.loras, merged)]

    def attach(self) -> None:
        for carrier in self.carriers:
            carrier.attach()
        self._set([lora.values[0] if len(lora.values) == 1 else None for lora in self.loras], True)

    def detach(self) -> None:
        for carrier in self.carriers:
            carrier.detach()

    def set_step(self, transformer_options: dict) -> None:
        """Takes the strengths of the step that a call with these options belongs to."""
        if all(len(lora.values) == 1 for lora in self.loras):
            return
        step, steps = _step_of(transformer_options)
        self._set([scheduled(lora.values, step, steps) for lora in self.loras])

    def _set(self, strengths: list[float | None], is_first: bool = False) -> None:
        if not is_first and strengths == [lora.value for lora in self.loras]:
            return
        for lora, strength in zip(self.loras, strengths):
            lora.value, lora.is_known = strength, strength is not None
            lora.strength = torch.tensor(strength or 0.0)
        for carrier in self.carriers:
            carrier.set()
