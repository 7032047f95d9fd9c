"""weight_dtype of 8 bits: a file of 16 or 32 bits made into the host's formats while it is loaded."""

import json
from contextlib import contextmanager
from dataclasses import replace

import comfy.model_management
import comfy.model_patcher
import comfy.quant_ops
import comfy.sd
import pytest
import torch
import torch.nn.functional as F
from comfy_extras.nodes_model_merging import ModelMergeSimple
from helpers import relative
from helpers_nodes import host_euler
from safetensors.torch import load_file, save_file
from test_gguf import pair  # noqa: F401
from test_weights import METADATA, quantise, save, store_in
from wan21 import host
from wan21.host import products
from wan21.host.eight_bits import EIGHT_BITS, FP8_ROWS, INT8, quantised
from wan21.host.lora import _detach, changes_weights_at_use, run_of

LATENT = {"samples": torch.zeros(1, 16, 2, 4, 4)}
FEED_FORWARD = {f"blocks.{block}.ffn.{layer}" for block in (0, 1) for layer in (0, 2)}
STORAGE = {INT8: torch.int8, FP8_ROWS: torch.float8_e4m3fn}


@pytest.fixture(scope="module")
def loaded(files):
    """MODELs by weight_dtype."""
    with torch.inference_mode():
        return {name: host.load_model(files["t2v"], name) for name in EIGHT_BITS}


@pytest.mark.parametrize("name, least, most", [(INT8, 1e-3, 0.03), (FP8_ROWS, 1e-3, 0.05)])
def test_the_feed_forward_is_in_8_bits(loaded, models, prompts, sample, name, least, most):
    layers = loaded[name].model.diffusion_model.named_modules()
    found = {k: x.weight for k, x in layers if isinstance(getattr(x, "weight", None), torch.Tensor)}
    in_8_bits = {k: w for k, w in found.items() if isinstance(w, comfy.quant_ops.QuantizedTensor)}
    assert in_8_bits.keys() == FEED_FORWARD
    assert {w._qdata.dtype for w in in_8_bits.values()} == {STORAGE[name]}
    ours, exact = (sample(m, *prompts, LATENT)[0]["samples"] for m in (loaded[name], models["t2v"]))
    assert least < relative(ours, exact) < most


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_what_is_saved_the_hosts_loader_reads(loaded, prompts, tmp_path, name):
    path = tmp_path / "saved.safetensors"
    comfy.sd.save_checkpoint(str(path), loaded[name], metadata={})
    saved = load_file(path)
    marks = {k: json.loads(v.numpy().tobytes()) for k, v in saved.items() if k.endswith("comfy_quant")}
    assert len(marks) == 4 and {mark["format"] for mark in marks.values()} == {EIGHT_BITS[name]}
    if name == INT8:
        assert all(mark["convrot"] and mark["convrot_groupsize"] == 256 for mark in marks.values())
    prefix = "model.diffusion_model."
    alone = {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}
    save_file(alone, path, metadata=METADATA)
    native, again = comfy.sd.load_diffusion_model(str(path)), host.load_model(path)
    ours, *others = (
        host_euler(m, *prompts, LATENT, [1.0, 0.5, 0.0], 1.0, 0) for m in (loaded[name], native, again)
    )
    assert all(relative(ours, other) < 1e-5 for other in others)


@pytest.mark.parametrize("name", EIGHT_BITS)
@pytest.mark.parametrize(
    "width, group", [(512, 256), (192, 64), (48, 16), (40, None)], ids=["256", "64", "16", "none"]
)
def test_columns_are_rotated_in_groups_that_divide_them(name, width, group):
    torch.manual_seed(0)
    weight = torch.randn(24, width)
    weight[:, 5] *= 30  # one loud column: what rotation is for
    key = "blocks.0.ffn.0"
    found = quantised({f"{key}.weight": weight.bfloat16(), f"{key}.bias": torch.zeros(24)}, name)
    mark = json.loads(found[f"{key}.comfy_quant"].numpy().tobytes())
    assert mark.get("convrot_groupsize") == (group if name == INT8 else None)
    layout = comfy.quant_ops.get_layout_class(
        comfy.quant_ops.QUANT_ALGOS[mark["format"]]["comfy_tensor_layout"]
    )
    rest = {k: v for k, v in mark.items() if k != "format"}
    params = layout.Params(
        scale=found[f"{key}.weight_scale"], orig_dtype=torch.float32, orig_shape=(24, width), **rest
    )
    back = layout.dequantize(found[f"{key}.weight"], params)
    assert relative(back, weight) < (0.03 if group or name == FP8_ROWS else 0.2)


