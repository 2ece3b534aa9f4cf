"""LiteVAR on emoji-64: what its three parts leave out, and what they change.

    python experiments/litevar_emoji.py count                       # pairs at 256, 512, 1024 pixels, bytes; no weights
    python experiments/litevar_emoji.py draw [--pictures 32]        # pictures of emoji-64 beside those without
    python experiments/litevar_emoji.py load [--pictures 32]        # the same for models loaded as bf16 and int8
    python experiments/litevar_emoji.py round [--pictures 64]       # likelihood of held-out emoji, rounded weights
    python experiments/litevar_emoji.py calibrate --budgets 0.2:0.1,0.3:0.1

``count``: the share of attention's (query, key) pairs that windows of some reach leave, of a whole plan and of its last
step, the share of 128 x 128 blocks of the last step that hold any of them (what a block-sparse kernel computes), and
the bytes of a var-d16's network. ``draw``: PSNR and equal tokens of pictures of the same seeds, and, for the very
tokens of the pictures without the hook, how far the guided logits are (``litevar.output_error``) and what a token's
log-probability loses. ``round``: nats a token of held-out emoji. ``calibrate``: what ``Calibration`` finds from 8
pictures, and the figures of ``draw`` for it.
"""
from __future__ import annotations

import argparse
import copy
import io
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import torch
from PIL import Image
from torch import Tensor

import nextscale
from nextscale.acceleration.litevar import Calibration, LiteVAR, output_error, quantise, window_of
from nextscale.data.emoji_set import emoji_set_path
from nextscale.layers.attention import block_mask
from nextscale.layers.memory import Tags
from nextscale.layers.quantised import weight_bytes
from nextscale.plan import Plan
from nextscale.systems import folders
from nextscale.systems.var import PLANS

KINDS = ("attention.qkv", "attention.projection", "mlp.expand", "mlp.contract")
ROUNDED: tuple[tuple[str, dict[str, Any]], ...] = (
    *((f"W{w}A{a}{' a tensor' if whole else ''}{', fc2 too' if fc2 else ''}",
       {"bits": w, "activation_bits": a, "per_tensor": whole, **({"keep": ()} if fc2 else {})})
      for w, a in ((8, 8), (6, 6), (4, 8)) for whole in (False, True) for fc2 in (False, True)),
    ("weights of 8 bits alone", {}), ("weights of 8 bits alone, fc2 too", {"keep": ()}),
    ("weights of 4 bits alone", {"bits": 4}),
    *((f"W6A6 of {kind} alone", {"bits": 6, "activation_bits": 6, "keep": tuple(k for k in KINDS if k != kind)})
      for kind in KINDS))


def labels_of(system: Any, count: int) -> list[Any]:
    """Labels spread over classes and styles."""
    classes, styles = system.config.class_names
    return [(classes[7 * i % len(classes)], styles[i % len(styles)]) for i in range(count)]


