"""What all systems share: settings, generate, stream, edit and score. What pictures are of is a subclass's business."""
from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nextscale.acceleration.litevar import quantise
from nextscale.canvas import Canvas
from nextscale.context import Hook
from nextscale.data.buckets import Bucket
from nextscale.devices import free_memory
from nextscale.errors import InputError
from nextscale.heads.categorical import Filter
from nextscale.hub import NameMap
from nextscale.layers.quantised import QuantisedLinear
from nextscale.layers.resize import resize
from nextscale.noise import Keyed, Noise
from nextscale.objectives.teacher_forcing import teacher_forcing_loss
from nextscale.plan import Plan
from nextscale.run import Condition, Run
from nextscale.sampling import editing
from nextscale.sampling.filters import make_filters
from nextscale.sampling.generation import (
    Generation,
    OutputKind,
    Preview,
    Progress,
    Request,
    apart,
    check_output,
    check_requests,
    chunks,
    convert,
    join_images,
    joined,
    picture_seeds,
    smooth_codes,
)
from nextscale.sampling.graphs import CapturedSteps
from nextscale.sampling.guidance import Guidance, make_guidance
from nextscale.sampling.memory_plan import Batches, needs, plan_batches
from nextscale.sampling.score import LogProb, score
from nextscale.sampling.steps import sample_steps, walked
from nextscale.tokenizers import pyramid
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.tokenizer import Tokenizer

GRAPHS = 64
"""Graphs that the compiler may make of a network before it leaves the next as it is."""

Schedule = Sequence[tuple[int, int]]  # grids (h, w), coarse to fine
Label = Any  # what a picture is to be of, as the system takes it


@dataclass(frozen=True)
class Config:
    """A whole system: tokenizer and network; a system adds its network's configuration, what tells it what pictures
    are of, and ``settings``, its published sampling settings by purpose, ``pictures`` (what generate uses by default)
    and ``fid``."""

    slug: ClassVar[str]

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    generator: Any = None


class Transformer(nn.Module):
    """What a published transformer file holds: everything of a system but its tokenizer."""

    def __init__(self, system: System):
        super().__init__()
        for name in system.transformer_parts:
            setattr(self, name, getattr(system, name))


