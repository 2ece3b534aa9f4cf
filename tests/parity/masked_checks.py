"""MAR and Hi-MAR against their recorded outputs."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nextscale.context import Context
from nextscale.layers.diffusion import (
    cosine_chain,
    denoised,
    diffuse,
    large_log_variance,
    learned_log_variance,
    reverse_step,
)
from nextscale.noise import Recorded
from nextscale.plan import Plan, Step, grid_cells
from nextscale.run import Run
from nextscale.sampling.diffusion import DiffusionSampling, JointDiffusionSampling
from nextscale.sampling.guidance import make_guidance
from nextscale.sampling.steps import sample_steps
from nextscale.systems import himar, mar
from nextscale.systems.folders import load_published
from nextscale.systems.himar import HiMAR, TwoPhases
from nextscale.systems.mar import MAR, Denoising
from nextscale.tokenizers import gaussian


def check_mar(checks: Any, weights: dict[str, dict[str, Tensor]], golden: dict[str, Any]) -> None:
    """Autoencoder, training pass with its losses, the head alone, single reverse steps, two generations."""
    recorded, run = checks.recorded, golden["run"]
    torch.manual_seed(0)
    system = MAR(mar.published_config(golden["constructor"]["vae"], golden["constructor"]["mar"])).eval()
    load_published(system, weights["vae"], weights["mar"])
    check_autoencoder(checks, system)
    chain, head = cosine_chain(), system.head
    time = recorded["head_t"].long()
    checks.close("head_xt", lambda: diffuse(chain, recorded["head_x0"], recorded["head_noise"], time))
    checks.close("head_out", lambda: torch.cat(head(recorded["head_xt"], time, recorded["head_z"]), -1))
    terms = head.terms(recorded["head_z"], recorded["head_x0"], time, recorded["head_noise"])
    checks.losses("head_mse", lambda: terms[0])
    checks.losses("head_vb", lambda: terms[1])
    check_mar_training(checks, system)
    check_steps(checks, system, run["onestep"])
    for name in ("gen_cfg", "gen_plain"):
        check_mar_generation(checks, system, name, run[name])


def check_autoencoder(checks: Any, system: MAR) -> None:
    recorded, tokenizer = checks.recorded, system.tokenizer
    if "image" not in recorded:  # left out of the trimmed set: the autoencoder has a set of its own
        return
    moments = recorded["vae_moments"]
    checks.close("vae_moments", lambda: tokenizer.moments(recorded["image"]))
    checks.close("vae_latent", lambda: tokenizer.quantiser.scaled(gaussian.draw(moments, recorded["vae_noise"])))
    checks.close("vae_kl", lambda: torch.stack([gaussian.divergence(one[None]) for one in moments]), 1e-3)
    checks.close("vae_decoded", lambda: tokenizer.decoder(tokenizer.from_latent(
        tokenizer.quantiser.unscaled(recorded["vae_latent"]))))


def check_mar_training(checks: Any, system: MAR) -> None:
    """The training pass with recorded masks, dropped labels, times and noises."""
    recorded, side = checks.recorded, system.plan.grid
    target = recorded["latents"].flatten(2).transpose(1, 2)
    checks.close("patches", lambda: target)
    masked = int(recorded["train_mask"][0].sum())
    orders = recorded["train_orders"].long()
    none = torch.zeros_like(recorded["train_mask"])
    checks.close("train_mask", lambda: none.scatter(1, orders[:, :masked], 1.0), 0.0)
    labels = torch.where(recorded["train_label_drop"].bool(), system.labels.sizes[0], recorded["labels"].long())
    order, length = raster_in(recorded["train_mask"].bool()), target.shape[1]
    known = length - masked
    cells = grid_cells(Step(side))[order]
    call = system.generator.call_of(pick(target, order[:, :known]), cells, system.labels(labels[:, None]), 0,
                                    slice(known, length))
    checks.close("encoder_out", lambda: system.generator.encode(call, Context(check=True)))
    z = unpick(system.generator(call, Context(check=True)), order)
    checks.close("z", lambda: z)
    draws = system.config.generator.head_draws
    time = recorded["train_t"].long().view(draws, len(target), length)
    noise = recorded["train_noise"].view(*time.shape, -1)
    squared, bits = system.head.terms(z[None], target[None], time, noise)
    checks.losses("train_mse", lambda: squared.flatten())
    checks.losses("train_vb", lambda: bits.flatten())
    checks.losses("train_loss", lambda: (squared + bits)[:, recorded["train_mask"].bool()].mean()[None])


def check_steps(checks: Any, system: MAR, run: dict[str, Any]) -> None:
    """One reverse step from every step of a respaced chain."""
    recorded, chain = checks.recorded, cosine_chain(int(run["num_sampling_steps"]))
    checks.require("timesteps_kept", chain.times, torch.tensor(run["timesteps_kept"]))
    index, x = torch.arange(len(chain)), recorded["step_x"]
    epsilon, share = system.head(x, chain.times, recorded["step_z"])
    checks.relative("step_pred_x0", lambda: denoised(chain, x, epsilon, index), 1e-4)
    checks.relative("step_sample", lambda: reverse_step(chain, x, epsilon, learned_log_variance(chain, share, index),
                                                recorded["step_noise"], index, run["temperature"]), 1e-4)


def check_mar_generation(checks: Any, system: MAR, name: str, given: dict[str, Any]) -> None:
    """A whole generation, its order and noise replayed."""
    recorded, grid = checks.recorded, system.plan.grid
    chain = cosine_chain(tuple(int(part) for part in given["num_sampling_steps"].split(",")))
    checks.require(f"{name}: timesteps_kept", chain.times, torch.tensor(given["timesteps_kept"]))
    used = mar.MARSettings(given["cfg"], given["cfg_schedule"], given["temperature"], given["num_iter"])
    plan, guidance = system.plan_for(used), make_guidance(given["cfg"], given["cfg_schedule"])
    checks.require(f"{name}: tokens_per_iteration", torch.tensor([step.rows for step in plan]),
                torch.tensor(given["tokens_per_iteration"]))
    draws = {}
    for k in range(len(plan)):
        draws["start", k, 0] = recorded[f"{name}.x_T.{k}"].unflatten(0, (len(given["labels"]), -1))
        for r, noise in enumerate(recorded[f"{name}.noise.{k}"]):
            draws["solver", k, r] = noise.unflatten(0, (len(given["labels"]), -1))
    run = system.start(system.label_rows(given["labels"]), guidance, Recorded(draws), plan,
                       drawn_order(recorded[f"{name}.orders"].long(), plan, grid))
    watch = Watched(DiffusionSampling(system.head, chain, given["temperature"]))
    scales = []
    for _ in sample_steps(Denoising(system.generator, watch), run, watch.spy(guidance, scales)):
        k = run.cursor - 1
        checks.close(f"{name}.z.{k}", lambda: watch.hidden[:run.pictures].flatten(0, 1))
        checks.close(f"{name}.tokens.{k}", lambda: run.tokens[k].flatten(0, 1), 2e-3)  # noqa: B023
    checks.close(f"{name}.latent", lambda: run.canvas.value, 2e-3)
    if given["cfg"] != 1:
        found = torch.tensor([1 + (given["cfg"] - 1) * guidance.share(at) for at in scales])
        checks.require(f"{name}: cfg_per_iteration", found.unique(), torch.tensor(given["cfg_per_iteration"]))


def check_himar(checks: Any, weights: dict[str, dict[str, Tensor]], golden: dict[str, Any]) -> None:
    """Both phases of the training pass with their losses, both heads, single reverse steps, a generation."""
    torch.manual_seed(0)
    system = HiMAR(himar.published_config({"ch": 32}, golden["constructor"]["himar"])).eval()
    load_published(system, generator=weights["himar"])
    checks.close("joint_position_table", lambda: system.head.joint.network.positions[::5])
    z_big = check_himar_training(checks, system)
    check_himar_generation(checks, system, golden["run"]["gen"])
    recorded, given = checks.recorded, golden["run"]["step"]
    chain, index = cosine_chain(250), torch.tensor(given["index"])
    checks.require("step: timesteps", chain.times[index], torch.tensor(given["timesteps"]))
    if "step_x" not in recorded:  # left out of the trimmed set, as are phase 1's noises
        return
    x = flat(recorded["step_x"])
    epsilon = system.head.joint(x, chain.times[index], z_big[:1].expand(len(x), -1, -1))
    checks.relative("step_pred_x0", lambda: as_map(denoised(chain, x, epsilon, index)), 1e-4)
    checks.relative("step_sample", lambda: as_map(reverse_step(
        chain, x, epsilon, large_log_variance(chain, x, index), flat(recorded["step_noise"]), index,
        given["temperature"])), 1e-4)


def check_himar_training(checks: Any, system: HiMAR) -> Tensor:
    """Both phases with recorded orders, masks, dropped labels, pivots, times and noises; phase 1's hidden states."""
    recorded, generator, coarse = checks.recorded, system.generator, system.generator.coarse
    small, big = flat(recorded["small_latents"]), flat(recorded["latents"])
    orders = recorded["train_orders"].long().split([coarse, big.shape[1]], 1)
    masks = [recorded[f"train_{name}_mask"] for name in ("small", "big")]
    masked = [int(masks[0][0, :coarse].sum()), int(masks[1][0, coarse:].sum())]
    empty = torch.zeros_like(masks[0])
    checks.close("train_small_mask", lambda: empty.scatter(1, orders[0][:, :masked[0]], 1.0).index_fill(
        1, torch.arange(coarse, empty.shape[1]), 1.0), 0.0)
    checks.close("train_big_mask", lambda: empty.scatter(1, orders[1][:, :masked[1]], 1.0), 0.0)
    checks.require("train_big_rate", torch.tensor(masked[1]), (big.shape[1] * recorded["train_big_rate"]).ceil()[0])
    conds = [system.labels(torch.where(drop.bool(), system.labels.sizes[0], recorded["train_labels"].long())[:, None])
             for drop in recorded["train_label_drop"]]
    order = raster_in(masks[0][:, :coarse].bool())
    call = generator.coarse_call(pick(small, order[:, :coarse - masked[0]]), grid_cells(Step(generator.small))[order],
                                 conds[0], 0, slice(coarse - masked[0], coarse))
    checks.close("encoder_small", lambda: generator.encode(call, Context(check=True)))
    z_small = system.coarse_hidden(small, order, masked[0], conds[0])
    checks.close("z_small", lambda: z_small)
    draws = system.config.generator.head_draws
    time = recorded["small_t"].long().view(draws, len(small), coarse)
    noise = recorded["small_noise"].view(*time.shape, -1)
    squared, bits = system.head.coarse.terms(z_small[None], small[None], time, noise)
    checks.losses("small_mse", lambda: squared.flatten())
    checks.losses("small_vb", lambda: bits.flatten())
    checks.close("small_head_out", lambda: torch.cat(system.head.coarse(diffuse(
        cosine_chain(), small[None], noise, time), time, z_small[None]), -1).flatten(0, 2))
    loss_0 = (squared + bits)[:, masks[0][:, :coarse].bool()].mean()
    pivots = system.pivots(z_small, order[:, coarse - masked[0]:], recorded["train_pivots_off"].bool())
    order = raster_in(masks[1][:, coarse:].bool())
    known = order[:, :big.shape[1] - masked[1]]
    call = generator.fine_call(pivots, pick(big, known), grid_cells(Step(generator.grid))[order], conds[1], 1)
    checks.close("encoder_big", lambda: generator.encode(call, Context(check=True))[:, :60])
    z_big = system.fine_hidden(big, order, masked[1], conds[1], pivots)
    checks.close("z_big", lambda: z_big)
    again = [torch.cat([t] * draws) for t in (z_big, big, masks[1][:, coarse:])]
    time, noise = recorded["big_t"].long(), flat(recorded["big_noise"])
    squared = system.head.joint.terms(again[0], again[1], time, noise) * again[2]
    checks.losses("big_mse", lambda: squared.mean(1))
    checks.close("big_head_out", lambda: as_map(system.head.joint(diffuse(cosine_chain(), again[1], noise, time), time,
                                                                 again[0])))
    checks.losses("train_losses", lambda: torch.stack([2 * loss_0, 0.75 * squared.mean()]))
    return z_big


