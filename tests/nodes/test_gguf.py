"""A GGUF checkpoint gives the numbers of its unpacked weights, and LoRAs work on top."""

import comfy.model_management
import folder_paths
import gguf
import numpy as np
import pytest
import torch
from helpers import relative
from safetensors.torch import load_file, save_file
from wan21 import host
from wan21.host import operations
from wan21.nodes.load import Wan21ModelLoader, model_names
from wan21.wan.lora import apply_patch


@pytest.fixture(scope="module")
def pair(files, tmp_path_factory):
    """(GGUF file, its weights unpacked by the package): Q8_0 and Q5_1 in the blocks, the rest plain."""
    folder = tmp_path_factory.mktemp("gguf")
    writer = gguf.GGUFWriter(str(folder / "wan.gguf"), "wan")
    unpacked = {}
    for i, (key, weight) in enumerate(load_file(files["t2v"]).items()):
        array = weight.numpy()
        kind = gguf.GGMLQuantizationType.F32
        if key.startswith("blocks.") and array.ndim == 2:
            kind = [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q5_1][i % 2]
        data = gguf.quants.quantize(array, kind)
        unpacked[key] = torch.from_numpy(gguf.quants.dequantize(data, kind).reshape(array.shape).copy())
        if array.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{key}", array.shape)
            data = np.ascontiguousarray(array).reshape(-1)
        writer.add_tensor(key, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "wan.gguf", unpacked


@pytest.fixture
def job(prompts):
    return (*prompts, {"samples": torch.zeros(1, 16, 2, 4, 4)})


def dense(weights, path):
    save_file(weights, path, metadata={"config": '{"transformer": {"text_dim": 128}}'})
    return host.load_model(path)


def test_equals_the_unpacked_weights_and_stays_packed(pair, job, sample, tmp_path, models):
    path, unpacked = pair
    model = host.load_model(path)
    ours = sample(model, *job)[0]["samples"]
    assert relative(ours, sample(dense(unpacked, tmp_path / "d.safetensors"), *job)[0]["samples"]) < 1e-6
    assert 0 < relative(ours, sample(models["t2v"], *job)[0]["samples"]) < 0.2
    kinds = [
        v.dtype for k, v in model.model.diffusion_model.state_dict().items() if v.ndim == 2 and "blocks" in k
    ]
    assert kinds == [torch.uint8] * 20


def test_types_of_the_package_alone_are_unpacked_when_read(files, job, sample, tmp_path, caplog):
    """IQ4_NL in a block, as city96's tool passes it on: 32 numbers a block, a half-precision scale first."""
    kind, rng = gguf.GGMLQuantizationType.IQ4_NL, np.random.default_rng(3)
    writer = gguf.GGUFWriter(str(tmp_path / "wan.gguf"), "wan")
    unpacked = load_file(files["t2v"])
    for key, weight in unpacked.items():
        array, raw = weight.numpy(), gguf.GGMLQuantizationType.F32
        if array.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{key}", array.shape)
            array = np.ascontiguousarray(array).reshape(-1)
        if key.startswith("blocks.1.") and array.ndim == 2:
            blocks = rng.integers(0, 256, (weight.numel() // 32, 18), dtype=np.uint8)
            blocks[:, :2] = np.full((len(blocks), 1), 0.0005, np.float16).view(np.uint8)
            raw, array = kind, blocks.reshape(weight.shape[0], -1)
            unpacked[key] = torch.from_numpy(gguf.quants.dequantize(array, kind).copy())
        writer.add_tensor(key, array, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with caplog.at_level("INFO"):
        model = host.load_model(tmp_path / "wan.gguf")
    assert "IQ4_NL weights are unpacked while loading" in caplog.text
    layer = model.model.diffusion_model.blocks[1].ffn[0]
    assert layer.packed is None and layer.weight.dtype == torch.float32
    ours = sample(model, *job)[0]["samples"]
    assert relative(ours, sample(dense(unpacked, tmp_path / "d.safetensors"), *job)[0]["samples"]) < 1e-6


@pytest.mark.parametrize("schedule", [(), (1.0, 0.3)])
def test_lora_equals_merging_into_the_unpacked_weights(pair, job, sample, tmp_path, schedule):
    path, unpacked = pair
    g = torch.Generator().manual_seed(2)
    name = "diffusion_model.blocks.1.ffn.0"
    file = {
        f"{name}.lora_A.weight": torch.randn(4, 256, generator=g) / 16,
        f"{name}.lora_B.weight": torch.randn(512, 4, generator=g),
        f"{name}.diff_b": torch.randn(512, generator=g),
    }
    save_file(file, tmp_path / "lora.safetensors")
    model = host.load_model(path)
    lora = host.read_lora(tmp_path / "lora.safetensors", model)
    assert not lora.unmatched
    ours = sample(host.add_lora(model, lora, 0.5, schedule), *job, steps=1)[0]["samples"]
    merged = {k: v.clone() for k, v in unpacked.items()}
    for key, patch in lora.patches:
        apply_patch(patch, merged[key], 0.5)
    expected = sample(dense(merged, tmp_path / "m.safetensors"), *job, steps=1)[0]["samples"]
    assert relative(ours, expected) < 1e-6
    plain = sample(model, *job, steps=1)[0]["samples"]
    assert relative(ours, plain) > 1e-3
    if not schedule:
        import comfy.sd

        native = comfy.sd.load_lora_for_models(model, None, file, 0.5, 0)[0]
        assert relative(sample(native, *job, steps=1)[0]["samples"], expected) < 1e-6
        assert torch.equal(sample(model, *job, steps=1)[0]["samples"], plain)


def test_gguf_files_are_listed_and_a_dtype_is_refused(pair):
    path, _ = pair
    folder_paths.add_model_folder_path("diffusion_models", str(path.parent))
    try:
        assert model_names().count("wan.gguf") == 1
        assert host.is_ours(Wan21ModelLoader.execute("wan.gguf", "default").result[0])
        with pytest.raises(ValueError, match=r"^Wan21ModelLoader: wan\.gguf: weight_dtype is bf16, and GGUF"):
            Wan21ModelLoader.execute("wan.gguf", "bf16")
    finally:
        folder_paths.folder_names_and_paths["diffusion_models"][0].remove(str(path.parent))


class Stream:
    """A stream of a GPU that is not there: writes down what it does."""

    def __init__(self, name, events):
        self.name, self.events, self.is_open = name, events, False

    def __enter__(self):
        self.is_open = True

    def __exit__(self, *error):
        self.is_open = False

    def wait_stream(self, other):
        self.events.append(f"{self.name} waits for {other.name}")


def test_what_is_not_on_the_device_is_copied_beside_its_work(pair, monkeypatch):
    """On a stream of its own, which the product waits for and which does not write before that is done."""
    path, _ = pair
    if comfy.model_management.get_torch_device().type != "cpu":
        pytest.skip("a stand-in for a GPU; the pretended one has streams of its own")
    layer = host.load_model(path).model.diffusion_model.blocks[0].ffn[0]
    events, management = [], comfy.model_management
    copies, work = Stream("copying", events), Stream("work", events)
    monkeypatch.setattr(management, "get_offload_stream", lambda device: copies)
    monkeypatch.setattr(management, "current_stream", lambda device: work)
    copy, product = torch.Tensor.copy_, operations.linear

    def copy_(target, source, non_blocking=False):
        if source.device.type == "cpu" and target.is_meta:
            events.append(f"{source.dtype} copied" if copies.is_open and non_blocking else "drained")
        return copy(target, source, non_blocking)

    def linear(*tensors):
        events.append("product")
        return product(*tensors)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    monkeypatch.setattr(operations, "linear", linear)
    assert layer(torch.empty(1, 3, 256, device="meta")).shape == (1, 3, 512)
    assert events == [
        "torch.uint8 copied",
        "torch.float32 copied",
        "work waits for copying",
        "product",
        "copying waits for work",
    ]


def test_on_a_host_that_makes_weights_at_their_use(pair, job, sample, monkeypatch):
    path, _ = pair
    expected = sample(host.load_model(path), *job)[0]["samples"]
    monkeypatch.setattr("comfy.memory_management.aimdo_enabled", True)
    model = host.load_model(path)
    monkeypatch.undo()
    assert torch.equal(sample(model, *job)[0]["samples"], expected)