def test_a_file_in_bf16_is_computed_in_bf16(files, tmp_path, monkeypatch):
    """As without 8 bits: the host, told nothing of the file, would take fp16."""
    management = comfy.model_management
    for kind in ("fp16", "bf16"):
        monkeypatch.setattr(management, f"should_use_{kind}", lambda *args, **kwargs: True)
    path = save(store_in(load_file(files["t2v"]), torch.bfloat16), tmp_path / "stored.safetensors")
    for name in EIGHT_BITS:
        assert host.load_model(path, name).model.get_dtype_inference() == torch.bfloat16


@pytest.mark.parametrize("stored", ["float8_e4m3fn", "int8_tensorwise", "plain fp8", "gguf"])
@pytest.mark.parametrize("name", EIGHT_BITS)
def test_what_has_8_bits_is_refused(files, tmp_path, request, name, stored):
    path = tmp_path / "stored.safetensors"
    if stored == "gguf":
        path = request.getfixturevalue("pair")[0]
    elif stored == "plain fp8":
        save(store_in(load_file(files["t2v"]), torch.float8_e4m3fn), path)
    else:
        save(quantise(load_file(files["t2v"]), stored)[0], path)
    with pytest.raises(ValueError, match=rf"weight_dtype is {name}, and .*Set weight_dtype to default"):
        host.load_model(path, name)


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_a_host_without_the_format_is_named(files, monkeypatch, name):
    monkeypatch.delitem(comfy.quant_ops.QUANT_ALGOS, EIGHT_BITS[name])
    with pytest.raises(ValueError, match=rf"does not have its format {EIGHT_BITS[name]}.*Update ComfyUI"):
        host.load_model(files["t2v"], name)


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_it_is_saved_before_its_weights_are_on_the_device(files, tmp_path, lora_of, name):
    """As with dynamic memory, where they never are; the host's way cannot hold integers."""
    g, key = torch.Generator().manual_seed(1), "blocks.0.ffn.0.weight"
    model = host.load_model(files["t2v"], name)
    layer = model.model.diffusion_model.blocks[0].ffn[0]
    layer.comfy_patched_weights = False
    if name == INT8:
        with pytest.raises(RuntimeError, match="can require gradients"):
            comfy.model_patcher.ModelPatcher.model_state_dict_for_saving(model)
    plain, change = layer.weight.dequantize(), torch.randn(512, 256, generator=g) / 50
    native = model.clone()
    native.add_patches({f"diffusion_model.{key}": ("diff", (change,))}, 0.5)
    ours = lora_of(model, {f"diffusion_model.{key.removesuffix('weight')}diff": change}, 0.5)
    for one, expected in ((model, plain), (native, plain + 0.5 * change), (ours, plain + 0.5 * change)):
        saved = one.model_state_dict_for_saving(model.model.diffusion_model, "diffusion_model.")
        kept = {part: saved[f"{key}{part}"].to("cpu") for part in ("", "_scale")}
        params = replace(layer.weight._params, scale=kept["_scale"])
        found = comfy.quant_ops.QuantizedTensor(kept[""], layer.weight._layout_cls, params).dequantize()
        assert kept[""].dtype == STORAGE[name] and relative(found, expected) < 0.05
    assert layer.comfy_patched_weights is False


@pytest.mark.parametrize("name", EIGHT_BITS)
@pytest.mark.parametrize("in_8_bits_is", [0, 1], ids=["first", "second"])
def test_a_merge_takes_it_as_either_model(loaded, models, prompts, sample, name, in_8_bits_is):
    """The host's own MODEL of such a file fails as the second."""
    other, key = models["t2v"].clone(), "blocks.0.ffn.0.weight"
    weight = other.model.diffusion_model.get_parameter(key)
    other.add_patches({f"diffusion_model.{key}": ("diff", (-4 * weight,))}, 1.0)
    found = []
    for one in (loaded[name], models["t2v"]):
        both = (one, other) if in_8_bits_is == 0 else (other, one)
        merged = ModelMergeSimple().merge(*both, 0.3)[0]
        found.append(sample(merged, *prompts, LATENT, steps=1)[0]["samples"])
    plain = sample(models["t2v"], *prompts, LATENT, steps=1)[0]["samples"]
    assert relative(*found) < 0.03 < relative(found[0], plain)


