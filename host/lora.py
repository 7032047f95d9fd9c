"""LoRAs on a MODEL: the host's weight patches, and what of them a run works in."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast
from uuid import uuid4
from weakref import WeakKeyDictionary

import comfy.lora
import comfy.lora_convert
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor, nn

from ..wan.files import is_quantization_key
from ..wan.files.bad_file import listed
from ..wan.lora import Lora, Patch, UnreadKind, apply_patch, match_lora
from ..wan.refusal import Refusal
from .lora_run import PREFIX, LoraRun, ScheduledLora, beside_products, is_bare
from .model import is_ours
from .progress import tell
from .reader import read_checkpoint
from .stored import integers_as_they_are, kept_dtype, kept_shapes

KEY = "wan21_loras"  # names our wrapper and our attachment on a MODEL
_CUT_OUT = Refusal(
    "the MODEL's weights are in one of the host's quantised formats, and so would be the differences that "
    "are saved as a LoRA",
    "Subtract models from bf16 or fp16 files",
)
_HOOKED = Refusal(
    "hooks carry a LoRA, and weights in the host's quantised formats are not changed in place",
    "Remove the hooks and use Wan21LoraLoader with a strength_schedule, or load a bf16 or fp16 file",
)


class HostPatch(WeightAdapterBase):
    """One `Patch` as the host keeps adapters: it merges, offloads and requantises around it.

    Args:
        loaded_keys: keys of the file, of which the host keeps account.
        weights: the fields of a `Patch`; the host moves the tensors among them.
    """

    name = "wan21"
    weights: Any

    def __init__(self, loaded_keys: set[str], weights: tuple):
        self.loaded_keys = loaded_keys
        self.weights = weights

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: tuple | None,
        function: Callable,
        intermediate_dtype: torch.dtype,
        original_weight: Tensor | None = None,
    ) -> Tensor:
        """The weight with the patch merged into it, in place."""
        return apply_patch(Patch(*self.weights), weight, strength, intermediate_dtype)


def other_family(model: ModelPatcher) -> str | None:
    """What a MODEL that is no Wan model is called; None for one that is."""
    layers = getattr(model.model, "diffusion_model", None)
    is_wan = layers is not None and "blocks.0.self_attn.q.weight" in kept_shapes(layers)
    return None if is_wan else type(model.model).__name__


def packed_by_another_pack(model: ModelPatcher) -> bool:
    """Whether the matrices of a MODEL are bytes of a file that only another pack's layers unpack."""
    for layer in model.model.diffusion_model.blocks[0].modules():
        weight = getattr(layer, "weight", None)
        if weight is None or isinstance(weight, QuantizedTensor) or getattr(layer, "packed", None):
            continue
        if weight.dtype == torch.uint8:
            return True
    return False


def read_lora(path: str | Path, model: ModelPatcher) -> Lora:
    """A LoRA file as far as it fits a MODEL of the Wan family, ours or the host's.

    Raises:
        Refusal: the file cannot be read or is no LoRA.
    """
    file = read_checkpoint(path)
    try:
        return match_lora(file.state_dict, kept_shapes(model.model.diffusion_model), file.metadata)
    except UnreadKind as error:
        if not _host_reads(file.state_dict, model):
            raise
        fix = "Load it with the host's Load LoRA (LoraLoaderModelOnly), before or after this node"
        raise Refusal(error.problem, fix) from None


def _host_reads(state_dict: dict[str, Tensor], model: ModelPatcher) -> bool:
    """Whether the host's own loader finds anything in a LoRA: it knows fewer names of layers than kinds."""
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    return bool(comfy.lora.load_lora(comfy.lora_convert.convert_lora(state_dict), names, log_missing=False))


def add_lora(
    model: ModelPatcher, lora: Lora, strength: float, schedule: Sequence[float] = ()
) -> ModelPatcher:
    """A clone of a MODEL with a LoRA on it.

    One strength throughout stands in the host's patch list, for all that it makes of a MODEL. What it cannot
    merge, or not without loss, a run works in at use, as under a schedule: parameters that belong to no layer
    (modulation) and weights of 8 bits and fewer, where a merged LoRA would be rounded away.

    Args:
        schedule: multipliers of the strength, spread over the steps of a run; none for 1 throughout.
    """
    model = model.clone()
    values = [strength * value for value in schedule or (1,)]
    if not any(values):
        return model
    is_merged = {key: _is_merged(model.model, key) for key, _ in lora.patches}
    if len(set(values)) == 1:
        loaded_as = model.patches_uuid
        for key, patch in lora.patches:
            # One list for each parameter: add_patches appends to it, and the other MODEL keeps its own.
            model.patches[PREFIX + key] = list(model.patches.get(PREFIX + key, ()))
            model.patches[PREFIX + key].append((values[0], HostPatch(set(), tuple(patch)), 1.0, None, None))
        # What the host merges it must load again; what is worked in at use leaves the weights as they are.
        at_use = set(_unmerged(model))
        whole_at_use = all(PREFIX + key in at_use for key in is_merged)
        model.patches_uuid = loaded_as if whole_at_use else uuid4()
    else:
        model.set_attachments(KEY, (*scheduled_loras(model), ScheduledLora(lora.patches, values)))
    if len(set(values)) > 1 or not all(is_merged.values()):
        work_in_at_use(model)
    return model


