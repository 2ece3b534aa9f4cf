"""Hold the library against recorded outputs of a published implementation.

    python tests/parity/run.py tests/parity/var_tiny.json

The JSON names the published constructor arguments, the tensors' names and shapes, and what was run; the safetensors
file beside it holds inputs and outputs. Weights are made by a rule from the published names (see ``fill``) and loaded
through the code path that loads published checkpoints. One line a tensor; exit status 1 on a miss.
"""
from __future__ import annotations

import fnmatch
import json
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import acceleration_checks
import archives
import bitwise_checks
import flow_checks
import masked_checks
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nextscale.acceleration.code_decoding import sample_collaboratively
from nextscale.canvas import Canvas
from nextscale.conditions.class_label import ClassCondition
from nextscale.context import Context, Hook
from nextscale.errors import NextscaleError
from nextscale.heads.masked_rounds import InRounds
from nextscale.layers.resize import resize
from nextscale.noise import Keyed, Recorded
from nextscale.objectives.teacher_forcing import teacher_forcing_call, teacher_forcing_loss
from nextscale.plan import Plan
from nextscale.run import At, Call, Sample
from nextscale.sampling.editing import KnownLatent, covered_cells, partial_canvases
from nextscale.sampling.filters import make_filters
from nextscale.sampling.guidance import make_guidance
from nextscale.sampling.score import hidden_states
from nextscale.sampling.steps import evaluator, sample_steps
from nextscale.systems import car, code_decoding, flexvar, hmar, m_var
from nextscale.systems.car import CAR
from nextscale.systems.class_conditional import ClassConditionalSystem
from nextscale.systems.code_decoding import CollaborativeSystem
from nextscale.systems.flexvar import FlexVAR
from nextscale.systems.folders import load_published
from nextscale.systems.hmar import HMAR
from nextscale.systems.m_var import MVAR
from nextscale.systems.var import VAR
from nextscale.systems.var_published import published_config
from nextscale.tokenizers import pyramid

LIMIT, PICTURE_LIMIT = 2e-4, 1e-3  # where a golden set names none


def fill(golden: dict) -> dict[str, dict[str, Tensor]]:
    """Weights by rule, by module tag: a standard normal from the name's checksum, scaled by fan-in, through float16."""
    filled: dict[str, dict[str, Tensor]] = {}
    # The weights of a tokenizer are named bare, those of a transformer behind its model's name.
    prefixes = golden.get("hash_prefix", {"vae": "", "var": "var."})
    buffers = set(golden.get("buffers", ())) - set(golden.get("filled_buffers", ()))
    for full, shape in golden["state_dict"].items():
        if full in buffers:
            continue
        tag, bare = full.split(".", 1)
        seed = zlib.crc32((prefixes.get(tag, "") + bare).encode()) & 0xFFFFFFFF
        n = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
        if len(shape) >= 2:
            value = n / np.sqrt(np.prod(shape[1:]))
        else:
            value = 1 + 0.1 * n if bare.endswith("weight") else 0.1 * n
        # A float64 quotient (numpy 2) rounded to float16 at once differs now and then from the recorded weights.
        value = value.astype(np.float32).astype(np.float16).astype(np.float32)
        for pattern, change in golden.get("after_fill", {}).items():
            if fnmatch.fnmatchcase(full, pattern):
                value = value * np.float32(change.get("multiply", 1)) + np.float32(change.get("add", 0))
        filled.setdefault(tag, {})[bare] = torch.from_numpy(np.ascontiguousarray(value))
    return filled


