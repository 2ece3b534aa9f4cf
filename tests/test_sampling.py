"""Sampling: guidance, filters, seeds, streams, hooks, and what generate gives back."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_code_decoding import tiny_pair
from test_flowar import tiny as tiny_flowar
from test_infinity import tiny as tiny_infinity
from test_srdd import tiny as tiny_srdd
from test_star import tiny as tiny_star
from tiny import CLASSES, emoji, labels, tiny_var
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import nextscale
from nextscale.acceleration.fastvar import FastVAR
from nextscale.cli.options import make_hooks
from nextscale.context import Hook
from nextscale.errors import InputError
from nextscale.noise import Keyed
from nextscale.plan import Plan
from nextscale.run import At, Call, Run, Sample
from nextscale.sampling.filters import PerStep, Temperature, TopK, TopP, make_filters
from nextscale.sampling.graphs import CapturedSteps
from nextscale.sampling.guidance import ClassifierFree, Nested, Unguided, make_guidance
from nextscale.sampling.steps import sample_steps
from nextscale.systems.text_conditional import TextConditionalSystem
from nextscale.systems.var import VAR, preset_config

AT = At(1, 4, 1, 30)


@pytest.fixture(scope="module")
def system() -> VAR:
    return tiny_var()


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Guidance

def test_guidance_scale_is_u_plus_scale_times_the_difference_at_the_last_step() -> None:
    c, u = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    outputs = {"conditional": c, "unconditional": u}
    for k in range(4):
        ramped = ClassifierFree(3.5)(outputs, At(k, 4, 0, 1))
        torch.testing.assert_close(ramped, u + (1 + 2.5 * k / 3) * (c - u))
        torch.testing.assert_close(ClassifierFree(3.5, "constant")(outputs, At(k, 4, 0, 1)), u + 3.5 * (c - u))


def test_the_published_cfg_is_guidance_scale_minus_1() -> None:
    c, u, cfg = torch.randn(1, 2, 4), torch.randn(1, 2, 4), 1.5
    outputs = {"conditional": c, "unconditional": u}
    for k in range(10):
        t = cfg * k / 9
        torch.testing.assert_close(ClassifierFree(1 + cfg)(outputs, At(k, 10, 0, 1)), (1 + t) * c - t * u)
    published = preset_config("var-d16").settings
    assert published["fid"].guidance_scale - 1 == 1.5 and published["pictures"].guidance_scale - 1 == 4
    assert (published["fid"].top_k, published["fid"].top_p) == (900, 0.96)


def test_scale_1_is_the_conditional_run_alone(system: VAR) -> None:
    assert make_guidance(1.0).branches == ("conditional",)
    plain = system.generate([0, 1], seed=3, guidance_scale=1.0, output="torch")
    both = system.generate([0, 1], seed=3, guidance=ClassifierFree(1.0), output="torch")
    assert same(plain.tokens, both.tokens)
    torch.testing.assert_close(plain.images, both.images, atol=1e-4, rtol=0)


def test_guidance_does_nothing_where_there_is_no_class(system: VAR) -> None:
    plain = system.generate(None, 2, seed=3, guidance_scale=1.0, output="torch")
    guided = system.generate(None, 2, seed=3, guidance_scale=6.0, output="torch")
    torch.testing.assert_close(plain.images, guided.images, atol=1e-3, rtol=0)


def test_nested_guidance_of_two_branches_is_classifier_free_guidance() -> None:
    outputs = {"conditional": torch.randn(1, 2, 4), "unconditional": torch.randn(1, 2, 4)}
    nested = Nested(("conditional", "unconditional"), (1.5,))
    torch.testing.assert_close(nested(outputs, AT), ClassifierFree(2.5)(outputs, AT))
    with pytest.raises(InputError):
        Nested(("a", "b", "c"), (1.0,))


def test_impossible_guidance_is_refused() -> None:
    for scale, schedule in ((-1.0, "ramp"), (float("nan"), "ramp"), (2.0, "rampp")):
        with pytest.raises(InputError, match="guidance"):
            make_guidance(scale, schedule)


def shares(schedule: object, steps: int) -> list[float]:
    """Of the scale at every step: what guidance of scale 2 makes of c = 1, u = 0, less the unguided 1."""
    outputs = {"conditional": torch.ones(1, 1, 1), "unconditional": torch.zeros(1, 1, 1)}
    return [float(make_guidance(2.0, schedule)(outputs, At(k, steps, k, steps))) - 1 for k in range(steps)]


def test_a_power_cosine_is_that_of_its_published_settings() -> None:
    """RAR-B at 256 steps: scale 16, power 2.75 (arXiv 2411.00776)."""
    found = [1 + 15 * share for share in shares("power-cosine:2.75", 256)]
    assert [found[k] for k in (0, 64, 128, 192, 255)] == pytest.approx([1.0, 1.018, 1.80, 7.40, 15.996], abs=6e-3)
    assert shares("power-cosine:0", 5) == [1.0] * 5
    assert shares("power-cosine:1", 4) == pytest.approx([0, 0.1464, 0.5, 0.8536], abs=1e-4)


def test_an_interval_guides_within_these_shares_of_the_steps_alone() -> None:
    assert shares("interval:0.2:0.6", 6) == [0, 1, 1, 1, 0, 0]
    assert shares("interval:0:1", 3) == shares("constant", 3) == [1, 1, 1]
    assert shares("interval:0.5:0.5", 2) == [0, 0] and shares("interval:1:1", 4) == [0, 0, 0, 1]


@pytest.mark.parametrize(("schedule", "message"), [
    ("interval:0.8:0.2", "rise"), ("interval:0.5", "write it as interval:0.2:0.8"), ("interval:a:b", "write it as"),
    ("power-cosine", "write it as power-cosine:1.5"), ("power-cosine:-1", "at least 0"),
    ("power-cosine:nan", "at least 0"), ("ramp:2", "unknown"), ("cosine-power:1", "power-cosine:1.5")])
def test_schedules_written_wrongly_are_refused(schedule: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_guidance(2.0, schedule)


def test_settings_and_the_command_line_take_schedules_with_numbers(system: VAR) -> None:
    from nextscale.cli.options import read_schedule

    made = [system.generate([0, 1], seed=3, guidance_scale=4.0, guidance_schedule=read_schedule(text), output="torch")
            for text in ("interval:0.5:1", "0,0,1,1", "interval:0:1", "power-cosine:1.5")]
    assert same(made[0].tokens, made[1].tokens)
    assert not same(made[0].tokens, made[2].tokens) and not same(made[0].tokens, made[3].tokens)
    assert made[3].settings.guidance_schedule == "power-cosine:1.5"


# Filters, against naive references

def naive_top_k(logits: np.ndarray, k: int) -> np.ndarray:
    least = np.sort(logits)[::-1][min(k, len(logits)) - 1]
    return np.where(logits < least, -np.inf, logits)


def naive_top_p(logits: np.ndarray, p: float) -> np.ndarray:
    share = np.exp(logits - logits.max())
    share /= share.sum()
    out, below = logits.copy(), 0.0
    order = np.argsort(share, kind="stable")
    for i in order[:-1]:
        below += share[i]
        if below <= 1 - p:
            out[i] = -np.inf
    return out


rows = st.lists(st.sampled_from([-3.0, -1.5, 0.0, 0.25, 1.0, 2.0]), min_size=1, max_size=12)


@settings(max_examples=100)
@given(rows, st.integers(1, 14))
def test_top_k_keeps_ties_with_the_last_it_keeps(values: list[float], k: int) -> None:
    found = TopK(k)(torch.tensor(values)[None, None], AT)[0, 0].numpy()
    assert np.array_equal(found, naive_top_k(np.array(values, dtype=np.float32), k))
    assert np.isfinite(found).sum() >= min(k, len(values))


@settings(max_examples=100)
@given(st.lists(st.floats(-6, 6, width=32), min_size=1, max_size=12, unique=True), st.floats(0.05, 1.0))
def test_top_p_keeps_the_published_nucleus(values: list[float], p: float) -> None:
    logits = np.array(values, dtype=np.float64)
    share = np.sort(np.exp(logits) / np.exp(logits).sum()).cumsum()
    if np.abs(share - (1 - p)).min() < 1e-5 or np.diff(np.sort(logits)).min(initial=1) < 1e-5:
        return  # float32 may round the border case the other way
    found = TopP(p)(torch.tensor(values)[None, None], AT)[0, 0].numpy()
    assert np.array_equal(np.isfinite(found), np.isfinite(naive_top_p(logits, p)))
    kept = np.isfinite(found)
    assert np.array_equal(found[kept], np.array(values, dtype=np.float32)[kept]) and kept[np.argmax(values)]


def test_filters_order_values_alike_by_numpy_and_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU NumPy sorts; codes that tie with the last that stays do, too, whichever comes first."""
    logits = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    logits[:, :, 10:20] = (4 * logits[:, :, 10:20]).round() / 4
    logits[..., 40:] = -torch.inf
    filters = [TopK(1), TopK(9), TopK(60), TopP(1e-6), TopP(0.5), TopP(0.99)]
    found = [narrow(logits, AT) for narrow in filters]
    monkeypatch.setattr("nextscale.sampling.filters._by_numpy", lambda logits: False)
    assert all(torch.equal(narrow(logits, AT), by_numpy) for narrow, by_numpy in zip(filters, found, strict=True))
    tied = torch.tensor([[[0.0, 2.0, 2.0, 2.0, 1.0]]])
    assert TopP(0.5)(tied, AT).isfinite().tolist() == [[[False, True, True, True, False]]]
    assert TopK(2)(tied, AT).isfinite().tolist() == [[[False, True, True, True, False]]]


