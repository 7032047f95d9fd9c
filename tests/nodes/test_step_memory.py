"""The memory estimate against the counted tensors of a forward pass, with the host's layers."""

from dataclasses import replace

import comfy.ops
import comfy_kitchen.tensor.int8_utils as rotations
import pytest
import torch
from comfy.quant_ops import QuantizedTensor, TensorCoreFP8Layout
from comfy_kitchen.backends.eager import quantization as eager
from helpers_kernels import ROOM
from helpers_memory import PeakBytes
from torch._subclasses.fake_tensor import FakeTensorMode
from wan21.host import products
from wan21.host.operations import lending
from wan21.wan import glue, kernels
from wan21.wan.chunked import block_executor
from wan21.wan.config import SIZES, WanConfig
from wan21.wan.dit import WanModel, run_blocks
from wan21.wan.memory import (
    GIB,
    LATENT_COPIES,
    Beside,
    MemoryPlan,
    StepSize,
    step_bytes,
)
from wan21.wan.nag import Nag
from wan21.wan.option import Call
from wan21.wan.shard import Ulysses
from wan21.wan.teacache import Plan, Residuals

TOY = WanConfig(in_dim=36, dim=256, ffn_dim=1024, num_heads=2, num_layers=2, text_dim=64, image_dim=1280)


class NoOthers:
    """A group of so many ranks, of which only the first is here: shapes are all that is asked of the rest."""

    def __init__(self, size):
        self.size = lambda: size

    def rank(self):
        return 0

    def alltoall_base(self, got, send, coming, going):
        assert (got.numel(), send.numel()) == (sum(coming), sum(going))
        return self

    def wait(self):
        return True


def counted(
    config, latent, dtype, plan, passes=2, image_tokens=0, device="cuda", teacache=False, nag=None, ranks=1,
    operations=comfy.ops.manual_cast, prepare=lambda model: None,
):  # fmt: skip
    """Peak of the new tensors of a step. On `cuda` they are fake: shapes, and no device needed.

    The model computes float32 where the loaded one does: patches, time, modulation, residual stream.
    `prepare` may change it before.
    """

    def attention(q, k, v):
        return torch.empty_like(q)  # a fused kernel: nothing but its result

    count = passes if plan.joint else 1
    mode = FakeTensorMode() if device == "cuda" else torch.no_grad()
    with torch.no_grad(), mode:
        model = WanModel(config, operations, device=device, dtype=dtype)
        prepare(model)
        batch = count * latent[0]
        x = torch.zeros(batch, config.in_dim, *latent[2:], device=device)
        text = torch.zeros(batch, 512, config.text_dim, device=device, dtype=dtype)
        clip = torch.zeros(batch, image_tokens, 1280, device=device, dtype=dtype) if image_tokens else None
        timestep = torch.zeros(batch, device=device)
        with PeakBytes(device) as meter:
            runner = Residuals(Plan((True, False), 0.0, 1)).around(0)(run_blocks) if teacache else run_blocks
            names = ("cond", "uncond")[:passes]
            reads = {} if nag is None else {"context_attention": nag(Call(names)).context_attention}
            alone = {"uncond": text[:1]} if nag is not None and passes == 1 else {}
            for group in [names] if plan.joint else [(name,) for name in names]:
                how = {"attention": attention, "runner": runner, "execute": block_executor(plan.parts)}
                how |= {**reads, "contexts": alone}
                if ranks > 1:
                    how["shard"] = Ulysses(NoOthers(ranks))
                model(x, timestep, text, clip, pass_names=group, **how)
    return meter.peak


def estimated(config, latent, dtype, plan, passes=2, image_tokens=0, **options):
    """The estimate, less what is held outside the model call: the latents, the input and its parts."""
    size = StepSize(config, latent, passes, dtype.itemsize, image_tokens=image_tokens, **options)
    area, together = 16 * size.tokens, passes if plan.joint else 1
    return step_bytes(size, plan) - area * (16 * (LATENT_COPIES + passes) + together * 2 * config.in_dim)


PLANS = [MemoryPlan(), MemoryPlan(True, 4), MemoryPlan(False), MemoryPlan(False, 4)]
SHORT = (1, 16, 21, 60, 104)  # 480x832, 81 frames
LARGE = (1, 16, 21, 90, 160)  # 720x1280, 81 frames


