"""Editing without training: what is kept, what is redrawn, and which sizes are taken."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import emoji, tiny_var
from torch import Tensor

from nextscale.errors import InputError
from nextscale.plan import Plan
from nextscale.sampling.editing import keep_masks, latent_mask
from nextscale.systems.var import VAR


@pytest.fixture(scope="module")
def system() -> VAR:
    return tiny_var()


def mask(value: bool, pictures: int = 3) -> Tensor:
    return torch.full((pictures, 16, 16), value)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_keeping_everything_gives_the_reconstruction_bit_for_bit(system: VAR, smooth: bool,
                                                                 guidance_scale: float) -> None:
    pictures = emoji(3)
    made = system.edit(pictures, mask(False), [0, 1, None], output="torch", smooth=smooth,
                       guidance_scale=guidance_scale)
    assert torch.equal(made.images, system.decode(system.encode(pictures)))


def test_tokens_outside_the_region_are_the_picture_s_own(system: VAR) -> None:
    pictures, redraw = emoji(3), mask(False)
    redraw[:, :8, :8] = True
    made = system.edit(pictures, redraw, 1, seed=7, output="torch")
    keep = keep_masks(latent_mask(redraw, system.plan.grid), system.plan)
    own = system.encode(pictures)
    for k in range(4):
        assert torch.equal(made.tokens[k][keep[k]], own[k][keep[k]])
    assert keep[0].all() and not keep[3].all() and int(keep[3].sum()) == 3 * 12
    assert not torch.equal(made.tokens[3][~keep[3]], own[3][~keep[3]])


def test_redrawing_everything_keeps_the_smallest_scale_only(system: VAR) -> None:
    pictures = emoji(2)
    made = system.edit(pictures, mask(True, 2), [0, 1], seed=5, output="torch")
    own = system.encode(pictures)
    assert torch.equal(made.tokens[0], own[0])
    assert not any(torch.equal(a, b) for a, b in zip(made.tokens[1:], own[1:], strict=True))


def test_edits_differ_by_seed_and_repeat_by_seed(system: VAR) -> None:
    redraw = mask(False, 2)
    redraw[:, 4:, 4:] = True
    images = [system.edit(emoji(2), redraw, 2, seed=s, output="torch").images for s in (1, 1, 2)]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_a_picture_s_edit_does_not_depend_on_its_batch(system: VAR) -> None:
    redraw = mask(False)
    redraw[:, 8:] = True
    whole = system.edit(emoji(3), redraw, [0, 1, 2], seed=1)
    alone = system.edit(emoji(3)[2:], redraw[2:], [2], seed=3)
    assert all(torch.equal(a[0], w[2]) for a, w in zip(alone.tokens, whole.tokens, strict=True))


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=5), st.integers(0, 2**31))
def test_masks_follow_the_published_rule(grids: list[tuple[int, int]], seed: int) -> None:
    plan = Plan.scales([*grids, (8, 8)])
    keep = (torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) > 0.4).float()
    for step, found in zip(plan, keep_masks(keep, plan), strict=True):
        h, w = step.grid
        if h * w <= 3:
            assert found.all()
        else:
            resized = F.interpolate(keep, size=(h, w), mode="bilinear", align_corners=False)
            assert torch.equal(found, (resized > 0.5).flatten(1))


def test_half_covered_is_not_kept() -> None:
    keep = torch.zeros(1, 1, 4, 4)
    keep[..., :2, :] = 1
    plan = Plan.scales([(3, 3), (4, 4)])
    assert keep_masks(keep, plan)[0].view(3, 3).tolist() == [[True] * 3, [False] * 3, [False] * 3]


def test_one_touched_pixel_redraws_its_cell() -> None:
    redraw = mask(False, 1)
    redraw[0, 5, 13] = True
    kept = latent_mask(redraw, (4, 4))[0, 0]
    assert kept[1, 3] == 0 and float(kept.sum()) == 15


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 3, 16, 20), (1, 1, 16, 16), (3, 16, 16), (1, 4, 16, 16)])
def test_pictures_of_another_size_are_refused(system: VAR, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="16x16"):
        system.edit(torch.zeros(shape), torch.zeros(shape[0], *shape[-2:], dtype=torch.bool))


def test_a_schedule_that_the_system_cannot_follow_is_refused(system: VAR) -> None:
    wide = {"schedule": [(1, 1), (2, 2), (3, 3), (4, 6)]}
    with pytest.raises(InputError, match="by the schedule it was trained with"):
        system.edit(torch.zeros(1, 3, 16, 24), torch.zeros(1, 16, 24, dtype=torch.bool), **wide)
    with pytest.raises(InputError, match="by the schedule it was trained with"):
        system.enlarge(emoji(1), **wide)


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 16, 16), (1, 1, 16, 16), (16, 16)])
def test_masks_of_another_size_are_refused(system: VAR, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="mask"):
        system.edit(emoji(1), torch.zeros(shape, dtype=torch.bool))
