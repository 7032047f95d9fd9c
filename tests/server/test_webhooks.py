"""Webhooks: sent once taken, retried, signed, and after a restart too."""

import asyncio
import hashlib
import hmac
import json
import socket
import time
from dataclasses import replace

import pytest
import requests
from helpers_server import GIVE_UP_S, serve, stored_status, wait_until
from lib.job_api import Receiver
from wan21.server import webhooks
from wan21.server.settings import Settings
from wan21.server.store import Store

SECRET = "a secret of the receiver"


@pytest.fixture
def receive():
    """Makes receivers."""
    made = []

    def make(*statuses):
        made.append(Receiver(*statuses))
        return made[-1]

    yield make
    for receiver in made:
        receiver.close()


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("WAN21_ALLOW_PRIVATE_URLS", "1")
    monkeypatch.setenv("WAN21_WEBHOOK_SECRET", SECRET)
    read = Settings.from_environment
    monkeypatch.setattr(Settings, "from_environment", lambda: replace(read(), webhook_delays=(0.1, 0.1)))


def delivery(api, task):
    return api.client.get_task(task["id"]).data["webhook_delivery"]


def test_one_event_at_the_end_retried_and_signed(api, job, receive):
    receiver = receive(500, 302)
    task = api.client.run(job({"webhook": receiver.url}), wait=False)
    api.play_next()
    wait_until(lambda: delivery(api, task)["state"] == "delivered")
    assert delivery(api, task)["attempts"] == len(receiver.events) == 3
    headers, body = receiver.requests[-1]
    event = json.loads(body)
    assert event.keys() == {"id", "status", "output", "error", "session_id", "created_at", "updated_at"}
    assert event["id"] == task["id"] == headers["X-Wan21-Delivery"] and event["status"] == 10
    assert event["output"]["video"].endswith(".mp4")
    stamp = headers["X-Wan21-Timestamp"]
    expected = hmac.new(SECRET.encode(), f"{stamp}.".encode() + body, hashlib.sha256).hexdigest()
    assert headers["X-Wan21-Signature"] == f"sha256={expected}" and abs(int(stamp) - time.time()) < 60


def test_cancelled_tasks_are_told_and_a_dead_receiver_shows(api, job, receive):
    receiver = receive(*[503] * 9)
    task = api.client.run(job({"webhook": receiver.url}), wait=False)
    api.client.cancel(task["id"])
    wait_until(lambda: delivery(api, task)["state"] == "failed")
    assert delivery(api, task) == {"state": "failed", "attempts": 3, "error": "the receiver answered 503"}
    assert receiver.events[0]["status"] == 12


def test_private_receivers_are_not_contacted(host, job, receive, monkeypatch):
    """One that was accepted under a looser setting is judged again when it is sent."""
    receiver = receive()
    with serve(host) as api:
        url = receiver.url.replace("http:", "https:")
        task = api.client.run(job({"webhook": url}), wait=False)
    host.queue.clear()
    monkeypatch.setenv("WAN21_ALLOW_PRIVATE_URLS", "0")
    with serve(host) as api:
        api.client.cancel(task["id"])
        wait_until(lambda: delivery(api, task)["state"] == "failed")
        assert "a private or local address" in delivery(api, task)["error"] and receiver.events == []


def test_a_restart_delivers_what_is_due(host, job, receive):
    receiver = receive()
    with serve(host) as api:
        task = api.client.run(job({"webhook": receiver.url}), wait=False)
        api.do(host.start, host.queue[0])
        wait_until(lambda: stored_status(host, task["id"]) == 4)
    host.queue.clear()
    with serve(host) as api:
        wait_until(lambda: receiver.events)
        event = receiver.events[0]
        assert event["status"] == 11 and "stopped while the task ran" in event["error"]


def test_a_webhook_of_a_deleted_task_is_not_sent(host, job, receive, monkeypatch):
    """One that failed once is due again after an hour; the task is gone before that."""
    receiver, read = receive(500), Settings.from_environment
    monkeypatch.setattr(Settings, "from_environment", lambda: replace(read(), webhook_delays=(3600.0,)))
    looked, due_webhooks = [], Store.due_webhooks

    def due_in_two_hours(store, now, *args):
        looked.append(now)
        return due_webhooks(store, now + 7200, *args)

    with serve(host) as api:
        task = api.client.run(job({"webhook": receiver.url}), wait=False)
        api.client.cancel(task["id"])
        wait_until(lambda: delivery(api, task)["attempts"] == 1)
        assert requests.delete(f"{api.url}/tasks/{task['id']}").status_code == 204
        monkeypatch.setattr(Store, "due_webhooks", due_in_two_hours)
        wait_until(lambda: len(looked) >= 2)
    assert len(receiver.events) == 1


def test_an_event_that_cannot_be_noted_is_not_sent_over_and_over(api, job, receive, monkeypatch):
    """A full disk, for instance: the receiver took the event, and the database did not."""
    receiver, save = receive(), Store.save
    broken = []

    async def full(store, row, *names):
        if "hook_state" in names and len(broken) < 2:
            broken.append(row.id)
            raise OSError("the disk is full")
        await save(store, row, *names)

    monkeypatch.setattr(Store, "save", full)
    monkeypatch.setattr(webhooks, "FAILED_SECONDS", 0.5)
    began = time.monotonic()
    task = api.client.run(job({"webhook": receiver.url}), wait=False)
    api.client.cancel(task["id"])
    wait_until(lambda: delivery(api, task)["state"] == "delivered")
    assert len(receiver.events) == 3 and time.monotonic() - began > 1


def test_a_silent_receiver_holds_up_its_own_key_alone(host, job, receive, monkeypatch):
    keys = ("a" * 32, "b" * 32)
    monkeypatch.setenv("WAN21_API_KEYS", ",".join(keys))
    monkeypatch.setattr(webhooks, "TIMEOUT_S", 2 * GIVE_UP_S)
    silent, receiver = socket.create_server(("127.0.0.1", 0)), receive()
    with silent, serve(host) as api:
        first, second = (api.client_of(key) for key in keys)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        for _ in range(webhooks.SENDERS + 1):
            first.cancel(first.run(job({"webhook": url}), wait=False)["id"])
        second.cancel(second.run(job({"webhook": receiver.url}), wait=False)["id"])
        wait_until(lambda: receiver.events)


class Nothing:
    """A store in which no webhook is due."""

    async def due_webhooks(self, *_):
        return []


class Slow(Nothing):
    """A store that takes its time."""

    async def due_webhooks(self, *_):
        await asyncio.sleep(0.002)
        return []


class Broken(Nothing):
    """A store on a full disk."""

    async def due_webhooks(self, *_):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("store", [Nothing, Slow, Broken])
@pytest.mark.parametrize("passes", range(4))
def test_stop_returns_when_a_task_has_just_ended(passes, store):
    """Before Python 3.12, `asyncio.wait_for` loses a cancel that comes in the same pass as its result."""

    async def stop_after_wake():
        for _ in range(50):
            hooks = webhooks.Webhooks(store(), Settings())
            await hooks.start()
            await asyncio.sleep(0.001)  # until it waits
            hooks.wake()
            for _ in range(passes):
                await asyncio.sleep(0)
            stopping = asyncio.ensure_future(hooks.stop())
            done, _ = await asyncio.wait([stopping], timeout=5)
            assert done, "stop() hangs"

    loop = asyncio.new_event_loop()  # not `asyncio.run`, which would wait for what hangs
    try:
        loop.run_until_complete(stop_after_wake())
    finally:
        loop.close()
