"""How strong the layers of a LoRA file are: alpha / r, from its own tensors or from PEFT's configuration."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..refusal import Refusal
from .bad_file import AGAIN
from .limits import MAX_KEY_LENGTH, json_table
from .lora_keys import split_lora_key

PEFT_METADATA = "lora_adapter_metadata"
MAX_SCALE = 1e6  # alpha / r; "full" LyCORIS files state alphas of 100,000 for ranks of some thousands


class Scaling:
    """alpha / r of a layer, by the file's own alphas or else PEFT's configuration in its metadata.

    Raises:
        Refusal: the configuration is damaged.
    """

    def __init__(self, metadata: Mapping[str, str]):
        stored = metadata.get(PEFT_METADATA)  # written by diffusers' save_lora_weights
        config = json_table(stored, f"`{PEFT_METADATA}` in its metadata") if stored else {}
        config = {key.rpartition(".")[2]: value for key, value in config.items()}
        patterns = config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise Refusal(f"alpha_pattern in its metadata is a {type(patterns).__name__}, no table", AGAIN)
        self.stabilised = bool(config.get("use_rslora", False))
        self.default = _alpha(config.get("lora_alpha"), "lora_alpha in its metadata")
        self.patterns: dict[
            str, tuple[int, float | None]
        ] = {}  # place in the file and alpha, by layer's name
        for place, (pattern, alpha) in enumerate(patterns.items()):
            split = split_lora_key(f"{pattern}.alpha") if len(pattern) <= MAX_KEY_LENGTH else None
            if split is not None:
                alpha = _alpha(alpha, f"the alpha of {pattern} in its metadata")
                self.patterns.setdefault(split[0], (place, alpha))

    def of(self, module: str, alpha: Tensor | None, rank: int | None) -> float:
        """What the product of a layer's factors is multiplied by.

        Args:
            alpha: the file's, one number.
            rank: from 1 on; None where nothing is factorised.

        Raises:
            Refusal: it is no number that a LoRA may have.
        """
        if rank is None:
            return 1.0
        if alpha is not None:  # LyCORIS's holds its rank stabilisation already
            if alpha.numel() != 1:
                raise Refusal(f"the alpha of {module} holds {alpha.numel()} numbers and must be one", AGAIN)
            return _bounded(_alpha(alpha.item(), f"the alpha of {module}"), rank, module)
        parts = module.split(".")
        # A name of `alpha_pattern` means each layer that ends in it; of several, the first.
        ends = (self.patterns.get(".".join(parts[i:])) for i in range(len(parts)))
        configured = min((found for found in ends if found), default=(0, self.default))[1]
        if configured is None:
            return 1.0
        return _bounded(configured, math.sqrt(rank) if self.stabilised else rank, module)


def _alpha(value: Any, what: str) -> float | None:
    """An alpha as a number; None stays."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Refusal(f"{what} is a {type(value).__name__}, not a number", AGAIN)
    try:
        return float(value)
    except OverflowError:  # an int of hundreds of digits
        return math.inf


def _bounded(alpha: float | None, divisor: float, module: str) -> float:
    scale = (alpha or 0.0) / divisor
    if not abs(scale) <= MAX_SCALE:  # NaN too
        raise Refusal(
            f"the alpha of {module} makes it {scale:g} times as strong; up to {MAX_SCALE:g} is read",
            AGAIN,
        )
    return scale
