"""Stages of the training that can be killed at any time and go on where they were last saved."""

import csv
import os
import time
from pathlib import Path

import torch

from .files import write_text

WORK = Path(__file__).resolve().parents[1] / "build" / "train_tiny"
SAVE_SECONDS = 120


def work_of(size):
    """The folder of a training of a size, where none is given."""
    return WORK if size == "cpu" else Path(f"{WORK}_{size}")


def keep_to_one_size(work, size):
    """A work folder belongs to one schedule: the stages of another would pass for done."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / "size.txt"
    if not path.exists():
        write_text(path, size)
    if path.read_text() != size:
        raise SystemExit(
            f"{work} holds a training of size {path.read_text()}; give another folder with --work"
        )


class Stage:
    """One part of the training: its state in `<work>/<name>.pt`, its history in `<name>.csv`.

    Args:
        work: Folder for all stages of one training.
    """

    def __init__(self, work, name):
        self.work, self.name = Path(work), name
        self.work.mkdir(parents=True, exist_ok=True)
        self.path, self.finished = self.work / f"{name}.pt", self.work / f"{name}.done"
        self.spent, self.started, self.saved = 0.0, time.monotonic(), time.monotonic()

    @property
    def done(self):
        return self.finished.exists()

    @property
    def seconds(self):
        """Time spent in this stage, over all runs."""
        return self.spent + time.monotonic() - self.started

    def load(self, device="cpu"):
        """What save() got last, or None."""
        if not self.path.exists():
            return None
        state = torch.load(self.path, map_location=device, weights_only=True)
        self.spent, self.started = state.pop("seconds"), time.monotonic()
        return state

    def save(self, state, done=False):
        """Writes `state` (a dict of tensors, numbers and the like) whole or not at all."""
        unfinished = self.path.with_suffix(".part")
        torch.save({**state, "seconds": self.seconds}, unfinished)
        os.replace(unfinished, self.path)
        self.saved = time.monotonic()
        if done:
            self.finished.touch()

    @property
    def should_save(self):
        return time.monotonic() - self.saved > SAVE_SECONDS

    def log(self, table="", **row):
        """One line on the screen and in `<name><table>.csv`; the columns are those of the first row."""
        row = {key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()}
        row = {"step": row.pop("step", ""), "seconds": round(self.seconds), **row}
        print(self.name + table, *(f"{key} {value}" for key, value in row.items()), flush=True)
        path = self.work / f"{self.name}{table}.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(row.keys())
            writer.writerow(row.values())


class Parts:
    """Several objects with a state_dict as one dict, to save and load together."""

    def __init__(self, **parts):
        self.parts = parts

    def state_dict(self):
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state):
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def train(stage, parts, steps, do_step, measure, log_every=20, measure_every=200):
    """Runs `do_step(step)` up to `steps` from where the stage was saved; returns at once if it is done.

    Args:
        parts: What to save: an object with state_dict and load_state_dict, such as Parts.
        do_step: step -> dict of numbers for the log; must depend on the step number only.
        measure: () -> dict of held-out numbers, also called after the last step.

    Raises:
        ValueError: what was saved is already past `steps`, hence of a longer schedule.
    """
    state = stage.load()
    if state is not None:
        parts.load_state_dict(state["parts"])
    start = 0 if state is None else state["step"]
    if stage.done:
        return
    if start > steps:
        raise ValueError(
            f"{stage.path} is at step {start} of a longer schedule than this one of {steps} steps. "
            "Delete it, or take another work folder"
        )
    sums, count = {}, 0
    for step in range(start, steps):
        for key, value in do_step(step).items():
            sums[key] = sums.get(key, 0.0) + value
        count += 1
        last = step + 1 == steps
        if last or (step + 1) % log_every == 0:
            stage.log(step=step + 1, **{key: value / count for key, value in sums.items()})
            sums, count = {}, 0
        if last or (step + 1) % measure_every == 0:
            stage.log("_held_out", step=step + 1, **measure())
        if stage.should_save and not last:
            stage.save({"step": step + 1, "parts": parts.state_dict()})
    stage.save({"step": steps, "parts": parts.state_dict()}, done=True)
