"""GGUF files as other people's tools write them."""

import gguf


def write_umt5(state_dict, path, vocabulary=True, scores=True):
    """A umT5 encoder in the layout of city96's and llama.cpp's files, under the `gguf` package's own names.

    Args:
        state_dict: in Hugging Face's names, with its tokenizer.
        vocabulary: whether the metadata holds the tokenizer.
        scores: whether each of its pieces has a score.
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
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, blocks)
    for key, weight in state_dict.items():
        if key == "spiece_model":
            continue
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.ndim == 2 and "relative" not in key else None
        array = weight.float().numpy()
        array = array if kind is None else gguf.quants.quantize(array, kind)
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
