"""Load and kill a fleet of stations on this machine, and print what it took.

    python scripts/load_fleet.py                       # 200 jobs of 3 keys, 3 stations, 20 kills; 2 against 1
    python scripts/load_fleet.py --jobs 30 --kills 4    # a short one
    python scripts/load_fleet.py --namespaces           # on two network namespaces, by root

Stations are on the CPU where there is no GPU, and run the bundled model. A kill is of a station's process,
or, one in four, of the ComfyUI that has the API. Exits with 1 when a check fails: a task that does not end or
was given to a station three times, a webhook that did not come, the 99th percentile of `GET /tasks/{id}`.
"""

import argparse
import contextlib
import os
import random
import secrets
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import requests
from lib.host_server import HostServer
from lib.job_api import Receiver, upload
from lib.machines import ADDRESSES, cannot_be_made, two_machines
from lib.pack import comfyui_path

APP = "infsh/wan2-1-i2v"
LIMIT_MS = 100
SLOW_START_S = 1800
TERMINAL = {10, 11, 12}
SMALL = {"prompt": "pan left", "size": "64*64", "num_frames": 5, "num_inference_steps": 2}
KEYS = [secrets.token_hex(16) for _ in range(4)]  # the last is the operator's
PAUSE_S = 12.0  # at most between two kills, once all stations but one answer


class Api:
    """The calls of one key."""

    def __init__(self, server, key, hook=None):
        self.url, self.hook = f"{server.url}/wan21", hook
        self.web = requests.Session()
        self.web.headers["Authorization"] = f"Bearer {key}"

    def prepare(self):
        """Upload the picture of all jobs."""
        self.image = upload(self.url, (comfyui_path() / "input" / "example.png").read_bytes(), self.web)
        return self

    def submit(self, seed, **more):
        """Queue a small job and return its id."""
        body = {"app": APP, "webhook": self.hook, "input": SMALL | {"image": self.image, "seed": seed}}
        answer = self.web.post(f"{self.url}/apps/run", json=body | more, timeout=120)
        answer.raise_for_status()
        return answer.json()["data"]["id"]

    def task(self, task_id):
        return self.web.get(f"{self.url}/tasks/{task_id}", timeout=120).json()["data"]

    def stations(self):
        return self.web.get(f"{self.url}/stations", timeout=120).json()["data"]


