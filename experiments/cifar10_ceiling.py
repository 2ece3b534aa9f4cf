"""How often the CIFAR-10 judge is right on real pictures, and on the same pictures through a model's tokenizer.

    python experiments/cifar10_ceiling.py --model runs/cifar-10-generator/model --data cifar10/test.parquet \\
        --judge resnet20.safetensors

No sample can be expected to be recognised more often than pictures that only went through the tokenizer, unless it is
more typical than they are.
"""
from __future__ import annotations

import argparse

import torch

import nextscale
from nextscale.data import open_dataset
from nextscale.evaluation.features import open_extractor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--judge", required=True, help="safetensors of the ResNet-20")
    parser.add_argument("--count", type=int, default=1000, help="pictures, spread over the set")
    given = parser.parse_args()
    system, judge = nextscale.load(given.model), open_extractor(f"resnet20:{given.judge}")
    pictures = open_dataset(given.data, 32, "all")
    chosen = [pictures[i] for i in torch.linspace(0, len(pictures) - 1, given.count).long().tolist()]
    labels = torch.tensor([int(one.labels[0]) for one in chosen])
    right = {"real": 0, "reconstructed": 0}
    for start in range(0, len(chosen), 100):
        real = torch.stack([one.picture for one in chosen[start:start + 100]]).float() / 127.5 - 1
        for name, batch in (("real", real), ("reconstructed", system.decode(system.encode(real)).cpu())):
            right[name] += int((judge(batch).logits[0].argmax(1) == labels[start:start + 100]).sum())
    for name, count in right.items():
        print(f"{name}: {count / len(chosen):.1%} of {len(chosen)}")


if __name__ == "__main__":
    main()
