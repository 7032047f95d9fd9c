"""Weights as stored: mapped from the file, in the host's quantised formats, refused where they must be."""

import hashlib
import json
from types import SimpleNamespace

import comfy.model_management
import comfy.quant_ops
import comfy.sd
import pytest
import torch
from comfy_extras.nodes_torch_compile import TorchCompileModel
from helpers import relative
from helpers_nodes import host_euler
from safetensors.torch import load_file, save_file
from wan21 import host
from wan21.host import load, operations, patches, quantised
from wan21.wan import linear_cpu
from wan21.wan.device import multiplies_in_int8

METADATA = {"config": '{"transformer": {"text_dim": 128}}'}
# By how much a run may differ from one with the unpacked weights. The int8 formats round their input too.
LIMITS = dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "nvfp4", "mxfp8"), 1e-5)
LIMITS |= {"int8_tensorwise": 0.03, "convrot_w4a4": 0.5}


@pytest.fixture
def job(prompts):
    return (*prompts, {"samples": torch.zeros(1, 16, 2, 4, 4)})


def save(state, path):
    save_file(state, path, metadata=METADATA)
    return path


def store_in(state, dtype):
    """The weights with the matrices in `dtype` and all others in float32."""
    return {k: v.to(dtype) if v.ndim == 2 else v for k, v in state.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_default_keeps_each_weight_as_stored(files, job, sample, tmp_path, dtype):
    state = store_in(load_file(files["t2v"]), dtype)
    model = host.load_model(save(state, tmp_path / "stored.safetensors"))
    held = model.model.diffusion_model.state_dict()
    assert {k: v.dtype for k, v in held.items()} == {k: v.dtype for k, v in state.items()}
    assert model.model.get_dtype_inference() == torch.float32
    exact = host.load_model(save({k: v.float() for k, v in state.items()}, tmp_path / "exact.safetensors"))
    ours, expected = (sample(m, *job, steps=1)[0]["samples"] for m in (model, exact))
    assert relative(ours, expected) < 1e-6


@pytest.mark.parametrize(
    "stored, asked, flag, computed",
    [
        (torch.bfloat16, "default", {}, torch.bfloat16),
        (torch.bfloat16, "fp8_e4m3fn", {}, torch.bfloat16),
        (torch.bfloat16, "fp16", {}, torch.float16),
        (torch.bfloat16, "default", {"has_bf16": False}, torch.float16),
        (torch.bfloat16, "default", {"PRIORITIZE_FP16": True}, torch.float16),
        (torch.bfloat16, "default", {"fp16_unet": True}, torch.float16),
        (torch.bfloat16, "default", {"fp32_unet": True}, torch.float32),
        (torch.float16, "default", {}, torch.float16),
        (torch.float32, "default", {}, torch.float16),
        (torch.float8_e4m3fn, "default", {}, torch.float16),
    ],
)
def test_a_file_in_bf16_is_computed_in_bf16(files, tmp_path, monkeypatch, stored, asked, flag, computed):
    """Where the device does, and no flag asks for another dtype. Else it is the host's choice."""
    management = comfy.model_management
    has_bf16 = flag.get("has_bf16", True)
    monkeypatch.setattr(management, "should_use_fp16", lambda *args, **kwargs: True)
    monkeypatch.setattr(management, "should_use_bf16", lambda *args, **kwargs: has_bf16)
    for name, value in flag.items():
        if name != "has_bf16":
            monkeypatch.setattr(management.args if name.endswith("_unet") else management, name, value)
    path = save(store_in(load_file(files["t2v"]), stored), tmp_path / "stored.safetensors")
    model = host.load_model(path, asked)
    weight = model.model.diffusion_model.blocks[0].ffn[0].weight
    if asked == "default" and stored.itemsize == 2:
        assert weight.dtype == stored
    assert model.model.get_dtype_inference() == computed


@pytest.mark.skipif(
    comfy.model_management.get_torch_device().type != "cpu", reason="it is about the CPU, and there is a GPU"
)
def test_a_cpu_computes_in_bf16_where_it_can_and_is_asked(files, job, sample, tmp_path, monkeypatch):
    weights = load_file(files["t2v"])
    for stored, asked, flag, has_it, computed in [
        (torch.float32, "bf16", False, True, torch.bfloat16),
        (torch.float16, "bf16", False, True, torch.bfloat16),
        (torch.bfloat16, "default", True, True, torch.bfloat16),
        (torch.float16, "default", True, True, torch.bfloat16),
        (torch.float8_e4m3fn, "default", True, True, torch.bfloat16),
        (torch.bfloat16, "default", False, True, torch.float32),  # nobody asked: as the host does
        (torch.bfloat16, "fp32", True, True, torch.float32),
        (torch.float32, "fp16", False, True, torch.float32),
        (torch.float32, "bf16", False, False, torch.float32),
        (torch.bfloat16, "default", True, False, torch.float32),
    ]:
        monkeypatch.setattr(load, "multiplies_in_bf16", lambda device, has_it=has_it: has_it)
        monkeypatch.setattr(load.args, "bf16_unet", flag)
        state, case = store_in(weights, stored), f"{stored}, asked for {asked}"
        model = host.load_model(save(state, tmp_path / "stored.safetensors"), asked)
        assert model.model.get_dtype_inference() == computed, case
        assert host.notes_on_file(model) == ([load.IN_BF16] if computed == torch.bfloat16 else []), case
        wide = save({k: v.float() for k, v in state.items()}, tmp_path / "wide.safetensors")
        exact = sample(host.load_model(wide, "fp32"), *job, steps=2)[0]["samples"]
        error = relative(sample(model, *job, steps=2)[0]["samples"], exact)
        assert 1e-4 < error < 0.03 if computed == torch.bfloat16 else error < 4e-3, case


def test_what_the_device_cannot_hold_is_converted(files, job, sample, tmp_path, monkeypatch):
    """A Mac has no fp8."""
    state = store_in(load_file(files["t2v"]), torch.float8_e4m3fn)
    monkeypatch.setattr(comfy.model_management, "supports_cast", lambda device, dtype: dtype.itemsize > 1)
    model = host.load_model(save(state, tmp_path / "stored.safetensors"))
    assert {v.dtype for v in model.model.diffusion_model.state_dict().values()} == {torch.float32}
    exact = host.load_model(save({k: v.float() for k, v in state.items()}, tmp_path / "exact.safetensors"))
    ours, expected = (sample(m, *job, steps=1)[0]["samples"] for m in (model, exact))
    assert relative(ours, expected) < 1e-6


def test_the_file_is_not_written_to_and_may_go(files, job, sample, tmp_path):
    path = save(store_in(load_file(files["t2v"]), torch.bfloat16), tmp_path / "mapped.safetensors")
    digest = hashlib.sha256(path.read_bytes()).digest()
    name = "diffusion_model.blocks.0.ffn.0"
    lora = {
        f"{name}.lora_A.weight": torch.ones(4, 256) / 16,
        f"{name}.lora_B.weight": torch.ones(512, 4) / 16,
    }
    save_file(lora, tmp_path / "lora.safetensors")
    model = host.load_model(path)
    patched = host.add_lora(model, host.read_lora(tmp_path / "lora.safetensors", model), 1.0)
    changed = sample(patched, *job, steps=1)[0]["samples"]
    plain = sample(model, *job, steps=1)[0]["samples"]
    assert relative(changed, plain) > 1e-3
    if not model.is_dynamic():  # which maps files read-only
        with torch.no_grad():
            model.model.diffusion_model.blocks[1].ffn[0].weight.mul_(2)
    assert hashlib.sha256(path.read_bytes()).digest() == digest
    twice = sample(model, *job, steps=1)[0]["samples"]
    path.unlink()
    path.write_bytes(b"another file")
    assert torch.equal(sample(model, *job, steps=1)[0]["samples"], twice)


def test_without_mapping_weights_are_copied(files, monkeypatch):
    monkeypatch.setattr("comfy.utils.DISABLE_MMAP", True)
    state = {"a": torch.zeros(3)}
    layer = torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.empty(3, device="meta"))})
    load.convert(layer, kept := dict(state), load.is_mapped(torch.device("cpu")))
    assert kept["a"].data_ptr() != state["a"].data_ptr()
    monkeypatch.setattr("comfy.utils.DISABLE_MMAP", False)
    load.convert(layer, kept := dict(state), load.is_mapped(torch.device("cpu")))
    assert kept["a"].data_ptr() == state["a"].data_ptr()