def check_himar_generation(checks: Any, system: HiMAR, given: dict[str, Any]) -> None:
    """A whole generation of both phases, its order and noise replayed."""
    recorded, generator, coarse = checks.recorded, system.generator, system.generator.coarse
    chains = [cosine_chain(tuple(int(part) for part in given[name].split(","))) for name in
              ("small_steps", "joint_steps")]
    for chain, name in zip(chains, ("small_timesteps", "joint_timesteps"), strict=True):
        checks.require(f"gen: {name}", chain.times, torch.tensor(given[name]))
    used = himar.HiMARSettings(given["cfg"], given["cfg_schedule"], given["temperature"],
                               coarse_guidance_scale=given["re_cfg"], iterations=given["num_iter"],
                               coarse_iterations=4 * generator.small[0])
    plan, guidance, b = system.plan_for(used), system.guidance(used), len(given["labels"])
    steps = len(given["small_tokens_per_step"])
    checks.require("gen: tokens", torch.tensor([step.rows for step in plan]),
                   torch.tensor(given["small_tokens_per_step"] + given["joint_masked"]))
    checks.require("gen: guidance", torch.tensor(guidance.scales),
                   torch.tensor(given["small_cfg"] + given["joint_cfg"]))
    draws, rows = {}, 0
    for k, count in enumerate(given["small_tokens_per_step"]):
        here = slice(rows, rows + b * count)
        draws["start", k, 0] = recorded["gen.small_x_T"][here].unflatten(0, (b, count))
        for r in range(len(chains[0])):
            draws["solver", k, r] = recorded["gen.small_noise"][here, r].unflatten(0, (b, count))
        rows += b * count
    until = steps + given["num_iter"] * ("gen.joint_x_T.0" in recorded)
    for k in range(until - steps):
        draws["start", steps + k, 0] = flat(recorded[f"gen.joint_x_T.{k}"])
        for r, noise in enumerate(recorded[f"gen.joint_noise.{k}"]):
            draws["solver", steps + k, r] = flat(noise)
    order = recorded["gen.orders"].long()
    cells = [drawn_order(order[:, :coarse], Plan(plan.steps[:steps]), generator.small),
             grid_cells(Step(generator.grid))[(order[:, coarse:] - coarse).flip(1)]]
    run = system.start(system.label_rows(given["labels"]), guidance, Recorded(draws), plan, torch.cat(cells, 1))
    fine = Seen(system.head.joint, chains[1], given["temperature"])
    small = Watched(DiffusionSampling(system.head.coarse, chains[0], given["temperature"]))
    model = Denoising(generator, TwoPhases(generator, small, fine))
    pivots = torch.zeros_like(recorded["gen.pivots"])
    tokens = []
    for _ in sample_steps(model, run, guidance, until=until):
        k = run.cursor - 1
        if k < steps:
            places = (cells[0][:, k, 1] * generator.small[1] + cells[0][:, k, 2])[:, None]
            pivots = pivots.scatter(1, places[..., None].expand(-1, -1, pivots.shape[-1]), small.hidden[:b])
            tokens.append(run.tokens[k].flatten(0, 1))
            continue
        if k == steps:
            checks.close("gen.z_first", lambda: first_hidden(fine.hidden), 1e-3)
        checks.close(f"gen.joint_mask.{k - steps}", lambda: fine.masked.unflatten(1, generator.grid), 0.0)
        checks.relative(f"gen.joint_out.{k - steps}", lambda: as_map(fine.map), 3e-3)
    checks.close("gen.pivots", lambda: pivots, 1e-3)
    checks.relative("gen.small_tokens", lambda: torch.cat(tokens), 3e-3)
    found = system.tokens_of(run)
    checks.relative("gen.small_latent", lambda: as_map(found[0]), 3e-3)
    checks.relative("gen.latent", lambda: as_map(found[1]), 3e-3)
    if until == steps:
        call = generator.call(run)
        hidden = generator(call, Context())[:, call.predicts]
        places = generator.raster(run.order[:, coarse:coarse + hidden.shape[1]]).repeat(len(run.branches), 1)
        checks.close("gen.z_first", lambda: first_hidden(unpick(hidden, places)), 1e-3)


