"""Wan21LoraLoader: equal to merged weights, with each strength at its step, on the host's patch system."""

from dataclasses import replace

import comfy.sample
import folder_paths
import pytest
import torch
from helpers import relative
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from wan21 import host
from wan21.host import lora, lora_run
from wan21.host.model import CALL
from wan21.nodes.lora import Wan21LoraLoader
from wan21.wan import lora as wl
from wan21.wan.memory import MemoryPlan, step_bytes
from wan21.wan.option import Call
from wan21.wan.sample import SampleJob

METADATA = {"config": '{"transformer": {"text_dim": 128}}'}
G = torch.Generator().manual_seed(4)


@pytest.fixture
def loras(tmp_path):
    """An empty LoRA folder, first in the host's list."""
    kept = list(folder_paths.folder_names_and_paths["loras"][0])
    folder_paths.add_model_folder_path("loras", str(tmp_path), is_default=True)
    folder_paths.filename_list_cache.clear()
    yield tmp_path
    folder_paths.folder_names_and_paths["loras"][0][:] = kept
    folder_paths.filename_list_cache.clear()


@pytest.fixture
def t2v_job(models, prompts):
    return (models["t2v"], *prompts, {"samples": torch.zeros(1, 16, 2, 4, 4)})


def low_rank(name, rows=256, columns=256, generator=G):
    return {
        f"{name}.lora_A.weight": torch.randn(4, columns, generator=generator) / 16,
        f"{name}.lora_B.weight": torch.randn(rows, 4, generator=generator) / 4,
    }


def first_lora():
    """Low rank on layers, differences on a norm, a bias, the modulation and the patch embedding."""
    file = low_rank("diffusion_model.blocks.0.self_attn.q") | low_rank("diffusion_model.blocks.1.ffn.0", 512)
    for name, shape in (
        ("blocks.0.norm3.diff", (256,)),
        ("blocks.1.cross_attn.o.diff_b", (256,)),
        ("blocks.1.diff_m", (1, 6, 256)),
        ("head.diff_m", (1, 2, 256)),
        ("patch_embedding.diff", (256, 16, 1, 2, 2)),
    ):
        file["diffusion_model." + name] = torch.randn(shape, generator=G) / 16
    return file


def second_lora():
    """Another on one of the same layers, with DoRA."""
    name = "transformer.blocks.1.ffn.net.0.proj"
    return low_rank(name, 512) | {f"{name}.lora_magnitude_vector": 1 + torch.rand(512, generator=G)}


@pytest.fixture
def names(loras):
    for name, file in (("first", first_lora()), ("second", second_lora())):
        save_file(file, loras / f"{name}.safetensors")
    return ("first.safetensors", "second.safetensors")


def load(model, name, strength=1.0, schedule="", url="", strict=False):
    return Wan21LoraLoader.execute(model, name, strength, schedule, url, strict).result


def merged_model(files, loras, changes, tmp_path, kind="t2v"):
    """A MODEL from a checkpoint that has (file, strength) merged into its weights."""
    weights = load_file(files[kind])
    shapes = {k: tuple(v.shape) for k, v in weights.items()}
    for name, strength in changes:
        for key, patch in wl.match_lora(load_file(loras / name), shapes).patches:
            wl.apply_patch(patch, weights[key], strength)
    path = tmp_path / f"merged-{len(list(tmp_path.iterdir()))}.safetensors"
    save_file(weights, path, metadata=METADATA)
    return host.load_model(path)


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_equals_merged_weights(files, t2v_job, sample, loras, names, tmp_path, strength):
    model, *rest = t2v_job
    patched, report = load(model, names[0], strength)
    ours = sample(patched, *rest)[0]["samples"]
    expected = sample(merged_model(files, loras, [(names[0], strength)], tmp_path), *rest)[0]["samples"]
    assert relative(ours, expected) < 1e-6
    assert relative(ours, sample(*t2v_job)[0]["samples"]) > 1e-2
    assert report.startswith(
        f"LoRA: first.safetensors, strength {strength:g}\napplied: 9 of 9 keys, 7 layers"
    )