def test_top_p_behind_top_k_only_narrows_what_is_left() -> None:
    logits = torch.randn(3, 7, 50, generator=torch.Generator().manual_seed(0))
    by_k = TopK(9)(logits, AT)
    by_both = TopP(0.7)(by_k, AT)
    for i in range(3):
        for j in range(7):
            left = by_k[i, j].isfinite().nonzero().flatten()
            naive = naive_top_p(logits[i, j, left].double().numpy(), 0.7)
            assert torch.equal(left[torch.from_numpy(np.isfinite(naive))], by_both[i, j].isfinite().nonzero().flatten())


@pytest.mark.parametrize("numpy", [True, False])
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31), v=st.integers(1, 40), k=st.integers(1, 45), p=st.floats(1e-6, 1.0),
       levels=st.sampled_from([0, 2, 5]), hidden=st.integers(0, 30))
def test_top_p_of_the_k_likeliest_is_top_p_behind_top_k_to_the_bit(
        monkeypatch: pytest.MonkeyPatch, numpy: bool, seed: int, v: int, k: int, p: float, levels: int,
        hidden: int) -> None:
    """With ties at either border, codes ruled out before, and k beyond what there is."""
    monkeypatch.setattr("nextscale.sampling.filters._by_numpy", lambda logits: numpy)
    logits = 2 * torch.randn(2, 3, v, generator=torch.Generator().manual_seed(seed))
    if levels:
        logits = (logits * levels / 4).round()
    logits[0, 1, v - min(hidden, v - 1):] = -torch.inf
    before = logits.clone()
    assert torch.equal(TopP(p, k)(logits, AT), TopP(p)(TopK(k)(logits, AT), AT))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("numpy", [True, False])
