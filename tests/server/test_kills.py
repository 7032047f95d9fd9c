"""A server killed at random moments loses no task that it accepted, and each webhook comes."""

import contextlib
import multiprocessing
import os
import random
import sys
import threading
from collections import Counter
from pathlib import Path

import requests
from helpers_server import wait_until
from lib.job_api import Receiver, upload

KILLS = 12
LIFE_S = 0.5
TERMINAL = {10, 11, 12}


@contextlib.contextmanager
def server(folder, models):
    """(process, URL) of a new server over a folder; killed at the end, if it was not before."""
    import killed_server

    context = multiprocessing.get_context("forkserver")  # imports once, then each start takes milliseconds
    context.set_forkserver_preload(["killed_server"])
    ours, theirs = context.Pipe()
    process = context.Process(target=killed_server.run, args=(folder, models, theirs), daemon=True)
    process.start()
    try:
        yield process, ours.recv()
    finally:
        process.kill()
        process.join()


def submit_until_killed(process, url, body, accepted, seconds):
    """Submit jobs; the server is killed this long after it accepted the first."""
    timer = threading.Timer(seconds, process.kill)
    with contextlib.suppress(requests.RequestException), requests.Session() as web:
        while True:
            accepted.append(web.post(f"{url}/apps/run", json=body, timeout=60).json()["data"]["id"])
            if timer.ident is None:  # not started yet
                timer.start()
    timer.join()


def test_no_task_and_no_webhook_is_lost(tmp_path, checkpoints, job, image, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for the preload, which knows no other
    receiver, accepted, moments = Receiver(), [], random.Random(0)
    with server(tmp_path, checkpoints) as (_, url):
        body = job({"webhook": receiver.url}, image=upload(url, Path(image).read_bytes(), requests))
    for _ in range(KILLS):
        with server(tmp_path, checkpoints) as (process, url):
            submit_until_killed(process, url, body, accepted, moments.uniform(0.0, LIFE_S))
    assert len(accepted) >= KILLS
    with server(tmp_path, checkpoints) as (_, url):

        def states():
            found = [requests.get(f"{url}/tasks/{task}").json()["data"]["status"] for task in accepted]
            return Counter(found) if accepted and TERMINAL.issuperset(found) else None

        ended = wait_until(states, 300)
        wait_until(lambda: set(accepted) <= {headers["X-Wan21-Delivery"] for headers, _ in receiver.requests})
    receiver.close()
    assert ended[10] > 0 and ended[11] <= KILLS and ended.total() == len(set(accepted))
