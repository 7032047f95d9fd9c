"""Load and kill the job API of a real host, and print what it took.

    python scripts/load_jobs.py                     # 200 queued jobs, 100 streams, GETs while one job runs
    python scripts/load_jobs.py --kills 20          # and 20 kills at random moments
    python scripts/load_jobs.py --queued 0 --row 100    # 100 jobs in a row: memory, open files, threads

Exits with 1 when a check fails: the 99th percentile of `GET /tasks/{id}`, a lost task, a missing webhook,
what a kill left behind, memory that grows.
"""

import argparse
import contextlib
import os
import random
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter

import psutil
import requests
from lib.host_server import HostServer
from lib.job_api import Receiver, upload
from lib.pack import comfyui_path

APP = "infsh/wan2-1-i2v"
LIMIT_MS = 100
SLOW_START_S = 900
TERMINAL = {10, 11, 12}
COMPLETED, CANCELLED, RUNNING = 10, 12, 7
SMALL = {"prompt": "pan left", "size": "64*64", "num_frames": 5, "num_inference_steps": 2}


class Api:
    """The few calls that are measured, without the client's own retries."""

    def __init__(self, server, hook):
        self.url = f"{server.url}/wan21"
        self.hook = hook
        self.web = requests.Session()
        picture = comfyui_path() / "input" / "example.png"
        self.image = upload(self.url, picture.read_bytes(), self.web)

    def submit(self, **fields):
        """Queue a small job and return its id."""
        body = {"app": APP, "webhook": self.hook, "input": SMALL | {"image": self.image} | fields}
        answer = self.web.post(f"{self.url}/apps/run", json=body, timeout=60)
        answer.raise_for_status()
        return answer.json()["data"]["id"]

    def task(self, task_id):
        return self.web.get(f"{self.url}/tasks/{task_id}", timeout=60).json()["data"]

    def wait(self, task_id, states, seconds=3600):
        deadline = time.monotonic() + seconds
        while (task := self.task(task_id))["status"] not in states:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{task_id} stays at {task['status']}")
            time.sleep(0.2)
        return task


def measure(api, queued, streams, seconds):
    """Queue jobs, open streams and time GETs while the first job runs. Returns milliseconds of each GET."""
    ids = [api.submit(num_inference_steps=1000)] + [api.submit(seed=seed) for seed in range(queued)]
    api.wait(ids[0], {RUNNING})
    lines = Counter()
    for task_id in (random.choice(ids) for _ in range(streams)):
        threading.Thread(target=_read, args=(f"{api.url}/tasks/{task_id}/stream", lines), daemon=True).start()
    times, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        begin = time.perf_counter()
        api.task(random.choice(ids))
        times.append(1000 * (time.perf_counter() - begin))
        time.sleep(0.02)
    for task_id in ids:
        api.web.post(f"{api.url}/tasks/{task_id}/cancel").raise_for_status()
    for task_id in ids:
        api.wait(task_id, TERMINAL)
    print(f"{len(lines)} streams read {sum(lines.values())} snapshots")
    return times


def _read(url, lines):
    with contextlib.suppress(requests.RequestException), requests.get(url, stream=True) as answer:
        for _ in answer.iter_lines():
            lines[threading.get_ident()] += 1


