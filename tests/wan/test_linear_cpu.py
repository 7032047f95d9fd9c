import pytest
import torch
import torch.nn.functional as F
from wan21.wan import linear_cpu

LARGE, SMALL = (1100, 960, 960), (20, 96, 48)  # rows, K, N: above and below MIN_PRODUCTS


def tensors(rows, k, n, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    sizes = (1, rows, k), (n, k), (n,)
    return [torch.randn(size, generator=g).to(dtype) for size in sizes]


pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch was built without oneDNN"
)


@pytest.fixture
def products(monkeypatch):
    """Sizes of the products that oneDNN was asked for, on a CPU where it is the faster library."""
    monkeypatch.setattr(linear_cpu, "_faster", {torch.get_num_threads(): True})
    real, seen = torch.ops.mkldnn._linear_pointwise, []

    def counted(x, *args):
        seen.append(tuple(x.shape))
        return real(x, *args)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return seen


@pytest.mark.parametrize("with_bias", [True, False])
def test_large_products_by_onednn_have_the_same_numbers(products, with_bias):
    x, weight, bias = tensors(*LARGE)
    bias = bias if with_bias else None
    with torch.inference_mode():
        y = linear_cpu.linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert products == [(1, 1100, 960)]
    assert y.shape == exact.shape and (y - exact).norm() / exact.norm() < 1e-6


@pytest.mark.parametrize("size, dtype", [(SMALL, torch.float32), (LARGE, torch.bfloat16)])
def test_everything_else_by_pytorch(products, size, dtype):
    x, weight, bias = tensors(*size, dtype)
    with torch.inference_mode():
        assert torch.equal(linear_cpu.linear(x, weight, bias), F.linear(x, weight, bias))
    assert products == []


def test_gradients_flow(products):
    x, weight, bias = tensors(*LARGE)
    weight.requires_grad_()
    linear_cpu.linear(x, weight, bias).sum().backward()
    assert products == [] and weight.grad is not None
    torch.testing.assert_close(weight.grad[0], x.sum((0, 1)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "onednn, mkl, taken", [(1, 1.2, True), (1, 1, True), (1, 0.97, True), (1, 0.9, False)]
)
def test_the_faster_library_takes_the_products(products, monkeypatch, onednn, mkl, taken):
    """Timed once, however many layers follow; of two that are as fast always the same."""
    probes = []

    def seconds(functions, x, weight):
        probes.append((tuple(x.shape), tuple(weight.shape)))
        return [onednn, mkl]

    monkeypatch.setattr(linear_cpu, "_faster", {})
    monkeypatch.setattr(linear_cpu, "_seconds", seconds)
    x, weight, bias = tensors(*LARGE)
    with torch.inference_mode():
        for _ in range(2):
            linear_cpu.linear(x, weight, bias)
    assert products == [(1, 1100, 960)] * (2 * taken)
    assert probes == [((linear_cpu.PROBED_PRODUCTS // 960**2, 960), (960, 960))]


def test_the_probe_times_both(monkeypatch):
    calls = []
    functions = tuple(lambda *tensors, name=name: calls.append(name) for name in "ab")
    assert all(0 <= s < 1 for s in linear_cpu._seconds(functions, torch.ones(1), torch.ones(1)))
    assert calls == ["a", "b"] * linear_cpu.CALLS
