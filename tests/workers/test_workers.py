"""Real Ray with two workers on the CPU: the latents of one process, and what happens when things go wrong.

One engine serves all; tests that end it stand last. On two quiet cores all of it takes about a minute.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import comfy.model_management as management
import comfy.sample
import psutil
import pytest
import torch
from helpers import relative
from helpers_workers import LONG, ON_RAY, Faulty, shared
from lib.pack import ROOT
from safetensors.torch import save_file
from test_lora import first_lora
from wan21 import host, workers
from wan21.nodes.kept_latent import SAMPLING_SECONDS
from wan21.nodes.lora import Wan21LoraLoader
from wan21.nodes.vae_decode import Wan21VAEDecode
from wan21.nodes.workers import Wan21Workers
from wan21.wan.refusal import Refusal

pytestmark = ON_RAY

# An instance of ComfyUI that is to be killed: its engine alone, without the host.
ALONE = f"""
import sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
import importlib
from types import SimpleNamespace
import torch
from lib.pack import load_pack
load_pack("custom_nodes/wan21-i2v")  # a name of ComfyUI's kind
pack = importlib.import_module("custom_nodes/wan21-i2v.workers")
client = pack.Client(pack.Setup(1, False, {{}}, (), 1))
model = pack.RemoteModel(client, (SimpleNamespace, ()), "auto", 1)
said = []
for ask in (lambda: model.ask(int, "end"), lambda: model.call(torch.zeros(9999), 1, int)):
    try:
        ask()
    except RuntimeError as error:
        said.append(str(error))
