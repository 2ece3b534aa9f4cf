"""What a generation costs is counted, and the counts are those of the plan."""
from __future__ import annotations

import pytest
import torch
from tiny import tiny_var
from torch import nn

from nextscale.evaluation.cost import LiveBytes, cost_of
from nextscale.systems import car, himar, mar, scalar, xar


def test_evaluations_rows_and_memory_are_the_plan_s() -> None:
    system = tiny_var()
    found = cost_of(system, [0, 1, 2], guidance_scale=2.0)
    rows, width, depth = system.plan.length, 48, 2
    assert (found.pictures, found.steps, found.evaluations) == (3, 4, 4)
    assert found.rows == 2 * 3 * rows and found.head_evaluations == 0 and found.peak_bytes is None
    # Keys and values of every row but the last step's, which nothing asks for again.
    assert 0 < found.memory_bytes <= 2 * 3 * rows * 2 * width * depth * 4
    assert cost_of(system, [0, 1, 2], guidance_scale=1.0).rows == 3 * rows


def test_the_peak_holds_the_memory_and_grows_with_the_batch() -> None:
    system = tiny_var()
    one, four = (cost_of(system, [0] * count, peak=True).peak_bytes for count in (1, 4))
    assert one is not None and four is not None and one < four
    assert four > cost_of(system, [0] * 4).memory_bytes


def test_bytes_count_while_they_are_alive() -> None:
    with LiveBytes() as live:
        kept = torch.zeros(1000)
        assert live.now == 4000
        view = kept.view(10, 100)
        kept.add_(1)
        assert live.now == 4000 and live.peak == 4000
        more = torch.ones(500)
        assert live.now == 6000
        del more
        assert live.now == 4000 and live.peak == 6000
        del kept
        assert live.now == 4000, "a view keeps its storage"
        del view
        assert live.now == 0


def products_a_row(module: nn.Module) -> int:
    """Multiplications of a row by the weights of blocks; their modulation is once a picture."""
    return sum(weight.numel() for name, weight in module.named_parameters()
               if weight.ndim == 2 and "modulation" not in name and ("blocks." in name or "joins." in name))


def test_controls_cost_the_published_share_of_their_base() -> None:
    with torch.device("meta"):
        tower, encodings = car.CAR(car.preset_config("car-d16")), scalar.SCALAR(scalar.preset_config("scalar-d16"))
    base = products_a_row(tower.generator)
    assert base == 16 * 12 * 1024**2 == products_a_row(encodings.generator)
    # CAR: half as many blocks, and a layer 2C -> C for each. Attention among a picture's rows, not counted, adds alike.
    assert products_a_row(tower.control) == 8 * (12 + 2) * 1024**2
    assert 0.5 < products_a_row(tower.control) / base < 0.6
    # SCALAR: one layer C_f -> C a block and scale, of which a row meets its own scale's.
    a_row = encodings.control.weight[0].numel()
    assert a_row / base == 0.125 and a_row < products_a_row(tower.control) / 3


def test_published_samplers_take_the_published_evaluations() -> None:
    config = xar.preset_config("xar-base")
    entities, solver_steps = 4, config.settings["pictures"].solver_steps
    # The first evaluation of all entities but one also runs the entity before, which is clean now.
    assert (entities * solver_steps - (entities - 1), entities - 1) == (157, 3)
    with torch.device("meta"):
        cells, coarse_to_fine = xar.XAR(config), himar.HiMAR(himar.preset_config("himar-base"))
        masked = mar.MAR(mar.preset_config("mar-base"))
    assert [step.rows for step in cells.plan] == [64] * entities
    steps = len(coarse_to_fine.plan_for(coarse_to_fine.config.settings["fid"]))
    assert steps == 36 and len(masked.plan_for(masked.config.settings["fid"])) / steps == pytest.approx(7.1, abs=0.02)
