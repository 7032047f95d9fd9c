"""The API with a fleet whose driver a test plays; tests/host/test_fleet.py has real Ray and real stations."""

import contextlib
import json
import re
import socket
import sqlite3
import subprocess
import sys
from dataclasses import asdict
from typing import NamedTuple

import pytest
import requests
from helpers_server import LISTS, STEPS, FakeHost, serve, wait_until
from inferencesh import APIError
from lib.pack import ROOT
from lib.random_checkpoints import FLF2V, I2V, TEXT_ENCODER, VAE
from wan21.server import fleet as fleet_module
from wan21.server.installed import Installed
from wan21.server.stations.about import pack_digest
from wan21.wan.refusal import Refusal

KEYS = {name: f"{name}-of-sixteen-characters" for name in ("anna", "bert", "carl", "operator")}


class Heard:
    """In the place of `host.queue.Observer`: hands messages on."""

    def __init__(self, on_message):
        self._on_message = on_message

    def hear(self, message):
        self._on_message(message["type"], message["data"])


class Complaint(NamedTuple):
    """As of `host.queue`."""

    node_id: str
    input: str
    message: str


class FleetHost(FakeHost):
    """With what a fleet needs of its host."""

    observer = staticmethod(Heard)
    lacks = None  # input of the loader that it complains of

    async def check(self, prompt_id, graph):
        loaders = [i for i, node in graph.items() if node["class_type"] == "Wan21ModelLoader"]
        return [], [Complaint(i, self.lacks, "not in list") for i in loaders if self.lacks]

    def program(self):
        return "main.py", []

    def complaints(self, node_errors, error):
        found = [(node_id, one) for node_id, told in node_errors.items() for one in told["errors"]]
        names = [(one.get("extra_info") or {}).get("input_name", "") for _, one in found]
        return [Complaint(i, name, one["message"]) for (i, one), name in zip(found, names)]


class PlayedLink:
    """In the place of `stations.link.Link`.

    Attributes:
        sent: requests to the driver.
    """

    def __init__(self, setup, on_news, on_end):
        self.setup, self.news, self.end = setup, on_news, on_end
        self.sent, self.lives, self.is_closed = [], {}, False

    def send(self, *request):
        self.sent.append(request)

    def close(self):
        self.is_closed = True


class Played:
    """An API with a fleet, and moves of its stations."""

    def __init__(self, api, links, shelf):
        self.api, self.links, self.shelf = api, links, shelf

    @property
    def link(self):
        return self.links[-1]

    def join(self, number, machine="m", without=(), pack=None, prints=()):
        """Let a station answer."""
        lists = {
            node: [one for one in spec[name] if one not in without]
            for node, spec in LISTS.items()
            for name in spec
        }
        shelf = {
            part: {n: (asdict(file.traits), file.bundled) for n, file in files.items() if n not in without}
            for part, files in self.shelf.items()
        }
        told = {"pack": pack or pack_digest(), "device": "cpu", "lists": lists, "shelf": shelf}
        told["prints"] = prints
        life = self.link.lives[number] = self.link.lives.get(number, 0) + 1
        self.api.do(self.link.news, "ready", number, life, told | {"machine": machine})

    def die(self, number, why="it was killed"):
        self.api.do(self.link.news, "gone", number, self.link.lives[number], why)

    def given(self, count):
        """(station's number, prompt id) of so many jobs, as the driver was asked to run them."""
        runs = lambda: [(one[1], one[3]) for one in self.link.sent if one[0] == "run"]  # noqa: E731
        wait_until(lambda: len(runs()) >= count)
        assert len(runs()) == count
        return runs()

    def say(self, number, kind, data):
        text = json.dumps({"type": kind, "data": data})
        self.api.do(self.link.news, "news", number, self.link.lives[number], "json", text)

    def finish(self, number, record=None):
        """Let a station be done with its job."""
        prompt_id = self.given_to(number)
        if record is None:
            self.api.host.graphs[prompt_id] = self.graph(prompt_id)
            record = {"outputs": self.api.host.write_outputs(prompt_id), "status": {"messages": []}}
        life = self.link.lives[number]
        self.api.do(self.link.news, "news", number, life, "ended", prompt_id, record)

    def given_to(self, number):
        return [one[3] for one in self.link.sent if one[0] == "run" and one[1] == number][-1]

    def graph(self, prompt_id):
        return next(one[4] for one in self.link.sent if one[0] == "run" and one[3] == prompt_id)


