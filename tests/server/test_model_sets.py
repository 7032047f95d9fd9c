"""Model files that belong together are chosen by their headers, before anything is queued."""

import json
import os
import struct
import threading
import time

import gguf
import numpy as np
import pytest
import torch
from helpers_checkpoint import write_sparse
from helpers_models import (
    EXPERT,
    FLF2V,
    RELEASE,
    T2V,
    TINY,
    TOY,
    Shelf,
    clip_vision,
    dit,
    umt5,
    vae,
)
from helpers_server import serve, wait_until
from inferencesh import APIError
from lib.gguf_files import write_umt5
from safetensors.torch import load_file
from wan21.server import installed
from wan21.server.installed import Installed
from wan21.server.problems import Problem
from wan21.server.traits import read_traits

NONE = dict.fromkeys(RELEASE)
WHOLE = {part: RELEASE[part] for part in ("model", "text_encoder", "vae")}


@pytest.fixture
def shelf(tmp_path):
    """A host with the bundled files and no others."""
    return Shelf(tmp_path)


@pytest.fixture
def bare(tmp_path):
    """A host without any file."""
    return Shelf(tmp_path, bundled=False)


def choose(host, end_image=False, formats=None, large=False, **named):
    """(names, log) of a job."""
    names, notes = Installed(host, formats).choose(NONE | named, RELEASE, end_image, large)
    return names, "\n".join(notes)


def refused(host, end_image=False, **named):
    """Messages by field of a job that has no set of files."""
    with pytest.raises(Problem) as raised:
        choose(host, end_image, **named)
    assert raised.value.status == 422
    return {error["path"].removeprefix("input."): error["message"] for error in raised.value.errors}


# --- what belongs together ---------------------------------------------------------------------------------


def test_the_bundled_set_is_named_in_one_sentence(shelf):
    names, log = choose(shelf)
    assert names == TINY
    assert (
        f"the job runs with model {TINY['model']}, text encoder {TINY['text_encoder']} and VAE {TINY['vae']}"
    ) in log.splitlines()


@pytest.mark.parametrize("parts", [("vae",), ("text_encoder",), ("vae", "text_encoder"), ("clip_vision",)])
def test_partners_of_the_release_do_not_join_the_bundled_model(shelf, parts):
    shelf.put_release(*parts)
    names, _ = choose(shelf)
    assert {part: names[part] for part in TINY} == TINY


def test_the_release_s_model_joins_the_release_s_partners(shelf):
    shelf.put_release(*RELEASE)
    names, log = choose(shelf)
    assert names == RELEASE
    assert log == (
        f"the job runs with model {RELEASE['model']}, text encoder {RELEASE['text_encoder']}, "
        f"VAE {RELEASE['vae']} and CLIP vision {RELEASE['clip_vision']}\n"
        f"model: {RELEASE['model']} was chosen of {RELEASE['model']}, {TINY['model']}; name one to be sure"
    )


@pytest.mark.parametrize("missing", ["text_encoder", "vae"])
def test_a_model_without_a_partner_is_passed_over_and_said(shelf, missing):
    shelf.put_release(*(part for part in WHOLE if part != missing))
    names, log = choose(shelf)
    assert names == TINY
    [line] = [line for line in log.splitlines() if "passed over" in line]
    assert RELEASE["model"] in line and TINY[missing] in line and f"install {RELEASE[missing]}" in line


@pytest.mark.parametrize(
    ("installed_parts", "field", "told"),
    [
        (("text_encoder", "vae"), "model", "no file in models/diffusion_models is a Wan2.1 image-to-video"),
        (("model", "vae"), "text_encoder", "no file in models/text_encoders is a umT5 text encoder"),
        (("model", "text_encoder"), "vae", "no file in models/vae is the Wan2.1 VAE"),
    ],
)
def test_what_is_missing_is_said(bare, installed_parts, field, told):
    bare.put_release(*installed_parts)
    [(path, message)] = refused(bare).items()
    assert path == field and told in message and f"install {RELEASE[field]}" in message


