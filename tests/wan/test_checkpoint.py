"""Checkpoint files: whole, sharded, pickled, damaged, and files that are something else."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from wan21.wan import files as ck
from wan21.wan.files import safetensors_file

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = {f"blocks.{i}.weight": torch.arange(6.0).reshape(2, 3) + i for i in range(5)}


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "wan.safetensors"
    save_file(WEIGHTS, path, metadata={"config": "{}"})
    return path


def refusal(path):
    with pytest.raises(ValueError) as error:
        ck.read_checkpoint(path)
    assert path.name in str(error.value)
    return str(error.value)


def test_safetensors_with_metadata(file):
    weights = WEIGHTS | {
        "half": torch.ones(3, dtype=torch.bfloat16),
        "fp8": torch.ones(4).to(torch.float8_e4m3fn),
    }
    save_file(weights, file, metadata={"config": "{}"})
    checkpoint = ck.read_checkpoint(str(file))
    assert checkpoint.metadata == {"config": "{}"}
    assert checkpoint.state_dict.keys() == weights.keys()
    for key, tensor in checkpoint.state_dict.items():
        assert tensor.dtype == weights[key].dtype and torch.equal(tensor.float(), weights[key].float())
    save_file(WEIGHTS, file)
    assert ck.read_checkpoint(file).metadata == {}


def test_writing_to_a_tensor_leaves_the_file_alone(file):
    ck.read_checkpoint(file).state_dict["blocks.0.weight"].fill_(99)
    assert same_tensors(load_file(file), WEIGHTS)


def test_missing_file(tmp_path):
    assert "no file" in refusal(tmp_path / "absent.safetensors")
    assert "no file" in refusal(tmp_path)


def test_truncation_anywhere_is_refused(file):
    whole = file.read_bytes()
    for size in (*range(20), *range(20, len(whole) - 1, 13), len(whole) - 1):
        file.write_bytes(whole[:size])
        message = refusal(file)
        if size == 0:
            assert "empty" in message
        elif size > 8:
            assert ("truncated" in message and f"{size}" in message) or "only" in message
        assert "ownload" in message
    file.write_bytes(whole[:-60])
    assert "its tensors take 120 bytes and only 60 are there (50%)" in refusal(file)


def with_header(path, header, length=None, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(begin=0, end=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DAMAGED = {
    "offsets beyond the file": ({"a": entry(0, 4_000_000_000, [1_000_000_000])}, "only 8 are there"),
    "shape and place disagree": ({"a": entry(shape=[3])}, "damaged safetensors file"),
    "a huge shape": ({"a": entry(shape=[2**40, 2**40])}, "damaged safetensors file"),
    "very many dimensions": ({"a": entry(shape=[1] * 1000 + [2])}, "damaged (a tensor of 1001 dimensions)"),
    "a negative shape": ({"a": entry(shape=[-1, -2])}, "damaged safetensors file"),
    "end before begin": ({"a": entry(8, 0)}, "damaged safetensors file"),
    "one offset": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, "header is damaged"),
    "text for a number": ({"a": entry(shape=["2"])}, "damaged safetensors file"),
    "no table for a tensor": ({"a": 7}, "header is damaged"),
    "overlapping tensors": ({"a": entry(), "b": entry()}, "damaged safetensors file"),
    "an unknown type": ({"a": entry(dtype="F31")}, "damaged safetensors file"),
    "bytes that no tensor uses": ({"a": entry(0, 4, [1])}, "damaged safetensors file"),
    "metadata that is no text": ({"__metadata__": {"n": 1}, "a": entry()}, "damaged safetensors file"),
    "a place that is text": ({"a": entry(end="8")}, "header is damaged"),
    "a place that is no number of bytes": ({"a": entry(end=7.5)}, "damaged safetensors file"),
    "numbers too large for bytes": ({"a": entry(-(2**70), 8)}, "damaged safetensors file"),
    "half a header": (b'{"a": {"dtype"', "not JSON"),
    "endless nesting": (b'{"a":' + b"[" * 100_000, "not JSON"),
    "no text": (b'{"\xff\xfe": 1}', "not JSON"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_header_is_refused(case, tmp_path):
    header, words = DAMAGED[case]
    message = refusal(with_header(tmp_path / "wan.safetensors", header, data=bytes(8)))
    assert words in message and "Download it again" in message


def test_header_length_is_checked_before_it_is_read(tmp_path, monkeypatch):
    path = with_header(tmp_path / "wan.safetensors", {"a": entry()}, length=99_000_000, data=bytes(8))
    assert "truncated" in refusal(path)
    for length in (2**63, 2**64 - 1, 100_000_001):
        path = with_header(tmp_path / "wan.safetensors", {"a": entry()}, length=length)
        with path.open("r+b") as file:
            file.truncate(200_000_000)  # sparse: long enough for the header, but over the format's limit
        assert "more than the 100000000 that safetensors allows" in refusal(path)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 32789876123\n"
OTHER_FILES = {
    "LFS pointer": (LFS, "Git LFS pointer", "32789876123 bytes", "git lfs pull"),
    "web page": (
        b"\n<!DOCTYPE html><html><body>Log in</body></html>",
        "web page",
        "download the file itself",
    ),
    "XML page": (b'<?xml version="1.0"?><Error>Denied</Error>', "web page"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(64), "GGUF", "safetensors"),
    "JSON": (b'{"error": "not authorised"}', "JSON text"),
    "old pickle": (pickle.dumps({"a": 1}, protocol=2) + bytes(8), "pickle", "pick a safetensors version"),
    "zeros": (bytes(4096), "unfinished download"),
    "noise": (bytes(range(7, 200)), "not a safetensors file"),
}


@pytest.mark.parametrize("case", OTHER_FILES)
def test_other_files_are_named(case, tmp_path):
    content, *words = OTHER_FILES[case]
    path = tmp_path / "wan.safetensors"
    path.write_bytes(content)
    message = refusal(path)
    assert all(word in message for word in words), message


class Bomb:
    """Runs code when unpickled: creates the file it is given."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("name", ["wan.safetensors", "wan.pth", "wan.pt", "wan.ckpt"])
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_never_runs(name, is_zip, tmp_path):
    trace = tmp_path / "ran"
    torch.save({"a": Bomb(str(trace))}, tmp_path / name, _use_new_zipfile_serialization=is_zip)
    assert "ickle" in refusal(tmp_path / name)
    assert not trace.exists()
    if is_zip:
        torch.load(tmp_path / name, weights_only=False)
        assert trace.exists()  # it would have run


