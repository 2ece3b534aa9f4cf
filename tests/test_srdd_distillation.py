"""Scale distillation: what a student of fewer scales is, what it learns from, and that it comes near its teacher."""
from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_task import draw_pictures
from tiny import AUTOENCODER, GRIDS, emoji, fill, labels, tiny_var
from torch import Tensor, nn

import nextscale
from nextscale.canvas import Canvas
from nextscale.cli import main
from nextscale.errors import InputError
from nextscale.evaluation.cost import cost_of
from nextscale.generators.hmar import HMARGeneratorConfig
from nextscale.generators.srdd import SRDDGeneratorConfig
from nextscale.generators.var import VARGeneratorConfig
from nextscale.objectives.scale_distillation import lessons, merged, scale_distillation_loss
from nextscale.objectives.teacher_forcing import teacher_forced
from nextscale.systems import folders
from nextscale.systems.hmar import HMAR, HMARConfig, HMARSettings
from nextscale.systems.m_var import MVAR, MVARConfig
from nextscale.systems.srdd import SRDD, SRDDConfig, SRDDSettings
from nextscale.tokenizers import pyramid
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.tokenizers.shorter import on_steps
from nextscale.tokenizers.tokenizer import Tokenizer
from nextscale.training.scale_distillation import ScaleDistillationTask, kept_steps, shortened
from nextscale.training.task import TrainingStep

TOKENIZER = TokenizerConfig(AUTOENCODER, GRIDS, 32)
EVERY, NO_3, NO_2_3 = GRIDS, ((1, 1), (2, 2), (4, 4)), ((1, 1), (4, 4))


def teacher(tokenizer: TokenizerConfig = TOKENIZER, window: int = 0, classes: tuple[int, ...] = (5,),
            names: tuple[tuple[str, ...], ...] = (), **settings: Any) -> SRDD:
    used = {"guidance_scale": 2.0, "top_k": 20, **settings}
    system = SRDD(SRDDConfig(tokenizer, SRDDGeneratorConfig(2, 48, 3, window=window), classes, names,
                             {purpose: SRDDSettings(**used) for purpose in ("pictures", "fid")})).eval()
    fill(system)
    return system


def hmar() -> HMAR:
    rounds = ((1,), (1, 3), (4, 5), (16,))
    system = HMAR(HMARConfig(TOKENIZER, HMARGeneratorConfig(2, 48, 3, mask_blocks=1), (5,),
                             settings={"pictures": HMARSettings(2.0, top_k=20, rounds=rounds)})).eval()
    fill(system)
    return system


def states_of(system: Any, tokens: list[Tensor]) -> list[Canvas]:
    found = [Canvas.empty(system.plan, system.tokenizer.quantiser, len(tokens[0]))]
    for k, given in enumerate(tokens[:-1]):
        found.append(found[-1].write(k, given))
    return found


def distance(student: Any, system: Any, kept: tuple[int, ...], tokens: list[Tensor], seed: int = 0
             ) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    return scale_distillation_loss(student, system, kept, tokens, labels(len(tokens[0])), 0.0, 0.0,
                                   [1.0] * len(student.plan))


# The student

@pytest.mark.parametrize("make", [teacher, hmar])
def test_with_nothing_dropped_the_student_is_its_teacher_and_has_nothing_to_learn(make: Any) -> None:
    system = make()
    student, kept = shortened(system, EVERY)
    assert kept == (0, 1, 2, 3) and not any(merged(kept)) and student.config.tokenizer == system.config.tokenizer
    own, theirs = student.state_dict(), system.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)
    assert all(own[name].data_ptr() != theirs[name].data_ptr() for name in own if own[name].numel())
    tokens = student.encode(emoji(4))
    reads = pyramid.replay(tokens, Canvas.empty(student.plan, student.tokenizer.quantiser, 4)).reads
    with torch.no_grad():
        ours, logits = (each.head(teacher_forced(each.generator, each.plan, reads, each.labels(labels(4))))
                        for each in (student, system))
    # The same weights and sums, but MKL's products of small matrices hang on where they lie in memory.
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-5)
    wanted = lessons(system, student.tokenizer.quantiser, kept, states_of(student, tokens), system.labels(labels(4)))
    torch.testing.assert_close(torch.cat(wanted, 1), logits, rtol=0, atol=1e-5)
    loss, apart, right = distance(student, system, kept, tokens)
    loss.backward()
    assert float(apart.abs().max()) < 1e-6 and torch.equal(right, torch.ones(4))
    gradients = [p.grad.abs().max() for p in student.generator.parameters() if p.grad is not None]
    assert gradients and max(map(float, gradients)) < 1e-5


