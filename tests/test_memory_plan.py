"""Memory is counted before a run, and a batch that is too large is split."""
from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_code_decoding import tiny_pair
from test_flowar import tiny as tiny_flowar
from test_hmar import tiny as tiny_hmar
from test_m_var import tiny as tiny_m_var
from test_mar import tiny as tiny_mar
from test_srdd import tiny as tiny_srdd
from test_xar import tiny as tiny_xar
from tiny import tiny_var

import nextscale
from nextscale.devices import free_memory, free_on_machine
from nextscale.errors import InputError
from nextscale.evaluation.cost import LiveBytes
from nextscale.layers.memory import Memory
from nextscale.noise import Keyed
from nextscale.run import Run
from nextscale.sampling.generation import Settings
from nextscale.sampling.memory_plan import Needs, decoder_bytes, needs, plan_batches, size, weight_bytes
from nextscale.sampling.steps import sample_steps
from nextscale.systems.var import VAR
from nextscale.tokenizers.autoencoder import AutoencoderConfig, Decoder
from nextscale.tokenizers.strips import decode_in_strips

GRIDS = ((1, 1), (2, 2), (4, 4), (8, 8))
SYSTEMS: dict[str, Callable[[], Any]] = {
    "var": lambda: tiny_var(GRIDS), "hmar": lambda: tiny_hmar(((1,), (2, 2), (5, 4), (8, 8))), "m_var": tiny_m_var,
    "srdd": lambda: tiny_srdd(1), "flowar": tiny_flowar, "xar": tiny_xar, "mar": tiny_mar,
    "pair, the refiner's peak": lambda: tiny_pair(2), "pair, the drafter's peak": lambda: tiny_pair(3, depth=8)}


def allocated(memory: Memory) -> int:
    """Bytes of the buffers of keys and values, spare room included, and of the states."""
    held = [tensor for groups in memory.groups.values() for group in groups for tensor in (group.k, group.v)]
    return sum(tensor.untyped_storage().nbytes() for tensor in held) + sum(t.nbytes for t in memory.state.values())


HEADS = {"contextual": [[True, False, False], [True, True, True]]}
POLICIES: dict[str, dict[str, Any]] = {
    "scalekv": {"budgets": {"budgets": [None, None, None, [8, 10], [11, 20]], "window": 4}},
    "snapkv": {"share": 0.3, "window": 4}, "pyramidkv": {"share": 0.3, "window": 4, "beta": 4.0},
    "sliding-window": {"share": 0.3, "sinks": 3}, "hack": {"heads": HEADS, "compression": 0.4, "stored": 0.7}}


@pytest.mark.parametrize("name", POLICIES)
def test_buffers_of_a_shrunk_memory_hold_what_is_counted_and_tags_weigh_little_beside(name: str) -> None:
    """Layer by layer from the step on at which it is shrunk first, up to which it has room; never room for the plan."""
    system = tiny_var(((1, 1), (2, 2), (3, 3), (4, 5), (6, 6))).to_precision("bf16")
    guidance = system.guidance(system.settings_for("pictures", {}))
    begun, most = system.start(torch.zeros(2, 1, dtype=torch.int64), guidance, Keyed.from_seeds([0, 1])), 0
    with torch.no_grad():
        for run in sample_steps(system, begun, guidance, (), [nextscale.hook(name, **POLICIES[name])]):
            most = max(most, allocated(run.memory))
    assert allocated(run.memory) == run.memory.bytes() <= most < 2 * 2 * 2 * 2 * 48 * 70 * 2
    for group in (group for groups in run.memory.groups.values() for group in groups):
        tags = 0 if group.tags is None else group.tags.step.nbytes + group.tags.cell.nbytes
        # Heads of 16 numbers here: of 64, as published models have, keys and values weigh four times as much.
        assert tags <= (0.016 if name != "sliding-window" else 0.05) * 4 * (group.k.nbytes + group.v.nbytes)


@pytest.fixture(scope="module")
def system() -> VAR:
    return tiny_var()