def scheduled_loras(model: ModelPatcher) -> tuple[ScheduledLora, ...]:
    """Those of a MODEL, in the order of their nodes. The host hands attachments on to clones."""
    return model.get_attachment(KEY) or ()


def changes_weights_at_use(model: ModelPatcher) -> bool:
    """Whether a LoRA on this MODEL is worked into matrices as they are used, not beside their products."""
    patches = [patch for lora in _loras_at_use(model) for patch in lora.patches]
    beside = beside_products(model.model, patches)
    return not all(is_bare(model.model, key) or key.rpartition(".")[0] in beside for key, _ in patches)


def factor_bytes(model: ModelPatcher) -> int:
    """Bytes of LoRAs that lie on the device while a run lasts, since matrices are changed at their use."""
    patches = [
        patch for lora in _loras_at_use(model) for key, patch in lora.patches if not is_bare(model.model, key)
    ]
    tensors = {id(t): t.nbytes for p in patches for t in (*p.factors, p.magnitude) if t is not None}
    return 0 if model.load_device.type == "cpu" else sum(tensors.values())


def _is_merged(model: nn.Module, key: str) -> bool:
    layer = comfy.utils.get_attr(model, (PREFIX + key).rpartition(".")[0])
    # A packed matrix counts as one also while another loader's patch has it unpacked.
    is_packed = key.endswith(".weight") and getattr(layer, "packed", None)
    is_quantised = is_packed or kept_dtype(layer, key.rpartition(".")[2]).itemsize == 1
    return not (is_quantised or is_bare(model, key))


# --- in the host's patch list, and not merged ----------------------------------------------------------


def _unmerged(model: ModelPatcher) -> list[str]:
    """Keys of the patch list whose LoRAs are worked in at use: not where two models are merged."""
    return [
        key
        for key, patches in model.patches.items()
        if any(isinstance(patch[1], HostPatch) for patch in patches)
        and all(patch[2] == 1 and not isinstance(patch[1], list) for patch in patches)
        and not _is_merged(model.model, key.removeprefix(PREFIX))
    ]


def _merged_bare(model: ModelPatcher) -> dict[str, list[tuple]]:
    """Patches of the parameters that belong to no layer, where one of ours came into them by a merge."""
    at_use = set(_unmerged(model))
    bare = {
        key.removeprefix(PREFIX): patches
        for key, patches in model.patches.items()
        if key not in at_use and key.startswith(PREFIX) and is_bare(model.model, key.removeprefix(PREFIX))
    }
    scheduled = {key for lora in scheduled_loras(model) for key, _ in lora.patches}
    return bare if scheduled & bare.keys() or any(map(_has_ours, bare.values())) else {}


def _has_ours(patches: list[tuple]) -> bool:
    """Whether a list has a patch of ours, or the list of a MODEL that was merged into this one has."""
    changes = [patch[1] for patch in patches]
    return any(isinstance(x, HostPatch) or (isinstance(x, list) and _has_ours(x[1:])) for x in changes)


def _loras_at_use(model: ModelPatcher) -> tuple[ScheduledLora, ...]:
    """All that a run works in: those of the patch list in the order of their nodes, then those under a
    schedule."""
    chain: dict[tuple[int, float], list[tuple[str, Patch]]] = {}  # by place in the list, and strength
    for key in _unmerged(model):
        for place, (strength, patch, *_) in enumerate(model.patches[key]):
            if isinstance(patch, HostPatch):
                changes = chain.setdefault((place, strength), [])
                changes.append((key.removeprefix(PREFIX), Patch(*patch.weights)))
    constant = [ScheduledLora(chain[at], [at[1]]) for at in sorted(chain, key=lambda at: at[0])]
    return (*constant, *scheduled_loras(model))


