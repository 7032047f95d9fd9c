"""The driver of stations on a real Ray with pretended GPUs; a small program stands in for their ComfyUI."""

import asyncio
import json
import os
import signal
import threading
import time
from contextlib import contextmanager

import psutil
import pytest
import station_program
from helpers_cluster import ray_cluster
from helpers_server import wait_until
from helpers_workers import LONG
from wan21.server.stations import station
from wan21.server.stations.link import Link
from wan21.workers import cannot_run

pytestmark = [
    pytest.mark.xdist_group("stations"),  # one cluster for all of them
    pytest.mark.skipif(cannot_run() is not None, reason=str(cannot_run())),
]
HUNG_S = 3
SLOW_S = 120  # only a failure waits so long, or a machine that is busy with other things


class Stations:
    """A driver, and what it said.

    Attributes:
        news: tuples as they came.
    """

    def __init__(self, folder):
        self.folder, self.news, self.link = folder, [], None
        self.jobs = 0

    def start(self, count, address, gpus, hung=HUNG_S):
        """Starts the driver, on an event loop of its own."""
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        program = {
            "main": station_program.__file__,
            "args": ["--lowvram"],
            "env": {"WAN21_RAY_ADDRESS": None},
        }
        setup = (count, address, gpus, program, str(self.folder), str(self.folder), hung)

        async def link():
            return Link(
                setup, lambda *news: self.news.append(news), lambda words: self.news.append(("end", words))
            )

        self.link = asyncio.run_coroutine_threadsafe(link(), self.loop).result()

    def close(self):
        self.link.close()
        self.loop.call_soon_threadsafe(self.loop.stop)

    def wait(self, kind, number=None, since=0):
        """The first news of a kind, of a station, of those since a place in the list."""

        def found():
            these = [one for one in self.news[since:] if one[0] == kind]
            return next((one for one in these if number is None or one[1] == number), None)

        return wait_until(found, SLOW_S)

    def life(self, number):
        return [one[2] for one in self.news if one[0] == "ready" and one[1] == number][-1]

    def device(self, number):
        """What a station's program said of its process last."""
        return json.loads([one[3]["device"] for one in self.news if one[:2] == ("ready", number)][-1])

    def run(self, number, seconds=0.0):
        """Gives a station a job; its id and the folder of what it writes."""
        self.jobs += 1
        prompt_id, folder = f"{id(self)}-{self.jobs}", f"job-{self.jobs}"
        graph = {"1": {"class_type": "Sleep", "inputs": {"seconds": seconds, "folder": folder}}}
        self.link.send("run", number, self.life(number), prompt_id, graph, [], folder)
        return prompt_id, self.folder / folder

    def ended(self, prompt_id):
        """The record of a job."""
        return wait_until(
            lambda: next((one[5] for one in self.news if one[3:5] == ("ended", prompt_id)), None), SLOW_S
        )


@contextmanager
def driven(folder, *setup, **more):
    stations = Stations(folder)
    stations.start(*setup, **more)
    try:
        yield stations
    finally:
        stations.close()


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch, ray_cluster() as made:
        patch.setenv("RAY_AUTH_TOKEN", made.token)
        # One core: how many stations a machine has room for is said by its GPUs alone.
        made.start("--num-cpus=1", "--num-gpus=4", WAN21_STATION_NAME="first")
        yield made


@pytest.fixture(scope="module")
def stations(cluster, tmp_path_factory):
    """Two stations with two GPUs each."""
    with driven(tmp_path_factory.mktemp("stations"), 0, cluster.address, 2) as made:
        made.wait("ready", 0)
        made.wait("ready", 1)
        yield made


def test_no_gpu_is_two_stations_and_none_is_left_over(stations):
    told = [stations.device(number) for number in (0, 1)]
    assert sorted(one["CUDA_VISIBLE_DEVICES"] for one in told) == ["0,1", "2,3"]
    assert all("--cpu" not in one["args"] and "--lowvram" in one["args"] for one in told)
    # Of the cluster's address nothing reaches them: workers of a job are on the station's GPUs.
    assert all(one["WAN21_RAY_ADDRESS"] is None and one["RAY_ADDRESS"] is None for one in told)
    assert {one[1] for one in stations.news if one[0] == "ready"} == {0, 1}


@LONG
def test_another_fleet_waits_for_room_and_says_so(cluster, stations, tmp_path):
    with driven(tmp_path, 1, cluster.address, 2) as others:
        why = others.wait("gone", 0)[3]
        assert "it needs 2 GPUs of one machine, and free in the cluster are 0 GPUs" in why