def test_strength_zero_is_the_model_itself_and_nothing_stays(t2v_job, sample, names):
    model, *rest = t2v_job
    plain = sample(*t2v_job)[0]["samples"]
    for strength, schedule in ((0.0, ""), (0.0, "1, 0.5"), (1.0, "0"), (2.0, "0, 0")):
        off, _ = load(model, names[0], strength, schedule)
        assert torch.equal(sample(off, *rest)[0]["samples"], plain)
    on, _ = load(model, names[0], 1.0, "1, 0.5")
    assert not torch.equal(sample(on, *rest)[0]["samples"], plain)
    assert torch.equal(sample(*t2v_job)[0]["samples"], plain)


def test_several_in_a_row(files, t2v_job, sample, loras, names, tmp_path):
    model, *rest = t2v_job
    chained = load(load(model, names[0], 0.7)[0], names[1], 0.4)[0]
    expected = merged_model(files, loras, [(names[0], 0.7), (names[1], 0.4)], tmp_path)
    assert relative(sample(chained, *rest)[0]["samples"], sample(expected, *rest)[0]["samples"]) < 1e-6


def velocities(model, cond, sigmas):
    """What a MODEL answers in each of its own sampling steps, by the host's Euler."""
    seen = []

    def record(apply_model, args):
        out = apply_model(args["input"], args["timestep"], **args["c"])
        seen.append((args["input"].clone(), out.clone()))
        return out

    model = model.clone()
    model.set_model_unet_function_wrapper(record)
    samples = torch.zeros(1, 16, 2, 4, 4)
    euler = comfy.samplers.sampler_object("euler")
    noise = comfy.sample.prepare_noise(samples, 1)
    comfy.sample.sample_custom(
        model, noise, 1.0, euler, torch.tensor(sigmas), cond, cond, samples, disable_pbar=True
    )
    return seen


