"""The check of Infinity; ``run.py`` runs it."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nextscale.canvas import Canvas
from nextscale.conditions.text import TextCondition
from nextscale.conditions.text_features import TextFeatures
from nextscale.context import Hook
from nextscale.noise import Keyed, Recorded
from nextscale.objectives.self_correction import corrupted
from nextscale.objectives.teacher_forcing import teacher_forced, teacher_forcing_loss
from nextscale.plan import Plan
from nextscale.run import At, Run, conditions
from nextscale.sampling.filters import make_filters
from nextscale.sampling.guidance import Stepwise, Unguided
from nextscale.sampling.steps import sample_steps
from nextscale.systems import infinity
from nextscale.systems.folders import load_published
from nextscale.systems.infinity import GuidedBlock, Infinity
from nextscale.tokenizers import pyramid

TIE = 1e-3


class Heard(Hook):
    """The head's outputs of every step, conditional rows first, and whether the recorded bits are as good as drawn."""

    def __init__(self, wanted: list[Tensor], uniforms: list[Tensor] | None, filters: tuple):
        self.wanted, self.uniforms, self.filters = wanted, uniforms, filters
        self.outputs: list[Tensor] = []
        self.ties: list[Tensor] = []

    def output(self, outputs: dict[str, Tensor], at: At, run: Run | None) -> dict[str, Tensor]:
        self.outputs.append(torch.cat(list(outputs.values())).flatten(-2))
        return outputs

    def logits(self, logits: Tensor, at: At) -> Tensor:
        gap = (logits[..., 1] - logits[..., 0]).abs()
        if self.uniforms is None:
            self.ties.append(gap < TIE)
        else:
            narrowed = logits
            for narrow in self.filters:
                narrowed = narrow(narrowed, at)
            edge = narrowed.double().softmax(-1)[..., 0]
            self.ties.append((edge - self.uniforms[at.step].double()).abs() < TIE)
        return logits


def features_of(packed: Tensor, lengths: list[int]) -> TextFeatures:
    return TextFeatures.pack(packed.float().split(lengths))


def check_infinity(checks: Any, weights: dict[str, dict[str, Tensor]], golden: dict) -> None:
    """Bits, inputs and labels with and without flips, logits, losses, and generation with guidance on logits and behind
    a block, for a square and a wide schedule."""
    made, recorded = golden["constructor"], checks.recorded
    for name, run in golden["run"].items():
        grids = [tuple(grid[1:]) for grid in run["schedule"]]
        torch.manual_seed(0)
        config = infinity.published_config(made["vae"], made["infinity"], grids)
        system = Infinity(config).eval()
        load_published(system, weights["vae"], weights["infinity"])
        text = features_of(recorded[f"{name}.text"], run["text_lens"])
        check_tokens(checks, system, name, run)
        check_passes(checks, system, name, run, text)
        for kind in ("greedy", "sample"):
            replay(checks, system, name, run, text, kind)


def bits(recorded: dict[str, Tensor], name: str, plan: Plan) -> list[Tensor] | None:
    """Recorded bits (B, 1, h, w, d) of every step as tokens (B, L, d)."""
    if any(f"{name}.{k}" not in recorded for k in range(len(plan))):
        return None
    return [recorded[f"{name}.{k}"].bool().flatten(1, 3) for k in range(len(plan))]


def check_tokens(checks: Any, system: Infinity, name: str, run: dict) -> None:
    recorded, tokenizer, plan = checks.recorded, system.tokenizer, system.plan
    if f"{name}.image" in recorded:
        checks.close(f"{name}.encoder_features", lambda: tokenizer.latent(recorded[f"{name}.image"]),
                     checks.tolerance["features_inputs_logits"])
    latent, canvas = recorded[f"{name}.encoder_features"], Canvas.empty(plan, tokenizer.quantiser, 2)
    near: list[Tensor] = []

    def each(k: int, z: Tensor, canvas: Canvas) -> None:
        near.append(z.flatten(2).transpose(1, 2).abs() < TIE)

    found = pyramid.encode(latent, canvas, lambda k, z: tokenizer.quantiser.quantise(z), each=each)
    wanted = bits(recorded, f"{name}.bits", plan)
    for k in range(len(plan) if wanted else 0):
        checks.tokens(f"{name}.bits.{k}", found.tokens[k].reshape(recorded[f"{name}.bits.{k}"].shape), near[k])
    limit = checks.tolerance["features_inputs_logits"]
    checks.close(f"{name}.quantized", lambda: found.canvas.value, limit)
    checks.close(f"{name}.reconstruction", lambda: tokenizer.decode(found.canvas),
                 checks.tolerance["reconstruction_and_decoded"])
    checks.close(f"{name}.tf_input", lambda: torch.cat(found.reads[1:], 1), limit)  # type: ignore[arg-type]
    checks.close(f"{name}.tf_labels", lambda: torch.cat(found.tokens, 1).float(), 0)
    masks = [recorded.get(f"{name}.bsc_flip_mask.{k}") for k in range(len(plan))]

    def flip(k: int, tokens: Tensor) -> Tensor:
        return tokens if masks[k] is None else tokens ^ masks[k].bool().reshape(tokens.shape)  # type: ignore[union-attr]

    flipped = corrupted(tokenizer.quantiser, latent, canvas, flip)
    checks.close(f"{name}.bsc_input", lambda: torch.cat(flipped.reads[1:], 1), limit)  # type: ignore[arg-type]
    checks.close(f"{name}.bsc_labels", lambda: torch.cat(flipped.tokens, 1).float(), 0)


