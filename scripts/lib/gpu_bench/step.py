"""A whole step, both passes: native, diffusers and ours on the same weights."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ..peers import peer_dit, random_dit
from .attention import usable_backends
from .bench import Bench, Missing, Race, Row
from .dit import inputs, joint, one_after_the_other, tera_operations
from .kernels import check_taken, in_eager


def rows(bench: Bench) -> Iterator[Row]:
    """Native as the host runs it, both passes stacked, is what the others are put beside."""
    size = bench.size
    model, given = random_dit(size.config, bench.device, bench.dtype), inputs(bench)

    def peer(name: str, call: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        return partial(call, peer_dit(name, model, bench.dtype), *args)

    def with_kernels() -> Callable[[], Any]:
        check_taken(bench)
        return partial(joint, model, given)

    makers: dict[str, Callable[[], Callable[[], Any]]] = {
        "native, passes stacked": lambda: peer("native", lambda dit: dit(*given)),
        "ours, eager": lambda: in_eager(joint, model, given),
        "ours, kernels": with_kernels,
        "native, one pass after the other": lambda: peer("native", one_after_the_other, given),
        "diffusers, one pass after the other": lambda: peer("diffusers", one_after_the_other, given),
    }
    for name, function in usable_backends(bench).items():
        makers[f"ours, attention {name}"] = lambda function=function: partial(
            joint, model, given, attention=function
        )
    work = tera_operations(size) / size.scale
    note = f"{size.config.num_layers} blocks, times {size.scale:g}"
    notes = dict.fromkeys(makers, note) if size.scale != 1 else {}
    yield from bench.race(Race(makers, scale=size.scale, work=work, notes=notes))
    try:
        yield Row("our kernels", check_taken(bench))
    except Missing as missing:
        yield Row("our kernels", skipped=str(missing))
