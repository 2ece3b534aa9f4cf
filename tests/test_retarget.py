"""Retargeting: the transformer keeps every bit, the student comes near its teacher, and what is saved draws with its
new text encoder."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import AUTOENCODER, GRIDS, emoji, fill
from torch import Tensor

import nextscale
from nextscale.cli import main
from nextscale.conditions.text_features import TextFeatures
from nextscale.conditions.text_words import WordConfig, WordEncoder
from nextscale.data.images import to_pil
from nextscale.errors import InputError
from nextscale.generators.infinity import InfinityGeneratorConfig
from nextscale.generators.star import STARGeneratorConfig
from nextscale.objectives.self_correction import SelfCorrection
from nextscale.systems import folders
from nextscale.systems.infinity import Infinity, InfinityConfig, InfinitySettings, preset_config
from nextscale.systems.star import STAR, STARConfig
from nextscale.systems.text_conditional import TextConditionalSystem
from nextscale.tokenizers.autoencoder import AutoencoderConfig
from nextscale.tokenizers.config import TokenizerConfig
from nextscale.training.retargeting import RetargetTask, in_front, retargeted

WORDS = WordConfig(width=32, depth=1, heads=2, buckets=64, bucket_width=16, max_tokens=12)
CAPTIONS = [f"a {size} {colour} {thing}" for size in ("big", "small") for colour in ("red", "blue")
            for thing in ("apple", "sun")]


class Letters:
    """A frozen text encoder without weights: a token's features hang on its letters alone."""

    name, fingerprint, width, pooled_width = "letters", "letters-1", 40, 0
    pairs = False

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        rows = [torch.stack([self.vector(token) for token in self.tokens(prompt)]) for prompt in prompts]
        pooled = torch.stack([row[:, :self.pooled_width].sum(0) for row in rows]) if self.pooled_width else None
        return TextFeatures.pack(rows, pooled)

    def tokens(self, prompt: str) -> list[str]:
        return [*prompt.split(), "."]

    def vector(self, token: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256((self.name + token).encode()).digest()[:4], "big")
        return torch.randn(self.width, generator=torch.Generator().manual_seed(seed))


class Narrow(Letters):
    """Another one, of other tokens: pairs of letters."""

    name, fingerprint, width, pooled_width = "narrow", "narrow-1", 24, 12

    def tokens(self, prompt: str) -> list[str]:
        return [prompt[i:i + 2] for i in range(0, len(prompt), 2)] + ["."]


def teacher(kind: str = "infinity") -> TextConditionalSystem:
    system: TextConditionalSystem
    if kind == "infinity":
        sizes = AutoencoderConfig(32, (1, 1, 2), 1, 1, 6, 32, "none", latent_kernel=0)
        network = InfinityGeneratorConfig(2, 48, 3, text_width=40, longest_text=40, pool_heads=2, frame=4)
        system = Infinity(InfinityConfig(TokenizerConfig(sizes, GRIDS, kind="bsq", tokens="bits"), network,
                                         {"pictures": InfinitySettings(2.0), "fid": InfinitySettings(2.0)},
                                         SelfCorrection(0.2), encoder="test_retarget:Letters"))
    else:
        system = STAR(STARConfig(TokenizerConfig(AUTOENCODER, GRIDS, 32), STARGeneratorConfig(
            2, 48, 3, text_width=40, sampler_blocks=1, sampled_from=2), encoder="test_retarget:Letters"))
    fill(system)
    return system.eval()


def batch(system: TextConditionalSystem, count: int = 8) -> dict[str, object]:
    tokens = torch.cat(system.encode(emoji(count, 16)), 1)
    return {"tokens": tokens, "caption": CAPTIONS[:count]}


def learn(task: RetargetTask, data: dict[str, object], steps: int, rate: float = 1e-2) -> list[float]:
    groups = task.parameter_groups("main", 0.0)
    optimiser, found = torch.optim.AdamW(groups, lr=rate), []
    for step in range(steps):
        torch.manual_seed(step)
        loss, _ = task.loss("main", data, None)  # type: ignore[arg-type]
        assert loss is not None
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("kind, encoder", [("infinity", "test_retarget:Narrow"), ("infinity", "words"),
                                           ("star", "test_retarget:Narrow")])
