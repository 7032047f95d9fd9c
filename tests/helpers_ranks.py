"""Processes that make one call of a DiT together over gloo, and what they are asked to do.

They are started once and serve many cases: a process imports torch in seconds, and a case takes milliseconds.
"""

import contextlib
import multiprocessing
import os
import time
import traceback
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from multiprocessing.connection import wait

import torch
import torch.distributed as dist
from lib.pack import load_pack
from lib.random_weights import randomise

load_pack()

from wan21.wan import dit  # noqa: E402
from wan21.wan.chunked import block_executor  # noqa: E402
from wan21.wan.config import WanConfig  # noqa: E402
from wan21.wan.sample import SampleJob, Sampling  # noqa: E402
from wan21.wan.shard import WHOLE, Ulysses, groups, spans  # noqa: E402

PATIENCE_S = 30  # for a rank that does not come: a failed test, not one that hangs


class Ranks:
    """So many processes; `ranks(n, job, *args)` runs `job(rank, n, *args)` in the first n of them."""

    def __init__(self, count, folder):
        context = multiprocessing.get_context("spawn")
        self.pipes, theirs = zip(*(context.Pipe() for _ in range(count)))
        self.first = context.Process(target=_serve_all, args=(theirs, str(folder)), daemon=True)
        self.first.start()
        for pipe in theirs:
            pipe.close()

    def __call__(self, count, job, *args):
        pipes = self.pipes[:count]
        for pipe in pipes:
            pipe.send((job, count, args))
        results, missing = {}, list(pipes)
        while missing:
            came = wait(missing, PATIENCE_S)
            assert came, f"ranks {[pipes.index(pipe) for pipe in missing]} did not answer"
            for pipe in came:
                failure, results[pipe] = pipe.recv()
                assert failure is None, f"rank {pipes.index(pipe)}: {failure}"
                missing.remove(pipe)
        return [results[pipe] for pipe in pipes]

    def stop(self):
        for pipe in self.pipes:
            pipe.close()
        self.first.join()


def _serve_all(pipes, folder):
    """The first process; it makes the others of itself, so that one alone has to import."""
    torch.set_num_threads(1)
    number = next((n for n in range(1, len(pipes)) if os.fork() == 0), 0)
    with contextlib.suppress(EOFError), torch.inference_mode():
        _serve(pipes[number], Rank(number, folder))
    os._exit(0)  # a group whose last call never ended would be waited for


def _serve(pipe, rank):
    while True:
        job, count, args = pipe.recv()
        try:
            pipe.send((None, job(rank, count, *args)))
        except Exception:
            pipe.send((traceback.format_exc(), None))


@dataclass
class Rank:
    """One of the processes, in itself.

    Attributes:
        folder: where they meet.
    """

    number: int
    folder: str

    @cache  # noqa: B019 (there is one, and it lives as long as its process)
    def group_of(self, ranks, name=""):
        """The gloo group of a range of ranks; without a default group, as workers have it."""
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=PATIENCE_S)
        store = dist.FileStore(os.path.join(self.folder, f"{name}{ranks.start}-{ranks.stop}"), len(ranks))
        return dist.ProcessGroupGloo(store, ranks.index(self.number), len(ranks), options)

    def __hash__(self):
        return self.number


@dataclass(frozen=True)
class Case:
    """A call of a small DiT.

    Attributes:
        latent: frames, height and width; with even sides.
        samples: of each pass.
        parts: of the tokens, see `wan.chunked`.
    """

    heads: int = 4
    head_dim: int = 12
    latent: tuple = (3, 6, 10)
    samples: int = 1
    names: tuple = ("cond", "uncond")
    parts: int = 1
    image: bool = True
    dtype: str = "float32"
    split: str = "sequence"

    @property
    def config(self):
        dim, image_dim = self.heads * self.head_dim, 24 if self.image else None
        return WanConfig(
            in_dim=36 if self.image else 16, dim=dim, ffn_dim=2 * dim + 8, num_heads=self.heads,
            num_layers=LAYERS, text_dim=20, image_dim=image_dim,
        )  # fmt: skip

    @property
    def tokens(self):
        frames, height, width = self.latent
        return frames * height * width // 4


LAYERS = 3


@cache
def model_of(config, dtype="float32", seed=0):
    """In the dtype, as a host's layers would have it: what sees float32 stays in it."""
    model = randomise(dit.WanModel(config, torch.nn), seed).to(getattr(torch, dtype))
    wide = [m for m in model.modules() if isinstance(m, (torch.nn.LayerNorm, dit.Head, torch.nn.Conv3d))]
    for module in (*wide, model.time_embedding, model.time_projection):
        module.float()
    return model


def inputs_of(case, seed=1):
    """One entry a pass: (x, timestep, text, CLIP features or None)."""
    g = torch.Generator().manual_seed(seed)
    config, dtype, samples = case.config, getattr(torch, case.dtype), case.samples

    def one():
        x = torch.randn(samples, config.in_dim, *case.latent, generator=g)
        text = torch.randn(samples, 7, config.text_dim, generator=g, dtype=torch.float32).to(dtype)
        clip = torch.randn(samples, 9, config.image_dim, generator=g) if case.image else None
        return x, torch.linspace(300, 900, samples), text, clip

    return [one() for _ in case.names]