# --- the release's pickles ----------------------------------------------------------------------------


@pytest.fixture
def release_umt5():
    """A umT5 encoder of one block, as far as its kind can be told."""
    names = ("token_embedding", "blocks.0.attn.q", "blocks.0.pos_embedding.embedding", "norm")
    return {f"{name}.weight": torch.randn(200) for name in names}


def test_release_pickles_are_read(tmp_path, release_umt5):
    vae = AutoencoderKLWan(base_dim=8).state_dict()
    for name, weights in {"Wan2.1_VAE.pth": vae, "models_t5_umt5-xxl-enc-bf16.pth": release_umt5}.items():
        torch.save(weights, tmp_path / name)
        checkpoint = ck.read_checkpoint(tmp_path / name)
        assert same_tensors(checkpoint.state_dict, weights) and checkpoint.metadata == {}


def test_other_pickles_are_refused(tmp_path, release_umt5):
    path = tmp_path / "wan.pth"
    torch.save({"head.modulation": torch.zeros(1, 2, 8)}, path)
    assert "a Wan2.1 diffusion model in a pickle" in refusal(path)
    torch.save([torch.zeros(3)], path)
    assert "something else in a pickle" in refusal(path)
    torch.save(release_umt5, path, _use_new_zipfile_serialization=False)
    assert "old format" in refusal(path)
    torch.save(release_umt5, path)
    path.write_bytes(path.read_bytes()[:-2000])
    assert "truncated or damaged" in refusal(path)
    path.write_bytes(LFS)
    assert "Git LFS pointer" in refusal(path)


# --- sharded sets -------------------------------------------------------------------------------------