def quantise(state, name, chosen=lambda key: key.startswith("blocks.")):
    """(state dict in a format of the host, its weights unpacked); of the blocks, or the matrices chosen."""
    stored, unpacked = dict(state), dict(state)
    layout = comfy.quant_ops.QUANT_ALGOS[name]["comfy_tensor_layout"]
    mark = torch.tensor(list(json.dumps({"format": name}).encode()), dtype=torch.uint8)
    for key, weight in state.items():
        if chosen(key) and weight.ndim == 2:
            more = {"scale": "recalculate"} if name != "mxfp8" else {}
            packed = comfy.quant_ops.QuantizedTensor.from_float(weight, layout, **more)
            stored |= packed.state_dict(key) | {key.removesuffix("weight") + "comfy_quant": mark.clone()}
            unpacked[key] = packed.dequantize()
    return stored, unpacked


@pytest.mark.parametrize("name", sorted(comfy.quant_ops.QUANT_ALGOS))
def test_the_hosts_quantised_formats(files, models, job, sample, tmp_path, name):
    stored, unpacked = quantise(load_file(files["t2v"]), name)
    model = host.load_model(save(stored, tmp_path / "stored.safetensors"))
    weight = model.model.diffusion_model.blocks[1].ffn[0].weight
    assert weight._qdata.dtype == comfy.quant_ops.QUANT_ALGOS[name]["storage_t"]
    exact = host.load_model(save(unpacked, tmp_path / "unpacked.safetensors"))
    ours, expected = (sample(m, *job, steps=1)[0]["samples"] for m in (model, exact))
    assert relative(expected, sample(models["t2v"], *job, steps=1)[0]["samples"]) > 1e-4
    assert relative(ours, expected) < LIMITS[name]


