"""RoPE against the release's complex128 arithmetic, and RIFLEx against its formula."""

import math

import pytest
import torch
from wan21.wan import rope
from wan21.wan.riflex import riflex, riflex_least_frames
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
    assert torch.equal(apply_rope(x.clone(), table), apply_rope(x.float(), table).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_code_turns_without_complex_numbers(dtype):
    x = torch.randn(2, 24, 3, 128, generator=torch.Generator().manual_seed(2)).to(dtype)
    table = rope_table(axis_frequencies(128), (2, 3, 4))
    compiled = torch.compile(apply_rope, backend="aot_eager", fullgraph=True)(x.clone(), table)
    assert compiled.dtype == dtype
    assert torch.allclose(
        compiled, apply_rope(x.clone(), table), atol=1e-6 if dtype == torch.float32 else 0.02
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_device_without_complex_numbers_turns_the_same(dtype, monkeypatch):
    x = torch.randn(2, 24, 3, 128, generator=torch.Generator().manual_seed(2)).to(dtype)
    table = rope_table(axis_frequencies(128), (2, 3, 4))
    with torch.inference_mode():
        expected = apply_rope(x.clone(), table)
        monkeypatch.setattr(rope, "is_wide", lambda device: False)
        monkeypatch.setattr(rope, "TOKENS_AT_ONCE", 7)
        monkeypatch.setattr(torch, "view_as_complex", None)
        turned = apply_rope(x.clone(), table)
    assert turned.dtype == dtype
    assert torch.allclose(turned, expected, atol=1e-6 if dtype == torch.float32 else 0.02)


def test_with_gradients_the_input_stays():
    x = torch.randn(1, 4, 1, 24, requires_grad=True)
    kept = x.detach().clone()
    apply_rope(x, rope_table(axis_frequencies(24), (1, 2, 2))).sum().backward()
    assert torch.equal(x.detach(), kept) and x.grad.shape == x.shape


def test_axes_share_the_head():
    assert [len(f) for f in axis_frequencies(128)] == [22, 21, 21]


@pytest.mark.parametrize(
    "latent_frames, lowered", [(1, False), (25, False), (45, False), (46, True), (61, True)]
)
def test_riflex_changes_one_frequency_and_never_raises_it(latent_frames, lowered):
    plain = axis_frequencies(128)
    edited = riflex(plain, latent_frames)
    changed = [
        (axis, i) for axis in range(3) for i in range(len(plain[axis])) if edited[axis][i] != plain[axis][i]
    ]
    assert changed == ([(0, 5)] if lowered else [])
    if lowered:
        assert edited[0][5].item() == pytest.approx(0.9 * 2 * math.pi / latent_frames, rel=1e-15)
        assert edited[0][5] < plain[0][5]
    assert riflex_least_frames(plain) == 46


def test_riflex_leaves_its_input_alone():
    plain = axis_frequencies(128)
    kept = [f.clone() for f in plain]
    riflex(plain, 200)
    assert all(torch.equal(a, b) for a, b in zip(plain, kept))


def test_riflex_needs_the_frequency_it_edits():
    with pytest.raises(ValueError, match="frequency 6 of the time axis, and this model has 4"):
        riflex(axis_frequencies(24), 100)


def time_turn(frequencies, frames):
    """Phase of the edited pair, as the table gives it, at each latent frame: [frames], in turns."""
    table = torch.view_as_complex(rope_table(frequencies, (frames, 1, 1)))[:, 0, 5]
    return (table.angle().double() / (2 * math.pi)) % 1


def test_a_long_clip_repeats_without_riflex_and_not_with_it():
    """At 61 latent frames (241 frames) the natural pair turns past its start at 51, RIFLEx's does not."""
    frames, plain = 61, axis_frequencies(128)
    first_return = next(
        t for t in range(1, frames) if time_turn(plain, frames)[t] < time_turn(plain, frames)[t - 1]
    )
    assert first_return == 51
    turns = time_turn(riflex(plain, frames), frames)
    assert (turns.diff() > 0).all() and turns[-1] < 0.9
    # The whole embedding is no more alike there, as the help page says.
    alike = [f[0].mul(51).cos().mean().item() for f in (plain, riflex(plain, frames))]
    assert alike == pytest.approx([0.411, 0.366], abs=1e-3)
