"""The context of a network evaluation, and the hooks that a user adds to a run without touching the model.

A generator passes every block, residual branch and attention through the context. With no hook these are plain calls;
hooks wrap them, the first in the list innermost.
"""
from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nextscale import registry
from nextscale.configuration import build
from nextscale.errors import InputError, did_you_mean
from nextscale.layers.adaln import gated_sum
from nextscale.layers.attention import Marks, Rule, attention, by_head, dense_mask, pairs, visibility_mask
from nextscale.layers.memory import Group, Memory, Tags
from nextscale.plan import Plan, Visibility
from nextscale.run import At, Call, Rows, Run, Sample

Function = Callable[[Tensor, Rows], Tensor]
Scan = Callable[[Tensor, Any], tuple[Tensor, tuple[Tensor, ...]]]
Attend = Callable[[Tensor, "Tensor | None", "Tensor | None", Rows], Tensor]


class Hook:
    """What may be added to a run. Override what you need; a hook keeps nothing itself, but in ``ctx.memory.state``.

    same_pictures: it acts on how pictures are drawn alone, so that samples need not tell of it.
    """

    same_pictures: ClassVar[bool] = False

    def prepare(self, model: Any, plan: Plan, hooks: Sequence[Hook]) -> None:
        """Before the first step, and before scoring: raises InputError, with the reason, where it can't act on this
        model (what has ``generator`` and ``head``) or plan, or beside the other ``hooks`` of the run."""

    def steps(self, plan: Plan) -> int:
        """How many of the plan's steps are walked; the canvas is decoded as it is after the last of them."""
        return len(plan)

    def room(self, network: Any, plan: Plan, address: str, rows: tuple[int, ...]) -> tuple[int, ...]:
        """How many rows of every step an address of a network is to hold one behind the other, where it would ``rows``
        without this hook: fewer where it selects some, none behind a step after which it puts others in the place of
        what is there (``Memory.keep_rows``). Memory makes room for so many."""
        return rows

    def evaluation(self, generator: Any, run: Run, evaluate: Callable[[Call], Tensor]) -> Callable[[Call], Tensor]:
        """What a step's calls are evaluated with: ``evaluate`` runs the network and settles the rows that stay."""
        return evaluate

    def advance(self, choice: Any, run: Run, hooks: Sequence[Hook], step: Callable[[], None]) -> Callable[[], None]:
        """What a step of a run is done with: ``step`` makes its call, lets ``choice`` (``sampling.steps.Choice``)
        choose under all of the run's hooks, and writes."""
        return step

    def inputs(self, run: Run, call: Call) -> Call:
        """The rows of a step before the network sees them."""
        return call

    def enter(self, ctx: Context, call: Call) -> Call:
        """The rows of any call (of a step, in scoring, in training) as the network takes them in: what walks along
        with the network, such as a control tower, computes its own part here and leaves it in ``ctx.scratch``."""
        return call

    def leave(self, ctx: Context, rows: Rows, hidden: Tensor) -> Tensor:
        """What the network gives for the rows of any call of a step or of scoring, (R, L, C), before the head."""
        return hidden

    def part(self, pictures: slice) -> Hook:
        """The same for some of the pictures that it was made for; itself where it holds nothing a picture."""
        return self

    def output(self, outputs: dict[str, Tensor], at: At, run: Run | None) -> dict[str, Tensor]:
        """The head's native output of every branch, (B, L, V), before guidance; run: None in scoring."""
        return outputs

    def logits(self, logits: Tensor, at: At) -> Tensor:
        """The guided output, (B, L, V), before the filters."""
        return logits

    def tokens(self, run: Run, sample: Sample) -> Sample:
        """What was chosen, before it is written; heads that draw in rounds ask between them, too."""
        return sample

    def end(self, run: Run, step: int) -> None:
        """After a step was written."""

    def block(self, ctx: Context, address: str, x: Tensor, rows: Rows, inner: Function) -> Tensor:
        """Around a whole block."""
        return inner(x, rows)

    def residual(self, ctx: Context, address: str, kind: str, x: Tensor, rows: Rows, inner: Function) -> Tensor:
        """Around a residual branch (``kind``: ``"attention"``, ``"scan"``, ``"mlp"``); returns x plus what it adds."""
        return inner(x, rows)

    def leading(self, ctx: Context, address: str, count: int, rows: Rows) -> int:
        """Of how many of the batch's ``count`` rows an attention is computed, those that lead it (the first branches);
        the others get a copy of what it gives them."""
        return count

    def attend(self, ctx: Context, address: str, q: Tensor, k: Tensor | None, v: Tensor | None, rows: Rows,
               inner: Attend) -> Tensor:
        """Around an attention: before ``inner`` the rows of this call are not in memory yet, after it they are."""
        return inner(q, k, v, rows)

    def read(self, ctx: Context, address: str, k: Tensor, v: Tensor, keys: Tags,
             rows: Rows) -> tuple[Tensor, Tensor]:
        """Keys and values (R, H, N, E) as attention is about to read them, what memory holds and what this call adds,
        and their tags. They are memory's own: give others back, write nothing into them."""
        return k, v


