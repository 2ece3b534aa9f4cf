"""The checks of FastVAR and ScaleKV on Infinity; ``run.py`` runs them.

What decides (selection, restoration, the rows that stay) is checked alone, then in whole runs of a tiny Infinity whose
bits are given, so that logits don't hang on earlier draws.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from bitwise_checks import Heard, bits, features_of
from torch import Tensor

from nextscale.acceleration.blocks import block_of
from nextscale.acceleration.fastvar import FastVAR, pivotal_score
from nextscale.acceleration.memory_policy import only_group
from nextscale.acceleration.scalekv import PRESETS, ScaleKV
from nextscale.conditions.text import TextCondition
from nextscale.context import Context, Hook
from nextscale.layers.memory import Memory
from nextscale.noise import Keyed
from nextscale.plan import Plan
from nextscale.run import Rows, Run
from nextscale.sampling.editing import ForcedTokens
from nextscale.sampling.filters import make_filters
from nextscale.sampling.guidance import Stepwise
from nextscale.sampling.steps import sample_steps
from nextscale.systems import infinity
from nextscale.systems.folders import load_published
from nextscale.systems.infinity import Infinity

KINDS = {"attention": "self_attn", "text": "cross_attn", "mlp": "ffn"}


def system_of(weights: dict[str, dict[str, Tensor]], golden: dict) -> Infinity:
    """The system; without the tokenizer's weights where the set lacks them, for bits need none."""
    made, run = golden["constructor"], golden["run"]
    torch.manual_seed(0)
    grids = [tuple(grid[1:]) for grid in run["schedule"]]
    system = Infinity(infinity.published_config(made["vae"], made["infinity"], grids)).eval()
    load_published(system, weights.get("vae"), weights["infinity"])
    return system


def rows_of(plan: Plan, step: int) -> Rows:
    """The rows of one step, all of which stay."""
    span, (spans,) = plan.span(step, step + 1), plan.spans(step, step + 1)
    return Rows(plan.cells[None, span], plan.step_of_row[None, span], (spans,), plan.steps[step].rows, plan.visible,
                masked=False)


def given_bits(checks: Any, system: Infinity) -> ForcedTokens:
    """The bits that every step with recorded ones writes; they may be packed, eight to a byte."""
    tokens, keep = [], []
    for k, step in enumerate(system.plan):
        found = checks.recorded.get(f"forced_bits.{k}")
        shape = 1, step.rows, system.head.bits
        if found is not None and found.numel() != step.rows * system.head.bits:
            found = torch.from_numpy(np.unpackbits(found.numpy())[:step.rows * system.head.bits])
        tokens.append(torch.zeros(shape, dtype=torch.bool) if found is None else found.bool().view(shape))
        keep.append(torch.full(shape[:2], found is not None))
    return ForcedTokens(tokens, keep)


def last_step(checks: Any, *names: str) -> int:
    """The last step that something beginning with one of these names is recorded of, ``.k`` or ``.scalek``."""
    parts = [name.removeprefix(start).lstrip(".").removeprefix("scale").split(".")[0]
             for name in checks.recorded for start in names if name.startswith(start)]
    return max((int(part) for part in parts), default=-1)


def start(checks: Any, system: Infinity, run: dict) -> tuple[Run, Stepwise]:
    guidance = Stepwise(tuple(run["cfg_list"]))
    condition = TextCondition(system.text, features_of(checks.recorded["text"], run["text_lens"]))
    return Run.start(system.plan, system.tokenizer.quantiser, condition, guidance.branches, Keyed.from_seeds([0]),
                     1), guidance


# FastVAR

def check_fastvar(checks: Any, weights: dict[str, dict[str, Tensor]], golden: dict) -> None:
    """Selection and restoration alone; then the published schedule with bits given: kept rows, residual stream, logits,
    lengths of memory, latent and picture; and greedy bits."""
    for case, sizes in enumerate(golden["run"].get("select", ())):
        check_selection(checks, case, sizes)
    if "text" in checks.recorded:
        system = system_of(weights, golden)
        follow_fastvar(checks, system, golden["run"])
        draw_fastvar(checks, system, golden["run"])


