"""SCALAR: what a frozen encoder sees of a map is added at every block; kinds of maps aligned, mixed; edge agreement."""
from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import AUTOENCODER, CLASSES, GRIDS, emoji, fill, labels
from torch import Tensor, nn

import nextscale
from nextscale.canvas import Canvas
from nextscale.cli import controls, main
from nextscale.conditions.class_label import ClassCondition
from nextscale.configuration import build
from nextscale.control.encoders import Dinov2Features, open_encoder
from nextscale.control.scalar import EncodingConfig, EncodingHook, alignment_loss, pick
from nextscale.data.controls import make_controls
from nextscale.errors import InputError, MissingExtraError, WeightsError
from nextscale.evaluation.controls import edge_agreement
from nextscale.generators.var import VARGeneratorConfig
from nextscale.noise import Keyed
from nextscale.run import Run
from nextscale.sampling.guidance import ClassifierFree
from nextscale.sampling.score import hidden_states
from nextscale.sampling.steps import sample_steps
from nextscale.systems import folders
from nextscale.systems.controlled import ControlSettings
from nextscale.systems.scalar import SCALAR, SCALARConfig, preset_config
from nextscale.tokenizers import pyramid
from nextscale.tokenizers.config import TokenizerConfig

CHANNELS, GUIDED = 6, ClassifierFree(3.0)


def cells(grid: tuple[int, int]) -> nn.Module:
    """An encoder whose features at a cell are the pixels under it and nothing else."""
    class Cells(nn.Module):
        def forward(self, pictures: Tensor) -> Tensor:
            means = nn.functional.adaptive_avg_pool2d(pictures, grid)
            return torch.cat([means, means.square()], 1)

    return Cells()


def tiny(seed: int = 0, **control: Any) -> SCALAR:
    settings = {"kinds": ("edges",), "encoder": "test_scalar:cells", "feature_width": CHANNELS, **control}
    config = SCALARConfig(TokenizerConfig(AUTOENCODER, GRIDS, 32), VARGeneratorConfig(3, 48, 3), (CLASSES,),
                          control=EncodingConfig(**settings),
                          settings={"pictures": ControlSettings(2.0, top_k=20, top_p=0.95)})
    system = SCALAR(config).eval()
    fill(system, seed)
    return system


def maps(pictures: int = 2, seed: int = 0, planes: int = 1) -> Tensor:
    return torch.randint(0, 256, (pictures, planes, 16, 16), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))


def logits(system: SCALAR, hooks: list, branches: tuple[str, ...] = ("conditional",)) -> Tensor:
    """Teacher-forced on real pictures, (R, L, V)."""
    tokens = system.encode(emoji(2))
    reads = pyramid.replay(tokens, Canvas.empty(system.plan, system.tokenizer.quantiser, 2)).reads
    condition = ClassCondition(system.labels, labels(2))
    with torch.no_grad():
        found: Tensor = system.head(hidden_states(system, system.plan, reads, condition, branches, hooks))
    return found


def draw(system: SCALAR, run: Run, hooks: list, until: int | None = None) -> Run:
    with torch.no_grad():
        for _ in sample_steps(system, run, GUIDED, (), hooks, until=until, check=True):
            pass
    return run


def test_projections_at_zero_are_the_base_bit_for_bit() -> None:
    system = tiny()
    system.control.initialise()
    nn.init.zeros_(system.control.weight)
    nn.init.zeros_(system.control.bias)
    assert torch.equal(logits(system, [system.attach(maps())]), logits(system, []))
    ours, wanted = (system.generate([1, 2], output="torch", progress=False, **given)
                    for given in ({"control": maps()}, {}))
    assert all(torch.equal(a, b) for a, b in zip(ours.tokens, wanted.tokens, strict=True))
    fresh = SCALAR(system.config)
    fresh.initialise()
    assert not fresh.control.weight.any() and tiny().control.weight.any()


