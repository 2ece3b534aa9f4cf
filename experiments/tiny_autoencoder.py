"""FlowAR on a frozen published autoencoder: TAEF2, a tiny one for the latents of FLUX.2, beside one trained here.

    python experiments/tiny_autoencoder.py --taef2 taef2/taef2_encoder.pth --photos imagenet_sample256/sample.parquet \\
        --data cifar10/train.parquet --test cifar10/test.parquet --judge resnet20.safetensors \\
        --side-by-side runs/side-by-side --out runs/tiny-autoencoder

First what it keeps of photos of 256 pixels and of CIFAR-10's of 32: PSNR, and mean and standard deviation of its
latents. Then a FlowAR of the same size and time as experiments/side_by_side.py's learns its 4x4 latents of 32 channels
there, and is measured as that one is, whose latents have 8x8 cells of 16 channels.
"""
from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import side_by_side
import torch

from nextscale import hub
from nextscale.data import open_dataset
from nextscale.tokenizers.published import load_published, taesd_config
from nextscale.tokenizers.tokenizer import Tokenizer
from nextscale.training.tokenizer_recipe import save_tokenizer


@torch.no_grad()
def kept(tokenizer: Tokenizer, pictures: str, size: int, count: int) -> dict[str, float]:
    """PSNR of pictures through the autoencoder, in dB, and moments of its latents as the files have them."""
    data = open_dataset(pictures, size, "all")
    psnr, latents = [], []
    for at in range(0, min(count, len(data)), 50):
        shown = torch.from_numpy(data.read(range(at, min(at + 50, len(data))))[0]).float() / 127.5 - 1
        latent = tokenizer.latent(shown)
        psnr.append(10 * (4 / (tokenizer.decode(latent) - shown).square().flatten(1).mean(1)).log10())
        latents.append(latent.flatten() / tokenizer.config.latent_scale)
    values = torch.cat(latents)
    return {"psnr": float(torch.cat(psnr).mean()), "mean": float(values.mean()), "std": float(values.std())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--taef2", type=Path, required=True, help="the encoder's file; the decoder's lies beside it")
    parser.add_argument("--photos", required=True, help="photos of 256 pixels")
    parser.add_argument("--data", required=True, help="pictures of 32 pixels to train on")
    parser.add_argument("--test", required=True, help="pictures to measure against")
    parser.add_argument("--judge", required=True, help="safetensors of the ResNet-20")
    parser.add_argument("--side-by-side", type=Path, default=Path("runs/side-by-side"))
    parser.add_argument("--out", type=Path, default=Path("runs/tiny-autoencoder"))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--pictures", type=int, default=25_000, help="the first of the data, to train on")
    given = parser.parse_args()
    torch.set_num_threads(1)
    of_photos = load_published(Tokenizer(taesd_config()), given.taef2)
    found: dict[str, object] = {"photos": kept(of_photos, given.photos, 256, 50)}
    small = load_published(Tokenizer(taesd_config(side=32)), given.taef2)
    found["pictures"] = kept(small, given.test, 32, 1000)
    print(found, flush=True)
    folder = given.out / "tokenizers" / "taef2"
    if not (folder / "done.json").is_file():
        save_tokenizer(small, folder / "tokenizer")
        hub.save_json({"steps": 0}, folder / "done.json")
    side_by_side.FAMILIES["taef2"] = {"model": {"kind": "kl", "grids": [list(grid) for grid in small.config.grids]}}
    arm = replace(side_by_side.ARMS["flowar"], family="taef2")
    side_by_side.ARMS["flowar-taef2"] = arm
    where = side_by_side.parse(["--data", given.data, "--test", given.test, "--judge", given.judge, "--out",
                                str(given.out), "--minutes", str(given.minutes), "--pictures",
                                str(given.pictures)])
    # The steps that the other had in its time: a step's cost is mostly that of its rows, of which here are fewer.
    seconds = hub.read_json(given.side_by_side / "steps.json")["seconds"]["flowar"]
    result = side_by_side.run("flowar-taef2", arm, round(60 * given.minutes / seconds), where)
    print(side_by_side.table([hub.read_json(given.side_by_side / "flowar" / "result.json"), result]))
    hub.save_json(found, given.out / "figures.json")


if __name__ == "__main__":
    main()
