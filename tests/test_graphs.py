"""Captured steps draw what plain calls draw. A recorder of operations stands for a GPU's: it replays them on the same
tensors, and runs no Python of the network's, as a CUDA graph does."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_code_decoding import tiny_pair
from test_flexvar import tiny as tiny_flexvar
from test_hmar import tiny as tiny_hmar
from test_m_var import tiny as tiny_m_var
from test_xar import tiny as tiny_xar
from tiny import labels, start, tiny_var
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nextscale import run as run_module
from nextscale.context import Context, Hook
from nextscale.errors import InputError
from nextscale.noise import Keyed
from nextscale.run import Call, Rows, Run
from nextscale.sampling import filters
from nextscale.sampling.filters import TopK, TopP
from nextscale.sampling.graphs import CapturedSteps, Family
from nextscale.sampling.guidance import ClassifierFree
from nextscale.sampling.steps import sample_steps
from nextscale.systems.var import VAR


class Recorder(TorchDispatchMode):
    """Operations as they were run, and their results' memory."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.operations:
            aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
            if aliases and not any(alias.is_write for alias in aliases):
                continue  # a view of memory that is in place already
            new = func(*args, **kwargs)
            if not aliases:
                for held, value in zip(tree_leaves(out), tree_leaves(new), strict=True):
                    if isinstance(held, Tensor):
                        held.copy_(value)


class Recorders:
    def __init__(self) -> None:
        self.made: list[Recorder] = []

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Recorder, Tensor]:
        work()  # as a warm-up does
        with Recorder() as recorder:
            hidden = work()
        self.made.append(recorder)
        return recorder, hidden


@pytest.fixture(autouse=True)
def sorted_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the recorder doesn't see NumPy."""
    monkeypatch.setattr(filters, "_by_numpy", lambda logits: False)


SYSTEMS: dict[str, Callable[[], Any]] = {
    "var": tiny_var, "one adaLN": lambda: tiny_var(shared_modulation=True), "flexvar": tiny_flexvar,
    "hmar in rounds": lambda: tiny_hmar(((1,), (2, 2), (5, 4), (8, 8))), "m_var": tiny_m_var, "xar": tiny_xar}


@pytest.mark.parametrize("name", SYSTEMS)
def test_replays_draw_what_plain_calls_draw(name: str) -> None:
    system, recorders = SYSTEMS[name](), Recorders()
    hook = CapturedSteps(recorders)
    for seed in (0, 10, 20):
        wanted = system.generate([seed % 3, 1, 2], seed=seed, output="torch")
        found = system.generate([seed % 3, 1, 2], seed=seed, output="torch", hooks=[hook])
        assert all(torch.equal(a, b) for a, b in zip(found.tokens, wanted.tokens, strict=True))
        torch.testing.assert_close(found.images, wanted.images, atol=1e-5, rtol=0)
    if name == "xar":  # whose conditions are more than a tensor
        assert not recorders.made
        return
    assert [recorder.replays for recorder in recorders.made] == [3] * len(system.plan)  # whole steps, rounds and all


def test_every_number_of_pictures_and_branches_has_graphs_of_its_own() -> None:
    system, recorders = tiny_var(), Recorders()
    hook = CapturedSteps(recorders)
    five = system.generate([0, 1, 2, 3, 4], seed=1, batch_size=2, output="torch", hooks=[hook])
    plain = system.generate([0, 1, 2, 3, 4], seed=1, batch_size=2, output="torch")
    assert all(torch.equal(a, b) for a, b in zip(five.tokens, plain.tokens, strict=True))
    assert len(recorders.made) == 8 and [r.replays for r in recorders.made] == [2] * 4 + [1] * 4
    alone = system.generate([0, 1], seed=1, output="torch", hooks=[hook], guidance_scale=1.0)
    assert torch.equal(alone.tokens[-1], system.generate([0, 1], seed=1, guidance_scale=1.0).tokens[-1])
    assert len(recorders.made) == 12


