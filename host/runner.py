"""The walk over the blocks on the host: it stops on cancel and honours replaced blocks; never compiled."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..wan.dit import ApplyBlock, BlockRunner, Pass
from ..wan.option import Call
from .attention import OVERRIDE, attention_of
from .patches import patch_inside_blocks
from .prefetch import fetched_ahead
from .progress import check_cancelled
from .untraced import untraced

ONE_A_PASS = ("cond_or_uncond", "uuids")  # lists in transformer_options


@untraced
def runner_of(transformer_options: dict, fetched: Sequence[nn.Module] = ()) -> BlockRunner:
    """The joint walk over the blocks that stops on cancel and honours the host's block replacements.

    Args:
        fetched: the blocks, where their weights are to be fetched ahead.
    """
    replaced = transformer_options.get("patches_replace", {}).get("dit", {})

    def run(num_blocks: int, passes: list[Pass], call: ApplyBlock) -> None:
        call = untraced(call)
        transformer_options["total_blocks"] = num_blocks
        transformer_options["block_type"] = "double"
        told = {key: transformer_options[key] for key in ONE_A_PASS if transformer_options.get(key)}
        names = [pass_name(chunk) for chunk in told.get("cond_or_uncond", [0])]
        with fetched_ahead(fetched[:num_blocks], passes[0].x.device, transformer_options) as fetch:
            for i in range(num_blocks):
                transformer_options["block_index"] = i
                check_cancelled()
                fetch()
                at = -1
                for p in passes:
                    check_cancelled()
                    # A replaced block and the host's attention get one pass, and are told of that one.
                    # Several prompts of a side are passes of one name, in the order of the lists.
                    at = names.index(p.name, at + 1)
                    transformer_options.update({key: [values[at]] for key, values in told.items()})
                    if ("double_block", i) in replaced:
                        p.x = _replaced(replaced["double_block", i], i, p, call, transformer_options)
                    else:
                        p.x = call(i, p)
        transformer_options.update(told)

    return run


def pass_name(chunk: int) -> str:
    """The name of a pass by its number in the host's `cond_or_uncond`."""
    return {0: "cond", 1: "uncond"}.get(chunk, f"cond{chunk}")


def _replaced(patch: Callable, i: int, p: Pass, call: ApplyBlock, transformer_options: dict) -> Tensor:
    """Tokens of a pass after a block that another node replaced, called as the host's Wan model calls it.

    What the node is given stays as it is: some compare it with what the block made of it. What it hands on to
    the block in its place acts.
    """
    is_both = p.image is p.text  # without CLIP features
    image_tokens = 0 if p.image is None or is_both else p.image.shape[1]
    override = transformer_options.get(OVERRIDE)

    def original_block(args: dict[str, Any]) -> dict:
        told = args["transformer_options"]
        if refusal := patch_inside_blocks(told):
            raise refusal
        is_copy = told is not transformer_options and OVERRIDE in told
        has_own = is_copy or told.get(OVERRIDE) is not override
        text = args["txt"][:, image_tokens:]
        image = args["txt"][:, :image_tokens] if image_tokens else None
        given = replace(
            p,
            x=args["img"].clone(),  # our block works in place
            modulation=args["vec"].squeeze(1),
            image=text if is_both else image,
            text=text,
            rope=_from_matrices(args["pe"]),
            attention=attention_of(told) if has_own else p.attention,
        )
        return {"img": call(i, given)}

    text = p.text
    if p.image is not None and not is_both:
        text = torch.cat([p.image, p.text], dim=1)  # (B, I + T, D)
        p.image, p.text = text[:, :image_tokens], text[:, image_tokens:]  # what is changed in place stays so
    args = {
        "img": p.x,  # (B, L, D)
        "txt": text,
        "vec": p.modulation.unsqueeze(1),  # (B, 1, 6, D)
        "pe": _matrices(p.rope),
        "transformer_options": transformer_options,
    }
    return patch(args, {"original_block": original_block})["img"]


def _matrices(rope: Tensor) -> Tensor:
    """A table of `rope_table` in the host's form, matrices that turn pairs: [1, L, 1, D/N/2, 2, 2]."""
    cos, sin = rope.unbind(-1)
    return torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))[None]


def _from_matrices(pe: Tensor) -> Tensor:
    """The table of such matrices, (L, 1, D/N/2, 2)."""
    return pe[0, ..., 0].contiguous()


@untraced
def composed_runner(call: Call, transformer_options: dict, blocks: Sequence[nn.Module]) -> BlockRunner:
    """`runner_of` with those of a call's options around it."""
    runner = untraced(runner_of(transformer_options, blocks if call.plan.ahead else ()))
    for around in call.around:
        runner = untraced(around(runner))

    def run(num_blocks: int, passes: list[Pass], block: ApplyBlock) -> None:
        runner(num_blocks, passes, untraced(block))

    return untraced(run)