def test_published_settings_keep_the_same_codes_of_whole_vocabularies(
        monkeypatch: pytest.MonkeyPatch, numpy: bool) -> None:
    """Where sums are long enough to round: every border case falls as it does behind a whole sort."""
    monkeypatch.setattr("nextscale.sampling.filters._by_numpy", lambda logits: numpy)
    logits = 3 * torch.randn(64, 4096, generator=torch.Generator().manual_seed(1))
    for values in (logits, (8 * logits).round() / 8):  # the latter has ties everywhere
        for p in (0.5, 0.95, 0.96, 0.999):
            assert torch.equal(TopP(p, 900)(values, AT), TopP(p)(TopK(900)(values, AT), AT))


def test_top_p_keeps_the_best_of_every_row_and_filters_leave_their_input_alone() -> None:
    logits = torch.randn(2, 4, 20)
    before = logits.clone()
    kept = TopP(1e-6)(logits, AT).isfinite()
    assert (kept.sum(-1) == 1).all() and torch.equal(kept.float().argmax(-1), logits.argmax(-1))
    for narrow in (TopK(3), TopP(0.5), Temperature(0.5)):
        narrow(logits, AT)
    assert torch.equal(logits, before)


def test_settings_become_filters_in_order() -> None:
    assert make_filters() == () == make_filters(1.0, 0, 0.0)
    assert make_filters(0.5, 3, 0.9) == (Temperature(0.5), TopP(0.9, 3))
    assert make_filters(top_k=3) == (TopK(3),) and make_filters(top_p=0.9) == (TopP(0.9),)
    assert make_filters(top_k=(3, 5), top_p=0.9) == (PerStep((TopP(0.9, 3), TopP(0.9, 5))),)
    assert make_filters(0.5, 3, 0.9, temperature_last=True) == (TopP(0.9, 3), Temperature(0.5))
    for bad in ({"temperature": 0.0}, {"temperature": -1.0}, {"top_k": -2}, {"top_p": 1.5}, {"top_p": -0.1},
                {"top_p": float("nan")}):
        with pytest.raises(InputError):
            make_filters(**bad)  # type: ignore[arg-type]