@pytest.fixture
def settings(monkeypatch):
    monkeypatch.setenv("WAN21_STATIONS", "2")


@pytest.fixture
def fleet(settings, monkeypatch, tmp_path, checkpoints):
    with played(monkeypatch, tmp_path, checkpoints) as one:
        yield one


@contextlib.contextmanager
def played(monkeypatch, folder, models):
    links = []

    def link(*args):
        links.append(PlayedLink(*args))
        return links[-1]

    monkeypatch.setattr(fleet_module, "Link", link)
    for name in ("NEW_DRIVER_SECONDS", "REFUSED_SECONDS"):
        monkeypatch.setattr(fleet_module, name, 0)
    host = FleetHost(folder, models)
    with serve(host) as api:
        yield Played(api, links, Installed(host).shelf())


def lines(api, task, key="x"):
    return [entry["content"] for entry in api.client_of(key).get_task(task).data["logs"]]


def status(api, task, key="x"):
    return api.client_of(key).get_task(task).data["status"]


def test_states_steps_and_the_end_come_from_the_station(fleet, job):
    task = fleet.api.client.run(job(), wait=False)["id"]
    assert status(fleet.api, task) == 2
    fleet.join(0)
    [(_, prompt_id)] = fleet.given(1)
    assert (status(fleet.api, task), "given to station m-1" in lines(fleet.api, task)) == (3, True)
    fleet.say(0, "execution_start", {"prompt_id": prompt_id})
    assert status(fleet.api, task) == 4
    graph = fleet.graph(prompt_id)
    sampler = next(i for i, node in graph.items() if node["class_type"] == "Wan21Sampler")
    at = {sampler: {"value": 1, "max": STEPS, "state": "running"}}
    fleet.say(0, "progress_state", {"prompt_id": prompt_id, "nodes": at})
    assert status(fleet.api, task) == 7 and any(line == "step 1/3" for line in lines(fleet.api, task))
    names, folder = fleet.link.sent[0][5:]
    assert folder == f"wan21/{task}" and names == [f"wan21/{task}/image.png"]
    fleet.finish(0)
    wait_until(lambda: status(fleet.api, task) == 10)


@pytest.mark.parametrize(
    "record, state, error",
    [
        ({"outputs": {}, "status": {"messages": [["execution_interrupted", {}]]}}, 12, ""),
        ({"refused": ({"1": {"errors": [{"message": "no"}]}}, None)}, 11, "UNETLoader: no"),
    ],
)
def test_what_a_station_says_of_the_end_is_the_tasks(fleet, job, record, state, error):
    fleet.join(0)
    task = fleet.api.client.run(job(), wait=False)["id"]
    fleet.given(1)
    fleet.finish(0, record)
    wait_until(lambda: status(fleet.api, task) == state)
    told = fleet.api.client.get_task(task).data["error"]
    assert told.partition(": ")[2] == error.partition(": ")[2]


def test_keys_take_turns_and_jobs_of_one_key_keep_their_order(
    settings, monkeypatch, tmp_path, checkpoints, job
):
    monkeypatch.setenv("WAN21_API_KEYS", ",".join(KEYS.values()))
    with played(monkeypatch, tmp_path, checkpoints) as fleet:
        sent = ["anna"] * 4 + ["bert"] * 2 + ["carl"]
        clients = {name: fleet.api.client_of(KEYS[name]) for name in set(sent)}
        order = {}
        for number, name in enumerate(sent):
            order[clients[name].run(job(seed=number), wait=False)["id"]] = name, number
        fleet.join(0)
        got = []
        for count in range(1, 1 + len(sent)):
            prompt_id = fleet.given(count)[-1][1]
            got.append(order[f"task_{prompt_id.replace('-', '')}"])
            fleet.finish(0)
        assert [name for name, _ in got] == ["anna", "bert", "carl", "anna", "bert", "anna", "anna"]
        assert [number for name, number in got if name == "anna"] == [0, 1, 2, 3]


def test_a_job_whose_station_died_is_tried_once_more_and_then_fails(fleet, job):
    fleet.join(0)
    task = fleet.api.client.run(job(), wait=False)["id"]
    [(_, prompt_id)] = fleet.given(1)
    fleet.say(0, "execution_start", {"prompt_id": prompt_id})
    fleet.die(0)
    assert status(fleet.api, task) == 2
    assert any("station m-1 died while it ran it (it was killed)" in line for line in lines(fleet.api, task))
    fleet.join(0)
    fleet.given(2)
    fleet.die(0, "again")
    wait_until(lambda: status(fleet.api, task) == 11)
    error = fleet.api.client.get_task(task).data["error"]
    assert "(again)" in error and "not tried again" in error
    fleet.join(0)
    fleet.given(2)


