"""How well samples follow a control: CAR and SCALAR on emoji-64, edges taken from samples again.

    python experiments/control_agreement.py train car --minutes 45       # resumes runs/control/car
    python experiments/control_agreement.py train scalar --minutes 45
    python experiments/control_agreement.py measure car scalar --count 256
    python experiments/control_agreement.py cost

``train`` trains the control part alone, the base stays as it is; minutes are of the processor's time. ``measure``
draws one picture for every one of some held-out pictures, with their labels and edges, and takes Canny's edges from
it: F1 against the picture's own edges, and against those of another picture (shuffled). The same for pictures drawn by
the shuffled edges, by none, and for the held-out pictures through the tokenizer, which no sample can be expected to
beat. It also gives held-out nats a token with the true, the shuffled and no control. ``cost`` counts multiplications
of one training pass of a picture.
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import nextscale
from nextscale import hub
from nextscale.context import Hook
from nextscale.data import open_dataset
from nextscale.data.controls import make_controls
from nextscale.data.sheets import save_image, sheet
from nextscale.evaluation.controls import edge_agreement
from nextscale.evaluation.sets import to_bytes
from nextscale.systems import folders
from nextscale.systems.controlled import ControlledSystem
from nextscale.training.generator_recipe import train_generator
from nextscale.training.recipes import read_recipe
from nextscale.training.token_recipe import training_tokens
from nextscale.training.tokenizer_recipe import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "control"


def train(system: str, minutes: float, steps: int | None, runs: Path) -> None:
    """Train a system's control, from where an earlier training stopped; both learn from one token cache."""
    recipe = read_recipe(f"emoji-64-{system}")
    recipe["train"] |= {"minutes": minutes, "clock": "processor", **({} if steps is None else {"steps": steps})}
    if not (runs / "tokens" / "train" / "manifest.json").is_file():
        make_tokens(recipe, runs)
    recipe["tokens"] = str(runs / "tokens")
    result = train_generator(recipe, runs / system, resume=True)
    print(f"{system}: {result.step} steps in {result.seconds / 60:.1f} minutes, {result.stopped}")


def make_tokens(recipe: dict[str, Any], runs: Path) -> None:
    """Tokens and Canny's edges of the emoji set, once."""
    from nextscale.configuration import build
    from nextscale.training.generator_recipe import GeneratorTraining

    wanted = build(GeneratorTraining, recipe, "recipe")
    training_tokens(wanted, load_tokenizer(ROOT / "runs" / "emoji-64"), runs, ("canny",))


def held_out(count: int) -> tuple[Tensor, list[tuple[int, ...]], Tensor]:
    """Pictures that no training saw, in [-1, 1], spread over the held-out concepts; their labels, their edges."""
    data = open_dataset("emoji", 64, "concept-test")
    places = torch.linspace(0, len(data) - 1, min(count, len(data))).long()
    pixels, _ = data.read(places.numpy())
    edges = torch.from_numpy(make_controls(pixels[:, :3], ["canny"]))
    labels = [tuple(row) for row in data.labels[places].tolist()]
    return torch.from_numpy(pixels[:, :3].copy()).float() / 127.5 - 1, labels, edges


def canny(pictures: Tensor) -> Tensor:
    """Canny's edges of pictures in [-1, 1], as they would be of the written file."""
    return torch.from_numpy(make_controls(to_bytes(pictures).numpy(), ["canny"]))


def measure(name: str, model: Path, count: int, scale: float | None) -> dict[str, Any]:
    """F1 of edges, exact and with a pixel of slack, and held-out nats; writes a sheet beside the model."""
    system = nextscale.load(str(model))
    assert isinstance(system, ControlledSystem)
    pictures, labels, edges = held_out(count)
    # Half way round the set: another concept, as a rule of another class.
    other = edges.roll(len(edges) // 2, 0)
    changes = {} if scale is None else {"control_scale": scale}
    tokens = system.encode(pictures)
    drawn = {"control": system.generate(labels, control=edges, output="torch", seed=1, **changes).images,
             "shuffled_control": system.generate(labels, control=other, output="torch", seed=1, **changes).images,
             "no_control": system.generate(labels, output="torch", seed=1).images,
             "reconstruction": system.decode(tokens)}
    found: dict[str, Any] = {"model": name, "pictures": len(labels), "control_scale": scale}
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


def cost(systems: list[str]) -> dict[str, Any]:
    """Multiplications of a teacher-forced pass of one picture, in units of the base's: the control's share of it, and
    weights. SCALAR's encoder is counted by itself, since it looks once a picture, whatever the steps."""
    found: dict[str, Any] = {}
    for name in systems:
        system = built(name)
        tokens = [torch.zeros(1, step.rows, dtype=torch.int64) for step in system.plan]
        maps = torch.zeros(1, 1, *system.tokenizer.picture_size, dtype=torch.uint8)

        def count(hooks: list[Hook], system: Any = system, tokens: list[Tensor] = tokens) -> int:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                system.hooked_loss(tokens, torch.zeros(1, len(system.config.classes), dtype=torch.int64), hooks, 0.0)
            return counter.get_total_flops()

        with FlopCounterMode(display=False) as looking, torch.no_grad():
            hook = system.attach(maps)
        base, whole = count([]), count([hook])
        weights = sum(p.numel() for p in system.control.parameters())
        trained = sum(p.numel() for p in system.generator.parameters())
        found[name] = {"base_multiplications": base // 2, "control_over_base": (whole - base) / base,
                       "encoder_over_base": looking.get_total_flops() / base, "control_weights": weights,
                       "control_weights_over_base": weights / trained}
    return found


def built(name: str) -> Any:
    """The system of emoji-64's size, with random control weights."""
    from nextscale.configuration import build

    kind = folders.system_type(name)
    config = folders.read_config(ROOT / "runs" / "emoji-64")
    control = build(type(kind.config_type().control), read_recipe(f"emoji-64-{name}")["control"], "recipe.control")
    shared = {"tokenizer": config.tokenizer, "generator": config.generator, "classes": config.classes}
    return kind(kind.config_type(**shared, control=control)).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=RUNS)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("system", choices=["car", "scalar"])
    training.add_argument("--minutes", type=float, default=45.0, help="over all its lives")
    training.add_argument("--steps", type=int, help="stop after so many steps")
    measuring = commands.add_parser("measure")
    measuring.add_argument("systems", nargs="+", choices=["car", "scalar"])
    measuring.add_argument("--count", type=int, default=256, help="held-out pictures")
    measuring.add_argument("--control-scale", type=float, help="guide by the control, too")
    commands.add_parser("cost")
    given = parser.parse_args()
    if given.command == "train":
        train(given.system, given.minutes, given.steps, given.runs)
    elif given.command == "cost":
        print(json.dumps(cost(["car", "scalar"]), indent=1))
    else:
        for name in given.systems:
            model = given.runs / name / "model"
            print(json.dumps(measure(name, model, given.count, given.control_scale), indent=1))


if __name__ == "__main__":
    main()
