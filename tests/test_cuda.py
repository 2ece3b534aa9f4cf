"""On a GPU what holds on a CPU: captured loops, compiled masks, hand-overs and hooks. They run where there is one."""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_code_decoding import tiny_pair
from test_flexvar import tiny as tiny_flexvar
from test_hmar import tiny as tiny_hmar
from test_infinity import tiny as tiny_infinity
from test_m_var import tiny as tiny_m_var
from test_star import tiny as tiny_star
from tiny import tiny_var

import nextscale
from nextscale import registry
from nextscale.acceleration import hack
from nextscale.acceleration.litevar import LiteVAR, window_of
from nextscale.context import Hook, _Steps
from nextscale.layers.attention import attention, block_mask, dense_mask
from nextscale.layers.memory import Tags
from nextscale.noise import Keyed
from nextscale.plan import Plan
from nextscale.sampling.generation import Generation
from nextscale.sampling.graphs import CapturedSteps, Whole
from nextscale.sampling.guidance import ClassifierFree
from nextscale.sampling.steps import sample_steps

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
on_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices here")
DEVICE = "cuda"

SYSTEMS: dict[str, Callable[[], Any]] = {
    "var": tiny_var, "one adaLN": lambda: tiny_var(shared_modulation=True), "flexvar": tiny_flexvar,
    "hmar in rounds": lambda: tiny_hmar(((1,), (2, 2), (5, 4), (8, 8))), "m_var": tiny_m_var}
HOOKS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "diversevar": lambda system: {"at_steps": (1, 2)},
    "fastvar": lambda system: {"ratio": (0.5, 0.4)},
    "hack": lambda system: {"heads": hack.Calibration().run(system, [0, 1]), "compression": 0.6, "queries": 3},
    "litevar": lambda system: {"window": 0.2, "dense": 1, "share": (1,)},
    "pyramidkv": lambda system: {"share": 0.6, "window": 2},
    "scalekv": lambda system: {"share": 0.5, "window": 2},
    "sliding-window": lambda system: {"share": 0.6, "sinks": 1},
    "snapkv": lambda system: {"share": 0.6, "window": 2},
    "softcfg": lambda system: {},
    "var_limits": lambda system: {"degree": 4},
}


@pytest.fixture(autouse=True)
def whole_floats() -> Iterator[None]:
    """Products in float32 as they are; a GPU's short ones would differ from a CPU's in the third digit."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def there(system: Any, device: str = DEVICE) -> Any:
    return copy.deepcopy(system).to(device)


def drawn(system: Any, hooks: list[Hook], **options: Any) -> Generation:
    found: Generation = system.generate(options.pop("labels", [0, 1, 2]), output="torch", progress=False, hooks=hooks,
                                        **options)
    return found


def same(one: Generation, other: Generation, atol: float = 0.0) -> None:
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(one.tokens, other.tokens, strict=True))
    torch.testing.assert_close(one.images.cpu(), other.images.cpu(), atol=atol, rtol=0)


def tags_of(plan: Plan, device: str, first: int = 0) -> Tags:
    rows = plan.span(first, len(plan))
    return Tags(plan.step_of_row[None, rows].to(device), plan.cells[None, rows].to(device))


@on_gpu
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_captured_loop_draws_what_the_plain_one_draws(name: str) -> None:
    """Whole steps, and the network alone where the smooth mode looks between; nothing is left to be drawn as ever."""
    system, hook = there(SYSTEMS[name]()), CapturedSteps()
    for seed in (0, 10, 20):
        for smooth in (False, True):
            same(drawn(system, [hook], seed=seed, smooth=smooth), drawn(system, [], seed=seed, smooth=smooth), 1e-5)
    kinds = [step for family in hook._families.values() for step in family.steps.values()]
    assert None not in kinds and sum(isinstance(step, Whole) for step in kinds) == len(system.plan)


@on_gpu
def test_captured_steps_go_on_outside_inference_mode_and_with_other_numbers_of_pictures() -> None:
    system, hook, guidance = there(tiny_var()), CapturedSteps(keep=2), ClassifierFree(2.0)
    for mode, seed, pictures in ((torch.inference_mode, 0, 2), (torch.no_grad, 1, 2), (torch.no_grad, 2, 1),
                                 (torch.inference_mode, 3, 3), (torch.no_grad, 4, 2)):
        found = []
        for hooks in ([hook], []):
            with mode():
                noise = Keyed.from_seeds(range(seed, seed + pictures), system.device)
                run = system.start(system.label_rows(list(range(pictures))), guidance, noise)
                found.append([t.cpu() for t in list(sample_steps(system, run, guidance, hooks=hooks))[-1].tokens])
        assert all(map(torch.equal, *found))


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("windowed", [False, True])
def test_compiled_masks_show_what_the_booleans_show(windowed: bool, dtype: torch.dtype) -> None:
    """At every step of more scales than the compiler's own limit of graphs."""
    plan = Plan.scales([1, 2, 3, 4, 5, 6, 7, 8, (8, 9), 10, 12])
    window = window_of(plan.grids, (0.2,) * len(plan), 2)
    rules = [_Steps(plan.visible), *([window] if windowed else [])]
    torch.manual_seed(0)
    for first in range(len(plan)):
        query, key = tags_of(plan, DEVICE, first), tags_of(plan, DEVICE)
        q, k, v = (torch.randn(2, 3, n, 64, device=DEVICE, dtype=dtype) for n in (len(query), len(key), len(key)))
        blocks, dense = block_mask(rules, query, key), dense_mask(rules, query, key)
        close = 2e-2 if dtype == torch.bfloat16 else 2e-3  # FlexAttention's products may be short ones
        torch.testing.assert_close(attention(q, k, v, blocks), attention(q, k, v, dense), atol=close, rtol=close)


