"""How the bundled model is distilled to four steps: the teacher's paths, the student's, and what learns."""

import copy
import json

import pytest
import torch
from lib import pack
from wan21.training import data, latents
from wan21.training.train_four_steps import (
    TEACHER_GUIDANCE,
    TEACHER_SHIFT,
    Velocity,
    bundled_encoder,
    bundled_model,
    conditions,
    keep_to_one_teacher,
    path_loss,
    roll_out,
    student,
    student_sigmas,
    teacher_path,
)
from wan21.wan.conditioning import known_mask

MODELS = pack.ROOT / "models"
BUCKET = latents.Bucket(9, 64, 64, 1.0)
SHAPE = (2, 16, 3, 8, 8)
G = torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def model():
    return bundled_model(MODELS)


@pytest.fixture(scope="module")
def encoder():
    return bundled_encoder(MODELS)


class Curved:
    """A velocity whose paths are known: x(sigma) = noise + clip * (1 - sigma ** 2)."""

    clip = torch.randn(SHAPE, generator=G)

    def __call__(self, x, sigma):
        return -2 * sigma * self.clip

    guided = __call__


def test_steps_are_those_of_distilled_models():
    assert student_sigmas() == pytest.approx([1, 0.9375, 0.83333, 0.625, 0], abs=1e-5)


def test_teacher_is_met_where_the_student_stops():
    """UniPC reads a velocity as a clean latent, for which a straight path is exact at every noise level."""
    clip, noise = Curved.clip, torch.randn(SHAPE, generator=G)

    class Straight:
        def guided(self, x, sigma):
            return (x - clip) / sigma  # towards `clip` from anywhere

    path = teacher_path(Straight(), noise)
    for x, sigma in zip(path, student_sigmas(), strict=True):
        assert (x - (1 - sigma) * clip - sigma * noise).abs().max() < 2e-3  # its first sigma is 0.9999


def test_loss_is_of_where_each_step_ends():
    """Zero on the student's own path; and one step that goes wrong is paid for at all that follow."""
    noise = torch.randn(SHAPE, generator=G)
    own = torch.stack([noise, *roll_out(Curved(), noise)])
    assert path_loss(Curved(), own) == 0
    path = own.clone()
    path[4] += 0.1
    assert path_loss(Curved(), path).item() == pytest.approx(0.1**2 / 0.625, rel=1e-4)
    path = own.clone()
    path[1:] += 0.1
    ways = (0.0625, 0.104167, 0.208333, 0.625)
    assert path_loss(Curved(), path).item() == pytest.approx(sum(0.1**2 / way for way in ways), rel=1e-4)


@torch.inference_mode(False)
def test_every_added_weight_learns_and_the_model_does_not():
    model = bundled_model(MODELS)
    lora = student(model)
    with torch.enable_grad():
        condition = torch.randn(2, 20, *SHAPE[2:], generator=G)
        path = torch.randn(5, *SHAPE, generator=G)
        path_loss(Velocity(model, condition, ["pan left", "zoom in"]), path).backward()
        assert len(lora.up) == 6 * 10 + 4  # ten matrices a block, three of the noise level, the last layer
        assert all(up.grad.abs().max() > 0 for up in lora.up.values())
        assert not any(p.requires_grad for p in model.parameters())


def test_conditions_are_those_of_the_training(encoder):
    """Start image, start and end image for every second, none for some."""
    seed, count = data.HELD_OUT, 7
    size = (BUCKET.frames, BUCKET.height, BUCKET.width)
    found = conditions(encoder, BUCKET, data.clips(seed, count, *size)[0])
    shard = encoder.shard(BUCKET, count, seed)  # whose batches are compared with the host's conditioning
    for row in (3, 5):
        image = torch.cat([shard["start"][row], shard["tail"]], 1)
        assert torch.equal(found[row, 4:].half(), image)
        assert torch.equal(found[row, :4], known_mask(*size)[0])
    for row, at in ((0, 0), (2, 1), (4, 2), (6, 3)):
        assert torch.equal(found[row, 4:].half(), shard["start_and_end"][at])
        assert torch.equal(found[row, :4], known_mask(*size, True)[0])
    assert found[1].abs().max() == 0


def test_the_teacher_is_sampled_as_the_quick_start():
    graph = json.loads((pack.ROOT / "workflows/api/Wan2.1 - quick start.json").read_text(encoding="utf-8"))
    sampler = next(node["inputs"] for node in graph.values() if node["class_type"] == "Wan21Sampler")
    assert (sampler["guidance_scale"], sampler["flow_shift"]) == (TEACHER_GUIDANCE, TEACHER_SHIFT)


def test_guidance_of_the_teacher_is_the_samplers(model):
    condition = torch.randn(1, 20, *SHAPE[2:], generator=G)
    x = torch.randn(1, *SHAPE[1:], generator=G)
    words, nothing = (Velocity(model, condition, [text]) for text in ("pan left", ""))
    with torch.no_grad():
        expected = nothing(x, 0.9) + TEACHER_GUIDANCE * (words(x, 0.9) - nothing(x, 0.9))
        assert (words.guided(x, 0.9) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_work_folder_belongs_to_one_teacher(model, tmp_path):
    """The paths of another are kept on disk, and would be followed without a word."""
    keep_to_one_teacher(tmp_path, model)
    keep_to_one_teacher(tmp_path, model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.dit.head.head.bias += 1e-4
    with pytest.raises(SystemExit, match="holds the paths of another model; delete it"):
        keep_to_one_teacher(tmp_path, other)
    (tmp_path / "teacher.txt").unlink()
    (tmp_path / "paths").mkdir()
    with pytest.raises(SystemExit, match="holds the paths of another model"):  # nobody knows of which
        keep_to_one_teacher(tmp_path, model)
