"""Drawing never makes the host wait for the device: a loop only queues work, whatever the system and the hook."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import test_car
import test_flowar
import test_himar
import test_hmar
import test_mar
import test_nfig
import test_scalar
import test_srdd
import test_xar
import torch
from pretence import DEVICE, watched
from test_code_decoding import tiny_pair
from test_cuda import HOOKS, SYSTEMS
from test_infinity import tiny as tiny_infinity
from test_star import tiny as tiny_star
from tiny import tiny_var
from torch import Tensor

import nextscale
from nextscale.context import Hook
from nextscale.devices import listed, resident
from nextscale.run import At, Run

PROMPTED: dict[str, Callable[[], Any]] = {"infinity": tiny_infinity, "star": tiny_star,
                                          "star in rounds": lambda: tiny_star(rounds=(0, 0, 2, 2))}
ALL: dict[str, Callable[[], Any]] = {
    **SYSTEMS, **PROMPTED, "hand-over": tiny_pair, "car": test_car.tiny, "flowar": test_flowar.tiny,
    "himar": test_himar.tiny, "mar": test_mar.tiny, "nfig": test_nfig.tiny, "scalar": test_scalar.tiny,
    "srdd": lambda: test_srdd.tiny(1), "hmar": test_hmar.tiny, "xar": test_xar.tiny}


def waits(system: Any, hooks: Sequence[Hook] = (), labels: Sequence[Any] = (0, 1), runs: int = 2,
          **settings: Any) -> Counter[str]:
    """What the host waits for behind the first step of the last of some runs, by the line."""
    system.to(DEVICE)
    system.label_names = str  # the names of numbers that a device of pretence doesn't know
    with watched() as copies:
        for seed in range(runs):
            first = Counter[str]()

            def step(number: int, run: Run, first: Counter[str] = first) -> None:
                first.update(copies if number == 0 else {})

            system.generate(list(labels), seed=seed, output="torch", progress=False, hooks=list(hooks), callback=step,
                            **settings)
    return copies - first


@pytest.mark.parametrize("name", ALL)
def test_a_loop_copies_nothing(name: str) -> None:
    labels = ["a red apple", "sun"] if name in PROMPTED else [0, 1]
    assert not waits(ALL[name](), labels=labels)


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_copies_nothing_from_its_second_run_on(name: str) -> None:
    hook = nextscale.hook(name, **HOOKS[name](tiny_var()))
    assert not waits(tiny_var(), [hook])


def test_smooth_codes_and_settings_a_step_copy_nothing() -> None:
    assert not waits(tiny_var(), smooth=True)
    steps = len(tiny_var().plan)
    assert not waits(tiny_var(), top_k=tuple(range(2, steps + 2)), top_p=0.9, temperature=0.8)


@pytest.mark.parametrize("name", ["var", "hand-over", "flexvar", "hmar", "hmar in rounds", "m_var", "nfig", "srdd",
                                  "flowar", "himar", "mar", "xar"])
def test_a_loss_and_its_gradient_copy_nothing(name: str) -> None:
    """From the second step on. FlexVAR's steps are others every time, and so is what they need."""
    system = ALL[name]().train()
    images = torch.rand(2, 3, *system.tokenizer.picture_size) * 2 - 1
    with torch.no_grad():
        tokens = system.encode(images)
    tokens, rows = [part.to(DEVICE) for part in tokens], system.label_rows([0, 1]).to(DEVICE)
    system.to(DEVICE)
    with watched() as copies:
        for _ in range(2):
            before = Counter(copies)
            torch.manual_seed(0)
            system.loss(tokens, rows)[0].backward()
    assert not copies - before


class Lists(Hook):
    def logits(self, logits: Tensor, at: At) -> Tensor:
        return logits.index_fill(-1, torch.tensor([1, 3], device=logits.device), -torch.inf)


class Picks(Hook):
    def logits(self, logits: Tensor, at: At) -> Tensor:
        return logits[..., list(range(logits.shape[-1]))]


class Looks(Hook):
    def logits(self, logits: Tensor, at: At) -> Tensor:
        return logits.cpu().to(logits.device)


@pytest.mark.parametrize(("hook", "times"), [(Lists(), 1), (Picks(), 1), (Looks(), 2)])
def test_the_watch_sees_copies(hook: Hook, times: int) -> None:
    system = tiny_var()
    assert sum(waits(system, [hook]).values()) == times * (len(system.plan) - 1)


class Asks(Hook):
    def logits(self, logits: Tensor, at: At) -> Tensor:
        return logits * 2 if logits.amax() > 1 else logits


class Mixes(Hook):
    def logits(self, logits: Tensor, at: At) -> Tensor:
        return logits + torch.ones(logits.shape[-1])


def test_the_watch_refuses_questions_and_mixtures() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        waits(tiny_var(), [Asks()])
    with pytest.raises(AssertionError, match="mixes"):
        waits(tiny_var(), [Mixes()])


def test_a_table_is_copied_once_and_forgotten_with_what_it_is_made_from() -> None:
    from nextscale import devices

    table, before = torch.arange(4.0), len(devices._RESIDENT)
    assert resident(table, torch.device("cpu")) is table
    with torch.inference_mode():
        there = resident(table, DEVICE)
    assert there.is_meta and not there.is_inference() and resident(table, DEVICE) is there
    assert len(devices._RESIDENT) == before + 1
    del table
    assert len(devices._RESIDENT) == before
    assert listed([2, 0], DEVICE) is listed(range(2, -1, -2), DEVICE)
    assert listed([2, 0], torch.device("cpu")).tolist() == [2, 0]