class Checks:
    """Compares tensors, printing a line for each; tensors that were not recorded are not compared."""

    def __init__(self, golden: dict, recorded: dict[str, Tensor], silent: bool = False):
        self.tolerance, self.recorded, self.silent = golden.get("tolerance", {}), recorded, silent
        self.failed = self.done = 0

    def limit(self, name: str) -> float:
        """The largest difference allowed: by the tensor's name, a pattern, or a group such as ``features_logits``."""
        if not isinstance(self.tolerance, dict):
            return _number(self.tolerance) or PICTURE_LIMIT
        known = {key: value for key, value in ((k, _number(v)) for k, v in self.tolerance.items()) if value is not None}
        family = ".".join("k" if part.isdigit() else part for part in name.split("."))
        for key in (name, family):
            if key in known:
                return known[key]
        for key, value in known.items():
            if fnmatch.fnmatchcase(name, key) or fnmatch.fnmatchcase(family, key):
                return value
        kind = name.split(".")[0].split("_")[-1].rstrip("s")
        for key, value in known.items():
            if kind in (word.rstrip("s") for word in key.split("_")):
                return value
        return known.get("default", PICTURE_LIMIT if kind in ("image", "reconstruction") else LIMIT)

    def close(self, name: str, make: Callable[[], Tensor], limit: float | None = None) -> None:
        if name not in self.recorded:
            return
        ours, wanted, limit = make(), self.recorded[name], self.limit(name) if limit is None else limit
        if ours.shape != wanted.shape:
            return self._say(name, f"shape {tuple(ours.shape)} instead of {tuple(wanted.shape)}", False)
        difference = float((ours.float() - wanted.float()).abs().max())
        self._say(name, f"max difference {difference:.2e} (at most {limit:.0e})", difference <= limit)

    def losses(self, name: str, make: Callable[[], Tensor], limit: float = 1e-4) -> None:
        """Close by ``limit``, and by as large a part of what was recorded: how far off losses may be."""
        if name not in self.recorded:
            return
        ours, wanted = make().float(), self.recorded[name].float()
        if ours.shape != wanted.shape:
            return self._say(name, f"shape {tuple(ours.shape)} instead of {tuple(wanted.shape)}", False)
        share = float(((ours - wanted).abs() / (1 + wanted.abs())).max())
        self._say(name, f"max difference {share:.2e} of 1 + value (at most {limit:.0e})", share <= limit)

    def relative(self, name: str, make: Callable[[], Tensor], limit: float) -> None:
        """Close in every entry of the first axis, measured by its largest value."""
        if name not in self.recorded:
            return
        ours, wanted = make().flatten(1), self.recorded[name].flatten(1)
        difference = float(((ours - wanted).abs().amax(1) / wanted.abs().amax(1)).max())
        self._say(name, f"max relative difference {difference:.2e} (at most {limit:.0e})", difference <= limit)

    def require(self, what: str, ours: Tensor, wanted: Tensor) -> None:
        """Equal up to rounding; a line only where it isn't so."""
        if ours.shape != wanted.shape or not torch.allclose(ours.double(), wanted.double(), rtol=1e-6, atol=1e-6):
            self._say(what, f"{ours.tolist()} instead of {wanted.tolist()}", False)

    def tokens(self, name: str, ours: Tensor, excused: Tensor, pictures: int | None = None) -> bool:
        """Equal, or excused where both candidates are as good as equal; pictures: how many are compared. Returns
        whether all are equal."""
        wanted = self.recorded[name][:pictures]
        if ours.numel() != wanted.numel():
            self._say(name, f"{ours.numel()} tokens instead of {wanted.numel()}", False)
            return False
        wrong = ours.flatten() != wanted.flatten()
        ties = wrong & excused.flatten()
        self._say(name, f"{int(wrong.sum())} of {wrong.numel()} differ, {int(ties.sum())} of them near-ties",
                  not bool((wrong & ~ties).any()))
        return not bool(wrong.any())

    def sets(self, name: str, ours: Tensor, wanted: Tensor, scores: Tensor, near: float = 1e-5) -> None:
        """The same entries (..., N) bool, or others whose scores are as good as the lowest that is wanted."""
        if ours.shape != wanted.shape:
            return self._say(name, f"{tuple(ours.shape)} instead of {tuple(wanted.shape)}", False)
        lowest = scores.masked_fill(~wanted, torch.inf).amin(-1, keepdim=True)
        wrong = ours ^ wanted
        ties = wrong & ((scores - lowest).abs() <= near * lowest.abs())
        self._say(name, f"{int((wrong & wanted).sum())} of {int(wanted.sum())} are others, "
                  f"{int((ties & wanted).sum())} of them ties", not bool((wrong & ~ties).any())
                  and bool((ours.sum(-1) == wanted.sum(-1)).all()))

    def _say(self, name: str, what: str, ok: bool) -> None:
        self.failed += not ok
        self.done += 1
        if not (self.silent and ok):
            print(f"{'ok  ' if ok else 'MISS'} {name:28s} {what}")


