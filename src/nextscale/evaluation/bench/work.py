"""What a generation asks of a machine: floating-point operations, bytes and memory by phase, counted and not timed.

Counted are *products*: matrix products, convolutions and attention. A multiply-add is two operations; attention takes
4 E for every head and pair of a row and a key that it may see (arXiv 2205.14135, section 3). A product moves the bytes
of what it reads and of what it writes. Everything else (norms, sums, sorting) is left out: a machine that
fused it all away would still have to do the products. Where a kernel of this library needs fewer of them than the
method says (``layers.winograd``), the fewer are counted: ``evaluation.flops`` counts the method's.
"""
from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from nextscale.evaluation.bench.recorder import Recorder, recorded
from nextscale.evaluation.cost import LiveBytes
from nextscale.evaluation.flops import attention_pairs, linear_flops
from nextscale.layers.attention import dense_mask

_PACKED = "mkldnn._linear_pointwise"
_ATTENTION = "attention"


class Like(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Product:
    """One operation at its shapes: what it is, where it happens, what it takes, and its operations and bytes."""

    phase: str
    what: Any
    given: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]
    dtype: torch.dtype
    flops: int
    bytes: int


@dataclass
class Work:
    """What one batch takes.

    products: how often each comes; rows: token-layer evaluations, rows through every residual branch by its kind;
    pairs: rows and keys that see each other, summed over heads and layers; computed_pairs: those that a kernel
    without a mask's help computes; alive: most bytes alive at once in each phase beyond the weights, none where they
    weren't counted; weights: bytes of the weights that sampling needs; memory: bytes of keys, values and states at
    the end.
    """

    products: dict[Product, int] = field(default_factory=lambda: defaultdict(int))
    rows: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    pairs: int = 0
    computed_pairs: int = 0
    alive: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    weights: int = 0
    memory: int = 0

    @property
    def phases(self) -> list[str]:
        """Phases that have products."""
        return list(dict.fromkeys(product.phase for product in self.products))

    def flops(self, phase: str | None = None) -> int:
        """Operations of a phase, or of all."""
        return sum(p.flops * n for p, n in self.products.items() if phase in (None, p.phase))

    def bytes(self, phase: str | None = None) -> int:
        """Bytes that the products of a phase, or all, read and write."""
        return sum(p.bytes * n for p, n in self.products.items() if phase in (None, p.phase))

    def floor(self, rates: Mapping[torch.dtype, float], bandwidth: float, phase: str | None = None
              ) -> tuple[float, float, float]:
        """Seconds that arithmetic takes at the machine's rate, that moving bytes takes, and that both leave: the sum
        over the products of whichever takes longer."""
        found = [(p.flops / rates[p.dtype] * n, p.bytes / bandwidth * n) for p, n in self.products.items()
                 if phase in (None, p.phase)]
        return sum(a for a, _ in found), sum(b for _, b in found), sum(max(pair) for pair in found)

    @property
    def dtypes(self) -> list[torch.dtype]:
        return list(dict.fromkeys(product.dtype for product in self.products))

    def describe(self) -> dict[str, Any]:
        """All counts, for JSON."""
        return {"flops": {phase: self.flops(phase) for phase in self.phases} | {"total": self.flops()},
                "bytes": {phase: self.bytes(phase) for phase in self.phases} | {"total": self.bytes()},
                "rows": dict(self.rows), "pairs": self.pairs, "computed_pairs": self.computed_pairs,
                "alive": dict(self.alive), "weights": self.weights, "memory": self.memory}


class Ledger(LiveBytes, Recorder):
    """Counts the work of whatever runs inside it; on the meta device too, where nothing is computed."""

    def __init__(self) -> None:
        LiveBytes.__init__(self)
        Recorder.__init__(self)
        self.work = Work()
        self.inside_attention = False

    def rows(self, kind: str, x: Tensor) -> None:
        self.work.rows[kind] += x.shape[0] * x.shape[1]

    def _add(self, storage: torch.UntypedStorage) -> None:
        super()._add(storage)
        self.switch()

    def switch(self) -> None:
        alive = self.work.alive
        alive[self.stack[-1]] = max(alive[self.stack[-1]], self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_dispatch__(func, types, args, kwargs)
        packet = func._overloadpacket
        if not self.inside_attention and (packet in flop_registry or str(packet) == _PACKED):
            self._note(packet, args, kwargs or {}, found)
        return found

    def _note(self, packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], found: Any) -> None:
        out = next(leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor))
        if str(packet) == _PACKED:  # the weight is opaque: count it as the plain product that it is
            x, bias, width = args[0], args[2], out.shape[-1]
            rows, inner = x.numel() // x.shape[-1], x.shape[-1]
            packet = torch.ops.aten.mm if bias is None else torch.ops.aten.addmm
            args = (*(() if bias is None else (bias,)), Like((rows, inner), (inner, 1), x.dtype),
                    Like((inner, width), (1, inner), x.dtype))
            kwargs = {}
            flops, written = linear_flops(x.shape, out_shape=out.shape), rows * width * x.element_size()
        else:
            flops, written = int(flop_registry[packet](*args, **kwargs, out_val=found)), out.nbytes
        given = tuple(_like(arg) for arg in args)
        self.add(packet, given, tuple((k, v) for k, v in kwargs.items() if not isinstance(v, Tensor)), flops, written)

    def add(self, what: Any, given: tuple[Any, ...], options: tuple[tuple[str, Any], ...], flops: int,
            written: int) -> None:
        """Count one product that reads the tensors among what it is given."""
        read = [arg for arg in given if isinstance(arg, Like)]
        total = written + sum(math.prod(one.shape) * one.dtype.itemsize for one in read)
        self.work.products[Product(self.stack[-1], what, given, options, read[-1].dtype, flops, total)] += 1


