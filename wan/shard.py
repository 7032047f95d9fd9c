"""One call of the DiT over several processes, each on a device of its own.

Passes first, then tokens: `groups` gives each group of ranks passes of its own, which need no exchange.
Within a group each rank has some rows of the tokens and does on them all that is done token by token. For
self-attention the ranks trade tokens for heads, each attends with some heads among all tokens, and they
trade back (DeepSpeed-Ulysses, Jacobs et al., arXiv 2309.14509). Shares may be uneven: nothing is padded, so
nothing is masked, and all know all shares from the shapes alone.

L tokens in all, l of this rank; N heads, n of this rank; D width of a head; B batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attention import AttentionFn

if TYPE_CHECKING:  # some builds of PyTorch come without it
    from torch.distributed import ProcessGroup, Work

ALL = slice(None)
SPLITS = ("auto", "guidance", "sequence")
POLL_SECONDS = 1e-4


class Shard:
    """Which tokens of a call are here, and how they meet the others. This one has them all."""

    def rows(self, tokens: int) -> slice:
        """Of so many tokens, those that are here."""
        return ALL

    def frames(self, frames: int, height: int, width: int) -> tuple[slice, slice]:
        """Of a grid of tokens, the frames that hold those that are here; and their rows in these frames."""
        return ALL, ALL

    def among(self, attention: AttentionFn, tokens: int) -> AttentionFn:
        """Self-attention of the tokens that are here among all, by an attention of whole sequences."""
        return attention

    def whole(self, x: Tensor, tokens: int) -> Tensor:
        """[B, l, C] of each rank -> [B, L, C], on every rank."""
        return x


WHOLE = Shard()


@dataclass(frozen=True)
class Group:
    """Ranks that share the tokens of the same passes; both are counted from 0 over all groups."""

    ranks: range
    passes: range


def groups(ranks: int, passes: int, split: str = "auto") -> list[Group]:
    """Who computes which passes of a step.

    Args:
        ranks, passes: how many, at least 1.
        split: one of `SPLITS`. guidance: as many groups as there can be. sequence: one. auto: the most that
            are alike, so that none waits for another.
    """
    count = {"auto": math.gcd(ranks, passes), "guidance": min(ranks, passes), "sequence": 1}[split]
    return [Group(*one) for one in zip(spans(ranks, count), spans(passes, count))]


def groups_on(machines: Sequence[int], passes: int, split: str = "auto") -> list[Group]:
    """`groups` where the ranks stand on several machines, which none crosses: tokens meet in every block.

    Args:
        machines: how many ranks each has, the most first; ranks are counted in this order.
        passes, split: as for `groups`. guidance: passes on as many machines as there can be. sequence: on the
            first. auto: on so many that the busiest rank has the least.
    """

    def busiest(count: int) -> float:
        return max(here / ranks for here, ranks in zip(shares(passes, count), machines))

    most = min(len(machines), passes)
    used = {"auto": min(range(1, most + 1), key=busiest), "guidance": most, "sequence": 1}[split]
    found, first = [], 0
    for ranks, here in zip(machines, spans(passes, used)):
        for group in groups(ranks, len(here), split):
            rank, begin = group.ranks.start + first, group.passes.start + here.start
            found.append(Group(range(rank, rank + len(group.ranks)), range(begin, begin + len(group.passes))))
        first += ranks
    return found


def shares(total: int, ranks: int) -> list[int]:
    """`total` things over so many ranks, the first of them one more: 10 over 3 is [4, 3, 3]."""
    return [total // ranks + (rank < total % ranks) for rank in range(ranks)]


def spans(total: int, ranks: int) -> list[range]:
    """Which things are whose, by `shares`."""
    ends = list(accumulate(shares(total, ranks)))
    return [range(start, end) for start, end in zip([0, *ends], ends)]


class Ulysses(Shard):
    """Tokens over the ranks of a group. All of them make the same call, with the same inputs.

    In each block a rank sends 3*l*(N - n)*D + n*(L - l)*D numbers of the compute dtype for each sample, and
    for the result of the call l*64 float32 numbers to every other rank.

    Args:
        group: not necessarily the default one, which nothing here needs; of gloo for tensors on the CPU.
        check: called while others are waited for and after each exchange; may raise, to leave a call that
            cannot end. That group is not to be used again.

    Attributes:
        bytes_sent: to other ranks, so far.
    """

    def __init__(self, group: ProcessGroup, check: Callable[[], object] | None = None):
        self.group = group
        self.rank, self.size = group.rank(), group.size()
        self.check = check
        self.bytes_sent = 0

    def rows(self, tokens: int) -> slice:
        mine = spans(tokens, self.size)[self.rank]
        return slice(mine.start, mine.stop)

    def frames(self, frames: int, height: int, width: int) -> tuple[slice, slice]:
        area, rows = height * width, self.rows(frames * height * width)
        first = min(rows.start // area, frames - 1)  # one at least, though a rank may have no token
        last = max(first + 1, -(-rows.stop // area))
        return slice(first, last), slice(rows.start - first * area, rows.stop - first * area)

    def among(self, attention: AttentionFn, tokens: int) -> AttentionFn:
        rows = shares(tokens, self.size)

        def spread(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            heads = shares(q.shape[2], self.size)
            q, k, v = (self._to_heads(t, rows, heads) for t in (q, k, v))  # 3 x (B, L, n, D)
            y = attention(q, k, v) if heads[self.rank] else q  # with more ranks than heads some have none
            del q, k, v
            return self._to_rows(y, rows, heads)  # (B, l, N, D)

        return spread

    def whole(self, x: Tensor, tokens: int) -> Tensor:
        b, _, c = x.shape
        shapes = [(b, r, c) for r in shares(tokens, self.size)]
        return _joined(self._trade(_packed([x] * self.size), [x.numel()] * self.size, shapes), shapes, 1)

    def _to_heads(self, x: Tensor, rows: list[int], heads: list[int]) -> Tensor:
        """[B, l, N, D] -> [B, L, n, D]; of one sample, what arrives is that already."""
        b, here, _, d = x.shape
        n = heads[self.rank]
        shapes = [(b, r, n, d) for r in rows]
        got = self._trade(_packed(x.split(heads, dim=2)), [b * here * h * d for h in heads], shapes)
        return got.view(1, sum(rows), n, d) if b == 1 else _joined(got, shapes, 1)

    def _to_rows(self, y: Tensor, rows: list[int], heads: list[int]) -> Tensor:
        """[B, L, n, D] -> [B, l, N, D]; of one sample, what is sent is y as it lies."""
        b, _, n, d = y.shape
        shapes = [(b, rows[self.rank], h, d) for h in heads]
        send = y.flatten() if b == 1 else _packed(y.split(rows, dim=1))
        return _joined(self._trade(send, [b * r * n * d for r in rows], shapes), shapes, 2)

    def _trade(self, send: Tensor, sizes: list[int], shapes: Sequence[tuple[int, ...]]) -> Tensor:
        """Sends a part to each rank, and gives what came from each, one behind the other.

        Args:
            send: flat.
            sizes: of its parts, in numbers.
            shapes: of what each rank sends here.
        """
        assert not send.requires_grad, "no gradient comes back from other ranks"
        coming = [math.prod(shape) for shape in shapes]
        got = send.new_empty(sum(coming))
        self.bytes_sent += (send.numel() - sizes[self.rank]) * send.itemsize
        self._wait(self.group.alltoall_base(got, send, coming, sizes), send)
        return got

    def _wait(self, work: Work, send: Tensor) -> None:
        if self.check is not None and send.device.type == "cpu":
            while not work.is_completed():  # gloo cannot be told to give up a wait, so it is not begun
                self.check()
                time.sleep(POLL_SECONDS)
        work.wait()  # on a GPU its stream waits, not this thread
        if self.check is not None:
            self.check()  # a call of NCCL that was aborted ends as if it were done


def _packed(parts: Sequence[Tensor]) -> Tensor:
    """Tensors one behind the other, flat; each is copied once."""
    sizes = [part.numel() for part in parts]
    packed = parts[0].new_empty(sum(sizes))
    for place, part in zip(packed.split(sizes), parts):
        place.view(part.shape).copy_(part)
    return packed


def _joined(packed: Tensor, shapes: Sequence[tuple[int, ...]], dim: int) -> Tensor:
    """Tensors of these shapes, one behind the other, as one along `dim`."""
    parts = packed.split([math.prod(shape) for shape in shapes])
    return torch.cat([part.view(shape) for part, shape in zip(parts, shapes)], dim)
