"""Products in 8 bits on a real GPU: their kernels beside PyTorch's own operations, and whole models."""

from functools import partial

import comfy.model_management
import pytest
import torch
import torch.nn.functional as F
from lib.random_checkpoints import T2V, make_checkpoints
from wan21 import host
from wan21.host import products
from wan21.host.eight_bits import EIGHT_BITS
from wan21.wan import fp8_rows
from wan21.wan.kernels import describe, relative

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = torch.device("cuda", 0)
ROWS, WIDTH, HIDDEN = 32760, 5120, 13824  # of 14B and 81 frames of 832x480
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def taken():
    """Skips with the reason where a kernel of rows in fp8 is not taken."""

    def check(name, dtype, width):
        found = fp8_rows.choices(DEVICE, dtype, width)
        if found[name].function is None:
            pytest.skip(f"{torch.cuda.get_device_name()}: {describe(found)}")
        return found[name].function

    return check


def rows(dtype, width, count=ROWS):
    """As behind a GELU: of very different sizes."""
    sizes = torch.logspace(-2, 3, count, device=DEVICE)[:, None]
    return (torch.randn(count, width, device=DEVICE) * sizes).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("width", [WIDTH, HIDDEN, 8960, 240])
def test_rows_are_those_of_pytorch(taken, dtype, gelu, width):
    """Where a number lies between two of fp8 it may go to the other, which is an eighth of it at most."""
    kernel, x = taken("quantise_rows", dtype, width), rows(dtype, width)
    (ours, scale), (expected, of) = kernel(x, gelu), fp8_rows._quantised_rows(x, gelu)
    assert relative(scale, of) < 1e-5
    assert relative(ours.float() * scale, expected.float() * of) < 0.01
    assert (ours.float() != expected.float()).float().mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width, hidden", [(WIDTH, HIDDEN), (HIDDEN, WIDTH), (256, 512)])
def test_their_product_is_that_of_pytorch(taken, dtype, width, hidden):
    multiply, x = taken("row_product", dtype, width), rows(dtype, width, 2048)
    weight = torch.randn(hidden, width, device=DEVICE) / width**0.5
    scale, bias = weight.abs().max() / 448, torch.randn(hidden, device=DEVICE).to(dtype)
    matrix = (weight / scale).to(torch.float8_e4m3fn)
    (numbers, of) = fp8_rows._quantised_rows(x, False)
    expected = F.linear(numbers.float() * of, matrix.float() * scale, bias.float())
    ours = multiply(numbers, of, matrix, scale, bias, dtype)
    each = (ours.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert each.max() < 0.02, each.max()  # of the sums of 14 bits too, which Hopper's fast way has


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_checkpoints(tmp_path_factory.mktemp("models")) / "diffusion_models" / T2V


def loaded(path, name):
    """(MODEL on the device, a call of its DiT)"""
    patcher = host.load_model(path, name)
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    g, dtype = torch.Generator().manual_seed(0), patcher.model.get_dtype_inference()
    x, text = torch.randn(2, 16, 3, 32, 34, generator=g), torch.randn(2, 512, 128, generator=g)
    t = torch.full((2,), 700.0, device=DEVICE)
    options = {"cond_or_uncond": [0, 1]}
    dit = patcher.model.diffusion_model
    return patcher, partial(dit, x.to(DEVICE), t, text.to(DEVICE, dtype), transformer_options=options)


@pytest.mark.parametrize("name", [n for n in host.WEIGHT_DTYPES if n not in host.DTYPES])
def test_a_model_below_16_bits_is_near_the_exact_one(path, name):
    try:
        patcher, call = loaded(path, name)
    except ValueError as refusal:
        pytest.skip(str(refusal))
    exact, plain = loaded(path, "fp32")
    off = relative(call(), plain())
    print(f"\n{torch.cuda.get_device_name()}, {name}: {off:.1e}")
    assert 0 < off < 0.1
    assert patcher is not exact


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_the_layer_behind_gelu_takes_what_is_counted_beside_it(path, name):
    """At the rows of long clips; GELU on the way where that is taken."""
    patcher, _ = loaded(path, name)
    down = patcher.model.diffusion_model.blocks[0].ffn[2]
    dtype, (out, width) = patcher.model.get_dtype_inference(), down.weight.shape
    beside, folds = products.beside_product(down, DEVICE, dtype.itemsize), down.folds_gelu(DEVICE)
    if not beside.input:
        pytest.skip(f"{torch.cuda.get_device_name()} does not multiply in the format of {name}")
    x = torch.randn(1, 40 * ROWS, width, device=DEVICE).to(dtype)
    few = x[:, :64].contiguous()
    read = F.gelu(few.float(), approximate="tanh") if folds else few.float()
    expected = F.linear(read, down.weight.dequantize().float(), down.bias.float())
    call = down.of_gelu if folds else down
    assert relative(call(few), expected) < 0.06
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(x)
    took = torch.cuda.max_memory_allocated() - before
    estimate = x.shape[1] * (dtype.itemsize * out + beside.bytes(width, out))
    print(f"\n{torch.cuda.get_device_name()}, {name}: {beside}, folds GELU: {folds}, {estimate / took:.2f}")
    assert 0.85 < estimate / took < 1.6