def _number(value: object) -> float | None:
    """A tolerance that is a number, also one in a string; rules in prose are None."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


class NearTies(Hook):
    """Whether the recorded token is as good as the drawn one, at every step.

    Without uniform numbers: its guided logit lies within 1e-3 of the best. With them: the uniform number lies within
    1e-5 of the recorded token's share of the cumulative distribution.
    """

    def __init__(self, tokens: list[Tensor], filters: tuple = (), uniforms: list[Tensor] | None = None):
        self.wanted, self.filters, self.uniforms = tokens, filters, uniforms
        self.found: list[Tensor] = []

    def logits(self, logits: Tensor, at: At) -> Tensor:
        wanted = self.wanted[at.step].view(*logits.shape[:2], 1)
        if self.uniforms is None:
            self.found.append((logits.amax(-1) - logits.gather(-1, wanted)[..., 0]) < 1e-3)
        else:
            narrowed = logits
            for narrow in self.filters:
                narrowed = narrow(narrowed, at)
            total = narrowed.double().softmax(-1).cumsum(-1)
            high = total.gather(-1, wanted)[..., 0]
            low = torch.where(wanted[..., 0] > 0, total.gather(-1, (wanted - 1).clamp_min(0))[..., 0], 0.0)
            u = self.uniforms[at.step].view(high.shape).double() * total[..., -1]
            self.found.append((u > low - 1e-5) & (u < high + 1e-5))
        return logits


def series(recorded: dict[str, Tensor], names: tuple[str, ...], steps: int) -> tuple[str, list[Tensor]] | None:
    """The tensors ``name.0`` to ``name.(steps - 1)`` of the first name that is recorded in full."""
    for name in names:
        if all(f"{name}.{k}" in recorded for k in range(steps)):
            return name, [recorded[f"{name}.{k}"] for k in range(steps)]
    return None


def check_var(golden: dict, recorded: dict[str, Tensor]) -> int:
    """Encoder, tokens, teacher-forcing inputs, reconstruction, teacher-forced logits, greedy and replayed sampling."""
    checks, run = Checks(golden, recorded), golden.get("run", {})
    torch.manual_seed(0)
    constructor = golden["constructor"]
    system = VAR(published_config(constructor["vae"], constructor["var"])).eval()
    weights = fill(golden)
    load_published(system, weights["vae"], weights["var"])
    labels = recorded["labels"] if "labels" in recorded else torch.tensor(run.get("labels", [0]))
    with torch.no_grad():
        check_tokenizer(checks, system, recorded)
        check_teacher_forcing(checks, system, recorded, labels.long().view(-1, 1))
        check_sampling(checks, system, recorded, run, labels.long().flatten().tolist())
    if not checks.done:
        print("MISS nothing was compared: no tensor of this file has a name that is known here")
    return checks.failed or int(not checks.done)


def check_tokenizer(checks: Checks, system: ClassConditionalSystem, recorded: dict[str, Tensor]) -> None:
    """The encoder, and the tokens of every scale given the recorded tokens of the scales before."""
    tokenizer, steps = system.tokenizer, len(system.plan)
    if "image" not in recorded:
        return
    image = recorded["image"]
    checks.close("encoder_features", lambda: tokenizer.latent(image))
    given = series(recorded, ("tokens",), steps)
    if given is None:
        return
    wanted = [t.long().flatten(1)[:len(image)] for t in given[1]]  # pictures may be of the first alone
    codes_VC, ties = tokenizer.quantiser.codebook.weight, []

    def follow(k: int, found: Tensor) -> Tensor:
        return wanted[k] if wanted[k].shape == found.shape else found

    def compare(k: int, z: Tensor, canvas: Canvas) -> None:
        z_NC = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        distance_NV = torch.cdist(z_NC, codes_VC).square()
        chosen = distance_NV.gather(1, wanted[k].reshape(-1, 1))[:, 0]
        ties.append(chosen - distance_NV.amin(1) < 1e-3)

    canvas = Canvas.empty(system.plan, tokenizer.quantiser, len(image))
    if any(w.shape[1] != step.rows for w, step in zip(wanted, system.plan, strict=True)):
        compare = None  # type: ignore[assignment]
    latent = tokenizer.latent(image)
    found = pyramid.encode(latent, canvas, lambda k, z: tokenizer.quantiser.nearest(z), follow, compare)
    for k in range(steps):
        none = torch.zeros(found.tokens[k].numel(), dtype=torch.bool)
        checks.tokens(f"tokens.{k}", found.tokens[k], ties[k] if ties else none, len(image))


def check_teacher_forcing(checks: Checks, system: ClassConditionalSystem, recorded: dict[str, Tensor],
                          labels_B1: Tensor) -> None:
    """Inputs of all scales, reconstruction and logits from the recorded tokens."""
    given = series(recorded, ("tokens",), len(system.plan))
    if given is None:
        return
    tokens = [t.long().view(len(t), -1) for t in given[1]]
    canvas = Canvas.empty(system.plan, system.tokenizer.quantiser, len(tokens[0]))
    replayed = pyramid.replay(tokens, canvas)
    checks.close("var_input", lambda: torch.cat([r for r in replayed.reads if r is not None], 1))
    checks.close("reconstruction", lambda: system.tokenizer.decode(replayed.canvas)[:len(checks.recorded[
        "reconstruction"])])
    condition = ClassCondition(system.labels, labels_B1)
    checks.close("teacher_forced_logits", lambda: system.head(
        hidden_states(system, system.plan, replayed.reads, condition, ("conditional",))))


def check_sampling(checks: Checks, system: ClassConditionalSystem, recorded: dict[str, Tensor], run: dict,
                   labels: list[int]) -> None:
    """Greedy tokens (top_k 1), and drawn ones where their uniform numbers are recorded."""
    steps = len(system.plan)
    draw_names = ("sample_uniform", "sample_uniforms", "sampled_uniform", "sampled_uniforms")
    for kind, names in (("greedy", ("greedy",)), ("sampled", ("sample", "sampled"))):
        used = {**run, **run.get(kind, {})}
        wanted = series(recorded, tuple(f"{name}_tokens" for name in names), steps)
        uniforms = series(recorded, draw_names, steps)
        if wanted is None or (kind == "sampled" and uniforms is None):
            continue
        tokens = [t.long().view(len(labels), -1) for t in wanted[1]]
        top_k, top_p = (1, None) if kind == "greedy" else (used.get("top_k") or None, used.get("top_p") or None)
        draws = None if uniforms is None or kind == "greedy" else [u.view(len(labels), -1) for u in uniforms[1]]
        ties = NearTies(tokens, make_filters(1.0, top_k, top_p), draws)
        guidance = make_guidance(1 + used.get("cfg", 1.5), "ramp")
        noise = Keyed.from_seeds(range(len(labels))) if draws is None else Recorded(
            {("token", k, 0): u for k, u in enumerate(draws)})
        drawn = system.start(system.label_rows(labels), guidance, noise)
        for _ in sample_steps(system, drawn, guidance, ties.filters, [ties]):
            k = drawn.cursor - 1
            # Behind a near-tie that fell the other way the two runs draw different pictures.
            if not checks.tokens(f"{wanted[0]}.{k}", drawn.tokens[k], ties.found[k]):
                break
        else:
            picture = (system.tokenizer.decode(drawn.canvas) + 1) / 2
            for name in names:
                checks.close(f"{name}_image", lambda picture=picture: picture)


def check_flexvar(golden: dict, recorded: dict[str, Tensor]) -> int:
    """Encoder, drafts, inputs, pictures of single drafts, positions, logits and loss, greedy and replayed sampling."""
    checks, run, made = Checks(golden, recorded), golden["run"], golden["constructor"]
    torch.manual_seed(0)
    system = FlexVAR(flexvar.published_config(made["vae"], made["var"])).eval()
    system.initialise()
    with torch.no_grad():
        checks.close("position_init", lambda: system.generator.position[:, :, :6, :5])
        weights = fill(golden)
        load_published(system, weights["vae"], weights["var"])
        plan, labels = Plan.scales(run["plan"]), recorded["labels"].long().view(-1, 1)
        latent, quantiser, steps = recorded["encoder_features"], system.tokenizer.quantiser, range(len(plan))
        if "image" in recorded:
            checks.close("encoder_features", lambda: system.tokenizer.latent(recorded["image"]))
        found = pyramid.encode(latent, Canvas.empty(plan, quantiser, len(latent)), lambda k, z: quantiser.quantise(z))
        for k in steps:
            checks.tokens(f"tokens.{k}", found.tokens[k], torch.zeros(found.tokens[k].numel(), dtype=torch.bool))
        tokens = [recorded[f"tokens.{k}"].long().view(len(latent), -1) for k in steps]
        replayed = pyramid.replay(tokens, Canvas.empty(plan, quantiser, len(latent)))
        checks.close("quantised", lambda: replayed.canvas.value)
        checks.close("var_input", lambda: torch.cat([r for r in replayed.reads if r is not None], 1))
        for k in steps:
            codes = quantiser.embed(tokens[k]).transpose(1, 2)
            draft = codes.reshape(len(latent), -1, *plan.steps[k].grid)
            checks.close(f"reconstruction.{k}", lambda draft=draft: system.tokenizer.decoder(
                system.tokenizer.from_latent(draft)))
        for side in (4, 5):
            checks.close(f"position.{side}", lambda side=side: system.generator.positions(
                Plan.scales([1, side]), 1, 2).transpose(1, 2).reshape(1, -1, side, side))
        condition = ClassCondition(system.labels, labels)
        logits = system.head(hidden_states(system, plan, replayed.reads, condition, ("conditional",)))
        checks.close("teacher_forced_logits", lambda: logits)
        checks.close("loss", lambda: teacher_forcing_loss(
            system.generator, system.head, plan, tokens, replayed.reads, system.labels(labels))[0].reshape(
                recorded["loss"].shape))
        for kind in ("greedy", "sampled"):
            replay_flexvar(checks, system, recorded, run[kind], kind, labels)
    return checks.failed


def replay_flexvar(checks: Checks, system: FlexVAR, recorded: dict[str, Tensor], used: dict, kind: str,
                   labels: Tensor) -> None:
    """Draw by the recorded uniforms, or greedily; compare tokens and the picture's first 64x64 pixels."""
    plan = Plan.scales(used["infer_patch_nums"])
    wanted = [recorded[f"{kind}_tokens.{k}"].long().view(len(labels), -1) for k in range(len(plan))]
    draws = [recorded[f"{kind}_uniform.{k}"].view(len(labels), -1) for k in range(len(plan))] \
        if f"{kind}_uniform.0" in recorded else None
    settings = flexvar.FlexVARSettings(1 + used["cfg"], top_k=used["top_k"] or None, top_p=used["top_p"] or None,
                                       largest=used["max_pn"])
    guidance, filters = system.guidance(settings), system.filters(settings)
    ties = NearTies(wanted, filters, draws)
    noise = Keyed.from_seeds(range(len(labels))) if draws is None else Recorded(
        {("token", k, 0): u for k, u in enumerate(draws)})
    drawn = system.start(labels, guidance, noise, plan)
    for _ in sample_steps(system, drawn, guidance, filters, [ties]):
        k = drawn.cursor - 1
        if not checks.tokens(f"{kind}_tokens.{k}", drawn.tokens[k], ties.found[k]):
            return
    latent = drawn.canvas.value
    checks.close(f"{kind}_image", lambda: system.tokenizer.decoder(
        system.tokenizer.from_latent(latent))[:, :, :64, :64])


