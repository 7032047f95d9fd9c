"""The sections of `scripts/bench_gpu.py`: each a function that gives rows, or says what it misses."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from . import attention, eight_bits, environment, glue, joint, memory, products, step, vae
from .bench import Bench, Missing, Row


@dataclass(frozen=True)
class Section:
    """A part of the benchmark.

    Attributes:
        rows: gives them one by one, for a `Bench`; may raise `Missing` instead.
        seconds: its part of the time, relative to those of the others.
        what: in a few words.
    """

    rows: Callable[[Bench], Iterator[Row]]
    seconds: int
    what: str


# What matters most comes first, and what calls other packages' kernels late: a kernel that crashes on a
# device leaves it unusable for the process.
SECTIONS = {
    "environment": Section(environment.rows, 15, "versions, rates of memory and bus"),
    "step": Section(step.rows, 130, "a whole step: native, diffusers, ours eager and with kernels"),
    "vae": Section(vae.rows, 90, "encode and decode: native, diffusers, ours"),
    "memory": Section(memory.rows, 40, "peaks beside our estimates"),
    "glue": Section(glue.rows, 20, "the work between the products, eager and with kernels"),
    "joint": Section(joint.rows, 50, "both passes jointly, one after the other, stacked"),
    "streaming": Section(joint.streamed, 60, "the same with weights in the computer's memory"),
    "8bits": Section(eight_bits.rows, 60, "a step by each weight_dtype below 16 bits"),
    "attention": Section(attention.rows, 40, "self- and cross-attention in every way that is installed"),
    "products": Section(products.rows, 35, "matrix products in 16 and 8 bits"),
}

__all__ = ["SECTIONS", "Bench", "Missing", "Row", "Section"]