@pytest.mark.parametrize("name", sorted(comfy.quant_ops.QUANT_ALGOS))
def test_layers_that_read_float32_do_not_round_it(files, tmp_path, monkeypatch, name):
    """As on a GPU that multiplies in the format: Comfy-Org's fp8_scaled files hold these layers too."""
    for kind in ("fp8", "nvfp4", "mxfp8"):
        monkeypatch.setattr(comfy.model_management, f"supports_{kind}_compute", lambda device=None: True)
    for kind in ("fp16", "bf16"):
        monkeypatch.setattr(comfy.model_management, f"should_use_{kind}", lambda *args, **kwargs: True)
    layers = ("time_embedding.0", "time_embedding.2", "time_projection.1", "head.head")
    stored, unpacked = quantise(load_file(files["t2v"]), name, lambda key: key.startswith(layers))
    model = host.load_model(save(stored, tmp_path / "stored.safetensors")).model.diffusion_model
    assert model.blocks[0].ffn[0].weight.dtype == torch.float16
    for layer in layers:
        weight, bias = unpacked[f"{layer}.weight"], stored[f"{layer}.bias"].half().float()
        x = torch.randn(1, weight.shape[1])
        expected = torch.nn.functional.linear(x, weight.float(), bias)
        assert relative(model.get_submodule(layer)(x), expected) < 1e-4
    mark = bytes(model.state_dict()["head.head.comfy_quant"].tolist())
    assert json.loads(mark)["format"] == name and b"full_precision" not in mark  # as it was in the file


