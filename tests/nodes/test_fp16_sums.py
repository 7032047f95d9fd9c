"""weight_dtype fp16_fast: PyTorch's switch is on in our calls alone, and what overflows is named."""

from threading import Barrier, Thread

import comfy.model_management
import pytest
import torch
from helpers_nodes import host_euler
from wan21 import host
from wan21.host import fp16_sums, load

LATENT = {"samples": torch.zeros(1, 16, 2, 4, 4)}
MATMUL = torch.backends.cuda.matmul


@pytest.fixture
def model(files, monkeypatch):
    """As on a GPU that has such sums; a CPU sums as it does."""
    monkeypatch.setattr(load, "check_fp16_sums", lambda device: None)
    monkeypatch.setattr(comfy.model_management, "should_use_fp16", lambda *args, **kwargs: True)
    return host.load_model(files["t2v"], "fp16_fast")


def test_the_switch_is_on_in_our_calls_alone(model, prompts, sample):
    seen = []
    layer = model.model.diffusion_model.blocks[1].ffn[0]
    layer.register_forward_hook(lambda *_: seen.append(MATMUL.allow_fp16_accumulation))
    before = MATMUL.allow_fp16_accumulation
    report = sample(model, *prompts, LATENT, steps=2)[1]
    assert model.model.get_dtype_inference() == torch.float16 and layer.weight.dtype == torch.float16
    assert len(seen) == 4 and all(seen) and MATMUL.allow_fp16_accumulation == before
    assert fp16_sums.IN_FP16_SUMS in report


@pytest.mark.parametrize("sampler", ["ours", "the host's"])
def test_an_overflow_is_named_at_its_step(model, prompts, sample, sampler):
    calls = []
    dit = model.model.diffusion_model
    dit.blocks[1].ffn[2].register_forward_hook(lambda layer, args, y: calls.append(1) or y + torch.inf)
    with pytest.raises(ValueError, match=r"weight_dtype is fp16_fast.*Set weight_dtype to fp16"):
        if sampler == "ours":
            sample(model, *prompts, LATENT, steps=3)
        else:
            host_euler(model, *prompts, LATENT, [1.0, 0.7, 0.4, 0.0], 1.0, 0)
    assert len(calls) <= 2 and not MATMUL.allow_fp16_accumulation  # the passes of one step


def test_threads_take_the_switch_back_together(monkeypatch):
    monkeypatch.setattr(MATMUL, "allow_fp16_accumulation", False)
    both, first_left, seen = Barrier(2), Barrier(2), []

    def first():
        with fp16_sums.fp16_sums(True):
            both.wait(10)
        first_left.wait(10)

    thread = Thread(target=first)
    thread.start()
    with fp16_sums.fp16_sums(True):
        both.wait(10)
        first_left.wait(10)
        seen.append(MATMUL.allow_fp16_accumulation)
    thread.join(10)
    assert seen == [True] and not MATMUL.allow_fp16_accumulation
    with fp16_sums.fp16_sums(False):
        assert not MATMUL.allow_fp16_accumulation


@pytest.mark.parametrize(
    "device, nvidia, fp16, why",
    [
        ("cpu", False, True, "has no sums in fp16 .that takes an NVIDIA GPU"),
        ("cuda", False, True, "has no sums in fp16 .that takes an NVIDIA GPU"),
        ("cuda", True, False, "does not compute in fp16"),
    ],
)
def test_devices_without_them_are_refused(monkeypatch, device, nvidia, fp16, why):
    management = comfy.model_management
    monkeypatch.setattr(management, "is_nvidia", lambda: nvidia)
    monkeypatch.setattr(management, "should_use_fp16", lambda *args, **kwargs: fp16)
    monkeypatch.setattr(management, "get_torch_device_name", lambda device: "this device")
    with pytest.raises(ValueError, match=rf"fp16_fast, and this device {why}.*Set weight_dtype to fp16 or"):
        fp16_sums.check_fp16_sums(torch.device(device))


def test_an_older_pytorch_is_refused(monkeypatch):
    monkeypatch.setattr(comfy.model_management, "is_nvidia", lambda: True)
    monkeypatch.setattr(comfy.model_management, "get_torch_device_name", lambda device: "this device")
    monkeypatch.setattr(torch.backends.cuda, "matmul", object())
    with pytest.raises(ValueError, match=r"PyTorch .* has no sums in fp16"):
        fp16_sums.check_fp16_sums(torch.device("cuda"))


def test_the_loader_asks_first(files):
    if comfy.model_management.get_torch_device().type != "cpu":
        pytest.skip("it is about the CPU, and there is a GPU")
    with pytest.raises(ValueError, match=r"fp16_fast, and .* has no sums in fp16"):
        host.load_model(files["t2v"], "fp16_fast")