def test_partners_of_another_size_are_said_with_their_sizes(bare):
    """A foreign umT5 alone, and a small VAE alone."""
    bare.put_release("model")
    bare.put_file("text_encoder", "t5-small.safetensors", umt5(128))
    bare.put_file("vae", "small.safetensors", vae(16))
    told = refused(bare)
    assert told.keys() == {"text_encoder", "vae"}
    assert (
        "needs a text encoder of width 4096, and models/text_encoders has t5-small.safetensors (width 128)"
        in told["text_encoder"]
        and f"install {RELEASE['text_encoder']}" in told["text_encoder"]
    )
    assert "models/vae has small.safetensors (16 channels at its first level)" in told["vae"]


def test_a_small_model_of_the_user_s_has_the_partners_beside_it(shelf):
    own = {"model": "my-i2v.safetensors", "text_encoder": "my-t5.safetensors", "vae": "my-vae.safetensors"}
    for part, made in (("model", dit(**TOY)), ("text_encoder", umt5(128)), ("vae", vae(8))):
        shelf.put_file(part, own[part], made)
    assert choose(shelf)[0] == own
    assert choose(shelf, model=TINY["model"])[0] == TINY


def test_the_pruned_vae_comes_after_the_release_s(shelf):
    shelf.put_release("model", "text_encoder")
    shelf.put_file("vae", "lightvaew2_1.safetensors", vae(24))
    assert choose(shelf)[0]["vae"] == "lightvaew2_1.safetensors"
    shelf.put_file("vae", "my_wan_vae.safetensors", vae(96))
    assert choose(shelf)[0]["vae"] == "my_wan_vae.safetensors"


# --- which model comes first -------------------------------------------------------------------------------


def test_whole_models_come_before_experts(shelf):
    shelf.put_release("text_encoder", "vae")
    for name in ("aa_high_noise.safetensors", RELEASE["model"]):
        shelf.put_file("model", name, dit(**EXPERT))
    names, log = choose(shelf)
    assert names == TINY  # a whole model too
    assert f"aa_high_noise.safetensors, {RELEASE['model']} would be taken only if named" in log
    shelf.put_file("model", "zz_i2v.safetensors", dit())
    names, log = choose(shelf)
    assert names == WHOLE | {"model": "zz_i2v.safetensors"} and "expert" not in log


def test_experts_alone_are_taken_and_said(bare):
    bare.put_release("text_encoder", "vae")
    for name in ("wan2.2_i2v_high_noise_14B.safetensors", "wan2.2_i2v_low_noise_14B.safetensors"):
        bare.put_file("model", name, dit(**EXPERT))
    names, log = choose(bare)
    assert names["model"] == "wan2.2_i2v_low_noise_14B.safetensors"
    assert "was taken though it has no image branch, as one expert of Wan2.2" in log
    named = "wan2.2_i2v_high_noise_14B.safetensors"
    names, log = choose(bare, model=named)
    assert names["model"] == named and f"{named} was taken though" in log


def test_a_first_last_frame_model_is_for_an_end_image(shelf):
    shelf.put_release(*WHOLE)
    shelf.put_file("model", "aa_flf2v.safetensors", dit(**FLF2V))
    shelf.put_file("model", "bb_flf2v_extra.safetensors", dit(**FLF2V))
    assert choose(shelf)[0]["model"] == RELEASE["model"]
    assert choose(shelf, end_image=True)[0]["model"] == "aa_flf2v.safetensors"


def test_one_for_other_images_comes_before_the_bundled_one_and_experts(shelf):
    shelf.put_release("text_encoder", "vae")
    shelf.put_file("model", "aa_expert.safetensors", dit(**EXPERT))
    assert choose(shelf)[0]["model"] == "wan21-tiny-i2v.safetensors"
    shelf.put_file("model", "flf2v.safetensors", dit(**FLF2V))
    assert choose(shelf)[0]["model"] == "flf2v.safetensors"


