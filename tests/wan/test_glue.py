"""What a block moves between its products and its attention; and when it leaves that to a kernel."""

from functools import partial

import pytest
import torch
from helpers import relative
from helpers_kernels import ROOM, counting
from helpers_memory import Moved
from torch._subclasses.fake_tensor import FakeTensorMode
from wan21.wan import glue, kernels
from wan21.wan.attention import sdpa
from wan21.wan.chunked import block_executor
from wan21.wan.config import SIZES, WanConfig
from wan21.wan.dit import WanAttentionBlock
from wan21.wan.rope import axis_frequencies, rope_table

GB = 1e9


def fake_kernels(moved):
    """The kernels as far as memory goes: test_kernels.py counts what the real ones load and store."""

    def residual_norm(x, y, gate, affine, *how):
        out = ROOM["residual_norm"](x, y, gate, affine, *how)
        moved.count("residual_norm", [x, y, gate, *(affine or ())], [None if y is None else x, out])
        return out

    def rms_rope(x, weight, eps, heads, table):
        out = ROOM["rms_rope"](x, weight, eps, heads, table)
        moved.count("rms_rope", [x, weight, table], [out])
        return out

    # What it reads and writes is the product's.
    return {"residual_norm": residual_norm, "rms_rope": rms_rope, "gelu_product": ROOM["gelu_product"]}


def moved_by_a_block(monkeypatch, names):
    """A block and pass of the 14B model, 81 frames of 832x480: shapes on a GPU, and no data."""
    config, grid, half = SIZES["i2v-14B"], (21, 30, 52), torch.bfloat16
    moved = Moved()
    fake = fake_kernels(moved)
    monkeypatch.setattr(glue, "_takes_kernels", lambda x: True)
    monkeypatch.setattr(kernels, "choose", lambda n, *_: kernels.Choice(fake[n] if n in names else None))
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        block = WanAttentionBlock(config, torch.nn, dtype=half)
        block.norm3 = torch.nn.LayerNorm(config.dim, config.eps)  # as one that casts its weights to its input
        rope = rope_table(axis_frequencies(config.head_dim), grid, torch.device("cuda"))
        x, modulation = torch.zeros(1, rope.shape[0], config.dim), torch.zeros(1, 6, config.dim)
        text, image = (torch.zeros(1, n, config.dim, dtype=half) for n in (512, 257))
        with moved:
            block(x, modulation, text, image, rope, lambda q, k, v: torch.empty_like(q))
    return moved


TRITON = ("residual_norm", "rms_rope")


@pytest.mark.parametrize(
    "names, least, most", [((), 23, 24), (TRITON, 11.5, 11.6), ((*TRITON, "gelu_product"), 9.7, 9.8)]
)
def test_bytes_between_the_products(monkeypatch, names, least, most):
    moved = moved_by_a_block(monkeypatch, names)
    assert least * GB < moved.bytes <= most * GB, moved.by_name


SMALL = WanConfig(in_dim=36, dim=128, ffn_dim=192, num_heads=2, num_layers=1, image_dim=64)


@pytest.fixture
def block():
    g = torch.Generator().manual_seed(0)
    block = WanAttentionBlock(SMALL, torch.nn, dtype=torch.float16).requires_grad_(False)
    for p in block.parameters():
        p.copy_(torch.randn(p.shape, generator=g) / p[0].numel() ** 0.5)
    block.norm3.float()
    return block


@pytest.fixture
def called(monkeypatch):
    """Turns the kernels on, in PyTorch; how often each has been called."""
    counts, counted = counting()
    choices = {name: kernels.Choice(kernel) for name, kernel in counted.items()}
    monkeypatch.setattr(kernels, "choose", lambda name, *_: choices[name])
    return counts


def run(block, batch=1, parts=1):
    g = torch.Generator().manual_seed(1)
    rand = partial(torch.randn, generator=g)
    context = rand(batch, 7, 128).half(), rand(batch, 5, 128).half()
    rope = rope_table(axis_frequencies(64), (1, 3, 4))
    return block_executor(parts)(block, rand(batch, 12, 128), rand(batch, 6, 128), *context, rope, sdpa)


@pytest.mark.parametrize("batch, parts", [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_a_block_on_kernels(block, called, monkeypatch, batch, parts):
    """Also of two samples in parts, whose tokens do not lie one after the other."""
    with torch.no_grad():
        ours = run(block, batch, parts)
        assert called == {"residual_norm": 4 * parts, "rms_rope": 5 * parts, "gelu_product": parts}
        monkeypatch.setattr(kernels, "choose", lambda *_: kernels.Choice(None))
        assert relative(ours, run(block, batch, parts)) < 2e-3


def test_not_where_gradients_are_wanted_or_code_is_traced(block, called, monkeypatch):
    run(block)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.no_grad():
        run(block)
    assert not any(called.values())


class Halved(torch.nn.RMSNorm):
    def forward(self, x):
        return super().forward(x) * 0.5


def replaced_forward(norm):
    norm.forward = lambda x: type(norm).forward(norm, x) * 0.5


def hooked(norm):
    norm.register_forward_hook(lambda layer, inputs, output: output * 0.5)


@pytest.mark.parametrize("change", [replaced_forward, hooked, "another layer"])
@pytest.mark.parametrize("name", ["norm3", "self_attn.norm_k", "cross_attn.norm_q", "cross_attn.norm_k_img"])
def test_a_norm_that_does_something_of_its_own_is_called(block, called, monkeypatch, name, change):
    owner, _, last = name.rpartition(".")
    with torch.no_grad():
        plain = run(block)
        if change == "another layer":
            norm = Halved(128, eps=SMALL.eps, dtype=block.get_submodule(name).weight.dtype)
            setattr(block.get_submodule(owner), last, norm)
        else:
            change(block.get_submodule(name))
        before = sum(called.values())
        ours = run(block)
        assert sum(called.values()) == 2 * before - 1  # the others are kernels still
        monkeypatch.setattr(kernels, "choose", lambda *_: kernels.Choice(None))
        expected = run(block)
    assert relative(ours, expected) < 2e-3 < relative(ours, plain)


@pytest.mark.parametrize("change", [replaced_forward, hooked])
@pytest.mark.parametrize("name", ["ffn.0", "ffn.1"])
def test_a_changed_layer_of_the_feed_forward_is_called(block, called, name, change):
    with torch.no_grad():
        plain = run(block)
        change(block.get_submodule(name))
        assert relative(run(block), plain) > 1e-3
    assert called["gelu_product"] == 1
