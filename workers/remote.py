"""What is in the workers, as this process sees it: models and decoders."""

import secrets
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .client import Check, Client, EngineGone, WorkersLost
from .wire import Packer, tensor_of


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _split(groups: Sequence[tuple[int, int]]) -> str:
    """Of (workers, passes) of each group, for people."""
    return " and ".join(
        f"{passes} {'pass' if passes == 1 else 'passes'} on {workers}" for workers, passes in groups
    )


@dataclass
class Counts:
    """What was done for a model in a run.

    Attributes:
        seconds: of each call, as it was waited for.
        workers: (name, seconds in it) by call.
        groups: (workers, passes) of each group, by call.
        sent: bytes between workers, by call.
    """

    seconds: list[float] = field(default_factory=list)
    workers: list[list[tuple[str, float]]] = field(default_factory=list)
    groups: list[list[tuple[int, int]]] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)


class Remote:
    """What workers hold.

    Args:
        client: their engine.
        made_by: (factory, arguments) by which each worker makes it; the factory is importable there.
        count: workers that take part.
    """

    def __init__(self, client: Client, made_by: tuple[Callable, tuple], count: int):
        self.client = client
        self.made_by = made_by
        self.count = count
        self.key = secrets.token_hex(8)
        self.packer = Packer()
        self.loaded_in = 0  # which generation
        self.notes: list[str] = []  # sentences on what was done again
        weakref.finalize(self, client.unwanted.append, self.key)

    def ask(self, check: Check, name: str, *args: Any) -> Sequence[Any]:
        """What one of its methods gives, of each worker."""
        return self._tried(check, lambda: self.client.request(check, "ask", self.key, name, *args))

    def report(self) -> list[str]:
        """Sentences on the run so far."""
        return list(self.notes)

    def end(self) -> None:
        """Lets the workers drop what belongs to the run that has ended."""
        self.packer.forget()
        self.notes = []
        if self.client.told and self.loaded_in == self.client.generation:
            try:
                self.client.request(lambda: None, "ask", self.key, "end")
            except (EngineGone, WorkersLost):
                self.client.close()  # the next run starts another
        if self.client.has_lost:  # the next run has them replaced
            self.client.has_lost = False
            self.client.generation += 1

    def _tried(self, check: Check, do: Callable[[], Any]) -> Any:
        """With a new engine where the first is gone, or has no worker left."""
        for is_last in (False, True):
            try:
                self._load(check)
                return do()
            except (EngineGone, WorkersLost) as error:
                self.client.close()
                if is_last:
                    raise WorkersLost(f"the workers are lost ({error})") from error
                self.notes.append(f"the workers were lost and are started again ({error})")
            except BaseException:
                self.packer.forget()  # it may not have come
                raise
            finally:
                self.notes += self.client.notes
                self.client.notes = []

    def _load(self, check: Check) -> None:
        generation = self.client.start(check)
        if generation != self.loaded_in:
            self.packer.forget()
            message = Packer().pack(self.made_by).plain()
            self.client.told = self.client.request(check, "load", self.key, message)
            self.loaded_in = generation


class RemoteModel(Remote):
    """One model that workers hold.

    Args:
        client, made_by, count: as for `Remote`.
        split: of `wan.shard.SPLITS`.
    """

    def __init__(self, client: Client, made_by: tuple[Callable, tuple], split: str, count: int):
        super().__init__(client, made_by, count)
        self.split = split
        self.counts = Counts()

    def call(self, asked: object, passes: int, check: Check) -> Tensor:
        """The velocity of all passes of a call [B, 16, T, h, w], float32.

        Args:
            asked: what the model is called with, for `rank.Model.call`.
            passes: how many stand in its batch.
            check: raises when the user has cancelled.
        """
        answer = self._tried(check, lambda: self._called(asked, passes, check))
        self.counts.seconds.append(answer["seconds"])
        self.counts.workers.append(answer["workers"])
        self.counts.groups.append(answer["groups"])
        self.counts.sent.append(answer["sent"])
        return torch.cat([torch.from_numpy(v) for v in answer["velocities"]])

    def make_room(self, check: Check) -> bool:
        """Lets go of what the devices hold beside a step; False: nothing was left on any."""
        try:
            return any(self.ask(check, "make_room"))
        except WorkersLost:  # the step itself finds it out
            return False

    def report(self) -> list[str]:
        """Sentences on the calls of the run so far."""
        counts = self.counts
        if not counts.seconds:
            return super().report()
        steady = counts.seconds[1:] or counts.seconds  # the first also loads the model
        names = dict(one for call in counts.workers for one in call)
        shares = ", ".join(
            f"{name} {_mean([s for call in counts.workers for n, s in call if n == name]):.2f} s"
            for name in sorted(names)
        )
        splits = dict.fromkeys(tuple(groups) for groups in counts.groups)
        return [
            f"workers: {len(names)}, split {self.split}: {'; '.join(map(_split, splits))}",
            f"workers: {_mean(steady):.2f} s a call of the model, of which {shares}; "
            f"{_mean(counts.sent) / 1e6:.1f} MB a call between them",
            *super().report(),
        ]

    def end(self) -> None:
        """As of `Remote`."""
        self.counts = Counts()
        super().end()

    def _called(self, asked: object, passes: int, check: Check) -> dict[str, Any]:
        message = self.packer.pack(asked).plain()
        return self.client.request(check, "call", self.key, message, passes, self.split, self.count)


class RemoteVae(Remote):
    """One VAE that workers hold."""

    def __init__(self, client: Client, made_by: tuple[Callable, tuple], count: int):
        super().__init__(client, made_by, count)
        self.seconds: dict[str, float] = {}

    def start(self, check: Check) -> int:
        """Loads it where it is not. Gives how many workers decode."""
        self._tried(check, lambda: None)
        return self.count or len(self.client.told)

    def decode(
        self,
        asked: object,
        places: Sequence[tuple[int, ...]],
        take: Callable[[tuple[int, ...], Tensor, list[str]], None],
        check: Check,
    ) -> None:
        """Parts of a decode, each by a worker; who is done takes the next.

        Args:
            asked: what is decoded, for `rank.Decoder.pieces`.
            places: of the parts.
            take: called with what comes, as it comes: its place, pixels [3, f, H, W], sentences. What was
                lost with a worker comes again.
            check: raises when the user has cancelled; so may `take`.
        """

        def took(place: tuple[int, ...], part: tuple, said: list[str]) -> None:
            take(place, tensor_of(*part), said)

        def decoded() -> dict[str, float]:
            message = self.packer.pack(asked).plain()
            request = ("decode", self.key, message, places, self.count)
            return self.client.request(check, *request, take=took)

        self.seconds = self._tried(check, decoded)

    def report(self) -> list[str]:
        """As of `Remote`."""
        shares = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in sorted(self.seconds.items()))
        return [*([f"workers: decoded by {shares}"] if shares else []), *super().report()]

    def end(self) -> None:
        """As of `Remote`."""
        self.seconds = {}
        super().end()