@pytest.mark.parametrize(
    ("others", "large", "chosen"),
    [
        (["wan2.1_i2v_720p_14B_bf16.safetensors"], False, RELEASE["model"]),
        (["wan2.1_i2v_720p_14B_bf16.safetensors"], True, "wan2.1_i2v_720p_14B_bf16.safetensors"),
        (
            ["Wan2_1-I2V-14B-720P_fp8.safetensors", "aa.safetensors"],
            True,
            "Wan2_1-I2V-14B-720P_fp8.safetensors",
        ),
        (["Wan21_I2V_480p_lightx2v_4step.safetensors"], True, RELEASE["model"]),
        (["my-720-480-mix.safetensors"], True, "my-720-480-mix.safetensors"),
    ],
)
def test_a_model_named_for_the_size_comes_first_and_one_of_few_steps_last(shelf, others, large, chosen):
    shelf.put_release(*WHOLE)
    for name in others:
        shelf.put_file("model", name, dit())
    names, log = choose(shelf, large=large)
    assert names["model"] == chosen
    assert ("is made for videos of 480p" in log) == (large and chosen == RELEASE["model"])


def test_a_model_of_few_steps_alone_is_taken_and_said(shelf):
    name = "wan2.1_i2v_720p_distill_cfg_step.safetensors"
    shelf.put_release("text_encoder", "vae")
    shelf.put_file("model", name, dit())
    names, log = choose(shelf)
    assert names["model"] == name and "num_inference_steps 4 to 8 and guidance_scale 1" in log
    assert f"by its name {name} is made for videos of 720p" in log
    assert "by its name" not in choose(shelf, model=name)[1]


def test_a_model_with_weights_that_are_not_used_comes_after_plain_ones(shelf):
    shelf.put_release("text_encoder", "vae")
    more = {"condition_embedding_spatial.0.weight": torch.zeros(4, 4)}
    shelf.put_file("model", "aa_dancer.safetensors", dit() | more)
    assert choose(shelf)[0]["model"] == "wan21-tiny-i2v.safetensors"
    assert choose(shelf, model="aa_dancer.safetensors")[0]["model"] == "aa_dancer.safetensors"
    shelf.put_file("model", "zz_i2v.safetensors", dit())
    assert choose(shelf)[0]["model"] == "zz_i2v.safetensors"


# --- files that would not load -----------------------------------------------------------------------------


def scaled(state_dict, mark=None, metadata_mark=False):
    """Matrices of the blocks in fp8 with a scale each."""
    out = dict(state_dict)
    for key in [k for k, v in state_dict.items() if k.startswith("blocks.") and v.ndim == 2]:
        out[key] = state_dict[key].to(torch.float8_e4m3fn)
        out[key.replace(".weight", ".weight_scale")] = torch.empty((), device="meta")
    return out


def quanto(state_dict):
    return {key.replace("ffn.0.weight", "ffn.0.weight._data"): value for key, value in state_dict.items()}


def marked(state_dict, layer, config):
    """A state dict with the mark of one quantised layer, and its bytes."""
    data = json.dumps(config).encode()
    key = f"{layer}.comfy_quant"
    return state_dict | {key: torch.empty(len(data), dtype=torch.uint8, device="meta")}, {key: data}


def cut(path):
    os.truncate(path, path.stat().st_size - 1000)


def zeros(path):
    path.write_bytes(bytes(10_000))


REFUSED_MODELS = {
    "packed by quanto": (lambda: quanto(dit()), None, "quanto"),
    "loose scales": (lambda: scaled(dit()), None, "nothing says in which format"),
    "without the last layer": (lambda: dit() | {"head.head.weight": torch.empty(64, 8)}, None, "head.head"),
    "without a block's bias": (lambda: _without(dit(), "blocks.1.ffn.2.bias"), None, "1 missing"),
    "cut short": (dit, cut, "truncated"),
    "zeros only": (dit, zeros, "unfinished download"),
    "an LFS pointer": (
        dit,
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\nsize 5\n"),
        "Git LFS pointer",
    ),
    "a web page": (dit, lambda path: path.write_text("<!doctype html>"), "a web page"),
    "a damaged header": (
        dit,
        lambda path: path.write_bytes(b"\x20" + bytes(7) + b'{"a": nothing' * 9),
        "JSON",
    ),
}
FOREIGN_MODELS = {
    "text to video": lambda: dit(**T2V),
    "Wan2.2 5B": lambda: dit(in_dim=48, out_dim=48),
    "Fun-Control": lambda: dit(in_dim=48),
    "VACE": lambda: dit() | {"vace_patch_embedding.weight": torch.empty(1, device="meta")},
    "Animate": lambda: dit() | {"face_adapter.fuser_blocks.0.k_norm.weight": torch.empty(1, device="meta")},
    "a VAE": vae,
    "a text encoder": umt5,
}


