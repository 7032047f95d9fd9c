"""docs/compatibility.md against the running host: every row that it should have, and some rows run again."""

from dataclasses import replace

import compatibility
import pytest
import torch
from lib.compat import page, rows
from lib.compat.bench import Bench, Outcome
from lib.compat.checkpoints import make_models
from lib.compat.graphs import base, node
from lib.pack import load_host

SECTIONS = compatibility.sections()
OWN = [key for key in SECTIONS if key not in compatibility.PACKS]  # those that need no other pack
AGAIN = {
    "nodes": ["CFGNorm", "EasyCache", "LoraSave", "ModelMergeSimple", "ModelSamplingSD3"],
    "samplers": ["euler", "uni_pc"],
    "diffusion models": ["diffusers' keys", "GGUF Q4_K", "a key missing", "a LoRA in this loader"],
    "text encoders": ["GGUF Q8_0", "CLIP"],
    "LoRAs": ["kohya, musubi", "OFT"],
    "templates": ["image_to_video_wan"],
}


@pytest.fixture(scope="module")
def written():
    return compatibility.PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compat")
    with Bench(folder / "host", make_models(folder / "models", families=())) as bench:
        yield bench


def test_the_page_is_of_this_host(written):
    load_host()
    for name, version in compatibility.versions([]).items():
        assert name == "torch" or f"| {name} | {version} |" in written, "run scripts/compatibility.py"


@pytest.mark.parametrize("key", OWN)
def test_the_page_has_every_row(bench, written, key):
    section = SECTIONS[key]
    found = page.words(written)[section.title]
    if key == "loaders":  # those of other packs stand there too
        found = [name for name in found if name in bench.nodes]
    assert list(found) == section.names(bench), "run scripts/compatibility.py"


@pytest.mark.parametrize("key", AGAIN)
def test_rows_run_again_give_what_the_page_says(bench, written, key):
    section = SECTIONS[key]
    if reason := section.missing(bench):
        pytest.skip(reason)
    [again] = compatibility.run(bench, {key: section}, AGAIN[key], say=lambda *_, **__: None).values()
    said = page.words(written)[section.title]
    assert {row.name: [verdict.word for verdict in row.verdicts] for row in again} == {
        name: said[name] for name in AGAIN[key]
    }


def test_what_is_refused_when_queued_is_told_from_what_the_host_rejects(bench):
    size = {"width": 100, "height": 64, "length": 9, "batch_size": 1, "start_image": ["pictures", 0]}
    graph = base("ours")
    ours = node(
        "Wan21ImageToVideo", **{k: ["start", i] for i, k in enumerate(("positive", "negative"))},
        vae=["vae", 0], start_image=["pictures", 0], width=100, height=64, num_frames=9, resize_mode="crop",
        add_frames_for_end_image=False, tile_size="auto",
    )  # fmt: skip
    refused = bench.run(graph | {"again": ours}, ["again", 2])
    assert refused.refused and "width is 100; sides are multiples of 8" in refused.error
    size |= {"positive": ["positive", 0], "negative": ["negative", 0], "vae": ["vae", 0], "width": -1}
    rejected = bench.run(graph | {"again": node("WanImageToVideo", **size)}, ["again", 2])
    assert not rejected.refused and "WanImageToVideo" in rejected.error


def test_a_pack_that_was_not_given_is_named_on_the_page(bench):
    chosen = {name: SECTIONS[name] for name in compatibility.PACKS}
    results = compatibility.run(bench, chosen)
    text = page.text({}, chosen, results)
    assert text.count("not tried: the pack was not given") == len(chosen)


A = Outcome({"0:samples": torch.arange(8.0)})
FAILED, REFUSED = Outcome(error="TypeError: x"), Outcome(error="Wan21Sampler: no", refused=True)


@pytest.mark.parametrize(
    "native, ours, said, word",
    [
        (A, A, (), rows.EQUAL),
        (A, Outcome({"0:samples": torch.arange(8.0) * 1.01}), (), rows.SILENT),
        (A, Outcome({"0:samples": torch.arange(8.0) * 1.01}), ("its shift is not used",), rows.SAID),
        (A, Outcome({"0:samples": torch.arange(9.0)}), (), rows.SILENT),
        (A, Outcome({"0:samples": torch.arange(8.0) / 0}), (), rows.SILENT),
        (A, Outcome({}), (), rows.SILENT),
        (A, FAILED, (), rows.FAILS),
        (A, REFUSED, (), rows.REFUSED),
        (FAILED, FAILED, (), rows.AS_NATIVE),
        (FAILED, A, (), rows.EQUAL),
    ],
)
def test_verdicts(native, ours, said, word):
    assert rows.compare(native, ours, said=said).word == word


def test_frames_are_equal_to_one_level():
    a = replace(A, tensors={"0:value": torch.zeros(2, 4, 4, 3)})
    one, two = (replace(A, tensors={"0:value": torch.full((2, 4, 4, 3), n / 255)}) for n in (0.9, 2))
    assert rows.compare(a, one, pictures=True).word == rows.EQUAL
    assert rows.compare(a, two, pictures=True).word == rows.SILENT


def test_findings_are_counted_on_the_page_and_end_the_command_with_one():
    found = [rows.Row("Some node", "acts", [rows.Verdict(rows.SILENT, "1e-02"), rows.Verdict(rows.EQUAL)])]
    results = {"nodes": found}
    assert page.findings(results) == ["nodes: Some node: DIFFERS IN SILENCE: 1e-02"]
    text = page.text({"ComfyUI": "0"}, SECTIONS, results)
    assert "There is one." in text
    assert page.words(text)[SECTIONS["nodes"].title] == {"Some node": [rows.SILENT, rows.EQUAL]}
