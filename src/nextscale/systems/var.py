"""VAR: visual autoregressive modelling by next-scale prediction (Tian et al., arXiv 2404.02905).

A multi-scale VQ tokenizer turns a picture into K token maps, coarse to fine; a transformer predicts each map from all
coarser ones, every token of a map at once:

    p(r_1, ..., r_K) = prod_k p(r_k | r_1, ..., r_(k-1))

The input of scale k is the picture so far (the canvas), resized to that scale; a class steers through adaLN.
"""
from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextscale import hub
from nextscale.canvas import Canvas
from nextscale.conditions.class_label import ClassCondition, ClassTable
from nextscale.configuration import build
from nextscale.context import Hook
from nextscale.errors import InputError, WeightsError, did_you_mean
from nextscale.generators.var import VARGenerator, VARGeneratorConfig, initialise
from nextscale.heads.categorical import CategoricalHead
from nextscale.noise import Keyed, Noise
from nextscale.objectives.teacher_forcing import teacher_forcing_loss
from nextscale.plan import Plan
from nextscale.run import Run
from nextscale.sampling import editing
from nextscale.sampling.filters import make_filters
from nextscale.sampling.generation import (
    Generation,
    OutputKind,
    Preview,
    Progress,
    Settings,
    check_output,
    chunks,
    convert,
    join_images,
    picture_seeds,
    smooth_codes,
)
from nextscale.sampling.guidance import Guidance, make_guidance
from nextscale.sampling.score import LogProb, score
from nextscale.sampling.steps import sample_steps
from nextscale.tokenizers import pyramid
from nextscale.tokenizers.autoencoder import AutoencoderConfig
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.tokenizer import Tokenizer

Label = Any  # an index, a name, None for no class, or a tuple with one of these for every kind of label


@dataclass(frozen=True)
class VARConfig:
    """A whole VAR: tokenizer, transformer, labels and its published sampling settings.

    classes: how many classes each kind of label has; class_names: their names, where known (one list a kind);
    settings: by purpose, ``pictures`` (what generate uses by default) and ``fid``.
    """

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    generator: VARGeneratorConfig = field(default_factory=VARGeneratorConfig)
    classes: tuple[int, ...] = (1000,)
    class_names: tuple[tuple[str, ...], ...] = ()
    settings: dict[str, Settings] = field(default_factory=lambda: {
        "pictures": Settings(guidance_scale=5.0, top_k=900, top_p=0.95),
        "fid": Settings(guidance_scale=2.5, top_k=900, top_p=0.96)})