def _without(state_dict, *keys):
    return {key: value for key, value in state_dict.items() if key not in keys}


@pytest.mark.parametrize("name", ["aa.safetensors", RELEASE["model"]])
@pytest.mark.parametrize("what", REFUSED_MODELS)
def test_a_model_that_would_not_load_is_left_aside_and_said(shelf, what, name):
    made, spoil, told = REFUSED_MODELS[what]
    path = shelf.put_file("model", name, made())
    if spoil:
        spoil(path)
    shelf.put_release("text_encoder", "vae")
    shelf.put_file("model", "zz.safetensors", dit())
    names, log = choose(shelf)
    assert names == WHOLE | {"model": "zz.safetensors"}
    [line] = [line for line in log.splitlines() if "would not load" in line]
    assert name in line and told in line
    assert told in refused(shelf, model=name)["model"]


@pytest.mark.parametrize("what", FOREIGN_MODELS)
def test_a_model_of_another_family_is_not_chosen(shelf, what):
    shelf.put_file("model", "aa.safetensors", FOREIGN_MODELS[what]())
    names, log = choose(shelf)
    assert names == TINY and "aa.safetensors" not in log
    assert "is not a Wan2.1 image-to-video model: it is" in refused(shelf, model="aa.safetensors")["model"]


REFUSED_PARTNERS = {
    "encoder packed by quanto": ("text_encoder", lambda: quanto(umt5()) | {"x._data": torch.empty(1)}, None),
    "encoder without a tokenizer": ("text_encoder", lambda: umt5(tokenizer=False), None),
    "plain T5": ("text_encoder", lambda: _plain_t5(umt5()), None),
    "encoder with loose scales": (
        "text_encoder",
        lambda: umt5() | {"encoder.block.0.layer.0.SelfAttention.q.weight_scale": torch.empty(1)},
        None,
    ),
    "encoder cut short": ("text_encoder", umt5, cut),
    "one shard of an encoder": (
        "text_encoder",
        lambda: _without(umt5(), "encoder.final_layer_norm.weight"),
        None,
    ),
    "VAE cut short": ("vae", vae, cut),
    "VAE without a layer": ("vae", lambda: _without(vae(), "decoder.head.2.bias"), None),
    "VAE without its head": ("vae", lambda: _without(vae(), "decoder.head.0.gamma"), None),
    "VAE of zeros": ("vae", vae, zeros),
    "a DiT for a VAE": ("vae", dit, None),
}


def _plain_t5(state_dict):
    return {
        key: value
        for key, value in state_dict.items()
        if "relative_attention_bias" not in key or key.startswith("encoder.block.0.")
    }


@pytest.mark.parametrize("what", REFUSED_PARTNERS)
def test_a_partner_that_would_not_load_is_not_chosen(shelf, what):
    part, made, spoil = REFUSED_PARTNERS[what]
    shelf.put_release(*WHOLE)
    path = shelf.put_file(part, RELEASE[part], made())
    if spoil:
        spoil(path)
    good = {"text_encoder": umt5, "vae": vae}[part]
    shelf.put_file(part, "zz.safetensors", good())
    assert choose(shelf)[0] == WHOLE | {part: "zz.safetensors"}
    assert part in refused(shelf, **{part: RELEASE[part]})