def test_a_second_try_is_the_last_also_after_a_restart(settings, monkeypatch, tmp_path, checkpoints, job):
    with played(monkeypatch, tmp_path, checkpoints) as fleet:
        fleet.join(0)
        task = fleet.api.client.run(job(), wait=False)["id"]
        fleet.given(1)
        fleet.die(0)
        wait_until(lambda: status(fleet.api, task) == 2)
    with played(monkeypatch, tmp_path, checkpoints) as fleet:
        fleet.join(0)
        fleet.given(1)
        fleet.die(0)
        wait_until(lambda: status(fleet.api, task) == 11)


def test_a_task_is_stored_as_given_before_the_station_has_it(fleet, job):
    fleet.join(0)
    task = fleet.api.client.run(job(), wait=False)["id"]
    fleet.given(1)
    with contextlib.closing(sqlite3.connect(fleet.api.host.data_directory / "jobs.sqlite")) as database:
        assert database.execute("SELECT status, tries FROM tasks WHERE id = ?", (task,)).fetchone() == (3, 1)


def test_cancel_of_waiting_of_running_and_of_one_whose_station_dies(fleet, job):
    fleet.join(0)
    running, waiting, other = (fleet.api.client.run(job(seed=i), wait=False)["id"] for i in range(3))
    fleet.given(1)
    for task in (waiting, running):
        fleet.api.client.cancel(task)
    assert status(fleet.api, waiting) == 12 and status(fleet.api, running) == 8
    assert ("cancel", 0, fleet.given(1)[0][1]) in fleet.link.sent
    fleet.die(0)
    wait_until(lambda: status(fleet.api, running) == 12)
    fleet.join(0)
    fleet.given(2)
    assert status(fleet.api, other) == 3


def test_a_driver_that_ended_is_started_again(fleet, job):
    fleet.join(0)
    task = fleet.api.client.run(job(), wait=False)["id"]
    fleet.given(1)
    fleet.api.do(fleet.link.end, "killed")
    wait_until(lambda: len(fleet.links) == 2)
    assert status(fleet.api, task) == 2
    fleet.join(0)
    fleet.given(1)


def test_a_job_goes_where_its_files_are(fleet, job):
    fleet.join(0, without=[FLF2V])
    fleet.join(1, "n", without=[I2V])
    tasks = [fleet.api.client.run(job(model=name), wait=False)["id"] for name in (FLF2V, FLF2V, I2V)]
    assert sorted(number for number, _ in fleet.given(2)) == [0, 1]
    assert [status(fleet.api, task) for task in tasks] == [3, 2, 3]  # the second holds up no other
    fleet.finish(1)
    assert fleet.given(3)[-1][0] == 1


def test_a_file_that_is_gone_when_the_job_comes_lets_another_station_try(fleet, job):
    def refuse(number):
        graph = fleet.graph(fleet.given_to(number))
        loader = next(i for i, node in graph.items() if node["class_type"] == "Wan21ModelLoader")
        errors = [{"message": "gone", "extra_info": {"input_name": "model_name"}}]
        fleet.finish(number, {"refused": ({loader: {"errors": errors}}, None)})

    fleet.join(0)
    fleet.join(1, "n")
    first = fleet.api.client.run(job(model=I2V), wait=False)["id"]
    refuse(fleet.given(1)[0][0])
    assert {number for number, _ in fleet.given(2)} == {0, 1}
    assert any(f"has {I2V!r} no more; it is queued once more" in line for line in lines(fleet.api, first))
    refuse(fleet.given(2)[1][0])  # nobody has it now
    wait_until(lambda: status(fleet.api, first) == 11)
    assert "Wan21ModelLoader: gone" in fleet.api.client.get_task(first).data["error"]
    other = fleet.api.client.run(job(model=FLF2V), wait=False)["id"]
    fleet.given(3)
    assert status(fleet.api, other) == 3