def check_hmar(golden: dict, recorded: dict[str, Tensor]) -> int:
    """Both modules' inputs, logits and losses, and three generations round by round."""
    checks, run, made = Checks(golden, recorded), golden["run"], golden["constructor"]
    system = HMAR(hmar.published_config(made["vae"], made["hmar"])).eval()
    weights, labels = fill(golden), recorded["labels"].long().view(-1, 1)
    load_published(system, weights["vae"], weights["hmar"])
    plan, generator, head = system.plan, system.generator, system.head
    with torch.no_grad():
        check_tokenizer(checks, system, recorded)
        tokens = [recorded[f"tokens.{k}"].long().view(len(labels), -1) for k in range(len(plan))]
        canvas = Canvas.empty(plan, system.tokenizer.quantiser, len(labels))
        replayed = pyramid.replay(tokens, canvas)
        reads = [r for r in replayed.reads if r is not None]
        own = [resize(canvas.contribution(k, t), plan.steps[k].grid, "area").flatten(2).transpose(1, 2)
               for k, t in enumerate(tokens)][1:]
        checks.close("reconstruction", lambda: system.tokenizer.decode(replayed.canvas))
        checks.close("next_scale_input", lambda: torch.cat(reads, 1))
        checks.close("mask_input", lambda: torch.cat(own, 1))
        condition = ClassCondition(system.labels, labels)
        logits = head(hidden_states(system, plan, replayed.reads, condition, ("conditional",)))
        checks.close("next_scale_logits", lambda: logits)
        weight_L = torch.cat([torch.full((step.rows,), w / step.rows)
                              for w, step in zip(hmar.scale_weights(plan), plan, strict=True)])
        checks.close("loss_weight", lambda: weight_L[None])
        checks.close("next_scale_loss", lambda: system.loss(tokens, labels, 0.0)[0].reshape(
            recorded["next_scale_loss"].shape))
        hidden_L = torch.zeros(plan.length - 1, dtype=torch.bool)
        hidden_L[recorded["mask_positions"].flatten().long()] = True
        rows = teacher_forcing_call(generator, plan, replayed.reads, system.labels(labels)).rows
        first = generator.embed(plan, replayed.reads, rows.cond, 0, 1)
        rest = generator.embed_round(plan, torch.cat(reads, 1), torch.cat(own, 1), hidden_L.expand(len(labels), -1),
                                     rows.cond, 1, len(plan))
        call = Call(torch.cat([first, rest], 1), rows, slice(0, plan.length), round=1)
        logits = head.mask(generator(call, Context()))
        checks.close("mask_logits", lambda: logits)
        entropy = torch.nn.functional.cross_entropy(logits[:, 1:][:, hidden_L].flatten(0, 1),
                                                    torch.cat(tokens, 1)[:, 1:][:, hidden_L].flatten())
        checks.close("mask_loss", lambda: entropy.reshape(recorded["mask_loss"].shape))
        for kind in ("greedy", "sampled", "next_scale"):
            replay_hmar(checks, system, recorded, run[kind], kind, labels)
    return checks.failed


