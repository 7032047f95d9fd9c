"""Training of the bundled checkpoint: the model is trained on exactly what the nodes feed it."""

import random
import re

import pytest
import torch
from helpers import relative
from lib import bundled
from safetensors.torch import save_file
from wan21 import host
from wan21.host.coefficients import COEFFICIENTS_KEY
from wan21.nodes.image_to_video import Wan21ImageToVideo
from wan21.nodes.sampler import Wan21Sampler
from wan21.training import (
    captions,
    data,
    dit,
    held_out,
    latents,
    metrics,
    optim,
    progress,
    teacache,
    train_vae,
    vae_stream,
)
from wan21.training.export import metadata
from wan21.training.files import holds, stored, write
from wan21.training.text import HOST_TOKENS, train_tokenizer
from wan21.training.train_dit import TinyModel, flow_loss, random_sigmas, sigma_shift
from wan21.wan.vae import WanVAE

SIZE = (32, 48)  # height, width
PROMPTS = ("", "pan left", "The camera slowly pans to the RIGHT, past a zebra!", captions.NEGATIVES[0])


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(2000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def model(tokenizer):
    """DiT and text encoder whose weights are random and fit into float16."""
    tiny = TinyModel(tokenizer)
    generator = torch.Generator().manual_seed(0)
    for name, p in tiny.named_parameters():
        if name.startswith("dit.head") or name.endswith("modulation"):
            p.data.normal_(std=0.1, generator=generator)
        p.data.copy_(p.data.half())
    return tiny.requires_grad_(False)


@pytest.fixture(scope="module")
def clip(model, folder):
    path = folder / "umt5.safetensors"
    spiece = torch.frombuffer(bytearray(model.text.tokenizer), dtype=torch.uint8)
    save_file(stored(model.text.t5.state_dict() | {"spiece_model": spiece}), path)
    return host.load_text_encoder(path)


@pytest.fixture(scope="module")
def loaded(model, folder):
    save_file(stored(model.dit.state_dict()), folder / "dit.safetensors", metadata=metadata("dit", {}))
    return host.load_model(folder / "dit.safetensors")


@pytest.fixture(scope="module")
def vaes(folder):
    """(the VAE that encodes for the training, the same one from its file)"""
    torch.manual_seed(0)
    vae = WanVAE(dim=8)
    for p in vae.parameters():
        p.data.copy_(p.data.half())
    save_file(stored(vae.state_dict()), folder / "vae.safetensors")
    return vae, host.load_vae(folder / "vae.safetensors")


def test_text_features_are_those_of_the_host(model, clip):
    features, lengths = model.text(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        ((theirs, _),) = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        n = int(lengths[i])
        assert theirs.shape == (1, HOST_TOKENS, 128)
        assert relative(features[i, :n], theirs[0, :n]) < 1e-5
        assert not theirs[0, n:].any() and not features[i, n:].any()


def test_case_has_no_meaning(model):
    assert model.text.encode("Pan LEFT") == model.text.encode("pan left")


def test_tokenizer_knows_every_word_of_the_captions(model):
    rng = random.Random(0)
    for _ in range(2000):
        ids = model.text.encode(captions.caption(data.random_motion(rng), rng))
        assert 2 not in ids and ids[-1] == 1 and len(ids) < 64


def test_one_pad_stands_for_all(model):
    """Short text with one weighted pad gives the velocity of the full 512 tokens."""
    features, lengths = model.text(PROMPTS)
    x, condition = torch.randn(4, 16, 2, 4, 6), torch.randn(4, 20, 2, 4, 6)
    sigma = torch.tensor([0.1, 0.4, 0.7, 1.0])
    full = torch.nn.functional.pad(features, (0, 0, 0, HOST_TOKENS - features.shape[1]))
    expected = model.dit(torch.cat([x, condition], 1), 1000 * sigma, full)
    ours = dit.velocity(model.dit, x, sigma, condition, features, lengths)
    assert relative(ours, expected) < 5e-6 < expected.std()
    as_long_as_the_video = torch.nn.functional.pad(features[:2, :6], (0, 0, 0, 6))  # 12 tokens
    ours = dit.velocity(model.dit, x[:2], sigma[:2], condition[:2], as_long_as_the_video, lengths[:2])
    assert relative(ours, expected[:2]) < 5e-6


def test_clip_features_have_no_effect(model):
    args = (torch.randn(1, 36, 2, 4, 6), torch.tensor([500.0]), torch.randn(1, 8, 128))
    assert torch.equal(model.dit(*args), model.dit(*args, clip_fea=torch.randn(1, 257, 1280)))


@pytest.mark.parametrize("frames, kind", [(5, "start"), (17, "start"), (13, "end"), (5, "alone")])
def test_conditioning_is_what_the_sampler_feeds(loaded, vaes, clip, folder, frames, kind):
    vae, host_vae = vaes
    bucket = latents.Bucket(frames, *SIZE, 1.0)
    plan = [(bucket, 4, 7)]
    latents.write_shards(latents.Encoder(vae), folder / kind, plan)
    _, ours, _ = latents.Latents(folder / kind, plan).batch(bucket, [0], [kind])
    video = data.clips(7, 4, frames, *SIZE)[0][0].movedim(0, -1) / 2 + 0.5  # [F, H, W, 3]
    theirs = fed_to_the_model(loaded, clip, host_vae, video, kind)
    assert torch.equal(ours[:, :4], theirs[:, :4])
    # with more than 5 frames the grey after a start image is taken as if it had forgotten it
    assert relative(ours[:, 4:, :2], theirs[:, 4:, :2]) < 1e-3
    assert relative(ours[:, 4:], theirs[:, 4:]) < (0.1 if frames > 5 and kind == "start" else 1e-3)


def test_empty_start_is_what_the_host_feeds_without_image(loaded, vaes, folder):
    bucket = latents.Bucket(5, *SIZE, 1.0)
    latents.write_shards(latents.Encoder(vaes[0]), folder / "empty", [(bucket, 1, 7)])
    clip, ours, _ = latents.Latents(folder / "empty", [(bucket, 1, 7)]).batch(bucket, [0], ["empty"])
    assert torch.equal(ours, loaded.model.concat_cond(noise=torch.zeros_like(clip), device=clip.device))


def fed_to_the_model(model, clip, vae, video, kind):
    """Mask and image latent [1, 20, T, h, w] as they arrive at the patch embedding."""
    prompt = clip.encode_from_tokens_scheduled(clip.tokenize("pan left"))
    frames, height, width = video.shape[:3]
    end = video[-1:] if kind in ("end", "alone") else None
    positive, negative, latent = Wan21ImageToVideo.execute(
        prompt, prompt, vae, video[:1], width, height, frames, "crop", kind == "alone", "auto", end_image=end
    ).result
    seen = []
    embedding = model.model.diffusion_model.patch_embedding
    handle = embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    job = {"seed": 0, "steps": 1, "guidance_scale": 1.0, "flow_shift": 3.0, "solver": "euler", "denoise": 1.0}
    Wan21Sampler.execute(model, positive, negative, latent, **job)
    handle.remove()
    return seen[0][:, 16:]


def test_an_interrupted_encoding_goes_on(vaes, folder):
    plan = latents.shard_plan(3, (latents.Bucket(5, 32, 32, 1.0),))
    plan = [(plan[0][0], 1, seed) for seed in (1, 2, 3)]
    encoder = latents.Encoder(vaes[0])
    latents.write_shards(encoder, folder / "whole", plan)
    latents.write_shards(encoder, folder / "cut", plan[:1])
    (folder / "cut" / "5x32x32-2.part").write_bytes(b"half a file")
    latents.write_shards(encoder, folder / "cut", plan)
    whole, cut = (latents.Latents(folder / name, plan) for name in ("whole", "cut"))
    rows = ([0, 1, 2], ["end"] * 3)
    for a, b in zip(whole.batch(plan[0][0], *rows)[:2], cut.batch(plan[0][0], *rows)[:2]):
        assert torch.equal(a, b)


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    rates = [optim.warm_up_then_decay(step, 1000, 50, 0.4) for step in range(1000)]
    assert rates[0] == 0.02 and rates[49] == rates[399] == 1 and 0.49 < rates[700] < 0.51
    assert 0 < rates[-1] < 0.002


def test_each_plan_is_encoded_with_its_own_pictures(vaes, folder):
    """What was encoded before, held-out clips for instance, leaves nothing: a restart between is the same."""
    bucket = latents.Bucket(13, 32, 32, 1.0)
    encoder = latents.Encoder(vaes[0])
    latents.write_shards(encoder, folder / "held_out", [(bucket, 1, 7)])
    latents.write_shards(encoder, folder / "after", [(bucket, 1, 8)])
    latents.write_shards(latents.Encoder(vaes[0]), folder / "alone", [(bucket, 1, 8)])
    after, alone = (latents.Latents(folder / name, [(bucket, 1, 8)]) for name in ("after", "alone"))
    assert torch.equal(after.parts[bucket]["tail"], alone.parts[bucket]["tail"])


def test_weights_of_a_training_that_diverged_are_not_written():
    fine = {"a.weight": torch.full((2,), 6e4), "bytes": torch.zeros(2, dtype=torch.uint8)}
    assert stored(fine)["a.weight"].dtype == torch.float16
    for value in (torch.nan, torch.inf, 1e5):
        with pytest.raises(ValueError, match=r"b\.weight is not finite in float16"):
            stored(fine | {"b.weight": torch.tensor([1.0, value])})


def test_files_of_models_are_for_everybody_to_read(tmp_path):
    path = tmp_path / "loras" / "x.safetensors"
    write({"a": torch.ones(2)}, path, {"title": "x"})
    assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_file_with_the_same_numbers_is_left_as_it_is(tmp_path, monkeypatch):
    """So a start behind the end keeps TeaCache's polynomial, and does not fit another one."""
    path = tmp_path / bundled.MODEL
    assert not holds(path, {"a": torch.ones(2)})
    write({"a": torch.ones(2)}, path, {COEFFICIENTS_KEY: "[1]"})
    assert holds(path, {"a": torch.ones(2)})
    for other in ({"a": torch.zeros(2)}, {"b": torch.ones(2)}, {"a": torch.ones(3)}, {}):
        assert not holds(path, other)
    models = tmp_path / "models"
    (models / "diffusion_models").mkdir(parents=True)
    path.rename(models / "diffusion_models" / path.name)
    monkeypatch.setattr(teacache.calibrate_teacache, "main", lambda argv: pytest.fail("fitted"))
    teacache.fit(models, tmp_path)


def test_a_work_folder_belongs_to_one_schedule(tmp_path):
    for _ in range(2):
        progress.keep_to_one_size(tmp_path / "work", "smoke")
    with pytest.raises(SystemExit, match="holds a training of size smoke; give another folder"):
        progress.keep_to_one_size(tmp_path / "work", "cpu")


def test_a_longer_training_is_not_taken_for_a_finished_one(folder):
    stage = progress.Stage(folder / "long", "x")
    stage.save({"step": 9, "parts": {}})
    with pytest.raises(ValueError, match="step 9 of a longer schedule"):
        progress.train(stage, progress.Parts(), 6, lambda step: pytest.fail("trained"), dict)
    assert not stage.done and stage.load()["step"] == 9


@pytest.mark.parametrize("in_bf16, bound", [(False, 1e-4), (True, 0.05)])
def test_muon_in_bfloat16_is_near(in_bf16, bound):
    """Singular values that fall by a thousand, square and wide, against the published form in float64."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 64, 64), (2, 32, 432)):
        matrices = torch.randn(shape, generator=generator) * torch.logspace(0, -3, shape[1])[:, None]
        whole = matrices.double()
        expected = optim.newton_schulz(whole / whole.norm(dim=(1, 2), keepdim=True), 5)
        assert relative(optim.orthogonalize(matrices, 5, in_bf16), expected) < bound


def test_muon_makes_the_same_of_wide_and_tall_matrices_as_of_square_ones():
    """The short way over the gram matrix against the iteration as it is published, singular values near 1."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(3, 32, 128, generator=generator)
    expected = optim.newton_schulz(wide / wide.norm(dim=(1, 2), keepdim=True), 5)
    assert relative(optim.orthogonalize(wide, 5), expected) < 1e-5
    assert torch.equal(optim.orthogonalize(wide.mT, 5), optim.orthogonalize(wide, 5).mT)
    values = torch.linalg.svdvals(expected)
    assert values.min() > 0.6 and values.max() < 1.3


def test_products_in_bfloat16_leave_weights_and_gradients_in_float32(monkeypatch, tokenizer):
    generator = torch.Generator().manual_seed(0)
    clip, condition = (torch.randn(2, c, 2, 4, 4, generator=generator) for c in (16, 20))
    gradients = []
    for in_bf16 in (False, True):
        monkeypatch.setattr(optim, "multiplies_in_bf16", lambda device, answer=in_bf16: answer)
        with torch.inference_mode(False), torch.enable_grad():
            model = TinyModel(tokenizer)
            torch.nn.init.normal_(model.dit.head.head.weight, std=0.05, generator=generator.manual_seed(1))
            with optim.bf16_products("cpu"):
                loss = flow_loss(
                    model, clip.clone(), condition.clone(), ["pan left", ""], torch.tensor([0.3, 0.8]), 0
                )
            loss.backward()
        assert loss.dtype == torch.float32
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert gradients[1].dtype == torch.float32
    assert 1e-4 < relative(*gradients) < 0.03


@pytest.mark.parametrize("kinds", [latents.KINDS, latents.LATE_KINDS], ids=["first", "late"])
def test_clips_are_drawn_as_often_as_said(kinds, vaes, folder):
    """And only clips that were encoded with their end as such."""
    bucket = latents.Bucket(5, 32, 32, 1.0)
    plan = [(bucket, 11, 3)]
    latents.write_shards(latents.Encoder(vaes[0]), folder / "drawn", plan)
    clips = latents.Latents(folder / "drawn", plan)
    rng, drawn = random.Random(0), []

    def batch(bucket, rows, kinds):
        drawn.extend(zip(rows, kinds))

    clips.batch = batch
    for _ in range(1500):
        clips.draw(rng, 2 * bucket.tokens, kinds)
    percent = {k: 100 * sum(kind == k for _, kind in drawn) / len(drawn) for k in kinds}
    assert percent == pytest.approx(kinds, abs=3)
    assert sum(kinds.values()) == 100
    is_shape = [motion.kind == "object" for motion in clips.motions[bucket]]
    weight = latents.SHAPE_WEIGHT * sum(is_shape)
    empty = [is_shape[row] for row, kind in drawn if kind == "empty"]
    assert sum(empty) / len(empty) == pytest.approx(weight / (weight + is_shape.count(False)), abs=0.06)
    assert all(clips.parts[bucket]["where"][row] >= 0 for row, kind in drawn if kind == "end")


def test_large_clips_and_those_without_image_are_trained_at_higher_noise():
    """Four times the tokens hide as much at twice the noise-to-signal ratio, sigma / (1 - sigma)."""
    known = torch.ones(2, 20, 5, 8, 8)
    known[1] = 0
    small = sigma_shift(torch.zeros(2, 16, 5, 8, 8), known)
    large = sigma_shift(torch.zeros(2, 16, 5, 16, 16), torch.ones(2, 20, 5, 16, 16))
    assert small[0] == 0 < small[1]
    torch.testing.assert_close(large.exp(), torch.full((2,), 2.0))
    plain, shifted = (random_sigmas(random.Random(1), 4000, shift) for shift in (0.0, large[:1]))
    assert plain.logit().median() + 0.4 < shifted.logit().median()
    assert shifted.min() > 0 and shifted.max() < 1


def test_captions_name_the_motion():
    rng = random.Random(0)
    for name in data.CAMERA:
        said = [captions.caption(data.Motion("camera", name), rng).lower() for _ in range(200)]
        assert len(set(said)) > 150
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    for direction, other in opposite.items():
        said = [captions.expand(*captions.camera_rules(f"pan {direction}"), rng) for _ in range(300)]
        assert not any(other in text.split() for text in said if "from" not in text)


def test_metrics_recognise_true_clips():
    video, motions = data.clips(data.HELD_OUT + 50, 9, 17, 48, 64, motions=[*data.CAMERA])
    for shown, motion in zip(video.movedim(1, 2) / 2 + 0.5, motions):
        assert metrics.camera_motion(shown[0], shown) == motion.name
        assert metrics.camera_motion(shown[0], shown[:1].expand(17, -1, -1, -1)) == "still"
    moves = [data.Motion("object", "move", "red", "square", way) for way in data.DIRECTIONS]
    video, _ = data.clips(data.HELD_OUT + 60, 4, 17, 48, 64, motions=moves)
    for shown, motion in zip(video.movedim(1, 2) / 2 + 0.5, moves):
        assert metrics.object_direction(shown, "red") == motion.direction
        assert metrics.object_direction(shown.flip(0), "red") not in (None, motion.direction)
        assert metrics.object_direction(shown[:1].expand(17, -1, -1, -1), "red") is None


def test_scenes_change_as_they_are_called():
    """Each begins with its picture as it is; and what is measured on it is not seen in what stands still."""
    for name in data.SCENES:
        video, _ = data.clips(data.HELD_OUT + 70, 8, 17, 96, 96, motions=[data.Motion("scene", name)])
        still, _ = data.clips(data.HELD_OUT + 70, 8, 17, 96, 96, motions=["still"])
        assert relative(video[:, :, 0], still[:, :, 0]) < 0.01
        found = [metrics.scene_change(shown) for shown in video.movedim(1, 2) / 2 + 0.5]
        assert found.count(name) >= 7, (name, found)
        assert {metrics.scene_change(shown) for shown in still.movedim(1, 2) / 2 + 0.5} == {None}
    moving, _ = data.clips(data.HELD_OUT + 71, 8, 17, 96, 96, motions=[*data.CAMERA[:8]])
    assert {metrics.scene_change(shown) for shown in moving.movedim(1, 2) / 2 + 0.5} == {None}


def test_scenes_are_trained_on_and_leave_the_held_out_clips_as_they_were():
    for share in (data.SCENE_SHARE, 1 / 3):
        drawn = [data.random_motion(random.Random(i), share).kind for i in range(3000)]
        assert drawn.count("scene") / 3000 == pytest.approx(share, abs=0.02)
    _, motions = data.clips(data.HELD_OUT + 72, 60, 1, 16, 16)
    assert {m.kind for m in motions} == {"camera", "object"}
    assert {m.kind for m in data.clips(72, 60, 1, 16, 16)[1]} == {"camera", "object", "scene"}


def test_captions_name_the_change_of_a_scene():
    rng = random.Random(0)
    for name, words in {
        "night": "night|dark|fade",
        "snow": "snow",
        "waves": "wave|ripple|water|sea|lake",
    }.items():
        motion = data.Motion("scene", name)
        said = [captions.expand(*captions.rules_of(motion), rng) for _ in range(100)]
        assert all(re.search(words, text) for text in [*said, captions.canonical(motion)])
        assert len({captions.caption(motion, rng) for _ in range(200)}) > 100


def test_words_outweigh_the_padding_from_the_start(tokenizer):
    tiny = TinyModel(tokenizer).requires_grad_(False)
    features, lengths = tiny.text(["pan left", "a red circle moves left"])
    text = tiny.dit.text_embedding(features)
    tokens = torch.randn(1, 50, dit.CONFIG.dim, generator=torch.Generator().manual_seed(0))
    for block in tiny.dit.blocks:
        attention = block.cross_attn
        q = attention.heads(attention.norm_q(attention.q(tokens)))
        k = attention.heads(attention.norm_k(attention.k(text)))
        logits = torch.einsum("blnd,btnd->bnlt", q.expand(len(k), -1, -1, -1), k) / q.shape[-1] ** 0.5
        for row, length in zip(logits, lengths.tolist()):
            pads = (HOST_TOKENS - length) * row[..., length].exp()
            words = row[..., :length].exp().sum(-1)
            assert (words / (words + pads)).mean() > 0.6


def test_the_vae_trains_on_what_it_computes_in_use(monkeypatch):
    monkeypatch.setattr(vae_stream, "multiplies_in_bf16", lambda device: False)
    with torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        vae = WanVAE(dim=8)
        video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
        latent = train_vae.encode(vae, video)
        pixels = train_vae.decode(vae, latent)
        pixels.square().mean().backward()
    assert all(p.grad is not None for p in vae.parameters())
    assert relative(latent.detach(), vae.encode(video)) < 1e-5
    assert relative(pixels.detach(), vae.decode(latent.detach())) < 1e-5


def test_every_photograph_says_whose_it_is():
    told = (held_out.PHOTOGRAPHS / "LICENCES.md").read_text(encoding="utf-8")
    found = held_out.photographs()
    assert found and {name for name in found if f"`{name}.png`" in told} == set(found)
    assert len(re.findall(r"\| (CC0|public domain) \|", told)) == len(found)
    for picture in found.values():
        assert picture.shape == (3, 128, 128) and 0 <= picture.min() < 0.2 and 0.8 < picture.max() <= 1


def test_faces_and_light_are_in_what_is_trained_on_and_not_in_what_is_measured(monkeypatch):
    seeds, motions = (3, data.HELD_OUT + 3), ["still", data.Motion("object", "move", "red", "circle", "up")]
    now = [data.clips(seed, 8, 1, 32, 32, motions=motions)[0] for seed in seeds]
    monkeypatch.setattr(data, "enriched", lambda rnd, image, *_: image)
    plain = [data.clips(seed, 8, 1, 32, 32, motions=motions)[0] for seed in seeds]
    changed = (now[0] - plain[0]).abs().flatten(1).amax(1) > 0.05
    assert changed[::2].sum() >= 2 and not changed[1::2].any()  # the shapes of the captions keep their scenes
    assert torch.equal(now[1], plain[1]) and now[0].abs().max() <= 1
