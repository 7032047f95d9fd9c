"""The walk over the blocks on the host: it stops on cancel and honours replaced blocks; never compiled."""

from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor

from ..wan.dit import ApplyBlock, BlockRunner, Pass
from ..wan.option import Call
from .progress import check_cancelled

Function = TypeVar("Function", bound=Callable)


class _Untraced(Protocol):
    def __call__(self, function: Function) -> Function: ...


# torch.compile compiles what is computed (the embeddings, one block for all, the head). The walk between them
# is the host's and the options' Python, which reads transformer_options: TorchCompileModel drops every guard
# on those, so traced code would never see a change in them. A partial: a function of ours would be traced.
untraced = cast(_Untraced, partial(torch.compiler.disable, recursive=False))


ONE_A_PASS = ("cond_or_uncond", "uuids")  # lists in transformer_options


@untraced
def runner_of(transformer_options: dict) -> BlockRunner:
    """The joint walk over the blocks that stops on cancel and honours the host's block replacements."""
    replace = transformer_options.get("patches_replace", {}).get("dit", {})

    def run(num_blocks: int, passes: list[Pass], call: ApplyBlock) -> None:
        call = untraced(call)
        transformer_options["total_blocks"] = num_blocks
        transformer_options["block_type"] = "double"
        told = {key: transformer_options[key] for key in ONE_A_PASS if transformer_options.get(key)}
        names = [pass_name(chunk) for chunk in told.get("cond_or_uncond", [0])]
        for i in range(num_blocks):
            transformer_options["block_index"] = i
            at = -1
            for p in passes:
                check_cancelled()
                # A replaced block and the host's attention get one pass, and are told of that one. Several
                # prompts of a side are passes of one name, in the order of the lists.
                at = names.index(p.name, at + 1)
                transformer_options.update({key: [values[at]] for key, values in told.items()})
                patch = replace.get(("double_block", i))
                p.x = call(i, p) if patch is None else _replaced(patch, i, p, call, transformer_options)
        transformer_options.update(told)

    return run


def pass_name(chunk: int) -> str:
    """The name of a pass by its number in the host's `cond_or_uncond`."""
    return {0: "cond", 1: "uncond"}.get(chunk, f"cond{chunk}")


def _replaced(patch: Callable, i: int, p: Pass, call: ApplyBlock, transformer_options: dict) -> Tensor:
    """Tokens of a pass after a block that another node replaced, called as the host's Wan model calls it.

    What the node is given stays as it is: some compare it with what the block made of it.
    """

    def original_block(args: dict) -> dict:
        p.x = args["img"].clone()  # our block works in place
        return {"img": call(i, p)}

    args = {"img": p.x, "txt": p.text, "vec": p.modulation, "pe": None}
    args["transformer_options"] = transformer_options
    return patch(args, {"original_block": original_block})["img"]


@untraced
def composed_runner(call: Call, transformer_options: dict) -> BlockRunner:
    """`runner_of` with those of a call's options around it."""
    runner = untraced(runner_of(transformer_options))
    for around in call.around:
        runner = untraced(around(runner))

    def run(num_blocks: int, passes: list[Pass], block: ApplyBlock) -> None:
        runner(num_blocks, passes, untraced(block))

    return untraced(run)
