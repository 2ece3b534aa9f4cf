"""How many drafts should a training step of FlexVAR's tokenizer decode? Tokenizers of equal time, draft by draft.

    python experiments/flexvar_drafts.py --data cifar10/train.parquet --test cifar10/test.parquet \\
        --judge resnet20.safetensors --side-by-side runs/side-by-side --out runs/flexvar-drafts --drafts 0 1 3

The tokenizer of experiments/side_by_side.py (``drafts``: the last scale and one more a step, taken from there where it
is trained) and others that decode none or several of the coarser scales, each trained for the same time of a core, as
training goes on from where it stopped. Then, on test pictures: PSNR of every scale's decoding against the picture at
its size, and the Fréchet distance of the last.
"""
from __future__ import annotations

import argparse
from pathlib import Path

import side_by_side
import torch
from behaviour import Judged

from nextscale import hub
from nextscale.canvas import Canvas
from nextscale.layers.resize import resize
from nextscale.tokenizers.tokenizer import Tokenizer
from nextscale.training.tokenizer_recipe import load_tokenizer


def name_of(drafts: int) -> str:
    """A tokenizer's folder."""
    return "drafts" if drafts == 1 else f"drafts-{drafts}"


@torch.no_grad()
def figures(tokenizer: Tokenizer, judged: Judged) -> dict[str, list[float] | float]:
    """PSNR of every scale alone, in dB, and the distance of the last scale's pictures."""
    errors, last = [[] for _ in tokenizer.plan], []
    for part in judged.pictures.split(250):
        canvas = Canvas.empty(tokenizer.plan, tokenizer.quantiser, len(part))
        for k, given in enumerate(tokenizer.encode(part).tokens):
            canvas = canvas.write(k, given)
            shown = tokenizer.decode(canvas)
            small = resize(part, shown.shape[-2:], "area")
            errors[k].append((shown - small).square().flatten(1).mean(1))
        last.append(shown)
    psnr = [float((4 / torch.cat(parts)).log10().mean()) * 10 for parts in errors]
    return {"psnr": psnr, "frechet": judged.distance(torch.cat(last))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="pictures to train on")
    parser.add_argument("--test", required=True, help="pictures to measure against")
    parser.add_argument("--judge", required=True, help="safetensors of the ResNet-20")
    parser.add_argument("--side-by-side", type=Path, default=Path("runs/side-by-side"))
    parser.add_argument("--drafts", type=int, nargs="+", default=[0, 1, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/flexvar-drafts"))
    given = parser.parse_args()
    judged = Judged(given.test, given.judge, 1000)
    found = {}
    for drafts in given.drafts:
        side_by_side.FAMILIES[name_of(drafts)] = {**side_by_side.FAMILIES["drafts"], "drafts": drafts}
        out = given.side_by_side if drafts == 1 else given.out
        where = side_by_side.parse(["--data", given.data, "--out", str(out)])
        torch.set_num_threads(where.threads)
        folder = side_by_side.tokenizer_of(name_of(drafts), where)
        found[drafts] = {**figures(load_tokenizer(folder).eval(), judged),
                         "steps": hub.read_json(folder.parent / "done.json")["steps"]}
        psnr = " | ".join(f"{value:.2f}" for value in found[drafts]["psnr"])
        print(f"| {drafts} | {found[drafts]['steps']} | {psnr} | {found[drafts]['frechet']:.1f} |", flush=True)
    hub.save_json(found, given.out / "figures.json")


if __name__ == "__main__":
    main()