def run_in_a_row(server, api, jobs):
    """Run jobs one after another, every sixth cancelled; whether the process stays as it is."""
    process, seen = psutil.Process(server.process.pid), []
    for number in range(1, jobs + 1):
        cancelled = number % 6 == 0
        task_id = api.submit(seed=number, **({"num_inference_steps": 1000} if cancelled else {}))
        if cancelled:
            api.wait(task_id, {RUNNING})
            api.web.post(f"{api.url}/tasks/{task_id}/cancel").raise_for_status()
        assert api.wait(task_id, TERMINAL)["status"] == (CANCELLED if cancelled else COMPLETED)
        with process.oneshot():
            seen.append((process.memory_info().rss >> 20, process.num_fds(), process.num_threads()))
    begun = seen[jobs // 5]  # by then all is loaded
    for name, first, last in zip(("MB of memory", "open files", "threads"), begun, seen[-1]):
        print(f"{jobs} jobs in a row: {name} {first} after job {jobs // 5 + 1}, {last} after the last")
    return all(last <= first + more for first, last, more in zip(begun, seen[-1], (50, 3, 3)))


def kill_and_restart(folder, kills, receiver):
    """Kill the server at random moments while jobs are submitted. Returns the ids of accepted tasks."""
    accepted = []
    for kill in range(1, kills + 1):
        with HostServer(folder, start_timeout_s=SLOW_START_S) as server:
            api = Api(server, receiver.url)
            moment = threading.Timer(random.uniform(0, 15), server.process.kill)
            moment.start()
            with contextlib.suppress(requests.RequestException):
                while True:
                    accepted.append(api.submit(seed=len(accepted)))
                    time.sleep(random.uniform(0, 2))
            moment.join()
            server.process.wait()
        print(f"kill {kill}: {len(accepted)} tasks accepted so far", flush=True)
    return accepted


def left_behind(server):
    """Files of no task that the API knows, and parts of uploads."""
    data = server.base_directory / "user" / "__wan21_jobs"
    with contextlib.closing(sqlite3.connect(data / "jobs.sqlite")) as database:
        known = {task_id for (task_id,) in database.execute("SELECT id FROM tasks")}
    folders = (server.input_directory / "wan21", server.output_directory / "wan21")
    left = [path for folder in folders for path in folder.glob("*") if path.name not in known]
    return [*left, *(data / "uploads").glob("*.part")]


def main():
    """Run both parts and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("queued", 200), ("streams", 100), ("seconds", 30), ("kills", 0), ("row", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    os.environ |= {"WAN21_ALLOW_PRIVATE_URLS": "1", "WAN21_REQUESTS_PER_MINUTE": "100000"}
    os.environ["WAN21_MAX_UNFINISHED"] = str(10 * options.queued + 1000)
    receiver, good = Receiver(), True
    with tempfile.TemporaryDirectory() as folder:
        if options.queued:
            with HostServer(folder, start_timeout_s=SLOW_START_S) as server:
                times = measure(Api(server, None), options.queued, options.streams, options.seconds)
            p99 = statistics.quantiles(times, n=100)[98]
            print(
                f"GET /tasks/{{id}}: {len(times)} calls, median {statistics.median(times):.1f} ms", end=", "
            )
            print(f"99th percentile {p99:.1f} ms (limit {LIMIT_MS})", flush=True)
            good = p99 < LIMIT_MS
        if options.row:
            with HostServer(folder, start_timeout_s=SLOW_START_S) as server:
                good &= run_in_a_row(server, Api(server, None), options.row)
        if options.kills:
            good &= check_kills(folder, options.kills, receiver)
    sys.exit(not good)


def told_of(receiver):
    """Ids of the tasks whose webhooks came."""
    return {event["id"] for event in receiver.events}


def check_kills(folder, kills, receiver):
    """Whether every task accepted around the kills ends, and its webhook comes."""
    accepted = kill_and_restart(folder, kills, receiver)
    with HostServer(folder, start_timeout_s=SLOW_START_S) as server:
        api = Api(server, receiver.url)
        states = Counter(api.wait(task_id, TERMINAL)["status"] for task_id in accepted)
        deadline = time.monotonic() + 60
        while set(accepted) - told_of(receiver) and time.monotonic() < deadline:
            time.sleep(0.5)
    left = left_behind(server)
    missing = set(accepted) - told_of(receiver)
    print(f"{kills} kills: {len(accepted)} tasks accepted, {states[COMPLETED]} completed", end=", ")
    print(f"{sum(states.values()) - states[COMPLETED]} failed, {len(missing)} without a webhook", end=", ")
    print(f"{len(left)} files left behind", *left[:5])
    return not missing and not left and sum(states.values()) == len(accepted)


if __name__ == "__main__":
    main()
