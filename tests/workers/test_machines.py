"""Workers on several machines: what differs between them is refused; two network namespaces as two."""

import os
import secrets
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import relative
from helpers_workers import LONG, ON_RAY, Faulty, FaultyVae
from lib.machines import ADDRESSES, cannot_be_made, two_machines
from wan21 import host, workers
from wan21.nodes import workers as node
from wan21.nodes.vae_decode import Wan21VAEDecode
from wan21.wan.files.fingerprint import fingerprint
from wan21.wan.refusal import Refusal
from wan21.workers.client import ROOT
from wan21.workers.traits import CODE, difference, traits

pytestmark = ON_RAY


def test_versions_that_differ_are_named(tmp_path):
    _, paths = host.process_settings()
    here = traits(str(ROOT), paths)
    assert {"Python", "PyTorch", "this pack", "ComfyUI"} == set(here)
    for folder in CODE:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    assert difference(here, traits(str(tmp_path), paths)) == ""
    (tmp_path / "wan" / "rope.py").open("a").write("\n")
    assert difference(here, traits(str(tmp_path), paths)).startswith("this pack ")
    assert difference(here, here | {"PyTorch": "1.0"}) == f"PyTorch 1.0 (here {torch.__version__})"


def test_another_file_is_refused(client, models):
    factory, (recipe,) = host.recipe_of(models["t2v"])
    for other, said in (
        (replace(recipe, mark="1-0"), "is another file than in ComfyUI"),
        (replace(recipe, path=recipe.path.with_name("no.safetensors")), "there is no "),
    ):
        remote = workers.RemoteModel(client, (factory, (other,)), "auto", 2)
        with pytest.raises(Refusal, match=said):
            remote.ask(int, "end")


def test_a_file_is_told_from_another(tmp_path):
    file, size = tmp_path / "a", 5 * 2**20
    file.write_bytes(bytes(size))
    whole = fingerprint(file)
    for at in (0, size - 1, size):  # its begin, its end, its size
        with file.open("r+b") as changed:
            changed.seek(at)
            changed.write(b"1")
        assert fingerprint(file) != whole
        file.write_bytes(bytes(size))
    assert fingerprint(file) == whole


def test_without_a_token_of_our_own_no_cluster_is_joined(models, monkeypatch, tmp_path):
    monkeypatch.setenv("WAN21_RAY_ADDRESS", "10.77.0.1:6379")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(Refusal, match=r"Wan21Workers: WAN21_RAY_ADDRESS is set, and .* no token"):
        node.Wan21Workers.execute(models["t2v"], 0, "auto")
    (tmp_path / "token").write_text("0" * 64)
    (tmp_path / "token").chmod(0o644)
    with pytest.raises(Refusal, match=r"other users of this machine can read .*chmod 600"):
        node.Wan21Workers.execute(models["t2v"], 0, "auto")
    (tmp_path / "token").chmod(0o600)
    assert workers.cannot_join() is None


@pytest.fixture
def machines(tmp_path_factory, monkeypatch):
    """Two machines, a head of Ray on the first; ours is the first."""
    if reason := cannot_be_made():
        pytest.skip(reason)
    token = secrets.token_hex(32)
    with two_machines(tmp_path_factory.mktemp("r"), token) as made:
        said, started = made.start_ray(0)
        assert started, said
        monkeypatch.setenv("WAN21_RAY_ADDRESS", f"{ADDRESSES[0]}:6379")
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        python = tmp_path_factory.mktemp("bin") / "python"
        python.write_text(f'#!/bin/sh\nexec {" ".join(made.inside(0, [sys.executable]))} "$@"\n')
        python.chmod(0o700)
        monkeypatch.setattr("wan21.workers.process.sys", type("sys", (), {"executable": str(python)}))
        yield made