def test_positions_levels_settings_and_codes_stay_with_their_grids() -> None:
    system = teacher(guidance_schedule=(0.0, 0.2, 0.5, 1.0), temperatures=(1.0, 0.9, 0.8, 0.7))
    student, kept = shortened(system, NO_3)
    assert kept == (0, 1, 3) and merged(kept) == [False, False, True] and student.plan.grids == NO_3
    for j, k in enumerate(kept):
        ours = student.generator.positions(student.plan, j, j + 1)
        assert torch.equal(ours, system.generator.positions(system.plan, k, k + 1))
        codes = torch.randn(2, 8, *NO_3[j])
        assert torch.equal(student.tokenizer.quantiser.contribution(j, 3, codes, (4, 4)),
                           system.tokenizer.quantiser.contribution(k, 4, codes, (4, 4)))
        assert torch.equal(student.tokenizer.quantiser.usage_KV[j], system.tokenizer.quantiser.usage_KV[k])
    used = student.config.settings["fid"]
    assert (used.guidance_schedule, used.temperatures, used.top_k) == ((0.0, 0.2, 1.0), (1.0, 0.9, 0.7), 20)
    other, dropped = shortened(system, ((2, 2), (4, 4)))
    assert dropped == (1, 3) and merged(dropped) == [True, True]
    assert torch.equal(other.generator.start, system.generator.start.expand(1, 4, -1))
    assert other.generate(1, 2, seed=1, output="torch").images.shape == (2, 3, 16, 16)
    rounds = shortened(hmar(), NO_3)[0].config.settings["pictures"].rounds
    assert rounds == ()


@pytest.mark.parametrize("kind", ["vq", "vq-0", "vq-1", "bsq", "l2-vq"])
def test_a_tokenizer_on_its_own_scales_is_what_it_was_and_on_fewer_still_decodes_what_it_encodes(kind: str) -> None:
    name, _, phis = kind.partition("-") if kind.startswith("vq") else (kind, "", "")
    config = TokenizerConfig(AUTOENCODER, GRIDS, **({"vocabulary": 32, "phi_count": int(phis or 4)} if name != "bsq"
                                                    else {}), kind=name)  # type: ignore[arg-type]
    tokenizer = Tokenizer(config).eval()
    fill(tokenizer)
    same, shorter = on_steps(tokenizer, range(4)), on_steps(tokenizer, (0, 2, 3))
    assert same.config == config
    with torch.no_grad():
        whole, found, fewer = (each.encode(emoji(4)) for each in (tokenizer, same, shorter))
        assert all(torch.equal(one, other) for one, other in zip(whole.tokens, found.tokens, strict=True))
        assert [tokens.shape[1] for tokens in fewer.tokens] == [1, 9, 16]
        torch.testing.assert_close(shorter.decode_tokens(fewer.tokens), shorter.decode(fewer.canvas))


def test_a_shipped_tokenizer_loses_more_the_fewer_scales_it_has() -> None:
    tokenizer, pictures = nextscale.load("emoji-text-64", device="cpu").tokenizer, emoji(4, 64, held_out=True)
    steps = len(tokenizer.plan)

    def noise(kept: tuple[int, ...]) -> float:
        shorter = on_steps(tokenizer, kept)
        with torch.no_grad():
            return float((shorter.decode(shorter.encode(pictures).canvas) - pictures).square().mean())

    assert noise(tuple(range(steps))) < noise((0, 1, 3, steps - 1)) < noise((steps - 1,))


