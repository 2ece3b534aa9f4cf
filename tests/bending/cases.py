"""Tiny systems with large random weights, and the cases that the invariants run over: every double, and pairs."""
from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from doubles import CommitAfterClean, ControlTower, MaskedRounds
from torch import Tensor

from nextscale.acceleration.cache_baselines import PyramidKV, SlidingWindow, SnapKV
from nextscale.acceleration.fastvar import FastVAR
from nextscale.acceleration.hack import HACK
from nextscale.acceleration.litevar import LiteVAR
from nextscale.acceleration.scalekv import ScaleKV
from nextscale.conditions.class_label import ClassCondition, ClassTable
from nextscale.conditions.text import TextCondition, TextRows
from nextscale.conditions.text_features import TextFeatures
from nextscale.context import Context, Hook
from nextscale.generators.infinity import InfinityGeneratorConfig
from nextscale.generators.var import Block, VARGenerator, VARGeneratorConfig
from nextscale.heads.categorical import CategoricalHead
from nextscale.noise import Keyed
from nextscale.plan import PREVIOUS_ONLY, Plan
from nextscale.run import Condition, Rows, Run
from nextscale.sampling.diversevar import DiverseVAR
from nextscale.sampling.editing import ForcedTokens
from nextscale.sampling.guidance import ClassifierFree, Nested, Unguided
from nextscale.sampling.softcfg import SoftCFG
from nextscale.sampling.steps import sample_steps
from nextscale.systems.infinity import Infinity, InfinityConfig
from nextscale.tokenizers.autoencoder import AutoencoderConfig
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.tokenizer import Tokenizer

SCALES = ((1, 1), (2, 2), (3, 3), (4, 4))
WIDE = ((1, 1), (2, 2), (3, 4), (3, 5))  # a scale that repeats rows would leave pruning to chance
CLASSES, VOCABULARY = (5, 3), 24
BODY = VARGeneratorConfig(depth=2, width=32, heads=4)
SEEDS, LABELS = (11, 12, 13), ((0, 2), (3, 0), (4, 1))
AUTOENCODER = AutoencoderConfig(32, (1, 1, 2), 1, 1, 8, 32, "middle")


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Weights so large that every row, layer and head changes the tokens."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "scale_1H11" not in name:
            parameter.data.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5, generator=generator)


@functools.lru_cache
def model(grids: tuple[tuple[int, int], ...] = SCALES, maps: int = 1, seed: int = 0) -> Any:
    """A VAR; two maps make it a joint model of a control map and a picture (ControlVAR, arXiv 2406.09750)."""
    plan = Plan.scales(grids, maps=maps)
    tokenizer = Tokenizer(TokenizerConfig(AUTOENCODER, grids, VOCABULARY, phi_count=2)).eval()
    body, head = VARGenerator(BODY, plan, 8).eval(), CategoricalHead(BODY.width, VOCABULARY)
    labels = ClassTable(CLASSES, BODY.width)
    randomise(tokenizer.quantiser, 1)  # the same codes for every seed: systems that hand over share their tokenizer
    for i, part in enumerate((body, head, labels)):
        randomise(part, 10 * seed + i + 2)
        part.requires_grad_(False)
    tokenizer.requires_grad_(False)
    return SimpleNamespace(plan=plan, tokenizer=tokenizer, generator=body, head=head, labels=labels)


@functools.lru_cache
def text_model() -> Any:
    """An Infinity of a shape that is no square: bits for tokens, prompts of other lengths, attention to the text."""
    sizes = AutoencoderConfig(32, (1, 1, 2), 1, 1, 6, 32, "none", latent_kernel=0)
    network = InfinityGeneratorConfig(BODY.depth, BODY.width, BODY.heads, mlp_width=64, text_width=12, longest_text=5,
                                      pool_heads=2, frame=4)
    system = Infinity(InfinityConfig(TokenizerConfig(sizes, WIDE, kind="bsq", tokens="bits"), network)).eval()
    for i, part in enumerate((system.generator, system.head, system.text)):
        randomise(part, i + 3)
    return system.requires_grad_(False)


