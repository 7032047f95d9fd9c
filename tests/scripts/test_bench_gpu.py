"""The benchmark for GPUs at toy size on the CPU, and what is packed for a machine without network."""

import json
import tarfile
import time

import bench_gpu
import pack_for_gpu
import pytest
import torch
from lib.gpu_bench import SECTIONS, Bench, Missing
from lib.gpu_bench.bench import Race, gpu_size, toy_size
from lib.gpu_bench.dit import tera_operations
from lib.gpu_bench.kernels import eager
from lib.pack import ROOT
from lib.peers import random_dit
from wan21.wan import glue


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """All of it, as the JSON says."""
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    bench_gpu.main(["--quick", "--device", "cpu", "--json", str(path)])
    return json.loads(path.read_text())


def rows(written, section):
    [found] = [part for part in written["sections"] if part["section"] == section]
    return {row["name"]: row for row in found["rows"]}


def test_every_section_runs_or_says_why_not(written):
    assert [part["section"] for part in written["sections"]] == list(SECTIONS)
    assert {"date", "commit", "card", "torch", "cudnn", "driver", "host", "size"} <= written.keys()
    for part in written["sections"]:
        said = [part.get("skipped", ""), *(row.get("skipped", "") for row in part["rows"])]
        assert not [text for text in said if text.startswith("failed")]
        assert part["rows"] or part.get("skipped")
        assert all("value" in row or row.get("skipped") for row in part["rows"])


def test_all_who_compute_the_same_agree(written):
    """On shared weights, in float32."""
    for section in ("step", "vae", "joint", "streaming"):
        errors = {name: row["error"] for name, row in rows(written, section).items() if "error" in row}
        assert errors and max(errors.values()) < 3e-5, errors
    step = rows(written, "step")
    native, ours = step["native, passes stacked"], step["ours, eager"]
    assert (
        ours["ratio"] == pytest.approx(ours["value"] / native["value"]) and ours["beside"] == native["name"]
    )
    assert {"diffusers, one pass after the other", "native, one pass after the other"} <= step.keys()
    assert 0 < rows(written, "8bits")["fp8_e4m3fn"]["error"] < 0.1


def test_joint_and_separate_passes_give_the_same_bits(written):
    assert list(rows(written, "joint")) == ["joint", "separate", "stacked"]
    assert rows(written, "joint")["separate"]["error"] == 0
    assert rows(written, "streaming")["48 tokens, streamed, separate"]["error"] == 0


def test_what_is_missing_is_named(written):
    assert "cannot multiply in fp8" in rows(written, "8bits")["fp8_e4m3fn_fast"]["skipped"]
    assert "CUDA" in rows(written, "attention")["sdpa flash"]["skipped"]


def test_our_kernels_are_left_out_for_a_while():
    def why():
        choices = glue.kernel_choices(torch.device("cpu"), torch.bfloat16, 256, 128)
        return {choice.why for choice in choices.values()}

    before = why()
    with eager():
        assert why() == {"WAN21_KERNELS is 0"}
    assert why() == before != {"WAN21_KERNELS is 0"}


def test_the_work_of_a_step_is_that_of_the_roofline():
    """3.373 PFLOP: products 1.573, self-attention 1.758, cross-attention 0.041."""
    assert tera_operations(gpu_size(40)) == tera_operations(gpu_size(10)) == pytest.approx(3373, rel=1e-3)


def test_a_race_goes_on_without_who_fails_and_stops_in_time():
    bench = Bench(toy_size(), torch.device("cpu"), repeat=2)
    bench.begin(60)

    def missing():
        raise Missing("it is not here")

    def breaks():
        return lambda: torch.zeros(2) + torch.zeros(3)

    x = torch.ones(4)
    makers = {"one": lambda: lambda: x, "twice": lambda: lambda: 2 * x, "gone": missing, "broken": breaks}
    one, twice, gone, broken = bench.race(Race(makers))
    assert twice.error == pytest.approx(0.5) and twice.ratio == twice.value / one.value and one.ratio is None
    assert gone.skipped == "it is not here" and broken.skipped.startswith("failed: RuntimeError")
    bench.begin(-1)
    start = time.monotonic()
    late = bench.race(Race({"slow": lambda: lambda: time.sleep(60)}))
    assert time.monotonic() - start < 5 and "were over" in late[0].skipped


def test_a_section_that_breaks_leaves_what_it_measured(tmp_path, monkeypatch):
    def rows(bench):
        yield bench_gpu.Row("first", 1.0, "s")
        raise RuntimeError("the card fell off")

    monkeypatch.setitem(SECTIONS, "glue", bench_gpu.Section(rows, 1, "breaks"))
    path = tmp_path / "bench.json"
    bench_gpu.main(["--quick", "--device", "cpu", "--only", "glue", "--json", str(path)])
    [part] = json.loads(path.read_text())["sections"]
    assert part["rows"] == [{"name": "first", "value": 1.0, "unit": "s"}]
    assert part["skipped"] == "failed: RuntimeError: the card fell off"


@pytest.mark.parametrize(
    "argument, said", [("--only=gemm", "gemm; there are environment"), ("--blocks=0", "each is at least 1")]
)
def test_what_is_not_there_is_refused(argument, said, capsys):
    with pytest.raises(SystemExit):
        bench_gpu.arguments([argument])
    assert said in capsys.readouterr().err


def test_the_archive_holds_this_tree_and_the_host(tmp_path):
    """Not its weights and pictures, and nothing from elsewhere; a new file as well."""
    target, wheel = tmp_path / "packed.tar.gz", tmp_path / "one-1-py3-none-any.whl"
    wheel.write_bytes(b"PK")
    pack_for_gpu.pack(target, [wheel])
    with tarfile.open(target) as tar:
        names = tar.getnames()
        run = tar.extractfile("gpu-bench/run.sh").read().decode()
        commit = tar.extractfile("gpu-bench/COMMIT").read().decode()
    assert {f"gpu-bench/{path.relative_to(ROOT)}" for path in (ROOT / "wan").rglob("*.py")} <= set(names)
    for needed in (
        "scripts/bench_gpu.py",
        "tests/gpu/test_cuda.py",
        ".host/ComfyUI/comfy/ops.py",
        wheel.name,
    ):
        assert [name for name in names if name.endswith(needed)], needed
    others = {name.rpartition(".")[2] for name in names} - {"py", "toml", "sh", "whl"}
    assert others == {"gpu-bench/COMMIT"} and "bench_gpu.py" in run and commit.strip()
    assert not [name for name in names if name.startswith("/") or ".." in name]


def test_a_wheel_of_another_python_is_not_taken(tmp_path):
    there = ["one_two-1-cp311-cp311-any.whl", "one_two-1-cp312-cp312-any.whl", "one_two-1-cp39-abi3-any.whl"]
    for name in (*there, "one_two-2-py3-none-any.whl", "other-1-py3-none-any.whl"):
        (tmp_path / name).touch()

    def lying(wheel, tag):
        return sorted(path.name for path in pack_for_gpu.lying(tmp_path, wheel, tag))

    assert lying("one-two==1", "cp312") == there[1:]
    assert lying("one-two==1", "cp313") == there[2:]
    assert lying("one-two==2", "cp312") == ["one_two-2-py3-none-any.whl"]
    assert not lying("one-two==3", "cp312")


def test_layers_of_the_bench_are_those_of_the_loader():
    """They lend their numbers to the kernels, or these would not run in it."""
    model = random_dit(toy_size().config, "cpu", torch.float32)
    assert hasattr(model.blocks[0].norm3, "lend")
