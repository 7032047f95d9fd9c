"""Decodes shared by two workers on the CPU: the frames of one process, and what goes wrong on the way."""

import os
import re
import signal
import threading
import time

import comfy.model_management as management
import psutil
import pytest
import torch
from helpers import relative
from helpers_workers import ON_RAY, FaultyVae
from wan21 import host, workers
from wan21.nodes.vae_decode import Wan21VAEDecode
from wan21.nodes.workers import Wan21Workers
from wan21.wan.refusal import Refusal

from nodes import VAEDecode, VAEDecodeTiled, VAEEncode

pytestmark = ON_RAY
H, W = 3, 20


def latent(frames=3, batch=1):
    g = torch.Generator().manual_seed(frames)
    return {"samples": torch.randn(batch, 16, frames, H, W, generator=g)}


@pytest.fixture
def said(monkeypatch):
    """Sentences that were told."""
    sentences = []
    monkeypatch.setattr("wan21.host.decode.tell", sentences.append)
    return sentences


@pytest.fixture(scope="module")
def shared(client, models, vae):
    """The VAE after the node."""
    return Wan21Workers.execute(models["t2v"], 2, "auto", vae).result[1]


@pytest.fixture
def faulty(client, vae, tmp_path):
    """A VAE whose workers do as files in a folder say, by process."""
    _, arguments = host.vae_recipe_of(vae)
    return host.shared_vae(vae, workers.RemoteVae(client, (FaultyVae, (*arguments, str(tmp_path))), 2))


def pids(client):
    return [pid for _, pid, _ in client.told if psutil.pid_exists(pid)]


def decode(vae, latent, tile_size="auto"):
    return Wan21VAEDecode.execute(vae, latent, tile_size).result[0]


WAYS = {
    "ours": decode,
    "whole": lambda vae, latent: decode(vae, latent, "0"),
    "tiles": lambda vae, latent: decode(vae, latent, "128"),
    "the host's": lambda vae, latent: VAEDecode().decode(vae, latent)[0],
    "the host's in tiles": lambda vae, latent: VAEDecodeTiled().decode(vae, latent, 128)[0],
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_frames_of_one_process(shared, vae, said, way):
    expected = way(vae, latent(2, batch=2))
    assert said == []
    assert relative(way(shared, latent(2, batch=2)), expected) < 1e-5
    assert re.match(r"workers: decoded by worker \d+ [\d.]+ s, worker \d+ ", said[0])


def test_what_is_encoded_is_encoded_here(shared, vae):
    pixels = torch.rand(5, 16, 24, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(*(VAEEncode().encode(one, pixels)[0]["samples"] for one in (shared, vae)))


def test_progress_moves_to_the_end(shared, monkeypatch):
    done = []
    monkeypatch.setattr("wan21.host.decode.Progress", lambda: lambda *at: done.append(at))
    decode(shared, latent(3))
    assert done == sorted(done) and done[-1] == (9, 9) and len({value for value, _ in done}) > 3


def test_out_of_memory_in_one_worker(client, faulty, vae, said, tmp_path):
    """It goes on in tiles there, and says so here."""
    decode(faulty, latent(1))  # loaded
    (tmp_path / str(pids(client)[1])).write_text("memory")
    expected = decode(vae, latent(3))
    said.clear()
    assert relative(decode(faulty, latent(3)), expected) < 1e-5
    assert "out of memory with 0 % decoded, which stay; it goes on in tiles of 64 pixels" in said


def test_cancel_and_decode_again(client, faulty, vae, tmp_path):
    decode(faulty, latent(1))
    for pid in pids(client):
        (tmp_path / str(pid)).write_text("slow")
    cancelled = []

    def cancel():
        cancelled.append(time.monotonic())
        management.interrupt_current_processing(True)

    threading.Timer(0.2, cancel).start()
    with pytest.raises(management.InterruptProcessingException):
        decode(faulty, latent(9))
    assert time.monotonic() - cancelled[0] < 15
    for pid in pids(client):
        (tmp_path / str(pid)).unlink()
    assert relative(decode(faulty, latent(3)), decode(vae, latent(3))) < 1e-5


def test_a_window_lost_with_its_worker_is_decoded_again(client, faulty, vae, said, tmp_path):
    expected = decode(vae, latent(5))
    decode(faulty, latent(1))
    victim = pids(client)[0]
    (tmp_path / str(victim)).write_text("slow")
    threading.Timer(0.3, os.kill, (victim, signal.SIGKILL)).start()
    said.clear()
    began = time.monotonic()
    assert relative(decode(faulty, latent(5)), expected) < 1e-5
    assert time.monotonic() - began < 60
    assert f"process {victim}) died" in said[1] and "part of the frame is decoded again" in said[1]


def test_without_workers_it_is_decoded_here(shared, vae, said, monkeypatch):
    def lost(*_):
        raise workers.WorkersLost("no worker is left")

    monkeypatch.setattr(shared.first_stage_model.elsewhere.decoders, "decode", lost)
    for way in WAYS.values():
        said.clear()
        assert torch.equal(way(shared, latent(2)), way(vae, latent(2)))
        assert "This decode goes on without workers, on cpu" in said[0]


def test_refusals(models, shared, vae):
    def refused(vae, match):
        with pytest.raises(Refusal, match=match):
            Wan21Workers.execute(models["t2v"], 2, "auto", vae)

    refused(shared, "Wan21Workers: the VAE comes from a Wan21Workers already")
    other = type("Other", (), {"first_stage_model": None})()
    refused(other, "was not loaded by Wan21VAELoader")


def test_a_vae_that_does_not_come_in_does_not_go_out(client, models):
    _, nothing = Wan21Workers.execute(models["t2v"], 2, "auto").result
    assert "no vae comes in" in nothing.message