@pytest.mark.parametrize("name", SYSTEMS)
def test_what_is_planned_is_what_is_held(name: str) -> None:
    system, pictures = SYSTEMS[name](), 3
    used = system.settings_for("pictures", {})
    guidance, plan, held = system.guidance(used), system.plan_for(used), 0
    need, room = needs(system, plan, len(guidance.branches), used), 0
    labels = torch.zeros(pictures, len(system.config.classes), dtype=torch.int64)
    with torch.inference_mode(), LiveBytes() as live:
        for run in system.sampled(system.start(labels, guidance, Keyed.from_seeds(range(pictures)), plan), guidance,
                                  used):
            held, room = max(held, run.memory.bytes()), max(room, allocated(run.memory))
    last = plan.steps[-1].rows if name == "xar" else 0  # the last entity has room, but nobody comes to read it
    assert held == pictures * need.memory * (plan.length - last) // plan.length
    assert room == pictures * need.memory
    assert 0.6 < live.peak / (pictures * need.drawing) < 1.1
    with torch.inference_mode():
        system.tokenizer.decode(run.canvas)  # makes what is kept beside the weights, and counted with them
        with LiveBytes() as live:
            system.tokenizer.decode(run.canvas)
    assert 0.9 < live.peak / (pictures * need.decoder) < 1.1


def test_a_pair_s_plan_follows_the_number_of_drafted_steps() -> None:
    """Both networks' weights, and the peak of the one that needs more; the refiner's first call goes through the
    drafted steps, so that it works on all 30 rows behind three of them."""
    pair, wide = tiny_pair(2), tiny_var()
    used = pair.settings_for("pictures", {})
    found = {n: needs(pair, pair.plan, 2, replace(used, draft_steps=n)) for n in range(5)}
    assert [found[n].memory for n in (0, 4)] == [2 * 2 * 30 * width * 4 for width in (32, 2 * 48)]
    assert found[4].drawing == needs(wide, wide.plan, 2).drawing
    row, predicted = 2 * 32 * pair.generator.live_widths * 4, 32 * 4 * (2 + 8)
    assert [found[n].step for n in (0, 2, 3)] == [rows * row + 16 * predicted for rows in (16, 16, 30)]
    deep = tiny_pair(3, depth=8)
    assert needs(deep, deep.plan, 2).memory == 2 * 2 * 8 * 48 * 14 * 4, "the drafter's, of its own steps alone"
    assert len({need.weights for need in found.values()}) == 1
    assert found[0].weights == weight_bytes(wide) + sum(
        p.nbytes for part in (pair.generator, pair.head, pair.labels) for p in (*part.parameters(), *part.buffers()))


