"""What the sections share: the sizes, the clock, the seconds that are left, and a race of several calls."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from wan21.wan.config import CLIP_TOKENS, SIZES, WanConfig

from ..peers import relative

GIB = 2**30
ENOUGH_S = 0.02  # short calls are repeated until they take so long together: a clock has its own noise
MOST_CALLS = 20
FEW_BLOCKS = 4
PASSES = ("cond", "uncond")
Call = Callable[[], Any]


@dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
        config: of the DiT, with as many blocks as are run.
        layers: blocks of the model it stands for: a step's time is scaled by layers / blocks run.
        latent: (T, h, w) of the clip.
        text_tokens, image_tokens: of the context.
        clip: (frames, height, width) of what the VAE works on.
        vae_dim: its channels at the first level.
    """

    config: WanConfig
    layers: int
    latent: tuple[int, int, int]
    text_tokens: int
    image_tokens: int
    clip: tuple[int, int, int]
    vae_dim: int = 96

    @property
    def tokens(self) -> int:
        """L, of one pass."""
        frames, height, width = self.latent
        return frames * height * width // 4

    @property
    def scale(self) -> float:
        """Blocks of the model over blocks that are run."""
        return self.layers / self.config.num_layers

    def __str__(self) -> str:
        c, (frames, height, width) = self.config, self.clip
        return (
            f"width {c.dim}, {c.num_heads} heads, feed-forward {c.ffn_dim}, {c.num_layers} blocks run of "
            f"{self.layers}, {self.tokens} tokens, two passes; VAE of width {self.vae_dim}, {frames} frames "
            f"of {width}x{height}; random weights"
        )


def gpu_size(blocks: int) -> Size:
    """The released 14B image-to-video model at 81 frames of 832x480, with so many of its blocks."""
    release = SIZES["i2v-14B"]
    config = replace(release, num_layers=min(blocks, release.num_layers))
    return Size(config, release.num_layers, (21, 60, 104), 512, CLIP_TOKENS, (81, 480, 832))


def cpu_size() -> Size:
    """Two blocks of the 1.3B model's width on a short clip."""
    config = replace(SIZES["i2v-1.3B"], num_layers=2)
    return Size(config, 2, (2, 32, 52), 512, CLIP_TOKENS, (9, 256, 416))


def toy_size() -> Size:
    """Small enough for a test: shows that everything runs, and says nothing."""
    config = WanConfig(in_dim=36, dim=256, ffn_dim=512, num_heads=2, num_layers=2, image_dim=1280)
    return Size(config, 2, (3, 8, 8), 512, 7, (5, 16, 16), 8)


def few_blocks(size: Size) -> Size:
    """The same with so few blocks that copies of the weights cost no time to make."""
    return replace(size, config=replace(size.config, num_layers=min(FEW_BLOCKS, size.config.num_layers)))


class Missing(Exception):
    """What a section or a row needs and the machine, or this tree, has not. Its text is the reason shown."""