class TowerBlock(Block):
    """Told by a condition's vector alone."""

    def forward(self, x: Tensor, rows: Rows, ctx: Context, address: str, shared: Tensor | None) -> Tensor:
        cond = rows.cond.vector if isinstance(rows.cond, TextRows) else rows.cond
        found: Tensor = super().forward(x, replace(rows, cond=cond), ctx, address, shared)
        return found


@functools.lru_cache
def tower_block() -> Block:
    block = TowerBlock(BODY, 0.0).eval()
    randomise(block, 77)
    return block.requires_grad_(False)


def pruned(neutral: bool, m: Any, items: Sequence[int]) -> Hook:
    return FastVAR(0.0 if neutral else (0.5, 0.5))


def random_rows(neutral: bool, m: Any, items: Sequence[int]) -> Hook:
    """FastVAR's comparison: other rows, and nothing in the place of those that were left out."""
    return FastVAR(0.0 if neutral else (0.4, 0.4), score="random", restore="zero")


def layers(neutral: bool, m: Any, items: Sequence[int]) -> Hook:
    """Layers remember budgets of their own, each head other rows."""
    return ScaleKV(share=1.0, window=2) if neutral else ScaleKV(
        {"budgets": [None] * (len(m.plan) - 2) + [[4, 5], [5, 9]], "window": 2}, kernel=3)


def heads(neutral: bool, m: Any, items: Sequence[int]) -> Hook:
    """Heads of one layer remember budgets of their own, and attention reads no more."""
    table = {"contextual": [[True, False, True, False], [False, False, True, True]]}
    return HACK(table, compression=0.0 if neutral else 0.6, queries=3)


def snapped(neutral: bool, m: Any, items: Sequence[int]) -> Hook:
    """Every head keeps what the last rows of a step attend to most."""
    return SnapKV(1.0 if neutral else 0.5, window=2, kernel=3)


def pyramid(neutral: bool, m: Any, items: Sequence[int]) -> Hook:
    """The same with a smaller budget for the later layer."""
    return PyramidKV(1.0, window=2, kernel=3, beta=1.0) if neutral else PyramidKV(0.5, window=2, kernel=3, beta=4.0)


def sliding(neutral: bool, m: Any, items: Sequence[int]) -> Hook:
    """The first rows and the latest stay."""
    return SlidingWindow(1.0 if neutral else 0.4, sinks=1)


def tower(neutral: bool, m: Any, items: Sequence[int]) -> Hook:
    control = torch.randn(len(SEEDS), len(m.plan), BODY.width, generator=torch.Generator().manual_seed(5))
    return ControlTower({"base.1": tower_block()}, control[list(items)], 0.0 if neutral else 1.0)


def forced(neutral: bool, m: Any, items: Sequence[int]) -> Hook:
    """One map of a joint model is given, or the first rows of a picture's steps."""
    generator, plan = torch.Generator().manual_seed(6), m.plan
    bits = getattr(m.head, "bits", 0)
    shape = (len(SEEDS), plan.length, bits) if bits else (len(SEEDS), plan.length)
    tokens = torch.randint(2 if bits else VOCABULARY, shape, generator=generator)
    tokens = tokens.bool() if bits else tokens
    keep = torch.rand(len(SEEDS), plan.length, generator=generator) < 0.5
    if plan.steps[0].maps == 2:
        keep = (plan.cells[:, 0] == 0).expand(len(SEEDS), -1)
    sizes = [step.rows for step in plan]
    given, kept = tokens[list(items)].split(sizes, 1), keep[list(items)].split(sizes, 1)
    return ForcedTokens(given, [torch.zeros_like(k) if neutral else k for k in kept])


def window(neutral: bool, m: Any, items: Sequence[int]) -> Hook:
    """Rows see less than the visibility shows."""
    return LiteVAR(window=1.0 if neutral else 0.2, dense=1)


def shared(neutral: bool, m: Any, items: Sequence[int]) -> Hook:
    """One branch's attention serves all, and the others' keys are not in memory."""
    return LiteVAR(share=() if neutral else (1,))


def softcfg(neutral: bool, m: Any, items: Sequence[int]) -> Hook:
    return SoftCFG(0.0 if neutral else 1.0)


