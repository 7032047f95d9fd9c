"""A MODEL whose DiT is computed by workers: everything of a standard MODEL but the weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import comfy.cli_args
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy_api.torch_helpers.torch_compile import TORCH_COMPILE_KWARGS
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor, nn

from ..wan.config import LATENT_CHANNELS, WanConfig
from ..wan.files.fingerprint import fingerprint
from ..wan.out_of_memory import OutOfMemoryError
from ..wan.refusal import Refusal
from ..wan.shard import WHOLE
from ..wan.teacache import reused_step
from .changes import changes_of
from .devices import KEY as MULTIGPU
from .lora import KEY as LORAS
from .model import CALL, TEXTS, HostWanModel, Wan21
from .progress import check_cancelled, tell
from .rank import Asked, LoadedModel, Recipe, gpu_of, load_recipe
from .untraced import untraced

# Of transformer_options what is plain data and says something to our DiT.
DATA = ("cond_or_uncond", "sigmas", "sample_sigmas", "rope_options")
# Of transformer_options what is functions that would act inside the DiT.
FUNCTIONS = {
    "patches": "patches of blocks",
    "patches_replace": "replaced blocks",
    "optimized_attention_override": "an attention of its own",
}
WITHOUT_WEIGHTS = Refusal(
    "the MODEL comes from Wan21Workers and has no weights here: they are in the workers",
    "Put this node before Wan21Workers",
)


class Elsewhere(Protocol):
    """Where the DiT is: see `workers.remote.RemoteModel`."""

    notes: list[str]

    def call(self, asked: object, passes: int, check: Callable[[], object]) -> Tensor: ...

    def ask(self, check: Callable[[], object], name: str, *args: Any) -> Sequence[Any]: ...

    def make_room(self, check: Callable[[], object]) -> bool: ...

    def report(self) -> list[str]: ...

    def end(self) -> None: ...


class RemoteDiT(HostWanModel):
    """Our DiT without numbers: shapes alone are here, and calls are made elsewhere.

    Attributes:
        elsewhere: where.
        here: the MODEL with its weights, for the rest of a run that has lost all workers.
        lost: that it has, as a sentence without its full stop; empty while it has not.
    """

    elsewhere: Elsewhere
    here: LoadedModel
    lost: str = ""

    def __init__(self, config: WanConfig, operations: Any, device: torch.device | None, *dtypes: Any):
        # The layers' own classes hold weights of their own kind, and here are none.
        super().__init__(config, nn, torch.device("meta"), *dtypes)
        for layer in self.modules():
            numbers = dict(layer.named_parameters(recurse=False))
            layer._parameters.clear()
            layer.__dict__.update(numbers)  # shapes to look at, and nothing to load or to patch

    def embed_time(self, timestep: Tensor) -> Tensor:
        """As of `WanModel`."""
        try:
            told = self.elsewhere.ask(check_cancelled, "embed_time", timestep.tolist())
        except ConnectionError as error:
            self.go_on_here(error)
            return self.here.embed_time(timestep.tolist()).to(timestep.device)
        return torch.from_numpy(told[0]).to(timestep.device)

    def go_on_here(self, error: ConnectionError) -> None:
        """Says that the rest of the run is computed in this process."""
        self.lost = f"{error}. This run goes on without workers, on {self.here.patcher.load_device}"
        tell(self.lost)

    @untraced
    def _forward(self, x, timestep, context, clip_fea, time_dim_concat, transformer_options, **kwargs):
        self.check_call(x, kwargs, functions_in(transformer_options))
        chunks = transformer_options.get("cond_or_uncond") or [0]
        count = len(chunks)

        def by_pass(t: Tensor | None) -> tuple[Tensor, ...] | None:
            return None if t is None else t.chunk(count)

        call = transformer_options.get(CALL)
        attention = None if call is None or call.attention is None else call.attention.name
        asked = Asked(
            [tuple(one.split([LATENT_CHANNELS, *_rest(one)], dim=1)) for one in x.chunk(count)],
            timestep.chunk(count),
            context.chunk(count),
            by_pass(clip_fea),
            by_pass(time_dim_concat),
            {k: _plain(transformer_options[k]) for k in DATA if k in transformer_options}
            | {"cond_or_uncond": list(chunks)},
            dict(transformer_options.get(TEXTS, {})),
            None if call is None else replace(call, attention=None),
            attention,
        )
        if not self.lost:
            noted = len(self.elsewhere.notes)
            try:
                return self.elsewhere.call(asked, count, check_cancelled).to(x.device)
            except ConnectionError as error:
                self.go_on_here(error)
            finally:
                if len(self.elsewhere.notes) > noted and (step := reused_step(call)) is not None:
                    self.elsewhere.notes.append(
                        f"step {step + 1}, which TeaCache would reuse, was computed: what it reuses was lost"
                    )
        try:
            return self.here.call(asked, range(count), WHOLE, check_cancelled)
        except OutOfMemoryError as error:
            raise OutOfMemoryError(f"{self.lost}: {error}") from None


def _rest(x: Tensor) -> list[int]:
    return [x.shape[1] - LATENT_CHANNELS] if x.shape[1] > LATENT_CHANNELS else []


def _plain(value: Any) -> Any:
    return value.cpu() if torch.is_tensor(value) else value


class RemoteWan21(Wan21):
    """Our base model around a `RemoteDiT`."""

    dit_class = RemoteDiT
    diffusion_model: RemoteDiT


class RemotePatcher(ModelPatcher):
    """A MODEL without weights: what would change or read them is refused."""

    def add_patches(self, *args: Any, **kwargs: Any) -> list:
        """Refused, as is all below.

        Raises:
            Refusal: always.
        """
        raise WITHOUT_WEIGHTS

    def add_hook_patches(self, *args: Any, **kwargs: Any) -> Any:
        raise WITHOUT_WEIGHTS

    def get_key_patches(self, *args: Any, **kwargs: Any) -> dict:
        raise WITHOUT_WEIGHTS

    def model_state_dict_for_saving(self, *args: Any, **kwargs: Any) -> dict:
        raise WITHOUT_WEIGHTS


def is_remote(model: ModelPatcher) -> bool:
    """Whether a MODEL comes from Wan21Workers."""
    return isinstance(model, RemotePatcher)


def workers_report(model: ModelPatcher) -> list[str]:
    """What workers did for a MODEL in the run so far, in sentences; none of a MODEL that computes here."""
    return model.model.diffusion_model.elsewhere.report() if is_remote(model) else []


def functions_in(transformer_options: Mapping[str, Any]) -> Refusal | None:
    """The refusal of functions that would act inside the DiT, or None without any."""
    for key, what in FUNCTIONS.items():
        if transformer_options.get(key):
            fix = "Remove that node, or Wan21Workers"
            if key == "optimized_attention_override":
                fix += "; attention on Wan21Sampler (execution custom) is chosen in each worker"
            problem = f"another node put {what} ({key}) on the MODEL, and workers can be sent data only"
            return Refusal(problem, fix)
    return None


def functions_on(model: ModelPatcher) -> Refusal | None:
    """The refusal of what another node put on a MODEL and workers cannot be sent, or None."""
    if refusal := functions_in(model.model_options["transformer_options"]):
        return refusal
    inside = [key for key in model.object_patches if key.startswith("diffusion_model")]
    found = {
        "compiles the MODEL": TORCH_COMPILE_KWARGS in model.model_options,
        "put hooks on the MODEL": bool(model.hook_patches),
        "injects layers into the MODEL": any(model.injections.values()),
        f"replaced {', '.join(inside)}": bool(inside),
        "wraps weights of the MODEL": bool(model.weight_wrapper_patches),
        "copied the MODEL to several GPUs (MultiGPU CFG Split)": bool(
            model.get_additional_models_with_key(MULTIGPU)
        ),
    }
    for what, is_there in found.items():
        if is_there:
            return Refusal(f"another node {what}, which workers cannot be sent", "Remove it, or Wan21Workers")
    return None


def recipe_of(model: ModelPatcher) -> tuple[Callable[[Recipe], LoadedModel], tuple[Recipe]]:
    """(factory, arguments) by which a worker makes a MODEL of ours.

    Raises:
        Refusal: something on it cannot be sent.
    """
    if refusal := functions_on(model):
        raise refusal
    assert model.cached_patcher_init is not None
    path, weight_dtype, *_ = model.cached_patcher_init[1]
    gpu = gpu_of(model.load_device)
    path = Path(path).resolve()
    return load_recipe, (Recipe(path, weight_dtype, changes_of(model), fingerprint(path), gpu),)


def remote_model(model: ModelPatcher, elsewhere: Elsewhere) -> ModelPatcher:
    """A MODEL of ours with its DiT elsewhere; it has the options, sampling and wrappers of `model`."""
    base = model.model
    remote = RemoteWan21(
        base.model_config, base.diffusion_model.config, base.checkpoint_path, base.checkpoint_metadata
    )
    remote.device, remote.file_notes = model.offload_device, base.file_notes
    remote.diffusion_model.elsewhere = elsewhere
    remote.diffusion_model.sums_in_fp16 = base.diffusion_model.sums_in_fp16
    remote.diffusion_model.here = LoadedModel(model)
    patcher = RemotePatcher(remote, model.load_device, model.offload_device)
    options: Any = comfy.utils.deepcopy_list_dict(model.model_options)
    patcher.model_options = options
    patcher.object_patches = dict(model.object_patches)
    # What carries LoRAs acts on weights.
    for mine, others in ((patcher.callbacks, model.callbacks), (patcher.wrappers, model.wrappers)):
        for kind, by_key in others.items():
            mine[kind] = {key: list(functions) for key, functions in by_key.items() if key != LORAS}
    patcher.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "wan21_workers", _refuse_functions)
    patcher.add_callback_with_key(CallbacksMP.ON_CLEANUP, "wan21_workers", _end)
    return patcher


def _refuse_functions(executor: Any, model: ModelPatcher, *args: Any, **kwargs: Any) -> Any:
    """A wrapper of the host's preparation of a run: refuses what was put on the MODEL after Wan21Workers,
    and leaves the GPU to the worker on it."""
    if refusal := functions_on(model):
        raise refusal
    if model.load_device.type == "cuda":
        comfy.model_management.free_memory(1e30, model.load_device)
        comfy.model_management.soft_empty_cache()
    return executor(model, *args, **kwargs)


def _end(model: ModelPatcher) -> None:
    """A run has ended: says what it took, and lets the workers drop what belongs to it."""
    dit: RemoteDiT = model.model.diffusion_model
    for sentence in dit.elsewhere.report():
        tell(sentence)
    dit.elsewhere.end()
    if dit.lost:
        dit.here.end()
        dit.lost = ""


def blocked(message: str) -> ExecutionBlocker:
    """What stands in the place of an output that is not there: who uses it fails with this message."""
    return ExecutionBlocker(message)


def process_settings() -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """What makes another process one of this host, without its server: its start options, where it lies."""
    root = Path(comfy.cli_args.__file__).resolve().parents[1]
    return {"comfy.cli_args:args": dict(vars(comfy.cli_args.args))}, (str(root),)