def test_top_k_1_takes_the_likeliest_token_at_every_step(system: VAR) -> None:
    class Greedy(Hook):
        def logits(self, logits: Tensor, at: At) -> Tensor:
            wanted.append(logits.argmax(-1))
            return logits

    wanted: list[Tensor] = []
    made = system.generate([0, 1], hooks=[Greedy()], top_k=1)
    assert same(made.tokens, wanted)


def test_low_temperature_sharpens(system: VAR) -> None:
    cold = system.generate([0], count=None, seed=1, temperature=1e-3, top_k=None, top_p=None)
    greedy = system.generate([0], seed=1, top_k=1)
    assert same(cold.tokens, greedy.tokens)


# Seeds

@pytest.mark.parametrize("smooth", [False, True])
def test_a_picture_does_not_depend_on_its_batch(system: VAR, smooth: bool) -> None:
    whole = system.generate([0, 1, 2, 3, 4], seed=10, output="torch", smooth=smooth)
    for size in (1, 2, 3):
        parts = system.generate([0, 1, 2, 3, 4], seed=10, batch_size=size, output="torch", smooth=smooth)
        assert same(whole.tokens, parts.tokens)
        torch.testing.assert_close(whole.images, parts.images, atol=1e-4, rtol=0)
    alone = system.generate([3], seed=13, output="torch", smooth=smooth)
    assert all(torch.equal(a[0], w[3]) for a, w in zip(alone.tokens, whole.tokens, strict=True))
    mixed = system.generate([4, 3, 3], seeds=[1, 13, 2], output="torch", smooth=smooth)
    assert all(torch.equal(m[1], w[3]) for m, w in zip(mixed.tokens, whole.tokens, strict=True))


def test_seeds_are_given_back_and_draw_the_same_again(system: VAR) -> None:
    made = system.generate(2, 3, seed=5)
    assert made.seeds == [5, 6, 7] and made.labels == [2, 2, 2]
    again = system.generate(2, seeds=[made.seeds[1]], count=1)
    assert all(torch.equal(a[0], b[1]) for a, b in zip(again.tokens, made.tokens, strict=True))
    other = system.generate(2, 3, seed=50)
    assert not same(made.tokens, other.tokens)


# Streams, callbacks, hooks

def test_the_last_preview_is_the_picture(system: VAR) -> None:
    previews = list(system.stream([0, 1], seed=4, output="torch"))
    made = system.generate([0, 1], seed=4, output="torch")
    assert [p.step for p in previews] == [0, 1, 2, 3] and {p.steps for p in previews} == {4}
    assert torch.equal(previews[-1].images, made.images)
    assert not torch.equal(previews[0].images, previews[-1].images)


def test_a_stream_takes_seeds_and_guidance_as_generate_does(system: VAR) -> None:
    given = {"seeds": [9, 4], "guidance": ClassifierFree(2.0, "constant"), "output": "torch"}
    *_, last = system.stream([0, 1], **given)
    drawn = system.generate([0, 1], **given)
    assert same(last.run.tokens, drawn.tokens) and torch.equal(last.images, drawn.images)
    *_, plain = system.stream([0, 1], seeds=[9, 4], output="torch")
    assert not same(last.run.tokens, plain.run.tokens)