@pytest.mark.parametrize("name", sorted(comfy.quant_ops.QUANT_ALGOS))
def test_a_lora_is_not_rounded_to_quantised_weights(files, job, sample, tmp_path, name):
    """It is added to a weight when that is unpacked; merged and quantised again, a small one would vanish."""
    stored, unpacked = quantise(load_file(files["t2v"]), name)
    layers = [key for key in stored if key.endswith("comfy_quant")]
    lora, changed = {}, dict(unpacked)
    for key in (f"{layer.removesuffix('comfy_quant')}weight" for layer in layers):
        down, up = torch.randn(4, unpacked[key].shape[1]) / 100, torch.randn(unpacked[key].shape[0], 4) / 100
        lora |= {
            f"diffusion_model.{key.removesuffix('weight')}lora_{k}.weight": v
            for k, v in zip("AB", (down, up))
        }
        changed[key] = unpacked[key].float() + 0.5 * up @ down
    save_file(lora, tmp_path / "lora.safetensors")
    model = host.load_model(save(stored, tmp_path / "stored.safetensors"))
    matched = host.read_lora(tmp_path / "lora.safetensors", model)
    assert len(matched.patches) == len(layers)
    patched = host.add_lora(model, matched, 0.5)
    exact, plain = (
        host.load_model(save(state, tmp_path / f"{len(state)}{i}.safetensors"))
        for i, state in enumerate((changed, unpacked))
    )
    ours, expected, without = (sample(m, *job, steps=1)[0]["samples"] for m in (patched, exact, plain))
    assert relative(expected, without) > 1e-4
    assert relative(ours, expected) < LIMITS[name]
    assert (
        model.model.diffusion_model.blocks[1].ffn[0].weight._qdata.dtype
        == (comfy.quant_ops.QUANT_ALGOS[name]["storage_t"])
    )


def test_a_format_that_the_host_lacks_is_named(files, tmp_path):
    stored, _ = quantise(load_file(files["t2v"]), "int8_tensorwise")
    for key in stored:
        if key.endswith("comfy_quant"):
            stored[key] = torch.tensor(list(b'{"format": "int3"}'), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"stored as int3, and this ComfyUI reads .*int8_tensorwise.*Update"):
        host.load_model(save(stored, tmp_path / "later.safetensors"))


def test_what_is_unpacked_at_each_use_is_said(files, tmp_path, caplog):
    stored, _ = quantise(load_file(files["t2v"]), "nvfp4")
    with caplog.at_level("INFO"):
        host.load_model(save(stored, tmp_path / "nvfp4.safetensors"))
    assert "cannot multiply in nvfp4: weights are unpacked at each use" in caplog.text


@pytest.fixture
def capability(monkeypatch):
    """Sets the compute capability of a GPU that is not there."""

    def fake(major, minor):
        monkeypatch.setattr(comfy.model_management, "is_nvidia", lambda: True)
        monkeypatch.setattr(comfy.model_management, "get_torch_device_name", lambda device: "an NVIDIA GPU")
        properties = SimpleNamespace(major=major, minor=minor)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))

    return fake


def test_fp8_multiplication_by_capability(capability):
    gpu = torch.device("cuda", 0)
    for major, minor in ((7, 5), (8, 0), (8, 6)):
        capability(major, minor)
        with pytest.raises(ValueError, match=r"an NVIDIA GPU cannot multiply in fp8 .*8\.9"):
            operations.fp8_operations(gpu)
    for major, minor in ((8, 9), (9, 0), (12, 0)):
        capability(major, minor)
        assert operations.fp8_operations(gpu) is comfy.ops.fp8_ops


@pytest.mark.parametrize(
    "dtype, backend, numbers, refused",
    [
        ("fp8_e4m3fn", "inductor", (8, 6), True),
        ("fp8_e4m3fn", "inductor", (8, 9), False),
        ("fp8_e4m3fn", "cudagraphs", (8, 6), False),
        ("fp8_e5m2", "inductor", (8, 6), False),
        ("default", "inductor", (8, 6), False),
    ],
)
def test_fp8_under_compile_by_capability(files, job, sample, capability, dtype, backend, numbers, refused):
    model = TorchCompileModel.execute(host.load_model(files["t2v"], dtype), backend).result[0]
    model.load_device = torch.device("cuda", 0)
    capability(*numbers)
    if not refused:
        return patches.refuse_compiled_fp8(model)
    with pytest.raises(ValueError, match=r"capability 8\.6 .*Remove TorchCompileModel, or set weight_dtype"):
        patches.refuse_compiled_fp8(model)