# What it learns

class Oracle(nn.Module):
    """A network that is certain of given tokens, whatever it reads."""

    def __init__(self, tokens: list[Tensor], vocabulary: int):
        super().__init__()
        self.word, self.tokens, self.vocabulary = nn.Linear(1, 1), tokens, vocabulary

    def embed(self, plan: Any, reads: Any, cond: Any, first: int, last: int) -> Tensor:
        return 1e4 * F.one_hot(torch.cat(self.tokens[first:last], 1), self.vocabulary).float()

    def forward(self, call: Any, ctx: Any) -> Tensor:
        x: Tensor = call.x
        return x


def knowing(system: SRDD, tokens: list[Tensor]) -> Any:
    return SimpleNamespace(plan=system.plan, tokenizer=system.tokenizer, generator=Oracle(tokens, 32),
                           head=nn.Identity())


def test_what_a_certain_teacher_gives_is_the_encoding_of_its_canvas() -> None:
    """Before the first merged scale both canvases are the same; there the true tokens, merged, are what the tokenizer
    makes of the teacher's picture on the student's grid."""
    system = teacher()
    student, kept = shortened(system, NO_3)
    real = system.encode(emoji(4))
    own = [*real[:2], torch.zeros(4, 16, dtype=torch.long)]
    codec = student.tokenizer.quantiser
    found = lessons(knowing(system, real), codec, kept, states_of(student, own), torch.zeros(4, 1))
    for j, k in ((0, 0), (1, 1)):  # not merged: logits
        assert torch.equal(found[j].argmax(-1), real[k])
    canvas = pyramid.replay(real, Canvas.empty(system.plan, system.tokenizer.quantiser, 4)).canvas
    again = pyramid.encode(canvas.value, Canvas.empty(student.plan, codec, 4),
                           lambda k, z: own[k] if k < 2 else codec.quantise(z))
    assert torch.equal(found[2], again.tokens[2])
    assert not torch.equal(found[2], real[3])


def test_where_the_dropped_scale_adds_nothing_a_merged_code_is_the_next_scale_s() -> None:
    system = teacher(TokenizerConfig(AUTOENCODER, GRIDS, 32, phi_count=1, phi_ratio=0.0))
    with torch.no_grad():
        system.tokenizer.quantiser.codebook.weight[0] = 0
    student, kept = shortened(system, NO_2_3)
    real = system.encode(emoji(4))
    real[1], real[2] = torch.zeros_like(real[1]), torch.zeros_like(real[2])
    found = lessons(knowing(system, real), student.tokenizer.quantiser, kept, states_of(student, [real[0], real[3]]),
                    torch.zeros(4, 1))
    assert torch.equal(found[1], real[3])


@pytest.mark.parametrize("kind", ["bsq", "l2-vq"])
def test_other_kinds_of_codes_are_taught_too(kind: str) -> None:
    """Drafts replace each other, so what a merged scale learns is the teacher's own draft; bits are coded anew."""
    vocabulary = {"vocabulary": 32} if kind == "l2-vq" else {}
    system = teacher(TokenizerConfig(AUTOENCODER, GRIDS, kind=kind, **vocabulary))  # type: ignore[arg-type]
    student, kept = shortened(system, NO_2_3)
    real, own = system.encode(emoji(4)), student.encode(emoji(4))
    if kind == "l2-vq":
        found = lessons(knowing(system, real), student.tokenizer.quantiser, kept, states_of(student, own),
                        torch.zeros(4, 1))
        assert torch.equal(found[1], real[3])
    _, apart, _ = distance(student, system, kept, own)
    assert float(apart[0]) < 1e-6 and 0.1 < float(apart[1]) < torch.inf


