"""A whole evaluation: draw, encode, score and compare, block by block; then figures as JSON and one HTML page.

``work`` computes what is missing, for one shard; ``report`` reads everything and measures. Both take the same
:class:`Evaluation`, so shards, resumed runs and a single process give the same figures.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextscale import hub
from nextscale.context import Hook
from nextscale.data import PictureDataset
from nextscale.errors import InputError
from nextscale.evaluation import sets
from nextscale.evaluation.blocks import Blocks, Shard
from nextscale.evaluation.copies import nearest, pixel_rmse
from nextscale.evaluation.distances import Statistics, read_statistics, write_statistics
from nextscale.evaluation.diversity import pairwise_distance
from nextscale.evaluation.features import Extractor
from nextscale.evaluation.likelihood import likelihood_blocks, likelihood_figures
from nextscale.evaluation.measure import Features, agree, compare
from nextscale.evaluation.page import write_page
from nextscale.evaluation.prompted import Prompts, agreement, caption_rows, things_in, things_of
from nextscale.evaluation.reconstruction import (
    preview_blocks,
    reconstruction_blocks,
    reconstruction_figures,
    summary,
)
from nextscale.evaluation.sets import Pictures, Subject
from nextscale.evaluation.text_agreement import CANDIDATES
from nextscale.evaluation.text_judge import PictureTextJudge

Make = Callable[[range], Mapping[str, Tensor]]
PREVIEWED = 256  # pictures whose preview is decoded after every scale
SHOWN_COPIES, NEAREST_SHOWN = 16, 3


@dataclass(frozen=True)
class Wanted:
    """What to evaluate: ``count`` pictures drawn with seeds ``seed``, ``seed + 1``, ...; ``labels`` from ``data``,
    ``even`` or ``none``; ``likelihood`` and ``reconstruction`` held-out pictures scored and sent through the tokenizer
    (0 for none); at most ``training`` training pictures looked at; purpose and settings of sampling. control: the kind
    of a system's control maps, then those of the reference's pictures steer, each beside its own label."""

    count: int = 1000
    seed: int = 0
    labels: str = "data"
    likelihood: int = 400
    reconstruction: int = 1000
    training: int = 50_000
    purpose: str = "pictures"
    settings: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 16
    control: str | None = None

    def __post_init__(self) -> None:
        for name in ("count", "likelihood", "reconstruction", "training"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}, it must not be negative")
        if self.labels not in ("data", "even", "none"):
            raise InputError(f"labels are {self.labels!r}; use data, even or none")
        if self.control is not None and self.labels != "data":
            raise InputError(f"labels are {self.labels!r}, but a control map is a held-out picture's, beside its own "
                             "label; use --data and labels of the data")


class Evaluation:
    """A subject, the pictures it is measured against, and where results lie.

    reference: held-out pictures, None where ``statistics`` stand for them; training: pictures the model was trained
    on, for copies and as the figure beside it; extractors: one or more; statistics: files by extractor name; hooks:
    act on the drawing of samples, dataclasses of settings; prompts: what a model that text steers draws; judge: says
    whether its pictures show that.
    """

    def __init__(self, subject: Subject, out: Path, extractors: Sequence[Extractor], wanted: Wanted,
                 reference: PictureDataset | None = None, training: PictureDataset | None = None,
                 statistics: Mapping[str, Path] | None = None, hooks: Sequence[Hook] = (),
                 prompts: Prompts | None = None, judge: PictureTextJudge | None = None):
        self.hooks, self.prompts, self.judge = hooks, prompts, judge
        if subject.takes_prompts and wanted.count and prompts is None:
            raise InputError(f"what {subject.name} is to draw is missing; give --data with captions, or --prompts")
        self.subject, self.out, self.extractors, self.wanted = subject, out, list(extractors), wanted
        self.reference, self.training = reference, training
        self.statistics = {name: read_statistics(path, name) for name, path in (statistics or {}).items()}
        if reference is None:
            without = [e.name for e in self.extractors if e.name not in self.statistics]
            if without:
                raise InputError(f"nothing to compare features of {', '.join(without)} with; give --data, "
                                 "or --statistics of each")
        if reference is not None and len(reference) < 2:
            raise InputError(f"{reference.source.name} [{reference.split}] has {len(reference)} picture; distances "
                             "need at least 2: name another --split, such as all, or give more pictures")
        for dataset in (reference, training):
            if dataset is not None and tuple(dataset.size) != tuple(subject.size):
                raise InputError(f"{dataset.source.name} was opened at {dataset.size}, "
                                 f"{subject.name} has {subject.size}")
        if wanted.control is not None and wanted.control not in subject.kinds:
            raise InputError(f"control {wanted.control!r}: {subject.name} takes {', '.join(subject.kinds) or 'none'}")
        self.seconds: dict[str, float] = {}

    # What is computed in blocks

    @cached_property
    def reference_pictures(self) -> Pictures | None:
        return None if self.reference is None else self._of_dataset(self.reference)

    @cached_property
    def training_pictures(self) -> Pictures | None:
        if self.training is None or not self.wanted.training:
            return None
        return self._of_dataset(self.training, self.wanted.training)

    def _of_dataset(self, dataset: PictureDataset, limit: int | None = None) -> Pictures:
        """Pictures with the labels of the data, or the captions in their place where text steers."""
        found = sets.of_dataset(dataset, limit)
        if not self.subject.takes_prompts:
            return found
        return replace(found, labels_Nn=caption_rows(dataset, sets.places_of(dataset, limit)))

    @cached_property
    def labels_Nn(self) -> Tensor:
        if self.prompts is not None:
            return self.prompts.rows(self.wanted.labels, self.wanted.count, self.wanted.seed)
        return sets.labels_to_draw(self.wanted.labels, self.wanted.count, self.subject, self.reference,
                                   self.wanted.seed)

    @cached_property
    def samples(self) -> tuple[Blocks, Make] | None:
        if self.subject.system is None or not self.wanted.count:
            return None
        rule: dict[str, Any] = {"source": self.wanted.labels}
        if self.wanted.labels == "data" and self.reference_pictures is not None:
            rule["data"] = self.reference_pictures.request["digest"]
        labels_of: Callable[[Tensor], Any] | None = None
        if self.prompts is not None:
            rule["prompts"] = self.prompts.digest
            labels_of = partial(self.prompts.labels, self.subject.system)
        if self.wanted.control is not None:
            rule["control"] = self.wanted.control
        return sets.sample_blocks(self.out, self.subject, self.labels_Nn, rule, self.wanted.seed, self.wanted.purpose,
                                  self.wanted.settings, self.wanted.batch_size, self.hooks, labels_of, self._steered)

    def _steered(self, block: range) -> Mapping[str, Any]:
        """The maps of the pictures whose labels some samples are drawn with."""
        if self.wanted.control is None or self.reference is None:
            return {}
        places = sets.places_to_draw(self.wanted.count, self.reference, self.wanted.seed)
        return sets.maps_of(self.reference, places[block.start:block.stop], self.wanted.control)

    @cached_property
    def scored(self) -> dict[str, tuple[Blocks, Make, str]]:
        if self.subject.system is None or not self.wanted.likelihood or not self.subject.system.likelihood:
            return {}
        found, limit = {}, self.wanted.likelihood
        for name, dataset in (("reference", self.reference), ("training", self.training)):
            if dataset is not None:
                found[name] = likelihood_blocks(self.out, self.subject, sets.of_dataset(dataset, limit), dataset, limit,
                                                self.wanted.batch_size, self.wanted.control)
        return found

    @cached_property
    def originals(self) -> Pictures | None:
        if self.reference is None or not self.wanted.reconstruction:
            return None
        return sets.of_dataset(self.reference, self.wanted.reconstruction)

    @cached_property
    def reconstructed(self) -> tuple[Blocks, Make] | None:
        if self.originals is None:
            return None
        return reconstruction_blocks(self.out, self.subject, self.originals, self.wanted.batch_size)

    @cached_property
    def previews(self) -> tuple[Blocks, Make] | None:
        if self.originals is None:
            return None
        return preview_blocks(self.out, self.subject, self.originals, PREVIEWED, self.wanted.batch_size)

    def pictures_of(self) -> dict[str, Pictures]:
        """Every set whose features are taken, by its role."""
        found = {"samples": self.samples and replace(sets.of_blocks(self.samples[0]), labels_Nn=self.labels_Nn),
                 "reference": self.reference_pictures, "training": self.training_pictures,
                 "originals": self.originals,
                 "reconstructed": self.reconstructed and sets.of_blocks(self.reconstructed[0])}
        return {role: pictures for role, pictures in found.items() if pictures is not None}

    def features(self, role: str, extractor: Extractor) -> tuple[Blocks, Make]:
        return sets.feature_blocks(self.out, self.pictures_of()[role], extractor)

    def thumbnails(self, role: str) -> tuple[Blocks, Make]:
        return sets.thumbnail_blocks(self.out, self.pictures_of()[role])

    def judged(self) -> dict[str, tuple[Blocks, Make]]:
        """The text judge's vectors, of samples with prompts and of held-out pictures."""
        if self.judge is None or self.prompts is None or self.wanted.labels == "none":
            return {}
        return {role: sets.judged_blocks(self.out, found, self.judge) for role, found in self.pictures_of().items()
                if role == "samples" or (role == "reference" and found.labels_Nn is not None)}

    def jobs(self) -> list[tuple[str, Blocks, Make]]:
        """Everything that is computed in blocks, in an order in which each finds what it needs in its own shard."""
        found: list[tuple[str, Blocks, Make]] = []
        for name, job in (("drawing", self.samples), ("reconstructing", self.reconstructed),
                          ("decoding after every scale", self.previews)):
            if job is not None:
                found.append((name, *job))
        found += [(f"likelihood: {name}", blocks, make) for name, (blocks, make, _) in self.scored.items()]
        roles = self.pictures_of()
        found += [(f"features of {role}: {e.name}", *self.features(role, e)) for e in self.extractors for role in roles]
        found += [(f"judging {role}", *job) for role, job in self.judged().items()]
        if "samples" in roles:
            found += [(f"thumbnails of {role}", *self.thumbnails(role))
                      for role in ("samples", "reference", "training") if role in roles]
        return found

    def work(self, shard: Shard, progress: Callable[[str, int], Callable[[int], None]] | None = None) -> None:
        """Compute what the shard owns and is not there yet. ``progress(what, total)`` gives a counter."""
        for name, blocks, make in self.jobs():
            began = time.perf_counter()
            each = None if progress is None else progress(name, blocks.shard_size(shard))
            blocks.compute(shard, make, each)
            self.seconds[name] = round(time.perf_counter() - began, 2)

    def missing(self) -> int:
        """Blocks that no shard has computed yet."""
        return sum(len(blocks.missing()) for _, blocks, _ in self.jobs())

    # What is measured

    def report(self) -> dict[str, Any]:
        """Measure, and write ``figures.json``, ``report.html`` and ``statistics/``. Raises DataError while blocks are
        missing."""
        from nextscale import __version__

        began = time.perf_counter()
        figures: dict[str, Any] = {
            "version": __version__, "model": self.subject.name, "fingerprint": self.subject.fingerprint,
            "size": list(self.subject.size), "wanted": asdict(self.wanted),
            "reference": self.reference_pictures and dict(self.reference_pictures.request),
            "training": self.training_pictures and dict(self.training_pictures.request)}
        if self.subject.system is not None:
            used = self.subject.system.settings_for(self.wanted.purpose, dict(self.wanted.settings))
            figures["sampling"] = asdict(used) | sets.told(self.hooks)
        figures["features"] = {e.name: self._of_extractor(e) for e in self.extractors}
        if self.prompts is not None:
            figures["prompts"] = {"source": self.prompts.source, "different": len(self.prompts.different)}
        if self.judged():
            figures["text"] = self._text()
        if self.scored:
            figures["likelihood"] = self._likelihood()
        if self.reconstructed is not None and self.previews is not None:
            figures["tokenizer"] = reconstruction_figures(self.reconstructed[0].gather(),
                                                          self.previews[0].gather()["error"], self.subject)
        sheets = self._sheets()
        copies = self._copies(sheets)
        if copies:
            figures["copies"] = copies
        diversity = self._diversity()
        if diversity:
            figures["diversity"] = diversity
        figures["seconds"] = {**self.seconds, "measuring": round(time.perf_counter() - began, 2)}
        hub.save_json(figures, self.out / "figures.json")
        write_page(figures, sheets, self.out / "report.html")
        return figures

    def _gathered(self, role: str, extractor: Extractor) -> Features:
        return Features.of(self.features(role, extractor)[0].gather())

    def reference_statistics(self, extractor: Extractor) -> Statistics:
        if extractor.name in self.statistics:
            return self.statistics[extractor.name]
        found = Statistics.of(self._gathered("reference", extractor).features_ND, extractor.name)
        write_statistics(found, self.out / "statistics" / f"{_file_name(extractor.name)}.safetensors")
        return found

    def _of_extractor(self, extractor: Extractor) -> dict[str, Any]:
        """Samples, and beside them real training pictures of the same number, against the reference."""
        roles, reference, seed = self.pictures_of(), self.reference_statistics(extractor), self.wanted.seed
        figures: dict[str, Any] = {"width": len(reference.mean_D), "published": extractor.published}
        if "samples" in roles:
            found = self._gathered("samples", extractor)
            agreed = agree(found, self.labels_Nn, self.subject.class_names, self.subject.classes, extractor)
            figures["samples"] = compare(found, reference, extractor, seed) | ({"agreement": agreed} if agreed else {})
        if "training" in roles:
            real = self._gathered("training", extractor)
            count = min(len(real), self.wanted.count or len(real))
            chosen = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))[:count]
            figures["real_training_pictures"] = compare(real.part(chosen), reference, extractor, seed)
        if self.reference is not None and "reference" in roles and not self.subject.takes_prompts:
            agreed = agree(self._gathered("reference", extractor), self.reference.labels, self.reference.class_names,
                           [len(kind) for kind in self.reference.class_names], extractor)
            if agreed:
                figures["reference_agreement"] = agreed
        if "reconstructed" in roles:
            originals = Statistics.of(self._gathered("originals", extractor).features_ND, extractor.name)
            figures["reconstruction"] = compare(self._gathered("reconstructed", extractor), originals, extractor, seed)
        return figures

    def _text(self) -> dict[str, Any]:
        """Where the judge ranks what was asked for, of samples, and of real pictures their captions."""
        assert self.judge is not None and self.prompts is not None
        of_data = [] if self.reference is None else things_in(self.reference)
        own = things_of(self.prompts.texts)
        # Wrong answers to captions are of the whole set, to a file's prompts its other ones, where there are enough.
        wrong = of_data if self.prompts.captions else own if len(own) >= CANDIDATES else [*own, *of_data]
        found: dict[str, Any] = {"judge": self.judge.name, "fingerprint": self.judge.fingerprint}
        for role, (blocks, _) in self.judged().items():
            if role == "samples":
                asked = [self.prompts.different[row][0] for row in self.labels_Nn[:, 0].tolist()]
            else:
                assert self.reference is not None
                asked = [str(self.reference.caption(i)) for i in range(len(self.reference))]
            things = wrong if role == "samples" else of_data
            found[role] = agreement(self.judge, blocks.gather()["vectors"], asked, things)
        return found

    def _likelihood(self) -> dict[str, Any]:
        rows = [step.rows for step in self.subject.system.plan]
        dimensions = 3 * self.subject.size[0] * self.subject.size[1]
        return {name: {**likelihood_figures(blocks.gather()["step"], rows, dimensions), "condition": how}
                for name, (blocks, _, how) in self.scored.items()}

    # Sheets and copies

    def _sheets(self) -> dict[str, tuple[Tensor, int]]:
        """Pictures to show, and how many to a row."""
        roles, sheets = self.pictures_of(), {}
        if "samples" in roles:
            count = min(64, roles["samples"].total)
            sheets["Samples"] = (roles["samples"].read(range(count)), min(16, count))
        if self.originals is not None:
            some = np.linspace(0, self.originals.total - 1, min(16, self.originals.total)).round().astype(int).tolist()
            pairs = torch.stack([self.originals.some(some), roles["reconstructed"].some(some)], 1)
            sheets["Reconstructions, each beside its original (left)"] = (pairs.flatten(0, 1), 8)
        return sheets

    def _copies(self, sheets: dict[str, tuple[Tensor, int]]) -> dict[str, Any]:
        """Distances to the nearest training pictures, of samples and of held-out pictures, and a sheet for each way of
        looking: half of it the samples nearest to a training picture, half spread over all."""
        roles = self.pictures_of()
        if "training" not in roles or "samples" not in roles:
            return {}
        figures: dict[str, Any] = {}
        for way, values in self._ways().items():
            training, drawn = values("training"), values("samples")
            found = nearest(drawn, training, min(NEAREST_SHOWN, len(training)))
            figures[way] = {"samples": _distances(found.distance_Nk[:, 0], way, drawn)}
            if "reference" in roles:
                held = values("reference")
                of_held = nearest(held, training).distance_Nk[:, 0]
                figures[way]["reference"] = _distances(of_held, way, held)
                figures[way]["median_ratio"] = (figures[way]["samples"]["median"]
                                                / max(figures[way]["reference"]["median"], 1e-12))
                figures[way]["nearer_than_any_reference"] = float((found.distance_Nk[:, 0] < of_held.min())
                                                                  .float().mean())
            sheets[f"Nearest training pictures by {way}: sample, then its three nearest"] = self._copy_sheet(
                found.distance_Nk[:, 0], found.index_Nk)
        return figures

    def _ways(self) -> dict[str, Callable[[str], Tensor]]:
        """Ways of looking at a role's pictures: thumbnails in [-1, 1], and the features of every extractor."""
        ways: dict[str, Callable[[str], Tensor]] = {
            "pixels": lambda role: self.thumbnails(role)[0].gather()["thumbnails"].float() / 127.5 - 1}
        for extractor in self.extractors:
            ways[extractor.name] = lambda role, e=extractor: self._gathered(role, e).features_ND  # type: ignore[misc]
        return ways

    def _diversity(self) -> dict[str, Any]:
        """How far apart pictures of one label are, of samples and beside them of real ones, each way of looking; roles
        of which no label has two pictures are left out."""
        roles, figures = self.pictures_of(), {}
        if "samples" not in roles:
            return {}
        for way, values in self._ways().items():
            of_way = {}
            for role in ("samples", "reference", "training"):
                labels = roles[role].labels_Nn if role in roles else None
                if labels is None:
                    continue
                shown = values(role)
                found = pairwise_distance(shown, labels)
                if found.pairs:
                    mean = float(pixel_rmse(torch.tensor(found.mean), shown)) if way == "pixels" else found.mean
                    of_way[role] = {**found._asdict(), "mean": mean}
            if "samples" in of_way:
                figures[way] = of_way
        return figures

    def _copy_sheet(self, distance_N: Tensor, index_Nk: Tensor) -> tuple[Tensor, int]:
        roles, half = self.pictures_of(), min(SHOWN_COPIES // 2, len(distance_N))
        chosen = distance_N.argsort(stable=True)[:half].tolist()
        chosen += torch.linspace(0, len(distance_N) - 1, half).round().long().tolist()
        rows = [torch.cat([roles["samples"].some([i]), roles["training"].some(index_Nk[i].tolist())]) for i in chosen]
        return torch.cat(rows), 4 * (1 + index_Nk.shape[1])


def _distances(distance_N: Tensor, way: str, of: Tensor) -> dict[str, float]:
    """Summary of distances; those of pixels as root mean square errors in grey levels."""
    return summary(pixel_rmse(distance_N, of) if way == "pixels" else distance_N)


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip("-")
