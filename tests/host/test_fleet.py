"""The job API of a real ComfyUI with a fleet: real Ray, and stations that are real ComfyUIs on the CPU."""

import io
import secrets
import signal
import time
from pathlib import Path

import inferencesh
import psutil
import pytest
import requests
from helpers_cluster import ray_cluster
from helpers_workers import LONG
from inferencesh import TaskStatus
from lib.host_server import HostServer
from lib.machines import ADDRESSES, cannot_be_made, two_machines
from lib.pack import comfyui_path
from PIL import Image
from wan21.workers import cannot_run

pytestmark = [
    pytest.mark.xdist_group("fleet"),  # one fleet for all of them
    pytest.mark.skipif(cannot_run() is not None, reason=str(cannot_run())),
]

SLOW_START_S = 600
HUNG_S = 20


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """A ComfyUI with the job API and two stations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WAN21_STATIONS", "2")
        patch.setenv("WAN21_STATION_HUNG_SECONDS", str(HUNG_S))
        folder = tmp_path_factory.mktemp("fleet")
        previews = ["--preview-method", "auto"]
        with HostServer(folder, extra_args=previews, start_timeout_s=SLOW_START_S) as server:
            yield server


@pytest.fixture(scope="module")
def jobs(fleet):
    return inferencesh.inference(api_key="any", base_url=f"{fleet.url}/wan21")


def request(**fields):
    small = {"size": "64*64", "num_frames": 5, "num_inference_steps": 2}
    image = str(comfyui_path() / "input" / "example.png")
    return {"app": "infsh/wan2-1-i2v", "input": {"prompt": "pan left", "image": image} | small | fields}


def lines(task):
    return [entry["content"] for entry in task["logs"]]


def test_a_job_goes_to_a_station_and_comes_back_with_steps_previews_and_files(jobs, fleet):
    updates, preview = [], None
    for update in jobs.run(request(num_inference_steps=4, seed=7), stream=True):
        updates.append(update)
        line = lines(update)[-1]
        if preview is None and "preview http" in line:
            answer = requests.get(line.partition("preview ")[2])
            preview = answer.content if answer.ok else None
    states = [update["status"] for update in updates]
    assert states == sorted(states) and states[-1] == TaskStatus.COMPLETED and TaskStatus.RUNNING in states
    said = lines(updates[-1])
    assert [line.split(",")[0] for line in said if line.startswith("step")] == [
        f"step {i}/4" for i in (1, 2, 3, 4)
    ]
    assert any(line.startswith("given to station ") for line in said)
    assert Image.open(io.BytesIO(preview)).format == "JPEG"
    output = updates[-1]["output"]
    with Image.open(io.BytesIO(requests.get(output["last_frame"]).content)) as last:
        assert last.size == (64, 64)
    assert "seed: 7" in requests.get(output["report"]).text
    assert fleet.client.get("/history") == {}  # of the ComfyUI that has the API


def stations(fleet):
    return requests.get(f"{fleet.url}/wan21/stations").json()["data"]


def until(condition, seconds=SLOW_START_S):
    """Waits until `condition()` gives something, and returns that."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen in time")


def comfyui_of(name, fleet):
    """The ComfyUI of a station that runs a task, by its folder. Its parent is the process that Ray has."""
    task = next(one["task"] for one in stations(fleet) if one["name"] == name)
    return next(
        one
        for one in psutil.process_iter()
        if (folder := _station_folder(one)) and (Path(folder) / "input" / "wan21" / task).exists()
    )


def _station_folder(process):
    try:
        command = process.cmdline()
    except psutil.Error:
        return None
    found = [part for part in command if "wan21-station-" in part and part.endswith("/output")]
    return str(Path(found[0]).parent) if found else None


def test_a_station_that_is_killed_in_a_job_costs_a_try_and_comes_back(jobs, fleet):
    until(lambda: [one["state"] for one in stations(fleet)] == ["idle", "idle"])
    task = jobs.run(request(num_inference_steps=1000), wait=False)["id"]
    for update in jobs.stream_task(task):
        if update["status"] == TaskStatus.RUNNING:
            break
    first = next(one["name"] for one in stations(fleet) if one["task"] == task)
    comfyui_of(first, fleet).parent().kill()
    died = until(lambda: [line for line in lines(jobs.get_task(task).data) if "died while it ran it" in line])
    assert first in died[0] and "queued once more" in died[0]
    until(lambda: jobs.get_task(task).data["status"] == TaskStatus.RUNNING)
    second = next(one["name"] for one in stations(fleet) if one["task"] == task)
    jobs.cancel(task)
    until(lambda: jobs.get_task(task).data["status"] == TaskStatus.CANCELLED)
    assert second != first
    until(lambda: [one["state"] for one in stations(fleet)] == ["idle", "idle"])
    done = jobs.run(request(seed=3) | {"workers": [first]})
    assert f"given to station {first}" in lines(done)


def test_ray_is_not_in_comfyuis_process_and_listens_for_token_holders_alone(fleet):
    maps = Path(f"/proc/{fleet.process.pid}/maps").read_text()
    assert "/ray/" not in maps
    driver = next(
        p for p in psutil.Process(fleet.process.pid).children() if "driver" in " ".join(p.cmdline())
    )
    environment = driver.environ()
    assert environment["RAY_AUTH_MODE"] == "token" and len(environment["RAY_AUTH_TOKEN"]) == 64