def diverse(neutral: bool, m: Any, items: Sequence[int]) -> Hook:
    return DiverseVAR(0.0, 0.0) if neutral else DiverseVAR(1.0, 0.5, at_steps=(1, 2))


HOOKS: dict[str, Callable[[bool, Any, Sequence[int]], Hook]] = {
    "pruned": pruned, "random": random_rows, "layers": layers, "heads": heads, "tower": tower, "forced": forced,
    "window": window, "shared": shared, "softcfg": softcfg, "diverse": diverse, "snapkv": snapped,
    "pyramidkv": pyramid, "sliding": sliding}
HEADS: dict[str, Callable[[Any, bool], Any]] = {
    "plain": lambda m, neutral: m.head,
    "clean": lambda m, neutral: CommitAfterClean(m.head, 1, 0.0) if neutral else CommitAfterClean(m.head),
    "rounds": lambda m, neutral: MaskedRounds(m.head, m.generator, 1 if neutral else 3)}
GUIDANCE: dict[str, Any] = {
    "none": Unguided(), "two": ClassifierFree(2.0),
    "three": Nested(("conditional", "without_1", "unconditional"), (1.0, 0.5))}


@dataclass(frozen=True)
class Case:
    """Hooks (first is innermost), a head, a guidance, a visibility, the number of maps, and whether of text: one way to
    sample. neutral: all of it at the setting that does nothing; idle: those of the hooks."""

    hooks: tuple[str, ...] = ()
    head: str = "plain"
    guidance: str = "two"
    maps: int = 1
    previous_only: bool = False
    neutral: bool = False
    text: bool = False
    idle: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"idle-{name}" if name in self.idle else name for name in self.hooks]
        parts += [p for p in (self.head, self.guidance) if p not in ("plain", "two")]
        parts += ["joint"] * (self.maps == 2) + ["previous_only"] * self.previous_only + ["text"] * self.text
        return "+".join(parts) or "nothing"

    @property
    def model(self) -> Any:
        return text_model() if self.text else model(maps=self.maps)

    @property
    def branches(self) -> tuple[str, ...]:
        return GUIDANCE[self.guidance].branches

    def make_hooks(self, items: Sequence[int] = range(len(SEEDS))) -> list[Hook]:
        """The hooks, for a run of the pictures ``items``."""
        return [HOOKS[name](self.neutral or name in self.idle, self.model, items) for name in self.hooks]

    def condition(self, items: Sequence[int] = range(len(SEEDS))) -> Condition:
        if self.text:
            generator = torch.Generator().manual_seed(8)
            prompts = [torch.randn(length, 12, generator=generator) for length in (4, 2, 5)]
            return TextCondition(self.model.text, TextFeatures.pack(prompts).gather(torch.tensor(list(items))))
        return ClassCondition(self.model.labels, torch.tensor(LABELS)[list(items)])

    def start(self, items: Sequence[int] = range(len(SEEDS))) -> Run:
        plan = replace(self.model.plan, visible=PREVIOUS_ONLY) if self.previous_only else self.model.plan
        noise = Keyed.from_seeds([SEEDS[i] for i in items])
        return Run.start(plan, self.model.tokenizer.quantiser, self.condition(items), self.branches, noise, len(items))

    def go(self, run: Run, until: int | None = None, hooks: Sequence[Hook] | None = None) -> Run:
        """Sample on, up to a step, with every promise of the seams checked on the way."""
        parts = SimpleNamespace(generator=self.model.generator, head=HEADS[self.head](self.model, self.neutral))
        for _ in sample_steps(parts, run, GUIDANCE[self.guidance], (), self.make_hooks() if hooks is None else hooks,
                              until=until, check=True):
            pass
        return run


SINGLE = [Case((name,)) for name in HOOKS]
POLICIES = ("layers", "heads", "snapkv", "pyramidkv", "sliding")
# Two policies of one memory, a hook twice, and what chooses rows in a branch whose keys are not there or changes what
# that branch reads, or drops keys before a window shows what is left. Each with words of the reason.
REFUSED = {
    **dict.fromkeys(itertools.combinations(POLICIES, 2), "each decide what the same layers remember"),
    **dict.fromkeys([("pruned", "random"), ("window", "shared")], "the run carries it twice"),
    **dict.fromkeys([("pruned", "shared"), ("random", "shared")], "picks rows in every branch by itself"),
    **dict.fromkeys([("layers", "shared"), ("heads", "shared"), ("shared", "softcfg"), ("shared", "snapkv"),
                     ("shared", "pyramidkv"), ("shared", "sliding")], "acts on the attention of every branch"),
    ("heads", "window"): "drops keys before attention reads them"}