def test_one_call_equals_the_loop() -> None:
    system, given = tiny(), maps(3)
    run = draw(system, system.start(labels(3), GUIDED, Keyed.from_seeds([1, 2, 3])), [system.attach(given)])
    scored = system.log_prob(run.tokens, labels(3).flatten().tolist(), control=given, guidance=GUIDED)
    torch.testing.assert_close(scored.token, torch.cat(run.log_probs, 1), rtol=1e-4, atol=1e-4)


def test_a_scale_s_projections_act_from_that_scale_on() -> None:
    system = tiny()
    plain = logits(system, [system.attach(maps())])
    for k, span in enumerate(system.plan.spans(0, len(system.plan))):
        other = tiny()
        with torch.no_grad():
            other.control.weight[k] *= -1
        changed = logits(other, [other.attach(maps())])
        torch.testing.assert_close(plain[:, :span.lo], changed[:, :span.lo], rtol=0, atol=0)
        assert not torch.isclose(plain[:, span.lo:], changed[:, span.lo:]).all(-1).any()


def test_whitened_features_are_centred_and_uncorrelated_on_what_was_measured_and_survive_saving(tmp_path: Path) -> None:
    system, given = tiny(whiten=True), maps(64, planes=3)
    system.look_at(given[:, :1])
    found = system.control.look(given[:, :1]).permute(0, 2, 3, 1).flatten(0, 2).double()
    torch.testing.assert_close(found.mean(0), torch.zeros(CHANNELS).double(), atol=1e-4, rtol=0)
    # Three planes of one map are alike, so the six features are two, three times: rank 2.
    largest = torch.linalg.eigvalsh(found.T @ found / len(found)).flip(0)
    assert (0.9 < largest[:2]).all() and (largest[:2] < 1.001).all() and (largest[2:] < 1e-3).all()
    before = system.control.whitening.matrix.clone()
    system.look_at(given[:, 1:2])  # projections have learned of the first
    assert torch.equal(before, system.control.whitening.matrix)
    folders.save(system, tmp_path / "model")
    assert torch.equal(nextscale.load(str(tmp_path / "model")).control.whitening.matrix, before)
    assert torch.equal(system.to_precision("bf16").control.whitening.matrix, before)


def test_a_pixel_reaches_the_cells_that_cover_it_and_the_first_scale() -> None:
    system, given = tiny(), maps(1)
    other = given.clone()
    other[0, 0, 13, 2] ^= 255  # in cell (3, 0) of four, (2, 0) of three, (1, 0) of two
    ours, changed = (system.control.encode(system.control.mixed({"edges": one})) for one in (given, other))
    for k, wanted in enumerate(({0}, {2}, {6}, {12})):
        there = {int(i) for i in (ours[k] != changed[k]).any(-1)[0].nonzero()}
        assert there == wanted, f"scale {k}"


@pytest.mark.parametrize(("share", "shape"), [("none", (4, 3)), ("layers", (4, 1)), ("scales", (1, 3)),
                                              ("both", (1, 1))])
def test_projections_are_shared_as_named(share: str, shape: tuple[int, int]) -> None:
    system = tiny(share_over=share)
    assert system.control.weight.shape == (*shape, CHANNELS, 48)
    encoding, features = system.control, system.control.encode(system.control.mixed({"edges": maps()}))
    linear = nn.functional.linear
    for k in range(4):
        for layer in range(3):
            at = (k % shape[0], layer % shape[1])
            wanted = linear(features[k], encoding.weight[at].T, encoding.bias[at])
            torch.testing.assert_close(encoding.project(k, layer, features[k]), wanted, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits(system, [system.attach(maps())]), logits(system, []), atol=0.1)


@pytest.mark.parametrize(("inject", "layers"), [("all", (0, 1, 2, 3)), ("first-half", (0, 1)), ("every-2", (0, 2)),
                                                ("input", (0,))])
