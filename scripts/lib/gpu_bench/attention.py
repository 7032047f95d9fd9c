"""Self-attention and cross-attention of one pass in every way that this machine has."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .bench import Bench, Missing, Race, Row

SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cuDNN": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
QUERIES_COMPARED = 64  # over the whole length
AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]


def usable_backends(bench: Bench) -> dict[str, AttentionFn]:
    """Backends of wan/backends.py that can be called here, less sdpa."""
    from wan21.wan.backends import BACKENDS, named_attention
    from wan21.wan.refusal import Refusal

    found = {}
    for name in BACKENDS:
        try:
            found[name] = named_attention(name, bench.device, bench.dtype, bench.size.config.head_dim)
        except Refusal:
            continue
    return {name: attention.function for name, attention in found.items()}


def rows(bench: Bench) -> Iterator[Row]:
    """Ours, which is sdpa with its kernels in our order, comes first; errors are from exact attention."""
    size = bench.size
    shape = (1, size.tokens, size.config.num_heads, size.config.head_dim)
    q, k, v = (bench.random(*shape) for _ in range(3))
    k += 2 * k[:, :1]  # keys of a real model have a mean, which 8 bits must cope with
    some = torch.arange(0, size.tokens, max(1, size.tokens // QUERIES_COMPARED), device=bench.device)
    expected = exact(q[:, some], k, v)

    def off(result: Tensor) -> float:
        return ((result[:, some].float() - expected).norm() / expected.norm()).item()

    work = 4 * size.tokens**2 * size.config.dim / 1e12
    calls = _calls(bench)
    makers = {name: partial(_bound, make, q, k, v) for name, make in calls.items()}
    notes = dict.fromkeys(makers, "error from exact attention")
    found = bench.race(Race(makers, "ms", work=work, exact=off, notes=notes))
    yield from found
    contexts = [
        tuple(bench.random(1, tokens, *shape[2:]) for _ in range(2))
        for tokens in (size.text_tokens, size.image_tokens)
    ]
    makers = {
        f"{row.name}, text and image": partial(_cross, calls[row.name], q, contexts)
        for row in found
        if not row.skipped
    }
    if makers:
        yield from bench.race(Race(makers, "ms"))


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v in float32, of [B, L, N, D]."""
    q, k, v = (t.float() for t in (q, k, v))
    weights = torch.einsum("bqnd,bknd->bnqk", q, k).mul_(q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bnqk,bknd->bqnd", weights, v)


def _bound(make, q, k, v):
    return partial(make(), q, k, v)


def _cross(make, q, contexts):
    function = make()
    return lambda: sum(function(q, *context) for context in contexts)


def _calls(bench: Bench) -> dict[str, Callable[[], AttentionFn]]:
    """By name, what gives the function or raises `Missing`."""
    from wan21.wan.attention import best_kernels, sdpa
    from wan21.wan.backends import BACKENDS, named_attention
    from wan21.wan.refusal import Refusal

    def in_our_order(q, k, v):
        with best_kernels(bench.device):
            return sdpa(q, k, v)

    def with_kernel(kernel):
        def call(q, k, v):
            with sdpa_kernel(kernel):
                return sdpa(q, k, v)

        if not bench.on_cuda:
            raise Missing("PyTorch's kernels are chosen on CUDA alone")
        return call

    def of_the_pack(name):
        try:
            head_dim = bench.size.config.head_dim
            return named_attention(name, bench.device, bench.dtype, head_dim).function
        except Refusal as refusal:
            raise Missing(refusal.problem) from refusal

    calls: dict[str, Callable[[], AttentionFn]] = {"ours, sdpa": lambda: in_our_order}
    calls |= {name: partial(with_kernel, kernel) for name, kernel in SDPA.items()}
    calls |= {name: partial(of_the_pack, name) for name in BACKENDS}
    return calls
