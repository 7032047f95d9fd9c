"""Each stage of the training on a pretended GPU: tensors without numbers, which may not meet the CPU's.

What cannot be pretended stays out: the gradient, eigenvectors, and the drawing of clips, which reads numbers.
"""

import random
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from wan21.training import data, latents, train_decoder, train_dit, train_lora, train_vae
from wan21.training import train_four_steps as four_steps
from wan21.training.text import train_tokenizer
from wan21.wan.vae import WanVAE

BUCKET = latents.Bucket(17, 64, 64, 1.0)
PLAN = [(BUCKET, 4, seed) for seed in range(2)]


class OneDevice(TorchDispatchMode):
    """Every operation's tensors lie on one device, but for copies between them and single numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors if x.ndim}
        is_copy = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        # Rows may be picked on a GPU by numbers of the CPU.
        is_pick = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_)
        assert len(devices) < 2 or is_copy or is_pick, (func, [(x.device, x.shape) for x in tensors])
        return func(*args, **(kwargs or {}))


def moved(module, device):
    """As `Module.to`, which cannot swap tensors of this kind."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.detach().to(device), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(device)
    return module


def clips(seed, count, frames=17, height=64, width=64, motions=None, device="cpu", scenes=0.0):
    rng = random.Random(seed)
    video = torch.empty(count, 3, frames, height, width, device=device)
    return video, [data.random_motion(rng, scenes) for _ in range(count)]


def one_step(stage, parts, steps, do_step, measure, **kwargs):
    do_step(0)
    measure()


@pytest.fixture
def pretended(monkeypatch):
    """Gives the name of a device that is not there."""
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    monkeypatch.setattr(nn.Module, "to", lambda self, device: moved(self, device))
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)
    for kind in (torch.Tensor, FakeTensor):
        monkeypatch.setattr(kind, "item", lambda self: 1.0)
        monkeypatch.setattr(kind, "tolist", lambda self: [0, 1])
        monkeypatch.setattr(kind, "__index__", lambda self: 0, raising=False)
        monkeypatch.setattr(kind, "__float__", lambda self: 1.0)
        monkeypatch.setattr(kind, "__bool__", lambda self: True)
    monkeypatch.setattr(latents, "to_model", lambda z: z)  # the host's numbers are real ones
    monkeypatch.setattr(data, "clips", clips)
    for module in (train_vae, train_decoder, train_dit, train_lora, four_steps):
        monkeypatch.setattr(module, "train", one_step)
    with FakeTensorMode(), OneDevice():
        yield "cuda"


@contextmanager
def loading(monkeypatch, shard):
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda path, **kwargs: shard)
        yield


class Named:
    done, work = False, Path("nowhere")

    def __init__(self, name):
        self.name = name


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def test_what_meets_the_cpu_is_seen(pretended):
    there, here = torch.empty(1, 3, 8, 8, device=pretended), torch.empty(3, 1, 3, 3)
    with pytest.raises((AssertionError, RuntimeError)):
        torch.nn.functional.conv2d(there, here, groups=3)


def test_the_vae(pretended):
    vae = WanVAE(dim=16, device=pretended)
    norm = moved(train_vae.LatentNorm(), pretended)
    schedule = train_vae.Schedule(video_steps=2, refine_steps=2, batch=1)
    train_vae.initialize(vae)
    train_vae.train_video(Named("vae_video"), vae, norm, schedule)
    train_vae.fold(vae, norm, batches=2)
    train_decoder.refine(Named("vae_refined"), vae, schedule)


def test_the_dit_and_the_loras(pretended, tokenizer, monkeypatch):
    encoder = latents.Encoder(WanVAE(dim=16, device=pretended), pretended, fast=True)
    model = moved(train_dit.TinyModel(tokenizer), pretended)
    with loading(monkeypatch, encoder.shard(BUCKET, 4, 1)):
        made = latents.Latents(".", PLAN)
    monkeypatch.setattr(latents, "Latents", lambda folder, plan: made)
    monkeypatch.setattr(train_dit, "tokenizer_of", lambda work: tokenizer)
    monkeypatch.setattr(train_dit, "TinyModel", lambda tokenizer: model)
    train_dit.dit_stage(Named("dit"), train_dit.SCHEDULES["smoke"], pretended)
    monkeypatch.setattr(latents, "write_shards", lambda *args: None)
    monkeypatch.setattr(train_lora, "averaged_model", lambda stage: model)
    train_lora.lora_stage(Named("lora"), None, WanVAE(dim=16, device=pretended), "smoke", pretended)


def test_the_four_steps(pretended, tokenizer, monkeypatch):
    encoder = latents.Encoder(WanVAE(dim=16, device=pretended), pretended)
    model = moved(train_dit.TinyModel(tokenizer), pretended)
    with loading(monkeypatch, four_steps.shard(model, encoder, BUCKET, 4, 1)):
        paths = four_steps.Paths(Path(), PLAN, pretended)
    lora = moved(four_steps.student(model), pretended)
    four_steps.train_lora(Named("distil"), model, lora, paths, paths, four_steps.SCHEDULES["smoke"])