def make_hook(name: str, settings: Mapping[str, Any]) -> Hook:
    """A hook by the name that the registry knows it by; its class is a dataclass of settings.

    Raises InputError on an unknown name, an unknown setting, or one of another type.
    """
    known = registry.hooks()
    if name not in known:
        raise InputError(f"unknown hook {name!r}{did_you_mean(name, known, '; known are ' + ', '.join(sorted(known)))}")
    kind: Any = registry.import_target(known[name])
    made: Hook = build(kind, settings, f"hook {name!r}")
    return made


def overrides(hook: Hook, name: str) -> bool:
    return getattr(type(hook), name) is not getattr(Hook, name)


class Context:
    """What a network evaluation may ask for besides its weights: memory, hooks, what is constant over the run.

    memory None is a pass without memory (training, scoring). ``scratch`` lives for one call. With ``check`` the
    promise of unmasked rows is tested against their tags. branches: what the batch's rows are, branch-major. plan and
    network: what is walked and what is evaluated, for hooks that go by a step's grid or by the layers there are; None
    where the pass belongs to no run.
    """

    def __init__(self, memory: Memory | None = None, hooks: Sequence[Hook] = (), check: bool = False,
                 branches: Sequence[str] = ("conditional",), plan: Plan | None = None, network: Any = None):
        self.memory = memory
        self.check = check
        self.branches = tuple(branches)
        self.plan, self.network = plan, network
        self._enters = [h for h in hooks if overrides(h, "enter")]
        self._leaves = [h for h in hooks if overrides(h, "leave")]
        self.scratch: dict[Any, Any] = {}
        self._block = [h for h in hooks if overrides(h, "block")]
        self._residual = [h for h in hooks if overrides(h, "residual")]
        self._leads = [h for h in hooks if overrides(h, "leading")]
        self._attends = [h for h in hooks if overrides(h, "attend")]
        self._reads = [h for h in reversed(hooks) if overrides(h, "read")]  # the first is nearest to the attention
        self._offers: dict[str, tuple[Callable[[], Tensor], Rows]] = {}

    def enter(self, call: Call) -> Call:
        """A call as the hooks let it into the network."""
        for hook in self._enters:
            call = hook.enter(self, call)
        return call

    def leave(self, rows: Rows, hidden: Tensor) -> Tensor:
        """What the network gives for a call's rows as the hooks let it out."""
        for hook in self._leaves:
            hidden = hook.leave(self, rows, hidden)
        return hidden

    def block(self, address: str, x: Tensor, f: Function, rows: Rows) -> Tensor:
        """f(x, rows) of a whole block, inside the hooks."""
        for hook in self._block:
            f = _wrap(hook.block, self, address, f)
        return f(x, rows)

    def through(self, address: str, block: Callable[..., Tensor], x: Tensor, rows: Rows, shared: Any = None,
                recompute: bool = False) -> Tensor:
        """``block(x, rows, ctx, address, shared)``, inside the hooks. recompute: in a pass with gradients keep the
        block's input alone and compute the rest again in the backward pass (arXiv 1604.06174)."""
        def f(x: Tensor, rows: Rows) -> Tensor:
            return block(x, rows, self, address, shared)

        def again(x: Tensor, rows: Rows) -> Tensor:
            found: Tensor = checkpoint(f, x, rows, use_reentrant=False)
            return found

        return self.block(address, x, again if recompute and x.requires_grad else f, rows)

    def residual(self, address: str, kind: str, x: Tensor, f: Function, rows: Rows,
                 gate: Tensor | None = None) -> Tensor:
        """x + gate f(x, rows) of a residual branch, inside the hooks; gate: (R, 1, C), None for 1."""
        if not self._residual:
            return gated_sum(x, f(x, rows), gate)
        inner: Function = lambda x, rows: gated_sum(x, f(x, rows), gate)  # noqa: E731
        for hook in self._residual:
            inner = _wrap_residual(hook, self, address, kind, inner)
        return inner(x, rows)

    def leading(self, address: str, x: Tensor, rows: Rows) -> Tensor:
        """Of rows x (R, L, C), those of the batch that an attention is computed of: all, or the leading ones."""
        count = len(x)
        for hook in self._leads:
            count = min(count, hook.leading(self, address, len(x), rows))
        return x if count == len(x) else x[:count]

    def attend(self, address: str, q: Tensor, k: Tensor | None, v: Tensor | None, rows: Rows,
               krows: Rows | None = None, scale: float | None = None, dropout: float = 0.0) -> Tensor:
        """Attention of q (R, H, L, E) over what the address holds and the k, v (R, H, N, E) of this call.

        k None reads what the address holds and adds nothing. ``krows`` are the rows of k where they aren't those of q.
        q may be that of the leading rows of the batch alone (of the first branches), and so may k and v.
        dropout: of the attention's probabilities, in passes without memory alone.
        """
        inner: Attend = lambda q, k, v, rows: self._attend(  # noqa: E731
            address, q, k, v, rows, krows or rows, scale, dropout)
        if self._attends:
            self.scratch["scale", address] = q.shape[-1]**-0.5 if scale is None else scale
        for hook in self._attends:
            inner = _wrap_attend(hook, self, address, inner)
        out = inner(q, k, v, rows)
        self._offers = {}
        return out

    def scale(self, address: str) -> float:
        """What the scores q k^T of the attention under way at an address are multiplied by, for hooks around it."""
        found: float = self.scratch["scale", address]
        return found

    def offer(self, name: str, make: Callable[[], Tensor], rows: Rows) -> None:
        """Something of the next attention's rows, (R, H, L, E), that a hook around it may ask for (``offered``); made
        only then."""
        if self._attends:
            self._offers[name] = (make, rows)

    def offered(self, address: str, name: str, rows: Rows) -> Tensor:
        """What a network offers of the rows of one step. Raises InputError where it doesn't, or hides these rows."""
        if name not in self._offers:
            raise InputError(f"attention at {address}: this network doesn't offer its {name}")
        make, of = self._offers[name]
        step = rows.spans[0].step if rows.spans else None
        found = [make()[:, :, span.lo:span.hi] for span in of.spans or () if span.step == step]
        if len(found) != 1 or found[0].shape[2] != len(rows):
            raise InputError(f"attention at {address}: the {name} of rows that were selected inside of it isn't known")
        return found[0]

    def recur(self, address: str, x: Tensor, rows: Rows, scan: Scan) -> Tensor:
        """A recurrence over rows x (R, L, C): ``scan(x, state) -> y, state`` from the state that the address holds.

        The state, tensors (R, ...), goes on to where the rows that stay end; those behind them read it alone. Without
        memory it begins at None and is dropped. Raises InputError for provisional rows, whose number comes later.
        """
        if self.memory is None:
            return scan(x, None)[0]
        if rows.keep is None:
            raise InputError(f"recurrence at {address}: a state can't be taken back, so rows must not be provisional; "
                             "evaluate again with those that stay")
        state, outputs = self.memory.recall(address), []
        if rows.keep:
            y, state = scan(x[:, :rows.keep], state)
            outputs.append(y)
            self.memory.advance(address, state)
        if rows.keep < len(rows):
            outputs.append(scan(x[:, rows.keep:], state)[0])
        return torch.cat(outputs, 1)

    def once(self, address: str, make: Callable[[], Any]) -> Any:
        """A value that doesn't change over the run: computed at the first call, kept with the run."""
        return make() if self.memory is None else self.memory.constant(address, make)

    def expect(self, rows: Rows) -> None:
        """Make the mask of a call without memory before the network asks for it."""
        self._mask(rows, rows.tags, "")

    def remembered(self, who: str) -> Memory:
        """The run's memory, for hooks that can't do without; raises InputError in a pass that has none."""
        if self.memory is None:
            raise InputError(f"{who}: it needs a run's memory, but this pass (training, scoring) has none; "
                             "leave it out")
        return self.memory

    def _attend(self, address: str, q: Tensor, k: Tensor | None, v: Tensor | None, rows: Rows, krows: Rows,
                scale: float | None, dropout: float) -> Tensor:
        if self.memory is None and (k is None or v is None):
            raise InputError(f"attention at {address}: a pass without memory has no keys to read back")
        # Rows of which none stays, where nothing is held and no hook looks, need no room in memory.
        fleeting = self.memory is None or (krows.keep == 0 and address not in self.memory.groups and not self._attends)
        if k is not None and v is not None and fleeting:
            for hook in self._reads:
                k, v = hook.read(self, address, k, v, krows.tags, rows)
            dropout = dropout if self.memory is None else 0.0
            if rows.visible.previous == 0 and rows.masked and rows.spans is not None and krows is rows \
                    and not rows.narrowed:
                # Rows see their own step alone: step by step there is nothing to hide, and far less to compute.
                return torch.cat([attention(q[:, :, s.lo:s.hi], k[:, :, s.lo:s.hi], v[:, :, s.lo:s.hi], None, scale,
                                            dropout) for s in rows.spans], 2)
            return attention(q, k[:len(q)], v[:len(q)], _leading(self._mask(rows, krows.tags, address), len(q)), scale,
                             dropout)
        assert self.memory is not None
        if k is None or v is None:
            if address not in self.memory.groups:
                raise InputError(f"attention at {address}: nothing was written there that could be read back")
            groups = self.memory.groups[address]
        else:
            groups = self.memory.append(address, k, v, krows.tags, krows.keep)
        if groups[0].heads is None:
            return self._attend_group(groups[0], q, rows, address, scale)
        out = q.new_empty((*q.shape[:3], groups[0].v.shape[3]))
        for i, group in enumerate(groups):
            out[:, group.heads] = self._attend_group(group, q[:, group.heads], rows, f"{address}/{i}", scale)
        return out

    def _attend_group(self, group: Group, q: Tensor, rows: Rows, address: str, scale: float | None) -> Tensor:
        assert self.memory is not None
        mask, n = None, group.rows
        k, v = group.k[:, :, :n], group.v[:, :, :n]
        if self._reads or rows.masked or rows.narrowed or self.check or self.memory.ragged:
            tags = self.memory.tags_of(group)
            assert tags is not None
            for hook in self._reads:
                k, v = hook.read(self, address, k, v, tags, rows)
            if rows.masked or rows.narrowed or self.check or self.memory.ragged:
                mask = _leading(self._mask(rows, tags, address), len(q))
        return attention(q, k[:len(q)], v[:len(q)], mask, scale)

    def _mask(self, rows: Rows, keys: Tags, address: str) -> Any:
        if self.check:
            self._check(rows, keys, address)
        if not rows.masked and not rows.narrowed and keys.valid is None:
            return None
        rules = (_Steps(rows.visible), *rows.narrowed) if rows.masked else rows.narrowed
        if torch.compiler.is_compiling() and self.memory is None and keys.valid is None:
            # Made before the network (``expect``), of tensors that are the same in every step of training.
            made = self.scratch.get((rows.narrowed, id(rows.step), id(keys.step), 0))
            if made is not None:
                return made[0]
        form = dense_mask if torch.compiler.is_compiling() else visibility_mask
        return self.shared(rows.narrowed, (rows.step, keys.step, keys.valid), lambda: form(rules, rows.tags, keys))

    def shared(self, name: Hashable, tensors: tuple[Tensor | None, ...], make: Callable[[], Any]) -> Any:
        """What hangs on some tensors alone: made once a call for all who ask, as addresses that hold the same rows do.

        A compiler would tell tensors by their ids, and so start anew with every run; it makes the value for each, and
        finds by itself what is the same.
        """
        if torch.compiler.is_compiling():
            return make()
        key = (name, *(0 if t is None else id(t) for t in tensors))
        if key not in self.scratch:
            self.scratch[key] = make(), tensors  # the tensors are kept, so that their ids stay theirs
        return self.scratch[key][0]

    def _check(self, rows: Rows, keys: Tags, address: str) -> None:
        query, key = pairs(rows.tags, keys)
        seen = rows.visible.sees(query.step, key.step)
        hidden = ~seen
        for rule in rows.narrowed:
            seen = seen & rule.sees(query, key)
        if keys.valid is not None:
            counts = by_head(keys.valid)[:, :, None]
            seen, hidden = seen & counts, hidden & counts
        if not rows.masked and bool(hidden.any()):
            raise InputError(f"attention at {address}: rows promised to see everything, but {int(hidden.sum())} "
                             "pairs are hidden by the visibility; set masked=True")
        if not bool(seen.any(-1).all()):
            raise InputError(f"attention at {address}: {int((~seen.any(-1)).sum())} rows see nothing at all; what "
                             "dropped their keys must go through the call step by step (Rows.by_step)")


@dataclass(frozen=True)
class _Steps(Rule):
    """What a plan's visibility shows."""

    visible: Visibility

    def marks(self, tags: Tags) -> Marks:
        return (tags.step,)

    def shown(self, device: torch.device) -> Callable[[Marks, Marks], Tensor]:
        return lambda query, key: self.visible.sees(query[0], key[0])


def _leading(mask: Any, count: int) -> Any:
    """A mask for the leading rows of the batch; block masks are shared by all."""
    return mask[:count] if isinstance(mask, Tensor) and len(mask) > count else mask


def _wrap(method: Any, ctx: Context, address: str, inner: Function) -> Function:
    return lambda x, rows: method(ctx, address, x, rows, inner)


def _wrap_residual(hook: Hook, ctx: Context, address: str, kind: str, inner: Function) -> Function:
    return lambda x, rows: hook.residual(ctx, address, kind, x, rows, inner)


def _wrap_attend(hook: Hook, ctx: Context, address: str, inner: Attend) -> Attend:
    return lambda q, k, v, rows: hook.attend(ctx, address, q, k, v, rows, inner)