def test_blocks_that_get_the_control_are_chosen(inject: str, layers: tuple[int, ...]) -> None:
    assert EncodingConfig(inject=inject).layers(4) == layers
    system = tiny(inject=inject)
    assert system.control.weight.shape[1] == len(EncodingConfig(inject=inject).layers(3))
    assert not torch.allclose(logits(system, [system.attach(maps())]), logits(system, []), atol=1e-3)


@pytest.mark.parametrize("wrong", [{"inject": "last"}, {"inject": "every-0"}, {"kinds": ()},
                                   {"kinds": ("edges", "edges")}, {"feature_width": 0}, {"align_weight": -1.0}])
def test_configurations_that_cannot_be_are_refused(wrong: dict) -> None:
    with pytest.raises(InputError):
        EncodingConfig(**wrong)


def test_branches_without_control_are_the_base_s() -> None:
    system = tiny()
    both = logits(system, [system.attach(maps())], ("unconditional", "unconditional/uncontrolled"))
    torch.testing.assert_close(both[2:], logits(system, [], ("unconditional",)), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(both[:2], both[2:], atol=0.1)


def test_adding_a_control_and_taking_it_off_again_is_the_identity() -> None:
    system = tiny()
    hook, opposite = system.attach(maps()), copy.deepcopy(system.control)
    with torch.no_grad():
        for parameter in opposite.parameters():
            parameter.neg_()
    plain = logits(system, [])
    assert not torch.allclose(logits(system, [hook]), plain, atol=0.1)
    back = EncodingHook(opposite, system.generator.name, hook.maps)
    torch.testing.assert_close(logits(system, [hook, back]), plain, rtol=1e-4, atol=1e-4)


def test_editing_under_a_control_keeps_what_is_known() -> None:
    system, redraw = tiny(), torch.zeros(2, 16, 16, dtype=torch.bool)
    redraw[:, :, 8:] = True
    edited, plain = (system.edit(emoji(2), redraw, [1, 2], output="torch", progress=False, **given).tokens[-1]
                     for given in ({"control": maps()}, {}))
    known = torch.tensor([True, True, False, False] * 4)
    assert torch.equal(edited[:, known], system.encode(emoji(2))[-1][:, known])
    assert not torch.equal(edited, plain)


def test_a_run_gathered_in_mid_plan_takes_its_features_along() -> None:
    system, given, order = tiny(), maps(3), [2, 0, 1]
    start = system.start(labels(3), GUIDED, Keyed.from_seeds([1, 2, 3]))
    whole = draw(system, start, [system.attach(given)])
    half = draw(system, system.start(labels(3), GUIDED, Keyed.from_seeds([1, 2, 3])), [system.attach(given)], until=2)
    for run in (half.gather(order), half.gather(order).hand_over(ClassCondition(system.labels, labels(3)[order]))):
        moved = draw(system, run, [system.attach(given)])
        assert all(torch.equal(a, b[order]) for a, b in zip(moved.tokens, whole.tokens, strict=True))
    parts = system.generate([1, 2, 3], control=given, output="torch", progress=False, batch_size=2)
    both = system.generate([1, 2, 3], control=given, output="torch", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(parts.tokens, both.tokens, strict=True))


# SCALAR-Uni

UNI = {"kinds": ("edges", "small")}


def test_mixtures_are_convex_and_may_hang_on_the_place() -> None:
    encoding = tiny(**UNI).control
    two = {"edges": maps(2, 1), "small": maps(2, 2, 3)}
    a, b = (encoding.mixed({kind: one}) for kind, one in two.items())
    torch.testing.assert_close(encoding.mixed(two), (a + b) / 2)
    torch.testing.assert_close(encoding.mixed(two, {"edges": 3.0, "small": 1.0}), (3 * a + b) / 4)
    torch.testing.assert_close(encoding.mixed(two, {"edges": 1.0}), a)
    left = torch.zeros(1, 16, 16)
    left[..., :8] = 1
    placed = encoding.mixed(two, {"edges": left, "small": 1 - left})
    torch.testing.assert_close(placed[..., :2], a[..., :2])
    torch.testing.assert_close(placed[..., 2:], b[..., 2:])
    with pytest.raises(InputError, match="more than 0 everywhere"):
        encoding.mixed(two, {"edges": left})
    for wrong, message in (({"edges": 2.0, "smal": 1.0}, "one of 'smal', but maps are of edges, small"),
                           ({"edges": 2.0, "small": -1.0}, "negative, got -1"), ({"edges": float("nan")}, "finite"),
                           ({"edges": torch.ones(2)}, r"got \(2,\)")):
        with pytest.raises(InputError, match=message):
            encoding.mixed(two, wrong)
    with pytest.raises(InputError, match="takes controls of edges, small"):
        encoding.mixed({"mask": maps()})


def test_a_mixture_of_controls_draws_something_of_its_own() -> None:
    system, two = tiny(**UNI), {"edges": maps(2, 1), "small": maps(2, 2, 3)}
    draws = [system.generate([1, 2], output="torch", progress=False, **given).tokens[-1] for given in (
        {"control": two}, {"control": two["edges"]}, {"control": two["small"], "control_options": {"kind": "small"}},
        {"control": two, "control_options": {"weights": {"edges": 1.0}}})]
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(draws[1], draws[3])


@pytest.mark.parametrize("align", ["shared", "kind"])
def test_the_alignment_is_a_linear_layer_towards_the_picture_s_features(align: str) -> None:
    system = tiny(**UNI, align=align)
    encoding = system.control
    assert len(encoding.alignment) == (1 if align == "shared" else 2)
    features, kinds = encoding.look(maps(2)), torch.tensor([1, 0])
    found = encoding.aligned(features, kinds)
    for i, kind in enumerate(kinds.tolist()):
        layer = encoding.alignment[kind if align == "kind" else 0]
        torch.testing.assert_close(found[i, :, 2, 1], layer(features[i, :, 2, 1]))
    encoding.initialise()
    torch.testing.assert_close(encoding.aligned(features, kinds), features)
    assert float(alignment_loss(features, features)) == 0


def test_uni_s_loss_adds_the_distance_to_the_picture_s_features_of_one_kind_a_picture() -> None:
    system = tiny(**UNI)
    control = torch.cat([maps(4, 1), maps(4, 2, 3), maps(4, 3, 3)], 1)  # edges, small, picture
    tokens = system.encode(emoji(4))
    kinds = torch.tensor([0, 1, 0, 1])
    shown = pick(control[:, :-3], [1, 3], kinds)
    assert torch.equal(shown[0], control[0, :1].expand(3, -1, -1)) and torch.equal(shown[1], control[1, 1:4])
    with torch.no_grad():
        total = system.loss(tokens, labels(4), 0.0, control=control)[0]
        aligned = system.control.aligned(system.control.look(shown), kinds)
        distance = alignment_loss(aligned, system.control.look(control[:, -3:]))
        plain = tiny(**UNI, align_weight=0.0).loss(tokens, labels(4), 0.0, control=control)[0]
        assert float(total) == pytest.approx(float(plain + distance), rel=1e-5)
        system.control.train()
        drawn = {round(float(system.loss(tokens, labels(4), 0.0, control=control)[0]), 4) for _ in range(6)}
    assert len(drawn) > 1, "kinds are drawn anew in training"
    system.loss(tokens, labels(4), 0.0, control=control)[0].backward()
    trained = {name for name, p in system.named_parameters() if p.grad is not None}
    assert trained == {f"control.{name}" for name, _ in system.control.named_parameters()}


def test_the_backbone_trains_where_it_is_not_frozen() -> None:
    system = tiny(freeze_backbone=False)
    system.loss(system.encode(emoji(2)), labels(2), 0.0, control=maps())[0].backward()
    names = [name for name, p in system.named_parameters() if not name.startswith("tokenizer.")]
    assert all(dict(system.named_parameters())[name].grad is not None for name in names)


def test_half_of_the_backbone_may_stay_frozen() -> None:
    system = tiny(freeze_backbone="first-half")
    system.loss(system.encode(emoji(2)), labels(2), 0.0, control=maps())[0].backward()
    depth = system.config.generator.depth
    late = tuple(f"generator.blocks.{layer}." for layer in range(depth // 2, depth))
    for name, parameter in system.named_parameters():
        assert (parameter.grad is not None) == name.startswith(("control.", "head.", *late)), name
    with pytest.raises(InputError, match="first-half"):
        build(EncodingConfig, {"freeze_backbone": "second-half"}, "control")


@pytest.mark.parametrize("of", [{}, {"kinds": ("edges", "small")}], ids=["one kind", "uni"])
def test_pictures_trained_without_their_control_are_the_base_s(of: dict) -> None:
    system, tokens = tiny(drop=0.5, **of), [step.repeat(8, 1) for step in tiny().encode(emoji(1))]
    control = torch.cat([maps(8, seed, planes) for seed, planes in ((1, 1), (2, 3), (3, 3))][:3 if of else 1], 1)
    seen: list[Tensor] = []
    system.head.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))

    def hidden(training: bool, given: Tensor | None) -> Tensor:
        seen.clear()
        system.control.train(training)
        torch.manual_seed(3)
        system.loss(tokens, labels(1).repeat(8, 1), 0.0, control=given)
        return torch.cat([one.flatten(1) for one in seen], 1)

    plain, all_shown, dropped = hidden(False, None), hidden(False, control), hidden(True, control)
    without = (dropped == plain).all(1)
    assert 0 < without.sum() < 8 and not (all_shown == plain).all(1).any()
    assert hidden(True, control).equal(dropped), "drawn by the training's generator"
    with pytest.raises(InputError, match="drop is 1"):
        EncodingConfig(drop=1.0)


# Encoders

def test_dinov2_gives_normed_patch_features_of_four_depths(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    network = transformers.Dinov2Model(transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14)).eval()
    network.save_pretrained(tmp_path / "dino")
    encoder = open_encoder(f"dinov2:{tmp_path / 'dino'}", (4, 4))
    assert isinstance(encoder, Dinov2Features) and encoder.after == (1, 2, 3, 4)
    assert not any(p.requires_grad for p in encoder.parameters())
    with torch.no_grad():
        found = encoder(emoji(2))
        assert found.shape == (2, 64, 16, 16)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        x = nn.functional.interpolate(emoji(2), (224, 224), mode="bicubic", antialias=True).clamp(-1, 1)
        last = network(((x + 1) / 2 - mean) / std).last_hidden_state
    torch.testing.assert_close(found[:, 48:, 1, 2], last[:, 1 + 16 + 2], rtol=1e-4, atol=1e-4)
    other = open_encoder(f"dinov2:{tmp_path / 'dino'}", (4, 4), 56, (0.5, 1.0))
    with torch.no_grad():
        assert other(emoji(2)).shape == (2, 32, 4, 4), "two depths of pictures of 56 pixels"
    with pytest.raises(InputError, match=r"encoder_side is 60.*use 56"):
        open_encoder(f"dinov2:{tmp_path / 'dino'}", (4, 4), 60)
    with pytest.raises(WeightsError, match="can't be loaded as DINOv2"):
        open_encoder(f"dinov2:{tmp_path}", (4, 4))


def test_features_shrink_to_a_grid_as_asked() -> None:
    features = torch.randn(2, 8, 8, 8)
    found = {rule: tiny(encoder="emoji-features", feature_width=8, resize=rule).control.encode(features)[1]
             for rule in ("area", "bilinear")}
    means = features.unflatten(2, (2, 4)).unflatten(4, (2, 4)).mean((3, 5))
    torch.testing.assert_close(found["area"], means.flatten(2).transpose(1, 2))
    assert not torch.allclose(found["area"], found["bilinear"])


def test_encoders_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"gives 272 channels.*set it to 272"):
        tiny(encoder="emoji-features").attach(maps())
    with pytest.raises(InputError, match="encoder emoji-features has neither"):
        EncodingConfig(encoder="emoji-features", encoder_side=112)
    with pytest.raises(InputError, match="shares of the blocks"):
        EncodingConfig(encoder_after=(0.0,))
    with pytest.raises(InputError, match="unknown encoder"):
        open_encoder("no-such-encoder", (4, 4))
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MissingExtraError, match="transformers is needed"):
        open_encoder("dinov2:nowhere", (4, 4))