def test_the_teacher_s_chain_begins_at_the_student_s_canvas_and_each_of_its_scales_is_evaluated_once() -> None:
    system = teacher()
    student, kept = shortened(system, NO_2_3)
    tokens = student.encode(emoji(4))
    rows: list[int] = []
    system.generator.register_forward_pre_hook(lambda module, given: rows.append(len(given[0].rows)))

    def drawn(states: list[Canvas], seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return lessons(system, student.tokenizer.quantiser, kept, states, system.labels(labels(4)))

    states = states_of(student, tokens)
    first, again, other = drawn(states, 0), drawn(states, 0), drawn(states, 1)
    assert rows == [1 + 4, 9, 16] * 3
    assert torch.equal(first[1], again[1]) and not torch.equal(first[1], other[1])
    assert torch.equal(first[0], other[0]) and first[0].is_floating_point()
    elsewhere = drawn([states[0], Canvas(states[1].value + 1, states[1].plan, states[1].codec)], 0)
    assert not torch.equal(first[1], elsewhere[1])


def test_a_dropped_scale_is_one_evaluation_fewer() -> None:
    for system in (teacher(), hmar()):
        whole = cost_of(system, [0, 1], **({"rounds": ()} if isinstance(system, HMAR) else {}))
        for grids in (NO_3, NO_2_3):
            student, _ = shortened(system, grids)
            found = cost_of(student, [0, 1])
            assert whole.evaluations - found.evaluations == len(GRIDS) - len(grids)
            assert found.rows == 4 * sum(h * w for h, w in grids)  # two pictures, two branches


def test_training_lowers_the_distance_to_the_teacher() -> None:
    system = teacher()
    student, kept = shortened(system, NO_3)
    tokens = student.encode(emoji(16))
    task = ScaleDistillationTask(student, system, kept, "base", compile="off")
    batch = {"tokens": torch.cat(tokens, 1), "labels": labels(16)}
    before = distance(student, system, kept, tokens)
    weights = {name: p.clone() for name, p in system.named_parameters()}
    optimiser = torch.optim.AdamW(student.parameters(), 1e-2)
    for step in range(12):
        torch.manual_seed(step + 1)
        loss, figures = task.loss("main", batch, TrainingStep(step, 12, step / 12, 0, 0))
        assert loss is not None
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert figures.keys() == {"agreement", "divergence_0", "divergence_1", "teacher_nats_2", "agreement_0",
                              "agreement_1", "agreement_2"}
    after = distance(student, system, kept, tokens)
    assert after[0] < 0.9 * before[0] and after[1][2] < before[1][2] and after[2][2] > before[2][2]
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in system.named_parameters())


def test_of_hmar_the_next_scale_module_learns_and_the_mask_module_stays() -> None:
    system = hmar()
    student, kept = shortened(system, NO_3)
    task = ScaleDistillationTask(student, system, kept, "base", compile="off")
    tokens = torch.cat(student.encode(emoji(2)), 1)
    loss, _ = task.loss("main", {"tokens": tokens, "labels": labels(2)}, TrainingStep(0, 1, 0.0, 0, 0))
    assert loss is not None
    loss.backward()
    with_gradients = {name for name, p in student.named_parameters() if p.grad is not None}
    assert {"head.next.weight", "generator.position", "labels.tables.0.weight"} <= with_gradients
    assert not [name for name in with_gradients if "mask" in name or name.startswith("tokenizer.")]


# What can't be done

def test_what_can_t_be_distilled_is_told_in_one_line() -> None:
    for chosen in ((), ((1, 1), (2, 2)), ((1, 1), (5, 5), (4, 4)), ((2, 2), (1, 1), (4, 4)), ((4, 4), (4, 4))):
        with pytest.raises(InputError, match="give some of the teacher's, in their order, with the last: 1,2,3,4"):
            kept_steps(GRIDS, chosen)
    assert kept_steps(((1, 1), (4, 4), (4, 4)), ((1, 1), (4, 4))) == (0, 2)
    m_var = MVAR(MVARConfig(TOKENIZER, VARGeneratorConfig(2, 64, 2), (5,)))
    for system in (tiny_var(), teacher(window=1), m_var):
        with pytest.raises(InputError, match="hang on more than the canvas") as error:
            shortened(system, NO_3)
        assert "\n" not in str(error.value)


