"""scripts/attack_jobs.py, a little of it: it finds nothing, and finds what is put there for it."""

import asyncio
import contextlib

import attack_jobs
import pytest
from aiohttp import web
from helpers_server import FakeHost, serve
from wan21.server.access import Gate
from wan21.server.routes import Routes


class PlayingHost(FakeHost):
    """Runs what is queued."""

    def put(self, prompt_id, graph, outputs, created_at, *of_a_fleet):
        super().put(prompt_id, graph, outputs, created_at)
        self.playing = asyncio.get_running_loop().create_task(self._unless_cancelled(prompt_id))

    async def _unless_cancelled(self, prompt_id):
        with contextlib.suppress(ValueError):  # of a job that is no longer there
            await self.play(prompt_id)


@pytest.fixture
def attack(tmp_path, checkpoints, monkeypatch):
    """Attacks an API with a few requests. -> (wrong answers, what one key saw of the other)"""
    for name, value in attack_jobs.SETTINGS.items():
        monkeypatch.setenv(name, value)

    def run():
        with serve(PlayingHost(tmp_path, checkpoints)) as api:
            return attack_jobs.attack(api.url, inputs=3, others=4)

    return run


def test_it_finds_nothing(attack):
    assert attack() == ([], [])


def test_it_finds_a_key_that_sees_the_other(attack, monkeypatch):
    monkeypatch.setattr(Gate, "owner", lambda self, request: "everybody")
    wrong, seen = attack()
    assert not wrong and {path.split("/")[1] for _, path, _ in seen} == {"tasks", "files", "sessions"}


async def broken(self, request):
    raise LookupError("broken")


async def no_json(self, request):
    return web.json_response({"success": float("inf")})


@pytest.mark.parametrize("answer", [broken, no_json])
def test_it_finds_a_wrong_answer(attack, monkeypatch, answer):
    monkeypatch.setattr(Routes, "session", answer)
    wrong, _ = attack()
    assert wrong