def published_fastvar(checks: Any, run: dict) -> FastVAR:
    """The published preset. All blocks behind the first three prune: of its last four, which don't, a model this
    shallow has none."""
    plan, published, hook = Plan.scales(grid[1:] for grid in run["schedule"]), run["pruning"], FastVAR(
        preset="infinity-1m", full_blocks=(3, 0))
    ratios = [1.0 if width in published["skipped_widths"] else published["width_to_ratio"].get(str(width), 0.0)
              for _, width in plan.grids]
    checks.require("published ratios", torch.tensor([hook.ratio_at(plan, k) for k in range(len(plan))]),
                   torch.tensor(ratios))
    checks.require("the cached step", torch.tensor(plan.grids[hook.cached_step(plan)]),
                   torch.tensor(published["cache_size"]))
    return hook


def check_selection(checks: Any, case: int, sizes: dict) -> None:
    """One sub-layer at the cached step and one at the pruned one, with recorded outputs."""
    recorded, (h, w), keep = checks.recorded, sizes["hw"], sizes["keep"]
    if f"select.x.{case}" not in recorded:
        return
    x, cache, output = (recorded[f"select.{name}.{case}"] for name in ("x", "cache", "output"))
    plan = Plan.scales([tuple(sizes["cache_hw"]), (h, w)])
    network = SimpleNamespace(name="base", config=SimpleNamespace(depth=1))
    hook, seen = FastVAR((h * w - keep + 0.5) / (h * w)), []
    ctx = Context(Memory(plan.length), [hook], plan=plan, network=network)

    def f(x: Tensor, rows: Rows) -> Tensor:
        seen.append(rows.cell[..., 1].long() * plan.steps[rows.spans[0].step].grid[1] + rows.cell[..., 2])  # type: ignore[index]
        return cache if len(seen) == 1 else output

    ctx.residual("base.0", "mlp", torch.zeros_like(cache), f, rows_of(plan, 0))
    found = ctx.residual("base.0", "mlp", x, f, rows_of(plan, 1)) - x
    checks.close(f"select.index.{case}", lambda: seen[1], 0)
    checks.close(f"select.restored.{case}", lambda: found, 1e-5)