def test_the_student_comes_near_its_teacher_and_the_transformer_keeps_every_bit(kind: str, encoder: str) -> None:
    system = teacher(kind)
    before = {name: value.clone() for name, value in system.state_dict().items()}
    torch.manual_seed(0)
    student = retargeted(system, encoder, WORDS)
    task = RetargetTask(student, system, "base", label_dropout=0.2, step_weights="equal")
    found = learn(task, batch(system), 30)
    assert sum(found[-5:]) / 5 < 0.4 * found[0]
    assert all(torch.equal(value, system.state_dict()[name]) for name, value in before.items())
    for name, value in student.state_dict().items():
        if not in_front(student, name):
            assert torch.equal(value, before[name]), name


def test_what_fits_is_kept_and_what_is_new_is_as_large() -> None:
    system = teacher()
    student = retargeted(system, "test_retarget:Narrow")
    own, theirs = student.text.state_dict(), system.text.state_dict()
    kept = {name for name in own if own[name].shape == theirs[name].shape}
    assert own.keys() - kept == {"null", "norm.weight", "pool.kv.weight", "expand.weight"}
    assert all(torch.equal(own[name], theirs[name]) and own[name] is not theirs[name] for name in kept)
    for name in ("pool.kv.weight", "expand.weight"):
        torch.testing.assert_close(own[name].norm(dim=1), theirs[name].norm(dim=1))
    assert student.config.generator.pooling_heads == system.config.generator.pooling_heads == 2
    assert student.generator.blocks[0].mlp.expand.weight is system.generator.blocks[0].mlp.expand.weight
    assert student.tokenizer is system.tokenizer
    assert {n for n, p in student.named_parameters() if p.requires_grad} == {f"text.{name}" for name in own}
    star = retargeted(teacher("star"), "test_retarget:Narrow")
    assert (star.config.generator.text_width, star.config.generator.vector_width) == (24, 12)
    assert {n.split(".")[-2] for n, p in star.named_parameters() if p.requires_grad} == {"pooled", "kv", "text"}


def test_a_model_with_words_of_its_own_learns_to_read_a_frozen_encoder() -> None:
    first = teacher()
    system = retargeted(first, "words", WORDS)
    fill(system, 1)
    student = retargeted(system, "test_retarget:Narrow")
    assert student.config.words is None and student.encoder is None and student.config.generator.text_width == 24
    found = learn(RetargetTask(student, system, "base", label_dropout=0.2), batch(system, 4), 8)
    assert found[-1] < 0.7 * found[0]
    assert not any(p.requires_grad for p in system.encoder.parameters())


def test_published_sizes_keep_their_heads_whatever_the_new_width() -> None:
    """Flan-T5-XL's 2048 numbers are pooled by 16 heads; 768 and 384 are no reason for 6 and 3, which don't divide C."""
    network = preset_config("infinity-8b").generator
    for width in (768, 384):
        assert network.for_text(width, 0, 512).pooling_heads == 16


def test_an_undistilled_student_of_the_same_encoder_is_its_teacher() -> None:
    for kind in ("infinity", "star"):
        system = teacher(kind)
        student = retargeted(system, "test_retarget:Letters")
        student.encoder = system.encoder = Letters()
        task = RetargetTask(student, system, "base", label_dropout=0.5)
        assert learn(task, batch(system, 4), 1)[0] == pytest.approx(0.0, abs=1e-5)


def test_pictures_lose_their_prompts_together() -> None:
    """Were they dropped apart, a student that equals its teacher would be far from it."""
    system = teacher()
    student = retargeted(system, "test_retarget:Letters")
    asked: list[Tensor | None] = []
    for one in (student, system):
        inner = one.conditioned
        one.conditioned = lambda rows, gone=None, inner=inner: asked.append(gone) or inner(rows, gone)  # type: ignore
    RetargetTask(student, system, "base", label_dropout=0.5).loss("main", batch(system), None)  # type: ignore[arg-type]
    assert len(asked) == 2 and asked[0] is asked[1] and asked[0] is not None and 0 < int(asked[0].sum()) < 8


# By the command

TRAIN = ["train.batch_size=8", "train.checkpoint_every=100", "train.precision=fp32", "base_precision=fp32",
         "train.learning_rate=1e-2", "train.warmup_steps=1", "data.held_out=4",
         "data.held_out_split=validation"]


