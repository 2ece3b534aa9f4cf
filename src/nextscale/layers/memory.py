"""What a run remembers: keys and values, and anything else that has a row, each under a named address.

Row tags (step, cell) live once, in the memory's log. An address keeps tags of its own only after it departs from the
log: when rows were selected, skipped or dropped there. An address's buffers are allocated once, as large as what the
run's steps and hooks are going to write there.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nextscale.devices import listed
from nextscale.errors import InputError


@dataclass(frozen=True)
class Tags:
    """Step (1|R, N), cell (1|R, N, 3) and validity (R, N; None: all) of remembered rows.

    Where heads hold other rows, all of them have a head axis: step (R, H, N), cell (R, H, N, 3), validity (R, H, N).
    """

    step: Tensor
    cell: Tensor
    valid: Tensor | None = None

    def __len__(self) -> int:
        return self.step.shape[-1]

    def joined(self, other: Tags) -> Tags:
        heads = max((t.step.shape[1] for t in (self, other) if t.step.ndim == 3), default=0)
        one, two = (t._of_heads(heads) if heads else t for t in (self, other))
        if heads:  # what heads hold of their own stays as narrow as it is
            narrow = next(t.step.dtype for t in (self, other) if t.step.ndim == 3)
            one, two = one.narrowed(narrow), two.narrowed(narrow)
        rows = max(len(one.step), len(two.step))
        valid = None
        if one.valid is not None or two.valid is not None:
            rows = max(rows, *(len(t.valid) for t in (one, two) if t.valid is not None))
            valid = torch.cat([_rows(t.valid, rows) if t.valid is not None
                               else torch.ones(rows, *t.step.shape[1:], dtype=torch.bool, device=t.step.device)
                               for t in (one, two)], -1)
        return Tags(torch.cat([_rows(one.step, rows), _rows(two.step, rows)], -1),
                    torch.cat([_rows(one.cell, rows), _rows(two.cell, rows)], -2), valid)

    def selected(self, index: Tensor) -> Tags:
        """The tags of other rows for every row of the batch, (R, M), or for every head, too, (R, H, M)."""
        r = len(index)
        tags = self._of_heads(index.shape[1]) if index.ndim == 3 else self
        step = _rows(tags.step, r).gather(-1, index)
        cell = _rows(tags.cell, r).gather(-2, index[..., None].expand(*index.shape, 3))
        valid = None if tags.valid is None else _rows(tags.valid, r).gather(-1, index)
        return Tags(step, cell, valid)

    def narrowed(self, dtype: torch.dtype) -> Tags:
        """The same numbers in another type."""
        return Tags(self.step.to(dtype), self.cell.to(dtype), self.valid)

    def first(self, count: int) -> Tags:
        """The tags of the ``count`` leading rows."""
        return Tags(self.step[..., :count], self.cell[..., :count, :],
                    None if self.valid is None else self.valid[..., :count])

    def same_rows(self, other: Tags) -> bool:
        """Whether these are the tags of the very same rows, known without looking at them."""
        return self.step is other.step and self.cell is other.cell

    def of(self, rows_R: Tensor) -> Tags:
        """Tags of a gathered batch; tags of its leading rows alone stay those of its leading rows."""
        def pick(tags: Tensor) -> Tensor:
            return tags if len(tags) == 1 else tags[rows_R[rows_R < len(tags)]]

        return Tags(pick(self.step), pick(self.cell), None if self.valid is None else pick(self.valid))

    def _of_heads(self, heads: int) -> Tags:
        """The same with a head axis."""
        if self.step.ndim == 3:
            return self
        valid = None if self.valid is None else self.valid[:, None].expand(-1, heads, -1)
        return Tags(self.step[:, None].expand(-1, heads, -1), self.cell[:, None].expand(-1, heads, -1, -1), valid)


def _rows(tags: Tensor, rows: int) -> Tensor:
    """Tags of that many rows of the batch, where they were those of all."""
    return tags.expand(rows, *tags.shape[1:])


@dataclass
class Group:
    """Keys and values of some heads at one address: buffers (R, H, capacity, E), of which ``length`` rows are kept.

    Where only the first branches ask for them, R is the number of the batch's leading rows that are theirs.
    ``heads`` are the heads it serves (None: all; a slice where they are neighbours); ``tags`` are its own once it
    departed from the log; ``pending`` are the tags of rows that the call under way has written behind ``length``, of
    which the first ``staying`` will stay.
    """

    k: Tensor
    v: Tensor
    length: int = 0
    heads: Tensor | slice | None = None
    tags: Tags | None = None
    pending: Tags | None = None
    staying: int = 0

    def append(self, k: Tensor, v: Tensor, tags: Tags, keep: int, room: int) -> None:
        """Write rows behind those that are there; that the first ``keep`` stay is settled by ``Memory.settle``.

        A call may come in parts, one behind the other; only its last part may hold rows that don't stay. room: rows
        that the address is going to hold.
        """
        start = self.rows
        end = start + k.shape[2]
        if end > self.k.shape[2]:
            # What a policy shrinks would, with room to spare, hold what it was shrunk to save.
            exact = self.tags is not None or self.heads is not None
            self._grow(end if exact else room if end <= room else max(end, 2 * self.k.shape[2]))
        self.k[:, :, start:end] = k
        self.v[:, :, start:end] = v
        if self.pending is None:
            self.pending, self.staying = tags, keep
            return
        if keep and self.staying != len(self.pending):
            raise InputError("memory: rows that stay come behind rows that don't; give a call's parts in their order")
        self.pending, self.staying = self.pending.joined(tags), self.staying + keep

    def _grow(self, capacity: int) -> None:
        for name in ("k", "v"):
            old = getattr(self, name)
            new = old.new_empty(old.shape[0], old.shape[1], capacity, old.shape[3])
            new[:, :, :self.rows] = old[:, :, :self.rows]
            setattr(self, name, new)

    @property
    def rows(self) -> int:
        """Rows that attention sees now: kept and pending."""
        return self.length + (0 if self.pending is None else len(self.pending))


def _copied(values: Tensor) -> Tensor:
    """In a buffer of its own: a part that lies in one piece would keep all that it is part of."""
    return values.clone(memory_format=torch.contiguous_format)


def _heads(heads: list[int], device: torch.device) -> Tensor | slice:
    """What picks some heads: a slice, which copies nothing, where they are neighbours."""
    if heads == list(range(heads[0], heads[-1] + 1)):
        return slice(heads[0], heads[-1] + 1)
    return listed(heads, device)


@dataclass
class Memory:
    """Everything in a run that has a row.

    capacity: rows that an address has room for (it grows if need be); rooms: of addresses that differ. ``state`` holds
    tensors (R, ...) that hooks, towers and state-space layers keep, ``advanced`` those that the call under way has gone
    on to and that are settled with its rows; ``constants`` what is computed once a run, tensors with a leading R or 1.
    ragged: some rows were committed for some pictures only, so that every attention needs a mask. tag_type: in which
    tags that differ from head to head are held; there are as many as keys, and wide ones would weigh what the keys do.
    """

    capacity: int
    rooms: dict[str, int] = field(default_factory=dict)
    tag_type: torch.dtype = torch.int16
    log: Tags | None = None
    groups: dict[str, list[Group]] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    advanced: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    provisional: Tags | None = None
    ragged: bool = False
    _joined: tuple[Tags, Tags, Tags] | None = field(default=None, repr=False, compare=False)

    def begin(self) -> None:
        """Before a call: forget what a call that failed, or whose provisional rows were never committed, has left."""
        self.provisional, self.advanced = None, {}
        for groups in self.groups.values():
            for group in groups:
                group.pending, group.staying = None, 0

    def append(self, address: str, k: Tensor, v: Tensor, tags: Tags, keep: int | None) -> list[Group]:
        """Write rows of a call at an address, (R, H, L, E), and return its groups.

        keep: leading rows that will stay, None where ``commit`` decides.
        """
        room = self.rooms.get(address, self.capacity)
        if address not in self.groups:
            shape = (k.shape[0], k.shape[1], max(room, k.shape[2]), k.shape[3])
            self.groups[address] = [Group(k.new_empty(shape), v.new_empty((*shape[:3], v.shape[3])))]
        for group in self.groups[address]:
            if len(group.k) != len(k):
                raise InputError(f"memory at {address}: it holds keys of {len(group.k)} rows of the batch, the call "
                                 f"brings those of {len(k)}; keep what shares attention the same over a run")
            if group.heads is None:
                group.append(k, v, tags, keep or 0, room)
            else:
                group.append(k[:, group.heads], v[:, group.heads], tags, keep or 0, room)
        return self.groups[address]

    def tags_of(self, group: Group) -> Tags | None:
        """Tags of all rows that attention sees at a group: kept, then pending. None for an empty one."""
        kept = group.tags if group.tags is not None else self.log
        if kept is None or group.length == 0:
            return group.pending
        if group.pending is None:
            return kept
        if group.tags is not None:
            return kept.joined(group.pending)
        # Computed once a call: every address that follows the log asks for the same.
        if self._joined is None or self._joined[0] is not kept or not self._joined[1].same_rows(group.pending):
            self._joined = (kept, group.pending, kept.joined(group.pending))
        return self._joined[2]

    def settle(self, keep: int | None, tags: Tags) -> None:
        """End of a call: its ``keep`` leading rows stay in memory; None leaves them provisional until ``commit``."""
        self.state.update(self.advanced)
        self.advanced = {}
        if keep is None:
            self.provisional = tags
            return
        self._settle(tags, tags.first(keep))

    def commit(self, count_R: Tensor) -> None:
        """Keep the first ``count`` provisional rows of every row of the batch (R,), drop the rest.

        Rows that are longer in one picture than in another are kept for all and marked invalid where dropped.
        """
        if self.provisional is None:
            raise InputError("commit: no provisional rows are waiting; evaluate a call with keep=None first")
        keep, tags = int(count_R.max()), self.provisional
        valid = torch.arange(keep, device=count_R.device)[None] < count_R[:, None]
        for address, groups in self.groups.items():
            if any(group.pending is not None and not group.pending.same_rows(tags) for group in groups):
                raise InputError(f"commit: the provisional rows at {address} are not those of the call; what selects "
                                 "or skips rows must let provisional calls pass whole")
        self.ragged = self.ragged or not bool(valid.all())
        self._settle(tags, Tags(tags.step[:, :keep], tags.cell[:, :keep], valid if self.ragged else None))
        self.provisional = None

    def _settle(self, call: Tags, kept: Tags) -> None:
        """Log the rows of a call that stay. An address follows the log while it holds the same rows, else it departs:
        it got other rows, none (a block was skipped), or its first ones only now."""
        logged = 0 if self.log is None else len(self.log)
        for groups in self.groups.values():
            for group in groups:
                whole = group.pending is not None and group.pending.same_rows(call)
                if group.pending is None:
                    mine = kept.first(0)
                else:
                    mine = kept if whole else group.pending.first(group.staying)
                if group.tags is not None or not whole or group.length != logged:
                    old = group.tags if group.tags is not None else self.log if group.length else None
                    if len(mine) or len(kept):
                        group.tags = mine if old is None else old.joined(mine) if len(mine) else old
                group.length += len(mine)
                group.pending, group.staying = None, 0
        if len(kept):
            self.log = kept if self.log is None else self.log.joined(kept)

    def keep_rows(self, address: str, index: Tensor, group: int = 0,
                  merged: tuple[Tensor, Tensor] | None = None) -> None:
        """Shrink an address to some of its rows; in memory, too.

        index: positions among kept and pending rows, (R, M), or (R, H, M) where heads of the group keep other rows;
        merged: keys and values (R, H, M, E) that the kept rows have from now on, where what is dropped was merged into
        them. A policy calls this while its rows are pending: they then count as settled, so all of them must be rows
        that stay.
        """
        at = self.groups[address][group]
        if at.pending is not None and at.staying != len(at.pending):
            raise InputError(f"memory at {address}: the call under way has rows that don't stay; shrink calls that "
                             "keep all their rows, or between steps")
        tags = self.tags_of(at)
        assert tags is not None
        if merged is not None:
            at.k, at.v = merged
        else:
            index_RHM1 = (index[:, None] if index.ndim == 2 else index)[..., None]
            for name in ("k", "v"):
                full = getattr(at, name)[:, :, :at.rows]
                setattr(at, name, full.gather(2, index_RHM1.expand(-1, full.shape[1], -1, full.shape[3])))
        chosen = tags.selected(index)
        at.tags = chosen.narrowed(self.tag_type) if index.ndim == 3 else chosen
        at.length, at.pending, at.staying = index.shape[-1], None, 0

    def split_heads(self, address: str, classes: list[list[int]]) -> None:
        """Give classes of heads their own K/V at an address, so that each can be shrunk by itself."""
        (whole,) = self.groups[address]
        if whole.tags is not None and whole.tags.step.ndim == 3:
            raise InputError(f"memory at {address}: its heads hold rows of their own already; split them before that")
        self.groups[address] = [
            replace(whole, heads=(h := _heads(heads, whole.k.device)), k=_copied(whole.k[:, h]),
                    v=_copied(whole.v[:, h])) for heads in classes]

    def recall(self, address: str) -> tuple[Tensor, ...] | None:
        """The state that a recurrence at an address goes on from, None at its beginning."""
        held = self.advanced if f"{address}.0" in self.advanced else self.state
        state: list[Tensor] = []
        while (name := f"{address}.{len(state)}") in held:
            state.append(held[name])
        return tuple(state) or None

    def advance(self, address: str, state: tuple[Tensor, ...]) -> None:
        """Where the rows of the call under way that stay have taken a recurrence; ``settle`` makes it the state."""
        self.advanced |= {f"{address}.{i}": value for i, value in enumerate(state)}

    def constant(self, address: str, make: Callable[[], Any]) -> Any:
        """A value computed once a run: a tensor with a leading R or 1, or a tuple, named or not, of such tensors."""
        if address not in self.constants:
            self.constants[address] = make()
        return self.constants[address]

    def gather(self, rows_R: Tensor) -> Memory:
        """An independent copy for other rows of the batch, in that order."""
        def pick(value: Any) -> Any:
            if isinstance(value, tuple):
                found = [pick(v) for v in value]
                return type(value)(*found) if hasattr(value, "_fields") else tuple(found)
            return value[rows_R] if len(value) > highest else value  # a leading 1 is shared by all rows

        highest = int(rows_R.max()) if len(rows_R) else 0
        provisional = None if self.provisional is None else self.provisional.of(rows_R)

        def pick_group(group: Group) -> Group:
            if group.pending is not None and self.provisional is None:
                raise InputError("gather: a call is under way; gather between steps")
            pending = group.pending
            if pending is not None and self.provisional is not None:
                pending = provisional if pending.same_rows(self.provisional) else pending.of(rows_R)
            # Keys of the first branches alone: those are the rows that lead the batch, which is branch-major.
            held = rows_R if len(group.k) > highest else rows_R[rows_R < len(group.k)]
            return replace(group, k=group.k[held], v=group.v[held],
                           tags=None if group.tags is None else group.tags.of(rows_R), pending=pending)

        return Memory(self.capacity, self.rooms, self.tag_type, None if self.log is None else self.log.of(rows_R),
                      {name: [pick_group(g) for g in groups] for name, groups in self.groups.items()},
                      {name: value[rows_R] for name, value in self.state.items()}, {},
                      {name: pick(value) for name, value in self.constants.items()},
                      provisional, self.ragged)

    def bytes(self) -> int:
        """Bytes of the keys and values that are kept now, and of the states.

        Not of the buffers' spare room, of which there is none at the end of a run all of whose rows stay, nor of tags:
        where heads hold rows of their own these are 4 bytes a row and head (1.6 % of keys and values of 64 numbers in
        bfloat16), 8 where steps or grids go beyond 127.
        """
        total = sum(value.nbytes for value in self.state.values())
        for groups in self.groups.values():
            for g in groups:
                row = g.k.shape[0] * g.k.shape[1] * (g.k.shape[3] + g.v.shape[3]) * g.k.element_size()
                total += row * g.length
        return total
