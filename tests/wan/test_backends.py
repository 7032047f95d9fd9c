"""Attention kernels of other packages: which are found, what they refuse, and what auto takes.

Their packages cannot run here. Modules with the functions' real signatures stand in their place, on a CUDA
device that is not there; `tests/gpu` runs the real ones where they are installed.
"""

import sys
import time
import types
from contextlib import nullcontext

import pytest
import torch
from wan21.wan import backends, probe
from wan21.wan.attention import SDPA, AttentionSize, sdpa
from wan21.wan.backends import (
    BACKENDS,
    CHOICES,
    FEW_KEYS,
    attentions_to_get,
    choose_attention,
    named_attention,
)
from wan21.wan.probe import probe_bytes

CUDA = torch.device("cuda", 0)
BF16 = torch.bfloat16
SIZE = AttentionSize(FEW_KEYS + 3, 2, 64)


def with_sums(q, k, v, is_asked):
    """A result alone, or beside the sums of the softmax."""
    out = sdpa(q, k, v)
    return (out, torch.zeros(q.shape[0], q.shape[2], q.shape[1])) if is_asked else out


def flash2(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """flash_attn 2.8; q, k and v are [B, L, N, D]."""
    return with_sums(q, k, v, return_attn_probs)


def flash3(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    """flash_attn_interface, of the folder hopper/."""
    return with_sums(q, k, v, return_attn_probs)


def flash3_of_2024(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False):
    """The same, which always gave the sums."""
    return with_sums(q, k, v, True)


def flash4(
    q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
    learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
    score_mod_bwd=None, mask_mod=None, aux_tensors=None, block_sparse_tensors=None,
    block_sparse_tensors_bwd=None, return_lse=False,
):  # fmt: skip
    """flash_attn.cute 4.0.0b, whose result is always a pair."""
    return with_sums(q, k, v, True)


def sage(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    """sageattention 2.x."""
    assert tensor_layout == "NHD"
    return with_sums(q, k, v, return_lse)


def kitchen(q, k, v, *, scale=None, attn_mask=None):
    """comfy_kitchen.sage_attention 0.2.40; q, k and v are [B, N, L, D]."""
    assert q.shape[1] < 16 < q.shape[2]
    return sdpa(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def memory_efficient(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    """xformers 0.0.32."""
    return sdpa(query, key, value)


REAL = {
    "flash": flash2,
    "flash3": flash3,
    "flash4": flash4,
    "sage": sage,
    "kitchen": kitchen,
    "xformers": memory_efficient,
}


@pytest.fixture(autouse=True)
def _nothing_remembered():
    yield
    backends._import.cache_clear()
    probe._found.clear()


@pytest.fixture
def install(monkeypatch):
    """`install(name, function)` puts a package of a backend in place."""

    def run(name, function=None):
        *parents, _ = BACKENDS[name].module.split(".")
        for i in range(len(parents)):
            parent = ".".join(parents[: i + 1])
            package = types.ModuleType(parent)
            package.__path__ = []
            monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent, package))
        module = types.ModuleType(BACKENDS[name].module)
        setattr(module, BACKENDS[name].function, function or REAL[name])
        monkeypatch.setitem(sys.modules, BACKENDS[name].module, module)
        backends._import.cache_clear()

    return run


@pytest.fixture
def hopper(monkeypatch):
    """A CUDA device that is not there, whose tensors stay on the CPU. Gives the kernels that were tried."""
    to, tried = torch.Tensor.to, []

    def to_cpu(tensor, *args, **kwargs):
        return to(tensor, *("cpu" if a == CUDA else a for a in args), **kwargs)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(torch.Tensor, "to", to_cpu)
    monkeypatch.setattr(probe, "only_kernels", lambda name: tried.append(name) or nullcontext())
    return tried


@pytest.fixture
def seconds(hopper, monkeypatch):
    """`seconds[name]` is what one call takes, of PyTorch's kernels 1."""
    took = {}
    monkeypatch.setattr(probe, "_seconds", lambda candidate, *_: took.get(candidate.said, 1.0))
    return took


def auto(**how):
    return choose_attention("auto", CUDA, BF16, SIZE, **how)


def test_without_cuda_auto_is_sdpa(install):
    install("flash")
    cpu = torch.device("cpu")
    assert choose_attention("auto", cpu, torch.float32, SIZE) is SDPA
    assert choose_attention("sdpa", cpu, torch.float32, SIZE) is SDPA


@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_not_installed_says_how_to_get_it(name):
    with pytest.raises(
        ValueError,
        match=rf"attention is {name}, and [\w.]+ is not installed; get it with pip .*: sdpa\. Choose",
    ):
        named_attention(name, CUDA, BF16, 128)


def test_what_does_not_load_says_why(monkeypatch, tmp_path):
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"flash_attn does not load \(undefined symbol: _ZN3c10\)"):
        named_attention("flash", CUDA, BF16, 128)


def test_a_package_left_over_from_an_uninstall_ends_no_run(monkeypatch, seconds):
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    assert auto().name == "sdpa"
    with pytest.raises(ValueError, match="flash_attn has no flash_attn_func; get it with pip install"):
        choose_attention("flash", CUDA, BF16, SIZE)


def test_a_package_that_fails_in_its_own_way_ends_no_run(monkeypatch, seconds, tmp_path):
    (tmp_path / "flash_attn.py").write_text("raise RuntimeError('no kernel image')")
    monkeypatch.syspath_prepend(tmp_path)
    assert auto().name == "sdpa"
    with pytest.raises(ValueError, match=r"flash_attn does not load \(no kernel image\)"):
        choose_attention("flash", CUDA, BF16, SIZE)


REFUSED = [
    ("flash", (9, 0), "cpu", BF16, 128, "needs a CUDA device and the model runs on cpu"),
    ("flash", (9, 0), CUDA, torch.float32, 128, "works in float16, bfloat16 and the model in float32"),
    ("sage", (9, 0), CUDA, BF16, 256, "multiples of 8 up to 128 and the model's are 256 wide"),
    ("flash", (9, 0), CUDA, BF16, 36, "multiples of 8 up to 256 and the model's are 36 wide"),
    ("flash4", (7, 5), CUDA, torch.float16, 128, "needs compute capability 8.0 and the device has 7.5"),
    ("flash3", (8, 9), CUDA, BF16, 128, "needs compute capability 9.0 and the device has 8.9"),
    ("flash3", (12, 0), CUDA, BF16, 128, "is for compute capability 9.0 to 9.x and the device has 12.0"),
    ("kitchen", (7, 0), CUDA, torch.float16, 128, "needs compute capability 7.5 and the device has 7.0"),
]


@pytest.mark.parametrize("name, capability, device, dtype, head_dim, message", REFUSED)
def test_what_a_backend_cannot_do_is_named(
    install, hopper, monkeypatch, name, capability, device, dtype, head_dim, message
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    install(name)
    with pytest.raises(ValueError, match=message):
        named_attention(name, torch.device(device), dtype, head_dim)
    if device == CUDA:  # the model of a choice list knows the same
        assert choose_attention("auto", CUDA, dtype, AttentionSize(5, 1, head_dim)).name == "sdpa"


def test_what_could_be_used_is_named(install, hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for name in BACKENDS:
        install(name)
    with pytest.raises(ValueError, match=r"the device has 7\.5.*: sdpa, kitchen, xformers\. Choose"):
        named_attention("flash", CUDA, torch.float16, 128)
    assert named_attention("xformers", CUDA, torch.float16, 128).name == "xformers"


def test_a_build_without_a_kernel_for_the_device_is_refused_before_the_run(install, hopper):
    """comfy-kitchen loads without its CUDA library, FlashAttention 4 on GPUs that it has no kernel for."""

    def fails(q, k, v, **_):
        raise RuntimeError("INT8 attention requires the CUDA extension\nand more")

    install("kitchen", fails)
    with pytest.raises(
        ValueError, match=r"kitchen, and it does not run here \(INT8 attention requires the CUDA extension\);"
    ):
        named_attention("kitchen", CUDA, BF16, 128)


@pytest.mark.parametrize("name", BACKENDS)
def test_each_is_called_in_its_own_way(install, hopper, name):
    install(name)
    chosen = named_attention(name, CUDA, torch.float32 if name == "kitchen" else BF16, 64)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, FEW_KEYS + n, 3, 64, generator=g) for n in (1, 7, 7))
    assert torch.equal(chosen.function(q, k, v), sdpa(q, k, v))
    assert chosen.quantised is (name in ("sage", "kitchen")) and not SDPA.quantised


def test_an_older_flash3_gives_its_sums_too(install, hopper):
    install("flash3", flash3_of_2024)
    q = torch.randn(1, 9, 2, 64)
    assert torch.equal(named_attention("flash3", CUDA, BF16, 64).function(q, q, q), sdpa(q, q, q))


@pytest.mark.parametrize("name", ["sage", "kitchen"])
@pytest.mark.parametrize("keys", [1, 257, 512, FEW_KEYS])
def test_text_and_image_are_not_attended_to_in_8_bits(install, hopper, name, keys):
    install(name, lambda q, k, v, **_: q / 0)
    q, k, v = (torch.randn(1, n, 2, 16) for n in (1560, keys, keys))
    assert torch.equal(named_attention(name, CUDA, torch.float16, 16).function(q, k, v), sdpa(q, k, v))


# --- the fastest --------------------------------------------------------------------------------------


def test_each_is_tried_at_the_size_of_the_run(install, hopper, monkeypatch):
    """PyTorch's kernels one by one, in the order that is likely, and a package after them."""
    seen = []
    install("flash", lambda q, k, v: seen.append((q.shape, q.dtype, k.shape)) or sdpa(q, k, v))
    room = []
    monkeypatch.setattr(probe, "CALLS", 1)
    chosen = auto(make_room=room.append)
    assert list(dict.fromkeys(hopper)) == ["cuDNN", "flash", "efficient"]
    shape = torch.Size((1, SIZE.tokens, SIZE.heads, SIZE.head_dim))
    assert set(seen) == {(shape, BF16, shape)}
    assert [name for name, _ in chosen.seconds] == ["sdpa cuDNN", "sdpa flash", "sdpa efficient", "flash"]
    assert room == [probe_bytes(BF16, SIZE)]
    auto(make_room=room.append)
    assert len(room) == 1  # found once


@pytest.mark.parametrize(
    "took, best, kernel",
    [
        ({}, "sdpa", "cuDNN"),
        ({"sdpa flash": 0.9}, "sdpa", "cuDNN"),
        ({"sdpa flash": 0.86}, "sdpa", "flash"),
        ({"sdpa efficient": 0.5}, "sdpa", "efficient"),
        ({"flash": 0.9}, "sdpa", "cuDNN"),
        ({"flash3": 0.86}, "flash3", None),
        ({"sdpa flash": 0.5, "flash4": 0.45}, "sdpa", "flash"),
        ({"flash": 0.5, "xformers": 0.45}, "flash", None),
        ({"flash3": 0.5, "xformers": 0.4}, "xformers", None),
        ({"flash": 0.9, "xformers": 0.8}, "xformers", None),
    ],
)
def test_backends_as_fast_as_each_other_take_no_turns(install, seconds, took, best, kernel):
    for name in ("flash", "flash3", "flash4", "xformers"):
        install(name)
    seconds |= took
    chosen = auto()
    assert (chosen.name, chosen.kernel) == (best, kernel)
    seconds |= {"flash": 0.01}
    assert auto() is chosen  # timed once
    alone = choose_attention("sdpa", CUDA, BF16, SIZE)
    assert alone.name == "sdpa" and alone.kernel in ("cuDNN", "flash", "efficient")


def test_the_time_is_measured(install, hopper, monkeypatch):
    """An idle device is slow at first: the first call of all is not what counts."""
    monkeypatch.setattr(probe, "SECONDS", 0.005)
    calls = []

    def slow(q, k, v, **_):
        calls.append(1)
        time.sleep(0.02)
        return sdpa(q, k, v)

    install("flash3", slow)
    install("xformers", lambda *qkv: time.sleep(0.001) or sdpa(*qkv))
    took = dict(auto().seconds)
    assert len(calls) == 1 + probe.TURNS
    assert 0.02 <= took["flash3"] < 0.2 and 0.001 <= took["xformers"] < took["flash3"]


def test_auto_never_takes_a_quantised_backend(install, seconds):
    """Not even one that agrees: the same seed would give another video once the package is installed."""
    for name in ("sage", "kitchen"):
        install(name)
        seconds[name] = 0.1
        assert auto().name == "sdpa"
        assert choose_attention(name, CUDA, BF16, SIZE).name == name


def test_a_barred_backend_is_not_taken_and_says_why(install, seconds):
    install("flash")
    install("xformers")
    seconds |= {"flash": 0.5, "xformers": 0.1}
    barred = {"xformers": "somebody said no"}
    assert auto(barred=barred).name == "flash"
    with pytest.raises(
        ValueError, match=r"attention is xformers, and somebody said no;.*: sdpa, flash\. Choose"
    ):
        choose_attention("xformers", CUDA, BF16, SIZE, barred)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda q, k, v: 1.1 * sdpa(q, k, v),
        lambda q, k, v: sdpa(q, k[:, :-3], v[:, :-3] + 0.1),
        lambda q, k, v: torch.full_like(q, float("nan")),
        lambda q, k, v: 1 / 0,
        lambda q, k, v: sdpa(q, k, v)[:, :-1],
        lambda q, k, v: None,
    ],
)
def test_auto_takes_nothing_that_errs(install, seconds, wrong):
    install("flash", wrong)
    install("xformers")
    seconds |= {"flash": 0.1, "xformers": 0.5}
    assert auto().name == "xformers"


