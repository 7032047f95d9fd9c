"""One call of the DiT over two to four processes (gloo) against the same call in one."""

from dataclasses import replace

import pytest
import torch
from helpers import relative
from helpers_ranks import LAYERS, Case, Ranks, call, forward, leave, sample_together, sampled
from hypothesis import given, settings
from hypothesis import strategies as st
from wan21.wan.guidance import CfgZeroStar, ZeroInit
from wan21.wan.nag import Nag
from wan21.wan.sample import SampleJob
from wan21.wan.shard import SPLITS, Group, groups, groups_on, shares
from wan21.wan.skip_layer import SkipLayers
from wan21.wan.teacache import Profile, TeaCache

pytestmark = pytest.mark.xdist_group("ranks")  # one set of processes for all


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()


@pytest.fixture(autouse=True, scope="module")
def _inference():
    with torch.inference_mode():
        yield


def sent(case, passes, size, place):
    """Bytes that the rank at `place` of a group of this size sends: what it has of which others lack."""
    e = torch.finfo(getattr(torch, case.dtype)).bits // 8
    rows, heads = shares(case.tokens, size)[place], shares(case.heads, size)[place]
    block = 3 * rows * (case.heads - heads) + heads * (case.tokens - rows)
    return passes * case.samples * (LAYERS * block * case.head_dim * e + rows * 64 * (size - 1) * 4)


def error(results, case):
    """The largest relative error of a rank; all passes are there, bytes are as many as the formula's."""
    teams = groups(len(results), len(case.names), case.split)
    assert {i for passes, _, _ in results for i in passes} == set(range(len(case.names)))
    expected = forward(case)
    for team in teams:
        for place, number in enumerate(team.ranks):
            passes, v, counted = results[number]
            assert passes == team.passes
            assert counted == sent(case, len(passes), len(team.ranks), place)
            assert (v == results[team.ranks.start][1]).all()  # all of a group have the same bits
    return max(relative(torch.from_numpy(v), expected[list(passes)]) for passes, v, _ in results)


cases = st.builds(
    Case,
    heads=st.integers(1, 6),
    head_dim=st.sampled_from([8, 12, 16]),
    latent=st.tuples(st.integers(1, 3), st.sampled_from([2, 4, 6]), st.sampled_from([2, 4, 10])),
    samples=st.integers(1, 2),
    names=st.sampled_from([("cond",), ("cond", "uncond"), ("cond", "uncond", "cond2")]),
    parts=st.integers(1, 4),
    image=st.booleans(),
    dtype=st.just("float32"),
    split=st.sampled_from(SPLITS),
)


@settings(max_examples=30)
@given(st.integers(2, 4), cases)
def test_ranks_give_what_one_process_gives(ranks, count, case):
    assert error(ranks(count, call, case), case) < 1e-5


ODD = Case(heads=5, latent=(5, 14, 14))  # 245 tokens


@pytest.mark.parametrize("count, case", [(2, ODD), (3, ODD), (4, replace(ODD, heads=3, split="auto"))])
def test_a_rank_with_wrong_positions_is_found(ranks, count, case):
    """A control: all is as above, but each rank turns its tokens as if they were the first."""
    assert error(ranks(count, call, case), case) < 1e-5
    assert error(ranks(count, call, case, True), case) > 1e-3


def test_sixteen_bits(ranks):
    case = replace(ODD, dtype="bfloat16")
    assert error(ranks(3, call, case), case) < 5e-3


