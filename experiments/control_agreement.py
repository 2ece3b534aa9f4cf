"""How well samples follow a control: CAR and SCALAR on a VAR of CIFAR-10, edges taken from samples again.

    python experiments/control_agreement.py --data cifar10/ train car --minutes 45       # resumes runs/control/car
    python experiments/control_agreement.py --data cifar10/ train scalar --minutes 45
    python experiments/control_agreement.py --data cifar10/ measure car scalar --count 512 --set temperature=0.3
    python experiments/control_agreement.py cost [--size car-d16]

``--data`` is the folder of CIFAR-10's train.parquet and test.parquet, ``--base`` the VAR of recipe cifar-10-generator.
``train`` trains the control part alone, the base stays as it is; minutes are of the processor's time. ``measure``
draws one picture for every one of some test pictures, with their labels and edges, and takes Canny's edges from it: F1
against the picture's own edges, and against those of another picture (shuffled). The same for pictures drawn by the
shuffled edges, by none, and for the test pictures through the tokenizer, which no sample can be expected to beat. It
also gives nats a token of the test pictures with the true, the shuffled and no control. ``cost`` counts multiplications
of one training pass of a picture (``evaluation.flops``).
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nextscale
from nextscale import hub
from nextscale.cli.train import override, read_override
from nextscale.configuration import build
from nextscale.data import open_dataset
from nextscale.data.controls import make_controls
from nextscale.data.sheets import save_image, sheet
from nextscale.evaluation.controls import edge_agreement
from nextscale.evaluation.flops import counted_flops
from nextscale.evaluation.sets import to_bytes
from nextscale.systems import folders
from nextscale.systems.controlled import ControlledSystem
from nextscale.training.generator_recipe import GeneratorTraining, train_generator
from nextscale.training.recipes import read_recipe
from nextscale.training.token_recipe import training_tokens
from nextscale.training.tokenizer_recipe import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "control"
SIZE = 32


def recipe_of(system: str, base: Path, data: Path | None = None) -> dict[str, Any]:
    """The recipe of one's own pictures for CIFAR-10's 32 pixels, 4 a cell."""
    recipe = read_recipe(f"own-64-{system}")
    recipe["start"] = str(base)
    recipe["data"] |= {"spec": str((data or Path()) / "train.parquet"), "size": SIZE, "held_out": 500}
    recipe["train"] |= {"batch_size": 32, "sample_every": 0}
    if system == "car":
        recipe["control"]["widths"] = [16, 32, 64]
    return recipe


def train(system: str, base: Path, data: Path, minutes: float, changes: list[str], out: Path) -> None:
    """Train a system's control, from where an earlier training stopped; all learn from one token cache, whose maps are
    those of the first training."""
    recipe = recipe_of(system, base, data)
    recipe["train"] |= {"minutes": minutes, "clock": "processor"}
    for change in changes:
        override(recipe, *read_override(change))
    runs = out.parent
    if not (runs / "tokens" / "train" / "manifest.json").is_file():
        control = build(type(folders.system_type(system).config_type().control), recipe["control"], "recipe.control")
        training_tokens(build(GeneratorTraining, recipe, "recipe"), load_tokenizer(base), runs, control.cached)
    recipe["tokens"] = str(runs / "tokens")
    result = train_generator(recipe, out, resume=True)
    print(f"{out.name}: {result.step} steps in {result.seconds / 60:.1f} minutes, {result.stopped}")


def held_out(data: Path, count: int) -> tuple[Tensor, list[tuple[int, ...]], Tensor]:
    """The first test pictures, in [-1, 1]; their labels, their edges."""
    test = open_dataset(str(data / "test.parquet"), SIZE)
    places = torch.arange(min(count, len(test)))
    pixels, _ = test.read(places.numpy())
    edges = torch.from_numpy(make_controls(pixels[:, :3], ["canny"]))
    labels = [tuple(row) for row in test.labels[places].tolist()]
    return torch.from_numpy(pixels[:, :3].copy()).float() / 127.5 - 1, labels, edges


def canny(pictures: Tensor) -> Tensor:
    """Canny's edges of pictures in [-1, 1], as they would be of the written file."""
    return torch.from_numpy(make_controls(to_bytes(pictures).numpy(), ["canny"]))


