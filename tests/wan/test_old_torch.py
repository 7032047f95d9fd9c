"""On a PyTorch that lacks what newer ones have."""

import importlib

import pytest
import torch
from helpers_dit import T2V
from wan21.wan import out_of_memory
from wan21.wan.memory import plans_from
from wan21.wan.option import Call
from wan21.wan.retry import WithinMemory

OUT_OF_MEMORY = torch.cuda.OutOfMemoryError


class Fails:
    """A denoiser whose first `times` calls raise."""

    config = T2V

    def __init__(self, error, times=1):
        self.error, self.times = error, times

    def embed_time(self, timesteps):
        raise NotImplementedError

    def predict(self, x, timestep, call):
        self.times -= 1
        if self.times >= 0:
            raise self.error
        return {"cond": x}


@pytest.fixture
def _before_2_5(monkeypatch):
    monkeypatch.delattr(torch, "OutOfMemoryError")
    importlib.reload(out_of_memory)


def predict(denoiser):
    said = []
    guarded = WithinMemory(denoiser, plans_from(True), lambda: False, said.append)
    return guarded.predict(torch.ones(1), 1.0, Call(("cond",))), said


@pytest.mark.usefixtures("_before_2_5")
def test_out_of_memory_is_known_by_its_older_name():
    assert out_of_memory.is_out_of_memory(OUT_OF_MEMORY("none left"))
    _, said = predict(Fails(OUT_OF_MEMORY("none left")))
    assert said == [
        "out of memory in step 1, which was done again; from there on: passes together, tokens in 4 parts"
    ]
    with pytest.raises(OUT_OF_MEMORY, match="none left This was with the plan of least memory"):
        predict(Fails(OUT_OF_MEMORY("none left"), times=99))


@pytest.mark.usefixtures("_before_2_5")
def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        predict(Fails(RuntimeError("shapes do not fit")))
