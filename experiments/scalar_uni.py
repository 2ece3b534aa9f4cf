"""What SCALAR-Uni gives up for taking several kinds of maps, and what it wins: mixes and kinds in each other's place.

    python experiments/control_agreement.py --data cifar10/ train scalar --name uni --minutes 12 \\
        --set control.freeze_backbone=false --set data.flip=false --set 'control.kinds=["canny", "lines", "small"]'
    python experiments/scalar_uni.py --data cifar10/ --count 256 --set temperature=0.3

The first command is for ``uni``, whose maps are the others' too; then the same trains ``canny``, ``lines`` and
``small``, each with the one kind that it is named for. What isn't there is left out. Measured on test pictures: how
much of the variance of the pictures' own features the alignment explains, R^2 = 1 - |F(E(I_c)) - E(I)|^2 /
|E(I) - mean|^2, beside what the best linear layer for all kinds explains, by least squares on 768 training pictures;
nats a token given the maps; and of samples, F1 of Canny's edges, and mean distances (of 255) of the line drawings and
the small pictures that are taken from the samples to those of the test pictures.
"""
from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from control_agreement import RUNS, SIZE
from torch import Tensor

import nextscale
from nextscale import hub
from nextscale.cli.train import read_override
from nextscale.data import open_dataset
from nextscale.data.controls import make_controls
from nextscale.data.sheets import save_image, sheet
from nextscale.evaluation.controls import edge_agreement
from nextscale.evaluation.sets import to_bytes
from nextscale.systems.scalar import SCALAR

KINDS = ("canny", "lines", "small")
Given = Mapping[str, str]
"""Which maps a row of the table gives: by kind, the picture's ``own`` or ``another`` one's."""

ROWS: list[tuple[str, Given]] = [
    *((kind, {kind: "own"}) for kind in KINDS), *(("uni", {kind: "own"}) for kind in KINDS),
    ("uni", {"canny": "own", "small": "own"}), ("uni", {"canny": "own", "lines": "own", "small": "own"}),
    ("uni", {"canny": "own", "small": "another"}), ("uni", {"canny": "another", "small": "own"}),
    *(("uni", {kind: "another"}) for kind in KINDS), ("uni", {})]


def maps_of(pixels: Tensor) -> dict[str, Tensor]:
    return {kind: torch.from_numpy(make_controls(pixels.numpy(), [kind])) for kind in KINDS}


def load(path: Path) -> SCALAR:
    system = nextscale.load(str(path))
    assert isinstance(system, SCALAR)
    return system


@torch.no_grad()
def explained(system: SCALAR, maps: Mapping[str, Tensor], pixels: Tensor) -> dict[str, float]:
    """R^2 of the alignment, for every kind."""
    wanted = system.control.look(pixels)
    variance = (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().mean()
    return {kind: float(1 - (system.control.mixed({kind: given}) - wanted).square().mean() / variance)
            for kind, given in maps.items()}


@torch.no_grad()
def best_explained(system: SCALAR, maps: Mapping[str, Tensor], pixels: Tensor, training: Tensor,
                   ridge: float = 1e-3) -> dict[str, float]:
    """R^2 of the one linear layer that least squares gives on training pictures, for every kind."""
    def rows(given: Tensor) -> Tensor:
        found = system.control.look(given).movedim(1, 3).flatten(0, 2).double()
        return torch.cat([found, torch.ones(len(found), 1, dtype=found.dtype)], 1)

    seen = torch.cat([rows(one) for one in maps_of(training).values()])
    wanted = rows(training)[:, :-1].repeat(len(maps), 1)
    regular = ridge * len(seen) * torch.eye(seen.shape[1], dtype=seen.dtype)
    layer = torch.linalg.solve(seen.T @ seen + regular, seen.T @ wanted)
    held_out = rows(pixels)[:, :-1]
    variance = (held_out - held_out.mean(0)).square().mean()
    return {kind: float(1 - (rows(given) @ layer - held_out).square().mean() / variance)
            for kind, given in maps.items()}


@torch.no_grad()
def measure(system: SCALAR, given: Given, maps: Mapping[str, Tensor], pixels: Tensor,
            labels: list[tuple[int, ...]], changes: dict[str, Any]) -> tuple[dict[str, float], Tensor]:
    """A row's figures, and its samples."""
    half = len(pixels) // 2  # half way round the set: another picture, as a rule of another class
    control = {kind: maps[kind] if whose == "own" else maps[kind].roll(half, 0) for kind, whose in given.items()}
    drawn = system.generate(labels, control=control or None, output="torch", seed=1, progress=False, **changes).images
    found = maps_of(to_bytes(drawn))
    tokens = system.encode(pixels.float() / 127.5 - 1)
    nats = sum(float(-system.log_prob([t[at] for t in tokens], labels[at], **(
        {"control": {kind: one[at] for kind, one in control.items()}} if control else {})).picture.sum())
        for at in (slice(i, i + 32) for i in range(0, len(labels), 32)))
    return {"nats": nats / len(labels) / system.plan.length, "canny": edge_agreement(found["canny"], maps["canny"]).f1,
            **{kind: float((found[kind].float() - maps[kind]).abs().mean()) for kind in ("lines", "small")}}, drawn


def table(found: list[dict[str, Any]]) -> str:
    lines = ["| model | maps | nats a token | Canny F1 | lines off by | small pictures off by |",
             "| --- | --- | ---: | ---: | ---: | ---: |"]
    for row in found:
        maps = " + ".join(kind if whose == "own" else f"another's {kind}" for kind, whose in row["maps"].items())
        lines.append(f"| {row['model']} | {maps or 'none'} | {row['nats']:.3f} | {row['canny']:.3f} | "
                     f"{row['lines']:.1f} | {row['small']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--data", type=Path, default=Path("cifar10"), help="folder of train.parquet and test.parquet")
    parser.add_argument("--count", type=int, default=256, help="test pictures")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="settings of the sampler")
    given = parser.parse_args()
    changes = dict(read_override(text) for text in given.set)
    test = open_dataset(str(given.data / "test.parquet"), SIZE)
    places = torch.arange(min(given.count, len(test)))
    pixels = torch.from_numpy(test.read(places.numpy())[0][:, :3].copy())
    labels = [tuple(row) for row in test.labels[places].tolist()]
    maps = maps_of(pixels)
    systems = {name: load(given.runs / name / "model") for name in dict(ROWS)
               if (given.runs / name / "model").is_dir()}
    training = open_dataset(str(given.data / "train.parquet"), SIZE).read(range(768))[0]
    for what, shares in (("the alignment", explained(systems["uni"], maps, pixels)), ("the best linear layer",
            best_explained(systems["uni"], maps, pixels, torch.from_numpy(training[:, :3].copy())))):
        print(f"R^2 of {what}:", ", ".join(f"{kind} {value:.3f}" for kind, value in shares.items()), flush=True)
    rows, shown = [], [pixels[:24]]
    for name, asked in ROWS:
        if name not in systems:
            continue
        figures, drawn = measure(systems[name], asked, maps, pixels, labels, changes)
        rows.append({"model": name, "maps": dict(asked), **figures})
        if name == "uni":
            shown.append(to_bytes(drawn[:24]))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    # A column a picture: itself, then what each row of the table drew.
    save_image(sheet(torch.cat(shown).float() / 127.5 - 1, columns=24), given.runs / "uni" / "rows.png")
    hub.save_json({"pictures": len(labels), "settings": changes, "rows": rows}, given.runs / "uni" / "rows.json")
    print(table(rows))


if __name__ == "__main__":
    main()
