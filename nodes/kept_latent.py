"""What took long to sample outlives the nodes that work on it."""

from contextlib import contextmanager

from .. import host
from ..wan.conditioning import END_LATENT_ALONE, SAMPLING_SECONDS

WORTH_KEEPING = 60  # seconds of sampling


@contextmanager
def kept_until_done(node, latent, resume):
    """Keeps a latent that took long in a file until the block has succeeded; an error names the file.

    It is written first, so that a crash of the whole host leaves it as well.

    Args:
        latent: LATENT; one that took up to a minute is not kept.
        resume: what to do with the file once it is loaded, such as "decode it".
    """
    samples, seconds = latent["samples"], latent.get(SAMPLING_SECONDS, 0)
    if seconds <= WORTH_KEEPING:
        yield
        return
    if latent.get(END_LATENT_ALONE):
        samples = samples[:, :, :-1]  # the file cannot mark the end image, which is no frame
    try:
        kept = host.KeptLatent(samples)
    except OSError as error:
        host.tell(node, f"could not keep the latent in the output folder ({error}); goes on without")
        yield
        return
    try:
        yield
    except Exception as error:
        problem = str(error).removeprefix(f"{node}: ").rstrip(".")
        raise RuntimeError(
            f"{node}: {problem}. The latent ({seconds / 60:.0f} min of sampling) is kept in {kept.path}. "
            f"To resume: move it to ComfyUI's input folder, load it with LoadLatent, and {resume}."
        ) from error
    except BaseException:  # the host's cancel
        host.tell(node, f"cancelled; the latent is kept in {kept.path}")
        raise
    try:
        kept.remove()
    except OSError as error:  # a virus scanner may hold it on Windows; the result stands
        host.tell(node, f"could not remove {kept.path} ({error})")
