"""RoPE against the release's complex128 arithmetic."""

import pytest
import torch
from wan21.wan.rope import apply_rope, axis_frequencies, rope_table


def released(x, grid):
    """`rope_params` and `rope_apply` of Wan2.1 `wan/modules/model.py`, written out in complex128."""
    d = x.shape[-1]
    axes = [d - 4 * (d // 6), 2 * (d // 6), 2 * (d // 6)]
    f, h, w = (
        torch.outer(torch.arange(1024).double(), 1 / 10000 ** (torch.arange(0, n, 2).double() / n))
        for n in axes
    )
    rotation = [
        torch.cat([f[i], h[j], w[k]]) for i in range(grid[0]) for j in range(grid[1]) for k in range(grid[2])
    ]
    rotation = torch.polar(torch.ones(1).double(), torch.stack(rotation)[:, None])
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2)


@pytest.mark.parametrize("head_dim", [128, 64, 24])
@pytest.mark.parametrize("grid", [(1, 1, 1), (3, 4, 5), (40, 2, 3)])
def test_equals_the_release(head_dim, grid):
    length = grid[0] * grid[1] * grid[2]
    x = torch.randn(2, length, 3, head_dim, generator=torch.Generator().manual_seed(0))
    table = rope_table(axis_frequencies(head_dim), grid)
    turned = apply_rope(x.clone(), table)
    assert torch.allclose(turned.double(), released(x, grid), atol=1e-5, rtol=1e-5)
    assert turned.dtype == torch.float32


def test_half_precision_is_turned_in_float32():
    x = torch.randn(1, 12, 2, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    table = rope_table(axis_frequencies(128), (3, 2, 2))
    assert torch.equal(apply_rope(x, table), apply_rope(x.float(), table).bfloat16())


def test_with_gradients_the_input_stays():
    x = torch.randn(1, 4, 1, 24, requires_grad=True)
    kept = x.detach().clone()
    apply_rope(x, rope_table(axis_frequencies(24), (1, 2, 2))).sum().backward()
    assert torch.equal(x.detach(), kept) and x.grad.shape == x.shape


def test_axes_share_the_head():
    assert [len(f) for f in axis_frequencies(128)] == [22, 21, 21]