@pytest.mark.parametrize("multipliers", [(1, 1, 2, 2), (1, 2, 4), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("rows", [None, 8])
def test_the_decoder_s_peak_is_counted(multipliers: tuple[int, ...], rows: int | None) -> None:
    config = AutoencoderConfig(32, multipliers, 1, 2, 8, 32)
    decoder, features = Decoder(config).eval().requires_grad_(False), torch.randn(1, 8, 12, 16)
    with torch.no_grad():
        decoder(features)
        with LiveBytes() as live:
            _ = decoder(features) if rows is None else decode_in_strips(decoder, features, rows)
    assert 0.75 < live.peak / decoder_bytes(config, (12, 16), 4, rows) < 1.1


def test_weights_are_counted_once_and_in_their_own_format() -> None:
    whole = weight_bytes(tiny_var())
    weights = tiny_var().state_dict()
    doubling = sum(weight.numel() for name, weight in weights.items() if name.endswith("change.conv.weight")
                   and name.startswith("tokenizer.decoder"))
    assert whole == 4 * (sum(p.numel() for p in weights.values()) + doubling * 16 // 9)


def test_pictures_are_the_same_however_the_batch_is_split(system: VAR, caplog: pytest.LogCaptureFixture) -> None:
    whole = system.generate([0, 1, 2, 3, 4], seed=3, output="torch", batch_size=5)
    assert not caplog.records
    used = system.settings_for("pictures", {})
    need = needs(system, system.plan, 2)
    with caplog.at_level(logging.WARNING, "nextscale"):
        split = system.generate([0, 1, 2, 3, 4], seed=3, output="torch", batch_size=5,
                                memory_limit=need.weights + 2 * max(need.drawing, need.decoder))
    assert len(caplog.records) == 1 and "pictures are drawn at once" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(whole.tokens, split.tokens, strict=True))
    assert torch.equal(whole.log_prob, split.log_prob) or torch.allclose(whole.log_prob, split.log_prob, atol=1e-4)
    torch.testing.assert_close(whole.images, split.images, atol=1e-4, rtol=0)
    assert split.seeds == whole.seeds and split.labels == whole.labels and split.settings == used


def test_a_decoder_that_does_not_fit_goes_in_strips() -> None:
    system = tiny_var(((1, 1), (4, 4), (24, 24)))
    need = needs(system, system.plan, 1)
    room = (need.strips + need.decoder) // 2
    assert need.strips < need.decoder
    whole = system.tokenizer.decode(torch.randn(1, 8, 24, 24, generator=torch.Generator().manual_seed(0)))
    strips = system.tokenizer.decode(torch.randn(1, 8, 24, 24, generator=torch.Generator().manual_seed(0)), 8)
    torch.testing.assert_close(whole, strips, atol=1e-4, rtol=0)
    found = plan_batches(4, replace_drawing(need, room // 4), need.weights + room, None)
    assert (found.drawn, found.decoded, found.strips) == (4, 1, 32) and "strips" in str(found.note)


def replace_drawing(need: Needs, bytes_: int) -> Needs:
    return need._replace(memory=0, step=bytes_)


def test_what_is_free_splits_a_batch_and_nothing_known_leaves_it() -> None:
    need = Needs(weights=1000, memory=60, step=40, decoder=50, strips=30)
    assert plan_batches(8, need, None, None) == plan_batches(8, need, None, 10**9) == plan_batches(8, need, 10**9, None)
    assert plan_batches(8, need, 1350, None).drawn == 3
    free = plan_batches(8, need, None, 400)
    assert (free.drawn, free.decoded, free.strips) == (3, 3, None) and free.note is not None
    assert plan_batches(8, need._replace(decoder=200), 1450, None).decoded == 2
    # Less is free than one picture takes: it is tried all the same, for the count is an estimate.
    assert plan_batches(8, need, None, 10).drawn == 1
    with pytest.raises(InputError, match=r"one picture takes 1\.1 kB"):
        plan_batches(8, need, 1090, None)


def test_a_limit_below_one_picture_is_refused_before_any_work(system: VAR) -> None:
    with pytest.raises(InputError, match="memory_limit is 1 kB, but one picture takes"):
        system.generate([0], memory_limit=1000)


def test_a_network_that_does_not_tell_is_drawn_as_asked_and_takes_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    system = tiny_var()
    monkeypatch.delattr(type(system.generator), "memory_bytes")
    assert len(system.generate([0, 1]).images) == 2
    with pytest.raises(InputError, match="doesn't tell what it holds"):
        system.generate([0], memory_limit=10**9)


def test_sizes_read_well() -> None:
    assert [size(n) for n in (12, 4500, 3_200_000, 17_300_000_000)] == ["12 bytes", "4.5 kB", "3.2 MB", "17.3 GB"]


def test_free_memory_is_what_a_container_may_still_take(tmp_path: Path) -> None:
    """Files that the kernel keeps at hand are not in the way: else a machine that read much would look full."""
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    assert free_on_machine(tmp_path) is None
    write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    assert free_on_machine(tmp_path) == 8000 * 1024
    group = "sys/fs/cgroup/"
    write(group + "memory.stat", "anon 5\nactive_file 300\ninactive_file 700\ninactive_anon 9\n")
    write(group + "memory.current", "4000\n")
    write(group + "memory.max", "max\n")
    assert free_on_machine(tmp_path) == 8000 * 1024
    write(group + "memory.max", "5000\n")
    assert free_on_machine(tmp_path) == 2000
    assert free_memory(torch.device("cpu")) is None or free_memory(torch.device("cpu")) > 10**6


def test_batches_are_handed_out_as_they_are_done(system: VAR) -> None:
    batches: list[Any] = []
    whole = system.generate([0, 1, 2], seed=3, output="numpy", batch_size=2, on_batch=batches.append)
    assert [len(batch.images) for batch in batches] == [2, 1] and [b.seeds for b in batches] == [[3, 4], [5]]
    assert all((whole.images[i] == images).all()
               for i, images in enumerate(image for batch in batches for image in batch.images))
    assert replace(Settings(), guidance_scale=2.0, top_k=20, top_p=0.95) == batches[0].settings


def test_a_finished_batch_leaves_nothing_remembered_behind(system: VAR) -> None:
    """Else many batches would hold the keys and values of all of them."""
    def watch(step: int, run: Run) -> None:
        if step == 0:
            memories.append(weakref.ref(run.memory))

    memories: list[weakref.ref[Memory]] = []
    left: list[int] = []
    system.generate([0] * 6, batch_size=2, output="torch", callback=watch,
                    on_batch=lambda _: left.append(sum(one() is not None for one in memories)))
    assert len(memories) == 3 and left == [0, 0, 0]
