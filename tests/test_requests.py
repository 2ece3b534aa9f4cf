"""Requests of many sizes are drawn bucket by bucket, and each gives what it would give alone."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from test_flexvar import tiny as tiny_flexvar
from tiny import tiny_var

from nextscale.context import Hook
from nextscale.errors import InputError
from nextscale.sampling.editing import ForcedTokens
from nextscale.sampling.generation import Generation, Request
from nextscale.systems.flexvar import FlexVAR

REQUESTS = [Request(0, 5), Request(1, 6, size=(16, 8)), Request(2, 7, schedule=((1, 1), (4, 4))),
            Request(None, 8, size=(16, 16)), Request(3, 9, size=(16, 8)), Request(4, 10, size=(24, 16))]


@pytest.fixture(scope="module")
def system() -> FlexVAR:
    return tiny_flexvar()


def same(a: Generation, b: Generation) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a.tokens, b.tokens, strict=True))
    assert a.seeds == b.seeds and a.labels == b.labels and a.settings == b.settings
    torch.testing.assert_close(a.images, b.images, atol=1e-4, rtol=0)
    torch.testing.assert_close(a.log_prob, b.log_prob, atol=1e-3, rtol=0)


def test_requests_come_back_in_their_order_each_as_if_it_were_alone(system: FlexVAR) -> None:
    found = system.generate_requests(REQUESTS, output="torch", batch_size=2)
    sizes = [tuple(one.images.shape[2:]) for one in found]
    assert sizes == [(16, 16), (16, 8), (16, 16), (16, 16), (16, 8), (24, 16)]
    assert [one.seeds for one in found] == [[request.seed] for request in REQUESTS]
    for request, one in zip(REQUESTS, found, strict=True):
        same(one, system.generate_requests([request], output="torch")[0])
    for one, other in zip(found, reversed(system.generate_requests(REQUESTS[::-1], output="torch")), strict=True):
        same(one, other)


def test_a_request_is_what_generate_draws(system: FlexVAR) -> None:
    one = system.generate_requests([Request(3, 9, size=(16, 8))], output="torch", top_k=4)[0]
    same(one, system.generate([3], seed=9, schedule=system.schedule_for((16, 8)), output="torch", top_k=4))
    fixed = tiny_var()
    same(fixed.generate_requests([Request(3, 9, size=(16, 16)), Request(1)], output="torch")[0],
         fixed.generate([3], seed=9, output="torch"))


def test_a_bucket_is_drawn_together(system: FlexVAR) -> None:
    class Watch(Hook):
        def end(self, run: Any, step: int) -> None:
            batches.append((run.pictures, run.plan.grid)) if step == 0 else None

    batches: list[Any] = []
    system.generate_requests(REQUESTS, hooks=[Watch()])
    assert batches == [(2, (4, 4)), (2, (4, 2)), (1, (4, 4)), (1, (6, 4))]


def test_schedules_of_a_size_start_with_one_cell_and_end_with_the_size(system: FlexVAR) -> None:
    assert system.schedule_for((16, 16)) is None
    assert system.schedule_for((16, 8)) == [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert system.schedule_for((24, 16)) == [(1, 1), (3, 2), (4, 3), (6, 4)]
    wide = system.schedule_for((128, 128))
    assert wide is not None and wide[-1] == (32, 32) and sum(h * w for h, w in wide) == 2534


@pytest.mark.parametrize("request_", [Request(0, size=(15, 8)), Request(0, size=(0, 16)), Request(77),
                                      Request(0, schedule=((1, 1), (99, 99))), Request(0, size=(4096, 16))], ids=str)
def test_a_request_that_cannot_be_drawn_stops_all_before_they_begin(system: FlexVAR, request_: Request) -> None:
    class Never(Hook):
        def inputs(self, run: Any, call: Any) -> Any:
            raise AssertionError("drawing had begun")

    with pytest.raises(InputError):
        system.generate_requests([Request(0), request_], hooks=[Never()])


def test_what_is_made_for_pictures_in_their_order_is_refused(system: FlexVAR) -> None:
    tokens = system.encode(torch.zeros(1, 3, 16, 16))
    with pytest.raises(InputError, match="made for pictures in their order"):
        system.generate_requests(REQUESTS, hooks=[ForcedTokens(tokens, [torch.ones_like(t).bool() for t in tokens])])
    with pytest.raises(InputError, match="16x16 pixels only"):
        tiny_var().generate_requests([Request(0, size=(32, 32))])
    with pytest.raises(InputError, match="both size"):
        Request(0, size=(16, 16), schedule=((1, 1),))