def test_bytes_of_even_shares_are_those_of_the_paper(ranks):
    """4*(L/n)*D*(n - 1)/n numbers a block."""
    case = Case(heads=4, latent=(4, 8, 8), names=("cond",))  # 64 tokens
    _, _, counted = ranks(4, call, case)[0]
    blocks = LAYERS * 4 * (64 // 4) * case.config.dim * 3 // 4 * 4  # of float32
    assert counted == blocks + 3 * 64 // 4 * 64 * 4


PROFILE = Profile("straight", (1.0, 0.0))
RUNS = {
    "plain": (SampleJob(4, 4.0), {}),
    "all options": (
        SampleJob(
            6,
            4.0,
            options=(TeaCache(2.0, 0, PROFILE), CfgZeroStar(), ZeroInit(1), SkipLayers((1,)), Nag(4.0)),
        ),
        {"samples": 2},
    ),
    "NAG alone": (SampleJob(3, 1.0, options=(Nag(4.0),)), {"parts": 3}),
    "TeaCache in parts": (
        SampleJob(6, 4.0, solver="dpm++", options=(TeaCache(2.0, 0, PROFILE),)),
        {"parts": 2},
    ),
    "two experts": (SampleJob(4, 4.0, boundary=0.9, low_noise_guidance_scale=1.0), {"image": False}),
    "two experts, options": (
        SampleJob(8, 3.0, solver="euler", boundary=0.875, options=(TeaCache(1.5, 0, PROFILE), Nag(4.0))),
        {},
    ),
}


@pytest.mark.parametrize("count, split", [(2, "auto"), (2, "sequence"), (3, "guidance"), (4, "auto")])
@pytest.mark.parametrize("run", RUNS)
def test_a_run_over_ranks_is_that_of_one_process(ranks, run, count, split):
    job, kind = RUNS[run]
    case = Case(heads=3, latent=(3, 6, 10), split=split, **kind)
    latent, computed = sampled(case, job)
    for got, its_computed in ranks(count, sample_together, case, job):
        assert relative(torch.from_numpy(got), torch.from_numpy(latent)) < 1e-5
        assert its_computed == computed


def test_a_call_that_cannot_end_is_left(ranks):
    """A rank that does not come keeps the others only until their `check` raises; a new group then works."""
    assert ranks(3, leave, 0.05) == ["stopped", "stopped", "absent"]
    assert error(ranks(3, call, ODD), ODD) < 1e-5


@pytest.mark.parametrize(
    "ranks, passes, split, expected",
    [
        (1, 2, "auto", [((0, 1), (0, 2))]),
        (2, 1, "guidance", [((0, 2), (0, 1))]),
        (2, 2, "auto", [((0, 1), (0, 1)), ((1, 2), (1, 2))]),
        (3, 2, "auto", [((0, 3), (0, 2))]),
        (3, 2, "guidance", [((0, 2), (0, 1)), ((2, 3), (1, 2))]),
        (4, 2, "auto", [((0, 2), (0, 1)), ((2, 4), (1, 2))]),
        (8, 2, "sequence", [((0, 8), (0, 2))]),
        (2, 3, "guidance", [((0, 1), (0, 2)), ((1, 2), (2, 3))]),
        (6, 3, "auto", [((0, 2), (0, 1)), ((2, 4), (1, 2)), ((4, 6), (2, 3))]),
    ],
)
def test_groups(ranks, passes, split, expected):
    assert groups(ranks, passes, split) == [Group(range(*r), range(*p)) for r, p in expected]


@pytest.mark.parametrize(
    "machines, passes, split, expected",
    [
        ([3], 2, "guidance", [((0, 2), (0, 1)), ((2, 3), (1, 2))]),  # as on one machine
        ([1, 1], 2, "auto", [((0, 1), (0, 1)), ((1, 2), (1, 2))]),
        ([2, 2], 2, "auto", [((0, 2), (0, 1)), ((2, 4), (1, 2))]),
        ([2, 2], 1, "auto", [((0, 2), (0, 1))]),  # without guidance the others have nothing to do
        ([2, 2], 2, "sequence", [((0, 2), (0, 2))]),
        ([2, 1], 2, "auto", [((0, 1), (0, 1)), ((1, 2), (1, 2))]),  # no faster with the third
        ([2, 1], 2, "guidance", [((0, 2), (0, 1)), ((2, 3), (1, 2))]),
        ([8, 1], 2, "auto", [((0, 4), (0, 1)), ((4, 8), (1, 2))]),  # one would keep eight waiting
        ([2, 2, 2], 3, "auto", [((0, 2), (0, 1)), ((2, 4), (1, 2)), ((4, 6), (2, 3))]),
    ],
)
def test_no_group_crosses_machines(machines, passes, split, expected):
    assert groups_on(machines, passes, split) == [Group(range(*r), range(*p)) for r, p in expected]


@given(st.integers(1, 9), st.integers(1, 4), st.sampled_from(SPLITS))
def test_on_one_machine_all_is_as_without_others(ranks, passes, split):
    assert groups_on([ranks], passes, split) == groups(ranks, passes, split)


@given(st.integers(1, 9), st.integers(1, 4), st.sampled_from(SPLITS))
def test_each_rank_has_passes_and_each_pass_has_ranks(ranks, passes, split):
    teams = groups(ranks, passes, split)
    assert [r for team in teams for r in team.ranks] == [*range(ranks)]
    assert [p for team in teams for p in team.passes] == [*range(passes)]
    assert all(team.ranks and team.passes for team in teams)