def test_each_step_has_the_strength_merged_for_it(files, models, prompts, sample, loras, names, tmp_path):
    """Two schedules of different lengths, on the host's sampler and on ours, step by step."""
    schedules = {names[0]: (0.8, [1.0, 0.0]), names[1]: (1.0, [0.5, 1.0, -0.3])}
    model = models["t2v"]
    for name, (strength, values) in schedules.items():
        model = load(model, name, strength, ", ".join(map(str, values)))[0]
    sigmas = SampleJob(3, 1.0, 3.0, "euler").sigmas
    merged = [
        merged_model(
            files, loras, [(n, s * v[i * len(v) // 3]) for n, (s, v) in schedules.items()], tmp_path
        )
        for i in range(3)
    ]  # fmt: skip
    for i, (x, answer) in enumerate(velocities(model, prompts[0], sigmas)):
        timesteps, conds = torch.tensor([sigmas[i]]), prompts[0][0][0]
        expected = merged[i].model.apply_model(x, timesteps, c_crossattn=conds)
        others = [m.model.apply_model(x, timesteps, c_crossattn=conds) for m in merged if m is not merged[i]]
        assert relative(answer, expected) < 1e-5
        assert min(relative(answer, other) for other in others) > 1e-4
    latent = {"samples": torch.zeros(1, 16, 2, 4, 4)}
    ours, _ = sample(model, *prompts, latent, steps=3, guidance_scale=1.0, solver="euler", seed=1)
    by_hand = comfy.sample.prepare_noise(latent["samples"], 1)
    for i in range(3):
        x0 = merged[i].model.apply_model(by_hand, torch.tensor([sigmas[i]]), c_crossattn=prompts[0][0][0])
        by_hand = by_hand + (sigmas[i + 1] - sigmas[i]) * (by_hand - x0) / sigmas[i]
    by_hand = models["t2v"].model.process_latent_out(by_hand)
    assert relative(ours["samples"], by_hand) < 1e-5


def test_a_cancelled_run_leaves_nothing_behind(t2v_job, sample, names):
    import comfy.model_management as management

    model, *rest = t2v_job
    plain = sample(*t2v_job)[0]["samples"]
    on, _ = load(model, names[0], 1.0, "1, 0.5, 0.2")
    calls = []

    def cancel(module, args):
        calls.append(module)
        if len(calls) == 3:
            management.interrupt_current_processing(True)

    handles = [block.register_forward_pre_hook(cancel) for block in model.model.diffusion_model.blocks]
    with pytest.raises(management.InterruptProcessingException):
        sample(on, *rest)
    for handle in handles:
        handle.remove()
    assert torch.equal(sample(*t2v_job)[0]["samples"], plain)


def test_changing_strength_reads_the_lora_and_not_the_base(t2v_job, sample, names, monkeypatch):
    from wan21.wan import files

    model, *rest = t2v_job
    before = sample(load(model, names[0], 1.0)[0], *rest)[0]["samples"]
    read = []
    original = files.read_checkpoint
    monkeypatch.setattr(
        files, "read_checkpoint", lambda path, **how: read.append(str(path)) or original(path, **how)
    )
    after = sample(load(model, names[0], 0.5)[0], *rest)[0]["samples"]
    assert [path.rpartition("/")[2] for path in read] == [names[0]]
    assert not torch.equal(before, after)
    assert torch.equal(before, sample(load(model, names[0], 1.0)[0], *rest)[0]["samples"])


def test_beside_the_hosts_own_loader(t2v_job, sample, names, loras):
    """The native loader before ours gives what two of ours give."""
    from nodes import LoraLoaderModelOnly

    model, *rest = t2v_job
    plain = low_rank("diffusion_model.blocks.0.cross_attn.k")
    save_file(plain, loras / "plain.safetensors")
    folder_paths.filename_list_cache.clear()
    native = LoraLoaderModelOnly().load_lora_model_only(model, "plain.safetensors", 0.6)[0]
    mixed = load(native, names[0], 0.5)[0]
    both = load(load(model, "plain.safetensors", 0.6)[0], names[0], 0.5)[0]
    assert relative(sample(mixed, *rest)[0]["samples"], sample(both, *rest)[0]["samples"]) < 1e-6


def test_on_a_model_of_the_hosts_loader(files, prompts, loras, names, models):
    import comfy.sd
    from test_host_model import ksample

    native = comfy.sd.load_diffusion_model(str(files["t2v"]))
    latent = {"samples": torch.zeros(1, 16, 2, 4, 4)}
    ours, theirs = (
        ksample(load(m, names[0], 0.5, "1, 0.2")[0], *prompts, latent) for m in (models["t2v"], native)
    )
    assert relative(theirs, ours) < 1e-5


def test_a_chain_passes_through_clones_and_a_branch_has_its_own_loras(t2v_job, sample, names):
    model, *rest = t2v_job

    def run(patched):
        return sample(patched, *rest)[0]["samples"]

    first = load(model, names[0], 0.8, "1, 0.5")[0]
    alone = run(first)
    between = first.clone()  # as a node of another pack makes one
    between.add_wrapper_with_key(
        "diffusion_model", "other", lambda executor, *args, **kw: executor(*args, **kw)
    )
    both = run(load(between.clone(), names[1], 0.6, "0.5, 1")[0])
    assert torch.equal(both, run(load(first, names[1], 0.6, "0.5, 1")[0]))
    assert relative(both, alone) > 1e-4
    assert relative(both, run(load(model, names[1], 0.6, "0.5, 1")[0])) > 1e-4
    assert torch.equal(run(first), alone)


def test_image_branch_keys_on_a_text_model_are_reported(models, loras):
    file = low_rank("diffusion_model.blocks.0.self_attn.k") | low_rank(
        "diffusion_model.blocks.0.cross_attn.k_img"
    )
    save_file(file, loras / "i2v.safetensors")
    report = load(models["t2v"], "i2v.safetensors")[1]
    assert (
        "left out: 2 keys, image-branch keys on a model without image branch: diffusion_model.blocks.0"
        in report
    )
    with pytest.raises(
        ValueError, match=r"^Wan21LoraLoader: i2v\.safetensors: 2 keys do not fit .* strict off"
    ):
        load(models["t2v"], "i2v.safetensors", strict=True)
    assert "applied: 4 of 4 keys" in load(models["i2v"], "i2v.safetensors", strict=True)[1]


@pytest.mark.parametrize(
    "file, message",
    [
        (low_rank("lora_te_text_model.encoder"), "none of its 2 keys fits the model: 2 keys, text-encoder"),
        ({"decoder.middle.0.residual.0.gamma": torch.zeros(1)}, "not a LoRA. It is the Wan2.1 VAE"),
    ],
)
def test_a_file_that_changes_nothing_is_an_error(models, loras, file, message):
    save_file(file, loras / "bad.safetensors")
    with pytest.raises(ValueError, match=r"^Wan21LoraLoader: bad\.safetensors: .*" + message):
        load(models["t2v"], "bad.safetensors")


def test_a_bad_schedule_and_no_lora(models):
    with pytest.raises(ValueError, match=r"^Wan21LoraLoader: strength_schedule holds 'x'"):
        load(models["t2v"], "none", schedule="1, x")
    assert load(models["t2v"], "none") == (models["t2v"], "no LoRA chosen")


def test_a_model_of_another_family_is_named(models, names):
    from types import SimpleNamespace

    other = SimpleNamespace(model=torch.nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"the MODEL is a Linear, not a Wan2\.1 model. Load one with Wan21ModelLoader"
    ):
        load(other, names[0])


@pytest.fixture
def link(tmp_path_factory, monkeypatch):
    """Serves a folder on this machine; the owner allows that. Returns (folder, address)."""
    import functools
    import http.server
    import threading

    folder = tmp_path_factory.mktemp("served")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("WAN21_ALLOW_PRIVATE_URLS", "1")
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_link_is_fetched_once_into_the_lora_folder(t2v_job, sample, loras, names, link):
    folder, address = link
    model, *rest = t2v_job
    (loras / names[0]).rename(folder / "linked.safetensors")
    patched, report = load(model, "none", 0.5, url=f"{address}/linked.safetensors?token=secret")
    (fetched,) = loras.glob("linked-*.safetensors")
    assert report.startswith(f"LoRA: {fetched.name}, strength 0.5\n") and "secret" not in report
    (folder / "linked.safetensors").unlink()
    again, _ = load(model, "none", 0.5, url=f"{address}/linked.safetensors?token=secret")
    by_name, _ = load(model, fetched.name, 0.5)
    results = [sample(m, *rest)[0]["samples"] for m in (patched, again, by_name)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_links_to_something_else_leave_no_file(models, loras, files, link):
    folder, address = link
    (folder / "page.safetensors").write_text("<!DOCTYPE html><html>Sign in</html>")
    (folder / "cut.safetensors").write_bytes(files["t2v"].read_bytes()[:-1000])
    (folder / "base.safetensors").write_bytes(files["t2v"].read_bytes())
    for name, message in (
        ("page", "web page"),
        ("cut", "truncated"),
        ("base", "It is a Wan2.1 diffusion model"),
    ):
        with pytest.raises(ValueError, match=f"^Wan21LoraLoader: .*{message}"):
            load(models["t2v"], "none", url=f"{address}/{name}.safetensors")
    assert list(loras.iterdir()) == []


def test_a_name_and_a_link_together_are_refused(models, names):
    with pytest.raises(
        ValueError, match=r"lora_url is set; a loader applies one LoRA\. Set lora_name to none"
    ):
        load(models["t2v"], names[0], url="https://example.com/x.safetensors")


@pytest.mark.parametrize("solver, steps, shift", [("unipc", 30, 100.0), ("dpm++", 100, 16.0)])
def test_steps_that_share_a_timestep_are_told_apart(
    t2v_job, sample, names, monkeypatch, solver, steps, shift
):
    model, *rest = t2v_job
    scheduled, seen = wl.scheduled, []

    def watch(values, step, count):
        seen.append(step)
        return scheduled(values, step, count)

    monkeypatch.setattr("wan21.host.lora_run.scheduled", watch)
    patched = load(model, names[0], 1.0, "1, 0.5")[0]
    sample(patched, *rest, solver=solver, steps=steps, flow_shift=shift)
    assert list(dict.fromkeys(seen)) == [*range(steps)]


def test_a_lora_at_use_is_in_the_estimate(t2v_job, names):
    model, _, _, latent = t2v_job
    plans = (MemoryPlan(),)
    changed = [load(model, names[0], 1.0, schedule)[0] for schedule in ("1, 1", "1, 0.5")]
    needs = [host.plan_memory(m, latent["samples"].shape, plans, 2)[1] for m in changed]
    config = host.config_of(model)
    assert needs[1] - needs[0] == 3 * 4 * config.dim * config.ffn_dim + lora.factor_bytes(changed[1])


def test_on_a_modulation_stored_in_fp8(files, loras, tmp_path, t2v_job, sample):
    """Some files hold every tensor in fp8; the distilled LoRAs change `modulation`, and torch adds no fp8."""
    change = torch.randn(1, 6, 256, generator=torch.Generator().manual_seed(5)) * 0.3
    save_file({"diffusion_model.blocks.0.diff_m": change}, loras / "distilled.safetensors")
    whole = load_file(files["t2v"])
    rounded = whole["blocks.0.modulation"].to(torch.float8_e4m3fn)
    results = []
    for name, modulation in (("fp8", rounded), ("fp32", rounded.float())):
        path = tmp_path / f"{name}.safetensors"
        save_file(whole | {"blocks.0.modulation": modulation}, path, metadata=METADATA)
        model = host.load_model(path)
        plain = sample(model, *t2v_job[1:])[0]["samples"]
        changed, _ = load(model, "distilled.safetensors", schedule="1, 1")
        results.append(sample(changed, *t2v_job[1:])[0]["samples"])
        assert relative(results[-1], plain) > 1e-4
        assert torch.equal(sample(model, *t2v_job[1:])[0]["samples"], plain)
    assert relative(*results) < 1e-5


class CopiesToMeta(TorchDispatchMode):
    """Counts tensors that go from the CPU to `meta`, which stands for a GPU that is not there."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func.name().startswith(("aten::_to_copy", "aten::to.")):
            self.count += found.is_meta and not args[0].is_meta
        return found


def test_factors_go_to_the_device_once_a_run(models, names):
    model = load(models["t2v"], names[0], 0.7, "1, 0.5")[0]
    model = load(model, names[1], 0.3, "1, 0")[0]
    if model.load_device.type != "cpu":
        pytest.skip("a stand-in for a GPU; the pretended one has copies of its own")
    run = lora_run.LoraRun(model.model, lora.scheduled_loras(model), {}, torch.device("meta"))
    layer = model.model.diffusion_model.blocks[1].ffn[0]
    for use in range(3):
        with CopiesToMeta() as copies:
            run.attach() if use == 0 else run.set_step({CALL: Call(("cond",), step=use - 1, steps=2)})
            weight = torch.empty(512, 256, device="meta", dtype=torch.float16)
            for function in layer.weight_function if use else ():
                weight = function(weight)
        assert copies.count == (10 if use == 0 else 0)  # 2 layers of 2 factors, 3 differences; 2 and DoRA's
    run.detach()
    assert not layer.weight_function


def test_what_lies_on_the_device_is_planned_for(models, names):
    plain = models["t2v"]
    model = load(plain, names[0], 0.7, "1, 0.5")[0]
    weights = [p for key, p in host.read_lora(path_of(names[0]), plain).patches if "modulation" not in key]
    factors = sum(t.nbytes for patch in weights for t in patch.factors if t is not None)
    on_cpu = model.load_device.type == "cpu"
    assert lora.factor_bytes(model) == (0 if on_cpu else factors) and factors > 0
    size = plain.model.step_size((1, 16, 2, 4, 4), 2)
    assert step_bytes(replace(size, lora_bytes=factors)) - step_bytes(size) == factors


def path_of(name):
    return folder_paths.get_full_path("loras", name)
