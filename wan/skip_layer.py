"""Skip-layer guidance: the unconditional pass leaves blocks out, and guidance leads away from the result.

The blocks are skipped on that pass only, in the middle of the run, as Wan2GP does it; no third pass is run
(the form of Stable Diffusion 3.5, which costs half as much again).
"""

from .refusal import Refusal


def parse_layers(text):
    """ "9, 10" -> (9, 10): block numbers from 0, in order; "" -> ().

    Raises:
        ValueError: something is not a block number.
    """
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    wrong = [part for part in parts if not (part.isascii() and part.isdigit())]
    if wrong:
        raise Refusal(f"skip_layers holds {wrong[0]!r}; it takes block numbers", "Write them like 9,10")
    return tuple(sorted({int(part) for part in parts}))


def is_skipped_at(step, steps, start_percent, end_percent):
    """Whether int(start*N) <= step < int(end*N), for a step counted from 0 of N. Whole percents."""
    return start_percent * steps // 100 <= step < end_percent * steps // 100


def skip_layers(layers, name="uncond"):
    """A runner around the runner: the pass `name` goes past the blocks in `layers`.

    Returns:
        `around(runner)` -> runner, both as `wan.dit.run_blocks`.
    """

    def around(runner):
        def run(num_blocks, passes, call):
            def call_or_pass(i, p):
                return p.x if p.name == name and i in layers else call(i, p)

            runner(num_blocks, passes, call_or_pass)

        return run

    return around
