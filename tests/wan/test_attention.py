"""Attention backends: which are found, what they refuse, what auto takes. Their packages cannot exist here,
so fakes stand in for the modules alone; `tests/gpu` runs the real ones where they are installed."""

import sys
import threading
import types

import pytest
import torch
from wan21.wan import attention
from wan21.wan.attention import BACKENDS, CHOICES, FEW_KEYS, SDPA, best_kernels, choose_attention, sdpa

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _nothing_remembered():
    yield
    attention._import.cache_clear()
    attention.fastest.cache_clear()


@pytest.fixture
def install(monkeypatch):
    """`install(name, function)` puts a fake package of a backend in place."""

    def run(name, function=sdpa):
        module, attribute = BACKENDS[name].module, BACKENDS[name].function
        parent = module.split(".")[0]
        fake = types.ModuleType(module)
        setattr(fake, attribute, lambda q, k, v, **kw: function(q, k, v))
        monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent, types.ModuleType(parent)))
        monkeypatch.setitem(sys.modules, module, fake)
        attention._import.cache_clear()

    return run


@pytest.fixture
def hopper(monkeypatch):
    """A CUDA device that is not there: its capability, and tensors that stay on the CPU."""
    to = torch.Tensor.to

    def to_cpu(tensor, *args, **kwargs):
        return to(tensor, *("cpu" if a == CUDA else a for a in args), **kwargs)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.Tensor, "to", to_cpu)
    monkeypatch.setattr(attention, "PROBE_TOKENS", FEW_KEYS + 1)


def test_the_contract():
    q, k, v = (torch.randn(2, n, 3, 8, generator=torch.Generator().manual_seed(n)) for n in (5, 7, 7))
    weights = torch.einsum("bqnd,bknd->bnqk", q.double(), k.double()) / 8**0.5
    expected = torch.einsum("bnqk,bknd->bqnd", weights.softmax(-1), v.double())
    assert torch.allclose(sdpa(q, k, v).double(), expected, atol=1e-6)


def test_without_cuda_auto_is_sdpa(install):
    install("flash")
    assert choose_attention("auto", "cpu", torch.float32, 128) is SDPA
    assert choose_attention("sdpa", "cpu", torch.float32, 128) is SDPA


@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_not_installed_says_how_to_get_it(name):
    with pytest.raises(
        ValueError, match=rf"attention is {name}, and \w+ is not installed; get it with pip .*: sdpa\. Choose"
    ):
        choose_attention(name, CUDA, torch.bfloat16, 128)


def test_what_does_not_load_says_why(monkeypatch, tmp_path):
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"flash_attn does not load \(undefined symbol: _ZN3c10\)"):
        choose_attention("flash", CUDA, torch.bfloat16, 128)


def test_a_package_left_over_from_an_uninstall_ends_no_run(monkeypatch, hopper):
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    assert choose_attention("auto", CUDA, torch.bfloat16, 64) is SDPA
    with pytest.raises(ValueError, match="flash_attn has no flash_attn_func; get it with pip install"):
        choose_attention("flash", CUDA, torch.bfloat16, 64)


def test_a_package_that_fails_in_its_own_way_ends_no_run(monkeypatch, hopper, tmp_path):
    (tmp_path / "flash_attn.py").write_text("raise RuntimeError('no kernel image')")
    monkeypatch.syspath_prepend(tmp_path)
    assert choose_attention("auto", CUDA, torch.bfloat16, 64) is SDPA
    with pytest.raises(ValueError, match=r"flash_attn does not load \(no kernel image\)"):
        choose_attention("flash", CUDA, torch.bfloat16, 64)


REFUSED = [
    ("flash", "cpu", torch.bfloat16, 128, "needs a CUDA device and the model runs on cpu"),
    ("flash", CUDA, torch.float32, 128, "works in float16, bfloat16 and the model in float32"),
    ("sage", CUDA, torch.bfloat16, 256, "multiples of 8 up to 128 and the model's are 256 wide"),
    ("flash", CUDA, torch.bfloat16, 36, "multiples of 8 up to 256 and the model's are 36 wide"),
]


@pytest.mark.parametrize("name, device, dtype, head_dim, message", REFUSED)
def test_what_a_backend_cannot_do_is_named(install, hopper, name, device, dtype, head_dim, message):
    install(name)
    with pytest.raises(ValueError, match=message):
        choose_attention(name, device, dtype, head_dim)


