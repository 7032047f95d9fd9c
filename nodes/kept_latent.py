"""What took long to sample outlives the nodes that work on it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from .. import host

# Keys of a LATENT beside its samples.
# How many latent frames there are with the end image as the last, which gives no frame of the video; once it
# is dropped there are fewer, and the key says nothing.
END_LATENT_ALONE = "wan21_end_latent_alone"
SAMPLING_SECONDS = "wan21_sampling_seconds"  # how long the sampling took

WORTH_KEEPING = 60  # seconds of sampling; a latent that took longer is kept


class LatentKept(RuntimeError):
    """Work on a latent failed, and the latent is in a file. Problem and fix are those of a `Refusal`."""

    def __init__(self, problem: str, fix: str):
        super().__init__(f"{problem}. {fix}.")
        self.problem, self.fix = problem, fix

    def about(self, what: str) -> "LatentKept":
        """The same with the name of a node in front."""
        return LatentKept(f"{what}: {self.problem}", self.fix)


def video_latent(latent: dict) -> Tensor:
    """The samples of a LATENT without an end image that is no frame of the video."""
    samples = latent["samples"]
    ends_in_guide = latent.get(END_LATENT_ALONE) == samples.shape[2]
    return samples[:, :, :-1] if ends_in_guide else samples


@contextmanager
def kept_until_done(latent: dict, resume: str) -> Iterator[None]:
    """Keeps a latent that took long in a file until the block has succeeded; an error names the file.

    The file is written before the block begins, so that it outlives a crash of the whole host too.

    Args:
        latent: LATENT; one that took up to a minute is not kept.
        resume: what to do with the file once it is loaded, such as "decode it".
    """
    samples, seconds = video_latent(latent), latent.get(SAMPLING_SECONDS, 0)
    if seconds <= WORTH_KEEPING:
        yield
        return
    try:
        kept = host.KeptLatent(samples)
    except OSError as error:
        host.tell(f"could not keep the latent in the output folder ({error}); goes on without")
        yield
        return
    try:
        yield
    except Exception as error:
        problem = str(error).rstrip(".")
        raise LatentKept(
            f"{problem}. The latent ({seconds / 60:.0f} min of sampling) is kept in {kept.path}",
            f"To resume: move it to ComfyUI's input folder, load it with LoadLatent, and {resume}",
        ) from error
    except BaseException:  # the host's cancel
        host.tell(f"cancelled; the latent is kept in {kept.path}")
        raise
    try:
        kept.remove()
    except OSError as error:  # a virus scanner may hold it on Windows; the result stands
        host.tell(f"could not remove {kept.path} ({error})")
