"""TeaCache coefficients that come with a checkpoint."""

import json

from comfy.model_patcher import ModelPatcher

from ..wan.refusal import Refusal
from ..wan.teacache import NO_PROFILE, check_coefficients

COEFFICIENTS_KEY = "teacache_coefficients"  # key in a checkpoint's metadata
COEFFICIENTS_SUFFIX = ".teacache.json"  # a file beside a checkpoint has the checkpoint's whole name and this


def measured_coefficients(model: ModelPatcher) -> tuple[float, ...] | None:
    """Coefficients beside the checkpoint of a MODEL of ours or in its metadata; None without any.

    Raises:
        Refusal: they are there and damaged.
    """
    path = model.model.checkpoint_path
    beside = path.with_name(path.name + COEFFICIENTS_SUFFIX)
    stored = model.model.checkpoint_metadata.get(COEFFICIENTS_KEY)
    if beside.is_file():
        stored, name = beside.read_text(encoding="utf-8"), beside.name
    elif stored is not None:
        name = f"{COEFFICIENTS_KEY} in the metadata of {path.name}"
    else:
        return None
    try:
        return check_coefficients(json.loads(stored))
    except Refusal as error:
        raise error.about(name) from error
    except ValueError as error:  # no JSON
        raise Refusal(f"{name}: {error}", NO_PROFILE) from error