def test_old_devices_are_named(install, hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for name in ("flash", "xformers"):
        install(name)
    with pytest.raises(
        ValueError, match=r"needs compute capability 8\.0 and the device has 7\.5.*: sdpa, xformers\. Choose"
    ):
        choose_attention("flash", CUDA, torch.float16, 128)
    assert choose_attention("xformers", CUDA, torch.float16, 128).name == "xformers"


def test_an_explicit_choice_is_called_in_its_own_layout(hopper, monkeypatch):
    seen = {}
    fake = types.ModuleType("sageattention")
    fake.sageattn = lambda q, k, v, **keywords: seen.update(keywords, shape=q.shape) or q
    monkeypatch.setitem(sys.modules, "sageattention", fake)
    chosen = choose_attention("sage", CUDA, torch.float16, 128)
    q = torch.zeros(1, FEW_KEYS + 1, 2, 128)
    chosen.function(q, q, q)
    assert seen == {"tensor_layout": "NHD", "shape": (1, FEW_KEYS + 1, 2, 128)}
    assert chosen.quantised and not SDPA.quantised


@pytest.mark.parametrize("keys", [1, 257, 512, FEW_KEYS])
def test_text_and_image_are_not_attended_to_in_8_bits(install, hopper, keys):
    install("sage", lambda q, k, v: q / 0)
    q, k, v = (torch.randn(1, n, 2, 16) for n in (1560, keys, keys))
    assert torch.equal(choose_attention("sage", CUDA, torch.float16, 16).function(q, k, v), sdpa(q, k, v))


@pytest.fixture
def seconds(hopper, monkeypatch):
    """`seconds[name]` is what a backend takes."""
    took = {"sdpa": 1.0}
    names = {}
    bound = attention._bound
    monkeypatch.setattr(attention, "_bound", lambda name: names.setdefault(name, bound(name)))
    by_function = lambda f: next((n for n, a in names.items() if a.function is f), "sdpa")  # noqa: E731
    monkeypatch.setattr(attention, "_seconds", lambda f, *qkv: took[by_function(f)])
    return took


def test_auto_takes_the_fastest_that_agrees(install, seconds):
    install("flash")
    install("xformers", lambda q, k, v: 1.1 * sdpa(q, k, v))  # fastest, but wrong
    seconds |= {"flash": 0.5, "xformers": 0.1}
    assert choose_attention("auto", CUDA, torch.bfloat16, 64).name == "flash"
    seconds["flash"] = 2.0
    assert choose_attention("auto", CUDA, torch.bfloat16, 64).name == "flash"  # probed once
    attention.fastest.cache_clear()
    assert choose_attention("auto", CUDA, torch.bfloat16, 64) is SDPA


def test_auto_never_takes_a_quantised_backend(install, seconds):
    """Not even one that agrees: the same seed would give another video once the package is installed."""
    install("sage")
    seconds["sage"] = 0.1
    assert choose_attention("auto", CUDA, torch.bfloat16, 64) is SDPA
    assert choose_attention("sage", CUDA, torch.bfloat16, 64).name == "sage"


@pytest.mark.parametrize(
    "took, best",
    [
        ({"flash": 0.9}, "sdpa"),
        ({"flash": 0.86}, "flash"),
        ({"flash": 0.5, "xformers": 0.45}, "flash"),
        ({"flash": 0.5, "xformers": 0.4}, "xformers"),
        ({"flash": 0.9, "xformers": 0.8}, "xformers"),
    ],
)
def test_backends_as_fast_as_each_other_take_no_turns(install, seconds, took, best):
    for name in took:
        install(name)
    seconds |= took
    assert choose_attention("auto", CUDA, torch.bfloat16, 64).name == best


def test_a_barred_backend_is_not_taken_and_says_why(install, seconds):
    install("flash")
    install("xformers")
    seconds |= {"flash": 0.5, "xformers": 0.1}
    barred = {"xformers": "somebody said no"}
    assert choose_attention("auto", CUDA, torch.bfloat16, 64, barred).name == "flash"
    with pytest.raises(
        ValueError, match=r"attention is xformers, and somebody said no;.*: sdpa, flash\. Choose"
    ):
        choose_attention("xformers", CUDA, torch.bfloat16, 64, barred)


def test_auto_refuses_nan_and_what_raises(install, seconds):
    install("flash", lambda q, k, v: torch.full_like(q, float("nan")))
    install("xformers", lambda q, k, v: 1 / 0)
    seconds |= {"flash": 0.1, "xformers": 0.1}
    assert choose_attention("auto", CUDA, torch.float16, 64) is SDPA


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
        assert torch._C._get_sdp_priority_order()[0] == int(getattr(torch.nn.attention.SDPBackend, first))
    assert torch._C._get_sdp_priority_order() == before
    with best_kernels(torch.device("cpu")):
        assert torch._C._get_sdp_priority_order() == before


def test_every_choice_is_one_of_the_nodes():
    assert CHOICES == ("auto", "sdpa", "flash", "sage", "xformers")


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
