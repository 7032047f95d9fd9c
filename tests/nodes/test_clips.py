"""Wan21JoinClips in the host: exact lengths and frames, refusals before work, colours as the host's node."""

import comfy.model_management
import pytest
import torch
from wan21.host import memory as host_memory
from wan21.nodes.clips import Wan21JoinClips
from wan21.wan.refusal import Refusal


def frames(count, height=24, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.3 + 0.4 * torch.rand(count, height, width, 3, generator=generator)


def join(images_1, images_2, overlap=1, blend="linear", match_color=False):
    return Wan21JoinClips.execute(images_1, images_2, overlap, blend, match_color).result[0]


@pytest.mark.parametrize("counts", [(9, 9), (5, 1), (1, 5), (1, 1), (3, 81)])
@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("blend", ["linear", "smooth", "cut"])
def test_length(counts, overlap, blend):
    first, second = (frames(count, seed=count) for count in counts)
    found = join(first, second, overlap, blend)
    assert len(found) == sum(counts) - overlap
    start = counts[0] - overlap
    assert torch.equal(found[:start], first[:start]) and torch.equal(found[counts[0] :], second[overlap:])


def test_inputs_are_left_alone():
    first, second = frames(5), frames(5, seed=1)
    copies = first.clone(), second.clone()
    found = join(first, second, 5, "linear", True)
    found.zero_()
    assert torch.equal(first, copies[0]) and torch.equal(second, copies[1])


def test_three_clips_are_joined_from_left_to_right():
    a, b, c = (frames(9, seed=i) for i in range(3))
    found = join(join(a, b, 5, "cut"), c, 5, "cut")
    assert torch.equal(found, torch.cat([a, b[5:], c[5:]]))


def test_colours_equal_the_hosts_node():
    """Over one frame, where the host takes the same statistics."""
    from comfy_extras.nodes_post_processing import ColorTransfer

    first, second = frames(4), 0.9 * frames(6, seed=1) + 0.02
    baseline = {"source_stats": "target_frame", "target_index": 0}
    expected = ColorTransfer.execute(second, first[-1:], "reinhard_lab", baseline).result[0]
    found = join(first, second, 1, "cut", match_color=True)
    assert torch.allclose(found[4:], expected[1:], atol=1e-5)
    assert (found[4:] - second[1:]).abs().max() > 0.01


def test_colours_over_several_frames_equal_the_hosts_pooled():
    from comfy_extras.nodes_post_processing import ColorTransfer

    first, second = frames(6), 0.9 * frames(5, seed=1) + 0.02
    expected = ColorTransfer.execute(second, first[1:], "reinhard_lab", {"source_stats": "uniform"}).result[0]
    found = join(first, second, 5, "linear", match_color=True)
    weights = (torch.arange(5) + 1)[:, None, None, None] / 6
    assert torch.allclose(found[1:], torch.lerp(first[1:], expected, weights), atol=1e-5)


@pytest.mark.parametrize(
    "images_1, images_2, options, said",
    [
        (
            frames(3),
            frames(3, 24, 40),
            {},
            r"images_1 is 32x24 and images_2 is 40x24; .* one size.*ImageScale",
        ),
        (frames(3), frames(3, 32, 24), {}, "images_1 is 32x24 and images_2 is 24x32"),
        (frames(3), frames(9), {"overlap": 4}, r"overlap is 4 and images_1 holds 3 frame.*Set overlap to 3"),
        (frames(9), frames(3), {"overlap": 4}, "overlap is 4 and images_2 holds 3 frame"),
        (frames(3), frames(3), {"overlap": -1}, "overlap is -1"),
        (frames(3), frames(3), {"overlap": 4097}, "overlap is 4097"),
        (frames(3), frames(3), {"blend": "cross"}, "blend is 'cross'; it is one of linear, smooth, cut"),
        (frames(3), frames(3), {"overlap": 0, "match_color": True}, "match_color is on and overlap is 0"),
        (frames(3)[..., :1], frames(3), {}, r"images_1 has 1 channel"),
        (frames(3), torch.ones(3, 24, 32, 4), {}, "images_2 has 4 channel.*SplitImageWithAlpha"),
        (frames(3)[0], frames(3), {}, r"images_1 has the shape \[24, 32, 3\]"),
        (frames(3), frames(3)[:0], {}, r"images_2 has the shape \[0, 24, 32, 3\]"),
    ],
)
def test_refused(images_1, images_2, options, said):
    with pytest.raises(ValueError, match=rf"Wan21JoinClips.*{said}"):
        join(images_1, images_2, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_broken_pixels_are_named(which, value):
    clips = [frames(3), frames(4)]
    clips[which][2, 5, 6, 1] = value
    with pytest.raises(ValueError, match=rf"frame 2 of images_{which + 1} holds NaN"):
        join(*clips)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"overlap": 0, "match_color": True}, "match_color is on and overlap is 0"),
        ({"overlap": -1}, "overlap is -1"),
        ({"blend": "none"}, "blend is 'none'"),
    ],
)
def test_refused_when_queued(options, said):
    with pytest.raises(Refusal, match=said):
        Wan21JoinClips.validate_inputs(**options)


def test_linked_settings_are_judged_when_they_are_known():
    assert Wan21JoinClips.validate_inputs(overlap=None, match_color=True) is True
    assert Wan21JoinClips.validate_inputs(overlap=0, match_color=None, blend="cut") is True


def test_no_memory_is_refused_before_work(monkeypatch):
    monkeypatch.setattr(
        host_memory.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 0, "total": 0})
    )
    monkeypatch.setattr(host_memory.psutil, "swap_memory", lambda: type("Swap", (), {"free": 0}))
    with pytest.raises(ValueError, match=r"17 frames of 32x24 take .* host memory"):
        join(frames(9), frames(9))


def test_limited_colours_are_told(caplog):
    with caplog.at_level("INFO"):
        join(frames(2), torch.zeros(2, 24, 32, 3), 1, "cut", match_color=True)
    assert "Wan21JoinClips the colours of images_2 are further from those of images_1" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        join(frames(2), frames(2, seed=1), 1, "cut", match_color=True)
    assert "further" not in caplog.text


@pytest.mark.parametrize("match_color", [False, True])
def test_cancel_stops_it(match_color):
    comfy.model_management.interrupt_current_processing(True)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            join(frames(3), frames(3), match_color=match_color)
    finally:
        comfy.model_management.interrupt_current_processing(False)


def test_the_result_is_the_only_large_thing_made():
    from torch.profiler import ProfilerActivity, profile

    first, second = frames(40), frames(40, seed=1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as made:
        result = join(first, second, 5, "linear")
    sizes = [event.self_cpu_memory_usage for event in made.events()]
    assert [size for size in sizes if size > 4 * result[0].nbytes] == [result.nbytes]
