"""A LoRA on a model, in sentences: what of it is used, what is left out, and when that is refused."""

from collections import Counter
from collections.abc import Iterable

from ..wan.files.bad_file import AGAIN, listed
from ..wan.files.lora_keys import split_lora_key
from ..wan.lora import DAMAGED, OTHER_SIZE, Lora
from ..wan.refusal import Refusal


def check_lora(lora: Lora, strict: bool = False) -> None:
    """Refuses a LoRA that changes nothing, and in `strict` one that does not fit in whole.

    Raises:
        Refusal: with the keys that do not fit, and why.
    """
    in_blocks = any(name.startswith("blocks.") for name, _ in lora.patches)
    # Layers outside the blocks, such as those of the image branch, have the same width in every size.
    blocks_misfit = any("blocks" in k and why == OTHER_SIZE for k, why in lora.unmatched.items())
    if lora.patches and blocks_misfit and not in_blocks:
        raise Refusal(
            f"made for a model of another size: none of its blocks fits, {len(lora.unmatched)} of "
            f"{len(lora.matched) + len(lora.unmatched)} keys",
            "Pick a LoRA that was trained for Wan2.1 of this size",
        )
    if not lora.patches:
        damaged = all(reason in DAMAGED for reason in lora.unmatched.values())
        raise Refusal(
            f"none of its {len(lora.unmatched)} keys fits the model: {'; '.join(left_out(lora))}",
            AGAIN if damaged else "Pick a LoRA that was trained for Wan2.1 of this size",
        )
    if strict and lora.unmatched:
        raise Refusal(
            f"{len(lora.unmatched)} keys do not fit the model: {'; '.join(left_out(lora))}",
            "Turn strict off to apply the rest",
        )


def lora_report(lora: Lora) -> list[str]:
    """Lines on what is applied (layers, ranks, blocks) and what is left out, and why."""
    layers = {name.removesuffix(".weight").removesuffix(".bias") for name, _ in lora.patches}
    ranks = Counter(patch.rank for _, patch in lora.patches if patch.rank)
    kinds = Counter(
        "dora" if patch.magnitude is not None else patch.kind.replace("_", "-") for _, patch in lora.patches
    )
    blocks = {int(name.split(".")[1]) for name, _ in lora.patches if name.startswith("blocks.")}
    keys = len(lora.matched) + len(lora.unmatched)
    lines = [f"applied: {len(lora.matched)} of {keys} keys, {len(layers)} layers, {_counts(kinds)}"]
    if ranks:
        lines.append(f"rank: {ranks.most_common(1)[0][0] if len(ranks) == 1 else _counts(ranks)}")
    lines.append(f"blocks: {_ranges(sorted(blocks)) or 'none'}")
    outside = sorted(layer for layer in layers if not layer.startswith("blocks."))
    if outside:
        lines.append(f"outside the blocks: {listed(outside)}")
    return lines + [f"left out: {text}" for text in left_out(lora)] + notes(lora)


def notes(lora: Lora) -> list[str]:
    """What differs from the host's own loader."""
    found = []
    magnitudes = [patch.magnitude for _, patch in lora.patches if patch.magnitude is not None]
    if any(magnitude.shape[0] > 1 for magnitude in magnitudes):
        found.append(
            "dora: each output is divided by its norm in the changed weight, as in the paper and in PEFT; "
            "the host's LoraLoaderModelOnly divides by that in the plain weight"
        )
    biases = [key for key in lora.matched if (split_lora_key(key) or ("", ""))[1] == "up_bias"]
    if biases:
        found.append(
            f"biases of factors ({len(biases)}) act, as in PEFT; the host's LoraLoaderModelOnly leaves them "
            f"out: {listed(biases)}"
        )
    return found


def left_out(lora: Lora) -> list[str]:
    """One line for each reason, with the keys it holds for."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in lora.unmatched.items():
        by_reason.setdefault(reason, []).append(key)
    return [f"{len(keys)} keys, {reason}: {listed(keys)}" for reason, keys in by_reason.items()]


def _counts(counter: Counter) -> str:
    return ", ".join(f"{count} x {name}" for name, count in counter.most_common())


def _ranges(numbers: Iterable[int]) -> str:
    """Sorted numbers -> "0-29, 31"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