def replay_hmar(checks: Checks, system: HMAR, recorded: dict[str, Tensor], used: dict, kind: str,
                labels: Tensor) -> None:
    """Draw round by round, greedily or by the recorded uniforms; compare tokens, masks and the picture."""
    rounds = hmar.check_rounds(used.get("mask_schedule", ()), system.plan)
    settings = hmar.HMARSettings(1 + used["cfg"], top_k=used["top_k"] or None, top_p=used["top_p"] or None)
    draws = {("token", k, j): recorded[f"{kind}_uniform.{k}.{j}"].view(len(labels), -1)
             for k, counts in enumerate(rounds) for j in range(len(counts)) if f"{kind}_uniform.{k}.{j}" in recorded}
    guidance, filters = system.guidance(settings), system.filters(settings)
    noise = Recorded(draws) if draws else Keyed.from_seeds(range(len(labels)))
    seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    head = InRounds(system.head, rounds, lambda k, j, masked, sample: seen.update({(k, j): (masked, sample.tokens)}))
    for part in (system.head.next, system.head.mask):
        part.choose = likeliest if used["draw"] == "argmax" else type(part).choose.__get__(part)
    drawn = system.start(labels, guidance, noise)
    for _ in sample_steps(SimpleNamespace(generator=system.generator, head=head), drawn, guidance, filters):
        k = drawn.cursor - 1
        for j in range(len(rounds[k])):
            masked, tokens = seen[k, j]
            if f"{kind}_masked.{k}.{j}" in recorded:
                places = torch.stack([one.nonzero().flatten() for one in masked])
                checks.tokens(f"{kind}_masked.{k}.{j}", places, torch.zeros(places.numel(), dtype=torch.bool))
            if not checks.tokens(f"{kind}_tokens.{k}.{j}", tokens, torch.zeros(tokens.numel(), dtype=torch.bool)):
                return
    checks.close(f"{kind}_image", lambda: (system.tokenizer.decode(drawn.canvas) + 1) / 2)