class Selected(Hook):
    """Innermost: which of a step's rows a sub-layer is given, (R, M); outside of it, ``Scored``."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def residual(self, ctx: Context, address: str, kind: str, x: Tensor, rows: Rows, inner: Any) -> Tensor:
        step, cell = rows.spans[0].step, rows.cell.long()  # type: ignore[index]
        self.kept[name_of(ctx, address, step, kind)] = cell[..., 1] * ctx.plan.steps[step].grid[1] + cell[..., 2]  # type: ignore[union-attr]
        return inner(x, rows)


class Scored(Hook):
    """Outermost: the scores of all rows that a sub-layer is given, and the residual stream behind every block."""

    def __init__(self, checks: Any):
        self.checks, self.outputs = checks, {}
        self.scores: dict[str, Tensor] = {}

    def residual(self, ctx: Context, address: str, kind: str, x: Tensor, rows: Rows, inner: Any) -> Tensor:
        self.scores[name_of(ctx, address, rows.spans[0].step, kind)] = pivotal_score(x)  # type: ignore[index]
        return inner(x, rows)

    def block(self, ctx: Context, address: str, x: Tensor, rows: Rows, inner: Any) -> Tensor:
        x = inner(x, rows)
        self.outputs[f"forced.block_output.scale{rows.spans[0].step}.block{block_of(ctx.network, address)}"] = x  # type: ignore[index]
        return x


def name_of(ctx: Context, address: str, step: int, kind: str) -> str:
    return f"forced.kept.scale{step}.block{block_of(ctx.network, address)}.{KINDS[kind]}"


def follow_fastvar(checks: Any, system: Infinity, run: dict) -> None:
    recorded, limit = checks.recorded, checks.tolerance["features_inputs_logits"]
    hook, selected, scored = published_fastvar(checks, run), Selected(), Scored(checks)
    heard = Heard([], None, ())
    drawn, guidance = start(checks, system, run)
    whole = {"forced.latent", "forced.decoded"} & set(recorded)
    until = None if whole else last_step(checks, "forced.kept", "forced.block_output", "forced.head_logits") + 1
    hooks = [selected, hook, scored, heard, given_bits(checks, system)]
    for _ in sample_steps(system, drawn, guidance, (), hooks, until=until):
        k = drawn.cursor - 1
        for name in [n for n in selected.kept if n in recorded]:
            scores, wanted = scored.scores[name], recorded[name].long()
            ours = torch.zeros_like(scores, dtype=torch.bool)
            checks.sets(name, ours.scatter(1, selected.kept[name], True), ours.scatter(1, wanted, True), scores)
        for name, x in scored.outputs.items():
            checks.close(name, lambda x=x, k=k: x[:, ::run["record_blocks"][str(k)]], limit)
        checks.close(f"forced.head_logits.{k}", lambda k=k: heard.outputs[k][:, ::run["record_scales"][str(k)]], limit)
        held = [drawn.memory.groups[address][0].length for address in system.generator.remembered]
        checks.require(f"rows in memory after scale {k}", torch.tensor(held),
                       torch.tensor(run["kv_length_after_scale"][str(k)]))
        for kept in (selected.kept, scored.scores, scored.outputs):
            kept.clear()
    stride = run["image_stride"]
    checks.close("forced.latent", lambda: drawn.canvas.value, checks.tolerance["latent"])
    checks.close("forced.decoded", lambda: system.tokenizer.decode(drawn.canvas).clamp(-1, 1)[
        ..., ::stride, ::stride], checks.tolerance["decoded"])


def draw_fastvar(checks: Any, system: Infinity, run: dict) -> None:
    hook = published_fastvar(checks, run)
    wanted = bits(checks.recorded, "greedy_bits", Plan(system.plan.steps[:hook.steps(system.plan)]))
    if wanted is None:
        return
    heard, filters = Heard(wanted, None, ()), make_filters(1.0, 1)
    drawn, guidance = start(checks, system, run)
    for _ in sample_steps(system, drawn, guidance, filters, [hook, heard]):
        k = drawn.cursor - 1
        if not checks.tokens(f"greedy_bits.{k}", drawn.tokens[k], heard.ties[k]):
            return
    stride = run["image_stride"]
    picture = ((system.tokenizer.decode(drawn.canvas) + 1) / 2 * 255).to(torch.uint8).permute(0, 2, 3, 1).flip(-1)
    checks.close("greedy_image", lambda: picture[:, ::stride, ::stride], 1)


# ScaleKV

def check_scalekv(checks: Any, weights: dict[str, dict[str, Tensor]], golden: dict) -> None:
    """What a layer keeps, alone; then the published budgets in runs with bits given: which rows stay, how many, and the
    logits of every scale, beside those of the full memory."""
    for case, sizes in enumerate(golden["run"].get("update", ())):
        check_updates(checks, case, sizes)
    runs = golden["run"].get("runs", {})
    runs = {name: used for name, used in runs.items() if any(key.startswith(f"{name}.") for key in checks.recorded)}
    if runs:
        system = system_of(weights, golden)
        for name, used in runs.items():
            follow_scalekv(checks, system, golden["run"], name, used)


def places(ctx: Context, address: str, shape: torch.Size) -> Tensor:
    """Which rows of the plan a layer remembers now, (R, H, N)."""
    assert ctx.memory is not None and ctx.plan is not None
    tags = ctx.memory.tags_of(only_group(ctx, address))
    assert tags is not None
    step, cell = tags.step.long(), tags.cell.long()
    width = torch.tensor([grid[1] for grid in ctx.plan.grids])
    found = torch.tensor(ctx.plan.starts[:-1])[step] + cell[..., 1] * width[step] + cell[..., 2]
    return (found if found.ndim == 3 else found[:, None]).expand(shape)


@dataclass(frozen=True)
class Listened(ScaleKV):
    """ScaleKV whose scores can be looked at."""

    heard: dict[str, Tensor] = field(default_factory=dict, compare=False)

    def chosen(self, ctx: Context, address: str, scores: Tensor, count: int) -> Tensor:
        self.heard[address] = scores
        return super().chosen(ctx, address, scores, count)


def check_updates(checks: Any, case: int, sizes: dict) -> None:
    recorded, (batch, heads, _), steps = checks.recorded, sizes["shape"], sizes["scales"]
    layers = [n for n in range(8) if f"update.{case}.layer{n}.keys.0" in recorded]
    if not layers:
        return
    # One scale more than the chain has: what a step leaves behind is the next scale's budget.
    plan = Plan.scales((1, 2, 4, 6, 8, 12, 16)[:steps + 1])
    rows = [sizes["budgets"].get(str(k + 1)) for k in range(steps + 1)]
    budgets = {"budgets": [row and [row[n] for n in layers] for row in rows], "base": sizes["base_capacity"]}
    pooling = {"maxpool": "max", "avgpool": "average"}[sizes["pooling"]]
    hook = Listened(budgets, window=sizes["window"], kernel=sizes["kernel"], pooling=pooling)  # type: ignore[arg-type]
    network = SimpleNamespace(name="base", remembered=tuple(f"base.{n}.kv" for n in layers))
    hook.prepare(SimpleNamespace(generator=network), plan, [hook])
    memory = Memory(plan.length)
    ctx = Context(memory, [hook], plan=plan, network=network)
    for k in range(steps):
        part = rows_of(plan, k)
        hook.heard.clear()
        for layer, address in zip(layers, network.remembered, strict=True):
            given = f"update.{case}.layer{layer}"
            q, key, v = (recorded[f"{given}.{name}.{k}"] for name in ("queries", "keys", "values"))
            ctx.offer("bare query", lambda q=q: q, part)
            ctx.attend(address, q, key, v, part)
        memory.settle(part.keep, part.tags)
        for layer, address in zip(layers, network.remembered, strict=True):
            given, group = f"update.{case}.layer{layer}", only_group(ctx, address)
            checks.close(f"{given}.kept.{k}", lambda: places(
                ctx, address, torch.Size((batch, heads, group.length))), 0)  # noqa: B023
            if f"{given}.pooled.{k}" in recorded:
                scores, wanted = hook.heard[address], recorded[f"{given}.pooled.{k}"]
                found = torch.where(scores == torch.inf, wanted, scores.clamp_min(-1e30))
                checks.close(f"{given}.pooled.{k}", lambda found=found: found, 1e-4)
            if k == steps - 1:
                checks.close(f"{given}.last_keys", lambda group=group: group.k[:, :, :group.length], 0)
                checks.close(f"{given}.last_values", lambda group=group: group.v[:, :, :group.length], 0)


@dataclass(frozen=True)
class Followed(ScaleKV):
    """ScaleKV that is compared with the recorded rows, and goes on with these: a tie may have fallen the other way."""

    checks: Any = None
    run: str = ""
    lengths: dict[int, list] = field(default_factory=dict, compare=False)

    def after(self, ctx: Context, address: str, layer: int, q: Tensor, rows: Rows) -> None:
        before = only_group(ctx, address).rows
        super().after(ctx, address, layer, q, rows)
        self.lengths.setdefault(rows.spans[0].step, []).append([before, only_group(ctx, address).rows])  # type: ignore[index]

    def chosen(self, ctx: Context, address: str, scores: Tensor, count: int) -> Tensor:
        index, history = super().chosen(ctx, address, scores, count), places(ctx, address, scores.shape)
        step, layer = int(ctx.plan.step_of_row[history.max()]), ctx.network.remembered.index(address)  # type: ignore[union-attr]
        for what in ("kept", "dropped"):
            name = f"{self.run}.{what}.scale{step}.layer{layer}"
            if name in self.checks.recorded:
                named = self.checks.recorded[name].long()
                at = torch.searchsorted(history.contiguous(), named.contiguous()).clamp_max(history.shape[-1] - 1)
                self.checks.require(f"{name}: rows that are remembered", history.gather(-1, at), named)
                there = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, at, True)
                wanted = there if what == "kept" else ~there
                ours = torch.zeros_like(wanted).scatter(-1, index, True)
                self.checks.sets(name, ours, wanted, scores)
                index = wanted.nonzero()[:, -1].view(*wanted.shape[:2], -1)
        return index


def follow_scalekv(checks: Any, system: Infinity, run: dict, name: str, used: dict) -> None:
    heard, hooks = Heard([], None, ()), []
    hooks = [heard, given_bits(checks, system)]
    if used["budgets"] is not None:
        published = PRESETS[f"infinity-{used['budgets']}"].rows
        depth = len(system.generator.blocks)
        budgets = {"budgets": [row and list(row[:depth]) for row in published], "base": used["base_capacity"]}
        assert used["pooling"] == "maxpool"
        follow = Followed(budgets, window=used["window"], kernel=used["kernel"], checks=checks, run=name)
        hooks.insert(0, follow)
    drawn, guidance = start(checks, system, run)
    until = last_step(checks, f"{name}.head_logits", f"{name}.kept", f"{name}.dropped") + 1
    for _ in sample_steps(system, drawn, guidance, (), hooks, until=until):
        k = drawn.cursor - 1
        checks.close(f"{name}.head_logits.{k}", lambda k=k: heard.outputs[k][:, ::run["record_scales"][str(k)]],
                     checks.tolerance["logits"])
        if str(k) in used.get("cache_length", {}):
            checks.require(f"{name}: rows in memory at scale {k}", torch.tensor(follow.lengths[k]),
                           torch.tensor(used["cache_length"][str(k)]))
