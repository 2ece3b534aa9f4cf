"""Pictures as tokens, made once before a generator is trained on them."""
from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from nextscale import hub
from nextscale.data import PictureDataset
from nextscale.systems.var import VAR


@torch.no_grad()
def tokenise(system: VAR, dataset: PictureDataset, batch: int = 64,
             report: Callable[[int, int], None] | None = None) -> Tensor:
    """Tokens of all pictures of a set, (N, L) int32, in its order."""
    found = []
    for start in range(0, len(dataset), batch):
        pixels, _ = dataset.read(range(start, min(start + batch, len(dataset))))
        pictures = torch.from_numpy(pixels[:, :3]).to(system.device).float() / 127.5 - 1
        found.append(torch.cat(system.encode(pictures), 1).int().cpu())
        if report is not None:
            report(min(start + batch, len(dataset)), len(dataset))
    return torch.cat(found)


def tokenizer_hash(tokenizer: nn.Module) -> str:
    """A fingerprint of a tokenizer's weights, which cached tokens are bound to."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def cached_tokens(system: VAR, dataset: PictureDataset, path: Path,
                  report: Callable[[int, int], None] | None = None) -> Tensor:
    """``tokenise``, read from ``path`` where it holds the same tokenizer's tokens of the same pictures."""
    print_of = tokenizer_hash(system.tokenizer)
    if path.is_file():
        kept = hub.read_tensors(path)
        known = bytes(kept["tokenizer"].tolist()).decode() == print_of
        if known and torch.equal(kept["rows"], torch.from_numpy(dataset.rows)):
            return kept["tokens"]
    tokens = tokenise(system, dataset, report=report)
    hub.save_tensors({"tokens": tokens, "rows": torch.from_numpy(dataset.rows),
                      "tokenizer": torch.tensor(list(print_of.encode()), dtype=torch.uint8)}, path)
    return tokens