class AtUse:
    """A patcher that does not merge what a run works in. The list itself is there for all that read it."""

    patches: dict[str, list[tuple]]

    @contextmanager
    def _merging_the_rest(self) -> Iterator[None]:
        whole = self.patches
        hidden: Any = _unmerged(cast(ModelPatcher, self))
        rest = {k: [p for p in whole[k] if not isinstance(p[1], HostPatch)] for k in hidden}
        self.patches = {key: patches for key, patches in (whole | rest).items() if patches}
        try:
            yield
        finally:
            self.patches = whole

    def load(self, *args: Any, **kwargs: Any) -> Any:
        """The host's, without the patches that a run works in."""
        with self._merging_the_rest():
            return super().load(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def patch_weight_to_device(self, key: str, *args: Any, **kwargs: Any) -> Any:
        """The host's; a weight asked for already has the patches that were merged."""
        whole, patcher = self.patches, cast(ModelPatcher, self)
        if kwargs.get("return_weight") and key in patcher.backup and key in _unmerged(patcher):
            self.patches = whole | {key: [p for p in whole[key] if isinstance(p[1], HostPatch)]}
        try:
            return super().patch_weight_to_device(key, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            self.patches = whole

    def model_state_dict_for_saving(self, model: nn.Module | None = None, prefix: str = "") -> dict:
        """The host's, with the patches that a run works in merged into what is saved."""
        patcher = cast(ModelPatcher, self)
        _refuse_scheduled(patcher, "saved")
        # The host merges what belongs to layers: neither these nor the parameters of none.
        keys = [*_unmerged(patcher), *(PREFIX + key for key in _merged_bare(patcher))]
        with integers_as_they_are(patcher.model) as integers:
            saved = super().model_state_dict_for_saving(model, prefix)  # pyright: ignore[reportAttributeAccessIssue]
        keys += [key for key in integers if key in patcher.patches and key not in keys]
        for key in keys:
            weight: Any = patcher.patch_weight_to_device(key, patcher.load_device, return_weight=True)
            name = key.removeprefix(prefix)
            parts = weight.state_dict(name) if isinstance(weight, QuantizedTensor) else {name: weight}
            saved |= {part: tensor.cpu() for part, tensor in parts.items()}
        return saved

    def add_patches(self, patches: dict, strength_patch: float = 1.0, strength_model: float = 1.0) -> list:
        """The host's; where another MODEL is merged into this one, schedules are scaled with the weights."""
        if strength_model != 1:
            keys = {key if isinstance(key, str) else key[0] for key in patches}
            _scale_scheduled(cast(ModelPatcher, self), keys, strength_model)
        return super().add_patches(patches, strength_patch, strength_model)  # pyright: ignore[reportAttributeAccessIssue]

    def get_key_patches(self, filter_prefix: str | None = None) -> dict:
        """The host's; with a prefix it is asked of a MODEL that is merged into another, without by hooks."""
        if filter_prefix is not None:
            _refuse_scheduled(cast(ModelPatcher, self), "merged")
            _tell_unmerged(cast(ModelPatcher, self))
        return super().get_key_patches(filter_prefix)  # pyright: ignore[reportAttributeAccessIssue]

    def model_state_dict(self, filter_prefix: str | None = None) -> dict:
        """The host's; with a prefix LoraSave asks for it.

        Without scales and marks of quantised weights, which are no parameters: a merge would look for them.
        """
        found = super().model_state_dict(filter_prefix)  # pyright: ignore[reportAttributeAccessIssue]
        if filter_prefix is not None:
            _refuse_scheduled(cast(ModelPatcher, self), "saved")
            if any(is_quantization_key(key) for key in found):
                raise _CUT_OUT
        return {key: value for key, value in found.items() if not is_quantization_key(key)}

    def patch_hooks(self, hooks: Any) -> None:
        """The host's, of hooks that change no weight in its quantised formats."""
        patcher = cast(ModelPatcher, self)
        keys = patcher.get_combined_hook_patches(hooks)
        if any(isinstance(comfy.utils.get_attr(patcher.model, key), QuantizedTensor) for key in keys):
            raise _HOOKED
        super().patch_hooks(hooks)  # pyright: ignore[reportAttributeAccessIssue]

    def partially_unload(self, *args: Any, **kwargs: Any) -> Any:
        """The host's, which gives unloaded layers their patches anew."""
        with self._merging_the_rest():
            return super().partially_unload(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


def _refuse_scheduled(model: ModelPatcher, done: str) -> None:
    if loras := scheduled_loras(model):
        values = ", ".join(f"{value:g}" for value in loras[0].values)
        raise Refusal(
            f"a LoRA on the MODEL has a strength_schedule ({values} over the steps), and weights that are "
            f"{done} have one strength",
            "Clear strength_schedule on Wan21LoraLoader and set strength, or leave that LoRA out",
        )


def _tell_unmerged(model: ModelPatcher) -> None:
    """Says what of a second MODEL of the host's loader a merge leaves out: the first is not of our class."""
    bare = [k for k in model.patches if k.startswith(PREFIX) and is_bare(model.model, k.removeprefix(PREFIX))]
    if bare and not is_ours(model):
        names = listed([key.removeprefix(PREFIX) for key in bare], 3)
        tell(
            f"the LoRA on the second MODEL changes {names}, which a merge into a MODEL of the host's loader "
            "leaves out: make it the first MODEL, or load both with Wan21ModelLoader"
        )


def _scale_scheduled(model: ModelPatcher, keys: set[str], share: float) -> None:
    """Makes LoRAs under a schedule those of a MODEL of which a share goes into a merge.

    Raises:
        Refusal: one is a DoRA, whose change hangs on the weight before the merge.
    """

    def scaled(key: str, patch: Patch) -> Patch:
        if PREFIX + key not in keys:
            return patch
        if patch.magnitude is not None:
            raise Refusal(
                "a DoRA on the first MODEL has a strength_schedule, and its change is that of the weights "
                "before they are merged",
                "Clear strength_schedule on Wan21LoraLoader, or load that LoRA on the merged MODEL",
            )
        return patch._replace(scale=patch.scale * share)

    if loras := scheduled_loras(model):
        patches = ([(key, scaled(key, patch)) for key, patch in lora.patches] for lora in loras)
        model.set_attachments(KEY, tuple(lora._replace(patches=p) for lora, p in zip(loras, patches)))


@cache
def _at_use_class(patcher_class: type) -> type:
    return patcher_class if issubclass(patcher_class, AtUse) else type("AtUse", (AtUse, patcher_class), {})


def work_in_at_use(model: ModelPatcher) -> None:
    """Makes a MODEL, and every clone of it, one whose runs work in what is not merged."""
    model.__class__ = _at_use_class(type(model))
    model.remove_callbacks_with_key(CallbacksMP.ON_CLONE, KEY)
    # A clone without dynamic memory is of the host's plain class.
    model.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, lambda _, clone: work_in_at_use(clone))
    carry_loras(model)


# --- while a run lasts --------------------------------------------------------------------------------


def carry_loras(model: ModelPatcher) -> None:
    """Makes the host put a MODEL's LoRAs on the model below it for the time of a run, whoever samples.

    Also needed without any: where two MODELs share that model, it has the LoRAs of the last one prepared, as
    it has its merged weights.
    """
    for kind, function in (
        (CallbacksMP.ON_PRE_RUN, _detach),
        (CallbacksMP.ON_PREPARE_STATE, _at_noise_level),
        (CallbacksMP.ON_CLEANUP, _detach),
    ):
        model.remove_callbacks_with_key(kind, KEY)
        model.add_callback_with_key(kind, KEY, function)
    model.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _at_call)


# By the model below the MODELs: its LoRAs while a run lasts. No merged copy is kept and nothing is reloaded
# when a strength changes; the numbers are those of merging.
_runs: "WeakKeyDictionary[nn.Module, LoraRun]" = WeakKeyDictionary()


def _at_noise_level(model: ModelPatcher, timestep: Tensor, model_options: dict) -> None:
    """Before the host's samplers call a model, also one that another's run takes along (DualModelGuider)."""
    run_of(model).set_step(model_options["transformer_options"] | {"sigmas": timestep})


def _at_call(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs) -> Tensor:
    """Around each call of a model, whoever samples; of two MODELs in one run the first's wrappers act."""
    model = executor.class_obj.current_patcher
    if model is not None and model.get_callbacks(CallbacksMP.ON_CLEANUP, KEY):
        run_of(model).set_step(transformer_options)
    return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)


def run_of(model: ModelPatcher) -> LoraRun:
    """That of a MODEL's LoRAs, begun here: of MODELs over one model only the last one prepared is called."""
    run = _runs.get(model.model)
    if run is None:
        _runs[model.model] = run = LoraRun(
            model.model, _loras_at_use(model), _merged_bare(model), model.load_device
        )
        run.attach()
    return run


def _detach(model: ModelPatcher) -> None:
    if run := _runs.pop(model.model, None):
        run.detach()