@pytest.mark.parametrize(("name", "millions"), [("scalar-d12", 141.56), ("scalar-d16", 251.66), ("scalar-d20", 393.22),
                                                ("scalar-d24", 566.23)])
def test_sizes_have_as_many_projections_as_scales_times_blocks(name: str, millions: float) -> None:
    with torch.device("meta"):
        system = SCALAR(preset_config(name))
    assert round(system.control.weight.numel() / 1e6, 2) == millions
    shared = replace(system.config, control=replace(system.config.control, share_over="both"))
    with torch.device("meta"):
        assert SCALAR(shared).control.weight.numel() * 10 * shared.generator.depth == system.control.weight.numel()


def test_the_command_line_trains_uni_on_a_trained_var(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from small_task import draw_pictures
    from tiny import tiny_var

    monkeypatch.chdir(tmp_path)
    draw_pictures(tmp_path / "pictures")
    folders.save(tiny_var(classes=(3,)), tmp_path / "base")
    sets = ["train.steps=2", "train.batch_size=4", "train.sample_every=0", "train.checkpoint_every=2", "data.size=16",
            "train.precision=fp32", "train.minutes=5", "start=base", "control.kinds=[\"canny\", \"lines\"]",
            "data.spec=pictures"]
    command = ["train", "generator", "--recipe", "emoji-64-scalar"]
    command += [part for one in sets for part in ("--set", one)]
    assert main.run([*command, "--out", "uni"]) == 0
    system = nextscale.load("uni/model")
    assert system.control.weight.abs().max() > 0 and system.config.control.kinds == ("canny", "lines")
    assert main.run([*command, "--out", "all", "--set", "control.freeze_backbone=false"]) == 0
    moved, base = nextscale.load("all/model"), nextscale.load("base")
    assert not torch.equal(moved.head.weight, base.head.weight) and torch.equal(system.head.weight, base.head.weight)
    assert main.run([*command, "--out", "half", "--set", "control.freeze_backbone=first-half"]) == 0
    half = nextscale.load("half/model").state_dict()
    changed = {name for name, one in base.state_dict().items() if not torch.equal(one, half[name])}
    assert {name.split(".")[0] for name in changed} == {"generator", "head"} and "generator.word.weight" not in changed
    photo = next((tmp_path / "pictures" / "class0").iterdir())
    assert main.run(["generate", "--model", "uni/model", "--label", "1", "--out", "a.png", "--control", str(photo),
                     "--control-kind", "lines"]) == 0
    small = [part for one in (*sets[:3], "data.size=16", "train.precision=fp32", "base_precision=fp32")
             for part in ("--set", one)]
    assert main.run(["train", "finetune", "--model", "uni/model", "--data", "pictures", "--lora-rank", "2", "--out",
                     "tuned", *small]) == 0
    assert (tmp_path / "tuned" / "samples" / "control.png").is_file()
    assert torch.equal(nextscale.load("tuned/model").control.whitening.matrix, system.control.whitening.matrix)


def test_the_command_line_mixes_kinds_and_sends_each_through_its_own_alignment(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    folders.save(tiny(kinds=("edges", "lines"), align="kind"), tmp_path / "uni")
    system = nextscale.load("uni")
    a, b = maps(1, 1, 3), torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    for name, one in (("a.png", a), ("b=.png", b)):
        Image.fromarray(one[0].permute(1, 2, 0).numpy()).save(name)

    def steered(*given: str, made: tuple[str, ...] = ()) -> Tensor:
        asked = controls.maps(controls.read(list(given), list(made), "uni", None), system)
        return system.attach(asked["control"], **asked.get("control_options", {})).maps

    mixed = system.control.mixed
    assert torch.equal(steered("lines=a.png"), mixed({"lines": a}))
    lines = torch.from_numpy(make_controls(a.numpy(), ["lines"]))
    assert torch.equal(steered("a.png", made=("lines",)), mixed({"lines": lines}))
    assert not torch.allclose(mixed({"lines": lines}), mixed({"edges": lines}), atol=1e-3)
    assert torch.equal(steered("edges=b=.png", "lines=a.png:3", made=("lines",)),
                       mixed({"edges": b, "lines": lines}, {"edges": 1.0, "lines": 3.0}))
    draws = {}
    for out, more in (("one", ["--control", "edges=a.png"]), ("two", ["--control", "edges=a.png:3", "--control",
                                                                      "lines=b=.png"])):
        assert main.run(["generate", "--model", "uni", "--label", "1", "--out", f"{out}.npz", *more]) == 0
        assert main.run(["edit", "--model", "uni", "--label", "1", "--out", f"{out}-edit.png", "--picture", "a.png",
                         "--box", "0,0,8,8", *more]) == 0
        draws[out] = [np.load(f"{out}.npz")["arr_0"][0], np.asarray(Image.open(f"{out}-edit.png"))]
    assert not any(np.array_equal(x, y) for x, y in zip(*draws.values(), strict=True))
    drawn = system.generate([1], control={"edges": a, "lines": b}, progress=False,
                            control_options={"weights": {"edges": 3.0, "lines": 1.0}})
    assert np.array_equal(draws["two"][0], np.asarray(drawn.images[0]))
    capsys.readouterr()
    for wrong, message in ((["a.png"], "takes edges, lines; say which, as in edges=a.png"),
                           (["canny=a.png"], "'canny': this model takes edges, lines"),
                           (["edges=a.png:much", "lines=a.png"], "weight 'much' is no number"),
                           (["edges=a.png:-1", "lines=a.png"], "not negative, got -1"),
                           (["edges=a.png:1"], "for a mix"), (["edges=a.png", "a.png"], "must say its kind"),
                           (["edges=a.png", "edges=b=.png"], "edges is given twice"),
                           (["edges=no.png:1", "lines=a.png"], "no.png")):
        command = ["generate", "--model", "uni", "--label", "1", "--out", "c.png"]
        assert main.run([*command, *(part for one in wrong for part in ("--control", one))]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    assert main.run([*command, "--control", "edges=a.png", "--control-kind", "lines"]) == 2
    assert "no --control lines=FILE" in capsys.readouterr().err


def test_edge_agreement_counts_hits_with_and_without_slack() -> None:
    asked = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    asked[..., 4, 1:7] = 255
    assert edge_agreement(asked, asked) == (1, 1, pytest.approx(1))
    moved = asked.roll(1, 2)
    assert edge_agreement(moved, asked).f1 == 0 and edge_agreement(moved, asked, slack=1).f1 == pytest.approx(1)
    half = asked.clone()
    half[..., 4:] = 0
    found = edge_agreement(half, asked)
    assert (found.precision, found.recall) == (1, 0.5) and found.f1 == pytest.approx(2 / 3)
    empty = torch.zeros_like(asked)
    assert edge_agreement(empty, empty).f1 == pytest.approx(1) and edge_agreement(empty, asked).f1 == 0
    with pytest.raises(InputError, match="both alike"):
        edge_agreement(asked[0], asked)