@pytest.mark.skipif(
    comfy.model_management.get_torch_device().type != "cpu", reason="it is about the CPU, and there is a GPU"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_products_on_the_cpu_are_ours(files, job, sample, monkeypatch, tmp_path, dtype):
    path = save(store_in(load_file(files["t2v"]), dtype), tmp_path / "stored.safetensors")
    model = host.load_model(path)
    plain = sample(model, *job)[0]["samples"]
    real, taken = operations.linear, []

    def counted(x, weight, bias):
        taken.append(weight.dtype)
        return real(x, weight, bias)

    monkeypatch.setattr(linear_cpu, "MIN_PRODUCTS", 0)
    monkeypatch.setattr(operations, "linear", counted)
    assert relative(sample(model, *job)[0]["samples"], plain) < 1e-5
    assert len(taken) > 10 and set(taken) == {torch.float32}


# --- a device without products of int8 -----------------------------------------------------------------


@pytest.fixture
def without_int8(monkeypatch):
    """As on Apple's GPUs: the operation is there and fails."""

    def missing(*_):
        raise NotImplementedError("The operator 'aten::_int_mm' is not currently implemented for this device")

    multiplies_in_int8.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", missing)
    yield
    multiplies_in_int8.cache_clear()


@pytest.mark.parametrize("way", ["file", "weight_dtype"])
def test_int8_is_unpacked_where_it_cannot_be_multiplied(
    files, job, sample, tmp_path, monkeypatch, without_int8, way
):
    """The host's own loader fails at its first product. What is unpacked rounds no input."""
    state, told = load_file(files["t2v"]), []
    monkeypatch.setattr(quantised, "tell", told.append)
    if way == "file":
        stored, unpacked = quantise(state, "int8_tensorwise")
        path = save(stored, tmp_path / "stored.safetensors")
        with pytest.raises(NotImplementedError, match="_int_mm"):
            host_euler(comfy.sd.load_diffusion_model(str(path)), *job, [1.0, 0.0], 1.0, 0)
        model = host.load_model(path)
    else:
        model = host.load_model(files["t2v"], "int8_convrot")
        layers = model.model.diffusion_model.blocks.named_modules()
        in_int8 = {key: layer.weight for key, layer in layers if getattr(layer, "layout_type", None)}
        unpacked = state | {f"blocks.{key}.weight": weight.dequantize() for key, weight in in_int8.items()}
        assert len(in_int8) == 4
    assert told and told[0].endswith("cannot multiply in int8_tensorwise: weights are unpacked at each use")
    exact = host.load_model(save(unpacked, tmp_path / "unpacked.safetensors"))
    ours, expected = (sample(m, *job, steps=1)[0]["samples"] for m in (model, exact))
    assert relative(ours, expected) < 1e-5


def test_an_int8_text_encoder_is_unpacked_too(files, tmp_path, without_int8):
    state = load_file(files["umt5"])
    stored, _ = quantise(state, "int8_tensorwise", lambda key: ".layer." in key and "bias" not in key)
    save_file(stored, tmp_path / "umt5.safetensors")
    clip, plain = (host.load_text_encoder(path) for path in (tmp_path / "umt5.safetensors", files["umt5"]))
    ours, exact = (c.encode_from_tokens(c.tokenize("a cat in the grass")) for c in (clip, plain))
    assert 1e-4 < relative(ours, exact) < 0.05


@pytest.mark.parametrize("name", ["fp8_e4m3fn", "fp8_e5m2", "fp8_e4m3fn_fast", "fp8_e4m3fn_rows"])
def test_fp8_is_refused_by_name_where_there_are_no_such_numbers(files, monkeypatch, name):
    """Of a Mac; the host's loader fails when the weights go to the device."""
    monkeypatch.setattr(comfy.model_management, "supports_cast", lambda device, dtype: dtype.itemsize > 1)
    with pytest.raises(ValueError, match=f"weight_dtype is {name}, and .* has no numbers in fp8.*Set .*int8"):
        host.load_model(files["t2v"], name)