def test_a_job_and_its_files_and_a_cancel(stations):
    prompt_id, folder = stations.run(0)
    assert stations.ended(prompt_id) == {"outputs": {}, "status": {"messages": []}}
    assert (folder / "file").read_text() == prompt_id
    prompt_id, folder = stations.run(1, 600)
    stations.wait("news", 1)
    stations.link.send("cancel", 1, prompt_id)
    assert stations.ended(prompt_id)["status"]["messages"] == [["execution_interrupted", {}]]


@pytest.mark.parametrize(
    "which, seconds",
    [
        ("its ComfyUI", 600),
        pytest.param("its process", 600, marks=LONG),
        pytest.param("its ComfyUI", 0, marks=LONG),
    ],
)
def test_a_hung_station_is_ended_and_comes_back(stations, which, seconds):
    comfyui = psutil.Process(stations.device(0)["pid"])
    since = len(stations.news)
    if seconds:
        prompt_id, _ = stations.run(0, seconds)
        stations.wait("news", 0, since)
    hung = comfyui if which == "its ComfyUI" else comfyui.parent()
    os.kill(hung.pid, signal.SIGSTOP)
    began = time.monotonic()
    why = stations.wait("gone", 0, since)[3]
    assert time.monotonic() - began < 30 and f"gave no sign of life for {HUNG_S} s" in why
    assert ("its ComfyUI" in why) == (which == "its ComfyUI")
    stations.wait("ready", 0, since)
    assert psutil.wait_procs([comfyui], timeout=30)[1] == []
    prompt_id, folder = stations.run(0)
    stations.ended(prompt_id)
    assert (folder / "file").exists()


@LONG
def test_a_machine_that_joins_and_leaves(stations, cluster):
    """Its station's number is that of the next machine's."""
    for machine in ("second", "third"):
        since = len(stations.news)
        node = cluster.start("--num-cpus=1", "--num-gpus=3", WAN21_STATION_NAME=machine)
        assert stations.wait("ready", 2, since)[3]["machine"] == machine
        assert len(stations.device(2)["CUDA_VISIBLE_DEVICES"].split(",")) == 2
        stations.run(2, 600)
        stations.wait("news", 2, since)
        cluster.end(node)
        stations.wait("gone", 2, since)
        left = ("gone", 2, stations.life(2), "its machine has left the cluster")
        wait_until(lambda said=left: said in stations.news, SLOW_S)
    assert {one[1] for one in stations.news if one[0] == "ready"} == {0, 1, 2}


@LONG
def test_on_cpus_each_machine_has_one_and_none_outlives_its_driver(cluster, tmp_path):
    node = cluster.start("--num-cpus=4", WAN21_STATION_NAME="second")
    with driven(tmp_path, 0, cluster.address, 0) as stations:
        assert {stations.wait("ready", n)[3]["machine"] for n in (0, 1)} == {"first", "second"}
        told = [stations.device(n) for n in (0, 1)]
        assert all("--cpu" in one["args"] for one in told)
        psutil.Process(stations.link._driver.process.pid).kill()
        stations.wait("end")
        programs = [psutil.Process(one["pid"]) for one in told if psutil.pid_exists(one["pid"])]
        assert psutil.wait_procs(programs, timeout=60)[1] == []
    cluster.end(node)


@pytest.mark.parametrize(
    "sharing, given, left",
    [
        pytest.param(0, None, None, id="a GPU each"),
        pytest.param(1, None, None, id="alone on its machine"),
        pytest.param(2, None, "4", id="two divide the cores"),
        pytest.param(3, None, "2", id="three"),
        pytest.param(20, None, "1", id="more than cores"),
        pytest.param(2, "7", "7", id="the user's own"),
    ],
)
def test_stations_without_a_gpu_divide_the_cores(monkeypatch, sharing, given, left):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # Ray's
    program = {"env": {"OMP_NUM_THREADS": given}, "sharing": sharing}
    assert station._environment(program).get("OMP_NUM_THREADS") == left


def test_where_no_machine_has_so_many_gpus_it_is_said(cluster, tmp_path):
    with driven(tmp_path, 0, cluster.address, 5) as stations:
        wait_until(
            lambda: any(one[0] == "none" and "needs: 5 GPUs" in one[3] for one in stations.news), SLOW_S
        )


def test_where_the_disk_is_full_there_is_no_station_and_it_says_so(monkeypatch):
    monkeypatch.setattr(station, "FULL_BYTES", 2**62)
    with pytest.raises(station.CannotStart, match=r"its disk is full: [0-9]+ MiB are free in "):
        asyncio.run(station.Station({}).ready())


@LONG
def test_a_cluster_that_does_not_take_us(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with driven(tmp_path, 1, cluster.address, 0) as stations:
        assert "Failed to connect" in stations.wait("refused")[3]
        stations.wait("end")
