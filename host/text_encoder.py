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
from torch import Tensor

from ..wan import files
from ..wan.files.bad_file import AGAIN
from ..wan.files.marks import check_scales, unpacked_shapes
from ..wan.files.umt5 import TOKENIZER_KEY, tokenizer_beside
from ..wan.files.umt5_gguf import read_umt5_gguf
from ..wan.refusal import Refusal
from .progress import tell, tell_left_out
from .quantised import INT8_FORMAT, multiply_exactly, quantised_layers, unpacked_formats, with_formats
from .reader import read_checkpoint

MAX_TOKENIZER_BYTES = 100_000_000  # umT5's has 4.5 million
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
        Refusal: the file is damaged, incomplete or something else, or there is no tokenizer for it.
    """
    if Path(path).suffix.lower() == ".gguf":
        # Unpacked once: the encoder runs twice a job, and the host's umT5 has no layers for packed matrices.
        state_dict, metadata = read_umt5_gguf(Path(path), torch.float16), {}
    else:
        state_dict, metadata = read_checkpoint(path)
    state_dict, _ = with_formats(state_dict, metadata)
    state_dict = files.to_umt5_keys(state_dict)
    files.refuse_loose_scales(state_dict)
    formats = quantised_layers(state_dict)
    check_scales(state_dict, formats)
    shapes = unpacked_shapes(state_dict, formats)
    sizes = files.umt5_config(shapes)
    tokenizer = _tokenizer(Path(path), state_dict.pop(TOKENIZER_KEY, None), sizes["vocab_size"])
    left_out = files.check_keys(
        files.umt5_shapes(sizes), {k: v for k, v in shapes.items() if k in state_dict}
    )
    tell_left_out(Path(path).name, left_out)
    state_dict = {key: value for key, value in state_dict.items() if key not in left_out}
    options: dict = {"umt5xxl_model_config": sizes}  # the host lays them over those of umT5-XXL
    if device == "cpu":
        options["load_device"] = options["offload_device"] = torch.device("cpu")
    detected = comfy.text_encoders.sd3_clip.t5_xxl_detect(state_dict)
    clip = comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(UMT5Tokenizer, comfy.text_encoders.wan.te(**detected)),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        tokenizer_data={"spiece_model": tokenizer},
        parameters=comfy.utils.calculate_parameters(state_dict),
        state_dict=[state_dict],
        model_options=options,
    )
    # The other formats the host unpacks by itself where the device does not multiply in them.
    in_int8 = {INT8_FORMAT} & set(formats.values())
    multiply_exactly(clip.cond_stage_model, unpacked_formats(in_int8, clip.patcher.load_device))
    return clip


def _tokenizer(path: Path, stored: Tensor | None, vocab_size: int) -> bytes:
    """The SentencePiece model of a text encoder: the one in its file, or the one beside it.

    Raises:
        Refusal: there is none, it is damaged, or it gives numbers that the encoder has no features for.
    """
    if stored is None:
        beside = tokenizer_beside(path)
        name, size, is_bytes = beside.name, beside.stat().st_size, True
    else:
        name, size, is_bytes = f"its {TOKENIZER_KEY}", stored.numel(), stored.dtype == torch.uint8
    if size > MAX_TOKENIZER_BYTES or not is_bytes:
        raise Refusal(f"{name} is no tokenizer: up to {MAX_TOKENIZER_BYTES} bytes are read", AGAIN)
    model = beside.read_bytes() if stored is None else stored.numpy().tobytes()
    import sentencepiece  # here: the host loads it with its first text encoder, and starts without

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    except (RuntimeError, ValueError) as error:
        raise Refusal(f"{name} is no tokenizer, or a damaged one", AGAIN) from error
    if not 0 < pieces <= vocab_size:
        raise Refusal(
            f"{name} knows {pieces} pieces of text, and the encoder has features for {vocab_size}",
            "Use the tokenizer that the encoder was made with",
        )
    return model