def retarget(*sets: str, steps: int, out: str, encoder: str = "test_retarget:Narrow", more: Sequence[str] = ()) -> int:
    chosen = [part for one in (*TRAIN, f"train.steps={steps}", *sets) for part in ("--set", one)]
    return main.run(["train", "retarget", "--model", "model", "--encoder", encoder, "--data", "pictures", "--out", out,
                     *chosen, *more])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for i, picture in enumerate(emoji(16, 16)):
        folder = Path("pictures/train" if i % 4 else "pictures/validation")
        folder.mkdir(parents=True, exist_ok=True)
        to_pil(picture).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(CAPTIONS[i % len(CAPTIONS)])
    folders.save(teacher(), Path("model"), torch.float32)
    return tmp_path


def held_out(out: str) -> list[float]:
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    return [found["held_out/divergence"] for found in map(json.loads, lines) if "held_out/divergence" in found]


def test_a_model_is_retargeted_by_one_command_and_draws_with_its_new_encoder(
        place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert retarget("train.sample_every=1", "train.schedule=constant", steps=1, out="short") == 0
    assert retarget("train.sample_every=24", "train.ema_decay=0.9", steps=24, out="run") == 0
    assert held_out("run")[-1] < 0.5 * held_out("short")[-1]
    assert sorted(Path("run/text").glob("*.safetensors")) and sorted(Path("run/text-of-teacher").glob("*.safetensors"))
    found, first = nextscale.load("run/model", device="cpu"), nextscale.load("model", device="cpu")
    assert found.config.encoder == "test_retarget:Narrow" and found.config.generator.text_width == 24
    for name, value in found.generator.state_dict().items():
        assert torch.equal(value, first.generator.state_dict()[name].bfloat16().float()), name  # as it is written
    drawn = found.generate(CAPTIONS[:2], seed=3, output="torch")
    assert drawn.images.shape == (2, 3, 16, 16) and isinstance(found.encoder, Narrow)
    assert main.run(["generate", "a big red apple", "--model", "run/model", "--out", "one.png"]) == 0
    capsys.readouterr()
    for sets, encoder, message in (("label_dropout=0", "words", "label_dropout is 0"),
                                   ("data.flip=false", "tee5:x", "unknown text encoder"),
                                   ("base_precision=bf16", "words", "base_precision must be fp32 too")):
        assert retarget(sets, steps=1, out="other", encoder=encoder) == 2
        assert message in capsys.readouterr().err
    assert main.run(["train", "retarget", "--model", "var-d2-16px", "--data", "pictures", "--out", "other"]) == 2
    assert "takes no prompts" in capsys.readouterr().err


def test_a_retargeting_that_was_stopped_goes_on_as_if_it_had_not(place: Path) -> None:
    own = ["train.sample_every=0", "data.held_out=0", "train.schedule=constant", "train.checkpoint_every=2",
           "text.words.width=32", "text.words.heads=2", "text.words.buckets=64", "text.words.bucket_width=8",
           "text.words.depth=1", "text.words.max_tokens=12"]
    assert retarget(*own, steps=4, out="whole", encoder="words") == 0
    assert retarget(*own, steps=2, out="half", encoder="words") == 0
    assert retarget(*own, steps=4, out="half", encoder="words", more=["--resume"]) == 0
    whole, half = (nextscale.load(f"{out}/model", device="cpu") for out in ("whole", "half"))
    assert isinstance(whole.encoder, WordEncoder) and whole.config.words == replace(WORDS, bucket_width=8)
    assert all(torch.equal(value, half.state_dict()[name]) for name, value in whole.state_dict().items())
    assert whole.generate("a red apple", seed=1, output="torch").images.shape == (1, 3, 16, 16)


def test_the_transformer_is_held_in_bf16_and_the_front_trains_in_float32(place: Path) -> None:
    assert retarget("base_precision=bf16", "train.precision=bf16", "train.sample_every=2", steps=2, out="half") == 0
    assert len(held_out("half")) == 1
    found = nextscale.load("half/model", device="cpu")
    assert found.generate("a red apple", seed=1, output="torch").images.isfinite().all()


def test_a_wrong_encoder_width_is_told_in_one_line() -> None:
    student = retargeted(teacher(), "test_retarget:Narrow")
    student.encoder = Letters()
    with pytest.raises(InputError, match="40 wide, this model takes 24"):
        student.generate("a red apple")
