"""What a run remembers: keys and values, and anything else that has a row, each under a named address.

Row tags (step, cell) live once, in the memory's log. An address keeps tags of its own only after it departs from the
log: when rows were selected or dropped there. Buffers are allocated once for the whole run.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nextscale.errors import InputError


@dataclass(frozen=True)
class Tags:
    """Step (1|R, N), cell (1|R, N, 3) and validity (R, N; None: all) of remembered rows."""

    step: Tensor
    cell: Tensor
    valid: Tensor | None = None

    def __len__(self) -> int:
        return self.step.shape[1]

    def joined(self, other: Tags) -> Tags:
        rows = max(len(self.step), len(other.step))
        valid = None
        if self.valid is not None or other.valid is not None:
            rows = max(rows, *(len(t.valid) for t in (self, other) if t.valid is not None))
            valid = torch.cat([t.valid.expand(rows, -1) if t.valid is not None
                               else torch.ones(rows, len(t), dtype=torch.bool, device=t.step.device)
                               for t in (self, other)], 1)
        return Tags(torch.cat([self.step.expand(rows, -1), other.step.expand(rows, -1)], 1),
                    torch.cat([self.cell.expand(rows, -1, -1), other.cell.expand(rows, -1, -1)], 1), valid)

    def selected(self, index_RM: Tensor) -> Tags:
        """The tags of other rows for every row of the batch, (R, M)."""
        r = len(index_RM)
        step = self.step.expand(r, -1).gather(1, index_RM)
        cell = self.cell.expand(r, -1, -1).gather(1, index_RM[..., None].expand(-1, -1, 3))
        valid = None if self.valid is None else self.valid.expand(r, -1).gather(1, index_RM)
        return Tags(step, cell, valid)

    def of(self, rows_R: Tensor) -> Tags:
        """Tags of a gathered batch."""
        return Tags(*(t if t is None or len(t) == 1 else t[rows_R] for t in (self.step, self.cell, self.valid)))


@dataclass
class Group:
    """Keys and values of some heads at one address: buffers (R, H, capacity, E), of which ``length`` rows are kept.

    ``heads`` are the heads it serves (None: all); ``tags`` are its own once it departed from the log; ``pending`` are
    the tags of rows that the call under way has written behind ``length``.
    """

    k: Tensor
    v: Tensor
    length: int = 0
    heads: Tensor | None = None
    tags: Tags | None = None
    pending: Tags | None = None

    def append(self, k: Tensor, v: Tensor, tags: Tags) -> None:
        """Write rows behind those that are kept; whether they stay is settled by ``Memory.settle``."""
        end = self.length + k.shape[2]
        if end > self.k.shape[2]:
            self._grow(max(end, 2 * self.k.shape[2]))
        self.k[:, :, self.length:end] = k
        self.v[:, :, self.length:end] = v
        self.pending = tags

    def _grow(self, capacity: int) -> None:
        for name in ("k", "v"):
            old = getattr(self, name)
            new = old.new_empty(old.shape[0], old.shape[1], capacity, old.shape[3])
            new[:, :, :self.length] = old[:, :, :self.length]
            setattr(self, name, new)

    @property
    def rows(self) -> int:
        """Rows that attention sees now: kept and pending."""
        return self.length + (0 if self.pending is None else len(self.pending))


@dataclass
class Memory:
    """Everything in a run that has a row.

    capacity: rows each address is given at first (it grows if need be). ``state`` holds tensors (R, ...) that hooks,
    towers and state-space layers keep; ``constants`` what is computed once a run, tensors with a leading R or 1.
    """

    capacity: int
    log: Tags | None = None
    groups: dict[str, list[Group]] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    provisional: Tags | None = None

    def append(self, address: str, k: Tensor, v: Tensor, tags: Tags) -> list[Group]:
        """Write the rows of a call at an address, (R, H, L, E), and return its groups."""
        if address not in self.groups:
            shape = (k.shape[0], k.shape[1], max(self.capacity, k.shape[2]), k.shape[3])
            self.groups[address] = [Group(k.new_empty(shape), v.new_empty((*shape[:3], v.shape[3])))]
        for group in self.groups[address]:
            if group.heads is None:
                group.append(k, v, tags)
            else:
                group.append(k[:, group.heads], v[:, group.heads], tags)
        return self.groups[address]

    def tags_of(self, group: Group) -> Tags | None:
        """Tags of all rows that attention sees at a group: kept, then pending. None for an empty one."""
        kept = group.tags if group.tags is not None else self.log
        if kept is None or group.length == 0:
            return group.pending
        return kept if group.pending is None else kept.joined(group.pending)

    def settle(self, keep: int | None, tags: Tags) -> None:
        """End of a call: its ``keep`` leading rows stay in memory; None leaves them provisional until ``commit``."""
        if keep is None:
            self.provisional = tags
            return
        kept = Tags(tags.step[:, :keep], tags.cell[:, :keep])
        if keep:
            self.log = kept if self.log is None else self.log.joined(kept)
        self._settle_groups(keep, kept)

    def commit(self, count_R: Tensor) -> None:
        """Keep the first ``count`` provisional rows of every row of the batch (R,), drop the rest.

        Rows that are longer in one picture than in another are kept for all and marked invalid where dropped.
        """
        if self.provisional is None:
            raise InputError("commit: no provisional rows are waiting; evaluate a call with keep=None first")
        keep, tags = int(count_R.max()), self.provisional
        valid = torch.arange(keep, device=count_R.device)[None] < count_R[:, None]
        kept = Tags(tags.step[:, :keep], tags.cell[:, :keep], None if bool(valid.all()) else valid)
        if keep:
            self.log = kept if self.log is None else self.log.joined(kept)
        self.provisional = None
        self._settle_groups(keep, kept)

    def _settle_groups(self, keep: int, kept: Tags) -> None:
        for groups in self.groups.values():
            for group in groups:
                if group.pending is None:
                    continue
                if group.tags is not None and keep:
                    group.tags = group.tags.joined(kept)
                group.length += keep
                group.pending = None

    def keep_rows(self, address: str, index_RM: Tensor, group: int = 0) -> None:
        """Shrink an address to some of its rows, (R, M) positions among kept and pending ones; in memory, too.

        A policy that shrinks after attention calls this while its rows are pending: they then count as settled.
        """
        at = self.groups[address][group]
        tags = self.tags_of(at)
        assert tags is not None
        index_RHM = index_RM[:, None, :, None]
        for name in ("k", "v"):
            full = getattr(at, name)[:, :, :at.rows]
            chosen = full.gather(2, index_RHM.expand(-1, full.shape[1], -1, full.shape[3]))
            setattr(at, name, chosen)
        at.tags, at.length, at.pending = tags.selected(index_RM), index_RM.shape[1], None

    def split_heads(self, address: str, classes: list[list[int]]) -> None:
        """Give classes of heads their own K/V at an address, so that each can be shrunk by itself."""
        (whole,) = self.groups[address]
        device = whole.k.device
        self.groups[address] = [
            replace(whole, heads=(h := torch.tensor(heads, device=device)), k=whole.k[:, h], v=whole.v[:, h])
            for heads in classes]

    def constant(self, address: str, make: Callable[[], Any]) -> Any:
        """A value computed once a run: a tensor with a leading R or 1, or a tuple of such tensors."""
        if address not in self.constants:
            self.constants[address] = make()
        return self.constants[address]

    def gather(self, rows_R: Tensor) -> Memory:
        """An independent copy for other rows of the batch, in that order."""
        def pick(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(pick(v) for v in value)
            return value[rows_R] if len(value) > int(rows_R.max()) else value  # a leading 1 is shared by all rows

        def pick_group(group: Group) -> Group:
            if group.pending is not None and self.provisional is None:
                raise InputError("gather: a call is under way; gather between steps")
            return replace(group, k=group.k[rows_R], v=group.v[rows_R],
                           tags=None if group.tags is None else group.tags.of(rows_R),
                           pending=None if group.pending is None else group.pending.of(rows_R))

        return Memory(self.capacity, None if self.log is None else self.log.of(rows_R),
                      {name: [pick_group(g) for g in groups] for name, groups in self.groups.items()},
                      {name: value[rows_R] for name, value in self.state.items()},
                      {name: pick(value) for name, value in self.constants.items()},
                      None if self.provisional is None else self.provisional.of(rows_R))

    def bytes(self) -> int:
        """Bytes of the rows that are kept now (not of the buffers' spare room), and of the states."""
        total = sum(value.nbytes for value in self.state.values())
        for groups in self.groups.values():
            for g in groups:
                row = g.k.shape[0] * g.k.shape[1] * (g.k.shape[3] + g.v.shape[3]) * g.k.element_size()
                total += row * g.length
        return total
