"""umT5 of any size inside a standard CLIP."""

from pathlib import Path
from typing import Any

import comfy.sd
import comfy.supported_models_base
import comfy.text_encoders.sd3_clip
import comfy.text_encoders.wan
import comfy.utils
import folder_paths
import torch

from ..wan import files
from ..wan.files.umt5 import tokenizer_beside
from ..wan.files.umt5_gguf import read_umt5_gguf
from .progress import tell
from .quantised import with_formats

TRAINED_TOKENS = 512  # of the release, which cuts what is longer


class UMT5Tokenizer(comfy.text_encoders.wan.WanT5Tokenizer):
    """The host's, which cuts nothing; a text longer than the models were trained with is said.

    The attention of a pass reads all the tokens, and all of them count.
    """

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> Any:
        tokens = super().tokenize_with_weights(text, return_word_ids, **kwargs)
        count = max(len(part) for part in tokens[self.clip_name])
        if count > TRAINED_TOKENS:
            tell(
                f"the prompt is {count} tokens long, and Wan2.1 was trained with up to {TRAINED_TOKENS}: all "
                "are read, as with the host's CLIPLoader, where the release leaves out the last "
                f"{count - TRAINED_TOKENS}"
            )
        return tokens


def load_text_encoder(path: str | Path, device: str = "default") -> comfy.sd.CLIP:
    """A standard CLIP from a umT5 encoder of any size and published layout.

    Args:
        path: see `wan.files.read_checkpoint`.
        device: default is the host's choice; or cpu.

    Raises:
        Refusal: the file is damaged or something else, or there is no tokenizer for it.
    """
    if Path(path).suffix.lower() == ".gguf":
        # Unpacked once: the encoder runs twice a job, and the host's umT5 has no layers for packed matrices.
        state_dict, metadata = read_umt5_gguf(Path(path), torch.float16), {}
    else:
        state_dict, metadata = files.read_checkpoint(path)
    state_dict, _ = with_formats(state_dict, metadata)
    state_dict = files.to_umt5_keys(state_dict)
    files.refuse_loose_scales(state_dict)
    sizes = files.umt5_config(state_dict)
    tokenizer = state_dict.pop("spiece_model", None)
    if tokenizer is None:
        tokenizer = tokenizer_beside(Path(path)).read_bytes()
    options: dict = {"umt5xxl_model_config": sizes}  # the host lays them over those of umT5-XXL
    if device == "cpu":
        options["load_device"] = options["offload_device"] = torch.device("cpu")
    detected = comfy.text_encoders.sd3_clip.t5_xxl_detect(state_dict)
    return comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(UMT5Tokenizer, comfy.text_encoders.wan.te(**detected)),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        tokenizer_data={"spiece_model": tokenizer},
        parameters=comfy.utils.calculate_parameters(state_dict),
        state_dict=[state_dict],
        model_options=options,
    )
