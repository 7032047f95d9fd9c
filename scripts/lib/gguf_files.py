"""GGUF files as other people's tools write them."""

import gguf
import numpy as np
import torch


def write_umt5(state_dict, path, vocabulary=True, scores=True):
    """A umT5 encoder in the layout of city96's and llama.cpp's files, under the `gguf` package's own names.

    Args:
        state_dict: in Hugging Face's names, with its tokenizer.
        vocabulary: whether the metadata holds the tokenizer.
        scores: whether each of its pieces has a score.

    Returns:
        The weights that it holds, unpacked.
    """
    import sentencepiece

    model = bytes(state_dict["spiece_model"].tolist())
    spm = sentencepiece.SentencePieceProcessor(model_proto=model)
    writer, count = gguf.GGUFWriter(str(path), "t5encoder"), spm.vocab_size()
    if vocabulary:
        writer.add_tokenizer_model("t5")
        writer.add_token_list([spm.id_to_piece(i) for i in range(count)])
        writer.add_token_scores([spm.get_score(i) for i in range(count if scores else count - 1)])
        kinds = [(spm.is_unknown, 2), (spm.is_control, 3), (spm.is_byte, 6)]
        writer.add_token_types([next((n for ask, n in kinds if ask(i)), 1) for i in range(count)])
        writer.add_eos_token_id(spm.eos_id())
        writer.add_pad_token_id(spm.pad_id())
        writer.add_add_space_prefix(True)
        writer.add_remove_extra_whitespaces(True)
    blocks = 1 + max(int(key.split(".")[2]) for key in state_dict if key.startswith("encoder.block."))
    unpacked = dict(state_dict)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, blocks)
    for key, weight in state_dict.items():
        if key == "spiece_model":
            continue
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.ndim == 2 and "relative" not in key else None
        array = weight.float().numpy()
        if kind is not None:
            array = gguf.quants.quantize(array, kind)
            unpacked[key] = torch.from_numpy(gguf.quants.dequantize(array, kind)).view(weight.shape)
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return unpacked


def write_dit(state_dict, path, kind):
    """A diffusion model as city96's converter writes it: matrices of the blocks packed, the rest in float32.

    Args:
        kind: a `gguf.GGMLQuantizationType`. K-types, which the package does not pack, get random numbers.

    Returns:
        The weights that it holds, unpacked.
    """
    writer, unpacked = gguf.GGUFWriter(str(path), "wan"), {}
    g = np.random.default_rng(0)
    for key, weight in state_dict.items():
        array, stored = weight.float().numpy(), gguf.GGMLQuantizationType.F32
        if key.startswith("blocks.") and array.ndim == 2:
            stored = kind
        data = _random_blocks(array.shape, stored, g) if stored.name in _HALVES else None
        data = gguf.quants.quantize(array, stored) if data is None else data
        unpacked[key] = torch.from_numpy(gguf.quants.dequantize(data, stored).reshape(array.shape).copy())
        if array.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{key}", array.shape)
            data = np.ascontiguousarray(array).reshape(-1)
        writer.add_tensor(key, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return unpacked


# Where a block of each K-type holds its scales in float16, and a scale that gives weights near 1/16.
_HALVES = {"Q2_K": ((80, 82), 2e-3), "Q3_K": ((108,), 7e-4), "Q4_K": ((0, 2), 2e-4), "Q5_K": ((0, 2), 1e-4),
           "Q6_K": ((208,), 5e-5)}  # fmt: skip


def _random_blocks(shape, kind, g):
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = g.integers(0, 256, (shape[0] * shape[1] // numbers, size), dtype=np.uint8)
    places, scale = _HALVES[kind.name]
    for place in places:
        blocks[:, place : place + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return blocks.reshape(shape[0], -1)