def measure(name: str, model: Path, data: Path, count: int, changes: dict[str, Any]) -> dict[str, Any]:
    """F1 of edges, exact and with a pixel of slack, and held-out nats; writes a sheet beside the model."""
    system = nextscale.load(str(model))
    assert isinstance(system, ControlledSystem)
    pictures, labels, edges = held_out(data, count)
    # Half way round the set: another concept, as a rule of another class.
    other = edges.roll(len(edges) // 2, 0)
    tokens = system.encode(pictures)
    drawn = {"control": system.generate(labels, control=edges, output="torch", seed=1, **changes).images,
             "shuffled_control": system.generate(labels, control=other, output="torch", seed=1, **changes).images,
             "no_control": system.generate(labels, output="torch", seed=1, **{
                 name: value for name, value in changes.items() if name != "control_scale"}).images,
             "reconstruction": system.decode(tokens)}
    found: dict[str, Any] = {"model": name, "pictures": len(labels), "settings": changes}
    for kind, images in drawn.items():
        ours = canny(images)
        for against, asked in (("true", edges), ("shuffled", other)):
            for slack in (0, 1):
                found[f"{kind}/{against}/f1_slack{slack}"] = edge_agreement(ours, asked, slack).f1
    for against, control in (("true", edges), ("shuffled", other), ("none", None)):
        total = sum(float(-system.log_prob([t[at] for t in tokens], labels[at], **(
            {} if control is None else {"control": control[at]})).picture.sum())
            for at in (slice(i, i + 32) for i in range(0, len(labels), 32)))
        found[f"nats_per_token/{against}"] = total / len(labels) / system.plan.length
    shown = torch.stack([edges[:32].expand(-1, 3, -1, -1).float() / 127.5 - 1, drawn["control"][:32],
                         pictures[:32]], 1).flatten(0, 1)
    save_image(sheet(shown, columns=12), model.parent / "agreement.png")
    hub.save_json(found, model.parent / "agreement.json")
    return found


@torch.no_grad()
def cost(system: Any) -> dict[str, Any]:
    """Multiplications of a teacher-forced pass of one picture, in units of the base's: what the control adds to it, and
    what its encoder takes to look at the map, once a picture, whatever the steps."""
    tokens = [torch.zeros(1, step.rows, dtype=torch.int64) for step in system.plan]
    labels = torch.zeros(1, len(system.config.classes), dtype=torch.int64)
    maps = torch.zeros(1, 1, *system.tokenizer.picture_size, dtype=torch.uint8)
    found = []
    for hooked in (False, True):
        with counted_flops() as flops:
            system.hooked_loss(tokens, labels, [system.attach(maps)] if hooked else [], 0.0)
        found.append(flops.total)
    with counted_flops() as looking:
        system.attach(maps)
        if system.config.slug == "car":  # whose hook looks where it is first asked for what it saw
            system.control.encode(maps)
    alone, added = found[0], found[1] - found[0]
    weights = sum(p.numel() for p in system.control.parameters())
    trained = sum(p.numel() for p in system.generator.parameters())
    return {"base_multiplications": alone // 2, "control_over_base": (added - looking.total) / alone,
            "encoder_over_base": looking.total / alone, "together_over_base": added / alone,
            "control_weights": weights, "control_weights_over_base": weights / trained}


def built(name: str, base: Path) -> Any:
    """The system on that base, with random control weights."""
    kind = folders.system_type(name)
    config = folders.read_config(base)
    control = build(type(kind.config_type().control), recipe_of(name, base)["control"], "recipe.control")
    shared = {"tokenizer": config.tokenizer, "generator": config.generator, "classes": config.classes}
    return kind(kind.config_type(**shared, control=control)).eval()


def preset(name: str) -> Any:
    """A published size, with whatever was in memory for weights."""
    config = folders.model_config(name)
    if config is None:
        raise SystemExit(f"{name!r} is no published size; `nextscale models` lists them")
    with hub.WithoutInitialisation():
        return folders.build_system(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--data", type=Path, default=Path("cifar10"), help="folder of train.parquet and test.parquet")
    parser.add_argument("--base", type=Path, default=ROOT / "runs" / "cifar-10-generator" / "model")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("system", choices=["car", "scalar"])
    training.add_argument("--name", help="folder in --runs, the system's by default")
    training.add_argument("--minutes", type=float, default=45.0, help="over all its lives")
    training.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="other values of the recipe")
    measuring = commands.add_parser("measure")
    measuring.add_argument("systems", nargs="+", choices=["car", "scalar"])
    measuring.add_argument("--count", type=int, default=512, help="test pictures")
    measuring.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                           help="other settings of the sampler, such as temperature=0.3 or control_scale=3")
    costing = commands.add_parser("cost")
    costing.add_argument("--size", help="a published one, such as car-d16, in the place of both on --base")
    given = parser.parse_args()
    if given.command == "train":
        train(given.system, given.base, given.data, given.minutes, given.set, given.runs / (given.name or given.system))
    elif given.command == "cost":
        systems = [preset(given.size)] if given.size else [built(name, given.base) for name in ("car", "scalar")]
        print(json.dumps({given.size or system.config.slug: cost(system) for system in systems}, indent=1))
    else:
        for name in given.systems:
            model = given.runs / name / "model"
            changes = dict(read_override(text) for text in given.set)
            print(json.dumps(measure(name, model, given.data, given.count, changes), indent=1))


if __name__ == "__main__":
    main()