def check_car(golden: dict, recorded: dict[str, Tensor]) -> int:
    """The control's pyramid and features, logits with it, without it and of a blank one, and three generations."""
    checks, run, made = Checks(golden, recorded), golden["run"], golden["constructor"]
    torch.manual_seed(0)
    system = CAR(car.published_config(made["vae"], made["car"])).eval()
    weights, labels = fill(golden), recorded["labels"].long().view(-1, 1)
    base, tower = car.split_published(weights["car"])
    load_published(system, weights["vae"], base, control=tower)
    plan, maps = system.plan, recorded["control_image"].permute(0, 3, 1, 2)
    with torch.no_grad():
        check_tokenizer(checks, system, recorded)
        for k, level in enumerate(system.control.pyramid(maps)):
            checks.close(f"control_pyramid.{k}", lambda level=level: level)
        for k, features in enumerate(system.control.encode(maps)):
            grid = plan.steps[k].grid
            checks.close(f"control_features.{k}", lambda f=features, grid=grid: f.transpose(1, 2).unflatten(2, grid))
        tokens = [recorded[f"tokens.{k}"].long().view(len(labels), -1) for k in range(len(plan))]
        reads = pyramid.replay(tokens, Canvas.empty(plan, system.tokenizer.quantiser, len(labels))).reads
        checks.close("var_input", lambda: torch.cat([r for r in reads if r is not None], 1))
        condition = ClassCondition(system.labels, labels)
        for name, hooks in (("tf_logits", [system.attach(maps)]), ("base_logits", []),
                            ("tf_logits_blank_control", [system.attach(torch.zeros_like(maps))])):
            checks.close(name, lambda hooks=hooks: system.head(
                hidden_states(system, plan, reads, condition, ("conditional",), hooks)))
        checks.close("tf_loss", lambda: system.loss(tokens, labels, 0.0, control=maps)[0].reshape(
            recorded["tf_loss"].shape))
        for kind, name, hooks in (("greedy", "greedy_tokens", [system.attach(maps)]),
                                  ("greedy", "greedy_tokens_no_control", []),
                                  ("sample", "sample_tokens", [system.attach(maps)])):
            replay_car(checks, system, recorded, run, kind, name, hooks, labels)
    return checks.failed


def replay_car(checks: Checks, system: CAR, recorded: dict[str, Tensor], used: dict, kind: str, name: str,
               hooks: list[Hook], labels: Tensor) -> None:
    """Draw greedily or by the recorded uniforms, with the control or without; compare tokens and the picture."""
    steps = range(len(system.plan))
    wanted = [recorded[f"{name}.{k}"].long().view(len(labels), -1) for k in steps]
    top_k, top_p, noise, draws = 1, None, Keyed.from_seeds(range(len(labels))), None
    if kind == "sample":
        draws = [recorded[f"sample_uniforms.{k}"].view(len(labels), -1) for k in steps]
        top_k, top_p, noise = used["top_k"], used["top_p"], Recorded({("token", k, 0): draws[k] for k in steps})
    ties = NearTies(wanted, make_filters(1.0, top_k, top_p), draws)
    guidance = make_guidance(1 + used["cfg"], "ramp")
    drawn = system.start(labels, guidance, noise)
    for _ in sample_steps(system, drawn, guidance, ties.filters, [*hooks, ties]):
        if not checks.tokens(f"{name}.{drawn.cursor - 1}", drawn.tokens[-1], ties.found[-1]):
            return
    if name == "greedy_tokens":
        checks.close("greedy_image", lambda: (system.tokenizer.decode(drawn.canvas) + 1) / 2)


