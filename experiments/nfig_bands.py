"""Which frequencies should a scale aim at? VAR's rule and NFIG's three, on one tokenizer and on ones of their own.

    python experiments/nfig_bands.py --out runs/nfig-bands                       # emoji-64's tokenizer, held-out emoji
    python experiments/nfig_bands.py --data cifar10/test.parquet --tokenizer runs/cifar-10-tokenizer/tokenizer --out ...
    python experiments/nfig_bands.py --data cifar10/train.parquet --steps 400 --out ...   # train one a rule, 32 pixels

Without --steps every rule codes the same pictures with the same trained weights, so that nothing but the rule differs;
these weights were trained for VAR's rule and favour it. With --steps a small tokenizer is trained for each rule on the
same pictures in the same order.

Told of each rule: how many of its bands hold no frequency at all; of the canvas after every scale its error against
the latent, the share of its energy beyond what the scale's grid can hold (the same ruler for all rules), and the error
of the picture it decodes to; PSNR of the whole; and of the tokens of every scale the entropy in bits (log2 of their
perplexity: it says how many codes a scale makes use of).
"""
from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

import nextscale
from nextscale import hub
from nextscale.canvas import Canvas
from nextscale.errors import InputError, NextscaleError
from nextscale.evaluation.reconstruction import code_usage
from nextscale.layers.frequency import band_gains, energy_above
from nextscale.objectives.reconstruction import psnr
from nextscale.tokenizers import pyramid
from nextscale.tokenizers.autoencoder import AutoencoderConfig
from nextscale.tokenizers.bands import band_edges, band_passes
from nextscale.tokenizers.config import Bands, TokenizerConfig
from nextscale.tokenizers.tokenizer import Tokenizer
from nextscale.training.config import TrainConfig
from nextscale.training.recipes import DataRecipe, open_splits, train_on
from nextscale.training.tokenizer import TokenizerRecipe, TokenizerTask
from nextscale.training.tokenizer_recipe import load_tokenizer

RULES: tuple[Bands, ...] = get_args(Bands)
SMALL = TokenizerConfig(AutoencoderConfig(32, (1, 2, 2), 1, 1, latent_width=16, attention="middle"),
                        tuple((s, s) for s in (1, 2, 3, 4, 6, 8)), 1024, codebook_update="ema", codebook_decay=0.97)


@torch.no_grad()
def measure(tokenizer: Tokenizer, pictures: Tensor) -> dict[str, Any]:
    """The figures of one rule on pictures (N, 3, S, S'), scale by scale."""
    tokenizer.eval()
    plan, bands = tokenizer.plan, tokenizer.config.bands
    scales = len(plan)
    latent_K, beyond_K, picture_K = torch.zeros(scales), torch.zeros(scales), torch.zeros(scales)
    ruler, tokens, whole, power = band_edges(plan.grids, "nyquist"), [], 0.0, 0.0
    for part in pictures.split(32):
        f, share, after = tokenizer.latent(part), len(part) / len(pictures), []

        def keep(k: int, z: Tensor, canvas: Canvas, after: list[Tensor] = after) -> None:
            after.append(canvas.value)

        canvas = Canvas.empty(plan, tokenizer.quantiser, len(part))
        tokens.append(pyramid.encode(f, canvas, lambda k, z: tokenizer.quantiser.quantise(z), each=keep).tokens)
        power += float(f.square().mean()) * share
        for k, value in enumerate(after):
            made = tokenizer.decode(value)
            latent_K[k] += (value - f).square().mean() * share
            beyond_K[k] += energy_above(value, ruler[k]).mean() * share
            picture_K[k] += (made - part).square().mean() * share
        whole += float(psnr(part, made).mean()) * share
    of_scale = code_usage([torch.cat(step) for step in zip(*tokens, strict=True)], tokenizer.config.vocabulary)[:-1]
    bins = [] if bands == "none" else band_gains(band_passes(plan.grids, bands)).sum((1, 2)).tolist()
    return {"bands": bands, "bins": bins, "empty": 0 if bands == "soft" else sum(n == 0 for n in bins),
            "latent_error": (latent_K / power).tolist(), "energy_beyond": beyond_K.tolist(),
            "picture_error": picture_K.tolist(), "psnr": whole,
            "entropy_bits": [math.log2(scale.perplexity) for scale in of_scale], "pictures": len(pictures)}