class _Attentions(TorchFunctionMode):
    """Counts attention by what its rows may see, whichever kernel computes it; computes none on the meta device."""

    def __init__(self, ledger: Ledger):
        super().__init__()
        self.ledger = ledger

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]
        kwargs = kwargs or {}
        self.ledger.inside_attention = True
        try:
            found = q.new_empty((*q.shape[:-1], v.shape[-1])) if q.is_meta else func(*args, **kwargs)
        finally:
            self.ledger.inside_attention = False
        seen, pairs = attention_pairs(q, k, kwargs.get("attn_mask", args[3] if len(args) > 3 else None))
        work = self.ledger.work
        if self.ledger.stack[-1] != "decode":
            work.pairs, work.computed_pairs = work.pairs + seen, work.computed_pairs + pairs
        flops = 2 * seen * (q.shape[-1] + v.shape[-1])
        self.ledger.add(_ATTENTION, (_like(q), _like(k), _like(v)), (("scale", kwargs.get("scale")),), flops,
                        found.nbytes)
        return found


def _like(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Like(tuple(value.shape), tuple(value.stride()), value.dtype)
    return tuple(value) if isinstance(value, list) else value


@contextmanager
def counted(system: Any, ledger: Ledger) -> Iterator[Work]:
    """Count what a system draws inside. Masks are made dense while it lasts: a compiled kernel can't be looked into."""
    with ExitStack() as stack:
        stack.enter_context(recorded(system, ledger))
        stack.enter_context(mock.patch("nextscale.context.visibility_mask", dense_mask))
        stack.enter_context(_Attentions(ledger))
        stack.enter_context(ledger)
        yield ledger.work


class Numbers:
    """Noise without values, for the meta device: nobody looks at them."""

    def uniform(self, what: str, step: Tensor, round: int, cells: Tensor, width: int = 1) -> Tensor:
        return torch.empty(self.pictures, cells.shape[1], width, device=cells.device)

    normal = uniform

    def __init__(self, pictures: int):
        self.pictures = pictures

    def gather(self, items: Tensor) -> Numbers:
        return Numbers(len(items))


def weight_bytes(system: Any) -> int:
    """Bytes of the weights that sampling needs: all but the tokenizer's encoder and what leads into it."""
    unneeded = {id(p) for name in ("encoder", "to_latent") for p in getattr(system.tokenizer, name).parameters()}
    return sum(p.nbytes for p in system.parameters() if id(p) not in unneeded)


def planned(system: Any, pictures: int, draw: Callable[[Any, int], Any]) -> Work:
    """The work of a batch by the plan alone: the loop is walked on the meta device, where tensors have shapes and no
    values. ``system`` lies there; draw: what draws pictures with it, and gives the run that it ends with.

    Raises NotImplementedError where a system looks at values to know what comes next.
    """
    ledger = Ledger()
    try:
        # There is no autocast of the meta device, not even one that is off.
        with torch.no_grad(), mock.patch("torch.autocast", lambda *_, **__: nullcontext()), \
                counted(system, ledger) as work:
            run = draw(system, pictures)
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error).lower():
            raise
        raise NotImplementedError(" ".join(str(error).split())[:160]) from None
    work.memory, work.weights = run.memory.bytes(), weight_bytes(system)
    return work


def alone(work: Work, device: torch.device, median_time: Callable[[Callable[[], Any]], float],
          advance: Callable[[], None]) -> dict[str, float]:
    """Seconds by phase of every product by itself, at its own shape, by torch's plain kernels and from warm caches.
    advance: called after every product that was timed."""
    seconds: dict[str, float] = defaultdict(float)
    known: dict[Any, float] = {}
    for product, times in work.products.items():
        key = (product.what, product.given, product.options)
        if key not in known:
            known[key] = median_time(_replay(product, device))
        seconds[product.phase] += times * known[key]
        advance()
    return dict(seconds)


def _replay(product: Product, device: torch.device) -> Callable[[], Any]:
    def make(one: Any) -> Any:
        if isinstance(one, tuple) and not isinstance(one, Like):
            return list(one)
        if not isinstance(one, Like):
            return one
        stride = one.stride if 0 not in one.stride or 0 in one.shape else torch.empty(one.shape).stride()
        return torch.empty_strided(one.shape, stride, dtype=one.dtype, device=device).normal_()

    given: Sequence[Any] = [make(one) for one in product.given]
    options = dict(product.options)
    if product.what == _ATTENTION:
        return lambda: F.scaled_dot_product_attention(*given, **options)
    return lambda: product.what(*given, **options)