def first_hidden(rows_BLC: Tensor) -> Tensor:
    """Every fourth row and column of hidden states, as recorded."""
    return as_map(rows_BLC)[:, :, ::4, ::4]


class Seen(JointDiffusionSampling):
    """Keeps the last hidden states, masks and whole map."""

    def draw(self, hidden_RLD: Tensor, run: Run, *rest: Any) -> Tensor:
        self.hidden, self.masked = hidden_RLD, self.masked_cells(run)
        self.map = super().draw(hidden_RLD, run, *rest)
        return self.map


def flat(map_BCHW: Tensor) -> Tensor:
    """A map as rows (B, H W, C)."""
    return map_BCHW.flatten(2).transpose(1, 2)


def as_map(rows_BLC: Tensor) -> Tensor:
    """Rows of a square map as a map."""
    side = round(rows_BLC.shape[1] ** 0.5)
    return rows_BLC.transpose(1, 2).unflatten(2, (side, side))


class Watched:
    """A head that keeps the last hidden states that it was given, and where its guidance stood."""

    def __init__(self, head: Any):
        self.head = head

    def sample(self, evaluate: Any, call: Any, run: Run, *rest: Any, **options: Any) -> Any:
        def keeping(call: Any) -> Tensor:
            hidden = evaluate(call)
            self.call, self.hidden = call, hidden[:, call.predicts]
            return hidden

        return self.head.sample(keeping, call, run, *rest, **options)

    @staticmethod
    def spy(guidance: Any, seen: list) -> Any:
        def guided(outputs: dict[str, Tensor], at: Any) -> Tensor:
            seen.append(replace(at, time=0.0, round=0))
            return guidance(outputs, at)

        return guided


def drawn_order(order_BL: Tensor, plan: Plan, grid: tuple[int, int]) -> Tensor:
    """Cells by the published order, whose tail is drawn first; those of one step in raster order."""
    last_first = order_BL.flip(1)
    steps = [last_first[:, s.lo:s.hi].sort(1)[0] for s in plan.spans(0, len(plan))]
    return grid_cells(Step(grid))[torch.cat(steps, 1)]


def raster_in(masked_BL: Tensor) -> Tensor:
    """Raster numbers, (B, L), of the known cells and then of the masked ones."""
    return masked_BL.long().argsort(dim=1, stable=True)


def pick(values_BLC: Tensor, place_BN: Tensor) -> Tensor:
    return values_BLC.gather(1, place_BN[..., None].expand(-1, -1, values_BLC.shape[-1]))


def unpick(values_BLC: Tensor, place_BL: Tensor) -> Tensor:
    """Values in raster order again."""
    return torch.zeros_like(values_BLC).scatter(1, place_BL[..., None].expand_as(values_BLC), values_BLC)
