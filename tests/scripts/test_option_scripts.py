"""The scripts that measure, on small random checkpoints: they run, and they compute right."""

import json

import bench
import calibrate_teacache
import compare_interpolation
import compare_options
import memory_table
import numpy as np
import pytest
import torch
from lib.pack import ROOT
from lib.quality import psnr, ssim
from wan21 import host

SMALL = ["--width", "32", "--height", "32", "--num-frames", "5"]


def test_calibration_writes_what_the_sampler_then_uses(files, tmp_path, sample, prompts):
    model = tmp_path / "tiny.safetensors"
    model.write_bytes(files["t2v"].read_bytes())
    arguments = [str(model), "--text-encoder", str(files["umt5"]), "--steps", "10", *SMALL]
    args = calibrate_teacache.arguments(arguments)
    found = calibrate_teacache.calibrate(
        calibrate_teacache.Files(args.model, args.text_encoder, args.vae), args
    )
    coefficients, explained, points = found
    assert points == 2 * 9 and len(coefficients) == 5 and explained > 0.2
    model.with_name("tiny.safetensors.teacache.json").write_text(json.dumps(coefficients))
    latent = {"samples": torch.zeros(1, 16, 2, 4, 4)}
    loaded = host.load_model(model)
    _, report = sample(loaded, *prompts, latent, steps=10, flow_shift=5.0, cache__multiplier=2.0)
    assert "teacache: 5 of 10 steps computed, profile measured" in report
    model.with_name("tiny.safetensors.teacache.json").unlink()
    model.chmod(0o640)
    calibrate_teacache.embed(model, coefficients)
    assert model.stat().st_mode & 0o777 == 0o640
    assert host.measured_coefficients(host.load_model(model)) == tuple(coefficients)


def test_points_are_the_changes_of_residuals(files, prompts):
    """One pass of two steps, written out with the model itself."""
    arguments = ["x", "--text-encoder", str(files["umt5"]), "--steps", "2", "--guidance-scale", "1", *SMALL]
    args = calibrate_teacache.arguments(arguments)
    local = calibrate_teacache.LocalJob(calibrate_teacache.Files(files["t2v"], files["umt5"]), args)
    job = calibrate_teacache.SampleJob(2, 1.0, 5.0, "euler")
    seen = []
    blocks = local.model.model.diffusion_model.blocks
    first = blocks[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    last = blocks[-1].register_forward_hook(lambda m, args, out: seen.append(out.clone()))
    x, y = calibrate_teacache.record(job, local, "a cat", 0)
    first.remove()
    last.remove()
    r0, r1 = seen[1] - seen[0], seen[3] - seen[2]
    assert y == pytest.approx([((r1 - r0).abs().mean() / r0.abs().mean()).item()], rel=1e-4)
    e0, e1 = local.model.model.diffusion_model.embed_time(torch.tensor([1000 * s for s in job.sigmas[:2]]))
    assert x == pytest.approx([((e1 - e0).abs().mean() / e0.abs().mean()).item()], rel=1e-4)


def test_the_fit_is_a_polynomial_of_degree_four():
    x = np.linspace(0.01, 0.3, 20)
    true = [3.0, -2.0, 1.0, 0.5, 0.1]
    coefficients, explained = calibrate_teacache.fit(x, np.polyval(true, x))
    assert coefficients == pytest.approx(true, rel=1e-6) and explained == pytest.approx(1)
    with pytest.raises(SystemExit, match="at least 6 steps"):
        calibrate_teacache.fit(x[:4], x[:4])


def test_options_are_compared_with_the_plain_run(files, tmp_path):
    only = "teacache-2,skip-layers,separate-passes"
    models = files["vae"].parent.parent
    arguments = [str(models), "--model", files["t2v"].name, "--steps", "4", "--only", only, *SMALL]
    args = compare_options.arguments([*arguments, "--teacache-profile", "t2v_1.3b"])
    rows, videos = compare_options.compare(compare_options.files_in(args.models, args.model), args)
    by_name = {row[0]: row for row in rows}
    assert list(by_name) == ["plain", "teacache-2", "skip-layers", "separate-passes"]
    assert by_name["plain"][3:] == (float("inf"), pytest.approx(1), 4)
    assert by_name["separate-passes"][3] == float("inf")
    assert by_name["teacache-2"][5] < 4 and by_name["teacache-2"][3] < 100
    assert compare_options.side_by_side(videos).size == (5 * 32, 4 * (32 + compare_options.LABEL_HEIGHT))
    assert compare_options.as_table(rows).count("\n") == 5


def test_the_page_on_memory_holds_the_table_of_today():
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert memory_table.as_table() in page


def test_psnr_and_ssim():
    a = torch.rand(2, 24, 24, 3, generator=torch.Generator().manual_seed(0))
    assert psnr(a, a + 0.1) == pytest.approx(20, abs=1e-3)
    assert ssim(a, a) == pytest.approx(1)
    assert ssim(a, a.flip(0)) < 0.2
    assert 0.5 < ssim(a, 0.9 * a) < 1


@pytest.mark.parametrize("case", ["dit", "vae-encode", "vae-decode"])
def test_the_peers_of_the_benchmark_compute_the_same(case):
    row = bench.measure(case, "cpu", repeat=1, quick=True, memory=False)
    errors, seconds = dict(row["relative_error"]), row["seconds"]
    assert seconds.keys() == set(bench.CONTESTANTS[case])
    assert errors.pop(bench.BF16, 0.01) == pytest.approx(0.01, abs=0.01)  # where the CPU has it
    assert errors.keys() == set(bench.PEERS) and max(errors.values()) < 3e-5
    assert row["time_ratio"] == pytest.approx(seconds["ours"] / min(seconds[peer] for peer in bench.PEERS))
    assert bench.table([row]).count("\n") == 1 + len(seconds)


def test_the_benchmark_measures_memory_in_a_process_of_its_own():
    used, seconds, size = bench.cold_calls("vae-decode", ["ours"], quick=True)
    assert used.keys() == seconds.keys() == {"ours"} and "5 frames of 64x64" in size
    frames = 5 * 3 * 64 * 64 * 4
    assert frames < used["ours"] < 2**30


def test_interpolation_is_compared_with_the_true_frames():
    """Scenes move, and following the motion beats mixing frames, which beats repeating them."""
    args = compare_interpolation.arguments(["--width", "160", "--height", "96", "--frames", "3"])
    ways = {name: getattr(compare_interpolation, name) for name in ("repeat", "blend", "interpolate")}
    rows = compare_interpolation.compare(ways, args)
    for scene in compare_interpolation.SCENES:
        repeat, blend, followed = (found[scene] for _, found, _, _ in rows)
        assert repeat + 1 < blend < followed - 1, scene
    assert compare_interpolation.as_table(rows).count("\n") == 4