def test_a_preview_is_what_its_tokens_decode_to(system: VAR) -> None:
    for preview in system.stream([1], seed=4, output="torch"):
        assert torch.equal(preview.images, system.decode(preview.run.tokens))


def test_a_callback_sees_every_step_and_may_stop(system: VAR) -> None:
    seen: list[int] = []
    made = system.generate([0, 1], seed=1, callback=lambda step, run: seen.append(step))  # type: ignore[func-returns-value]
    assert seen == [0, 1, 2, 3] and not made.stopped and len(made.tokens) == 4
    stopped = system.generate([0, 1], seed=1, callback=lambda step, run: step == 1, output="torch")
    assert stopped.stopped and len(stopped.tokens) == 2 and stopped.images.shape == (2, 3, 16, 16)
    assert same(stopped.tokens, made.tokens[:2])


def test_stopping_in_a_later_batch_keeps_the_pictures_so_far(system: VAR) -> None:
    def stop(step: int, run: Run) -> bool:
        calls.append(step)
        return len(calls) == 6

    calls: list[int] = []
    made = system.generate([0, 1, 2, 3, 4], seed=1, batch_size=2, callback=stop, output="torch")
    assert made.stopped and made.images.shape[0] == 4 == len(made.seeds) == len(made.labels) == len(made.log_prob)
    whole = system.generate([0, 1], seed=1, output="torch")
    torch.testing.assert_close(made.images[:2], whole.images, atol=1e-4, rtol=0)
    assert all(len(t) == 4 for t in made.tokens)


def test_hooks_act_at_their_five_places(system: VAR) -> None:
    class Watcher(Hook):
        def inputs(self, run, call):  # type: ignore[no-untyped-def]
            seen.append("inputs")
            return call

        def output(self, outputs: dict[str, Tensor], at: At, run: Run | None) -> dict[str, Tensor]:
            assert run is not None and run.cursor == at.step
            assert set(outputs) == {"conditional", "unconditional"} and outputs["conditional"].shape[-1] == 32
            seen.append("output")
            return outputs

        def logits(self, logits: Tensor, at: At) -> Tensor:
            seen.append("logits")
            return logits

        def tokens(self, run: Run, sample: Sample) -> Sample:
            seen.append("tokens")
            return sample

        def end(self, run: Run, step: int) -> None:
            seen.append(f"end {step}")

    seen: list[str] = []
    watched = system.generate([0], seed=2, hooks=[Watcher()], output="torch")
    assert seen == [s for k in range(4) for s in ("inputs", "output", "logits", "tokens", f"end {k}")]
    assert torch.equal(watched.images, system.generate([0], seed=2, output="torch").images)


def test_a_vocabulary_mask_is_a_logits_hook(system: VAR) -> None:
    class Even(Hook):
        def logits(self, logits: Tensor, at: At) -> Tensor:
            return logits.index_fill(-1, torch.arange(1, 32, 2), -torch.inf)

    made = system.generate([0, 1], hooks=[Even()], top_k=None, top_p=None)
    assert all((t % 2 == 0).all() for t in made.tokens)


# Smooth mode

def test_smooth_mode_never_mixes_in_a_filtered_code(system: VAR) -> None:
    class Written(Hook):
        def tokens(self, run: Run, sample: Sample) -> Sample:
            written.append(sample)
            return sample

    written: list[Sample] = []
    system.generate([0, 1], hooks=[Written()], smooth=True, top_k=1, top_p=None)
    codebook = system.tokenizer.quantiser.codebook.weight
    for sample in written:  # one code is left, so the mixture is that code
        torch.testing.assert_close(sample.codes, codebook[sample.tokens])


def test_smooth_mode_mixes_codes_and_differs_by_seed(system: VAR) -> None:
    images = [system.generate([0], seed=s, smooth=True, output="torch").images for s in (0, 0, 1)]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


# Precision

