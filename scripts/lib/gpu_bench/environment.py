"""The machine: what is installed, and how fast its memory is."""

import datetime
import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Iterator

import torch

from ..commit import commit
from .bench import Bench, Race, Row

PACKAGES = (
    "triton", "comfy-kitchen", "comfy-aimdo", "diffusers", "flash-attn", "flash-attn-4", "sageattention",
    "xformers",
)  # fmt: skip
COPIED = 2**30  # bytes


def facts(bench: Bench) -> dict[str, str]:
    """What a result must name to be read later; the head of the JSON."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "card": torch.cuda.get_device_name(bench.device) if bench.on_cuda else f"none, {platform.machine()}",
        "torch": torch.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        "driver": driver(),
        "host": host_version(),
        "size": str(bench.size),
        "dtype": str(bench.dtype).removeprefix("torch."),
    }


def driver() -> str:
    """Version of NVIDIA's driver, or none."""
    if not shutil.which("nvidia-smi"):
        return "none"
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
        return found.stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return "not known"


def host_version() -> str:
    """Of ComfyUI and of its kernels."""
    import comfyui_version

    return f"ComfyUI {comfyui_version.__version__}, comfy-kitchen {_version('comfy-kitchen')}"


def rows(bench: Bench) -> Iterator[Row]:
    """Versions, and the rates of memory and bus."""
    for name, value in facts(bench).items():
        yield Row(name, value)
    for package in PACKAGES:
        yield Row(package, _version(package))
    yield Row("kernels of comfy-kitchen", _kitchen_backends())
    if bench.on_cuda:
        properties = torch.cuda.get_device_properties(bench.device)
        yield Row(
            "device memory",
            f"{properties.total_memory / 2**30:.1f} GiB",
            note=f"sm_{properties.major}{properties.minor}, {properties.multi_processor_count} processors",
        )
    yield from bench.race(Race({"copy on the device": lambda: _copy(bench)}, "ms", work=2 * COPIED / 1e12,
                               rate_unit="TB/s"))  # fmt: skip
    if bench.on_cuda:
        yield from bench.race(Race({"to the device, pinned": lambda: _fetch(bench)}, "ms",
                                   work=COPIED / 1e12, rate_unit="TB/s"))  # fmt: skip


def _copy(bench):
    size = COPIED if bench.on_cuda else 2**20
    source, target = (torch.empty(size, dtype=torch.uint8, device=bench.device) for _ in range(2))
    return lambda: target.copy_(source)


def _fetch(bench):
    source = torch.empty(COPIED, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(COPIED, dtype=torch.uint8, device=bench.device)
    return lambda: target.copy_(source, non_blocking=True)


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _kitchen_backends():
    import comfy.quant_ops

    if not comfy.quant_ops._CK_AVAILABLE:
        return "none"
    found = comfy.quant_ops.ck.list_backends()
    return ", ".join(name for name, has in found.items() if has["available"] and not has["disabled"])