def test_what_fails_when_it_is_called_again_is_left_out(install, hopper, monkeypatch):
    monkeypatch.setattr(probe, "CALLS", 1)
    calls = []

    def once(q, k, v, **_):
        calls.append(1)
        return sdpa(q, k, v) if len(calls) == 1 else 1 / 0

    install("flash3", once)
    chosen = auto()
    assert chosen.name == "sdpa" and "flash3" not in dict(chosen.seconds) and len(chosen.seconds) == 3


def test_the_first_kernel_may_err(hopper, seconds, monkeypatch):
    """What the others give is compared with the first that gives numbers."""
    spoilt = probe.Candidate(
        "sdpa cuDNN", probe.replace(SDPA, function=lambda q, k, v: q / 0, kernel="cuDNN")
    )
    others = probe._of_pytorch
    monkeypatch.setattr(probe, "_of_pytorch", lambda device: [spoilt, *others(device)[1:]])
    seconds |= {"sdpa cuDNN": 0.01}
    assert auto().kernel == "flash"


def test_without_room_for_a_kernel_the_next_run_tries_again(install, seconds):
    """Else it would be left out for the process."""
    full = [1]

    def needs_room(q, k, v, **_):
        if full:
            raise torch.OutOfMemoryError("none left")
        return sdpa(q, k, v)

    install("flash3", needs_room)
    seconds |= {"flash3": 0.5}
    assert auto() is SDPA
    full.clear()
    assert auto().name == "flash3"


