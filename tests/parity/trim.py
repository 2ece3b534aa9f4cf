"""Copy a golden set into this folder without its largest outputs, which the repository has no room for.

    python tests/parity/trim.py flexvar_tiny.json --drop "*_image" "reconstruction.3" "*_probs.*"

``run.py`` compares what is there; the whole set is checked by giving its own path to ``run.py``.
"""
from __future__ import annotations

import argparse
import fnmatch
import json
from pathlib import Path

from safetensors.torch import load_file, save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("golden", type=Path)
    parser.add_argument("--drop", nargs="+", required=True, help="names or patterns of tensors")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    golden = json.loads(given.golden.read_text(encoding="utf-8"))
    tensors = load_file(given.golden.with_suffix(".safetensors"))
    kept = {name: tensor for name, tensor in tensors.items()
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in given.drop)}
    golden["dropped"] = sorted({*golden.get("dropped", ()), *tensors} - set(kept))
    save_file(kept, given.out / given.golden.with_suffix(".safetensors").name)
    text = json.dumps(golden, ensure_ascii=False, separators=(",", ":"))
    (given.out / given.golden.name).write_text(text + "\n", encoding="utf-8")
    print(f"{given.golden.name}: {len(kept)} of {len(tensors)} tensors kept")


if __name__ == "__main__":
    main()