def test_bf16_runs_and_stays_close() -> None:
    exact, rough = tiny_var(), tiny_var().to_precision("bf16")
    assert rough.head.weight.dtype == torch.bfloat16
    assert rough.tokenizer.quantiser.codebook.weight.dtype == torch.float32
    made = rough.generate([0, 1], seed=1, output="torch")
    assert made.images.dtype == torch.float32 and torch.isfinite(made.images).all()
    tokens = exact.encode(emoji(4))
    scores = [s.log_prob(tokens, [0, 1, 2, 3]).token for s in (exact, rough)]
    assert float((scores[0] - scores[1]).abs().mean()) < 0.05
    pictures = [s.decode(tokens) for s in (exact, rough)]
    assert float((pictures[0] - pictures[1]).abs().mean()) < 0.02
    with pytest.raises(InputError, match="precision"):
        exact.to_precision("fp8")


# What goes in and comes out

def test_pictures_come_out_as_pil_numpy_or_torch(system: VAR) -> None:
    made = {kind: system.generate([0, 1], seed=1, output=kind) for kind in ("pil", "numpy", "torch")}  # type: ignore[arg-type]
    assert made["pil"].images[0].size == (16, 16) and made["pil"].images[0].mode == "RGB"
    array = made["numpy"].images
    assert array.dtype == np.uint8 and array.shape == (2, 16, 16, 3)
    assert np.array_equal(np.asarray(made["pil"].images[1]), array[1])
    tensor = made["torch"].images
    assert float(tensor.min()) >= -1 and float(tensor.max()) <= 1
    assert np.abs(array / 127.5 - 1 - tensor.permute(0, 2, 3, 1).numpy()).max() <= 1 / 127.5
    assert made["pil"].describe(1)["seed"] == 2 and made["pil"].describe(1)["top_k"] == 20


def test_labels_come_as_indices_names_none_or_tuples() -> None:
    from dataclasses import replace

    system = tiny_var(classes=(3, 2))
    system.config = replace(system.config, class_names=(("cat", "dog", "cow"), ("flat", "3d")))
    rows = system.label_rows([1, "dog", ("cow", "3d"), None, (None, "flat"), ("2", 1)])
    assert rows.tolist() == [[1, 2], [1, 2], [2, 1], [3, 2], [3, 0], [2, 1]]
    assert [system.label_names(r) for r in rows[2:5]] == [("cow", "3d"), (None, None), (None, "flat")]
    assert system.label_rows("cat", 3).tolist() == [[0, 2]] * 3
    with pytest.raises(InputError, match="did you mean 'dog'"):
        system.label_rows("dgo")
    for bad in (3, -1, "-1", "²", "--1", ("cat", "flat", 1)):
        with pytest.raises(InputError):
            system.label_rows(bad)


def test_bad_requests_are_refused_before_any_work(system: VAR) -> None:
    for bad in ({"labels": CLASSES}, {"labels": [0, 1], "count": 3}, {"labels": [0], "seeds": [1, 2]},
                {"labels": [0], "batch_size": 0}, {"labels": [0], "purpose": "poster"}, {"labels": [0], "top_kk": 3},
                {"labels": [0], "guidance_scale": -2.0}, {"labels": [0], "top_p": 3.0}, {"labels": []},
                {"labels": 0, "count": 0}, {"labels": 0, "count": -1}, {"labels": [0], "output": "jpeg"}):
        with pytest.raises(InputError):
            system.generate(**bad)


def test_unguided_asks_for_one_branch_only() -> None:
    assert Unguided().branches == ("conditional",)
    assert ClassifierFree(2.0).branches == ("conditional", "unconditional")


def test_a_model_in_training_draws_in_evaluation_mode_and_goes_on_training() -> None:
    system = tiny_var(drop_path=0.9).train()
    made = system.generate([0, 1], seed=1)
    assert system.training and system.generator.training
    assert same(made.tokens, system.eval().generate([0, 1], seed=1).tokens)


# Hooks by name, and what they may refuse and leave out

def test_a_run_of_one_branch_can_be_forked_from_one_picture(system: VAR) -> None:
    """What a run keeps of the weights alone is no row of its batch."""
    def begun() -> Run:
        run = system.start(labels(1), Unguided(), Keyed.from_seeds([3]))
        next(iter(sample_steps(system, run, Unguided())))
        return run

    with torch.no_grad():
        alone, forked = begun(), begun().gather(torch.tensor([0, 0, 0]))
        for run in (alone, forked):
            assert list(sample_steps(system, run, Unguided()))[-1].done
    for one, three in zip(alone.tokens, forked.tokens, strict=True):
        assert torch.equal(three[:1], one) and len(three) == 3