def forward(case, passes=None, shard=WHOLE):
    """Velocities of some passes, or all: [passes, samples, 16, F, H, W]."""
    passes = range(len(case.names)) if passes is None else passes
    chosen = [inputs_of(case)[i] for i in passes]
    x, t, text, clip = (None if part[0] is None else torch.cat(part) for part in zip(*chosen))
    how = {"execute": block_executor(case.parts), "shard": shard}
    names = tuple(case.names[i] for i in passes)
    v = model_of(case.config, case.dtype)(x, t, text, clip, pass_names=names, **how)
    return v.unflatten(0, (len(passes), case.samples))


def call(rank, count, case, wrong=False):
    """(passes, their velocities, bytes sent) of one call over the ranks.

    Args:
        wrong: each rank turns its tokens as if they were the first.
    """
    mine = next(group for group in groups(count, len(case.names), case.split) if rank.number in group.ranks)
    check = (lambda: None) if rank.number % 2 else None  # half of them look while they wait
    shard = Ulysses(rank.group_of(mine.ranks), check)
    first = spans(case.tokens, len(mine.ranks))[shard.rank].start
    table = dit.rope_table
    dit.rope_table = lambda *args: table(*args).roll(first if wrong else 0, dims=0)
    try:
        return mine.passes, forward(case, mine.passes, shard).numpy(), shard.bytes_sent
    finally:
        dit.rope_table = table


class Loaded:
    """A denoiser, alone or one of several ranks that sample together."""

    def __init__(self, case, seed=0, rank=None, count=1):
        self.case, self.config, self.rank, self.count = case, case.config, rank, count
        self.model = model_of(case.config, case.dtype, seed)
        self.inputs = dict(zip(("cond", "uncond"), inputs_of(replace(case, names=("cond", "uncond")))))

    def predict(self, x, timestep, call):
        names = call.pass_names
        if self.rank is None:
            return self._ask(names, WHOLE, x, timestep, call)
        teams = groups(self.count, len(names), self.case.split)
        mine = next(team for team in teams if self.rank.number in team.ranks)
        shard = Ulysses(self.rank.group_of(mine.ranks))
        v = self._ask(tuple(names[i] for i in mine.passes), shard, x, timestep, call)
        if len(teams) == 1:
            return v
        (own,) = v.values()  # two passes, two teams
        everyones = [torch.empty_like(own) for _ in range(self.count)]
        self.rank.group_of(range(self.count), "all").allgather([everyones], [own]).wait()
        return {names[team.passes.start]: everyones[team.ranks.start] for team in teams}

    def _ask(self, names, shard, x, timestep, call):
        runner = dit.run_blocks
        for around in call.around:
            runner = around(runner)
        texts = {name: text for name, (_, _, text, _) in self.inputs.items()}
        chosen = [self.inputs[name] for name in names]
        beside = [image[:, 16:] for image, *_ in chosen]
        clips = [clip for *_, clip in chosen]
        v = self.model(
            torch.cat([torch.cat([x, image], 1) for image in beside]),
            torch.full((len(names) * x.shape[0],), timestep),
            torch.cat([texts[name] for name in names]),
            torch.cat(clips) if self.case.image else None,
            pass_names=names,
            runner=runner,
            execute=block_executor(self.case.parts),
            context_attention=call.context_attention,
            contexts={name: texts[name] for name in call.contexts if name not in names},
            shard=shard,
        )
        return dict(zip(names, v.chunk(len(names))))

    def embed_time(self, timesteps):
        return self.model.embed_time(torch.tensor(timesteps))


def sampled(case, job: SampleJob, rank=None, count=1):
    """(latent, computed steps of TeaCache by expert) of a run with an expert a leg."""
    noise = torch.randn(case.samples, 16, *case.latent, generator=torch.Generator().manual_seed(5))
    sampling, computed = Sampling(job, noise, None), []
    for seed, leg in enumerate(job.legs):
        if leg.steps:
            record = sampling.advance(Loaded(case, seed, rank, count), leg)
            computed.append(record.plan and record.plan.computed)
    return sampling.latent.numpy(), computed


def sample_together(rank, count, case, job):
    return sampled(case, job, rank, count)


class Stopped(Exception):
    """What the `check` of a call raises."""


def leave(rank, count, after_s):
    """The last of the ranks does not come; the others leave their call."""
    group = rank.group_of(range(count), "left")  # never used again, and kept: freeing it would wait as well
    if rank.number == count - 1:
        return "absent"
    until = time.monotonic() + after_s

    def check():
        if time.monotonic() > until:
            raise Stopped

    try:
        forward(Case(), shard=Ulysses(group, check))
    except Stopped:
        return "stopped"
    return "done"