SHARDS = [f"diffusion_pytorch_model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.fixture
def sharded(tmp_path):
    """Three shards and their index; returns the index's path."""
    weight_map = {key: SHARDS[i % 3] for i, key in enumerate(WEIGHTS)}
    for shard in SHARDS:
        part = {k: v for k, v in WEIGHTS.items() if weight_map[k] == shard}
        save_file(part, tmp_path / shard, metadata={"format": "pt"})
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 120}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("entry_point", ["index", *SHARDS])
def test_sharded_set_is_read_whole(sharded, entry_point):
    path = sharded if entry_point == "index" else sharded.with_name(entry_point)
    checkpoint = ck.read_checkpoint(path)
    assert same_tensors(checkpoint.state_dict, WEIGHTS)
    assert checkpoint.metadata == {"format": "pt"}


@pytest.mark.parametrize("entry_point", ["index", SHARDS[1]])
def test_missing_shards_are_listed(sharded, entry_point):
    for shard in (SHARDS[0], SHARDS[2]):
        sharded.with_name(shard).unlink()
    path = sharded if entry_point == "index" else sharded.with_name(entry_point)
    with pytest.raises(ValueError, match=f"2 of the 3 shards are missing: {SHARDS[0]}, {SHARDS[2]}"):
        ck.read_checkpoint(path)


def test_a_damaged_shard_is_named(sharded):
    shard = sharded.with_name(SHARDS[2])
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{SHARDS[2]}.*truncated"):
        ck.read_checkpoint(sharded)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/a.safetensors",
        "..\\a.safetensors",
        "C:a.safetensors",
        "..",
        "",
        "a\0.safetensors",
        "secret.txt",
        5,
    ],
)
def test_index_may_only_name_files_of_its_folder(sharded, name):
    outside = sharded.parent.parent / "secret.safetensors"
    save_file({"blocks.0.weight": torch.zeros(1)}, outside)
    sharded.write_text(json.dumps({"weight_map": {"blocks.0.weight": name}}))
    message = refusal(sharded)
    assert "of its own folder" in message and repr(name) in message


def test_bad_indexes_are_refused(sharded):
    texts = (
        "",
        "[1]",
        '{"metadata": {}}',
        '{"weight_map": 3}',
        '{"weight_map": {"a": ["x"]}}',
        "[" * 100_000,
    )
    for text in texts:
        sharded.write_text(text)
        assert "not the index of a sharded checkpoint" in refusal(sharded)
    sharded.write_text('{"weight_map": {}}')
    assert "it lists none" in refusal(sharded)
    sharded.write_text(json.dumps({"weight_map": {"blocks.9.weight": SHARDS[0]}}))
    assert "lack 1 of the tensors it lists: blocks.9.weight" in refusal(sharded)
    with sharded.open("r+b") as file:
        file.truncate(100_000_001)
    assert "larger than" in refusal(sharded)


def test_shards_of_different_sets_are_refused(sharded):
    save_file({"blocks.0.weight": torch.zeros(1)}, sharded.with_name(SHARDS[1]))
    with pytest.raises(ValueError, match=r"repeats tensors of an earlier shard: blocks\.0\.weight"):
        ck.read_checkpoint(sharded.with_name(SHARDS[0]))
    odd = sharded.with_name("diffusion_pytorch_model-00004-of-00003.safetensors")
    odd.write_bytes(b"")
    assert "shard 4 of 3" in refusal(odd)


# --- memory -------------------------------------------------------------------------------------------

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc"
)
MEASURE = """
import sys
sys.path.insert(0, sys.argv[1])
from lib import pack
pack.load_pack()
from pathlib import Path
from wan21.wan.files import read_checkpoint

def peak():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

start = peak()
for path in sys.argv[2:]:
    state_dict = read_checkpoint(path).state_dict
    read = peak()
    assert sum(tensor.sum().item() for tensor in state_dict.values()) == 0
    print(read - start, peak() - start)
    del state_dict
"""