def test_a_model_that_only_a_station_has_is_chosen_and_its_place_said(fleet, job):
    for number, without in ((0, [VAE]), (1, [I2V])):
        fleet.join(number, f"m{number}", without=[*without, FLF2V])
    with pytest.raises(APIError) as raised:
        fleet.api.client.run(job(), wait=False)
    assert raised.value.status_code == 422 and "no station has" in str(raised.value)
    assert TEXT_ENCODER in str(raised.value)
    with pytest.raises(APIError, match=f"there is no '{FLF2V}' in models"):
        fleet.api.client.run(job(model=FLF2V), wait=False)


@pytest.mark.parametrize("name, is_taken", [("model_name", True), ("weight_dtype", False)])
def test_a_file_that_a_station_has_is_no_complaint_of_the_apis_comfyui(fleet, job, name, is_taken):
    fleet.join(0)
    fleet.api.host.lacks = name
    refused = contextlib.nullcontext() if is_taken else pytest.raises(APIError, match="not in list")
    with refused:
        fleet.api.client.run(job(), wait=False)


@pytest.mark.parametrize(
    "params, problem",
    [
        ({"infra": "cloud"}, "infra: jobs run on this server's own stations"),
        ({"infra": "remote"}, "infra: jobs run on this server's own stations"),
        ({"workers": ["x"]}, "workers: there is no 'x'; there are m, m-1, n, n-1"),
        ({"workers": "m-1"}, "workers: must be a list"),
    ],
)
def test_a_wrong_place_is_refused_by_name(fleet, job, params, problem):
    fleet.join(0)
    fleet.join(1, "n")
    with pytest.raises(APIError, match=problem) as raised:
        fleet.api.client.run(job(params), wait=False)
    assert raised.value.status_code == 422


@pytest.mark.parametrize("workers, numbers", [(["n-1"], {1}), (["m"], {0, 2}), (["n", "m-2"], {1, 2})])
def test_a_request_chooses_stations_or_machines(fleet, job, workers, numbers):
    for number, machine in ((0, "m"), (1, "n"), (2, "m")):
        fleet.join(number, machine)
    for seed, infra in enumerate(("private", "private_first", None)):
        fleet.api.client.run(job({"workers": workers, "infra": infra}, seed=seed), wait=False)
    assert {number for number, _ in fleet.given(len(numbers))} == numbers


def test_a_job_that_no_station_can_run_any_more_says_so_and_waits(fleet, job):
    fleet.join(0, "m")
    fleet.join(1, "n")
    fleet.die(1)
    task = fleet.api.client.run(job({"workers": ["n"]}), wait=False)["id"]
    wait_until(lambda: any("no station of n" in line for line in lines(fleet.api, task)))
    fleet.join(1, "n")
    assert fleet.given(1)[0][0] == 1


def test_a_station_with_another_version_of_the_pack_gets_nothing(fleet, job):
    fleet.join(0, pack="other")
    with pytest.raises(APIError, match=r"503: There are no stations: station m-1: .*another version"):
        fleet.api.client.run(job(), wait=False)
    [station] = requests.get(f"{fleet.api.url}/stations").json()["data"]
    assert station["state"] == "away" and "another version" in station["why"]
    fleet.join(1, "n")
    task = fleet.api.client.run(job({"workers": ["m"]}), wait=False)["id"]
    assert status(fleet.api, task) == 2 and fleet.link.sent == []


def test_files_of_one_name_that_are_not_one_file_are_named(fleet, job, caplog):
    def prints(of):
        return [["Wan21ModelLoader", I2V, of], ["Wan21VAELoader", VAE, "same"]]

    for number, of in enumerate(("a", "a", "b")):
        fleet.join(number, "mno"[number], prints=prints(of))
    told = {
        one["name"]: one["differing_files"]
        for one in requests.get(f"{fleet.api.url}/stations").json()["data"]
    }
    assert told["m-1"] == [
        f"{I2V!r} (Wan21ModelLoader) is another file on m-1 than on o-1: size, beginning or end differ"
    ]
    assert "on o-1 than on m-1, n-1" in told["o-1"][0] and "put one file on all machines" in caplog.text
    models = [I2V, FLF2V]
    tasks = [fleet.api.client.run(job({"workers": ["o"]}, model=name), wait=False)["id"] for name in models]
    fleet.given(1)
    fleet.finish(2)
    fleet.given(2)
    for task, is_told in zip(tasks, (True, False)):
        assert any("is another file on o-1" in line for line in lines(fleet.api, task)) == is_told
    fleet.join(2, "o", prints=prints("a"))
    assert not any(one["differing_files"] for one in requests.get(f"{fleet.api.url}/stations").json()["data"])


