"""LoRAs on a MODEL: the host's weight patches, and strengths that change over the steps."""

from functools import partial

import comfy.patcher_extension
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter import WeightAdapterBase

from ..wan import files
from ..wan.lora import Patch, apply_patch, match_lora, scheduled, step_at
from .model import CALL, kept_dtype

PREFIX = "diffusion_model."
KEY = "wan21_loras"  # of our wrapper on a MODEL


class HostPatch(WeightAdapterBase):
    """One `Patch` as the host keeps adapters: it merges, offloads and requantises around it."""

    name = "wan21"

    def __init__(self, loaded_keys, weights):
        self.loaded_keys = loaded_keys
        self.weights = weights  # the fields of a Patch; the host moves the tensors in it

    def calculate_weight(
        self,
        weight,
        key,
        strength,
        strength_model,
        offset,
        function,
        intermediate_dtype,
        original_weight=None,
    ):
        return apply_patch(Patch(*self.weights), weight, strength, intermediate_dtype)


def other_family(model) -> str | None:
    """What a MODEL that is no Wan model is called; None for one that is."""
    layers = getattr(model.model, "diffusion_model", None)
    is_wan = layers is not None and "blocks.0.self_attn.q.weight" in layers.state_dict()
    return None if is_wan else type(model.model).__name__


def read_lora(path, model):
    """Match a LoRA file with a MODEL.

    Raises:
        Refusal: the file cannot be read or is no LoRA.
    """
    state = model.model.state_dict()
    shapes = {k.removeprefix(PREFIX): tuple(v.shape) for k, v in state.items() if k.startswith(PREFIX)}
    for name, layer in model.model.named_modules():  # in the state dict these may have their packed shapes
        weight = getattr(layer, "weight", None)
        if getattr(layer, "packed", None):
            shapes[name.removeprefix(PREFIX) + ".weight"] = layer.packed[1]
        elif isinstance(weight, QuantizedTensor):
            shapes[name.removeprefix(PREFIX) + ".weight"] = tuple(weight.shape)
    file = files.read_checkpoint(path)
    return match_lora(file.state_dict, shapes, file.metadata)


def add_lora(model, lora, strength, schedule=()):
    """A clone of a MODEL with a LoRA on it; `schedule` multiplies the strength over the steps of a run.

    One strength throughout is the host's to merge. What it cannot merge, or not without loss, is changed for
    the run, as under a schedule: parameters that belong to no layer (modulation), which its patch system
    passes over, and weights of 8 bits and fewer, where a merged LoRA would be rounded away.
    """
    model = model.clone()
    strengths = [strength * value for value in schedule or (1,)]
    patches = lora.patches
    if len(set(strengths)) == 1:
        for key, patch in patches:
            if strengths[0] and _is_merged(model.model, key):
                model.add_patches({PREFIX + key: HostPatch(set(), tuple(patch))}, strengths[0])
        patches = [(key, patch) for key, patch in patches if not _is_merged(model.model, key)]
    if patches and any(strengths):
        wrappers = model.model_options["transformer_options"].setdefault("wrappers", {})
        wrappers = wrappers.setdefault(WrappersMP.SAMPLER_SAMPLE, {})
        earlier = wrappers[KEY][0].loras if KEY in wrappers else ()
        wrappers[KEY] = [_ForTheRun((*earlier, (patches, strengths)))]
    return model


def changes_weights_at_use(model):
    """Whether a LoRA on this MODEL is worked into matrices as they are used."""
    wrappers = model.model_options["transformer_options"].get("wrappers", {})
    runs = wrappers.get(WrappersMP.SAMPLER_SAMPLE, {}).get(KEY, [])
    keys = [key for run in runs for patches, _ in run.loras for key, _ in patches]
    return not all(_is_bare(model.model, key) for key in keys)


def _is_merged(model, key):
    layer = comfy.utils.get_attr(model, (PREFIX + key).rpartition(".")[0])
    is_quantised = kept_dtype(layer, key.rpartition(".")[2]).itemsize == 1
    return not (is_quantised or _is_bare(model, key))


def _is_bare(model, key):
    owner, _, name = (PREFIX + key).rpartition(".")
    return not hasattr(comfy.utils.get_attr(model, owner), f"{name}_function")


class _ForTheRun:
    """Around a sampler's run, the host's or ours: patches act on each weight as a layer fetches it.

    So no merged copy is kept and nothing is reloaded when a strength changes; the numbers are those of
    merging. Nothing stays on the model after the run.
    """

    def __init__(self, loras):
        self.loras = loras  # (patches, strengths) of each

    def __call__(self, executor, guider, sigmas, extra_args, *args, **kwargs):
        run = _Run(guider.inner_model, self.loras, [float(sigma) for sigma in sigmas])
        comfy.patcher_extension.add_wrapper(
            WrappersMP.APPLY_MODEL, run.apply_model, extra_args["model_options"], True
        )
        try:
            run.attach()
            return executor(guider, sigmas, extra_args, *args, **kwargs)
        finally:
            run.detach()


class _Run:
    """One sampling run."""

    def __init__(self, model, loras, sigmas):
        self.model = model
        self.loras = loras
        self.sigmas = sigmas
        self.strengths = [0.0] * len(loras)  # of the step under way
        self.tensors = [
            torch.zeros(()) for _ in loras
        ]  # the same: compiled code would hold a number as given
        self.functions = []  # (layer, name of its list, function)
        self.bare = {}  # parameters that no layer fetches -> (value without LoRA, [(LoRA, patch)])

    def attach(self):
        for i, (patches, _) in enumerate(self.loras):
            for key, patch in patches:
                key = PREFIX + key
                owner, _, name = key.rpartition(".")
                if _is_bare(self.model, key.removeprefix(PREFIX)):
                    value = comfy.utils.get_attr(self.model, key)
                    self.bare.setdefault(key, (value, []))[1].append((i, patch))
                    continue
                layer, name = comfy.utils.get_attr(self.model, owner), f"{name}_function"
                function = partial(self.patched, i, patch)
                # A new list: the host's default one is shared by all layers.
                setattr(layer, name, [*getattr(layer, name), function])
                self.functions.append((layer, name, function))

    def detach(self):
        for layer, name, function in self.functions:
            setattr(layer, name, [f for f in getattr(layer, name) if f is not function])
        for key, (value, _) in self.bare.items():
            comfy.utils.set_attr_param(self.model, key, value)

    def patched(self, i, patch, weight):
        return apply_patch(patch, weight.clone(), self.tensors[i], weight.dtype)

    def apply_model(self, executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        steps = len(self.sigmas) - 1
        call = transformer_options.get(CALL)
        step = step_at(float(transformer_options["sigmas"][0]), self.sigmas) if call is None else call.step
        strengths = [scheduled(values, step, steps) for _, values in self.loras]
        if strengths != self.strengths:
            self.strengths = strengths
            self.tensors = [torch.tensor(strength) for strength in strengths]
            for key, (value, patches) in self.bare.items():
                changed = value.detach().clone()
                if changed.dtype.itemsize == 1:  # torch does not add in fp8
                    changed = changed.float()
                for i, patch in patches:
                    if strengths[i]:
                        apply_patch(patch, changed, strengths[i])
                comfy.utils.set_attr_param(self.model, key, changed)
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