HOSTILE = """
import sys
sys.path.insert(0, sys.argv[1])
from lib import pack
pack.load_pack()
from pathlib import Path
from wan21.wan.files import BadFile, read_checkpoint

def peak():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

start = peak()
for path in sys.argv[2:]:
    try:
        read_checkpoint(path)
    except BadFile:
        print(peak() - start)
"""


@needs_proc
def test_hostile_headers_take_no_memory(tmp_path):
    """4 GB, 2**80 numbers, 200,001 dimensions, 100 MB of header: refused before memory is taken for them."""
    cases = dict(DAMAGED) | {"200,001 dimensions": ({"a": entry(shape=[1] * 200_000 + [2])}, "")}
    paths = [tmp_path / f"{i}.safetensors" for i in range(len(cases) + 2)]
    for path, (header, _) in zip(paths, cases.values()):
        with_header(path, header, data=bytes(8))
    for path, length in zip(paths[-2:], (100_000_001, 99_000_000)):
        with_header(path, {"a": entry()}, length=length)
    with paths[-2].open("r+b") as file:
        file.truncate(200_000_000)
    script = [sys.executable, "-c", HOSTILE, str(ROOT / "scripts"), *map(str, paths)]
    result = subprocess.run(script, capture_output=True, text=True, check=True, cwd=tmp_path)
    taken = [int(line) for line in result.stdout.splitlines()]
    assert len(taken) == len(paths) and max(taken) < 32 * 2**20