@pytest.mark.parametrize(
    "size, latent, dtype, plan",
    [
        *(("i2v-14B", LARGE, torch.bfloat16, plan) for plan in PLANS),
        ("i2v-14B", SHORT, torch.float32, PLANS[0]),
        ("t2v-1.3B", SHORT, torch.bfloat16, PLANS[0]),
        ("t2v-1.3B", SHORT, torch.bfloat16, PLANS[3]),
    ],
)
def test_estimate_at_released_sizes(size, latent, dtype, plan):
    config = replace(SIZES[size], num_layers=1)  # each further block takes and leaves the same
    image_tokens = 257 if config.image_dim else 0
    real = counted(config, latent, dtype, plan, image_tokens=image_tokens)
    ours = estimated(config, latent, dtype, plan, image_tokens=image_tokens)
    assert 0.97 < ours / real < 1.1, f"{ours / GIB:.2f} estimated, {real / GIB:.2f} GiB counted"


@pytest.mark.parametrize(
    "size, ranks, latent, plan",
    [
        ("i2v-14B", 2, SHORT, PLANS[0]),
        ("i2v-14B", 3, (2, *SHORT[1:]), PLANS[3]),
        ("i2v-14B", 8, LARGE, PLANS[0]),
        ("t2v-1.3B", 8, SHORT, PLANS[0]),  # 12 heads
    ],
)
def test_estimate_of_one_of_several_ranks(size, ranks, latent, plan):
    config = replace(SIZES[size], num_layers=1)
    real = counted(config, latent, torch.bfloat16, plan, ranks=ranks)
    ours, alone = (estimated(config, latent, torch.bfloat16, plan, ranks=n) for n in (ranks, 1))
    matrix = 2 * config.dim * config.ffn_dim  # in the estimate of a block, for a cast that is not made here
    assert 0.97 * real < ours < 1.03 * real + matrix, f"{ours / GIB:.2f}, {real / GIB:.2f} GiB counted"
    assert real < 0.7 * alone


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", PLANS[::3], ids=str)
def test_estimate_with_kernels(plan, dtype, monkeypatch):
    """They make no float32 tensors on the way; the peak is elsewhere and stays."""
    monkeypatch.setattr(glue, "_takes_kernels", lambda x: x.ndim == 3)
    monkeypatch.setattr(kernels, "choose", lambda name, *_: kernels.Choice(ROOM[name]))
    config = replace(SIZES["i2v-14B"], num_layers=1)
    real = counted(config, SHORT, dtype, plan, image_tokens=257)
    ours = estimated(config, SHORT, dtype, plan, image_tokens=257)
    assert 0.97 < ours / real < 1.1, f"{ours / GIB:.2f} estimated, {real / GIB:.2f} GiB counted"


def stored_in_fp8(model):
    """Matrices of the blocks, as weight_dtype fp8_e4m3fn_fast stores them."""
    for layer in model.blocks.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)


def multiplied_by_rows(model):
    """The feed-forward as weight_dtype fp8_e4m3fn_rows has it."""
    for block in model.blocks:
        for layer in (block.ffn[0], block.ffn[2]):
            rows, dtype = layer.weight.to(torch.float8_e4m3fn), layer.weight.dtype
            params = TensorCoreFP8Layout.Params(
                scale=rows.new_ones((), dtype=torch.float32), orig_dtype=dtype, orig_shape=tuple(rows.shape)
            )
            weight = QuantizedTensor(rows, "TensorCoreFP8E4M3Layout", params)
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            layer.by_rows = True


def rounded_room(x, gelu):
    return torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty(len(x), 1, dtype=torch.float32)


def product_room(x, x_scale, weight, weight_scale, bias, dtype):
    return x.new_empty(len(x), len(weight), dtype=dtype)


@pytest.mark.parametrize("plan", PLANS[::3], ids=str)
@pytest.mark.parametrize("prepare", [stored_in_fp8, multiplied_by_rows])
def test_estimate_with_8_bits(plan, prepare, monkeypatch):
    """The hidden layer, the largest tensor of a step, has a rounded copy beside it."""
    ran = []
    monkeypatch.setattr(products, "quantised_rows", lambda *how: ran.append(1) or rounded_room(*how))
    monkeypatch.setattr(products, "product_of", lambda *_: product_room)
    config = replace(SIZES["i2v-14B"], num_layers=1)
    how = {"operations": lending(comfy.ops.fp8_ops), "image_tokens": 257}
    real = counted(config, SHORT, torch.bfloat16, plan, prepare=prepare, **how)
    plain = counted(config, SHORT, torch.bfloat16, plan, image_tokens=257)
    beside = Beside(1.0, 0.0)
    everywhere = {"attention_beside": beside} if prepare is stored_in_fp8 else {}
    ours = estimated(config, SHORT, torch.bfloat16, plan, image_tokens=257, ffn_beside=beside, **everywhere)
    assert 0.97 < ours / real < 1.1, f"{ours / GIB:.2f} estimated, {real / GIB:.2f} GiB counted"
    assert bool(ran) == (prepare is multiplied_by_rows)
    if plan.parts == 1:
        hidden = 32760 * config.ffn_dim
        assert real == pytest.approx(plain + hidden, rel=0.01)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("width, hidden", [(5120, 13824), (13824, 5120)])