def held_out(count: int) -> tuple[Tensor, list[Any]]:
    """Held-out emoji spread over the set, in [-1, 1], and their labels."""
    table = parquet.read_table(emoji_set_path())
    rows = [i for i, split in enumerate(table["concept_split"].to_pylist()) if split == "test"]
    rows = rows[::max(1, len(rows) // count)][:count]
    found = [np.asarray(Image.open(io.BytesIO(table["image"][i].as_py()["bytes"])).convert("RGB")) for i in rows]
    labels = [(table["class"][i].as_py(), table["style"][i].as_py()) for i in rows]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 127.5 - 1, labels


def count(given: argparse.Namespace) -> None:
    print("| pixels | reach | pairs | of the last step | blocks of the last step | with half of the blocks sharing |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for size, sides in PLANS.items():
        plan = Plan.scales(sides)
        last, all_rows = plan.span(len(plan) - 1, len(plan)), plan.steps[-1].rows * plan.length
        tags = Tags(plan.step_of_row[None], plan.cells[None])
        query = Tags(tags.step[:, last], tags.cell[:, last])
        for reach in (1.0, 0.5, 0.25, 0.2, 0.15, 0.1):
            window = window_of(plan.grids, (reach,) * len(plan), 4)
            blocks = block_mask(window.sees, query, tags)
            counted = blocks.kv_num_blocks.sum() + (0 if blocks.full_kv_num_blocks is None
                                                    else blocks.full_kv_num_blocks.sum())
            share = int(counted) / (-(-len(query) // 128) * -(-len(tags) // 128))
            pairs = window.pairs(plan)
            both = LiteVAR(window=reach, share=tuple(range(8))).cost(plan, 16)
            print(f"| {size} | {reach} | {sum(pairs) / plan.pairs:.3f} | {pairs[-1] / all_rows:.3f} | {share:.2f} | "
                  f"{both.pairs / both.all_pairs:.3f} |")
    print("\nShare of the pairs by scale, reach 0.2:")
    for size, sides in PLANS.items():
        plan = Plan.scales(sides)
        shown = window_of(plan.grids, (0.2,) * len(plan), 4).pairs(plan)
        print(f"{size}:", *(f"{n / (step.rows * end):.2f}"
                            for n, step, end in zip(shown, plan, plan.starts[1:], strict=True)))
    print("\n| var-d16's network | bytes | of bf16's |\n| --- | ---: | ---: |")
    config = folders.model_config("var-d16")
    assert config is not None
    whole = 0
    for name, keep in (("bf16", None), ("int8, fc2 kept", ("mlp.contract",)), ("int8, fc2 too", ())):
        with torch.device("meta"):
            network = folders.build_system(config).generator.bfloat16()
            if keep is not None:
                quantise(network, keep=keep)
        whole = whole or weight_bytes(network)
        print(f"| {name} | {weight_bytes(network):,} | {weight_bytes(network) / whole:.3f} |")


def compare(system: Any, hooks: dict[str, LiteVAR], pictures: int, others: dict[str, Any] | None = None) -> None:
    """Rows for hooks, and for the same model held otherwise, beside the model as it is."""
    labels = labels_of(system, pictures)
    plain = system.generate(labels, output="torch", progress=False)
    guidance, depth = system.guidance(plain.settings), system.config.generator.depth
    base = system.log_prob(plain.tokens, plain.labels, guidance).token
    print("| | attention pairs | keys kept | PSNR | equal tokens | logits apart | log-probability of a token |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    rows = [(name, system, [hook]) for name, hook in hooks.items()]
    rows += [(name, other, []) for name, other in (others or {}).items()]
    for name, used, hooked in rows:
        cost = (hooked or [LiteVAR()])[0].cost(system.plan, depth)
        drawn = used.generate(labels, output="torch", progress=False, hooks=hooked)
        error = ((drawn.images - plain.images) / 2).square().mean((1, 2, 3)).clamp_min(1e-10)
        same = torch.cat([a == b for a, b in zip(drawn.tokens, plain.tokens, strict=True)], 1).float().mean()
        apart = output_error(system, plain.tokens, plain.labels, hooked, guidance) if hooked else float("nan")
        lost = (used.log_prob(plain.tokens, plain.labels, guidance, hooks=hooked).token - base).mean()
        print(f"| {name} | {cost.pairs / cost.all_pairs:.3f} | {cost.rows / cost.all_rows:.2f} | "
              f"{-10 * error.log10().mean():.1f} | {same:.3f} | {apart:.3f} | {lost:+.3f} |", flush=True)


def draw(given: argparse.Namespace) -> None:
    system = nextscale.load("runs/emoji-64")
    hooks = {f"window {reach}": LiteVAR(window=reach) for reach in (1.0, 0.5, 0.35, 0.25)}
    depth = system.config.generator.depth
    hooks |= {f"block {block} shares": LiteVAR(share=(block,)) for block in range(depth)}
    hooks |= {"all blocks share": LiteVAR(share=tuple(range(depth)))}
    compare(system, hooks, given.pictures)


def load(given: argparse.Namespace) -> None:
    others = {name: nextscale.load("runs/emoji-64", precision=name) for name in ("bf16", "int8")}
    for name, other in others.items():
        print(f"{name}: {weight_bytes(other.generator):,} bytes in the network")
    compare(nextscale.load("runs/emoji-64"), {}, given.pictures, others)


def calibrate(given: argparse.Namespace) -> None:
    system, hooks = nextscale.load("runs/emoji-64"), {}
    for pair in given.budgets.split(","):
        budget, share_budget = map(float, pair.split(":"))
        found = Calibration(budget, share_budget).run(system, labels_of(system, 8), progress=False)
        print(f"{pair}: windows {found['windows']}, shared {found['share']}")
        hooks[f"calibrated {pair}"] = LiteVAR(calibration=found)
    compare(system, hooks, given.pictures)


def round_weights(given: argparse.Namespace) -> None:
    system = nextscale.load("runs/emoji-64")
    pictures, labels = held_out(given.pictures)
    tokens = system.encode(pictures)
    plain = system.log_prob(tokens, labels).token
    print(f"{-plain.mean():.4f} nats a token of {len(pictures)} held-out emoji\n")
    print("| | nats a token | change | root mean square change of a token's |\n| --- | ---: | ---: | ---: |")
    for name, options in ROUNDED:
        changed = copy.deepcopy(system)
        quantise(changed.generator, **options)
        found = changed.log_prob(tokens, labels).token
        print(f"| {name} | {-found.mean():.4f} | {100 * (found.mean() / plain.mean() - 1):+.3f}% | "
              f"{(found - plain).square().mean().sqrt():.4f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("count", "draw", "load", "round", "calibrate"))
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--budgets", default="0.2:0.1,0.3:0.15", help="window:share, with commas between")
    given = parser.parse_args()
    {"count": count, "draw": draw, "load": load, "round": round_weights, "calibrate": calibrate}[given.what](given)


if __name__ == "__main__":
    main()
