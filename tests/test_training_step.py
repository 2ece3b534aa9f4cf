"""The generator's training step: quick passes give the plain gradients, and every knob does what it says."""
from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import labels, random_tokens, tiny_var
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from nextscale.errors import InputError
from nextscale.generators.var import VARGeneratorConfig
from nextscale.heads.cross_entropy import LinearCrossEntropy, cross_entropy
from nextscale.layers import bf16_training
from nextscale.layers.bf16_training import Gelu, ModulatedNorm, has_blocked_products
from nextscale.systems.var import VAR, preset_config
from nextscale.training import utilisation
from nextscale.training.generator import GeneratorTask
from nextscale.training.prefix import Prefix
from nextscale.training.task import TrainingStep
from nextscale.training.utilisation import MatrixProduct, Utilisation, training_flops

needs_bf16 = pytest.mark.skipif(not has_blocked_products(), reason="this CPU or torch has no bfloat16 products")
AT = TrainingStep(0, 10, 0.0, 0, 0)


def gradients(system: VAR, dtype: torch.dtype, **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of all parameters by name, under autocast where the type is bfloat16."""
    system.train().zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss, _, _ = system.loss(random_tokens(system.plan, 3), labels(3), label_dropout=0.0, **settings)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in system.named_parameters() if p.grad is not None}


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16_training, "has_blocked_products", lambda: False)


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    return {n: float((found[n] - wanted[n]).norm() / (wanted[n].norm() + 1e-12)) for n in wanted}


@needs_bf16
@pytest.mark.parametrize("variant", [{}, {"shared_modulation": True}, {"l2_attention": False}], ids=str)
@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.1, "step_weights": [0.0, 1.0, 2.0, 0.5]}], ids=str)
def test_quick_gradients_are_as_close_to_float32_as_the_plain_ones(
    variant: dict[str, Any], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    system = tiny_var(drop_path=0.0, **variant)
    true_loss, true = gradients(system, torch.float32, **settings)
    quick_loss, quick = gradients(system, torch.bfloat16, **settings)
    plain(monkeypatch)
    plain_loss, usual = gradients(system, torch.bfloat16, **settings)
    assert not torch.equal(quick["head.weight"], usual["head.weight"])  # else the quick passes were not taken
    assert abs(float(quick_loss - true_loss)) < 2e-3 + 1.5 * abs(float(plain_loss - true_loss))
    assert quick.keys() == true.keys()
    ours, theirs = distance(quick, true), distance(usual, true)
    for name in ours:
        assert quick[name].dtype == torch.float32
        few = true[name].numel() < 10  # sums of nearly everything: what is left is rounding
        assert ours[name] < 1.5 * theirs[name] + (0.1 if few else 0.01), (name, ours[name], theirs[name])
    assert sum(ours.values()) < 1.1 * sum(theirs.values())


@needs_bf16
def test_float32_training_is_untouched_by_the_quick_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    system = tiny_var(drop_path=0.0)
    _, quick = gradients(system, torch.float32)
    plain(monkeypatch)
    _, usual = gradients(system, torch.float32)
    assert all(torch.equal(quick[name], usual[name]) for name in usual)


def test_gelu_and_its_slope_are_right_for_every_bfloat16() -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()]
    x = every.clone().requires_grad_()
    y = Gelu.apply(x)
    y.sum().backward()
    exact = every.double().requires_grad_()
    wanted = F.gelu(exact, approximate="tanh")
    wanted.sum().backward()
    assert torch.equal(y, wanted.to(torch.bfloat16)) and x.grad is not None and exact.grad is not None
    assert torch.equal(x.grad, exact.grad.to(torch.bfloat16))


@needs_bf16
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_in_chunks_is_that_of_all_logits(smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nextscale.heads.cross_entropy.CHUNK", 3 * 40)  # several chunks, the last one cut short
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(11, 8).bfloat16(), torch.randn(40, 8).bfloat16().float(), torch.zeros(40)
    target, of_rows = torch.randint(40, (11,)), torch.rand(11)
    results = []
    for quick in (True, False):
        inputs = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        if quick:
            entropy, right = LinearCrossEntropy.apply(*inputs, target, smoothing)
        else:
            logits = F.linear(inputs[0], inputs[1].bfloat16()).float() + inputs[2]
            entropy, right = cross_entropy(logits, target, smoothing)
        (entropy * of_rows).sum().backward()
        results.append((entropy.detach(), right, [i.grad.float() for i in inputs if i.grad is not None]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    assert torch.equal(results[0][1], results[1][1])
    for ours, theirs in zip(results[0][2], results[1][2], strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.01


def test_modulated_norm_takes_each_picture_s_own_gain_and_shift() -> None:
    torch.manual_seed(0)
    found = []
    for quick in (True, False):
        torch.manual_seed(1)
        x, gain, shift = (torch.randn(*s, requires_grad=True) for s in ((3, 5, 16), (3, 1, 16), (3, 1, 16)))
        y = ModulatedNorm.apply(x, gain, shift, 1e-6) if quick else \
            F.layer_norm(x, (16,), eps=1e-6) * gain + shift
        (y.float() * torch.arange(16.0)).sum().backward()
        found.append((y.detach().float(), x.grad, gain.grad, shift.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=8e-3, atol=8e-3)


# Stochastic depth, initialisation

def test_stochastic_depth_grows_linearly_to_the_published_rate() -> None:
    assert VARGeneratorConfig.of_depth(16).drop_path == pytest.approx(0.0667, abs=1e-4)
    drops = [block.drop for block in tiny_var(depth=5, drop_path=0.2).generator.blocks]  # type: ignore[union-attr]
    assert drops == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


def test_a_fresh_generator_has_the_published_initialisation() -> None:
    torch.manual_seed(0)
    system, c, depth = tiny_var(depth=3), 48, 3
    system.initialise(gate=0.01)
    std = math.sqrt(1 / (3 * c))
    generator, block = system.generator, system.generator.blocks[1]
    wanted = {"position": (generator.position, std), "head": (system.head.weight, 0.02 * std),
              "qkv": (block.attention.qkv.weight, std),  # type: ignore[union-attr]
              "projection": (block.attention.projection.weight, std / math.sqrt(2 * depth)),  # type: ignore[union-attr]
              "contract": (block.mlp.contract.weight, std / math.sqrt(2 * depth)),  # type: ignore[union-attr]
              "gates": (block.modulation.weight[:2 * c], 0.01 * std),  # type: ignore[union-attr]
              "scales": (block.modulation.weight[2 * c:], 0.5 * std)}  # type: ignore[union-attr]
    for name, (weight, expected) in wanted.items():
        assert float(weight.detach().std()) == pytest.approx(expected, rel=0.06), name
    assert not system.head.bias.any()


# Prefix training

def test_prefix_follows_the_published_schedule() -> None:
    prefix = Prefix(share=0.5, first=4, warmup=0.05)
    scales = [prefix.at(p / 1000, 10)[0] for p in range(1001)]
    assert scales[0] == 5 and scales == sorted(scales) and set(scales) == {5, 6, 7, 8, 9, 10}
    assert all(n == 5 + round(p / 500 * 5) for p, n in enumerate(scales[:500])) and scales[500:] == [10] * 501
    weights = [prefix.at(p / 1000, 10)[1] for p in range(1001)]
    assert weights[0] == 1.0 and min(weights) < 0.05 and weights[-1] == 1.0
    first = scales.index(6)
    assert weights[first] < 0.05 and weights[first + 25] == pytest.approx(0.5, abs=0.05) and weights[first + 51] == 1.0
    assert Prefix().at(0.0, 10) == (10, 1.0)


def test_prefix_training_is_the_first_scales_of_the_whole() -> None:
    system = tiny_var(drop_path=0.0).train()
    tokens = random_tokens(system.plan, 2)
    _, whole, right = system.loss(tokens, labels(2), 0.0)
    loss, part, guessed = system.loss(tokens[:2], labels(2), 0.0)
    torch.testing.assert_close(part, whole[:2], rtol=1e-5, atol=1e-5)
    assert torch.equal(guessed, right[:2])
    loss.backward()
    grad = system.generator.position.grad
    assert grad is not None and grad[:, :5].abs().sum() > 0 and grad[:, 5:].abs().sum() == 0
    task = GeneratorTask(system, prefix=Prefix(share=0.9, first=1), compile="off")
    batch = {"tokens": torch.cat(tokens, 1), "labels": labels(2)}
    _, metrics = task.loss("main", batch, AT)
    assert metrics["scales"] == 2 and "nats_1" in metrics and "nats_2" not in metrics
    _, metrics = task.loss("main", batch, TrainingStep(9, 10, 0.95, 0, 0))
    assert "nats_3" in metrics and "scales" not in metrics


def test_processes_have_the_same_metrics_after_one_of_them_drew_samples(tmp_path: Path) -> None:
    tasks = [GeneratorTask(tiny_var().train(), sheet_labels=[0], compile="off") for _ in range(2)]
    batch = {"tokens": torch.cat(random_tokens(tasks[0].system.plan, 2), 1), "labels": labels(2)}

    def names(task: GeneratorTask, at: TrainingStep) -> set[str]:
        task.loss("main", batch, at)
        return set(task.after_step(at))

    assert [[names(task, AT) for task in tasks] for _ in range(2)][1] == [{"flop_utilisation"}] * 2
    tasks[0].samples(tmp_path, AT, tasks[0].averaged())
    assert [names(task, replace(AT, rested=True)) for task in tasks] == [set()] * 2
    assert [names(task, AT) for task in tasks] == [{"flop_utilisation"}] * 2


@pytest.mark.parametrize("wrong", [{"share": 1.0}, {"first": 0}, {"warmup": -0.1}], ids=str)
def test_an_impossible_prefix_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="prefix"):
        Prefix(**wrong)


def test_settings_that_do_not_fit_the_schedule_are_refused_before_training() -> None:
    with pytest.raises(InputError, match="scales"):
        GeneratorTask(tiny_var(), prefix=Prefix(share=0.5, first=3))
    with pytest.raises(InputError, match="step_weights"):
        GeneratorTask(tiny_var(), step_weights=(1.0, 1.0))
    with pytest.raises(InputError, match="label_smoothing"):
        GeneratorTask(tiny_var(), label_smoothing=1.0)


# Memory and compilation

def test_activation_checkpointing_keeps_less_and_gives_the_same_gradients() -> None:
    kept, found = [], []
    for checkpointing in (False, True):
        system = tiny_var(depth=3, drop_path=0.5).train()
        GeneratorTask(system, checkpointing=checkpointing)
        torch.manual_seed(7)
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _, _ = system.loss(random_tokens(system.plan, 4), labels(4))
        kept.append(sum(sizes))
        loss.backward()
        found.append({n: p.grad for n, p in system.named_parameters() if p.grad is not None})
    assert kept[1] < 0.5 * kept[0]
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-5, atol=1e-7)


def test_a_compiled_training_is_one_graph_and_has_the_same_losses() -> None:
    torch._dynamo.reset()
    losses = []
    for compile in ("off", "on"):
        system, counter = tiny_var(depth=1).train(), CompileCounterWithBackend("aot_eager")
        task = GeneratorTask(system, compile=compile, backend=counter)  # type: ignore[arg-type]
        optimiser = torch.optim.SGD(system.generator.parameters(), lr=0.05)
        for step in range(3):
            torch.manual_seed(step)
            batch = {"tokens": torch.cat(random_tokens(system.plan, 4, seed=step), 1), "labels": labels(4)}
            loss, _ = task.loss("main", batch, AT)
            assert loss is not None
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(float(loss.detach()))
    assert counter.frame_count == 1
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-4) and len(set(losses[:3])) == 3


# What is logged

def test_scales_are_logged_one_by_one_in_training_and_validation(tmp_path: Any) -> None:
    system = tiny_var(drop_path=0.0).train()
    tokens = torch.cat(random_tokens(system.plan, 4), 1)
    batch = {"tokens": tokens, "labels": labels(4)}
    task = GeneratorTask(system, label_dropout=0.0, part_dropout=0.0, validation=batch)
    loss, metrics = task.loss("main", batch, AT)
    rows = torch.tensor([step.rows for step in system.plan]).float()
    by_scale = torch.stack([torch.as_tensor(metrics[f"nats_{k}"]) for k in range(4)])
    wanted = float((by_scale * rows).sum() / rows.sum())
    assert loss is not None and float(loss.detach()) == pytest.approx(wanted, rel=1e-5)
    held_out = task.samples(tmp_path, AT, task.modules)
    assert held_out is not None
    for k in range(4):
        assert held_out[f"held_out/nats_{k}"] == pytest.approx(float(metrics[f"nats_{k}"]), rel=1e-4)
        assert held_out[f"held_out/accuracy_{k}"] == pytest.approx(float(metrics[f"accuracy_{k}"]))
    assert held_out["held_out/nats_per_token"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert 0 < float(held_out["held_out/accuracy"]) < 0.5


def test_flops_of_a_published_size_follow_from_its_parameters() -> None:
    with torch.device("meta"):
        system = VAR(preset_config("var-d16"))
    matrices = sum(p.numel() for name, p in system.named_parameters()
                   if p.ndim == 2 and "modulation" not in name and name.startswith(("generator.blocks", "head")))
    flops = training_flops([MatrixProduct(*p) for p in system.products(2)])
    by_rows = 6 * matrices * 2 * 680
    pairs = 0.619 * 680**2 * 2  # var.md: visible pairs of two pictures
    assert flops == pytest.approx(by_rows + 12 * pairs * 1024 * 16 + 6 * 2 * (16 * 6 + 2) * 1024**2
                                  + 6 * 2 * 680 * 32 * 1024, rel=2e-3)


def test_utilisation_is_time_of_the_products_over_time_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(utilisation, "products_seconds", lambda *_: 0.25)
    monkeypatch.setattr(utilisation.time, "perf_counter", lambda: now[0])
    meter = Utilisation(torch.device("cpu"), torch.float32)
    meter.add((2, 4), list)
    assert meter.step() is None
    for _ in range(2):  # two micro-batches a step
        meter.add((2, 4), list)
    now[0] += 2.0
    assert meter.step() == 0.25
    meter.pause()
    meter.add((2, 4), list)
    assert meter.step() is None