@pytest.fixture
def cluster(settings, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x" * 64)
    with socket.create_server(("127.0.0.1", 0)) as one:
        monkeypatch.setenv("WAN21_RAY_ADDRESS", f"127.0.0.1:{one.getsockname()[1]}")
        yield one


def test_where_nobody_answers_at_the_clusters_address_it_is_said_and_tried_again(
    cluster, monkeypatch, tmp_path, checkpoints, job
):
    address = cluster.getsockname()
    cluster.close()
    with played(monkeypatch, tmp_path, checkpoints) as fleet:
        wait_until(lambda: requests.get(f"{fleet.api.url}/stations").status_code == 503)
        said = f"WAN21_RAY_ADDRESS=127.0.0.1:{address[1]} does not take this machine .nobody answers there"
        with pytest.raises(APIError, match=said):
            fleet.api.client.run(job(), wait=False)
        assert fleet.links == []
        with socket.create_server(address):
            wait_until(lambda: fleet.links)


NOT_TAKEN = r"WAN21_RAY_ADDRESS=[\d.:]+ does not take this machine .no route to it.. Run `ray start`"


@pytest.mark.parametrize(
    "news, said",
    [
        (("refused", 0, 0, "no route to it"), NOT_TAKEN),
        (("none", 0, 0, "no machine has so many GPUs"), "no machine has so many GPUs"),
        (None, r"driver of Ray at WAN21_RAY_ADDRESS=[\d.:]+ ended .killed."),
        (("gone", 0, 0, "there is no main.py"), "station (number 1|m-1): there is no main.py"),
    ],
    ids=["refused", "no room", "ended", "cannot start"],
)
def test_why_there_are_no_stations_is_told_to_who_asks(
    cluster, monkeypatch, tmp_path, checkpoints, job, news, said
):
    def trouble():
        if news is None or news[0] == "refused":
            links = len(fleet.links)
            if news:
                fleet.api.do(fleet.link.news, *news)
            fleet.api.do(fleet.link.end, "killed")
            wait_until(lambda: len(fleet.links) > links)
        else:
            fleet.api.do(fleet.link.news, *news)

    with played(monkeypatch, tmp_path, checkpoints) as fleet:
        wait_until(lambda: fleet.links)
        trouble()
        with pytest.raises(APIError, match=said) as raised:
            fleet.api.client.run(job(), wait=False)
        assert raised.value.status_code == 503
        answer = requests.get(f"{fleet.api.url}/stations")
        if news and news[0] == "gone":
            assert answer.json()["data"][0]["why"] in said
        else:
            assert answer.status_code == 503 and answer.headers["Retry-After"]
            assert re.search(said, answer.json()["detail"])
        fleet.join(0)
        first = fleet.api.client.run(job(), wait=False)["id"]
        assert requests.get(f"{fleet.api.url}/stations").json()["data"][0]["state"] == "running"
        fleet.die(0)
        trouble()  # after there was one, jobs wait, and say for what
        second = fleet.api.client.run(job(), wait=False)["id"]
        waits = "no station that has its files answers now" if news and news[0] == "gone" else said
        for task in (first, second):
            assert any(re.search(waits, line) for line in lines(fleet.api, task))
        fleet.api.do(fleet.link.news, "none", 0, 0, "")
        fleet.join(0)
        wait_until(lambda: status(fleet.api, first) == 3)


def test_operators_see_stations_and_figures_and_clients_do_not(
    settings, monkeypatch, tmp_path, checkpoints, job
):
    monkeypatch.setenv("WAN21_API_KEYS", KEYS["anna"])
    monkeypatch.setenv("WAN21_OPERATOR_KEYS", KEYS["operator"])
    with played(monkeypatch, tmp_path, checkpoints) as fleet:

        def get(route, key=None):
            headers = {"Authorization": f"Bearer {KEYS[key]}"} if key else {}
            return requests.get(f"{fleet.api.url}{route}", headers=headers)

        for route in ("/stations", "/metrics"):
            assert [get(route, key).status_code for key in (None, "bert", "anna")] == [401, 401, 403]
        assert get("/sessions", "operator").status_code == 401
        fleet.join(0)
        fleet.join(1)
        task = fleet.api.client_of(KEYS["anna"]).run(job(), wait=False)["id"]
        number = fleet.given(1)[0][0]
        fleet.finish(number)
        wait_until(lambda: status(fleet.api, task, KEYS["anna"]) == 10)
        fleet.api.client_of(KEYS["anna"]).run(job(), wait=False)
        second = fleet.given(2)[1][0]
        fleet.die(second)
        name = f"m-{second + 1}"
        text = wait_until(lambda: t if 'running"} 1.0' in (t := get("/metrics", "operator").text) else None)
        assert f'wan21_tasks_ended_total{{state="completed",station="m-{number + 1}"}} 1.0' in text
        assert f'wan21_station_jobs_lost_total{{station="{name}"}} 1.0' in text
        assert f'wan21_station_up{{station="{name}"}} 0.0' in text
        assert f'wan21_task_seconds_count{{station="m-{number + 1}"}} 1.0' in text
        assert [one["state"] for one in get("/stations", "operator").json()["data"]].count("away") == 1


def test_a_missing_library_is_named(api, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    answer = requests.get(f"{api.url}/metrics")
    assert answer.status_code == 503 and "pip install prometheus_client" in answer.json()["detail"]


def test_figures_and_stations_of_one_comfyui(api, job):
    assert requests.get(f"{api.url}/stations").json()["data"] == []
    api.client.run(job(), wait=False)
    assert 'wan21_tasks{state="waiting"} 1.0' in requests.get(f"{api.url}/metrics").text


@pytest.mark.parametrize(
    "name, value",
    [
        ("WAN21_STATIONS", "0"),
        ("WAN21_STATIONS", "two"),
        ("WAN21_GPUS_PER_JOB", "-1"),
        ("WAN21_STATION_HUNG_SECONDS", "0"),
    ],
)
def test_a_wrong_setting_is_named(host, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} is '{value}'; set a whole number"), serve(host):
        pass


def test_a_cluster_is_not_joined_without_a_token_of_this_users_own(settings, host, monkeypatch, tmp_path):
    monkeypatch.setenv("WAN21_RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    token = tmp_path / "auth_token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    with pytest.raises(Refusal, match="no token of the cluster"), serve(host):
        pass
    token.write_text("x" * 64)
    token.chmod(0o644)
    with pytest.raises(Refusal, match="chmod 600"), serve(host):
        pass


def test_without_ray_the_setting_is_refused_by_name(settings, host, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"WAN21_STATIONS is set, and .*pip install ray"), serve(host):
        pass


def test_several_gpus_of_a_job_are_shared_by_its_workers(settings, monkeypatch, tmp_path, checkpoints, job):
    monkeypatch.setenv("WAN21_GPUS_PER_JOB", "2")
    with played(monkeypatch, tmp_path, checkpoints) as fleet:
        fleet.join(0)
        fleet.api.client.run(job(num_frames=9, segments=["on"]), wait=False)
        graph = fleet.graph(fleet.given(1)[0][1])
        assert fleet.link.setup[2] == 2
    [(number, node)] = [(i, one) for i, one in graph.items() if one["class_type"] == "Wan21Workers"]
    samplers = [one["inputs"] for one in graph.values() if one["class_type"] == "Wan21Sampler"]
    assert [one["model"] for one in samplers] == [[number, 0]] * 2
    decodes = [one["inputs"] for one in graph.values() if one["class_type"] == "Wan21VAEDecode"]
    assert decodes and all(one["vae"] == [number, 1] for one in decodes)
    assert graph[node["inputs"]["vae"][0]]["class_type"] == "Wan21VAELoader"
    assert (
        node["inputs"]["devices"] == 2
        and graph[node["inputs"]["model"][0]]["class_type"] == "Wan21ModelLoader"
    )


WITHOUT = f"""
import sys
sys.path[:0] = [{str(ROOT / "scripts")!r}, {str(ROOT / "tests" / "server")!r}]
from lib import pack
pack.load_pack()
pack.load_host()
from pathlib import Path
from helpers_server import FakeHost, serve
with serve(FakeHost(Path(sys.argv[1]), Path(sys.argv[2]))):
    assert not [name for name in sys.modules if name.split(".")[0] in ("ray", "prometheus_client")]
    print("served")
"""


def test_without_the_settings_neither_ray_nor_a_driver_is_there(tmp_path, checkpoints):
    command = [sys.executable, "-c", WITHOUT, str(tmp_path), str(checkpoints)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent)
    assert done.stdout == "served\n", done.stderr
