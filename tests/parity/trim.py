"""Copy a golden set into this folder without its largest outputs, which the repository has no room for.

    python tests/parity/trim.py flexvar_tiny.json --drop "*_image" "reconstruction.3" "*_probs.*"

``run.py`` compares what is there; the whole set is checked by giving its own path to ``run.py``. What is kept
stays as it is to the last bit: whole numbers may be stored in a narrower type
(--narrow), bits eight to a byte (--pack).
"""
from __future__ import annotations

import argparse
import fnmatch
import json
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def narrowed(tensor: Tensor) -> Tensor:
    """Whole numbers in the narrowest type that holds all of them."""
    if tensor.is_floating_point():
        return tensor
    kinds = (torch.uint8, torch.int16, torch.int32)
    return next((small for kind in kinds if torch.equal((small := tensor.to(kind)).long(), tensor.long())), tensor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("golden", type=Path)
    parser.add_argument("--drop", nargs="+", required=True, help="names or patterns of tensors")
    parser.add_argument("--weights", nargs="+", default=["*"], help="names or patterns of the weights that are needed")
    parser.add_argument("--narrow", action="store_true", help="store whole numbers in the narrowest type")
    parser.add_argument("--pack", nargs="+", default=[], help="bits that are stored eight to a byte, first bit highest")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    golden = json.loads(given.golden.read_text(encoding="utf-8"))
    tensors = load_file(given.golden.with_suffix(".safetensors"))
    kept = {name: tensor for name, tensor in tensors.items() if not matches(name, given.drop)}
    golden["dropped"] = sorted({*golden.get("dropped", ()), *given.drop})
    golden["notes"] = [*golden.get("notes", ()), *(f"{pattern}: stored eight bits to a byte" for pattern in given.pack)]
    families = {re.sub(r"(?<=\.)\d+$", "k", name) for name in kept}
    golden["tensors"] = {name: what for name, what in golden["tensors"].items() if name in families or name in kept}
    kept = {name: torch.from_numpy(np.packbits(tensor.numpy().ravel())) if matches(name, given.pack) else
            narrowed(tensor) if given.narrow else tensor for name, tensor in kept.items()}
    for field in ("state_dict", "after_fill"):
        golden[field] = {name: value for name, value in golden.get(field, {}).items() if matches(name, given.weights)}
    golden["buffers"] = [name for name in golden.get("buffers", ()) if matches(name, given.weights)]
    save_file(kept, given.out / given.golden.with_suffix(".safetensors").name)
    text = json.dumps(golden, ensure_ascii=False, separators=(",", ":"))
    (given.out / given.golden.name).write_text(text + "\n", encoding="utf-8")
    print(f"{given.golden.name}: {len(kept)} of {len(tensors)} tensors kept")


if __name__ == "__main__":
    main()