def check_passes(checks: Any, system: Infinity, name: str, run: dict, text: TextFeatures) -> None:
    recorded, plan = checks.recorded, system.plan
    rows = [step.rows for step in plan]
    condition = TextCondition(system.text, text)
    limit = checks.tolerance["features_inputs_logits"]
    given = recorded[f"{name}.tf_input"].float()
    reads = [None, *given.split(rows[1:], 1)]
    for branch, called in (("conditional", "tf_logits"), ("unconditional", "tf_logits_uncond")):
        checks.close(f"{name}.{called}", lambda branch=branch: system.head(teacher_forced(
            system.generator, plan, reads, conditions(condition, (branch,)))).flatten(-2), limit)
    if f"{name}.bsc_input" not in recorded:
        return
    reads = [None, *recorded[f"{name}.bsc_input"].float().split(rows[1:], 1)]
    tokens = list(recorded[f"{name}.bsc_labels"].bool().split(rows, 1))
    cond = conditions(condition, ("conditional",))
    hidden = teacher_forced(system.generator, plan, reads, cond)
    checks.close(f"{name}.bsc_loss_per_token", lambda: system.head.loss(hidden, torch.cat(tokens, 1))[0],
                 checks.tolerance["losses"])
    root = [step.rows**-0.5 for step in plan]

    def losses() -> Tensor:
        found = [teacher_forcing_loss(system.generator, system.head, plan, tokens, reads, cond, weights)[0]
                 for weights in (root, None)]
        return torch.stack([*found, found[0] * system.head.bits])

    checks.close(f"{name}.bsc_loss", losses, checks.tolerance["losses"])


def replay(checks: Any, system: Infinity, name: str, run: dict, text: TextFeatures, kind: str) -> None:
    recorded, plan = checks.recorded, system.plan
    wanted = bits(recorded, f"{name}.{kind}_bits", plan)
    if wanted is None:
        return
    depth, after = len(system.generator.blocks), -run["cfg_insertion_layer"][0]
    top_k = 1 if kind == "greedy" else None
    filters = make_filters(1.0, top_k, run["top_p"] if kind == "sample" else None, tuple(run["tau_list"]))
    draws = None
    if kind == "sample":
        draws = [recorded[f"{name}.sample_uniform.{k}"].view(2, step.rows, -1) for k, step in enumerate(plan)]
    noise = Keyed.from_seeds([0, 1]) if draws is None else Recorded({("token", k, 0): u for k, u in enumerate(draws)})
    heard = Heard(wanted, draws, filters)
    scales = run["cfg_list"]
    guidance = Unguided(("conditional", "unconditional")) if after else Stepwise(tuple(scales))
    hooks: list[Hook] = [heard]
    if after:
        hooks.append(GuidedBlock(depth - after, scales[0]))
        assert len(set(scales)) == 1
    condition = TextCondition(system.text, text)
    drawn = Run.start(plan, system.tokenizer.quantiser, condition, guidance.branches, noise, 2)
    for _ in sample_steps(system, drawn, guidance, filters, hooks):
        k = drawn.cursor - 1
        named = f"{name}.{kind}_head_logits.{k}"
        if named in recorded:
            rows = len(recorded[named])
            checks.close(named, lambda k=k, rows=rows: heard.outputs[k][:rows],
                         checks.tolerance["features_inputs_logits"])
        shape = recorded[f"{name}.{kind}_bits.{k}"].shape
        if not checks.tokens(f"{name}.{kind}_bits.{k}", drawn.tokens[k].reshape(shape), heard.ties[k]):
            return
    picture = system.tokenizer.decode(drawn.canvas)
    checks.close(f"{name}.{kind}_decoded", lambda: picture, checks.tolerance["reconstruction_and_decoded"])
    shown = ((picture + 1) / 2 * 255).to(torch.uint8).permute(0, 2, 3, 1).flip(-1)
    checks.close(f"{name}.{kind}_image", lambda: shown, 1)