# --- LoRAs on them -------------------------------------------------------------------------------------


def low_rank(g, name, out, width, rank=4):
    down, up = torch.randn(rank, width, generator=g) / 10, torch.randn(out, rank, generator=g) / 10
    return {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}


@pytest.fixture
def lora_of(tmp_path):
    """Puts a LoRA of these tensors on a MODEL."""

    def make(model, file, strength=1.0, schedule=()):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        save_file(file, path)
        return host.add_lora(model, host.read_lora(path, model), strength, schedule)

    return make


@contextmanager
def running(model):
    """The first layer of a feed-forward while a run of this MODEL lasts."""
    run_of(model)
    try:
        yield model.model.diffusion_model.blocks[0].ffn[0]
    finally:
        _detach(model)


KINDS = [*EIGHT_BITS, *sorted(comfy.quant_ops.QUANT_ALGOS)]


@pytest.fixture(params=KINDS)
def any_model(request, loaded, files, tmp_path):
    """In 8 bits and fewer: by weight_dtype, and from a file."""
    if request.param in loaded:
        return loaded[request.param]
    return host.load_model(
        save(quantise(load_file(files["t2v"]), request.param)[0], tmp_path / "q.safetensors")
    )


def test_a_lora_is_added_beside_the_product(any_model, lora_of):
    """None of it is rounded to 8 bits, and the rest of the product is what it was without."""
    g = torch.Generator().manual_seed(1)
    file = low_rank(g, "blocks.0.ffn.0", 512, 256)
    down, up = file.values()
    file["diffusion_model.blocks.0.ffn.0.alpha"] = torch.tensor(2.0)
    x = torch.randn(1, 9, 256, generator=g)
    changes = {}
    for strength in (1e-4, 0.5):
        model = lora_of(lora_of(any_model, file, strength), file, 2 * strength)
        with running(any_model) as layer:
            plain = layer(x.clone())
        with running(model) as layer:
            assert len(layer.beside) == 2 and not layer.weight_function and not layer.bias_function
            changes[strength] = layer(x.clone()) - plain
        assert not layer.beside
    exact = x @ down.T @ up.T * 2 / 4
    assert relative(changes[0.5], 1.5 * exact) < 1e-5
    assert relative(changes[1e-4], 3e-4 * exact) < 0.01  # of float32, beside numbers 10^4 times as large


def test_what_is_no_sum_to_the_product_is_worked_into_the_weight(loaded, lora_of, prompts, sample):
    """A DoRA, a LoHa and a whole difference; what else changes that layer goes with it, in its order."""
    g = torch.Generator().manual_seed(1)
    base, name = loaded[INT8], "diffusion_model.blocks.0.ffn.0"
    plain = low_rank(g, "blocks.0.ffn.0", 512, 256)
    others = {
        "DoRA": plain | {f"{name}.dora_scale": torch.rand(512, 1, generator=g)},
        "difference": {f"{name}.diff": torch.randn(512, 256, generator=g) / 100},
        "LoHa": {
            f"{name}.hada_w{i}_{side}": torch.randn(shape, generator=g) / 5
            for i in (1, 2)
            for side, shape in (("a", (512, 2)), ("b", (2, 256)))
        },
    }
    for kind, file in others.items():
        model = lora_of(lora_of(base, plain), file)
        with running(model) as layer:
            assert len(layer.weight_function) == 2 and not layer.beside, kind
        assert changes_weights_at_use(model) and not changes_weights_at_use(lora_of(base, plain)), kind
        ours, without = (sample(m, *prompts, LATENT, steps=1)[0]["samples"] for m in (model, base))
        assert relative(ours, without) > 1e-4, kind


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_a_lora_acts_as_on_exact_weights(loaded, models, lora_of, prompts, sample, name):
    """Over the steps too: the strength of each, and on biases, which else are merged."""
    g = torch.Generator().manual_seed(1)
    file = {}
    for block in (0, 1):
        file |= low_rank(g, f"blocks.{block}.ffn.0", 512, 256)
        file |= low_rank(g, f"blocks.{block}.ffn.2", 256, 512)
        file[f"diffusion_model.blocks.{block}.ffn.2.diff_b"] = torch.randn(256, generator=g)

    def sampled(model):
        return sample(model, *prompts, LATENT, steps=2)[0]["samples"]

    plain = sampled(models["t2v"])
    for schedule in ((), (1.0, 0.2)):
        ours, exact = (sampled(lora_of(m, file, 1.0, schedule)) for m in (loaded[name], models["t2v"]))
        whole = relative(exact, plain)
        assert whole > 0.05 and relative(ours, exact) < 0.3 * whole, (schedule, whole)


