"""Test doubles that bend the seams, one after each kind of published system that the library must take in.

They are no implementations: each is the smallest thing that asks of the seams what its system will ask. What holds a
number a picture lives in the run (``run.carried``) or in its memory; a double itself keeps settings only.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nextscale.context import Context, Hook
from nextscale.heads.categorical import CategoricalHead, Evaluate, Filter, Guidance
from nextscale.run import At, Call, Rows, Run, Sample
from nextscale.sampling.steps import Model, evaluator
from nextscale.tokenizers import pyramid


class ControlTower(Hook):
    """CAR (arXiv 2410.04671): a tower of blocks with its own K/V walks along; its output joins what a block is given.

    blocks: by the address of the block whose input is replaced; control_BKC: what each picture and step is told.
    Bends: memory under addresses of its own, and a condition a picture that follows gathering and hand-over.
    """

    def __init__(self, blocks: dict[str, torch.nn.Module], control_BKC: Tensor, strength: float = 1.0):
        self.blocks, self.control, self.strength = blocks, control_BKC, strength

    def inputs(self, run: Run, call: Call) -> Call:
        control = run.carry("tower.control", self.control)
        run.memory.constant("tower.control", lambda: control.repeat(len(run.branches), 1, 1))
        return call

    def block(self, ctx: Context, address: str, x: Tensor, rows: Rows, inner: Any) -> Tensor:
        if address in self.blocks:
            control = ctx.remembered("control tower").constants["tower.control"]
            step = rows.step.clamp_max(control.shape[1] - 1).expand(len(x), -1)
            told = control.gather(1, step[..., None].expand(-1, -1, x.shape[-1]))
            x = x + self.strength * self.blocks[address](x + told, rows, ctx, f"tower.{address}", None)
        return inner(x, rows)


class CommitAfterClean:
    """xAR (arXiv 2502.20388): an entity is evaluated noisy in several rounds and enters memory clean, one step later.

    Bends: a first round that keeps the previous entity but not the noisy one, further rounds that keep nothing.
    """

    def __init__(self, head: CategoricalHead, rounds: int = 2, noise: float = 0.3):
        self.head, self.rounds, self.noise = head, rounds, noise

    def sample(self, evaluate: Evaluate, call: Call, run: Run, guidance: Guidance,
               filters: Sequence[Filter] = ()) -> Sample:
        lead, rows, total = call.predicts.start, call.rows, 0.0
        entity = rows.part(lead, len(rows), keep=0)
        for round in range(self.rounds):
            draw = run.noise.normal("entity", entity.step[:1], round, entity.cell, call.x.shape[-1])
            noisy = call.x[:, lead:] + self.noise / (1 + round) * draw.repeat(len(run.branches), 1, 1)
            if round == 0:
                first = replace(call, x=torch.cat([call.x[:, :lead], noisy], 1), rows=replace(rows, keep=lead))
                total = evaluate(first)[:, lead:]
            else:
                total = total + evaluate(Call(noisy, entity, slice(0, len(entity))))
        mean = total / self.rounds
        return self.head.sample(lambda _: mean, Call(mean, entity, slice(0, len(entity))), run, guidance, filters)


class MaskedRounds:
    """HMAR (arXiv 2506.04421): a step's tokens are predicted in rounds; each round keeps the most confident ones,
    tells the network, and predicts the others again.

    Bends: a head that asks for several evaluations; only the last one's rows stay in memory (earlier steps that a
    hand-over made the call hold, too, stay from the first on).
    """

    def __init__(self, head: CategoricalHead, generator: Any, rounds: int = 3):
        self.head, self.generator, self.rounds = head, generator, rounds

    def sample(self, evaluate: Evaluate, call: Call, run: Run, guidance: Guidance,
               filters: Sequence[Filter] = ()) -> Sample:
        raw, step, k = call.raw[-1], call.rows.step[:1, call.predicts], run.cursor
        rounds = 1 if raw is None else self.rounds
        tokens = torch.zeros(run.pictures, step.shape[1], dtype=torch.int64, device=run.device)
        fixed, log_prob = tokens.bool(), tokens.float()
        for round in range(rounds):
            rows = call.rows if round == rounds - 1 else replace(call.rows, keep=call.predicts.start)
            outputs = self.head.outputs(evaluate(replace(call, rows=rows))[:, call.predicts], run.branches)
            logits = self.head.distribution(outputs, replace(run.at, round=round), guidance, filters)
            drawn = self.head.choose(logits, run.uniform("token", round))
            tokens, log_prob = torch.where(fixed, tokens, drawn.tokens), torch.where(fixed, log_prob, drawn.log_prob)
            if round < rounds - 1:
                sure = log_prob.masked_fill(fixed, torch.inf).topk(step.shape[1] * (round + 1) // rounds, 1).indices
                fixed = torch.zeros_like(fixed).scatter(1, sure, True)
                run.reads[k] = raw + run.canvas.codec.embed(tokens) * fixed[..., None]
                call = self.generator.call(run)
        return Sample(tokens, log_prob, log_prob.exp())


def jacobi(model: Model, run: Run, guidance: Guidance, window: int, hooks: Sequence[Hook] = ()) -> Iterator[Tensor]:
    """Speculative Jacobi decoding (arXiv 2410.01699) of a plan of one-row steps, yielding tokens (B, K) so far.

    A window of positions is guessed and drawn in one call; what the draws confirm is committed, a count a picture.
    Bends: provisional rows, pictures that stand at different steps, K/V that is longer for one picture than another.
    """
    steps, branches = len(run.plan), len(run.branches)
    run.carry("jacobi.tokens", torch.zeros(run.pictures, steps + window, dtype=torch.int64))
    run.carry("jacobi.at", torch.zeros(run.pictures, dtype=torch.int64))
    while bool((run.carried["jacobi.at"] < steps).any()):
        tokens, at = run.carried["jacobi.tokens"], run.carried["jacobi.at"]
        step_BW = at[:, None] + torch.arange(window)
        reads = pyramid.replay(list(tokens[:, :steps].split(1, 1)), run.canvas).reads
        cond, row_BW = run.conditions(), step_BW.clamp_max(steps - 1)
        x = model.generator.embed(run.plan, reads, cond, 0, steps)
        x = x.gather(1, row_BW.repeat(branches, 1)[..., None].expand(-1, -1, x.shape[-1]))
        cell_BW3 = run.order[0][row_BW]
        rows = Rows(cell_BW3.repeat(branches, 1, 1), step_BW.repeat(branches, 1), spans=None, keep=None,
                    visible=run.plan.visible, masked=True, cond=cond)
        call = Call(x, rows, slice(0, window))
        for hook in hooks:
            call = hook.inputs(run, call)
        outputs = model.head.outputs(evaluator(model.generator, run, hooks, check=True)(call), run.branches)
        uniform = run.noise.uniform("token", step_BW, 0, cell_BW3)
        drawn = model.head.choose(guidance(outputs, At(0, 1, 0, 1)), uniform).tokens
        confirmed = (drawn == tokens.gather(1, step_BW))[:, :-1].long().cumprod(1).sum(1)
        count = torch.minimum(confirmed + 1, steps - at)
        run.commit(count)
        run.carried.update({"jacobi.tokens": tokens.scatter(1, step_BW, drawn), "jacobi.at": at + count})
        yield run.carried["jacobi.tokens"][:, :steps]