class System(nn.Module):
    """A tokenizer, a network, a head and conditions under one loop: ``generate``, ``stream``, ``edit``, ``log_prob``,
    ``encode``, ``decode``, ``loss``. A system builds its parts and says where it departs."""

    config_type: ClassVar[type[Config]]
    tokenizer: Tokenizer
    generator: Any
    head: Any

    # What of the system the weights file of the transformer holds, by attribute.
    transformer_parts: tuple[str, ...] = ("generator", "head")

    # What is trained by itself, one after the other; empty where all is trained together.
    parts: ClassVar[tuple[str, ...]] = ()

    # Whether ``log_prob`` knows what probability tokens have; else a loss is all there is to report.
    likelihood: ClassVar[bool] = True

    # How many nats a token has where its loss is 1.
    nats_of_loss: float = 1.0

    # Of generator, head and labels those that weight decay leaves alone.
    undecayed: ClassVar[tuple[str, ...]] = ()

    # Further modules, by attribute, each with a weights file of its own, and systems whose folders a training may
    # begin with beside its own.
    further: ClassVar[tuple[str, ...]] = ()
    starts_from: ClassVar[tuple[str, ...]] = ()

    # What low-rank adapters go to by default, by name; empty for all products of the network.
    adapter_targets: tuple[str, ...] = ()

    # Share of a training that is done, which the trainer sets, for losses that change with it.
    progress: float = 1.0

    def __init__(self, config: Config):
        super().__init__()
        self.config: Any = config

    @classmethod
    def fitted(cls, tokenizer: Tokenizer) -> Tokenizer:
        """A trained tokenizer as this system uses it: as it is, or under another configuration of the same weights."""
        return tokenizer

    def initialise(self, gate: float = 1e-3) -> System:
        """The published initialisation of everything but the tokenizer, for training from scratch.

        gate: initial factor on what a block adds, where the system has one.
        """
        raise NotImplementedError

    def train_part(self, part: str) -> None:
        """Train one of the system's parts from here on and freeze the others, where it has several (``parts``).

        Raises InputError for a part that there isn't.
        """
        if part not in self.parts:
            has = f"has the parts {', '.join(self.parts)}" if self.parts else "is trained as a whole"
            raise InputError(f"part {part!r}: {type(self).__name__} {has}")

    def published_names(self) -> tuple[NameMap, ...]:
        """Maps from the published tensor names to this library's: of the tokenizer's file, of the network's, and of
        those of ``further`` modules."""
        raise InputError(f"no published weights of {self.config.slug} are known")

    def published_tensors(self, part: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Published tensors of a part (``tokenizer``, ``generator``, a further one) in the shapes held here."""
        return tensors

    def guidance(self, used: Any) -> Guidance:
        """Guidance by the settings."""
        return make_guidance(used.guidance_scale, used.guidance_schedule)

    def filters(self, used: Any) -> tuple[Filter, ...]:
        """Filters by the settings, in the order in which they act."""
        return make_filters(used.temperature, used.top_k, used.top_p, used.temperatures, used.temperature_last)

    def soft(self, used: Any) -> Callable[..., Tensor] | None:
        """What makes code vectors to be written in the place of the codes that were drawn, where the settings ask for
        it."""
        return smooth_codes(self.tokenizer.quantiser.codes_VC()) if used.smooth else None

    def order(self, plan: Plan) -> Tensor | None:
        """The cells (1, L, 3) of a plan's rows where steps predict a part of theirs; None: the plan's own."""
        return None

    @classmethod
    def schedules(cls, tokenizer: TokenizerConfig, largest_ratio: float, multiple: int) -> dict[Bucket, Schedule]:
        """The shapes of pictures that a training may have, (height, width) in pixels, each with its schedule.

        largest_ratio: of the longer to the shorter side; multiple: of what sides are multiples, in pixels, where the
        system has no ratios of its own. ``loss`` of a system that has several takes a ``plan``. Raises InputError where
        it has one shape only.
        """
        raise InputError(f"{cls.__name__} trains on pictures of one shape; leave data.largest_ratio at 1, or use a "
                         "system that draws several, infinity or flexvar")

    def plan_of(self, schedule: Schedule | None) -> Plan:
        """The plan of a generation: the model's own, or that of other grids where the system can follow one.

        Raises InputError where it can't.
        """
        if schedule is None or schedule == [step.grid for step in self.plan]:
            return self.plan
        raise InputError(f"{type(self).__name__} draws by the schedule it was trained with, "
                         f"{[step.grid for step in self.plan]}; leave the schedule out")

    def plan_for(self, used: Any, schedule: Schedule | None = None) -> Plan:
        """The plan that pictures are drawn by under some settings: ``plan_of`` where the settings don't matter."""
        return self.plan_of(schedule)

    def tokens_of(self, run: Run) -> list[Tensor]:
        """The tokens of a run as ``decode`` takes them."""
        return run.tokens

    def products(self, pictures: int, plan: Plan | None = None) -> list[tuple[int, int, int, int, int, float]]:
        """The matrix products of a training pass over the steps of a plan, by default all of the system's own: (n, k,
        m, how many, batch, share of the arithmetic that the visibility asks for). None are told by default, see
        ``products_of_plan``."""
        return []

    def products_of_plan(self, pictures: int, plan: Plan | None) -> list[tuple[int, int, int, int, int, float]]:
        """``products`` where training is one pass over the whole plan: the network's and the output layer's."""
        plan = plan or self.plan
        width, vocabulary = self.config.generator.width, self.config.tokenizer.vocabulary
        return [*self.generator.products(plan, pictures), (pictures * plan.length, width, vocabulary, 1, 1, 1.0)]

    @property
    def plan(self) -> Plan:
        return self.tokenizer.plan

    @property
    def markov(self) -> bool:
        """Whether a step hangs on those before it through the canvas alone, so that it can be drawn from any canvas."""
        return False

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.head.parameters()).device
        return device

    @property
    def rounded(self) -> bool:
        """Whether weights of the network were rounded to integers."""
        return any(isinstance(layer, QuantisedLinear) for layer in self.generator.modules())

    def to_precision(self, precision: str) -> System:
        """Hold the weights in ``fp32`` or ``bf16``; quantiser and canvas stay in float32 either way.

        ``int8``: bf16, with the weights of the network's large products rounded to 8 bits (LiteVAR's rule,
        arXiv 2411.17178), which can't be taken back. Raises InputError on others, and after ``int8``.
        """
        if precision not in ("fp32", "bf16", "int8"):
            raise InputError(f"precision {precision!r} is unknown; use fp32, bf16 or int8")
        if self.rounded:
            raise InputError("precision: the weights were rounded already; load the model again")
        if precision == "int8":
            quantise(self.generator)
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        tokenizer = self.tokenizer
        for part in (Transformer(self), tokenizer.encoder, tokenizer.decoder, tokenizer.to_latent,
                     tokenizer.from_latent):
            part.to(dtype)
        self.tokenizer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    # Pictures and tokens

    @torch.no_grad()
    def encode(self, pictures: Tensor, schedule: Schedule | None = None) -> list[Tensor]:
        """Tokens of every scale, (B, h * w) each, of pictures (B, 3, S, S) in [-1, 1]. schedule: as ``generate``'s."""
        plan = self.plan_of(schedule)
        return self.tokenizer.encode(pictures.to(self.device), plan, order=self.order(plan)).tokens

    @torch.no_grad()
    def decode(self, tokens: Sequence[Tensor], schedule: Schedule | None = None) -> Tensor:
        """Pictures (B, 3, S, S) in [-1, 1] of tokens; fewer scales give a coarse preview."""
        plan = self.plan_of(schedule)
        return self.tokenizer.decode_tokens(self._checked(tokens, plan, partly=True), plan, self.order(plan))

    def _checked(self, tokens: Sequence[Tensor], plan: Plan, partly: bool = False) -> list[Tensor]:
        """Tokens of every scale (``partly``: of the first scales), or an InputError that says what doesn't fit."""
        if len(tokens) > len(plan) or (len(tokens) < len(plan) and not (partly and tokens)):
            raise InputError(f"tokens: {len(tokens)} scales were given, the model has {len(plan)}")
        for k, (found, step) in enumerate(zip(tokens, plan, strict=False)):
            wanted = (len(tokens[0]), step.rows, *self.token_shape)
            if tuple(found.shape) != wanted:
                h, w = step.grid
                raise InputError(f"tokens: scale {k} has shape {tuple(found.shape)}; {step.rows} of {h}x{w} cells of "
                                 f"every picture are {wanted}")
            self.check_values(k, found)
        return [found.to(self.device) for found in tokens]

    @classmethod
    def takes(cls, config: Any) -> dict[str, bool]:
        """What batches of a training have beside tokens and labels."""
        return {"captions": False, "latents": False}

    def training_rows(self, batch: Mapping[str, Any]) -> Any:
        """What of a training batch says what its pictures are of, as ``loss`` takes it."""
        return batch["labels"]

    def training_plan(self, batch: Mapping[str, Any]) -> Plan:
        """The plan of a training batch: of its schedule where batches differ in shape, see ``schedules``."""
        return self.plan_of(batch["schedule"][0]) if "schedule" in batch else self.plan

    def training_options(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What else ``loss`` takes of a training batch."""
        found = {"control": batch["control"]} if "control" in batch else {}
        return found | ({"plan": self.training_plan(batch)} if "schedule" in batch else {})

    @property
    def token_shape(self) -> tuple[int, ...]:
        """The shape of one token: none for an index, (C,) for a vector."""
        return ()

    def check_values(self, step: int, tokens: Tensor) -> None:
        """Raises InputError where tokens of a step are none that the tokenizer has."""
        vocabulary = self.config.tokenizer.vocabulary
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
            raise InputError(f"tokens: scale {step} has values outside 0..{vocabulary - 1}")

    def training_tokens(self, cached: Tensor, plan: Plan | None = None) -> list[Tensor]:
        """The tokens of every step of a plan (by default the system's own), (B, L_k), of a batch of a token cache,
        (B, L)."""
        return list(cached.long().split([step.rows for step in plan or self.plan], 1))

    # Sampling

    def label_rows(self, labels: Sequence[Label] | Label, count: int | None = None) -> Any:
        """What pictures are asked for, a row each: has a length, and slices that are such rows again. One label serves
        ``count`` pictures. Raises InputError for labels that aren't known."""
        raise NotImplementedError

    def label_names(self, row: Any) -> Any:
        """What a row of ``label_rows`` is called."""
        raise NotImplementedError

    def condition(self, rows: Any) -> Condition:
        """The condition that rows of ``label_rows`` mean."""
        raise NotImplementedError

    def dropped(self, rows: Any, label_dropout: float, part_dropout: float) -> Any:
        """What a training pass takes of such rows, where some lose their condition, so that there is something to guide
        away from: wholly, or one kind of it."""
        raise NotImplementedError

    def start(self, rows: Any, guidance: Guidance, noise: Noise, plan: Plan | None = None) -> Run:
        """A run at its first step, by the model's plan or another that the system can follow."""
        plan = plan or self.plan
        return Run.start(plan, self.tokenizer.quantiser, self.condition(rows), guidance.branches, noise, len(rows),
                         self.device, self.order(plan))

    @torch.no_grad()
    def generate(self, labels: Sequence[Label] | Label = None, count: int | None = None, *, seed: int = 0,
                 seeds: Sequence[int] | None = None, purpose: str = "pictures", guidance: Guidance | None = None,
                 hooks: Sequence[Hook] = (), callback: Callable[[int, Run], bool | None] | None = None,
                 batch_size: int = 16, memory_limit: int | None = None,
                 on_batch: Callable[[Generation], None] | None = None, progress: bool | None = None,
                 output: OutputKind = "pil", schedule: Schedule | None = None, doing: str = "drawing",
                 **settings: Any) -> Generation:
        """Draw pictures.

        labels: what pictures are of, one for ``count`` pictures or one a picture, as ``label_rows`` takes them: class
        index, name, None, a tuple where the model has several kinds of label; a prompt where text steers. seed: picture
        i gets ``seed + i``, whatever the batch size; or give ``seeds``.
        purpose: which published settings to start from, ``settings`` (see ``Settings``) change them. guidance: an
        object of your own instead of the settings'. hooks: see ``nextscale.context.Hook``. callback: called with
        (step, run) after every step; True stops. batch_size: pictures drawn at once, fewer where ``memory_limit`` (in
        bytes, weights included) or what the device has left says so; the log tells. on_batch: called with every batch
        as it is done. progress: None shows it on terminals. output: pil, numpy, torch. schedule: other grids than the
        trained ones, where the system can follow them (see ``plan_of``). doing: what the progress line says.

        Raises InputError on unknown labels, settings or counts that don't match, and on a limit that is too low.
        """
        check_output(output)
        rows = self.label_rows(labels, count)
        names = [self.label_names(row) for row in rows]  # before the device has work that the host would wait for
        used, all_seeds = self.settings_for(purpose, settings), picture_seeds(len(rows), seed, seeds)
        plan, guidance = self.plan_for(used, schedule), guidance or self.guidance(used)
        sizes = self.batches(min(batch_size, len(rows)), plan, guidance, memory_limit, used)
        began, parts, stopped = time.perf_counter(), [], False
        pieces = list(chunks(len(rows), sizes.drawn))
        with Progress(len(pieces) * walked(plan, hooks), doing, progress) as bar:
            for piece in pieces:
                start, run = time.perf_counter(), None
                for run in self._steps(rows[piece], Keyed.from_seeds(all_seeds[piece], self.device), used,
                                       guidance, [hook.part(piece) for hook in hooks], plan):
                    bar.advance()
                    if callback is not None and callback(run.cursor - 1, run):
                        stopped = True
                        break
                assert run is not None
                log_prob = torch.cat(run.log_probs, 1).sum(1) if self.likelihood else None
                tokens, canvas = list(self.tokens_of(run)), run.canvas
                del run  # and with it all that it remembers, before the decoder wants its room
                images = join_images([convert(self.tokenizer.decode(canvas.map()[at], sizes.strips), output)
                                      for at in chunks(len(canvas.value), sizes.decoded)], output)
                parts.append(Generation(images, tokens, log_prob, all_seeds[piece], names[piece], used,
                                        time.perf_counter() - start, stopped))
                if on_batch is not None:
                    on_batch(parts[-1])
                if stopped:
                    break
        return joined(parts, output, time.perf_counter() - began)

    def compile_networks(self, backend: Any = "inductor") -> None:
        """Compile the networks that draw and the decoder, each when it is first used; a size that comes second makes
        them general ones."""
        limits: Any = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, GRAPHS)
        self.generator.compile(backend=backend)
        self.tokenizer.decoder.compile(backend=backend)

    def warm_up(self, labels: Sequence[Label] | Label = None, count: int | None = None, *, compile: bool = True,
                capture: bool = False, backend: Any = "inductor", hooks: Sequence[Hook] = (),
                **options: Any) -> list[Hook]:
        """Make ready for many batches like this one, by drawing it once behind a progress line: what compiling and
        capturing cost, minutes for a large model, is over when it returns.

        compile: networks and decoder with ``torch.compile``; capture: every step as a CUDA graph (``CapturedSteps``;
        elsewhere than on CUDA it does nothing). Other arguments: as ``generate``'s but ``output``; its batches should
        have the same size, for another is compiled and captured when it comes. Returns the hooks to draw with.
        """
        if compile:
            self.compile_networks(backend)
        drawn_with = [*hooks, CapturedSteps()] if capture else list(hooks)
        self.generate(labels, count, hooks=drawn_with, output="torch", doing="warming up", **options)
        return drawn_with

    def networks(self, plan: Plan, used: Any = None) -> Sequence[tuple[Any, range]]:
        """Who draws the steps of a plan under some settings (None: the model's own), one after the other: what has a
        ``generator``, and which steps. One that follows another first goes through all steps before its own."""
        return [(self, range(len(plan)))]

    def batches(self, asked: int, plan: Plan, guidance: Guidance, limit: int | None = None,
                used: Any = None) -> Batches:
        """How many pictures are drawn and decoded at once where ``asked`` are wanted; one line of the log says so where
        they are fewer. limit: bytes, weights included; None: what the device has left. used: the settings."""
        if asked < 1:
            raise InputError(f"batch_size is {asked}; it must be at least 1")
        if limit is None and not all(hasattr(model.generator, "memory_bytes")  # another package's, that doesn't tell
                                     for model, _ in self.networks(plan, used)):
            return Batches(asked, asked)
        need = needs(self, plan, len(guidance.branches), used)
        found = plan_batches(asked, need, limit, free_memory(self.device) if limit is None else None)
        if found.note is not None:
            logging.getLogger("nextscale").warning(found.note)
        return found

    def generate_requests(self, requests: Sequence[Request], *, purpose: str = "pictures",
                          guidance: Guidance | None = None, hooks: Sequence[Hook] = (), output: OutputKind = "pil",
                          batch_size: int = 16, memory_limit: int | None = None, progress: bool | None = None,
                          **settings: Any) -> list[Generation]:
        """Draw what each request asks for, one picture each, in the order of the requests.

        Requests of one schedule are a bucket and are drawn together, whatever stands between them; a picture hangs on
        its own request alone. Other arguments: as ``generate``'s. Raises InputError where the system can't draw a size
        or schedule, and for a hook that holds something a picture, before anything is drawn.
        """
        check_output(output)
        check_requests(hooks)
        used, buckets = self.settings_for(purpose, settings), dict[Plan, list[int]]()
        for i, request in enumerate(requests):
            self.label_rows([request.label])
            schedule = request.schedule if request.size is None else self.schedule_for(request.size)
            buckets.setdefault(self.plan_for(used, schedule), []).append(i)
        found: dict[int, Generation] = {}
        for plan, members in buckets.items():
            own = plan == self.plan_for(used)
            drawn = self.generate([requests[i].label for i in members], seeds=[requests[i].seed for i in members],
                                  purpose=purpose, guidance=guidance, hooks=hooks, output=output,
                                  batch_size=batch_size, memory_limit=memory_limit, progress=progress,
                                  schedule=None if own else list(plan.grids), **settings)
            found.update(zip(members, apart(drawn), strict=True))
        return [found[i] for i in range(len(requests))]

    def schedule_for(self, size: tuple[int, int]) -> Schedule | None:
        """The schedule that draws pictures of a height and width in pixels; None is the model's own.

        Raises InputError for sizes that the system can't draw.
        """
        if size == self.tokenizer.picture_size:
            return None
        h, w = self.tokenizer.picture_size
        raise InputError(f"{type(self).__name__} draws {h}x{w} pixels only, not {size[0]}x{size[1]}")

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """The grid of pictures of a height and width in pixels. Raises InputError where no grid has that size."""
        factor = self.config.tokenizer.factor
        if size[0] % factor or size[1] % factor or min(size) < factor:
            raise InputError(f"size {size[0]}x{size[1]}: both must be multiples of {factor} pixels")
        return size[0] // factor, size[1] // factor

    def size_of(self, schedule: Schedule | None = None) -> tuple[int, int]:
        """Height and width in pixels of what a schedule draws; None is the model's own. Raises InputError where the
        system can't follow it."""
        (h, w), factor = self.plan_of(schedule).grid, self.config.tokenizer.factor
        return h * factor, w * factor

    @torch.no_grad()
    def stream(self, labels: Sequence[Label] | Label = None, count: int | None = None, *, seed: int = 0,
               seeds: Sequence[int] | None = None, purpose: str = "pictures", guidance: Guidance | None = None,
               hooks: Sequence[Hook] = (), output: OutputKind = "pil", schedule: Schedule | None = None,
               **settings: Any) -> Iterator[Preview]:
        """The same step by step, all pictures in one batch: a preview after every step, the last is the picture."""
        check_output(output)
        rows = self.label_rows(labels, count)
        used = self.settings_for(purpose, settings)
        noise = Keyed.from_seeds(picture_seeds(len(rows), seed, seeds), self.device)
        plan = self.plan_for(used, schedule)
        for run in self._steps(rows, noise, used, guidance, hooks, plan):
            yield Preview(run.cursor - 1, walked(plan, hooks), convert(self.tokenizer.decode(run.canvas), output), run)

    def settings_for(self, purpose: str, changes: dict[str, Any]) -> Any:
        """Published settings for a purpose, with changes."""
        if purpose not in self.config.settings:
            raise InputError(f"purpose {purpose!r} is unknown; this model has settings for "
                             f"{', '.join(self.config.settings)}")
        return self.config.settings[purpose].changed(changes)

    def _steps(self, rows: Any, noise: Noise, used: Any, guidance: Guidance | None,
               hooks: Sequence[Hook], plan: Plan) -> Iterator[Run]:
        guidance = guidance or self.guidance(used)
        yield from self.sampled(self.start(rows, guidance, noise, plan), guidance, used, hooks)

    def sampled(self, run: Run, guidance: Guidance, used: Any, hooks: Sequence[Hook] = ()) -> Iterator[Run]:
        """A run through its loop, step by step, with the network in evaluation mode."""
        with ExitStack() as stack:
            if self.training:
                self.eval()
                stack.callback(self.train)
            yield from self.loop(run, guidance, used, hooks, self.soft(used))

    def loop(self, run: Run, guidance: Guidance, used: Any, hooks: Sequence[Hook],
             soft: Callable[..., Tensor] | None) -> Iterator[Run]:
        """The loop that a run goes through."""
        return sample_steps(self, run, guidance, self.filters(used), hooks, soft)

    # Editing

    @torch.no_grad()
    def edit(self, pictures: Tensor, redraw: Tensor, labels: Sequence[Label] | Label = None, *, seed: int = 0,
             seeds: Sequence[int] | None = None, purpose: str = "pictures", output: OutputKind = "pil",
             progress: bool | None = None, schedule: Schedule | None = None, hooks: Sequence[Hook] = (),
             rule: editing.EditRule = "tokens", **settings: Any) -> Generation:
        """Redraw a region without training: in- and outpainting, or another class inside a region.

        pictures: (B, 3, S, S') in [-1, 1]; redraw: bool (B, S, S'), True where to draw anew; both of the size that the
        schedule means. rule: ``tokens`` forces the
        tokens of untouched cells at every scale, so the rest equals the tokenizer's reconstruction; ``latent`` keeps
        the latent of cells whose nearest pixel is known, see ``editing.KnownLatent``, and then the tokens that are
        returned are not the picture's. Raises InputError when sizes are others, and on unknown rules.
        """
        self.check_edit(pictures, redraw, schedule)
        if rule not in ("tokens", "latent"):
            raise InputError(f"rule {rule!r} is unknown; use tokens or latent")
        plan = self.plan_of(schedule)
        tokens, kept = self.encode(pictures, schedule), redraw.to(self.device)
        if rule == "latent":
            canvas = Canvas.empty(plan, self.tokenizer.quantiser, len(pictures), self.device)
            hook: Hook = editing.KnownLatent(editing.partial_canvases(tokens, canvas, self.order(plan)),
                                             editing.covered_cells(kept, plan.grid))
        else:
            hook = editing.ForcedTokens(tokens, editing.keep_masks(editing.latent_mask(kept, plan.grid), plan))
        return self.generate(labels, len(pictures), seed=seed, seeds=seeds, purpose=purpose, hooks=[*hooks, hook],
                             batch_size=len(pictures), progress=progress, output=output, schedule=schedule, **settings)

    @torch.no_grad()
    def enlarge(self, pictures: Tensor, labels: Sequence[Label] | Label = None, *, scales: int | None = None,
                hooks: Sequence[Hook] = (), **options: Any) -> Generation:
        """Super-resolution without training: the coarse scales are those of small pictures, the others are drawn.

        pictures: (B, 3, h, w) in [-1, 1], resized to the schedule's size before they are encoded; scales: how many of
        their scales are given, by default those whose grids the small pictures fill; options: as ``generate``'s. Raises
        InputError for a number of scales that the schedule hasn't.
        """
        schedule = options.get("schedule")
        plan, (height, width) = self.plan_of(schedule), self.size_of(schedule)
        if scales is None:
            filled = [h * height <= plan.grid[0] * pictures.shape[2] and w * width <= plan.grid[1] * pictures.shape[3]
                      for h, w in (step.grid for step in plan)]
            scales = max(1, sum(filled))
        if not 0 < scales <= len(plan):
            raise InputError(f"scales is {scales}; of this model's {len(plan)} scales 1 to {len(plan)} can be given")
        whole = resize(pictures.to(self.device), (height, width), "bicubic").clamp(-1, 1)
        keep = editing.keep_first(plan, scales, len(pictures), self.device)
        forced = editing.ForcedTokens(self.encode(whole, schedule), keep)
        return self.generate(labels, len(pictures), hooks=[*hooks, forced], **{**options, "batch_size": len(pictures)})

    def check_edit(self, pictures: Tensor, redraw: Tensor, schedule: Schedule | None = None) -> None:
        """Raises InputError where pictures or masks of an edit are not of the size that the schedule means."""
        h, w = self.size_of(schedule)
        if tuple(pictures.shape[1:]) != (3, h, w):
            by = "" if schedule is None else " by this schedule"
            raise InputError(f"picture: this model edits {h}x{w} pixels{by}, got {tuple(pictures.shape[2:])}; resize "
                             "it")
        if tuple(redraw.shape) != (len(pictures), h, w):
            raise InputError(f"mask: its shape {tuple(redraw.shape)} must be {(len(pictures), h, w)}, as the picture's")

    # Likelihood and training

    def scored_with(self) -> dict[str, Any]:
        """What ``log_prob`` hangs on beside the weights, to tell results that are kept apart."""
        return {}

    def log_prob(self, pictures_or_tokens: Tensor | Sequence[Tensor], labels: Sequence[Label] | Label = None,
                 guidance: Guidance | None = None, filters: Sequence[Any] = (),
                 schedule: Schedule | None = None, hooks: Sequence[Hook] = ()) -> LogProb:
        """Log-probability of pictures (B, 3, S, S) or of their tokens: a token, a step and a picture, in nats.

        guidance and filters: score under a sampler's distribution instead of the model's own. schedule and hooks: as
        ``generate``'s.
        """
        plan = self.plan_of(schedule)
        tokens = (self.encode(pictures_or_tokens, schedule) if isinstance(pictures_or_tokens, Tensor)
                  else self._checked(pictures_or_tokens, plan))
        guidance = guidance or make_guidance(1.0)
        condition = self.condition(self.label_rows(labels, len(tokens[0])))
        with torch.no_grad():
            canvas = Canvas.empty(plan, self.tokenizer.quantiser, len(tokens[0]), self.device)
            reads = pyramid.replay(tokens, canvas).reads
            return score(self, plan, tokens, reads, condition, guidance, guidance.branches, filters, hooks)

    def row_weights(self, plan: Plan) -> list[float]:
        """What a row of every step weighs in the loss where nothing else is asked for."""
        return [1.0] * len(plan)

    def loss(self, tokens: Sequence[Tensor], rows: Any, label_dropout: float = 0.1,
             part_dropout: float = 0.0, step_weights: Sequence[float] | None = None,
             label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
        """Teacher-forcing cross-entropy: the loss, its value at every step (K,), the share of right guesses (K,), None
        where tokens are not guessed.

        tokens: of every step, (B, L_k); of the first steps only, to train these.
        """
        return self.hooked_loss(tokens, rows, (), label_dropout, part_dropout, step_weights, label_smoothing)

    def hooked_loss(self, tokens: Sequence[Tensor], rows: Any, hooks: Sequence[Hook],
                    label_dropout: float = 0.1, part_dropout: float = 0.0, step_weights: Sequence[float] | None = None,
                    label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """``loss`` with what acts inside the network."""
        plan = self.plan if len(tokens) == len(self.plan) else replace(self.plan, steps=self.plan.steps[:len(tokens)])
        with torch.no_grad():
            canvas = Canvas.empty(self.plan, self.tokenizer.quantiser, len(rows), self.device)
            reads = pyramid.replay(list(tokens), canvas).reads
        cond = self.dropped(rows, label_dropout, part_dropout)
        return teacher_forcing_loss(self.generator, self.head, plan, tokens, reads, cond, step_weights,
                                    label_smoothing, hooks)