def likeliest(logits: Tensor, uniform: Tensor, exact: bool = False) -> Sample:
    """The likeliest token that the filters left, with its probability among them."""
    log_prob, tokens = logits.float().log_softmax(-1).max(-1)
    return Sample(tokens, log_prob, log_prob.exp())


def check_m_var(golden: dict, recorded: dict[str, Tensor]) -> int:
    """As VAR's, with the loss, one Mamba layer's input and output, and the probabilities of drawn tokens."""
    checks, run, made = Checks(golden, recorded), golden["run"], golden["constructor"]
    system = MVAR(m_var.published_config(made["vae"], made["mvar"])).eval()
    weights, labels = fill(golden), recorded["labels"].long().view(-1, 1)
    load_published(system, weights["vae"], weights["mvar"])
    plan, seen = system.plan, {}
    with torch.no_grad():
        check_tokenizer(checks, system, recorded)
        hook = system.generator.blocks[0].mamba.register_forward_hook(
            lambda _, given, found: seen.update(mamba_in=given[0], mamba_out=found[0]))
        check_teacher_forcing(checks, system, recorded, labels)
        hook.remove()
        for name, found in seen.items():
            checks.close(name, lambda found=found: found)
        tokens = [recorded[f"tokens.{k}"].long().view(len(labels), -1) for k in range(len(plan))]
        checks.close("loss", lambda: system.loss(tokens, labels, 0.0)[0].reshape(recorded["loss"].shape))
        check_sampling(checks, system, recorded, run, labels.flatten().tolist())
        used = run["sampled"]
        guidance = make_guidance(1 + used["cfg"])
        filters = make_filters(1.0, used["top_k"] or None, used["top_p"] or None)
        drawn = system.start(labels, guidance, Keyed.from_seeds(range(len(labels))))
        for k in range(len(plan)):
            call = system.generator.call(drawn)
            hidden = evaluator(system.generator, drawn)(call)[:, call.predicts]
            outputs = system.head.outputs(hidden, drawn.branches)
            logits = system.head.distribution(outputs, drawn.at, guidance, filters)
            checks.close(f"sampled_probs.{k}", lambda logits=logits: logits.softmax(-1))
            drawn.force(recorded[f"sampled_tokens.{k}"].long().view(len(labels), -1))
    return checks.failed


def check_code_decoding(golden: dict, recorded: dict[str, Tensor]) -> int:
    """Both networks' teacher forcing, the run that is handed over, every call's logits, greedy and replayed tokens of
    two numbers of drafted scales, one model in both roles, and inpainting by known latents."""
    checks, run, made = Checks(golden, recorded), golden["run"], golden["constructor"]
    torch.manual_seed(0)
    weights, labels, systems = fill(golden), recorded["labels"].long().view(-1, 1), {}
    for role in ("drafter", "refiner"):
        systems[role] = load_published(VAR(published_config(made["vae"], made[role])).eval(), weights["vae"],
                                       weights[role])
    draft, refine = systems["drafter"], systems["refiner"]
    pair = code_decoding.pair(draft, refine, run["draft_steps"][0])
    plan = pair.plan
    with torch.no_grad():
        check_tokenizer(checks, pair, recorded)
        tokens = [recorded[f"tokens.{k}"].long().view(len(labels), -1) for k in range(len(plan))]
        empty = Canvas.empty(plan, pair.tokenizer.quantiser, len(labels))
        reads = pyramid.replay(tokens, empty).reads
        checks.close("tf_input", lambda: torch.cat(reads[1:], 1))
        for name, system, last in (*((f"n{n}.drafter_tf_logits", draft, n) for n in run["draft_steps"]),
                                   ("refiner_tf_logits", refine, len(plan))):
            first = replace(plan, steps=plan.steps[:last])
            checks.close(name, lambda system=system, first=first: system.head(hidden_states(
                system, first, reads[:len(first)], ClassCondition(system.labels, labels), ("conditional",))))
        latents = partial_canvases(tokens, empty)
        for k in range(len(plan)):
            checks.close(f"inpaint.known_latent.{k}", lambda k=k: latents[:, k])
        for n in run["draft_steps"]:
            replay_pair(checks, pair, recorded, run, f"n{n}.greedy", n, labels)
            replay_pair(checks, pair, recorded, run, f"n{n}.sample", n, labels)
        alike = code_decoding.pair(refine, refine, 1)
        for n in range(1, len(plan)):  # said once, where all agree
            quiet = checks if n == len(plan) - 1 else Checks({}, recorded, silent=True)
            for kind in ("plain.greedy", "plain.sample"):
                replay_pair(quiet, alike, recorded, run, kind, n, labels)
            checks.failed += quiet.failed if quiet is not checks else 0
        keep = covered_cells(recorded["inpaint.known"][:, 0] == 0, plan.grid).expand(len(labels), -1, -1, -1)
        replay_pair(checks, pair, recorded, run, "inpaint.greedy", run["inpaint"]["draft_steps"], labels,
                    [KnownLatent(latents, keep)])
    return checks.failed