def test_what_the_hosts_int8_takes_without_its_own_kernels(width, hidden, rotated, monkeypatch):
    """A PyTorch for CUDA 12: its function runs PyTorch's operations, at 81 frames of 832x480."""
    monkeypatch.setattr(rotations, "_HADAMARD_CACHE", {})  # tensors without data are none to keep
    tokens, mode = 32760, FakeTensorMode()
    with mode, torch.no_grad():
        x = torch.empty(tokens, width, dtype=torch.bfloat16)
        weight, scale = torch.empty(hidden, width, dtype=torch.int8), torch.ones(hidden)
        bias = torch.empty(hidden, dtype=torch.bfloat16)
        with PeakBytes() as meter:
            eager.int8_linear(x, weight, scale, bias, torch.bfloat16, convrot=rotated)
    layer = products.with_additions(comfy.ops.mixed_precision_ops({}).Linear)(16, 16)
    layer.weight, layer.quant_format = (
        QuantizedTensor.from_float(
            torch.ones(16, 256), "TensorWiseINT8Layout", per_channel=True, convrot=rotated
        ),
        "int8_tensorwise",
    )
    beside = products.beside_product(layer, torch.device("cpu"), 2)
    ours = tokens * (2 * hidden + beside.bytes(width, hidden)) + width * hidden
    assert 0.97 < ours / meter.peak < 1.35, (ours / GIB, meter.peak / GIB)


@pytest.mark.parametrize("plan", PLANS[::3], ids=str)
def test_estimate_with_teacache(plan):
    """It keeps the residual of each pass, and the tokens before the blocks while a pass walks."""
    config = replace(SIZES["i2v-14B"], num_layers=1)
    real, plain = (counted(config, SHORT, torch.bfloat16, plan, teacache=on) for on in (True, False))
    ours = estimated(config, SHORT, torch.bfloat16, plan, teacache=True)
    assert 0.97 < ours / real < 1.1, f"{ours / GIB:.2f} estimated, {real / GIB:.2f} GiB counted"
    assert real > 1.05 * plain


def norm_by_steps(x, shape, weight=None, eps=None):
    """RMSNorm as PyTorch before 2.9 has it on a GPU, with what its local variables keep alive."""
    wide = x.float()
    scale = (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    normed = wide * scale
    normed = normed * weight
    del wide
    return normed.type_as(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_estimate_on_an_older_torch(plan, dtype, monkeypatch):
    config = replace(SIZES["i2v-14B"], num_layers=1)
    plain = counted(config, SHORT, dtype, plan)
    monkeypatch.setattr(torch.nn.functional, "rms_norm", norm_by_steps)
    real = counted(config, SHORT, dtype, plan)
    ours = estimated(config, SHORT, dtype, plan, fused_norm=False)
    assert 0.97 < ours / real < 1.1, f"{ours / GIB:.2f} estimated, {real / GIB:.2f} GiB counted"
    if dtype == torch.bfloat16 and plan.parts == 1:
        assert real > 1.2 * plain


@pytest.mark.parametrize("plan", PLANS[2:], ids=str)
def test_estimate_with_nag(plan):
    config = replace(SIZES["i2v-14B"], num_layers=1)
    how = {"passes": 1, "image_tokens": 257}
    real = counted(config, LARGE, torch.bfloat16, plan, nag=Nag().begin(None, None, None), **how)
    plain = counted(config, LARGE, torch.bfloat16, plan, **how)
    ours = estimated(config, LARGE, torch.bfloat16, plan, nag=True, **how)
    assert 0.97 < ours / real < 1.1, f"{ours / GIB:.2f} estimated, {real / GIB:.2f} GiB counted"
    assert real > 1.03 * plain or plan.parts > 1


@pytest.mark.parametrize("plan", PLANS[::3], ids=str)
@pytest.mark.parametrize("latent", [(1, 16, 5, 30, 52), (2, 16, 3, 16, 17)])
def test_estimate_of_real_tensors(latent, plan):
    latent = (*latent[:4], latent[4] + latent[4] % 2)  # the host pads odd sides
    real = counted(TOY, latent, torch.float32, plan, device="cpu")
    assert real / 1.15 < estimated(TOY, latent, torch.float32, plan) < real * 1.15
