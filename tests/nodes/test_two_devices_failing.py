"""A pass that fails on one of several devices: the others stop within a block, and one error comes out."""

import gc
import threading
import time
import weakref

import comfy.model_management as management
import pytest
import torch
from helpers_devices import several_devices, unmapped
from test_memory import with_attention
from wan21 import host
from wan21.host.devices import patchers_of


@pytest.fixture
def job(files, prompts, monkeypatch):
    """(MODEL on one device, the same on two, the rest of a job)."""
    model = unmapped(files["t2v"])
    with several_devices(monkeypatch) as split:
        yield model, split(model), (*prompts, {"samples": torch.zeros(1, 16, 2, 4, 6)})


def blocks_of(model):
    return [one.model.diffusion_model.blocks for one in patchers_of(model)]


class Meeting:
    """One pass waits in its first block until the other has failed in its own."""

    def __init__(self, model, failure, failing=1):
        self.walked = []
        self.inside, self.failed = threading.Event(), threading.Event()
        self.failure = failure
        blocks = blocks_of(model)
        self.handles = [blocks[failing][0].register_forward_pre_hook(self.fail)]
        for i, block in enumerate(blocks[1 - failing]):
            self.handles.append(block.register_forward_pre_hook(lambda *_, i=i: self.wait(i)))

    def fail(self, *_):
        assert self.inside.wait(10)
        self.failed.set()
        self.failure()

    def wait(self, i):
        self.walked.append(i)
        self.inside.set()
        assert self.failed.wait(10)
        until = time.monotonic() + 10
        while management.processing_interrupted() and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(1)  # the failing thread is on its way out

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def broken():
    raise LookupError("a node's patch is broken")


FAILURES = {
    "cancel": (
        lambda: management.interrupt_current_processing(True),
        management.InterruptProcessingException,
    ),
    "error": (broken, LookupError),
}


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("failure, raised", FAILURES.values(), ids=FAILURES)
def test_all_stop_within_a_block_and_nothing_stays(job, sample, failure, raised, failing):
    model, two, rest = job
    plain, _ = sample(model, *rest)
    threads = threading.active_count()
    with Meeting(two, failure, failing) as meeting, pytest.raises(raised):
        sample(two, *rest)
    assert meeting.walked == [0]  # of two blocks
    assert not management.processing_interrupted()
    assert threading.active_count() == threads
    again, _ = sample(two, *rest)
    assert torch.equal(again["samples"], plain["samples"])


def test_a_cancel_outranks_running_out_of_memory(job, sample):
    """The host tells a cancel once; a step that ran out of memory is done again."""
    _, two, rest = job
    blocks = blocks_of(two)
    gate = threading.Barrier(2, timeout=10)

    def run_out(*_):
        gate.wait()
        raise torch.OutOfMemoryError("no room")

    def cancel(*_):
        gate.wait()
        raise management.InterruptProcessingException

    handles = [
        blocks[0][0].register_forward_pre_hook(run_out),
        blocks[1][0].register_forward_pre_hook(cancel),
    ]
    with pytest.raises(management.InterruptProcessingException):
        sample(two, *rest)
    for handle in handles:
        handle.remove()


class RunsOutIn:
    """Attention of the host that runs out of memory in one pass, at its calls named; only self-attention."""

    def __init__(self, chunk, *calls):
        self.chunk, self.at, self.calls = chunk, calls, 0

    def __call__(self, function, q, k, *args, **kwargs):
        if q.shape == k.shape and kwargs["transformer_options"]["cond_or_uncond"] == [self.chunk]:
            self.calls += 1
            if self.calls in self.at:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return function(q, k, *args, **kwargs)


@pytest.fixture
def room_made(monkeypatch):
    """Devices on which room was made."""
    seen = []
    monkeypatch.setattr(
        host.sampling, "make_room", lambda patcher: bool(seen.append(str(patcher.load_device)))
    )
    return seen


@pytest.mark.parametrize("chunk, device", [(0, "cpu"), (1, "cpu:0")])
@pytest.mark.parametrize("options", [{}, dict(cache__multiplier=2.0, cache__profile="t2v_1.3b", steps=6)])
def test_running_out_on_one_goes_on_from_the_same_step(job, sample, room_made, options, chunk, device):
    _, two, rest = job
    options = {"steps": 4} | options
    plain, _ = sample(with_attention(two, RunsOutIn(chunk)), *rest, **options)
    ours, report = sample(with_attention(two, RunsOutIn(chunk, 3)), *rest, **options)  # two blocks a pass
    assert torch.allclose(ours["samples"], plain["samples"], rtol=1e-4, atol=1e-5)
    assert report.count("out of memory") == 1
    step = 4 if "cache__multiplier" in options else 2
    said = "which was done again; from there on: each pass on its own device, tokens in 4 parts"
    assert f"note: out of memory on {device} in step {step}, {said}" in report
    assert room_made == [device]


def test_running_out_for_good_ends_and_names_the_device(job, sample, room_made):
    _, two, rest = job
    always = RunsOutIn(1, *range(100))
    with pytest.raises(torch.OutOfMemoryError, match=r"cpu:0: CUDA out.*plan of least memory \(each pass on"):
        sample(with_attention(two, always), *rest)
    assert always.calls == 2  # each plan once
    assert room_made == ["cpu:0"] * 2


def test_a_failed_step_holds_no_tensors(job, sample, monkeypatch):
    """When room is made, what the failed step had on the devices is gone."""
    _, two, rest = job
    kept, alive = [], []

    class Remembers(RunsOutIn):
        def __call__(self, function, q, k, *args, **kwargs):
            kept.append(weakref.ref(q))
            return super().__call__(function, q, k, *args, **kwargs)

    def count(patcher):
        alive.append(sum(tensor() is not None for tensor in kept))
        return False

    monkeypatch.setattr(host.sampling, "make_room", count)
    gc.disable()
    try:
        sample(with_attention(two, Remembers(1, 3)), *rest, steps=4)
    finally:
        gc.enable()
    assert alive == [0]