NVFP4_SCALES = {"weight_scale": (512, 256 // 16), "weight_scale_2": ()}


def test_quantised_layouts_that_load_are_chosen(shelf):
    """Scaled fp8 in the old and the new marks, and four bits, two to a byte."""
    shelf.put_release("text_encoder", "vae")
    fp8 = scaled(dit())
    layers = [key.removesuffix(".weight_scale") for key in fp8 if key.endswith(".weight_scale")]
    old = {key.replace(".weight_scale", ".scale_weight"): value for key, value in fp8.items()}
    old |= {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn, device="meta")}
    marks = {"layers": {layer: {"format": "float8_e4m3fn"} for layer in layers}}
    half = torch.empty(512, 128, dtype=torch.uint8, device="meta")
    scales = {f"blocks.0.ffn.0.{key}": torch.empty(size, device="meta") for key, size in NVFP4_SCALES.items()}
    four_bits, numbers = marked(
        dit() | scales | {"blocks.0.ffn.0.weight": half}, "blocks.0.ffn.0", {"format": "nvfp4"}
    )
    files = {
        "old.safetensors": (old, {}),
        "new.safetensors": (fp8, {"metadata": {"_quantization_metadata": json.dumps(marks)}}),
        "nvfp4.safetensors": (four_bits, {"numbers": numbers}),
    }
    for name, (state_dict, options) in files.items():
        path = shelf.put_file("model", name, state_dict, **options)
        assert choose(shelf)[0] == WHOLE | {"model": name}
        assert (choose(shelf, formats=["float8_e4m3fn"])[0] == TINY) == (name == "nvfp4.safetensors")
        path.unlink()


def test_gguf_heads_are_looked_at(shelf):
    pytest.importorskip("gguf")
    shelf.put_release("text_encoder", "vae")
    path = shelf.own / "diffusion_models" / "wan2.1-i2v-14b-Q8_0.GGUF"
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(path), "wan")
    for key, value in dit().items():
        if value.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{key}", list(value.shape))
        shape = value.shape if value.ndim <= 4 else (value.numel(),)
        writer.add_tensor(key, np.zeros(shape, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert choose(shelf)[0] == WHOLE | {"model": path.name}
    path.write_bytes(path.read_bytes()[:-5000])
    names, log = choose(shelf)
    assert names == TINY and f"would not load: {path.name} (truncated or damaged: " in log


def test_a_text_encoder_in_gguf_is_looked_at(tmp_path):
    state_dict = load_file(installed.BUNDLED / "text_encoders" / TINY["text_encoder"])
    path = tmp_path / "umt5.GGUF"
    write_umt5(state_dict, path)
    expected = read_traits("text_encoder", installed.BUNDLED / "text_encoders" / TINY["text_encoder"], None)
    assert read_traits("text_encoder", path, None) == expected and not expected.refusal
    write_umt5(state_dict, path, vocabulary=False)
    assert "holds no tokenizer" in read_traits("text_encoder", path, None).refusal
    write_umt5(state_dict, path, scores=False)
    assert "the tokenizer in its metadata is damaged" in read_traits("text_encoder", path, None).refusal


# --- files that the client names ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "field", "told"),
    [
        (
            {"model": TINY["model"], "vae": RELEASE["vae"]},
            "vae",
            f"needs a small VAE of its own, and {RELEASE['vae']} has 96 channels",
        ),
        (
            {"model": RELEASE["model"], "vae": TINY["vae"]},
            "vae",
            f"of 96 channels at its first level, and {TINY['vae']} has 16 channels",
        ),
        (
            {"model": TINY["model"], "text_encoder": RELEASE["text_encoder"]},
            "text_encoder",
            f"a text encoder of width 128, and {RELEASE['text_encoder']} has width 4096",
        ),
        (
            {"model": RELEASE["model"], "clip_vision": "vit_l.safetensors"},
            "clip_vision",
            "a CLIP vision of width 1280",
        ),
    ],
)
def test_two_named_files_that_do_not_belong_together(shelf, named, field, told):
    shelf.put_release(*RELEASE)
    shelf.put_file("clip_vision", "vit_l.safetensors", clip_vision(1024, layers=32))
    [(path, message)] = refused(shelf, **named).items()
    assert path == field and told in message and named["model"] in message
    assert "name files that belong together, or leave one out" in message


def test_partners_without_a_model_that_takes_both(shelf):
    shelf.put_release(*WHOLE)
    told = refused(shelf, text_encoder=TINY["text_encoder"], vae=RELEASE["vae"])
    assert told.keys() == {"text_encoder", "vae"}
    assert RELEASE["model"] in told["text_encoder"] and TINY["model"] in told["vae"]


@pytest.mark.parametrize("part", WHOLE)
def test_the_rest_is_chosen_to_go_with_what_is_named(shelf, part):
    shelf.put_release(*WHOLE)
    assert choose(shelf, **{part: TINY[part]})[0] == TINY
    assert choose(shelf, **{part: RELEASE[part]})[0] == WHOLE


def test_a_named_pickle_of_the_image_encoder_is_honoured(shelf):
    shelf.put_release(*WHOLE)
    path = shelf.put_file("clip_vision", "vit-h.pth", {})
    assert "clip_vision" not in choose(shelf)[0]
    assert choose(shelf, clip_vision=path.name)[0] == WHOLE | {"clip_vision": path.name}


# --- CLIP vision -------------------------------------------------------------------------------------------


def test_the_image_encoder_is_told_by_its_width(shelf):
    shelf.put_release(*WHOLE)
    shelf.put_file("clip_vision", "clip_vision_h_of_another.safetensors", clip_vision(1024, layers=24))
    shelf.put_file("clip_vision", "sigclip_vision_h.safetensors", _without(clip_vision(1152, 27), CLASS))
    names, log = choose(shelf)
    assert "clip_vision" not in names and "no ViT-H file is installed" in log
    shelf.put_file("clip_vision", "some_encoder.safetensors", clip_vision())
    assert choose(shelf)[0]["clip_vision"] == "some_encoder.safetensors"
    shelf.put_file("clip_vision", "zz-ViT-H-14.safetensors", clip_vision())
    assert choose(shelf)[0]["clip_vision"] == "zz-ViT-H-14.safetensors"


CLASS = "vision_model.embeddings.class_embedding"


def test_a_model_without_an_image_branch_gets_no_image_encoder(bare):
    bare.put_release("text_encoder", "vae", "clip_vision")
    bare.put_file("model", "low_noise.safetensors", dit(**EXPERT))
    names, log = choose(bare)
    assert "clip_vision" not in names and "ViT-H" not in log
    names, log = choose(bare, clip_vision=RELEASE["clip_vision"])
    assert names["clip_vision"] == RELEASE["clip_vision"] and "does not read it" in log


# --- what is remembered ------------------------------------------------------------------------------------


def test_a_file_is_read_once_and_again_when_it_changes(shelf, monkeypatch):
    read = []
    monkeypatch.setattr(
        installed,
        "read_traits",
        lambda part, path, _: read.append(path.name) or read_traits(part, path, None),
    )
    shelf.put_release(*WHOLE)
    for i in range(5):
        shelf.put_file("model", f"m{i}.safetensors", dit())
    files = Installed(shelf)
    files.look()
    assert len(read) == len(set(read)) == len(WHOLE) + len(TINY) + 5
    read.clear()
    for _ in range(3):
        files.choose(NONE, RELEASE, False)
    assert read == []
    shelf.put_file("model", "m1.safetensors", dit(**T2V))
    assert files.choose(NONE, RELEASE, False)[0]["model"] == RELEASE["model"]
    assert read == ["m1.safetensors"]


def test_a_file_is_read_by_one_thread_however_many_ask(shelf, monkeypatch):
    """Each of N requests had read a slow file anew."""
    read, gate = [], threading.Event()

    def slow(part, path, formats):
        if path.name == "slow.safetensors":
            read.append(threading.get_ident())
            gate.wait(20)
        return read_traits(part, path, formats)

    monkeypatch.setattr(installed, "read_traits", slow)
    shelf.put_file("model", "slow.safetensors", dit())
    files, asked = Installed(shelf), []
    ask = [threading.Thread(target=lambda: asked.append(files.traits("slow.safetensors"))) for _ in range(8)]
    for thread in ask:
        thread.start()
    assert files.traits(TINY["model"]).text_width == 128  # the others need not wait for it
    gate.set()
    for thread in ask:
        thread.join()
    assert len(read) == 1 and len(asked) == 8 and all(not traits.refusal for traits in asked)


def test_a_disk_that_does_not_answer_stops_no_job(shelf, monkeypatch, caplog):
    gate, answered = threading.Event(), []

    def slow(part, path, _):
        if path.name == "aa.safetensors":
            gate.wait(20)
            answered.append(path)
        return read_traits(part, path, None)

    monkeypatch.setattr(installed, "LOOK_SECONDS", 0.3)
    monkeypatch.setattr(installed, "read_traits", slow)
    shelf.put_file("model", "aa.safetensors", dit(**TOY))
    files = Installed(shelf)
    assert files.choose(NONE, RELEASE, False)[0] == TINY
    assert not answered and "aa.safetensors was not read within 0.3 s" in caplog.text
    monkeypatch.setattr(installed, "LOOK_SECONDS", 20)  # of a second look; this one was waited for once
    assert "not read within" in files.traits("aa.safetensors").refusal
    assert not answered
    monkeypatch.setattr(installed, "read_traits", lambda *_: pytest.fail("read again"))
    gate.set()
    wait_until(lambda: not files.traits("aa.safetensors").refusal)


ATTENTION = "encoder.block.0.layer.0.SelfAttention"
HARMFUL = {
    "a list of 2^62 bytes": (
        "model",
        "x.gguf",
        b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"x", 9, 0, 2**62) + bytes(900),
    ),
    "a block far away": ("model", "x.safetensors", lambda: dit() | {"blocks.999999999.a": meta(1)}),
    "an input of one axis": ("model", "x.safetensors", lambda: dit() | {"patch_embedding.weight": meta(36)}),
    "an input of no axis": ("model", "x.safetensors", lambda: dit() | {"patch_embedding.weight": meta()}),
    "no channels": ("vae", "x.safetensors", lambda: vae() | {"decoder.head.0.gamma": meta(0, 1, 1)}),
    "a channel of no axis": ("vae", "x.safetensors", lambda: vae() | {"decoder.head.0.gamma": meta()}),
    "vast channels": ("vae", "x.safetensors", lambda: vae() | {"decoder.head.0.gamma": meta(2**20, 1, 1)}),
    "an encoder's block": (
        "text_encoder",
        "x.safetensors",
        lambda: umt5() | {"encoder.block.20000.layer.0.layer_norm.weight": meta(1)},
    ),
    "an encoder of no heads": (
        "text_encoder",
        "x.safetensors",
        lambda: (
            umt5() | {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": meta(32, 0)}
        ),
    ),
    "a mark that is no table": (
        "text_encoder",
        "x.safetensors",
        lambda: umt5() | {f"{ATTENTION}.q.comfy_quant": meta(4).to(torch.uint8)},
    ),
}


def meta(*shape):
    return torch.empty(shape, device="meta")


@pytest.mark.parametrize("case", HARMFUL)
def test_a_file_that_means_harm_is_refused_by_name(shelf, case, caplog):
    """One of these in a folder had made every run a 500, or hung it."""
    part, name, made = HARMFUL[case]
    shelf.put_release(*WHOLE)
    if isinstance(made, bytes):
        path = shelf.own / installed.FOLDERS[part] / name
        path.write_bytes(made)
    else:
        path = shelf.put_file(part, name, made())
    began = time.monotonic()
    with caplog.at_level("INFO"):
        assert choose(shelf)[0] == WHOLE
        assert "would not load" in refused(shelf, **{part: name})[part]
    assert time.monotonic() - began < 10
    assert f"{path} would not load" in caplog.text and "Traceback" not in caplog.text


def test_a_set_of_shards_is_looked_at_again_when_it_is_complete(bare):
    bare.put_release("text_encoder", "vae")
    whole = list(dit().items())
    names = [f"wan-0000{i}-of-00002.safetensors" for i in (1, 2)]
    bare.put_file("model", names[0], dict(whole[:20]))
    listing = bare.node_inputs
    first_only = {"model_name": {"type": "COMBO", "options": names[:1]}}  # as our loader lists a set
    bare.node_inputs = lambda kind: first_only if kind == "Wan21ModelLoader" else listing(kind)
    files = Installed(bare)
    with pytest.raises(Problem, match="1 of the 2 shards are missing"):
        files.choose(NONE, RELEASE, False)
    bare.put_file("model", names[1], dict(whole[20:]))
    assert files.choose(NONE, RELEASE, False)[0]["model"] == names[0]


def test_a_tokenizer_beside_the_encoder_is_found_when_it_comes(bare):
    bare.put_release("model", "vae")
    path = bare.put_file("text_encoder", "umt5.safetensors", umt5(tokenizer=False))
    files = Installed(bare)
    with pytest.raises(Problem, match=r"no spiece\.model beside it"):
        files.choose(NONE, RELEASE, False)
    (path.parent / "spiece.model").write_bytes(b"x")
    assert files.choose(NONE, RELEASE, False)[0]["text_encoder"] == path.name


def test_a_file_that_vanishes_or_surprises_stops_no_job(shelf, monkeypatch):
    shelf.put_file("model", "aa.safetensors", {"patch_embedding.weight": torch.empty(()), **T5_LIKE})
    listing = shelf.node_inputs
    gone = {"vae_name": {"type": "COMBO", "options": ["gone.safetensors", TINY["vae"]]}}
    shelf.node_inputs = lambda kind: gone if kind == "Wan21VAELoader" else listing(kind)
    assert choose(shelf)[0] == TINY
    assert "removed" in refused(shelf, vae="gone.safetensors")["vae"]


T5_LIKE = {"head.modulation": torch.empty(1), "blocks.0.ffn.0.weight": torch.empty(1)}


def test_models_are_found_in_checkpoints_too(shelf):
    """Once the loader lists that folder."""
    shelf.put_release("text_encoder", "vae")
    whole = {f"model.diffusion_model.{key}": value for key, value in dit().items()}
    write_sparse(shelf.own / "checkpoints" / "all_in_one.safetensors", whole)
    listing = shelf.node_inputs
    both = {"model_name": {"type": "COMBO", "options": ["all_in_one.safetensors", TINY["model"]]}}
    shelf.node_inputs = lambda kind: both if kind == "Wan21ModelLoader" else listing(kind)
    assert choose(shelf)[0]["model"] == "all_in_one.safetensors"


# --- the verdict is the loaders' ----------------------------------------------------------------------------


@pytest.mark.parametrize("what", [*REFUSED_MODELS, *FOREIGN_MODELS, "good", "good expert"])
def test_models_are_judged_as_by_their_loader(tmp_path, what):
    from wan21.host import load_model

    good = {"good": (dit, None, ""), "good expert": (lambda: dit(**EXPERT), None, "")}
    made, spoil, _ = (REFUSED_MODELS | good).get(what) or (FOREIGN_MODELS[what], None, "")
    path = write_sparse(tmp_path / "x.safetensors", made())
    if spoil:
        spoil(path)
    refusal = read_traits("model", path, None).refusal
    if what in good or what == "text to video":  # which loads, and is for other jobs
        load_model(path)
        assert bool(refusal) == (what not in good)
    else:
        with pytest.raises(ValueError) as raised:
            load_model(path)
        if what in REFUSED_MODELS:
            assert refusal in str(raised.value)
        assert refusal


# --- through the API ---------------------------------------------------------------------------------------


def test_a_run_tells_its_files_and_a_wrong_one_queues_nothing(shelf, job):
    shelf.put_release("vae")
    with serve(shelf) as api:
        task = api.client.run(job(), wait=False)
        graph = {n["class_type"]: n["inputs"] for n in shelf.graphs[shelf.queue[-1]].values()}
        assert graph["Wan21VAELoader"]["vae_name"] == TINY["vae"]
        assert task["logs"][0]["content"].startswith(f"the job runs with model {TINY['model']}, ")
        shelf.queue.clear()
        with pytest.raises(APIError) as raised:
            api.client.run(job(model=TINY["model"], vae=RELEASE["vae"]), wait=False)
        assert raised.value.status_code == 422 and shelf.queue == []
        [error] = json.loads(raised.value.response_body)["errors"]
        assert error["path"] == "input.vae" and RELEASE["vae"] in error["message"]
