"""What hooks save and what they change: arithmetic, memory, and agreement with the pictures of the same seeds without.

    python experiments/hook_agreement.py --hook "fastvar ratio=0.5" --hook "fastvar ratio=0.5 restore=zero"
    python experiments/hook_agreement.py --hook "fastvar ratio=0.5 + some-other setting=1" --model runs/mine/model

Each --hook is one contestant; + joins several hooks, the first innermost. Contestants draw the same labels with the
same seeds; the one without hooks comes first. Told of each:

- flops: of the network's and the output layer's products and attention, counted as they run, and the ratio to none;
- K/V: bytes of keys and values at the end, and the ratio; state: what else its memory holds (caches of the method);
- PSNR: of its pictures against those without, mean over pictures, dB; tokens: the share that is equal, of all steps
  and of the last one (steps that were left out don't count);
- nats: a token of held-out pictures' last step, with the true tokens before it (systems of categorical tokens only).
"""
from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

import nextscale
from nextscale.cli.options import make_hooks
from nextscale.context import Hook
from nextscale.data import open_dataset
from nextscale.errors import InputError, NextscaleError
from nextscale.evaluation.flops import counted_flops
from nextscale.heads.categorical import token_log_prob
from nextscale.noise import Keyed
from nextscale.objectives.reconstruction import psnr
from nextscale.run import Run
from nextscale.sampling.guidance import Unguided
from nextscale.sampling.steps import evaluator, prepare, walked


@torch.no_grad()
def draw(system: Any, labels: Sequence[Any], seed: int, hooks: Sequence[Hook]) -> tuple[Run, Tensor, int]:
    """A run to its end, its pictures in [-1, 1], and what the network computed."""
    used = system.settings_for("pictures", {})
    guidance = system.guidance(used)
    run = system.start(system.label_rows(labels), guidance, Keyed.from_seeds(range(seed, seed + len(labels))))
    with counted_flops() as flops:
        for _ in system.loop(run, guidance, used, hooks, None):
            pass
    return run, system.tokenizer.decode(run.canvas), flops.total


@torch.no_grad()
def nats(system: Any, pictures: Tensor, labels: Sequence[Any], hooks: Sequence[Hook]) -> float:
    """Nats a token of the last step, given the true tokens before it; NaN where it is left out.

    Raises InputError for a hook that acts on guided runs alone."""
    prepare(system, system.plan, hooks)
    tokens, guidance = system.encode(pictures), Unguided()
    if walked(system.plan, hooks) < len(system.plan):
        return math.nan
    run = system.start(system.label_rows(labels), guidance, Keyed.from_seeds(range(len(labels))))
    for given in tokens:
        call = system.generator.call(run)
        for hook in hooks:
            call = hook.inputs(run, call)
        hidden = evaluator(system.generator, run, hooks)(call)
        outputs = system.head.outputs(hidden[:, call.predicts], run.branches)
        logits = system.head.distribution(outputs, run.at, guidance)
        run.force(given)
    return -float(token_log_prob(logits, tokens[-1]).mean())


def measure(system: Any, texts: Sequence[str], count: int, held_out: int, seed: int, spec: str = "emoji",
            split: str = "concept-test") -> list[dict[str, Any]]:
    """The figures of every contestant, the one without hooks first."""
    classes, styles = system.config.classes[0], system.config.classes[1:]
    labels = [(i * classes // count, *(i % style for style in styles)) for i in range(count)]
    pictures = real = None
    if held_out and system.likelihood:
        data = open_dataset(spec, system.tokenizer.picture_size, split)
        places = torch.linspace(0, len(data) - 1, held_out).long()
        pictures = torch.from_numpy(data.read(places.numpy())[0][:, :3].copy()).float() / 127.5 - 1
        real = [tuple(row) for row in data.labels[places].tolist()]
    found: list[dict[str, Any]] = []
    for text in ("", *texts):
        hooks = make_hooks([part.strip() for part in text.split(" + ")]) if text else []
        run, images, flops = draw(system, labels, seed, hooks)
        kv = sum(group.length * (group.k[:, :, :1].nbytes + group.v[:, :, :1].nbytes)
                 for groups in run.memory.groups.values() for group in groups)
        if not found:
            base, base_images = run, images
        pairs, of_real = list(zip(run.tokens, base.tokens, strict=False)), math.nan
        with suppress(InputError):
            of_real = math.nan if pictures is None or real is None else nats(system, pictures, real, hooks)
        found.append({
            "hook": text or "none", "flops": flops, "kv": kv, "state": run.memory.bytes() - kv,
            "psnr": float(psnr(images, base_images).mean()) if text else math.nan,
            "tokens": float(torch.cat([a == b for a, b in pairs], 1).float().mean()),
            "last": float((pairs[-1][0] == pairs[-1][1]).float().mean()),
            "nats": of_real})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hook", action="append", default=[], required=True)
    parser.add_argument("--model", default="runs/emoji-64")
    parser.add_argument("--count", type=int, default=64, help="pictures to draw")
    parser.add_argument("--held-out", type=int, default=64, help="pictures for the nats; 0 for none")
    parser.add_argument("--data", default="emoji", help="held-out pictures, labelled as the model's")
    parser.add_argument("--split", default="concept-test", help="of the data")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    try:
        found = measure(nextscale.load(given.model), given.hook, given.count, given.held_out, given.seed,
                        given.data, given.split)
    except NextscaleError as error:
        print(f"hook_agreement: {error}", file=sys.stderr)
        return 2
    print("| hook | GFLOP | ratio | K/V, MB | ratio | state, MB | PSNR, dB | tokens | of the last step | nats |\n"
          "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in found:
        print(f"| {row['hook']} | {row['flops'] / 1e9:.2f} | {row['flops'] / found[0]['flops']:.3f} | "
              f"{row['kv'] / 1e6:.2f} | {row['kv'] / max(1, found[0]['kv']):.3f} | {row['state'] / 1e6:.2f} | "
              f"{row['psnr']:.2f} | {row['tokens']:.3f} | {row['last']:.3f} | {row['nats']:.4f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