def under(tokenizer: Tokenizer, bands: Bands) -> Tokenizer:
    """The same weights under a rule."""
    other = Tokenizer(replace(tokenizer.config, bands=bands))
    other.load_state_dict(tokenizer.state_dict())
    return other


def trained(bands: Bands, data: DataRecipe, dataset: Any, train: TrainConfig, out: Path) -> Tokenizer:
    """A small tokenizer trained by a rule."""
    torch.manual_seed(train.seed)
    task = TokenizerTask(TokenizerRecipe(replace(SMALL, bands=bands), revive_every=20, revive_below=0.1))
    trainer, done = train_on(task, dataset, data, train, out, resume=True)
    if done.stopped == "signal":
        raise InputError(f"stopped in {bands!r} after step {done.step}; run the same command to go on")
    tokenizer = trainer.averaged_modules()["tokenizer"]
    assert isinstance(tokenizer, Tokenizer)
    return tokenizer


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown, a line a rule and a block a figure."""
    scales = len(results[0]["latent_error"])
    lines = ["| rule | empty bands | frequencies a band | PSNR, dB |", "| --- | ---: | --- | ---: |"]
    lines += [f"| {r['bands']} | {r['empty']} | {' '.join(f'{n:.0f}' for n in r['bins']) or 'all'} | {r['psnr']:.2f} |"
              for r in results]
    for key, title, form in (("latent_error", "Error of the latent after each scale, of its power", ".3f"),
                             ("energy_beyond", "Energy of the canvas beyond what the scale's grid can hold", ".3f"),
                             ("picture_error", "Mean squared error of the picture after each scale", ".4f"),
                             ("entropy_bits", "Entropy of the scale's tokens, bits", ".2f")):
        lines += ["", f"{title}:", "", "| rule | " + " | ".join(str(k + 1) for k in range(scales)) + " |",
                  "| --- |" + " ---: |" * scales]
        lines += [f"| {r['bands']} | " + " | ".join(format(v, form) for v in r[key]) + " |" for r in results]
    return "\n".join([*lines, "", f"{results[0]['pictures']} held-out pictures."]) + "\n"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="emoji", help="pictures, as `nextscale train tokenizer --data` takes them")
    parser.add_argument("--tokenizer", type=Path, help="folder of a trained tokenizer; emoji-64's otherwise")
    parser.add_argument("--out", type=Path, default=Path("runs/nfig-bands"))
    parser.add_argument("--steps", type=int, default=0, help="train a small tokenizer a rule for so many steps instead")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=500, help="pictures to measure")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    try:
        if given.steps and given.tokenizer:
            raise InputError("--tokenizer is a trained one and --steps trains others; give one of the two")
        torch.set_num_threads(given.threads)
        base = None
        if not given.steps:
            base = load_tokenizer(given.tokenizer) if given.tokenizer else nextscale.load("runs/emoji-64").tokenizer
        size = (base.picture_size if base else (32, 32))[0]
        data = DataRecipe(given.data, size, balanced=False, held_out=given.held_out)
        dataset, held_out = open_splits(data)
        if held_out is None:
            raise InputError(f"{given.data}: too few pictures to hold any out")
        places = torch.linspace(0, len(held_out) - 1, min(given.held_out, len(held_out))).long().tolist()
        pictures = torch.stack([held_out[i].picture for i in places]).float() / 127.5 - 1
        train = TrainConfig(steps=given.steps or 1, batch_size=given.batch_size, learning_rate=1e-3,
                            warmup_steps=min(50, given.steps // 4), final_learning_rate_ratio=0.02, weight_decay=0.01,
                            ema_decay=0.99, sample_every=0, checkpoint_every=200, keep_checkpoints=1)
        results = []
        for bands in RULES:
            made = under(base, bands) if base else trained(bands, data, dataset, train, given.out / bands)
            results.append(measure(made, pictures))
            print(f"{bands}: {results[-1]['psnr']:.2f} dB", flush=True)
        given.out.mkdir(parents=True, exist_ok=True)
        hub.save_json({"train": asdict(train) if given.steps else None, "results": results}, given.out / "result.json")
        (given.out / "table.md").write_text(table(results), encoding="utf-8")
    except NextscaleError as error:
        print(error, file=sys.stderr)
        return 2
    print((given.out / "table.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
