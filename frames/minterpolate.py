"""FFmpeg's motion-compensated interpolation (filter `minterpolate`) on tensors, through PyAV.

The filter estimates the motion of blocks between two frames and moves both frames along it
(https://ffmpeg.org/ffmpeg-filters.html#minterpolate). It works on 8-bit YCbCr, drops the last pair of a clip
and looks for scene cuts by itself; here each shot gets one frame more at its end, its own detection is off,
and only the frames between ours are taken from it.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from fractions import Fraction

import av
import av.error
import av.filter
import torch
import torch.nn.functional as F
from torch import Tensor

from .spans import Span

# Chosen with scripts/compare_interpolation.py: blocks of 8 and motion both ways gave the best PSNR.
OPTIONS = "mi_mode=mci:mc_mode=obmc:me_mode=bidir:mb_size=8:scd=none"
ALIGN = 16  # pixels; the filter refuses less and leaves a rest at the border to blending
CHUNK = 8  # spans of one task
MAX_THREADS = 8  # each holds about six frames in 8 bits
POLL_S = 0.1
# Full-range BT.601, rows Y, Cb, Cr.
TO_YCBCR = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
OFFSET = torch.tensor([0.0, 0.5, 0.5])[:, None, None]
TO_RGB = torch.linalg.inv(TO_YCBCR)


def available() -> bool:
    """Whether this FFmpeg has the filter."""
    return "minterpolate" in av.filter.filters_available


def fill_spans(
    images: Tensor,
    spans: Sequence[Span],
    multiplier: int,
    result: Tensor,
    progress: Callable[[int, int], None],
) -> None:
    """Writes the frames inside spans of motion, on as many threads as torch uses, at most 8.

    Args:
        images: [F, H, W, 3] in [0, 1].
        spans: of `frames.spans`, in order, none of them a cut.
        multiplier: new frame rate over old.
        result: [(F - 1) * multiplier + 1, H, W, 3]; only places strictly inside the spans are written.
        progress: `progress(done, total)` in frames, called from this thread at least every 0.1 s while FFmpeg
            works. What it raises ends the call at once; threads end after the frame they are at.
    """
    total = sum(len(span.times(multiplier)) for span in spans)
    written, stop = queue.SimpleQueue(), threading.Event()
    pool = ThreadPoolExecutor(max(1, min(MAX_THREADS, torch.get_num_threads())), "minterpolate")
    try:
        pending = {
            pool.submit(_fill, images, chunk, multiplier, result, written, stop) for chunk in _chunks(spans)
        }
        while pending:
            finished, pending = wait(pending, timeout=POLL_S, return_when="FIRST_COMPLETED")
            for task in finished:
                task.result()
            progress(written.qsize(), total)
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)


Chunk = tuple[Span | None, list[Span]]  # the span before, for the motion to start from; those to fill


def _chunks(spans: Sequence[Span]) -> list[Chunk]:
    """Tasks of one shot each.

    The search for motion starts from the motion of the pair before, so a task begins one span early. Tasks
    have a fixed length: the frames do not depend on the number of threads.
    """
    chunks: list[Chunk] = []
    last = None
    for span in spans:
        same_shot = last is not None and last.last == span.first
        if not same_shot or len(chunks[-1][1]) == CHUNK:
            chunks.append((last if same_shot else None, []))
        chunks[-1][1].append(span)
        last = span
    return chunks


@torch.inference_mode()  # inference mode is per thread, and the frames are inference tensors
def _fill(
    images: Tensor,
    chunk: Chunk,
    multiplier: int,
    result: Tensor,
    written: queue.SimpleQueue,
    stop: threading.Event,
) -> None:
    """One task: pushes its frames, and places what lies inside its spans.

    Args:
        images, multiplier, result: as of `fill_spans`.
        chunk: the task.
        written: gets one item for each frame placed.
        stop: set to end the task.
    """
    warm_up, spans = chunk
    height, width = images.shape[1:3]
    graph = _graph(-(-width // ALIGN) * ALIGN, -(-height // ALIGN) * ALIGN, multiplier)
    wanted = {i for span in spans for i in range(span.first * multiplier + 1, span.last * multiplier)}
    at = ([warm_up.first] if warm_up else []) + [spans[0].first] + [span.last for span in spans]
    for index, pts in [(i, i * multiplier) for i in at] + [(at[-1], (at[-1] + 1) * multiplier)]:
        graph.push(_to_frame(images[index], pts, multiplier))
        for frame in _pulled(graph):
            if stop.is_set():
                return
            if frame.pts in wanted:
                result[frame.pts] = _to_image(frame, height, width)
                wanted.remove(frame.pts)
                written.put(None)
    assert not wanted, f"minterpolate left out {sorted(wanted)}"


def _graph(width: int, height: int, multiplier: int) -> av.filter.Graph:
    """A filter graph whose clock ticks once for each frame of the result."""
    graph = av.filter.Graph()
    graph.threads = 1
    pixels = av.VideoFormat("yuv444p", width, height)
    source = graph.add_buffer(width=width, height=height, format=pixels, time_base=Fraction(1, multiplier))
    graph.link_nodes(
        source, graph.add("minterpolate", f"fps={multiplier}:{OPTIONS}"), graph.add("buffersink")
    )
    graph.configure()
    return graph


def _pulled(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
    """The frames that are ready."""
    while True:
        try:
            frame = graph.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return
        assert isinstance(frame, av.VideoFrame)
        yield frame


def _to_frame(image: Tensor, pts: int, multiplier: int) -> av.VideoFrame:
    """[H, W, 3] in [0, 1] -> YCbCr in 8 bits, its border repeated up to a multiple of 16."""
    rgb = image.cpu().float().clamp(0, 1).permute(2, 0, 1)
    ycbcr = torch.einsum("ij,jhw->ihw", TO_YCBCR, rgb).add_(OFFSET).mul_(255).round_().clamp_(0, 255)
    height, width = image.shape[:2]
    padded = F.pad(ycbcr, (0, -width % ALIGN, 0, -height % ALIGN), mode="replicate")
    frame = av.VideoFrame.from_ndarray(padded.byte().numpy(), format="yuv444p")
    frame.pts, frame.time_base = pts, Fraction(1, multiplier)
    return frame


def _to_image(frame: av.VideoFrame, height: int, width: int) -> Tensor:
    """YCbCr in 8 bits -> [height, width, 3] in [0, 1]."""
    ycbcr = torch.from_numpy(frame.to_ndarray())[:, :height, :width].float().div_(255).sub_(OFFSET)
    return torch.einsum("ij,jhw->hwi", TO_RGB, ycbcr).clamp_(0, 1)