# Without what is another hook at another setting, or chooses rows as another one does.
COMBINED = [name for name in HOOKS if name not in ("random", *POLICIES[2:])]
PAIRS = [Case(pair) for pair in itertools.combinations(COMBINED, 2) if pair not in REFUSED]
PAIRS += [Case(pair) for pair in (("pruned", "snapkv"), ("tower", "snapkv"), ("softcfg", "pyramidkv"),
                                  ("diverse", "pyramidkv"), ("pruned", "sliding"), ("window", "sliding"))]
# Rows pruned, memories shrunk and guidance softened at once; with two networks in test_collaborative.py.
TOGETHER = Case(("pruned", "layers", "softcfg"))
REVERSED = [Case(("layers", "pruned")), Case(("tower", "heads")), Case(("tower", "pruned")), Case(("window", "layers"))]
WITH_HEADS = [Case(hooks, head) for head in ("clean", "rounds") for hooks in ((), *((name,) for name in COMBINED))]
# One of a pair at the setting that does nothing.
ONE_IDLE = [replace(case, idle=(name,)) for case in PAIRS for name in case.hooks]
OTHERS = [Case((), guidance="three"), Case(("pruned", "layers"), guidance="three"), Case(("heads",), guidance="none"),
          *(Case(hooks, maps=2) for hooks in ((), ("pruned",), ("heads",), ("tower", "forced"), ("forced",))),
          *(Case(hooks, previous_only=True) for hooks in ((), ("pruned",), ("layers",), ("heads", "tower"))),
          Case(("layers",), "clean", previous_only=True),
          Case(("softcfg",), guidance="three"), Case(("softcfg", "diverse"), maps=2),
          Case(("layers", "softcfg"), previous_only=True)]
# Hooks on a system of text, at a shape that is no square.
TEXT = [Case(hooks, text=True) for hooks in ((), *((name,) for name in HOOKS), TOGETHER.hooks)]
CASES = [Case(), *SINGLE, *PAIRS, TOGETHER, *REVERSED, *WITH_HEADS, *OTHERS, *TEXT]


@functools.cache
def finished(case: Case) -> Run:
    """The case's run to the end; not to be gone on with."""
    return case.go(case.start())


def same_tokens(one: Run, other: Run) -> None:
    """Equal tokens, and log-probabilities within 1e-4."""
    assert len(one.tokens) == len(other.tokens)
    for k, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=True)):
        assert torch.equal(a, b), f"tokens of step {k} differ"
    difference = max(float((a - b).abs().max()) for a, b in zip(one.log_probs, other.log_probs, strict=True))
    assert difference < 1e-4, f"log-probabilities differ by {difference}"


def bits(run: Run) -> dict[str, Tensor]:
    """Copies of everything a run holds."""
    memory, noise = run.memory, run.noise
    found = {"canvas": run.canvas.value, "key": noise.key_B2, "forks": noise.forks_B, **run.carried,
             **{f"state.{name}": value for name, value in memory.state.items()}}
    for name, values in (("tokens", run.tokens), ("log_probs", run.log_probs), ("reads", run.reads)):
        found.update({f"{name}.{k}": value for k, value in enumerate(values) if value is not None})
    for address, groups in memory.groups.items():
        for i, group in enumerate(groups):
            tags, n = memory.tags_of(group), group.length
            found.update({f"{address}.{i}.k": group.k[:, :, :n], f"{address}.{i}.v": group.v[:, :, :n],
                          f"{address}.{i}.step": tags.step, f"{address}.{i}.cell": tags.cell})
    for name, value in memory.constants.items():
        for i, part in enumerate(value if isinstance(value, tuple) else (value,)):
            found[f"constant.{name}.{i}"] = part
    return {name: value.clone() for name, value in found.items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), f"{name} is not the same bit for bit"