assert not [name for name in sys.modules if name.split(".")[0] == "ray"]
print(client.process.pid, *said, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module", autouse=True)
def alone():
    """A process with an engine, started beside the other; gives it and the line that it will print."""
    process = subprocess.Popen(
        [sys.executable, "-c", ALONE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def job(models, prompts):
    return (models["t2v"], *prompts, {"samples": torch.zeros(1, 16, 3, 6, 10)})


@pytest.fixture
def faulty(client, tmp_path):
    """Gives a MODEL whose workers do as files in a folder say, by process."""

    def make(model, split="auto"):
        _, arguments = host.recipe_of(model)
        remote = workers.RemoteModel(client, (Faulty, (*arguments, str(tmp_path))), split, 2)
        return host.remote_model(model, remote)

    return make


def same(a, b):
    """As between devices: other shapes of the same products may round in another way."""
    torch.testing.assert_close(a["samples"], b["samples"], rtol=1e-5, atol=1e-6)


OPTIONS = {
    "plain": {},
    "no guidance": {"guidance_scale": 1.0},
    "everything": {
        "cache__multiplier": 2.0, "cache__profile": "t2v_1.3b", "steps": 6, "cfg_star": True,
        "skip_layers__layers": "1", "skip_layers__start_percent": 0, "nag": True, "solver": "dpm++",
    },
    "apart": {"execution__joint_pass": False},
}  # fmt: skip


@pytest.mark.parametrize("split", ["guidance", "sequence"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_our_sampler_gives_the_latents_of_one_process(client, job, sample, split, options):
    model, *rest = job
    whole, _ = sample(model, *rest, **options)
    remote, report = sample(shared(model, split), *rest, **options)
    same(remote, whole)
    assert f"workers: 2, split {split}: " in report
    assert re.search(r" s a call of the model, of which worker \d+ [\d.]+ s, worker \d+ ", report)


def test_workers_on_the_cpu_see_no_gpu(client, faulty, job):
    """Theirs is ComfyUI's `--cpu`: they would else meet over NCCL where there is a GPU."""
    assert faulty(job[0]).model.diffusion_model.elsewhere.ask(int, "gpus_seen") == ["", ""]


@LONG
def test_rays_door_is_shut_and_workers_meet_on_this_machine(client, job, sample, tmp_path):
    model, *rest = job
    sample(shared(model, "sequence"), *rest)
    rays = psutil.Process(client.process.pid).children(recursive=True)
    parts = [part for one in rays for part in one.cmdline()]
    [address] = {part.partition("=")[2] for part in parts if part.startswith("--gcs-address=")}
    command = [Path(sys.executable).with_name("ray"), "status", "--address", address]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
    for token in ({}, {"RAY_AUTH_TOKEN": "0" * 64}):
        done = subprocess.run(command, env=environment | token, capture_output=True, text=True)
        assert done.returncode and "token" in done.stderr.lower(), done.stderr
    # Ray always starts the program of its dashboard; without one it serves no pages and no interface.
    boards = [one for one in rays if any("dashboard.py" in part for part in one.cmdline())]
    assert all("--disable-frontend" in one.cmdline() for one in boards)
    assert all(
        end.laddr.ip == "127.0.0.1"
        for one in boards
        for end in one.net_connections()
        if end.status == "LISTEN"
    )
    pids = [pid for _, pid, _ in client.told if psutil.pid_exists(pid)]
    ends = [{(one.laddr, one.raddr) for one in psutil.Process(pid).net_connections()} for pid in pids]
    between = [(a, b) for a, b in ends[0] if (b, a) in ends[1]]
    assert between and {one.ip for pair in between for one in pair} == {"127.0.0.1"}


@pytest.mark.parametrize("dtype, schedule", [("default", ()), ("default", (1, 0.2)), ("fp8_e4m3fn", ())])
def test_loras(client, files, prompts, sample, tmp_path, dtype, schedule):
    """Merged, at the strengths of a schedule, and worked into weights of 8 bits."""
    latent = {"samples": torch.zeros(1, 16, 2, 4, 4)}
    save_file(first_lora(), tmp_path / "lora.safetensors")
    plain = host.load_model(files["t2v"], dtype)
    lora = host.read_lora(tmp_path / "lora.safetensors", plain)
    model = host.add_lora(plain, lora, 0.8, schedule)
    without, whole = (sample(one, *prompts, latent)[0] for one in (plain, model))
    assert relative(whole["samples"], without["samples"]) > 1e-4
    same(sample(shared(model), *prompts, latent)[0], whole)


def test_an_image_model_with_the_hosts_sampler(client, models, image_to_video):
    positive, negative, latent = image_to_video()
    noise = comfy.sample.prepare_noise(latent["samples"], 3)
    steps = []

    def run(model):
        return comfy.sample.sample(
            model, noise, 3, 4.0, "euler", "simple", positive, negative, latent["samples"], seed=3,
            callback=lambda step, x0, x, total: steps.append(step), disable_pbar=True,
        )  # fmt: skip

    same({"samples": run(shared(models["i2v"], "sequence"))}, {"samples": run(models["i2v"])})
    assert steps == [0, 1, 2] * 2


def test_what_does_not_change_is_sent_once(client, job, sample):
    model = shared(job[0])
    sent = []
    request = client.request

    def watch(check, name, *args):
        if name == "call":
            sent.append(sum(data.nbytes for _, _, data in args[1][3].values()))
        return request(check, name, *args)

    client.request = watch
    try:
        sample(model, *job[1:])
    finally:
        del client.request
    latent = job[3]["samples"].nbytes
    assert len(sent) == 3 and sent[0] > latent and sent[1:] == [latent] * 2


def test_two_models_that_take_turns(client, models):
    """As with guiders that ask two MODELs in each step: what one has sent is not the other's."""
    t2v = models["t2v"]
    pair = [shared(t2v), shared(t2v)]
    g = torch.Generator().manual_seed(0)
    texts = [torch.randn(1, 64, host.config_of(t2v).text_dim, generator=g) for _ in pair]
    management.load_models_gpu([t2v])
    for _ in range(2):
        for model, text in zip(pair, texts):
            x = torch.randn(1, 16, 3, 6, 10, generator=g)
            asked = (x, torch.tensor([500.0]), text, None, None, {})
            here, there = (one.model.diffusion_model(*asked) for one in (t2v, model))
            torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6)
    for model in pair:
        model.model.diffusion_model.elsewhere.end()


def test_out_of_memory_in_one_worker(client, faulty, job, sample, tmp_path):
    model, *rest = job
    whole, _ = sample(model, *rest)
    for split in ("guidance", "sequence"):
        name, pid, _ = client.told[1]  # numbers go on where another test had one replaced
        (tmp_path / str(pid)).write_text("memory")
        began = time.monotonic()
        remote, report = sample(faulty(model, split), *rest)
        assert time.monotonic() - began < 60
        same(remote, whole)
        assert f"out of memory on {name} in step 1, which was done again" in report


def test_cancel_and_run_again(client, faulty, job, sample, tmp_path):
    model, *rest = job
    remote = faulty(model, "sequence")
    whole, _ = sample(model, *rest)
    sample(remote, *rest)  # loaded
    for _, pid, _ in client.told:
        (tmp_path / str(pid)).write_text("slow")
    cancelled = []

    def cancel():
        cancelled.append(time.monotonic())
        management.interrupt_current_processing(True)

    threading.Timer(0.3, cancel).start()
    with pytest.raises(management.InterruptProcessingException):
        sample(remote, *rest, steps=100)
    assert time.monotonic() - cancelled[0] < 15
    for _, pid, _ in client.told:
        (tmp_path / str(pid)).unlink()
    same(sample(remote, *rest)[0], whole)


@pytest.mark.parametrize(
    "kind", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=LONG)], ids=["killed", "hung"]
)
def test_a_lost_worker(client, faulty, job, sample, tmp_path, kind):
    model, *rest = job
    whole, _ = sample(model, *rest)
    remote = faulty(model, "sequence")
    sample(remote, *rest)  # in this generation of workers
    pids = [pid for _, pid, _ in client.told if psutil.pid_exists(pid)]
    for pid in pids:
        (tmp_path / str(pid)).write_text("slow")
    threading.Timer(0.2, os.kill, (pids[0], kind)).start()
    began = time.monotonic()
    result, report = sample(remote, *rest)
    assert time.monotonic() - began < 60
    same(result, whole)
    assert f"process {pids[0]}) " in report and "; 1 left" in report


def test_a_worker_lost_in_two_runs(client, faulty, job, sample, tmp_path):
    """The second run has another in its place, which is lost as well."""
    model, *rest = job
    whole, _ = sample(model, *rest)
    remote = faulty(model, "sequence")
    lost = set()
    for _ in range(2):
        sample(remote, *rest)
        told = client.request(int, "ask", remote.model.diffusion_model.elsewhere.key, "pid")
        for pid in told:
            (tmp_path / str(pid)).write_text("slow")
        threading.Timer(0.2, os.kill, (told[-1], signal.SIGKILL)).start()
        began = time.monotonic()
        result, report = sample(remote, *rest)
        assert time.monotonic() - began < 60
        same(result, whole)
        assert f"process {told[-1]}) " in report and "; 1 left" in report
        lost.add(told[-1])
    assert len(lost) == 2


@LONG
def test_both_workers_lost_one_after_the_other(client, faulty, job, sample, tmp_path):
    """In one run: it goes on with one, then with new ones."""
    model, *rest = job
    whole, _ = sample(model, *rest, steps=12)
    remote = faulty(model, "sequence")
    sample(remote, *rest)
    told = client.request(int, "ask", remote.model.diffusion_model.elsewhere.key, "pid")
    for seconds, pid in zip((0.2, 0.9), told):
        (tmp_path / str(pid)).write_text("slow")
        threading.Timer(seconds, os.kill, (pid, signal.SIGKILL)).start()
    began = time.monotonic()
    result, report = sample(remote, *rest, steps=12)
    assert time.monotonic() - began < 90  # an engine is started in it
    same(result, whole)
    assert "; 1 left" in report and "the workers were lost and are started again" in report


@LONG
def test_a_killed_gcs_server(models, job, sample, tmp_path, monkeypatch):
    """Ray ends the engine then, and not ComfyUI; the engine is started anew."""
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")  # Ray's own is 60
    model, *rest = job
    steps = 60
    whole, _ = sample(model, *rest, steps=steps)
    settings, paths = host.process_settings()
    client = workers.Client(workers.Setup(2, False, settings, (*paths, str(Path(__file__).parent)), 1))
    _, arguments = host.recipe_of(model)
    remote = workers.RemoteModel(client, (Faulty, (*arguments, str(tmp_path))), "auto", 2)
    model = host.remote_model(model, remote)
    try:
        sample(model, *rest)
        for _, pid, _ in client.told:
            (tmp_path / str(pid)).write_text("slow")
        engine = psutil.Process(client.process.pid)
        left = [engine, *engine.children(recursive=True)]
        next(process for process in left if process.name() == "gcs_server").kill()
        began = time.monotonic()
        result, report = sample(model, *rest, steps=steps)
        assert time.monotonic() - began < 120
        same(result, whole)
        assert "the workers were lost and are started again" in report
        _, alive = psutil.wait_procs(left, timeout=30)
        assert alive == []
    finally:
        client.close()


def test_a_step_that_teacache_would_reuse_is_said_to_be_computed(client, job, sample):
    options = OPTIONS["everything"]
    model, *rest = job
    remote = shared(model, "sequence")
    _, report = sample(remote, *rest, **options)  # 0: no velocity, which is no call
    plan = re.search("^plan: ([0#.]+)", report, re.MULTILINE)[1]
    reused = plan.index(".")
    request, calls = client.request, []

    def kill_in_that_step(check, name, *args, **kwargs):
        calls.append(name)
        if calls.count("call") == reused - plan.count("0") + 1 and name == "call":
            pid = next(pid for _, pid, _ in client.told if psutil.pid_exists(pid))
            os.kill(pid, signal.SIGKILL)
        return request(check, name, *args, **kwargs)

    client.request = kill_in_that_step
    try:
        _, report = sample(remote, *rest, **options)
    finally:
        del client.request
    assert f"step {reused + 1}, which TeaCache would reuse, was computed: what it reuses was lost" in report


def test_refusals(client, models, prompts, sample, monkeypatch):
    remote = shared(models["t2v"])
    with pytest.raises(Refusal, match="Put this node before Wan21Workers"):
        remote.clone().add_patches({})
    changed = models["t2v"].clone()
    changed.set_model_patch_replace(lambda *_: None, "dit", "double_block", 0)
    with pytest.raises(Refusal, match="Wan21Workers: another node put replaced blocks"):
        shared(changed)
    with pytest.raises(Refusal, match="comes from a Wan21Workers already"):
        shared(remote)
    monkeypatch.setattr("wan21.nodes.lora._path", lambda *_: Path("a.safetensors"))
    with pytest.raises(Refusal, match="Wan21LoraLoader: the MODEL comes from Wan21Workers"):
        Wan21LoraLoader.execute(remote, "a.safetensors", 1.0, "", "", False)
    merged = models["t2v"].clone()
    merged.add_patches(models["t2v"].get_key_patches("diffusion_model."), 0.5, 0.5)
    with pytest.raises(Refusal, match="another MODEL is merged into this one"):
        shared(merged)
    after = remote.clone()
    after.model_options["transformer_options"]["optimized_attention_override"] = lambda *_: None
    with pytest.raises(Refusal, match="put an attention of its own"):
        sample(after, *prompts, {"samples": torch.zeros(1, 16, 1, 4, 4)})


def test_one_device_or_no_ray_hand_the_model_on(models, monkeypatch):
    said = []
    monkeypatch.setattr(host, "tell", said.append)
    assert shared(models["t2v"], devices=0) is models["t2v"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert shared(models["t2v"]) is models["t2v"]
    assert "one device" in said[0] and "pip install ray" in said[1]


def test_a_killed_process_leaves_no_ray_behind(alone):
    pid, *said = alone.stdout.readline().split(" ", 1)
    assert said[0].count("'types.SimpleNamespace' object has no attribute") == 2
    engine = psutil.Process(int(pid))
    left = [engine, *engine.children(recursive=True)]
    assert any("raylet" in process.name() for process in left)
    alone.kill()
    _, alive = psutil.wait_procs(left, timeout=30)
    assert alive == []


def lost(check):
    raise workers.WorkersLost("no worker is left")


def test_what_was_refined_or_decoded_is_kept_where_a_run_without_workers_fails(
    client, job, sample, vae, tmp_path, monkeypatch
):
    """All workers are lost, and what is left has too little memory: the error says both."""
    monkeypatch.setattr("folder_paths.output_directory", str(tmp_path))
    model, positive, negative, latent = job
    remote = shared(model)
    first = sample(model, positive, negative, latent)[0] | {SAMPLING_SECONDS: 3600}

    def too_little(*_, **__):
        raise torch.OutOfMemoryError("pretended: out of memory.")

    monkeypatch.setattr(client, "start", lost)
    monkeypatch.setattr(remote.model.diffusion_model.here, "call", too_little)
    said = r"the workers are lost .*goes on without workers, on cpu: pretended.*The latent .* is kept in "
    with pytest.raises(RuntimeError, match=f"^Wan21Sampler: .*{said}"):
        sample(remote, positive, negative, first, denoise=0.5)
    [kept] = tmp_path.rglob("*.latent")
    kept.unlink()
    monkeypatch.setattr("wan21.host.decode.DecodeNeed.load", too_little)
    with pytest.raises(RuntimeError, match=r"^Wan21VAEDecode: .*out of memory.*is kept in"):
        Wan21VAEDecode.execute(Wan21Workers.execute(model, 2, "auto", vae).result[1], first, "auto")
    assert [*tmp_path.rglob("*.latent")] != []


@pytest.mark.parametrize("again", [False, pytest.param(True, marks=LONG)], ids=["once", "and another"])
def test_a_killed_engine(client, job, sample, monkeypatch, again):
    """Another is started, and where that fails the run goes on here."""
    model, *rest = job
    remote = shared(model)
    whole, _ = sample(model, *rest)
    sample(remote, *rest)
    engine = psutil.Process(client.process.pid)
    left = [engine, *engine.children(recursive=True)]
    engine.kill()
    if again:
        engine.wait()  # the run finds it gone; else it may notice in its first question
    else:
        monkeypatch.setattr(client, "start", lost)
    began = time.monotonic()
    result, report = sample(remote, *rest)
    assert time.monotonic() - began < 120
    same(result, whole)
    assert (" worker 1 " in report) == again
    assert "the workers were lost and are started again" in report
    _, alive = psutil.wait_procs(left, timeout=30)
    assert alive == []
