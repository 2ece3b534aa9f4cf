"""CAR: a tower beside VAR with memory of its own, joined last to first; VAR itself where there is no control."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import AUTOENCODER, CLASSES, GRIDS, emoji, fill, labels
from torch import Tensor

import nextscale
from nextscale.canvas import Canvas
from nextscale.cli import main
from nextscale.conditions.class_label import ClassCondition
from nextscale.control.car import ControlTower, Join, TowerConfig, TowerHook
from nextscale.errors import InputError, WeightsError
from nextscale.generators.var import VARGeneratorConfig
from nextscale.layers.resize import pillow_bicubic
from nextscale.noise import Keyed
from nextscale.run import Run
from nextscale.sampling.generation import Settings
from nextscale.sampling.guidance import ClassifierFree, Nested
from nextscale.sampling.score import hidden_states
from nextscale.sampling.steps import sample_steps
from nextscale.systems import folders
from nextscale.systems.car import CAR, CARConfig, preset_config, split_published
from nextscale.systems.controlled import ControlSettings
from nextscale.systems.var import VAR, VARConfig
from nextscale.tokenizers import pyramid
from nextscale.tokenizers.config import TokenizerConfig

NETWORK = VARGeneratorConfig(4, 48, 3)
TOWER = TowerConfig(("edges",), (8, 16, 32))
GUIDED = ClassifierFree(3.0)


def tiny(seed: int = 0, **network: Any) -> CAR:
    config = CARConfig(TokenizerConfig(AUTOENCODER, GRIDS, 32), replace(NETWORK, **network), (CLASSES,), control=TOWER,
                       settings={"pictures": ControlSettings(2.0, top_k=20, top_p=0.95)})
    system = CAR(config).eval()
    fill(system, seed)
    return system


def base_of(system: CAR) -> VAR:
    """The VAR that is in it."""
    config = system.config
    base = VAR(VARConfig(config.tokenizer, config.generator, config.classes,
                         settings={"pictures": Settings(2.0, top_k=20, top_p=0.95)})).eval()
    base.load_state_dict({n: t for n, t in system.state_dict().items() if not n.startswith("control.")})
    return base


def maps(pictures: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (pictures, 1, 16, 16), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))


def logits(system: CAR, hooks: list, branches: tuple[str, ...] = ("conditional",)) -> Tensor:
    """Teacher-forced on real pictures, (R, L, V)."""
    tokens = system.encode(emoji(2))
    reads = pyramid.replay(tokens, Canvas.empty(system.plan, system.tokenizer.quantiser, 2)).reads
    condition = ClassCondition(system.labels, labels(2))
    with torch.no_grad():
        found: Tensor = system.head(hidden_states(system, system.plan, reads, condition, branches, hooks))
    return found


def draw(system: CAR, run: Run, hook: TowerHook, until: int | None = None) -> Run:
    with torch.no_grad():
        for _ in sample_steps(system, run, GUIDED, system.filters(system.config.settings["pictures"]), [hook],
                              until=until, check=True):
            pass
    return run


def begin(system: CAR, pictures: int = 3) -> Run:
    return system.start(labels(pictures), GUIDED, Keyed.from_seeds(range(5, 5 + pictures)))


# With control off it is VAR

def test_without_a_control_it_draws_the_tokens_of_var() -> None:
    system = tiny()
    ours, wanted = (one.generate([1, 2], output="torch", progress=False) for one in (system, base_of(system)))
    assert all(torch.equal(a, b) for a, b in zip(ours.tokens, wanted.tokens, strict=True))
    assert torch.equal(ours.images, wanted.images)
    steered = system.generate([1, 2], control=maps(), output="torch", progress=False)
    assert not torch.equal(ours.images, steered.images)


def test_joins_that_hand_x_on_leave_the_base_s_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    system = tiny()
    plain, steered = logits(system, []), logits(system, [system.attach(maps())])
    assert not torch.allclose(plain, steered, atol=0.1)
    monkeypatch.setattr(Join, "forward", lambda self, x, residual: x)
    assert torch.equal(logits(system, [system.attach(maps())]), plain)


@pytest.mark.parametrize("network", [{}, {"shared_modulation": True}, {"l2_attention": False}], ids=str)
def test_branches_without_control_are_the_base_s_beside_those_that_have_it(network: dict) -> None:
    system = tiny(**network)
    both = logits(system, [system.attach(maps())], ("unconditional", "unconditional/uncontrolled"))
    torch.testing.assert_close(both[2:], logits(system, [], ("unconditional",)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both[:2], logits(system, [system.attach(maps())], ("unconditional",)),
                               rtol=1e-5, atol=1e-5)
    assert not torch.allclose(both[2:], both[:2], atol=0.1), "an unconditional row keeps its control"


# The tower

def test_the_last_output_of_the_tower_joins_the_first_of_the_late_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    system, outputs, joined = tiny(), [], []
    forward, join = ControlTower.forward, Join.forward

    def walk(self: ControlTower, *given: Any) -> list[Tensor]:
        outputs.extend(forward(self, *given))
        return outputs

    monkeypatch.setattr(ControlTower, "forward", walk)
    monkeypatch.setattr(Join, "forward", lambda self, x, r: joined.append(r) or join(self, x, r))
    right = logits(system, [system.attach(maps())])
    assert len(outputs) == 2 and joined[0] is outputs[1] and joined[1] is outputs[0]
    monkeypatch.setattr(ControlTower, "forward", lambda self, *given: forward(self, *given)[::-1])
    assert not torch.allclose(logits(system, [system.attach(maps())]), right, atol=0.1)


def test_one_call_equals_the_loop_with_two_memories() -> None:
    system, given = tiny(), maps(3)
    run = draw(system, begin(system), system.attach(given))
    assert {"base.0.kv", "base.3.kv", "control.0.kv", "control.1.kv"} <= set(run.memory.groups)
    assert all(group.length == system.plan.length for groups in run.memory.groups.values() for group in groups)
    scored = system.log_prob(run.tokens, labels(3).flatten().tolist(), control=given, guidance=GUIDED,
                             filters=system.filters(system.config.settings["pictures"]))
    torch.testing.assert_close(scored.token, torch.cat(run.log_probs, 1), rtol=1e-4, atol=1e-4)


def test_a_scale_does_not_know_the_control_of_later_ones() -> None:
    system = tiny()
    plain = logits(system, [system.attach(maps())])
    for k, span in enumerate(system.plan.spans(0, len(system.plan))):
        hook = system.attach(maps())
        encode: Callable = hook.encode
        hook.encode = lambda given, k=k, encode=encode: [one + (i == k) for i, one in enumerate(encode(given))]
        changed = logits(system, [hook])
        assert torch.equal(plain[:, :span.lo], changed[:, :span.lo])
        assert not torch.isclose(plain[:, span.lo:], changed[:, span.lo:]).all(-1).any()


def test_maps_are_resized_in_pixels_for_every_scale_as_pillow_does() -> None:
    given = maps(2)
    for level, (h, w) in zip(tiny().control.pyramid(given), GRIDS, strict=True):
        wanted = np.stack([np.asarray(Image.fromarray(one[0]).resize((4 * w, 4 * h), Image.Resampling.BICUBIC))
                           for one in given.numpy()])
        assert level.shape == (2, 3, 4 * h, 4 * w)
        assert torch.equal(level[:, 2], torch.from_numpy(wanted).float() / 127.5 - 1)


@pytest.mark.parametrize(("old", "new"), [((64, 64), (16, 16)), ((64, 64), (48, 48)), ((64, 64), (160, 160)),
                                          ((50, 70), (25, 33)), ((50, 70), (70, 91)), ((50, 70), (50, 31))])
def test_pillow_s_bicubic_to_the_last_bit(old: tuple[int, int], new: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*old, 3), dtype=np.uint8)
    pixels[::3] = pixels[::3] // 128 * 255
    wanted = np.asarray(Image.fromarray(pixels).resize(new[::-1], Image.Resampling.BICUBIC))
    found = pillow_bicubic(torch.from_numpy(pixels).permute(2, 0, 1)[None], new)[0]
    assert np.array_equal(found.permute(1, 2, 0).numpy(), wanted)


# A run with a control is a value

def test_a_run_gathered_in_mid_plan_takes_its_maps_and_the_tower_s_memory_along() -> None:
    system, given, order = tiny(), maps(3), [2, 0, 1]
    whole = draw(system, begin(system), system.attach(given))
    run = draw(system, begin(system), system.attach(given), until=2).gather(order)
    hook = system.attach(given)  # made for the pictures in their first order
    moved = draw(system, run, hook)
    assert all(torch.equal(a, b[order]) for a, b in zip(moved.tokens, whole.tokens, strict=True))
    handed = draw(system, begin(system), system.attach(given), until=2).gather(order)
    condition = ClassCondition(system.labels, labels(3)[order])
    prefilled = draw(system, handed.hand_over(condition), system.attach(given))
    assert all(torch.equal(a, b) for a, b in zip(prefilled.tokens, moved.tokens, strict=True))


def test_pictures_and_calls_do_not_hang_on_each_other() -> None:
    system, given = tiny(), maps(3)
    whole = system.generate([1, 2, 3], control=given, output="torch", progress=False)
    parts = system.generate([1, 2, 3], control=given, output="torch", progress=False, batch_size=2)
    assert all(torch.equal(a, b) for a, b in zip(whole.tokens, parts.tokens, strict=True))
    one = system.generate(1, 3, control=given[0], output="torch", progress=False)
    last = list(system.stream(1, 3, control=given[:1], output="torch"))[-1]
    assert torch.equal(one.images, last.images)


def test_editing_under_a_control_keeps_what_is_known() -> None:
    system, redraw = tiny(), torch.zeros(2, 16, 16, dtype=torch.bool)
    redraw[:, :, 8:] = True
    edited = system.edit(emoji(2), redraw, [1, 2], control=maps(), output="torch", progress=False)
    plain = system.edit(emoji(2), redraw, [1, 2], output="torch", progress=False)
    known = torch.tensor([True, True, False, False] * 4)
    truth = system.encode(emoji(2))[-1]
    assert torch.equal(edited.tokens[-1][:, known], truth[:, known])
    assert not torch.equal(edited.tokens[-1], plain.tokens[-1])


def test_guidance_by_the_control_asks_for_a_branch_without_it() -> None:
    system = tiny()
    assert system.guidance(ControlSettings(2.0)) == ClassifierFree(2.0)
    both = system.guidance(ControlSettings(2.0, control_scale=3.0))
    assert both == Nested(("conditional", "unconditional", "unconditional/uncontrolled"), (1.0, 2.0))
    drawn = system.generate([1, 2], control=maps(), output="torch", progress=False, control_scale=3.0)
    other = system.generate([1, 2], control=maps(), output="torch", progress=False)
    assert not torch.equal(drawn.images, other.images)
    for wrong, message in (({"control_scale": float("nan")}, "finite"), ({"guidance_schedule": "up"}, "unknown"),
                           ({"control_options": {"kind": "edges"}}, "'kind' is unknown: car has none")):
        with pytest.raises(InputError, match=message):
            system.generate([1, 2], control=maps(), progress=False, **{"control_scale": 3.0, **wrong})


@pytest.mark.parametrize(("given", "message"), [
    (maps(3), "3 maps were given for 2 pictures"), (maps()[..., :8], "16x16 pixels"),
    (maps().float(), "bytes"), ([np.zeros((16, 16), np.uint8)] * 2, "pictures or bytes"),
    (torch.zeros(2, 2, 16, 16, dtype=torch.uint8), "1 or 3 planes")])
def test_maps_that_do_not_fit_are_refused(given: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny().generate([1, 2], control=given, progress=False)


def test_towers_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="an even number"):
        ControlTower(TOWER, replace(NETWORK, depth=3), tiny().plan)
    with pytest.raises(InputError, match="one kind"):
        TowerConfig(("edges", "canny"))


# Published sizes and names

@pytest.mark.parametrize(("name", "millions"), [("car-d12", 92.66), ("car-d16", 196.21), ("car-d20", 363.87),
                                                ("car-d24", 611.38), ("car-d30", 1166.75)])
def test_published_sizes_have_the_published_parameters_and_names(name: str, millions: float) -> None:
    config = preset_config(name)
    c, half = config.generator.width, config.generator.depth // 2
    with torch.device("meta"):
        system = CAR(config)
    assert round(sum(p.numel() for p in system.control.parameters()) / 1e6, 2) == millions
    block = {"attn.scale_mul_1H11": (1, 2 * half, 1, 1), "attn.q_bias": (c,), "attn.v_bias": (c,),
             "attn.zero_k_bias": (c,), "attn.mat_qkv.weight": (3 * c, c), "attn.proj.weight": (c, c),
             "attn.proj.bias": (c,), "ffn.fc1.weight": (4 * c, c), "ffn.fc1.bias": (4 * c,),
             "ffn.fc2.weight": (c, 4 * c), "ffn.fc2.bias": (c,), "ada_lin.1.weight": (6 * c, c),
             "ada_lin.1.bias": (6 * c,)}
    shapes: dict[str, tuple[int, ...]] = {f"car_blocks.{j}.{key}": s for j in range(half) for key, s in block.items()}
    kernels = {"conv_in": (64, 3), "conv_out": (c, 1024), **{
        f"blocks.{i}": pair for i, pair in enumerate([(64, 64), (128, 64), (128, 128), (256, 128), (256, 256),
                                                      (512, 256), (512, 512), (1024, 512)])}}
    for key, (out, into) in kernels.items():
        shapes |= {f"car_control_convs.{key}.weight": (out, into, 3, 3), f"car_control_convs.{key}.bias": (out,)}
    shapes |= {"car_var_conv.weight": (c, c, 3, 3), "car_var_conv.bias": (c,)}
    for m in range(half):
        shapes |= {f"car_skip_norm.{m}.weight": (2 * c,), f"car_skip_norm.{m}.bias": (2 * c,),
                   f"car_skip_linear.{m}.weight": (c, 2 * c), f"car_skip_linear.{m}.bias": (c,)}
    published = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    folders.load_published(system, control=published)
    assert split_published({**published, "pos_1LC": torch.empty(1)})[1].keys() == published.keys()
    with pytest.raises(WeightsError, match=r"joins\.0\.linear"):
        folders.load_published(system, control={k: v for k, v in published.items() if "skip_linear.0" not in k})
    with pytest.raises(WeightsError, match="var has no such part"):
        folders.load_published(base_of(tiny()), control=published)


# Training

def test_a_picture_trained_without_its_control_is_the_base_s_beside_one_that_has_it() -> None:
    system = tiny()
    system.config = replace(system.config, control=replace(TOWER, drop=0.5))
    seen = set()
    for seed in range(3):
        torch.manual_seed(seed)
        hook = system.train().dropping(system.attach(maps()))
        found, plain, steered = (logits(system.eval(), hooks) for hooks in ([hook], [], [system.attach(maps())]))
        for i, shown in enumerate(hook.shown.tolist()):
            assert torch.equal(found[i], (steered if shown else plain)[i])
            seen.add(shown)
    assert seen == {True, False}
    assert system.dropping(system.attach(maps())).shown is None, "only in training"


def test_the_tower_alone_learns() -> None:
    torch.manual_seed(0)
    system = tiny()
    fill(system.control, 1)
    trained = {name.split(".")[0] for name, p in system.named_parameters() if p.requires_grad}
    assert trained == {"control", "tokenizer"}, "the tokenizer is stopped by the training's task"
    tokens, given = system.encode(emoji(8)), maps(8)
    before = {n: t.clone() for n, t in system.state_dict().items() if not n.startswith("control.")}
    optimiser, found = torch.optim.AdamW(system.control.parameters(), lr=2e-3), []
    for _ in range(12):
        loss, _, _ = system.loss(tokens, labels(8), 0.0, control=given)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(float(loss.detach()))
    assert found[-1] < 0.9 * found[0]
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in system.control.parameters())
    assert all(torch.equal(t, system.state_dict()[n]) for n, t in before.items())


def test_the_command_line_trains_a_tower_on_a_trained_var_and_draws_by_it(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from small_task import draw_pictures

    from nextscale.training.tokenizer_recipe import save_tokenizer

    monkeypatch.chdir(tmp_path)
    draw_pictures(tmp_path / "pictures")
    base = base_of(tiny())
    base.config = replace(base.config, classes=(3,))
    base.labels = type(base.labels)((3,), 48)
    folders.save(base, tmp_path / "base")
    sets = ["train.steps=2", "train.batch_size=4", "train.sample_every=0", "train.checkpoint_every=2", "data.size=16",
            "train.precision=fp32", "train.minutes=5", "start=base", "control.kinds=[\"edges\"]",
            "control.widths=[8, 16, 32]", "data.spec=pictures", "train.ema_decay=0.5"]
    command = ["train", "generator", "--recipe", "emoji-64-car"]
    command += [part for one in sets for part in ("--set", one)]
    assert main.run([*command, "--out", "car"]) == 0
    trained, began = nextscale.load("car/model"), nextscale.load("base")
    assert all(torch.equal(a, b) for a, b in zip(trained.generator.parameters(), began.generator.parameters(),
                                                 strict=True))
    assert (tmp_path / "car" / "model" / "control.safetensors").is_file()
    assert list((tmp_path / "car" / "samples").glob("control.png"))
    photo = next((tmp_path / "pictures" / "class0").iterdir())
    draw = ["generate", "--model", "car/model", "--label", "1", "--out", "a.png", "--control", str(photo)]
    assert main.run(draw) == 0 and main.run([*draw, "--control-kind", "edges"]) == 0
    edit = ["edit", "--model", "car/model", "--picture", str(photo), "--resize", "--box", "0,0,8,8", "--label", "1"]
    assert main.run([*edit, "--out", "b.png"]) == 0
    assert main.run([*edit, "--out", "c.png", "--control", str(photo), "--control-kind", "edges"]) == 0
    assert (tmp_path / "b.png").read_bytes() != (tmp_path / "c.png").read_bytes()
    capsys.readouterr()
    assert main.run([*draw, "--control-kind", "canny"]) == 2
    assert "this model takes edges" in capsys.readouterr().err
    assert main.run(["generate", "--model", "base", "--label", "1", "--out", "a.png", "--control", str(photo)]) == 2
    assert "no picture steers a var" in capsys.readouterr().err
    # The model's own tokenizer is the one that made the tokens, to the bit.
    again = ["start=car/model", "tokens=car/tokens"]
    assert main.run([*command, "--out", "again", *(part for one in again for part in ("--set", one))]) == 0
    small = ["--set", "data.size=16", "--set", "train.precision=fp32", "--set", "base_precision=fp32", "--set",
             "train.steps=2", "--set", "train.batch_size=4", "--set", "train.sample_every=0"]
    assert main.run(["train", "finetune", "--model", "car/model", "--data", "pictures", "--lora-rank", "2", "--out",
                     "tuned", *small]) == 0
    tuned, maps = nextscale.load("tuned/model"), torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    assert any(not torch.equal(a, b) for a, b in zip(tuned.generator.parameters(), trained.generator.parameters(),
                                                     strict=True))
    assert (tmp_path / "tuned" / "samples" / "control.png").is_file()
    assert tuned.generate([1], control=maps, progress=False).images
    own = ["train", "generator", "--system", "car", *command[4:]]
    assert main.run([*own, "--out", "own"]) == 0
    save_tokenizer(tiny(seed=3).tokenizer, tmp_path / "other")
    for wrong, message in ((["start="], "start is missing"), (["start=none"], "none"),
                           (["tokenizer=other"], "another tokenizer's codes")):
        capsys.readouterr()
        assert main.run([*own, "--out", wrong[0], "--set", *wrong]) == 2
        assert message in capsys.readouterr().err
    assert main.run([*command, "--out", "wrong", "--set", "control.kinds=[\"depth\"]"]) == 2
    assert "control 'depth' is unknown" in capsys.readouterr().err