def test_cancel_of_a_running_and_a_waiting_task(jobs):
    running, *_ = three = [jobs.run(request(num_inference_steps=1000), wait=False) for _ in range(3)]
    for update in jobs.stream_task(running["id"]):
        if update["status"] == TaskStatus.RUNNING:
            break
    for task in reversed(three):
        jobs.cancel(task["id"])
        with pytest.raises(RuntimeError, match="cancelled"):
            list(jobs.stream_task(task["id"]))
    assert jobs.run(request())["status"] == TaskStatus.COMPLETED


def running(jobs, **params):
    """A long task that has come to its steps."""
    task = jobs.run(request(num_inference_steps=1000) | params, wait=False)["id"]
    for update in jobs.stream_task(task):
        if update["status"] == TaskStatus.RUNNING:
            return task
    raise AssertionError(update)


def at(task, fleet):
    """The station that runs a task."""
    return next((one["name"] for one in stations(fleet) if one["task"] == task), None)


@LONG
def test_a_station_whose_comfyui_hangs_costs_a_try(jobs, fleet):
    until(lambda: [one["state"] for one in stations(fleet)] == ["idle", "idle"])
    task = running(jobs)
    first = at(task, fleet)
    comfyui_of(first, fleet).send_signal(signal.SIGSTOP)
    said = f"its ComfyUI gave no sign of life for {HUNG_S} s"
    until(lambda: any(said in line for line in lines(jobs.get_task(task).data)), 3 * HUNG_S)
    until(lambda: jobs.get_task(task).data["status"] == TaskStatus.RUNNING)
    assert at(task, fleet) != first
    jobs.cancel(task)
    until(lambda: [one["state"] for one in stations(fleet)] == ["idle", "idle"])


@LONG
def test_two_gpus_of_a_job_are_workers_of_one_station(tmp_path, monkeypatch):
    """GPUs are pretended to Ray alone: the station has them, and its workers compute on the CPU."""
    monkeypatch.setenv("WAN21_STATIONS", "auto")
    monkeypatch.setenv("WAN21_GPUS_PER_JOB", "2")
    arguments = f"--cpu --base-directory {tmp_path / 'host'}"
    with ray_cluster() as cluster:
        cluster.start("--num-cpus=2", "--num-gpus=3", WAN21_STATION_ARGS=arguments)
        monkeypatch.setenv("WAN21_RAY_ADDRESS", cluster.address)
        monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.token)
        with HostServer(tmp_path / "host", start_timeout_s=SLOW_START_S) as fleet:
            until(lambda: [one["state"] for one in stations(fleet)] == ["idle"])
            jobs = inferencesh.inference(api_key="any", base_url=f"{fleet.url}/wan21")
            done = jobs.run(request())
            assert any("workers: 2, split auto" in line for line in lines(done)), lines(done)
            assert any("decoded by worker" in line for line in lines(done)), lines(done)
            report = requests.get(done["output"]["report"]).text
            assert "workers: 2, split auto: 1 pass on 1 and 1 pass on 1" in report


@LONG
def test_a_machine_that_joins_and_whose_link_is_cut_in_a_job(tmp_path, tmp_path_factory, monkeypatch):
    """Two network namespaces; the API is on the first."""
    if reason := cannot_be_made():
        pytest.skip(reason)
    token, hung = secrets.token_hex(32), 5
    for name, value in {
        "WAN21_STATIONS": "auto", "WAN21_GPUS_PER_JOB": "0", "WAN21_STATION_HUNG_SECONDS": str(hung),
        "WAN21_RAY_ADDRESS": f"{ADDRESSES[0]}:6379", "RAY_AUTH_TOKEN": token,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with two_machines(tmp_path_factory.mktemp("r"), token) as machines:
        for machine in (0, 1):
            named = machines.environment | {"WAN21_STATION_NAME": f"machine{machine}"}
            said, started = machines.start_ray(machine, named)
            assert started, said
            if machine == 0:
                with machines.entered(0):
                    server = HostServer(tmp_path / "host", start_timeout_s=SLOW_START_S).__enter__()
        try:
            with machines.entered(0):
                jobs = inferencesh.inference(api_key="any", base_url=f"{server.url}/wan21")
                idle = lambda: {one["name"] for one in stations(server) if one["state"] == "idle"}  # noqa: E731
                until(lambda: idle() == {"machine0-1", "machine1-1"})
                other, task = running(jobs, workers=["machine0"]), running(jobs)
                assert at(task, server) == "machine1-1"
                machines.cut()
                said = f"station machine1-1 died while it ran it (it gave no sign of life for {hung} s)"
                until(lambda: any(said in line for line in lines(jobs.get_task(task).data)), 10 * hung)
                jobs.cancel(other)
                until(lambda: at(task, server) == "machine0-1")
                jobs.cancel(task)
                done = jobs.run(request())
                assert "given to station machine0-1" in lines(done)
                until(lambda: any("left the cluster" in one["why"] for one in stations(server)))
        finally:
            server.stop()