@dataclass
class Row:
    """One line of the result; what does not apply is empty.

    Attributes:
        name: what it is.
        value: a number in `unit`, or a word.
        ratio: of its value to that of the row `beside`, in the same process.
        rate: what the work comes to, in `rate_unit`.
        error: relative difference of the result, from that of `beside` unless the note says from what.
        peak_gib: device memory taken above what was held before the call.
        skipped: why there is no value.
    """

    name: str
    value: float | str | None = None
    unit: str = ""
    ratio: float | None = None
    beside: str = ""
    rate: float | None = None
    rate_unit: str = ""
    error: float | None = None
    peak_gib: float | None = None
    note: str = ""
    skipped: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Without what is empty."""
        return {key: value for key, value in asdict(self).items() if value not in (None, "")}


@dataclass
class Race:
    """Calls that do the same work, and how their time is shown.

    Attributes:
        makers: by name, each gives the call to be timed and may raise `Missing`. The first is the one that
            the others are put beside.
        unit: s or ms.
        scale: what a call's time is multiplied by.
        work: of a call, in units of 1e12 (operations or bytes), for a rate in `rate_unit`.
        exact: relative error of a result; by default its difference from the first one's.
        notes: by name.
    """

    makers: Mapping[str, Callable[[], Call]]
    unit: str = "s"
    scale: float = 1.0
    work: float = 0.0
    rate_unit: str = "TFLOP/s"
    exact: Callable[[Tensor], float] | None = None
    notes: Mapping[str, str] = field(default_factory=dict)


def failure(error: Exception) -> str:
    """Why a row has no value."""
    if isinstance(error, Missing):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}: {lines[0][:160] if lines else ''}"


class Bench:
    """A device, a size and a number of seconds.

    Args:
        size: what to measure.
        device: on which.
        repeat: timed calls of each contestant, after one that warms up.

    Attributes:
        dtype: to compute in: bfloat16 on CUDA, float32 elsewhere.
    """

    def __init__(self, size: Size, device: torch.device, repeat: int = 3):
        self.size, self.device, self.repeat = size, device, repeat
        self.on_cuda = device.type == "cuda"
        self.dtype = torch.bfloat16 if self.on_cuda else torch.float32
        self.seconds = self.deadline = float("inf")

    def begin(self, seconds: float) -> None:
        """Starts a section that is to end after so many seconds."""
        self.seconds, self.deadline = seconds, time.monotonic() + seconds

    def check_time(self) -> None:
        """Raises `Missing` when the section's time is over."""
        if time.monotonic() > self.deadline:
            raise Missing(f"the {self.seconds:.0f} s of this section were over")

    def random(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """Normal noise on the device, by default in the dtype to compute in."""
        return (scale * torch.randn(shape, device=self.device)).to(dtype or self.dtype)

    def clear(self) -> None:
        """Gives device memory back that nobody holds any more."""
        if self.on_cuda:
            gc.collect()
            torch.cuda.empty_cache()

    def race(self, race: Race) -> list[Row]:
        """All calls in turns, after one of each that warms up; medians. Rows stand in the order of makers."""
        first = next(iter(race.makers))
        rows = {name: Row(name, note=race.notes.get(name, "")) for name in race.makers}
        calls = self._warmed_up(race, rows)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(self.repeat):
            for name, call in list(calls.items()):
                if turn and time.monotonic() > self.deadline:
                    continue
                try:
                    seconds, rows[name].peak_gib = self._timed(call)
                    times[name].append(seconds)
                except Exception as error:
                    rows[name].skipped = failure(error)
                    del calls[name]
        for name in calls:
            self._fill(rows[name], race, statistics.median(times[name]))
        self._compare(rows, first)
        calls.clear()
        self.clear()
        return list(rows.values())

    def peak(self, call: Call) -> float | None:
        """GiB that a call takes at most, the libraries' workspaces left out; None but on CUDA."""
        call()
        return self._timed(call)[1]

    def _warmed_up(self, race: Race, rows: dict[str, Row]) -> dict[str, Call]:
        """The calls that work, each called once; results are compared and let go."""
        calls, first = {}, None
        for name, make in race.makers.items():
            try:
                self.check_time()
                call = make()
                result = call()
                self._wait()
            except Exception as error:
                rows[name].skipped = failure(error)
                self.clear()
                continue
            calls[name] = call
            if isinstance(result, Tensor) and race.exact:
                rows[name].error = race.exact(result)
            elif isinstance(result, Tensor) and first is not None:
                rows[name].error = relative(first, result)
            elif first is None and name == next(iter(race.makers)):
                first = result if isinstance(result, Tensor) else None
            del result
        return calls

    def _wait(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()

    def _timed(self, call: Call) -> tuple[float, float | None]:
        """(seconds of a call, GiB it took at most); a short one is repeated, and its mean counts."""
        peak = None
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        seconds = self._clocked(call, 1)
        if self.on_cuda:
            peak = (torch.cuda.max_memory_allocated() - before) / GIB
            if seconds < ENOUGH_S:
                count = min(MOST_CALLS, int(ENOUGH_S / max(seconds, 1e-6)) + 1)
                seconds = self._clocked(call, count)
        return seconds, peak

    def _clocked(self, call: Call, count: int) -> float:
        self._wait()
        start = time.perf_counter()
        for _ in range(count):
            call()
        self._wait()
        return (time.perf_counter() - start) / count

    def _fill(self, row: Row, race: Race, seconds: float) -> None:
        row.value = seconds * race.scale * (1000 if race.unit == "ms" else 1)
        row.unit = race.unit
        if race.work:
            row.rate, row.rate_unit = race.work / seconds, race.rate_unit

    def _compare(self, rows: dict[str, Row], first: str) -> None:
        base = rows[first].value
        for row in rows.values():
            if row.name != first and isinstance(row.value, float) and isinstance(base, float):
                row.ratio, row.beside = row.value / base, first