# The command

SETS = ["train.batch_size=8", "train.precision=fp32", "train.warmup_steps=1", "train.schedule=constant",
        "data.held_out=4", "train.ema_decay=0.0"]


def distil(*sets: str, steps: int, out: str, grids: str = "1,2,4", model: str = "model", data: str = "pictures",
           more: tuple[str, ...] = ()) -> int:
    chosen = [part for one in (*SETS, f"train.steps={steps}", *sets) for part in ("--set", one)]
    return main.run(["train", "distill", "--teacher", model, "--grids", grids, "--data", data, "--out", out, *chosen,
                     *more])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    draw_pictures(tmp_path / "pictures")
    # In another order than the folders', and one more.
    names = (("class2", "class0", "none", "class1"),)
    folders.save(teacher(classes=(4,), names=names), tmp_path / "model", torch.float32)
    return tmp_path


def figures(out: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def test_a_model_is_distilled_by_one_command_twice_and_draws(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ("train.sample_every=0", "train.log_every=1", "label_dropout=0.0")
    assert distil(*sets, steps=2, out="short") == 0
    found = [record for record in figures("short") if "held_out/imitation" in record][-1]
    assert {"held_out/agreement", "held_out/teacher_nats_2", "held_out/divergence_1", "held_out/nats_0"} <= found.keys()
    again = ("--tokens", "short/tokens")
    assert distil(*sets, steps=2, out="again", more=again) == 0  # tokens of the run before are the student's
    both = [[record["main/loss"] for record in figures(out) if "main/loss" in record] for out in ("short", "again")]
    assert both[0] == both[1] and len(both[0]) >= 2
    assert distil(*sets, steps=1, out="shorter", grids="1,4", model="short/model") == 0
    student = nextscale.load("shorter/model", device="cpu")
    assert isinstance(student, SRDD) and student.plan.grids == NO_2_3 and student.config.class_names[0][2] == "none"
    assert student.log_prob(emoji(2), ["class1", "none"]).picture.isfinite().all()
    assert main.run(["generate", "--model", "shorter/model", "--label", "class2", "--out", "a.png"]) == 0
    capsys.readouterr()
    for given, message in (({"grids": "1,2"}, "with the last"), ({"grids": ""}, "none are given"),
                           ({"grids": "1,x,4"}, "cannot read 'x'"), ({"model": ""}, "teacher is missing")):
        assert distil(steps=1, out="other", **given) == 2
        assert message in capsys.readouterr().err
    draw_pictures(place / "more", classes=4)
    assert distil(steps=1, out="other", data="more") == 2
    assert "doesn't know by name" in capsys.readouterr().err
    folders.save(teacher(window=1), place / "window", torch.float32)
    assert distil(steps=1, out="other", model="window") == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_distillation_that_was_stopped_goes_on_as_if_it_had_not(place: Path) -> None:
    sets = ("train.sample_every=0", "data.held_out=0", "train.checkpoint_every=2", "train.log_every=1")
    assert distil(*sets, steps=4, out="whole") == 0
    assert distil(*sets, steps=2, out="half") == 0
    assert distil(*sets, steps=4, out="half", more=("--resume",)) == 0
    losses = [{record["step"]: record["main/loss"] for record in figures(out) if "main/loss" in record}
              for out in ("whole", "half")]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    whole, half = (nextscale.load(f"{out}/model", device="cpu").state_dict() for out in ("whole", "half"))
    assert all(torch.equal(value, half[name]) for name, value in whole.items())