def wait(condition, seconds=3600):
    """Wait until `condition()` gives something, and return that."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.2)
    raise TimeoutError("it did not happen in time")


def names_of(server, count):
    """Names of the stations that answer, once they are so many."""
    operator = Api(server, KEYS[-1])
    up = lambda: [one["name"] for one in operator.stations() if one["state"] != "away"]  # noqa: E731
    return wait(lambda: names if len(names := up()) >= count else None)


def station_processes():
    """The processes that Ray has for stations: parents of the ComfyUIs in their folders."""
    found = set()
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_station = any("/wan21-station-" in part for part in one.cmdline())
            if is_station and one.environ().get("MINE") == MINE:
                found.add(one.parent())
    return [one for one in found if one]


def throughput(server, names, jobs):
    """Jobs a second of one station and of all, in turns: (one, all)."""
    api = Api(server, KEYS[0]).prepare()
    seconds = Counter()
    for turn in range(5):
        for kind, places in (("one", names[:1]), ("all", [])):
            begin = time.perf_counter()
            ids = [api.submit(1000 * turn + n, workers=places) for n in range(jobs)]
            for task_id in ids:
                wait(lambda one=task_id: api.task(one)["status"] in TERMINAL)
            if turn:  # in the first the stations load the model
                seconds[kind] += time.perf_counter() - begin
    return 4 * jobs / seconds["one"], 4 * jobs / seconds["all"]


class Gets(threading.Thread):
    """Times `GET /tasks/{id}` of random tasks until it is stopped, or the server is."""

    def __init__(self, owners, apis, times):
        super().__init__(daemon=True)
        self.owners, self.apis, self.times, self.going = owners, apis, times, True

    def run(self):
        with contextlib.suppress(requests.RequestException):
            while self.going:
                if self.owners:
                    task_id, owner = random.choice(list(self.owners.items()))
                    begin = time.perf_counter()
                    self.apis[owner].web.get(f"{self.apis[owner].url}/tasks/{task_id}", timeout=120)
                    self.times.append(1000 * (time.perf_counter() - begin))
                time.sleep(0.05)


def one_life(server, plan, share, owners, times, receiver, stations):
    """Submit a share of the jobs and kill stations, until the plan says that this server is killed too."""
    apis = [Api(server, key, receiver.url).prepare() for key in KEYS[:-1]]
    for seed in share:
        owners[apis[seed % len(apis)].submit(seed)] = seed % len(apis)
    # The session of each key is one thread's at a time, so this has its own.
    gets = Gets(owners, [Api(server, key) for key in KEYS[:-1]], times)
    gets.start()
    killed = 0
    while plan:
        kind = plan.pop(0)
        names_of(server, stations - 1)
        time.sleep(random.uniform(0, PAUSE_S))
        killed += 1
        if kind == "api":
            server.process.kill()
            server.process.wait()
            break
        random.choice(station_processes()).kill()
    else:
        for task_id, owner in list(owners.items()):
            wait(lambda one=task_id, api=apis[owner]: api.task(one)["status"] in TERMINAL)
        wait(lambda: set(owners) <= {event["id"] for event in receiver.events}, 300)
    gets.going = False
    return killed


def kill_and_count(folder, options, times):
    """All jobs through all kills; whether every check holds."""
    receiver, owners = Receiver(), {}
    apis = options.kills // 4
    plan = ["station"] * (options.kills - apis) + ["api"] * apis
    random.shuffle(plan)
    print("kills:", *plan, flush=True)
    lives = apis + 1
    for life in range(lives):
        share = range(options.jobs * life // lives, options.jobs * (life + 1) // lives)
        with HostServer(folder, start_timeout_s=SLOW_START_S) as server:
            killed = one_life(server, plan, share, owners, times, receiver, options.stations)
        print(f"life {life + 1}: {len(owners)} tasks accepted, {killed} kills", flush=True)
    database = Path(folder) / "user" / "__wan21_jobs" / "jobs.sqlite"
    with contextlib.closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT id, status, tries, error FROM tasks").fetchall()
    rows = {task_id: more for task_id, *more in rows if task_id in owners}
    told = {event["id"] for event in receiver.events}
    states, tries = Counter(one[0] for one in rows.values()), Counter(one[1] for one in rows.values())
    print(f"{options.kills} kills: {len(owners)} tasks accepted, {states[10]} completed, {states[11]} failed")
    print("tries:", dict(sorted(tries.items())), "without a webhook:", len(set(owners) - told))
    print(*Counter(one[2][:90] for one in rows.values() if one[2]).most_common(5), sep="\n")
    good = len(rows) == options.jobs == len(owners) and set(states) <= TERMINAL
    return good and max(tries) <= 2 and set(owners) <= told


MINE = os.environ.get("MINE") or secrets.token_hex(8)  # marks the processes of this run


def in_namespaces(options):
    """All of it once more, on a cluster of two namespaces."""
    # Both machines are this one: each would take all of its cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 2)))
    if reason := cannot_be_made():
        print(f"skipped: {reason}")
        return
    given = [f"--{name}={value}" for name, value in vars(options).items() if name != "namespaces"]
    with (
        tempfile.TemporaryDirectory(prefix="wan21-ns-") as folder,
        two_machines(folder, secrets.token_hex(32), cpus=2) as machines,
    ):
        here = os.environ | machines.environment | {"MINE": MINE}
        for machine, name in enumerate(("first", "second")):
            said, started = machines.start_ray(machine, here | {"WAN21_STATION_NAME": name})
            if not started:
                sys.exit(said)
        here |= {"WAN21_RAY_ADDRESS": f"{ADDRESSES[0]}:6379", "WAN21_GPUS_PER_JOB": "0"}
        done = subprocess.run(machines.inside(0, [sys.executable, __file__, *given]), env=here)
    sys.exit(done.returncode)


def main():
    """Run both parts and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("jobs", 200), ("stations", 3), ("kills", 20), ("each", 6), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--namespaces", action="store_true")
    options = parser.parse_args()
    if options.namespaces:
        return in_namespaces(options)
    random.seed(options.seed)
    os.environ |= {
        "WAN21_ALLOW_PRIVATE_URLS": "1",
        "WAN21_REQUESTS_PER_MINUTE": "100000",
        "WAN21_MAX_UNFINISHED": "100000",
        "WAN21_API_KEYS": ",".join(KEYS[:-1]),
        "WAN21_OPERATOR_KEYS": KEYS[-1],
        "MINE": MINE,
    }
    good, times = True, []
    if options.each:
        os.environ["WAN21_STATIONS"] = "2"
        with (
            tempfile.TemporaryDirectory() as folder,
            HostServer(folder, start_timeout_s=SLOW_START_S) as server,
        ):
            one, both = throughput(server, names_of(server, 2), options.each)
        print(
            f"jobs a second: 1 station {one:.3f}, 2 stations {both:.3f}, ratio {both / one:.2f}", flush=True
        )
    if options.kills:
        os.environ["WAN21_STATIONS"] = str(options.stations)
        with tempfile.TemporaryDirectory() as folder:
            good &= kill_and_count(folder, options, times)
        p99 = statistics.quantiles(times, n=100)[98]
        print(f"GET /tasks/{{id}}: {len(times)} calls, median {statistics.median(times):.1f} ms, ", end="")
        print(f"99th percentile {p99:.1f} ms (limit {LIMIT_MS})", flush=True)
        good &= p99 < LIMIT_MS
    sys.exit(not good)


if __name__ == "__main__":
    main()
