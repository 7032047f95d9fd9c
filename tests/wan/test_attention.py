"""The attention contract, and the order of PyTorch's kernels."""

import threading

import pytest
import torch
from torch.nn.attention import SDPBackend
from wan21.wan import attention
from wan21.wan.attention import best_kernels, sdpa

CUDA = torch.device("cuda", 0)


def test_the_contract():
    q, k, v = (torch.randn(2, n, 3, 8, generator=torch.Generator().manual_seed(n)) for n in (5, 7, 7))
    weights = torch.einsum("bqnd,bknd->bnqk", q.double(), k.double()) / 8**0.5
    expected = torch.einsum("bnqk,bknd->bqnd", weights.softmax(-1), v.double())
    assert torch.allclose(sdpa(q, k, v).double(), expected, atol=1e-6)


@pytest.mark.parametrize(
    "capability, cudnn, first",
    [
        ((8, 6), 91900, "FLASH_ATTENTION"),
        ((9, 0), 91900, "CUDNN_ATTENTION"),
        ((10, 0), 91501, "CUDNN_ATTENTION"),
        ((9, 0), 91002, "FLASH_ATTENTION"),
        ((12, 0), 91900, "FLASH_ATTENTION"),
        ((9, 0), None, "FLASH_ATTENTION"),
    ],
)
def test_kernels_of_sdpa(monkeypatch, capability, cudnn, first):
    """PyTorch's own preference, `check_prefer_cudnn_attention` in its sdp_utils.cpp."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    before = torch._C._get_sdp_priority_order()
    with best_kernels(CUDA):
        assert torch._C._get_sdp_priority_order()[0] == int(getattr(SDPBackend, first))
    assert torch._C._get_sdp_priority_order() == before
    with best_kernels(torch.device("cpu")):
        assert torch._C._get_sdp_priority_order() == before


@pytest.mark.parametrize("in_order", [True, False])
def test_the_kernel_that_was_found_comes_first(monkeypatch, in_order):
    """A PyTorch without an order is left no faster one that it might take."""
    tried = []
    monkeypatch.setattr(attention, "_IN_THIS_ORDER", {"set_priority": True} if in_order else {})
    monkeypatch.setattr(attention._kernels, "of", tried.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    best_kernels(CUDA, "cuDNN")
    others = ["FLASH_ATTENTION"] if in_order else []
    names = ["CUDNN_ATTENTION", *others, "EFFICIENT_ATTENTION", "MATH"]
    assert tried == [[getattr(SDPBackend, name) for name in names]]


def test_threads_on_several_gpus_share_one_order_of_kernels(monkeypatch):
    """The order is the process's: each thread alone would take back another's, or leave its own behind."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    order = torch._C._get_sdp_priority_order
    before, inside = order(), []
    first_left = threading.Event()

    def second():
        with best_kernels(torch.device("cuda", 1)):
            entered.set()
            assert first_left.wait(10)
            inside.append(order())
        left.set()

    entered, left = threading.Event(), threading.Event()
    with best_kernels(torch.device("cuda", 0)):
        fast = order()
        thread = threading.Thread(target=second)
        thread.start()
        assert entered.wait(10)
    first_left.set()
    assert left.wait(10)
    thread.join()
    assert fast != before and inside == [fast]
    assert order() == before