@needs_proc
def test_memory_stays_at_the_size_of_the_file(tmp_path):
    # The smaller file first: a peak is never taken back.
    sizes = {"vae.pth": 64 * 2**20, "wan.safetensors": 208 * 2**20}
    for (name, size), save in zip(sizes.items(), (torch.save, save_file)):
        keys = ("decoder.middle.0.residual.0.gamma", "w1", "w2", "w3")
        save({key: torch.zeros(size // 16) for key in keys}, tmp_path / name)
    script = [sys.executable, "-c", MEASURE, str(ROOT / "scripts"), *(str(tmp_path / name) for name in sizes)]
    result = subprocess.run(script, capture_output=True, text=True, check=True, cwd=tmp_path)
    (pth_read, pth_used), (read, used) = (map(int, line.split()) for line in result.stdout.splitlines())
    pth_size, size = sizes.values()
    assert pth_read < 0.1 * pth_size and read < 1.1 * pth_size  # mapped, not read
    assert 0.95 * pth_size < pth_used < 1.15 * pth_size  # read once, without a copy
    assert 0.95 * size < used < 1.15 * size


def test_check_keys_lists_ten_of_each():
    expected = {f"layer.{i:02d}.weight": (2, 3) for i in range(40)}
    given = {f"layer.{i:02d}.weight": torch.zeros(3, 2) for i in range(12)}
    given |= {f"other.{i:02d}.bias": torch.zeros(1) for i in range(11)} | {"scaled_fp8": torch.zeros(0)}
    with pytest.raises(ValueError) as error:
        ck.check_keys(expected, given, "wan.safetensors")
    message = str(error.value)
    assert "wan.safetensors" in message and "scaled_fp8" not in message
    assert "28 missing: layer.12.weight" in message and "layer.21.weight and 18 more" in message
    assert "11 unexpected: other.00.bias" in message and "other.09.bias and 1 more" in message
    assert "12 of the wrong shape: layer.00.weight (3, 2) instead of (2, 3)" in message
    assert "and 2 more" in message
    assert "layer.22.weight" not in message and "other.10.bias" not in message
    assert ck.check_keys({"a": (2,)}, {"a": torch.zeros(2)}, "fits") == []
    assert ck.check_keys({"a": (2,)}, {"a": torch.zeros(2), "fps.b": torch.zeros(1)}) == ["fps.b"]


# --- headers that are well formed and too large ------------------------------------------------------------


def tensors_without_numbers(count, key="k{}"):
    return {key.format(i): entry(0, 0, [0]) for i in range(count)}


TOO_LARGE = {
    "100,001 tensors": (
        tensors_without_numbers(100_001),
        "it lists 100001 tensors, and up to 100000",
    ),
    "a key of a million letters": ({"a" * 10**6: entry()}, "a key of 1000000 letters; up to 500 are read"),
    "10,000 long names": (  # patterns had been matched against them for minutes
        tensors_without_numbers(10_000, "blocks.1." * 50 + "{:05}"),
        "the names of its tensors take 4550000 letters, and up to 4000000 are read",
    ),
    "one tensor twice": (
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
        b'"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        "a tensor stands in it twice",
    ),
    "a side of 2^63": ({"a": entry(0, 0, [2**63, 0])}, "damaged (a side of 9223372036854775808)"),
    "a list instead": (b'{"a": [' + b"[]," * 10 + b"[]]}", "no table of tensors"),
    "four million tables": (b'{"__metadata__": [' + b"{}," * 4_000_000 + b"{}]}", "not JSON"),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_a_header_without_bounds_is_refused(case, tmp_path):
    header, words = TOO_LARGE[case]
    assert words in refusal(with_header(tmp_path / "wan.safetensors", header, data=bytes(8)))


def test_a_header_may_be_large_without_being_refused(tmp_path):
    """ComfyUI writes the graph, and trainers all their captions, into one text of the metadata."""
    graph = json.dumps([{"inputs": {"text": "a, b [c] {d}"}}] * 50_000)
    header = {"__metadata__": {"prompt": graph}} | tensors_without_numbers(90_000)
    checkpoint = ck.read_checkpoint(with_header(tmp_path / "wan.safetensors", header))
    assert len(checkpoint.state_dict) == 90_000 and checkpoint.metadata == {"prompt": graph}


def test_an_index_of_impossible_names_is_refused(sharded):
    sharded.write_text(json.dumps({"weight_map": {"a": "x" * 5000 + ".safetensors"}}))
    assert "1 of the 1 shards are missing: xxx" in refusal(sharded)


def test_a_pickled_tensor_must_have_all_its_numbers(tmp_path):
    """One number that stands for 2^40, by strides of 0."""
    vae = AutoencoderKLWan(base_dim=8).state_dict()
    key = "decoder.conv_in.weight"
    path = tmp_path / "Wan2.1_VAE.pth"
    torch.save(vae | {key: vae[key].flatten()[:1].expand(2**40)}, path)
    assert f"{key} has fewer numbers than its shape" in refusal(path)
    torch.save(vae | {key: torch.eye(3).to_sparse()}, path)
    assert "(torch._utils _rebuild_sparse_tensor)" in refusal(path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8, torch.int8])
def test_weights_that_are_no_real_numbers_are_refused(dtype):
    """They had been cast to the model's type without a word."""
    expected = {"a.weight": (2, 2), "a.bias": (2,)}
    given = {"a.weight": torch.zeros(2, 2, dtype=dtype), "a.bias": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"1 of a type in which no weights are: a\.weight " + str(dtype)[6:]):
        ck.check_keys(expected, given)
    if dtype.itemsize == 1 and dtype != torch.bool:
        assert ck.check_keys(expected, given | {"a.comfy_quant": torch.zeros(1)}) == []
    assert ck.check_keys({"a.bias": (2,)}, given) == ["a.weight"]  # of no layer, it is only left out


def test_the_look_at_a_header_gives_the_types(tmp_path):
    types = {"f": torch.float16, "q": torch.float8_e4m3fn, "n": torch.int64}
    weights = {key: torch.ones(2).to(dtype) for key, dtype in types.items()}
    save_file(weights, tmp_path / "x.safetensors")
    found = ck.read_shapes(tmp_path / "x.safetensors").state_dict
    assert {key: value.dtype for key, value in found.items()} == types


def test_a_header_of_too_many_tensors_is_counted_before_it_is_read(tmp_path, monkeypatch):
    """Half a million had taken 10 s and 400 MB to be refused."""
    names = ",".join(f'"k{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(100_001))
    header = f"{{{names}}}".encode()
    path = tmp_path / "many.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    monkeypatch.setattr(safetensors_file, "load_json", lambda *_, **__: pytest.fail("it was read"))
    assert "it lists 100001 tensors, and up to 100000" in refusal(path)