# --- products by rows, and GELU on the way -------------------------------------------------------------


def multiplied(x, x_scale, weight, weight_scale, bias, dtype):
    """`row_product`, which PyTorch does not have on a CPU."""
    return F.linear(x.float() * x_scale, weight.float() * weight_scale, bias.float()).to(dtype)


@pytest.fixture
def on_a_gpu(files, monkeypatch):
    """MODELs as on a GPU that multiplies in fp8, where GELU is folded into what rounds."""
    monkeypatch.setattr(comfy.model_management, "supports_fp8_compute", lambda device=None: True)
    monkeypatch.setattr(products, "product_of", lambda *_: multiplied)
    return {name: host.load_model(files["t2v"], name) for name in EIGHT_BITS}


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_gelu_rides_where_the_input_is_rounded(on_a_gpu, loaded, models, prompts, sample, monkeypatch, name):
    model, ran = on_a_gpu[name], []
    down = model.model.diffusion_model.blocks[0].ffn[2]
    # Without the host's kernels its way makes a copy of GELU's result: ours works in place.
    assert down.folds_gelu(torch.device("cuda")) == (name == FP8_ROWS)
    folded, asked = products.EightBits.of_gelu, products.EightBits.folds_gelu
    monkeypatch.setattr(products, "has_fast_kernels", lambda device: device.type == "cuda")
    monkeypatch.setattr(products.EightBits, "folds_gelu", lambda self, _: asked(self, torch.device("cuda")))
    monkeypatch.setattr(products.EightBits, "of_gelu", lambda self, x: ran.append(1) or folded(self, x))
    ours, apart, exact = (
        sample(m, *prompts, LATENT, steps=1)[0]["samples"] for m in (model, loaded[name], models["t2v"])
    )
    assert len(ran) == 2 * 2 * (2 if name == INT8 else 1)  # passes, blocks; in int8 those of `loaded` too
    assert relative(ours, exact) < (0.03 if name == INT8 else 0.06)
    assert name == INT8 or relative(ours, apart) > 1e-3  # the input is rounded too


def test_a_scale_for_each_row_bears_what_one_for_all_does_not(on_a_gpu):
    """Tokens of very different sizes, as behind a GELU; the host's own product cuts what is above 448."""
    layer = on_a_gpu[FP8_ROWS].model.diffusion_model.blocks[0].ffn[2]
    x = torch.randn(2, 7, 512) * torch.logspace(-3, 4, 7)[:, None]
    exact = F.linear(F.gelu(x, approximate="tanh"), layer.weight.dequantize(), layer.bias)
    rows = (layer.of_gelu(x.clone()) - exact).norm(dim=-1) / exact.norm(dim=-1)
    apart = (layer(F.gelu(x, approximate="tanh")) - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert rows.max() < 0.06 and apart.max() < 0.06, rows
    layer.by_rows = False
    host_way = (layer(F.gelu(x, approximate="tanh")) - exact).norm(dim=-1) / exact.norm(dim=-1)
    layer.by_rows = True
    assert host_way.max() > 0.5


def test_without_the_product_weights_are_unpacked(on_a_gpu, monkeypatch):
    layer = on_a_gpu[FP8_ROWS].model.diffusion_model.blocks[0].ffn[0]
    x = torch.randn(1, 5, 256)
    monkeypatch.setattr(products, "product_of", lambda *_: None)
    exact = F.linear(x, layer.weight.dequantize(), layer.bias)
    assert relative(layer(x), exact) < 1e-6


def test_a_lora_takes_gelu_as_it_is(on_a_gpu, lora_of, monkeypatch):
    """The factors read GELU's result, so that it is written once and not folded."""
    monkeypatch.setattr(products, "has_fast_kernels", lambda device: device.type == "cuda")
    g = torch.Generator().manual_seed(1)
    for model in on_a_gpu.values():
        patched = lora_of(model, low_rank(g, "blocks.0.ffn.2", 256, 512))
        with running(patched):
            down = model.model.diffusion_model.blocks[0].ffn[2]
            assert down.beside and not down.folds_gelu(torch.device("cuda"))
        assert down.folds_gelu(torch.device("cuda")) and not down.folds_gelu(torch.device("cpu"))
