"""A worker's groups in this process: how they meet, and how it leaves them. NCCL is pretended."""

import threading
import time

import pytest
from wan21.workers import rank as ranks
from wan21.workers.wire import Packer


@pytest.fixture
def alone():
    return ranks.Rank(Packer().pack({}).plain(), (), None)


class Group:
    def __init__(self, kind):
        self.kind, self.aborted = kind, 0

    def name(self):
        return self.kind

    def abort(self):
        self.aborted += 1


def test_two_meet(tmp_path):
    met = {}

    def meet(rank):
        met[rank] = ranks._meet(str(tmp_path / "meet"), "one", rank, 2)

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(met[rank].rank(), met[rank].size()) for rank in range(2)] == [(0, 2), (1, 2)]


def test_who_waits_in_vain_is_told_before_any_group_is_made(tmp_path, monkeypatch):
    """A group of NCCL, once begun, would wait without an end."""
    monkeypatch.setattr(ranks, "MEET_SECONDS", 1)
    monkeypatch.setattr(ranks.dist, "ProcessGroupGloo", None)
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        ranks._meet(str(tmp_path / "meet"), "one", 0, 2)
    assert time.monotonic() - began < 10


def test_groups_of_nccl_connect_when_they_meet_and_are_freed_when_left(alone, tmp_path, monkeypatch):
    """Not at the first exchange, behind the loading of a model."""
    connected = []

    class NCCL(Group):
        class Options:
            _timeout = None

        def __init__(self, store, rank, size, options):
            super().__init__("nccl")

        def eager_connect_single_device(self, device):
            connected.append(str(device))

    monkeypatch.setattr(ranks.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ranks.dist, "ProcessGroupNCCL", NCCL, raising=False)
    group = ranks._meet(str(tmp_path / "meet"), "one", 0, 1)
    assert connected == ["cuda:0"]
    gloo = Group("gloo")
    alone.groups = {"one": group, "two": gloo}
    alone.leave()
    assert (group.aborted, gloo.aborted, alone.left, alone.groups) == (1, 0, [gloo], {})