def test_a_warm_up_compiles_few_graphs_and_later_batches_none() -> None:
    torch._dynamo.reset()
    system, counter = tiny_var(tuple((n, n) for n in range(1, 9))), CompileCounter()
    wanted = system.generate([3, 1], seed=5, output="torch")
    assert system.warm_up([0, 1], backend=counter, top_k=7) == []
    compiled = counter.frame_count
    assert 3 <= compiled <= 5, "the network at first, with memory and in general, not at every step; the decoder"
    found = system.generate([3, 1], seed=5, output="torch")
    assert counter.frame_count == compiled and all(map(torch.equal, found.tokens, wanted.tokens))
    torch.testing.assert_close(found.images, wanted.images)


@pytest.mark.parametrize("make", [tiny_infinity, tiny_star, tiny_flowar, tiny_pair, lambda: tiny_srdd(1)],
                         ids=["infinity", "star", "flowar", "pair", "srdd"])
def test_what_a_compiler_sees_is_the_same_in_every_batch(make: Callable[[], Any]) -> None:
    """Nothing hangs on the ids of tensors that are made anew."""
    torch._dynamo.reset()
    system, counter, labels = make(), CompileCounter(), [0, 1]
    if isinstance(system, TextConditionalSystem):
        labels = ["a red apple", "sun"]
    wanted = system.generate(labels, seed=2, output="torch")
    system.warm_up(labels, backend=counter)
    compiled = counter.frame_count
    for seed in (1, 2):
        found = system.generate(labels, seed=seed, output="torch")
    assert counter.frame_count == compiled
    torch.testing.assert_close(found.images, wanted.images, atol=1e-3, rtol=1e-3)


def test_a_warm_up_hands_out_the_capture_with_the_hooks(system: VAR) -> None:
    quiet = Hook()
    first, second = system.warm_up([0], compile=False, capture=True, hooks=[quiet])
    assert first is quiet and isinstance(second, CapturedSteps)
    with pytest.raises(InputError, match="acts inside the network"):
        system.warm_up([0], compile=False, capture=True, hooks=[FastVAR(ratio=0.5)])


def test_unknown_hooks_and_settings_are_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="unknown hook 'fastvra'"):
        nextscale.hook("fastvra")
    with pytest.raises(InputError, match="is empty"):
        make_hooks([""])
    with pytest.raises(InputError, match="No closing quotation"):
        make_hooks(["one 'half"])


def test_a_hook_is_asked_before_the_first_step_and_before_scoring(system: VAR) -> None:
    class Refusing(Hook):
        def prepare(self, model: object, plan: Plan, hooks: Sequence[Hook]) -> None:
            assert plan == system.plan and self in hooks
            raise InputError("refusing: not on this model")

        def inputs(self, run: Run, call: Call) -> Call:
            raise AssertionError("a step began")

    with pytest.raises(InputError, match="not on this model"):
        system.generate([1], hooks=[Refusing()], progress=False)
    with pytest.raises(InputError, match="not on this model"):
        system.log_prob(emoji(1), [1], hooks=[Refusing()])


def test_steps_that_a_hook_leaves_out_leave_the_canvas_as_it_is(system: VAR) -> None:
    class Fewer(Hook):
        def steps(self, plan: Plan) -> int:
            return len(plan) - 1

    whole = system.generate([1, 2], output="torch", progress=False)
    fewer = system.generate([1, 2], hooks=[Fewer(), Hook()], output="torch", progress=False)
    assert same(fewer.tokens, whole.tokens[:3]) and len(fewer.tokens) == 3
    previews = list(system.stream([1, 2], hooks=[Fewer()], output="torch"))
    assert [(p.step, p.steps) for p in previews] == [(0, 3), (1, 3), (2, 3)]
    torch.testing.assert_close(previews[-1].images, fewer.images)
    assert not torch.equal(fewer.images, whole.images)