@on_gpu
@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_a_hand_over_draws_on_the_gpu_what_it_draws_on_the_cpu(steps: int) -> None:
    """The refiner's prefill needs a mask, which the CPU makes of booleans and the GPU compiles."""
    system = tiny_pair()
    same(drawn(there(system), [], draft_steps=steps, seed=4), drawn(system, [], draft_steps=steps, seed=4), 1e-3)


@on_gpu
@pytest.mark.parametrize("name", [*SYSTEMS, "infinity", "star"])
def test_tokens_are_the_cpu_s_in_float32(name: str) -> None:
    """And so is what they are worth. Random numbers are the same bits; the tokens may differ at a tie alone."""
    makers: dict[str, Callable[[], Any]] = {**SYSTEMS, "infinity": tiny_infinity, "star": tiny_star}
    system = makers[name]()
    asked = ["a red apple", "sun"] if name in ("infinity", "star") else [0, 1]
    on_cpu, found = (drawn(one, [], labels=asked, seed=5) for one in (system, there(system)))
    same(found, on_cpu, 1e-3)
    torch.testing.assert_close(found.log_prob.cpu(), on_cpu.log_prob, atol=1e-2, rtol=1e-3)


def test_all_hooks_are_tried() -> None:
    assert set(HOOKS) == set(registry._HOOKS)


@on_gpu
@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_draws_on_the_gpu_what_it_draws_on_the_cpu(name: str) -> None:
    system = tiny_var()
    hook = nextscale.hook(name, **HOOKS[name](system))
    same(drawn(there(system), [hook], seed=6), drawn(system, [hook], seed=6), 1e-3)


@on_gpu
def test_hooks_between_the_network_and_the_canvas_leave_the_network_captured() -> None:
    class Even(Hook):
        def logits(self, logits: torch.Tensor, at: Any) -> torch.Tensor:
            return logits.index_fill(-1, torch.arange(1, 32, 2, device=logits.device), -torch.inf)

    system, hook = there(tiny_var()), CapturedSteps()
    for seed in (0, 1):
        same(drawn(system, [hook, Even()], seed=seed), drawn(system, [Even()], seed=seed), 1e-5)


@on_two
def test_another_device_than_the_current_one_has_masks_and_graphs_of_its_own() -> None:
    system, hook = there(tiny_var(), "cuda:1"), CapturedSteps()
    for hooks in ([hook], [LiteVAR(window=0.2, dense=1)]):
        for seed in (0, 1):
            found = drawn(system, hooks, seed=seed)
            same(found, drawn(tiny_var(), [one for one in hooks if one is not hook], seed=seed), 1e-3)
    assert system.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