def replay_pair(checks: Checks, pair: CollaborativeSystem, recorded: dict[str, Tensor], used: dict, name: str,
                draft_steps: int, labels: Tensor, hooks: Sequence[Hook] = ()) -> None:
    """Draw greedily or by the recorded uniforms, by both networks; compare what crosses the border, every call's
    logits, tokens and the picture."""
    where, kind = name.split(".")
    steps, settings = range(len(pair.plan)), used["identity"] if where == "plain" else used
    wanted = [recorded[f"{name}_tokens.{k}"].long().view(len(labels), -1) for k in steps]
    filters, draws, noise = make_filters(1.0, 1), None, Keyed.from_seeds(range(len(labels)))
    if kind == "sample":
        draws = [recorded[f"sample_uniform.{k}"].view(len(labels), -1) for k in steps]
        noise, top_k = Recorded({("token", k, 0): draws[k] for k in steps}), settings["top_k"]
        filters = make_filters(1.0, tuple(top_k) if isinstance(top_k, list) else top_k, settings["top_p"],
                               tuple(settings.get("temperature", ())), temperature_last=True)
    ties, calls = NearTies(wanted, filters, draws), []
    handles = [head.register_forward_hook(lambda _, given, found: calls.append((given[0], found)))
               for head in (pair.drafter.head, pair.head)]
    entry = []
    handles.append(pair.generator.register_forward_hook(lambda _, given, found: entry.append(found)))
    guidance = make_guidance(1 + used["cfg"], "ramp")
    drawn = pair.start(labels, guidance, noise)
    loop = sample_collaboratively(pair.drafter, pair, drawn, draft_steps, lambda c: replace(c, table=pair.labels),
                                  guidance, filters, [*hooks, ties])
    try:
        for _ in loop:
            k = drawn.cursor - 1
            if not checks.tokens(f"{name}_tokens.{k}", drawn.tokens[k], ties.found[k]):
                return
            if k == draft_steps - 1 and kind == "greedy":
                checks.close(f"{where}.hub", lambda: torch.cat(drawn.reads[1:], 1))
                checks.close(f"{where}.handed_latent", lambda: drawn.canvas.value)
    finally:
        for handle in handles:
            handle.remove()
    if kind == "greedy":
        for k in steps:
            role = "drafter" if k < draft_steps else "refiner"
            checks.close(f"{where}.{role}_logits.{k}", lambda k=k: calls[k][1])
        checks.close(f"{where}.entry_logits", lambda: pair.head(entry[0]))
        checks.close(f"{where}.greedy_image", lambda: (pair.tokenizer.decode(drawn.canvas) + 1) / 2)


def counted(check: Callable[[Checks, dict[str, dict[str, Tensor]], dict], None]
            ) -> Callable[[dict, dict[str, Tensor]], int]:
    """A check of another file, called with the checks, the weights and the golden set, as the others are called."""
    def run(golden: dict, recorded: dict[str, Tensor]) -> int:
        checks = Checks(golden, recorded)
        with torch.no_grad():
            check(checks, fill(golden), golden)
        return checks.failed

    return run


CHECKS = {"var": check_var, "flexvar": check_flexvar, "hmar": check_hmar, "m_var": check_m_var,
          "car": check_car, "code_decoding": check_code_decoding,
          "flowar": counted(flow_checks.check_flowar), "xar": counted(flow_checks.check_xar),
          "infinity": counted(bitwise_checks.check_infinity),
          "fastvar": counted(acceleration_checks.check_fastvar),
          "scalekv": counted(acceleration_checks.check_scalekv),
          "mar": counted(masked_checks.check_mar), "himar": counted(masked_checks.check_himar)}


archives.unpack()


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__)
        return 2
    path = Path(arguments[0])
    try:
        golden = json.loads(path.read_text(encoding="utf-8"))
        system = golden["system"]
        recorded = load_file(path.with_suffix(".safetensors"))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        print(f"{path}: can't be read as a golden set ({type(error).__name__}: {error})")
        return 2
    if system not in CHECKS:
        print(f"{path}: no check for system {system!r} yet; there are {', '.join(CHECKS)}")
        return 2
    try:
        failed = CHECKS[system](golden, recorded)
    except KeyError as error:
        print(f"{path}: the golden set lacks the field {error}")
        return 2
    except NextscaleError as error:
        print(f"MISS {path}: {error}")
        return 1
    print(f"{path.name}: {failed} missed" if failed else f"{path.name}: everything agrees")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