class VAR(nn.Module):
    """The system: ``generate``, ``stream``, ``edit``, ``log_prob``, ``encode``, ``decode``, ``loss``."""

    # What low-rank adapters go to by default; modulations, a third of the weights, act on one row a picture only.
    adapter_targets = ("attention.qkv", "attention.projection", "mlp.expand", "mlp.contract")

    def __init__(self, config: VARConfig):
        super().__init__()
        self.config = config
        self.tokenizer = Tokenizer(config.tokenizer)
        self.generator = VARGenerator(config.generator, config.tokenizer.plan,
                                      config.tokenizer.autoencoder.latent_width)
        self.head = CategoricalHead(config.generator.width, config.tokenizer.vocabulary)
        self.labels = ClassTable(config.classes, config.generator.width)

    def initialise(self, gate: float = 1e-3) -> VAR:
        """The published initialisation of the transformer, for training from scratch."""
        initialise(self.generator, self.head, self.labels, gate)
        return self

    @property
    def plan(self) -> Plan:
        return self.tokenizer.plan

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def to_precision(self, precision: str) -> VAR:
        """Hold the weights in ``fp32`` or ``bf16``; quantiser and canvas stay in float32 either way."""
        if precision not in ("fp32", "bf16"):
            raise InputError(f"precision {precision!r} is unknown; use fp32 or bf16")
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        for part in (self.generator, self.head, self.labels, self.tokenizer.encoder, self.tokenizer.decoder,
                     self.tokenizer.to_latent, self.tokenizer.from_latent):
            part.to(dtype)
        self.tokenizer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    # Pictures and tokens

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> list[Tensor]:
        """Tokens of every scale, (B, h * w) each, of pictures (B, 3, S, S) in [-1, 1]."""
        return self.tokenizer.encode(pictures.to(self.device)).tokens

    @torch.no_grad()
    def decode(self, tokens: Sequence[Tensor]) -> Tensor:
        """Pictures (B, 3, S, S) in [-1, 1] of tokens; fewer scales give a coarse preview."""
        return self.tokenizer.decode_tokens(self._checked(tokens, partly=True))

    def _checked(self, tokens: Sequence[Tensor], partly: bool = False) -> list[Tensor]:
        """Tokens of every scale (``partly``: of the first scales), or an InputError that says what doesn't fit."""
        grids, vocabulary = [step.grid for step in self.plan], self.config.tokenizer.vocabulary
        if len(tokens) > len(grids) or (len(tokens) < len(grids) and not (partly and tokens)):
            raise InputError(f"tokens: {len(tokens)} scales were given, the model has {len(grids)}")
        for k, (found, (h, w)) in enumerate(zip(tokens, grids, strict=False)):
            if tuple(found.shape) != (len(tokens[0]), h * w):
                raise InputError(f"tokens: scale {k} has shape {tuple(found.shape)}; {h}x{w} cells of every picture "
                                 f"are {(len(tokens[0]), h * w)}")
            if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < vocabulary:
                raise InputError(f"tokens: scale {k} has values outside 0..{vocabulary - 1}")
        return [found.to(self.device) for found in tokens]

    def label_rows(self, labels: Sequence[Label] | Label, count: int | None = None) -> Tensor:
        """Label indices (B, n) of names, indices, None or tuples of these; one label serves ``count`` pictures.

        Raises InputError on unknown names (the nearest is suggested) and indices out of range.
        """
        if labels is None or isinstance(labels, (int, str, tuple)):
            if count is not None and count < 1:
                raise InputError(f"count is {count}; it must be at least 1")
            labels = [labels] * (count or 1)
        rows = []
        for label in labels:
            parts = label if isinstance(label, tuple) else (label,)
            if len(parts) > len(self.config.classes):
                raise InputError(f"label {label!r} has {len(parts)} parts; the model has {len(self.config.classes)}")
            parts = parts + (None,) * (len(self.config.classes) - len(parts))
            rows.append([self._label_index(kind, part) for kind, part in enumerate(parts)])
        if count is not None and len(rows) != count:
            raise InputError(f"{len(rows)} labels were given for {count} pictures")
        if not rows:
            raise InputError("no labels were given; give at least one, or None for no class")
        return torch.tensor(rows, device=self.device)

    def _label_index(self, kind: int, label: int | str | None) -> int:
        size = self.config.classes[kind]
        if label is None:
            return size
        names = self.config.class_names[kind] if kind < len(self.config.class_names) else ()
        if isinstance(label, str) and not re.fullmatch(r"-?[0-9]+", label):
            if label in names:
                return names.index(label)
            hint = did_you_mean(label, names, f"; use an index from 0 to {size - 1}")
            raise InputError(f"unknown class {label!r}{hint}")
        if not 0 <= int(label) < size:
            raise InputError(f"class {label} is out of range; use 0 to {size - 1}")
        return int(label)

    # Sampling

    def start(self, labels_Bn: Tensor, guidance: Guidance, noise: Noise) -> Run:
        """A run at its first step."""
        condition = ClassCondition(self.labels, labels_Bn)
        return Run.start(self.plan, self.tokenizer.quantiser, condition, guidance.branches, noise, len(labels_Bn),
                         self.device)

    @torch.no_grad()
    def generate(self, labels: Sequence[Label] | Label = None, count: int | None = None, *, seed: int = 0,
                 seeds: Sequence[int] | None = None, purpose: str = "pictures", guidance: Guidance | None = None,
                 hooks: Sequence[Hook] = (), callback: Callable[[int, Run], bool | None] | None = None,
                 batch_size: int = 16, progress: bool | None = None, output: OutputKind = "pil",
                 **settings: Any) -> Generation:
        """Draw pictures.

        labels: one label for ``count`` pictures, or one a picture: class index, name, None, or a tuple where the model
        has several kinds of label. seed: picture i gets ``seed + i``, whatever the batch size; or give ``seeds``.
        purpose: which published settings to start from, ``settings`` (see ``Settings``) change them. guidance: an
        object of your own instead of the settings'. hooks: see ``nextscale.context.Hook``. callback: called with
        (step, run) after every step; True stops. progress: None shows it on terminals. output: pil, numpy, torch.

        Raises InputError on unknown labels, settings or counts that don't match.
        """
        check_output(output)
        rows = self.label_rows(labels, count)
        used, all_seeds = self.settings_for(purpose, settings), picture_seeds(len(rows), seed, seeds)
        began, parts, stopped = time.perf_counter(), [], False
        pieces = list(chunks(len(rows), batch_size))
        with Progress(len(pieces) * len(self.plan), "drawing", progress) as bar:
            for piece in pieces:
                run = None
                for run in self._steps(rows[piece], Keyed.from_seeds(all_seeds[piece], self.device), used,
                                       guidance, hooks):
                    bar.advance()
                    if callback is not None and callback(run.cursor - 1, run):
                        stopped = True
                        break
                assert run is not None
                parts.append((convert(self.tokenizer.decode(run.canvas), output), run))
                if stopped:
                    break
        drawn = sum(run.pictures for _, run in parts)
        # A stopped batch has fewer steps than the batches before it: tokens are those of the steps that all have.
        tokens = [torch.cat(step) for step in zip(*(run.tokens for _, run in parts), strict=False)]
        log_prob = torch.cat([torch.cat(run.log_probs, 1).sum(1) for _, run in parts])
        return Generation(join_images([images for images, _ in parts], output), tokens, log_prob, all_seeds[:drawn],
                          [self.label_names(row) for row in rows[:drawn]], used, time.perf_counter() - began, stopped)

    @torch.no_grad()
    def stream(self, labels: Sequence[Label] | Label = None, count: int | None = None, *, seed: int = 0,
               seeds: Sequence[int] | None = None, purpose: str = "pictures", guidance: Guidance | None = None,
               hooks: Sequence[Hook] = (), output: OutputKind = "pil", **settings: Any) -> Iterator[Preview]:
        """The same step by step, all pictures in one batch: a preview after every step, the last is the picture."""
        check_output(output)
        rows = self.label_rows(labels, count)
        used = self.settings_for(purpose, settings)
        noise = Keyed.from_seeds(picture_seeds(len(rows), seed, seeds), self.device)
        for run in self._steps(rows, noise, used, guidance, hooks):
            yield Preview(run.cursor - 1, len(self.plan), convert(self.tokenizer.decode(run.canvas), output), run)

    def settings_for(self, purpose: str, changes: dict[str, Any]) -> Settings:
        """Published settings for a purpose, with changes."""
        if purpose not in self.config.settings:
            raise InputError(f"purpose {purpose!r} is unknown; this model has settings for "
                             f"{', '.join(self.config.settings)}")
        return self.config.settings[purpose].changed(changes)

    def _steps(self, rows: Tensor, noise: Noise, used: Settings, guidance: Guidance | None,
               hooks: Sequence[Hook]) -> Iterator[Run]:
        guidance = guidance or make_guidance(used.guidance_scale, used.guidance_schedule)
        filters = make_filters(used.temperature, used.top_k, used.top_p)
        soft = smooth_codes(self.tokenizer.quantiser.codes_VC()) if used.smooth else None
        with ExitStack() as stack:
            if self.training:
                self.eval()
                stack.callback(self.train)
            yield from sample_steps(self, self.start(rows, guidance, noise), guidance, filters, hooks, soft)

    def label_names(self, row: Tensor) -> Any:
        """What a row of label indices is called: a name or index, a tuple for several kinds, None for no class."""
        found = []
        for kind, index in enumerate(row.tolist()):
            names = self.config.class_names[kind] if kind < len(self.config.class_names) else ()
            found.append(None if index == self.config.classes[kind] else names[index] if names else index)
        return found[0] if len(found) == 1 else tuple(found)

    # Editing

    @torch.no_grad()
    def edit(self, pictures: Tensor, redraw: Tensor, labels: Sequence[Label] | Label = None, *, seed: int = 0,
             seeds: Sequence[int] | None = None, purpose: str = "pictures", output: OutputKind = "pil",
             progress: bool | None = None, **settings: Any) -> Generation:
        """Redraw a region without training: in- and outpainting, or another class inside a region.

        pictures: (B, 3, S, S) in [-1, 1]; redraw: bool (B, S, S), True where to draw anew. Tokens of untouched cells
        are forced at every scale, so the rest equals the tokenizer's reconstruction. Raises InputError when sizes are
        not the model's.
        """
        h, w = self.tokenizer.picture_size
        if tuple(pictures.shape[1:]) != (3, h, w):
            raise InputError(f"picture: this model edits {h}x{w} pixels, got {tuple(pictures.shape[2:])}; resize it")
        if tuple(redraw.shape) != (len(pictures), h, w):
            raise InputError(f"mask: its shape {tuple(redraw.shape)} must be {(len(pictures), h, w)}, as the picture's")
        keep = editing.keep_masks(editing.latent_mask(redraw.to(self.device), self.plan.grid), self.plan)
        forced = editing.ForcedTokens(self.encode(pictures), keep)
        return self.generate(labels, len(pictures), seed=seed, seeds=seeds, purpose=purpose, hooks=[forced],
                             batch_size=len(pictures), progress=progress, output=output, **settings)

    # Likelihood and training

    def log_prob(self, pictures_or_tokens: Tensor | Sequence[Tensor], labels: Sequence[Label] | Label = None,
                 guidance: Guidance | None = None, filters: Sequence[Any] = ()) -> LogProb:
        """Log-probability of pictures (B, 3, S, S) or of their tokens: a token, a step and a picture, in nats.

        guidance and filters: score under a sampler's distribution instead of the model's own.
        """
        tokens = (self.encode(pictures_or_tokens) if isinstance(pictures_or_tokens, Tensor)
                  else self._checked(pictures_or_tokens))
        guidance = guidance or make_guidance(1.0)
        condition = ClassCondition(self.labels, self.label_rows(labels, len(tokens[0])))
        with torch.no_grad():
            canvas = Canvas.empty(self.plan, self.tokenizer.quantiser, len(tokens[0]), self.device)
            reads = pyramid.replay(tokens, canvas).reads
            return score(self, self.plan, tokens, reads, condition, guidance, guidance.branches, filters)

    def loss(self, tokens: Sequence[Tensor], labels_Bn: Tensor, label_dropout: float = 0.1,
             part_dropout: float = 0.0, step_weights: Sequence[float] | None = None,
             label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher-forcing cross-entropy: the loss, its value at every step (K,), the share of right guesses (K,).

        tokens: of every step, (B, L_k); of the first steps only, to train these.
        """
        plan = self.plan if len(tokens) == len(self.plan) else replace(self.plan, steps=self.plan.steps[:len(tokens)])
        with torch.no_grad():
            canvas = Canvas.empty(self.plan, self.tokenizer.quantiser, len(labels_Bn), labels_Bn.device)
            reads = pyramid.replay(list(tokens), canvas).reads
        cond = self.labels(self.labels.drop(labels_Bn, label_dropout, part_dropout))
        return teacher_forcing_loss(self.generator, self.head, plan, tokens, reads, cond, step_weights,
                                    label_smoothing)

    def products(self, pictures: int, steps: int | None = None) -> list[tuple[int, int, int, int, int, float]]:
        """The matrix products of a training pass over the first ``steps`` steps: (n, k, m, how many, batch, share of
        the arithmetic that the visibility asks for)."""
        plan = replace(self.plan, steps=self.plan.steps[:steps])
        rows, c, config = pictures * plan.length, self.config.generator.width, self.config.generator
        inner = round(c * config.mlp_ratio)
        modulations = 1 if config.shared_modulation else config.depth
        shown, batch, width = plan.pairs / plan.length**2, pictures * config.heads, c // config.heads
        return [(rows, c, 3 * c, config.depth, 1, 1.0), (rows, c, c, config.depth, 1, 1.0),
                (rows, c, inner, config.depth, 1, 1.0), (rows, inner, c, config.depth, 1, 1.0),
                (plan.length, width, plan.length, config.depth, batch, shown),
                (plan.length, plan.length, width, config.depth, batch, shown),
                (rows, c, self.config.tokenizer.vocabulary, 1, 1, 1.0),
                (rows, self.config.tokenizer.autoencoder.latent_width, c, 1, 1, 1.0),
                (pictures, c, 6 * c, modulations, 1, 1.0), (pictures, c, 2 * c, 1, 1, 1.0)]


# Published sizes and settings

PLANS = {256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
         1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)}


def squares(sides: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple((s, s) for s in sides)


SMALL = {
    "var-d6-64px": VARConfig(
        TokenizerConfig(AutoencoderConfig(32, (1, 2, 4, 6), 1, 2, 32, 32, "middle"), squares((1, 2, 3, 4, 6, 8))),
        VARGeneratorConfig(6, 256, 4, shared_modulation=True)),
    "var-d2-16px": VARConfig(
        TokenizerConfig(AutoencoderConfig(32, (1, 1, 2), 1, 1, 8, 32, "middle"), squares((1, 2, 3, 4)), 32),
        VARGeneratorConfig.of_depth(2), (10,)),
}


def preset_config(name: str) -> VARConfig:
    """The configuration of a published size, var-d16, var-d20, var-d24, var-d30 (256 px) or var-d36-s (512 px), or of
    a small one of this project: var-d6-64px, the size of emoji-64, and var-d2-16px, for trying code in a second."""
    depths = {"var-d16": 16, "var-d20": 20, "var-d24": 24, "var-d30": 30}
    if name in depths:
        return VARConfig(generator=VARGeneratorConfig.of_depth(depths[name]))
    if name in SMALL:
        return SMALL[name]
    if name == "var-d36-s":
        return VARConfig(TokenizerConfig(grids=squares(PLANS[512])),
                         VARGeneratorConfig.of_depth(36, shared_modulation=True))
    raise InputError(f"unknown VAR size {name!r}{did_you_mean(name, [*depths, 'var-d36-s', *SMALL])}")


def preset(name: str) -> VAR:
    """A VAR of a published size with random weights; ``load_published`` fills it."""
    return VAR(preset_config(name)).eval()


def untrained(name: str) -> VAR:
    """A VAR of a small size of this project, initialised for training, with the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VAR(SMALL[name]).initialise().eval()


class Transformer(nn.Module):
    """What a published transformer file holds: everything of a VAR but its tokenizer."""

    def __init__(self, system: VAR):
        super().__init__()
        self.generator, self.head, self.labels = system.generator, system.head, system.labels


# Models of this project

def save(system: VAR, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write ``config.json``, ``tokenizer.safetensors`` and ``generator.safetensors`` into a folder."""
    for name, module in (("tokenizer", system.tokenizer), ("generator", Transformer(system))):
        tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in module.state_dict().items()}
        hub.save_tensors(tensors, folder / f"{name}.safetensors", {"system": "var", "part": name})
    hub.save_json({"system": "var", **asdict(system.config)}, folder / "config.json")


def read_config(folder: Path) -> VARConfig:
    """The configuration of a model's folder, without its weights. Raises WeightsError, InputError on wrong files."""
    config = hub.read_json(folder / "config.json")
    if config.pop("system", "var") != "var":
        raise WeightsError(f"{folder} holds a model of another system than var")
    return build(VARConfig, config, str(folder / "config.json"))


def load(folder: Path, precision: str = "fp32") -> VAR:
    """A VAR that ``save`` wrote. Raises WeightsError where files are missing, damaged or don't fit."""
    config = read_config(folder)
    try:
        system = VAR(config).eval()
    except Exception as error:  # sizes that cannot be, which every layer refuses in a way of its own
        reason = " ".join(str(error).split())[:160]
        raise WeightsError(f"{folder / 'config.json'} doesn't describe a model ({reason})") from None
    for name, module in (("tokenizer", system.tokenizer), ("generator", Transformer(system))):
        path = folder / f"{name}.safetensors"
        tensors = {n: t.float() if t.is_floating_point() else t for n, t in hub.read_tensors(path).items()}
        hub.load_published(module, tensors, ((r"(.*)", r"\1"),), str(path))
    return system.to_precision(precision)


def shipped_folder(name: str) -> Path:
    """Where a trained model that comes with the package lies. Raises WeightsError where it isn't there."""
    folder = Path(str(files("nextscale").joinpath("weights").joinpath(name)))
    if not (folder / "config.json").is_file():
        raise WeightsError(f"the trained model {name!r} is not in this installation (no {folder}); install again")
    return folder


def shipped(name: str) -> VAR:
    """A trained model that comes with the package."""
    return load(shipped_folder(name))