def test_numbers_drawn_ahead_are_those_of_the_steps_and_never_more_than_allowed(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is allowed, and of the noise that the run has now: a gathered run's copies have other keys."""
    system, guidance, drawn = tiny_var(), ClassifierFree(2.0), list[int]()
    plain = Keyed.uniform

    def counted(self: Keyed, what: str, step: Tensor, round: int, cells: Tensor, width: int = 1) -> Tensor:
        found = plain(self, what, step, round, cells, width)
        drawn.append(len(found) * found.shape[1] * -(-width // 4) * 4)
        return found

    monkeypatch.setattr(Keyed, "uniform", counted)
    for most, times in ((2**20, 1), (2 * 16 * 4, 2), (0, 4)):
        monkeypatch.setattr(run_module, "AHEAD", most)
        drawn.clear()
        run = start(system, system.plan, guidance)
        for k, step in enumerate(system.plan):
            run.cursor = k
            at = run.plan.span(k, k + 1)
            wanted = plain(run.noise, "token", system.plan.step_of_row[None, at], 1, run.order[:, at], 3)
            assert torch.equal(run.uniform("token", 1, 3), wanted) and wanted.shape == (2, step.rows, 3)
        assert len(drawn) == times and (times == 4 or max(drawn) <= most)
        run.cursor = 0
        first, twice = run.uniform("token"), run.gather([1, 1])
        assert torch.equal(twice.uniform("token")[0], first[1]) and not torch.equal(*twice.uniform("token"))
        run.noise = Keyed.from_seeds([7, 8])
        assert not torch.equal(run.uniform("token"), first)


@pytest.mark.parametrize("options", [
    {"top_k": 5, "top_p": 0.9, "temperature": 1.3}, {"guidance_schedule": "cosine"}, {"smooth": True},
    {"temperatures": (1.0, 1.0, 0.9, 0.8)}], ids=str)
def test_settings_are_part_of_a_whole_step(options: dict[str, Any]) -> None:
    """Other settings have graphs of their own, and the smooth mode, whose codes lie elsewhere every time, those of the
    network alone."""
    system, recorders = tiny_var(), Recorders()
    hook = CapturedSteps(recorders)
    for seed, used in ((0, {}), (1, options), (2, {}), (3, options)):
        found, wanted = (system.generate([0, 1], seed=seed, output="torch", hooks=hooks, **used)
                         for hooks in ([hook], []))
        assert all(torch.equal(a, b) for a, b in zip(found.tokens, wanted.tokens, strict=True))
        torch.testing.assert_close(found.log_prob, wanted.log_prob)
        torch.testing.assert_close(found.images, wanted.images, atol=1e-5, rtol=0)
    assert [recorder.replays for recorder in recorders.made] == [2] * 8


def test_a_whole_step_asks_for_nothing_but_copies_and_its_graph() -> None:
    """Numbers are drawn once a run, and all else a replay does."""
    system, hook, guidance = tiny_var(), CapturedSteps(Recorders()), ClassifierFree(2.0)

    def operations(seed: int) -> list[int]:
        run, counts = start(system, system.plan, guidance, seed=seed), []
        steps = sample_steps(system, run, guidance, (TopK(9), TopP(0.9)), hooks=[hook])
        with torch.no_grad():
            for _ in system.plan:
                with Recorder() as recorder:
                    next(steps)
                counts.append(len(recorder.operations))
        return counts

    operations(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "replay", lambda self: None)
        first, *others = operations(1)
    assert max(others) <= 12 and first > 100  # where the numbers of all steps are drawn


def test_graphs_of_kinds_that_were_not_drawn_lately_are_given_up() -> None:
    system, recorders = tiny_var(), Recorders()
    hook = CapturedSteps(recorders, keep=2)
    for pictures, made in ((1, 4), (2, 8), (1, 8), (3, 12), (1, 12), (2, 16)):
        found, wanted = (system.generate([0] * pictures, seed=pictures, output="torch", hooks=hooks)
                         for hooks in ([hook], []))
        assert torch.equal(found.tokens[-1], wanted.tokens[-1]) and len(recorders.made) == made
    assert len(hook._families) == 2


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_what_was_captured_in_inference_mode_serves_outside_of_it(first: Any) -> None:
    system, guidance = tiny_var(), ClassifierFree(2.0)

    class Even(Hook):
        def logits(self, logits: Tensor, at: Any) -> Tensor:
            return logits.index_fill(-1, torch.arange(1, 32, 2), -torch.inf)

    for others in ([], [Even()]):
        hook = CapturedSteps(Recorders())
        for mode, seed in ((first, 0), (torch.no_grad, 1), (torch.inference_mode, 2), (torch.no_grad, 3)):
            drawn = []
            for hooks in ([hook], []):
                with mode():
                    run = start(system, system.plan, guidance, seed=seed)
                    drawn.append(list(sample_steps(system, run, guidance, hooks=[*hooks, *others]))[-1].tokens)
            assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


def test_a_refiner_goes_on_in_memory_of_its_own() -> None:
    """Behind a hand-over, whose prefill isn't captured, its steps aren't either: their graphs would serve one run."""
    system, recorders = tiny_pair(draft_steps=2), Recorders()
    hook = CapturedSteps(recorders)
    for seed in (0, 1, 2):
        found, wanted = (system.generate([0, 1], seed=seed, output="torch", hooks=hooks) for hooks in ([hook], []))
        assert all(torch.equal(a, b) for a, b in zip(found.tokens, wanted.tokens, strict=True))
    assert [recorder.replays for recorder in recorders.made] == [3] * 2


@pytest.mark.parametrize("alone", [False, True])
def test_what_can_t_be_captured_is_drawn_as_ever(alone: bool, caplog: pytest.LogCaptureFixture) -> None:
    def refused(work: Callable[[], Any]) -> Any:
        work()
        raise RuntimeError("operation not permitted when stream is capturing")

    system, hook = tiny_var(), CapturedSteps(refused)
    for seed in (0, 1):
        found, wanted = (system.generate([0, 1], seed=seed, output="torch", hooks=hooks, smooth=alone)
                         for hooks in ([hook], []))
        assert all(torch.equal(a, b) for a, b in zip(found.tokens, wanted.tokens, strict=True))
    assert "its capture failed (operation not permitted" in caplog.text


def test_a_capture_is_made_and_replayed_on_the_run_s_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is the current one: streams, graph and replay are of the device that is asked for."""
    entered: list[Any] = []

    class Fake:
        def __init__(self, *given: Any, **options: Any):
            self.given = (*given, *options.values())

        def __enter__(self) -> None:
            entered.append(self.given)

        def __exit__(self, *error: object) -> None:
            entered.pop()

        def wait_stream(self, other: Fake) -> None:
            assert entered[0] == (device,)

        def replay(self) -> None:
            replayed.append(list(entered))

    device, replayed = torch.device("cuda:1"), list[Any]()
    for name in ("device", "Stream", "stream", "graph", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Fake)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    family, at = Family(), list[Any]()
    graph, _ = CapturedSteps._cuda_capture(family, device, lambda: at.append(list(entered)))
    assert [given[0] for given in at] == [(device,)] * 2 and len(at[0]) == len(at[1]) == 2
    captured, pool, stream, errors = at[1][1]
    assert stream.given == (device,) and errors == "thread_local" and isinstance(captured, Fake)
    assert pool == family.pool == "pool"
    graph.replay()
    assert replayed == [[(device,)]] and not entered


def test_memory_is_allocated_once_for_all_runs() -> None:
    def draw(seed: int) -> list[int]:
        run = start(system, system.plan, guidance, seed=seed)
        with torch.no_grad():
            list(sample_steps(system, run, guidance, hooks=[hook]))
        return [tensor.data_ptr() for groups in run.memory.groups.values() for g in groups for tensor in (g.k, g.v)]

    system, guidance, hook = tiny_var(), ClassifierFree(2.0), CapturedSteps(Recorders())
    first = draw(0)
    assert len(first) == 4 and draw(5) == first


def test_a_run_that_was_gathered_goes_on_by_itself_and_one_that_was_overwritten_is_refused() -> None:
    def begin(seed: int, hooks: list[Hook], until: int | None = None) -> Run:
        run = start(system, system.plan, guidance, seed=seed)
        return go(run, hooks, until)

    @torch.no_grad()
    def go(run: Run, hooks: list[Hook], until: int | None = None) -> Run:
        list(sample_steps(system, run, guidance, hooks=hooks, until=until))
        return run

    system, guidance, hook = tiny_var(), ClassifierFree(2.0), CapturedSteps(Recorders())
    begin(50, [hook])
    half = begin(3, [hook], until=2)
    copy, turned, other = half.gather([0, 1]), half.gather([1, 0]), begin(9, [hook])
    with pytest.raises(InputError, match="another run was begun"):
        go(half, [hook])
    wanted = begin(3, [])
    assert all(torch.equal(a, b) for a, b in zip(go(copy, [hook]).tokens, wanted.tokens, strict=True))
    assert all(torch.equal(a[[1, 0]], b) for a, b in zip(go(turned, [hook]).tokens, wanted.tokens, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(other.tokens, begin(9, []).tokens, strict=True))


@pytest.mark.parametrize("method", ["enter", "leave", "block", "residual", "leading", "attend", "read"])
def test_hooks_inside_the_network_are_refused(method: str) -> None:
    inside = type("Inside", (Hook,), {method: lambda self, *given: given[-1]})()
    with pytest.raises(InputError, match="Inside acts inside the network"):
        tiny_var().generate([0], hooks=[CapturedSteps(Recorders()), inside])


def test_hooks_outside_of_it_act_as_ever() -> None:
    class Even(Hook):
        def logits(self, logits: Tensor, at: Any) -> Tensor:
            return logits.index_fill(-1, torch.arange(1, 32, 2), -torch.inf)

    system, hook = tiny_var(), CapturedSteps(Recorders())
    for seed in (0, 1):
        made = system.generate([0], seed=seed, hooks=[hook, Even()], top_k=None, top_p=None)
        assert all((t % 2 == 0).all() for t in made.tokens)


def test_without_a_gpu_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CapturedSteps, "_cuda_capture", lambda *_: pytest.fail("there is none"))
    system = tiny_var()
    one, other = (system.generate([0, 1], seed=2, output="torch", hooks=hooks) for hooks in ([], [CapturedSteps()]))
    assert torch.equal(one.images, other.images)


def test_a_prefill_is_evaluated_as_ever() -> None:
    """It needs a mask, and comes up once."""
    system, guidance, recorders = tiny_var(), ClassifierFree(2.0), Recorders()
    hook = CapturedSteps(recorders)
    tokens = system.generate([0, 1], seeds=[0, 1], guidance=guidance, top_k=None, top_p=None).tokens
    run = start(system, system.plan, guidance)
    for given in tokens[:3]:
        run.force(given)
    with torch.no_grad():
        next(sample_steps(system, run, guidance, hooks=[hook]))
    assert not recorders.made and torch.equal(run.tokens[3], tokens[3])


def test_a_whole_step_compiles_to_one_graph() -> None:
    """Network, guidance, filters and the draw: nothing in them asks for a value or hides from the compiler."""
    torch._dynamo.reset()
    system: VAR = tiny_var()
    guidance, filters = ClassifierFree(2.0), (TopK(9), TopP(0.9))

    def step(call: Call, run: Run) -> Tensor:
        def evaluate(call: Call) -> Tensor:
            hidden: Tensor = system.generator(call, Context(run.memory, branches=run.branches))
            return hidden

        return system.head.sample(evaluate, call, run, guidance, filters).tokens

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    one, other = (Run.start(system.plan, system.tokenizer.quantiser, start(system, system.plan, guidance).condition,
                            guidance.branches, Keyed.from_seeds([0, 1]), len(labels(2))) for _ in range(2))
    with torch.no_grad():
        for _ in range(2):
            tokens = []
            for run, draw in ((one, compiled), (other, step)):
                call = system.generator.call(run)
                run.memory.begin()
                tokens.append(draw(call, run))
                run.settle(call.rows)
                run.force(tokens[-1])
            assert torch.equal(*tokens)


def test_rows_of_a_captured_step_are_tagged_as_ever() -> None:
    """What looks at memory between steps finds the run's own rows."""
    system, guidance, hook = tiny_var(), ClassifierFree(2.0), CapturedSteps(Recorders())
    for hooks in ([hook], [hook], []):
        run = start(system, system.plan, guidance)
        with torch.no_grad():
            list(sample_steps(system, run, guidance, hooks=hooks, until=3))
        rows: Rows = run.rows(0, 3)
        assert torch.equal(run.memory.log.step, rows.step) and torch.equal(run.memory.log.cell, rows.cell)
        assert all(group.length == 14 and group.pending is None for (group,) in run.memory.groups.values())