@LONG
def test_two_machines(machines, models, prompts, sample, tmp_path, monkeypatch):
    """The latents of one process; a node without the token, a cut link, more devices than there are."""
    stranger = {name: text for name, text in machines.environment.items() if name != "RAY_AUTH_TOKEN"}
    said, started = machines.start_ray(1, stranger | {"HOME": str(tmp_path)})
    assert not started and "oken" in said, said
    said, started = machines.start_ray(1)
    assert started, said
    job = (*prompts, {"samples": torch.zeros(1, 16, 3, 6, 10)})
    whole, _ = sample(models["t2v"], *job)
    settings, paths = host.process_settings()
    paths = (*paths, os.path.dirname(__file__))
    setup = workers.Setup(0, False, settings, paths, 1, os.environ["WAN21_RAY_ADDRESS"])
    client = workers.Client(setup, hung_seconds=3)
    try:
        _, arguments = host.recipe_of(models["t2v"])
        remote = workers.RemoteModel(client, (Faulty, (*arguments, str(tmp_path))), "auto", 0)
        model = host.remote_model(models["t2v"], remote)
        latent, report = sample(model, *job)
        torch.testing.assert_close(latent["samples"], whole["samples"], rtol=1e-5, atol=1e-6)
        assert "1 pass on 1 and 1 pass on 1" in report
        assert all(f" on {address} " in report for address in ADDRESSES)
        for _, pid, _ in client.told:
            (tmp_path / str(pid)).write_text("slow")
        threading.Timer(0.2, machines.cut).start()
        began = time.monotonic()
        latent, report = sample(model, *job)
        assert time.monotonic() - began < 60
        torch.testing.assert_close(latent["samples"], whole["samples"], rtol=1e-5, atol=1e-6)
        assert f"on {ADDRESSES[1]} (process" in report and "gave no sign of life for 3 s; 1 left" in report
        began = time.monotonic()
        latent, report = sample(model, *job)  # nobody is waited for
        assert time.monotonic() - began < 60
        torch.testing.assert_close(latent["samples"], whole["samples"], rtol=1e-5, atol=1e-6)
        assert "2 passes on 1" in report and ADDRESSES[1] not in report
    finally:
        client.close()
    client = workers.Client(setup._replace(count=9))
    with pytest.raises(Refusal, match=r"devices is 9, and the Ray cluster has . CPU cores and no GPU"):
        client.start(int)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with pytest.raises(Refusal, match=r"does not take this machine .*oken"):
        client.start(int)
    client.close()


@LONG
def test_a_decode_over_two_machines(machines, vae, tmp_path, monkeypatch):
    """The frames of one process, also where the link is cut in the middle."""
    sentences = []
    monkeypatch.setattr("wan21.host.decode.tell", sentences.append)
    said, started = machines.start_ray(1)
    assert started, said
    latent = {"samples": torch.randn(1, 16, 5, 3, 20, generator=torch.Generator().manual_seed(0))}
    whole = Wan21VAEDecode.execute(vae, latent, "auto").result[0]
    settings, paths = host.process_settings()
    paths = (*paths, os.path.dirname(__file__))
    setup = workers.Setup(0, False, settings, paths, 1, os.environ["WAN21_RAY_ADDRESS"])
    client = workers.Client(setup, hung_seconds=3)
    try:
        _, arguments = host.vae_recipe_of(vae)
        remote = workers.RemoteVae(client, (FaultyVae, (*arguments, str(tmp_path))), 0)
        shared = host.shared_vae(vae, remote)
        assert relative(Wan21VAEDecode.execute(shared, latent, "auto").result[0], whole) < 1e-5
        assert all(f" on {address} " in sentences[0] for address in ADDRESSES)
        for _, pid, _ in client.told:
            (tmp_path / str(pid)).write_text("slow")
        threading.Timer(0.3, machines.cut).start()
        sentences.clear()
        began = time.monotonic()
        assert relative(Wan21VAEDecode.execute(shared, latent, "auto").result[0], whole) < 1e-5
        assert time.monotonic() - began < 60
        told = " ".join(sentences)
        assert f"on {ADDRESSES[1]} (process" in told and "part of the frame is decoded again" in told
    finally:
        client.close()


@LONG
def test_a_machine_with_another_version_or_another_file_is_refused(machines, models, tmp_path):
    """By name, before anything is computed; the other machine has one file changed."""
    settings, paths = host.process_settings()
    setup = workers.Setup(0, False, settings, paths, 1, os.environ["WAN21_RAY_ADDRESS"])
    factory, (recipe,) = host.recipe_of(models["t2v"])
    version, versions = Path(paths[0], "comfyui_version.py"), "Install the same versions on every machine"
    for path, change, says in (
        (ROOT / "wan" / "rope.py", lambda text: text + b"\n", f"has this pack .* {versions}"),
        (version, lambda _: b'__version__ = "9.9"\n', f"has ComfyUI 9.9 .* {versions}"),
        (recipe.path, lambda text: text[:-1] + b"~", "is another file than in ComfyUI"),
    ):
        other = tmp_path / path.name
        other.write_bytes(change(path.read_bytes()))
        said, started = machines.start_ray(1, instead=(path, other))
        assert started, said
        client = workers.Client(setup)
        try:
            with pytest.raises(Refusal, match=says):
                workers.RemoteModel(client, (factory, (recipe,)), "auto", 0).ask(int, "end")
        finally:
            client.close()
        machines.leave(1)