def test_kernels_that_a_device_lacks_are_left_out(hopper, seconds, monkeypatch):
    """Here the CPU has flash alone. cuDNN that errs on such lengths is not even tried."""
    from wan21.wan.attention import only_kernels

    monkeypatch.setattr(probe, "only_kernels", only_kernels)
    assert auto() == probe.replace(SDPA, kernel="flash")
    probe._found.clear()
    monkeypatch.setattr(probe, "only_kernels", lambda name: hopper.append(name) or nullcontext())
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91500)
    assert auto().kernel == "flash" and set(hopper) == {"flash", "efficient"}


def test_without_room_nothing_is_tried_and_the_next_run_tries_again(seconds, monkeypatch):
    random = probe._random

    def full(*_):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(probe, "_random", full)
    assert auto() is SDPA
    monkeypatch.setattr(probe, "_random", random)
    assert auto().kernel == "cuDNN"


# --- what is not installed ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "capability, took, told",
    [
        ((9, 0), {"sdpa cuDNN": 0.6}, "sage (8 bits, used when named) about 1.4 times as fast"),
        ((9, 0), {"sdpa cuDNN": 3.0}, "flash3 (exact) about 1.8 times as fast: pip install flash-attn-3"),
        ((9, 0), {"sdpa cuDNN": 0.4}, ""),
        ((8, 9), {}, "sage (8 bits, used when named) about 3.0 times as fast: pip install sageattention"),
        ((12, 0), {}, ""),  # no figures
    ],
)
def test_what_a_missing_package_would_give_here(seconds, monkeypatch, capability, took, told):
    """A published ratio to the flash kernel, times what that takes here beside the one in use."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    seconds |= took
    found = attentions_to_get(auto(), CUDA, BF16, 64)
    assert told in found and bool(told) == bool(found)
    if capability == (8, 9):
        assert "flash3" not in found and "flash4" not in found


def test_of_what_is_installed_or_barred_nothing_is_told(install, seconds):
    seconds["sdpa cuDNN"] = 3.0
    install("flash3")
    found = attentions_to_get(auto(), CUDA, BF16, 64, {"flash4": "somebody said no"})
    assert "flash" not in found and "sage" in found
    assert attentions_to_get(SDPA, CUDA, BF16, 64) == ""  # nothing was timed
    assert attentions_to_get(named_attention("flash3", CUDA, BF16, 64), CUDA, BF16, 64) == ""


def test_every_choice_is_one_of_the_nodes():
    assert CHOICES == ("auto", "sdpa", "flash", "flash3", "flash4", "sage", "kitchen", "xformers")
