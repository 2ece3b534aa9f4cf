"""Batches of several aspect ratios: each of one bucket, with its schedule, trained on as a model of that shape alone
would be; the same after a resume and on any number of processes."""
from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_flexvar import tiny as tiny_flexvar
from test_infinity import GENERATOR, TOKENIZER
from test_infinity import tiny as tiny_infinity
from tiny import emoji, tiny_var
from torch._dynamo.testing import CompileCounterWithBackend

from nextscale.canvas import Canvas
from nextscale.cli import main
from nextscale.data import PictureDataset, open_dataset
from nextscale.data.images import to_pil
from nextscale.data.orders import BucketOrder, ShuffledOrder
from nextscale.data.token_buckets import BUCKETS
from nextscale.data.token_dataset import TokenDataset
from nextscale.data.token_loader import TokenLoader
from nextscale.data.token_shards import MANIFEST, shard_file
from nextscale.errors import DataError, InputError
from nextscale.generators.infinity import RATIOS
from nextscale.layers.resize import resize
from nextscale.objectives.teacher_forcing import teacher_forced
from nextscale.plan import Plan
from nextscale.systems.infinity import Infinity, preset_config
from nextscale.tokenizers import pyramid
from nextscale.training import TrainConfig, Trainer, read_metrics
from nextscale.training.generator import GeneratorTask
from nextscale.training.generator_recipe import GeneratorTraining, plans_of
from nextscale.training.prefix import Prefix
from nextscale.training.recipes import DataRecipe
from nextscale.training.task import TrainingStep
from nextscale.training.token_recipe import training_tokens
from nextscale.training.tokens import open_tokens, tokenize

# Height and width of the pictures, and the bucket that each kind belongs to.
SHAPES = {(16, 16): 12, (15, 30): 8, (21, 12): 5}
BUCKET_OF = {(16, 16): (16, 16), (15, 30): (12, 24), (21, 12): (20, 12)}
WIDE = ((1, 1), (2, 3), (2, 4), (3, 6))
NOW = TrainingStep(5, 10, 0.5, 0, 0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without timing the machine's matrix products, whose share is no matter here."""
    monkeypatch.setattr("nextscale.training.utilisation.products_seconds", lambda *given: 1.0)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures of three shapes, each with a caption."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    folder.mkdir()
    drawn = iter(emoji(sum(SHAPES.values()), 32))
    for shape, count in SHAPES.items():
        for number in range(count):
            to_pil(resize(next(drawn)[None], shape, "bilinear")[0]).save(folder / f"{shape[0]}-{number:02d}.png")
            (folder / f"{shape[0]}-{number:02d}.txt").write_text(f"drawing {shape[0]} {number}")
    return folder


@pytest.fixture(scope="module")
def system() -> Infinity:
    return tiny_infinity()


def opened(pictures: Path, system: Any, largest_ratio: float = 2.0) -> tuple[PictureDataset, dict[Any, Any]]:
    schedules = type(system).schedules(system.config.tokenizer, largest_ratio, 4)
    return open_dataset(pictures, 16, "all", buckets=schedules, memory_bytes=0), schedules


@pytest.fixture(scope="module")
def cache(pictures: Path, system: Infinity, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "train"
    dataset, schedules = opened(pictures, system)
    assert tokenize(system.tokenizer, dataset, folder, captions=True, latents=True, flips=True, shard_pictures=5,
                    schedules=schedules)
    return folder


def loader(cache: Path, batch_size: int = 4, seed: int = 3) -> TokenLoader:
    tokens = TokenDataset(cache)
    assert tokens.bucket_of is not None
    return TokenLoader(tokens, BucketOrder(tokens.bucket_of, seed), batch_size, seed, captions=True, latents=True)


def one_of_each(source: TokenLoader) -> dict[tuple[int, int], dict[str, Any]]:
    """The first batch of every last grid."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for step in range(40):
        batch = source.batch_at(step)
        found.setdefault(batch["schedule"][0][-1], batch)
    return found


# Shapes and their schedules


def test_pictures_are_trained_by_the_schedule_that_their_shape_is_drawn_by(system: Infinity) -> None:
    found = Infinity.schedules(system.config.tokenizer, 3.0, 32)
    assert list(found) == [(28, 8), (24, 12), (20, 12), (16, 16), (12, 20), (12, 24), (8, 28)]
    for ratio in RATIOS:
        drawn = tuple(system.schedule_of_ratio(ratio))
        assert found[drawn[-1][0] * 4, drawn[-1][1] * 4] == drawn
        assert system.plan_of(drawn).grids[0] == (1, 1)
    assert found[12, 24] == WIDE and list(Infinity.schedules(system.config.tokenizer, 1.7, 32)) == [
        (20, 12), (16, 16), (12, 20)]
    published = Infinity.schedules(preset_config("infinity-2b-0.06M").tokenizer, 3.0, 32)
    assert len(published) == 15 and published[256, 256] == RATIOS[1.0][:7]
    assert published[320, 256] == RATIOS[1.25][:7] and published[144, 432] == RATIOS[0.333][:7]
    assert len(Infinity.schedules(preset_config("infinity-2b").tokenizer, 1.333, 32)) == 5
    flexible = tiny_flexvar()
    assert flexible.schedules(flexible.config.tokenizer, 2.0, 4) == {
        (20, 12): ((1, 1), (2, 2), (4, 2), (5, 3)), (16, 16): flexible.plan.grids,
        (12, 20): ((1, 1), (2, 2), (2, 4), (3, 5))}


def test_systems_of_one_shape_refuse_others(pictures: Path, cache: Path, tmp_path: Path) -> None:
    var = tiny_var()
    with pytest.raises(InputError, match=r"VAR trains on pictures of one shape; leave data\.largest_ratio at 1"):
        training_tokens(GeneratorTraining(data=DataRecipe(str(pictures), 16, largest_ratio=2.0)), var.tokenizer,
                        tmp_path, captions=True, system=type(var))
    with pytest.raises(InputError, match="several shapes, which this var can't follow"):
        plans_of(var, TokenDataset(cache))
    with pytest.raises(InputError, match="several shapes, which this infinity can't follow"):
        plans_of(Infinity(replace(tiny_infinity().config, generator=replace(
            tiny_infinity().config.generator, levels=3))), TokenDataset(cache))
    with pytest.raises(InputError, match=r"multiples of 10 pixels don't fit .* factor 4"):
        tiny_flexvar().schedules(tiny_flexvar().config.tokenizer, 2.0, 10)


# Caches


def test_a_cache_has_every_picture_in_its_bucket(system: Infinity, pictures: Path, cache: Path) -> None:
    tokens, (dataset, schedules) = TokenDataset(cache), opened(pictures, system)
    assert tokens.bucket_of is not None and dataset.bucket_of is not None
    counted = {job.picture_size: int((tokens.bucket_of == i).sum()) for i, job in enumerate(tokens.jobs)}
    assert counted == {BUCKET_OF[shape]: count for shape, count in SHAPES.items()}
    assert sorted(tokens.rows.tolist()) == list(range(25)) and "12x24 8, " not in tokens.summary()
    assert "buckets (height x width) 20x12 5, 16x16 12, 12x24 8" in tokens.summary()
    where = {int(row): place for place, row in enumerate(tokens.rows)}
    for place in (0, 13, 24):
        size = dataset.size_of(place)
        pixels = torch.from_numpy(dataset.read([place])[0]).float() / 127.5 - 1
        latent = system.tokenizer.latent(pixels).half()
        assert latent.shape[-2:] == schedules[size][-1]
        at = where[place]
        # One picture by itself may be rounded otherwise than in a batch.
        torch.testing.assert_close(tokens.read_latents([at]), latent.flatten(2).transpose(1, 2).detach(),
                                   rtol=2e-3, atol=1e-3)
        canvas = Canvas.empty(Plan.scales(schedules[size]), system.tokenizer.quantiser, 1)
        wanted = pyramid.encode(latent.float(), canvas, lambda _, z: system.tokenizer.quantiser.quantise(z)).tokens
        assert torch.equal(tokens.read([at]), torch.cat(wanted, 1))
        assert tokens.captions(at) == dataset.captions(place)
    with pytest.raises(InputError, match="several buckets cannot lie in one batch"):
        tokens.read(range(25))


def test_a_cache_that_was_cut_short_goes_on_and_others_are_refused(
    system: Infinity, pictures: Path, cache: Path, tmp_path: Path
) -> None:
    copied, (dataset, schedules) = Path(shutil.copytree(cache, tmp_path / "all" / "train")), opened(pictures, system)
    settings: dict[str, Any] = {"captions": True, "latents": True, "flips": True, "shard_pictures": 5}
    (copied / "12x24" / MANIFEST).unlink()
    (copied / "12x24" / shard_file(1)).unlink()
    shutil.rmtree(copied / "16x16")
    with pytest.raises(DataError, match="holds no tokens"):
        TokenDataset(copied)
    for rank, complete in ((1, False), (0, True)):
        assert tokenize(system.tokenizer, dataset, copied, **settings, rank=rank, world=2,
                        schedules=schedules) is complete
    made = {path.relative_to(cache): path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    assert made == {path.relative_to(copied): path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    assert len(open_tokens(tmp_path / "all", system.tokenizer, "train", None)[0]) == 25
    with pytest.raises(InputError, match="another tokenizer"):
        open_tokens(tmp_path / "all", tiny_infinity(seed=1).tokenizer, "train", None)
    with pytest.raises(InputError, match="several aspect-ratio buckets"):
        tokenize(system.tokenizer, open_dataset(pictures, 16, "all"), copied)
    with pytest.raises(InputError, match=r"another job \(buckets 20x12, 16x16, 12x24, not 20x12, 16x16, 12x20\)"):
        tokenize(system.tokenizer, opened(pictures, system, 1.7)[0], copied,
                 schedules=opened(pictures, system, 1.7)[1])
    with pytest.raises(InputError, match="or in buckets that have a schedule each"):
        tokenize(system.tokenizer, dataset, tmp_path / "plain")
    (copied / BUCKETS).write_text('{"buckets": ["../16x16"]}')
    with pytest.raises(DataError, match=r"buckets\.json cannot be read"):
        TokenDataset(copied)


# Batches


def test_a_step_has_one_bucket_on_all_ranks_and_no_picture_is_lost(cache: Path) -> None:
    source, seen = loader(cache), Counter[int]()
    shards = [source.shard(rank, 2) for rank in range(2)]
    for step in range(100):
        batch, parts = source.batch_at(step), [shard.batch_at(step) for shard in shards]
        seen.update(batch["id"].tolist())
        assert len({*batch["schedule"]}) == 1
        for name, whole in batch.items():
            halves = [part[name] for part in parts]
            together = torch.cat(halves) if isinstance(whole, torch.Tensor) else halves[0] + halves[1]
            assert torch.equal(together, whole) if isinstance(whole, torch.Tensor) else together == whole
        assert batch["tokens"].shape == (4, Plan.scales(batch["schedule"][0]).length, 6)
    assert set(seen.values()) == {16}, "400 draws of 25 pictures"
    schedules = [source.batch_at(step)["schedule"][0][-1] for step in range(25)]
    assert Counter(schedules) == {(4, 4): 12, (3, 6): 8, (5, 3): 5} and schedules != sorted(schedules)
    tokens = TokenDataset(cache)
    with pytest.raises(InputError, match="draw them by a BucketOrder"):
        TokenLoader(tokens, ShuffledOrder(len(tokens)), 8).batch_at(0)


@pytest.mark.parametrize("weights", [None, "root", (1.0, 0.5, 2.0, 1.0)], ids=str)
def test_the_loss_is_that_of_a_model_of_the_shape_alone(system: Infinity, cache: Path, weights: Any) -> None:
    """Self-correction with cached latents, step weights, the first scales alone, and figures."""
    tokens = TokenDataset(cache)
    assert system.config.correction.strength
    for grid, batch in one_of_each(loader(cache)).items():
        alone = tiny_infinity(batch["schedule"][0])
        alone.load_state_dict(system.state_dict())
        plain = {name: part for name, part in batch.items() if name != "schedule"}
        for prefix in (None, Prefix(0.9, 1)):
            found = []
            for one, given in ((system, batch), (alone, plain)):
                task = GeneratorTask(one, step_weights=weights, prefix=prefix, plans=plans_of(system, tokens))
                one.generator.train()
                torch.manual_seed(0)
                found.append(task.loss("main", given, NOW))
                one.eval()
            (loss, metrics), (wanted, theirs) = found
            assert loss is not None and wanted is not None and loss.requires_grad
            assert float(loss.detach()) == float(wanted.detach()) and metrics.keys() == theirs.keys()
            assert all(float(metrics[name]) == float(theirs[name]) for name in metrics)
            assert ("scales" in metrics) == (prefix is not None)
        assert system.products(4, system.plan_of(batch["schedule"][0])) == alone.products(4)
        assert grid == alone.plan.grid


def test_the_loss_of_a_wide_batch_is_the_one_made_by_hand(cache: Path) -> None:
    system = tiny_infinity(strength=0.0)
    batch = one_of_each(loader(cache))[3, 6]
    task = GeneratorTask(system, label_dropout=0.0, step_weights="root")
    loss, _ = task.loss("main", batch, NOW)
    rows = [1, 6, 8, 18]
    bits = list(batch["tokens"].split(rows, 1))
    reads, total = [None], torch.zeros(4, 6, 3, 6)
    for (h, w), (next_h, next_w), scale in zip(WIDE[:-1], WIDE[1:], bits[:-1], strict=True):
        code = (scale.float() * 2 - 1).transpose(1, 2).unflatten(2, (h, w)) / 6**0.5
        total = total + torch.nn.functional.interpolate(code, (3, 6), mode="bilinear")
        small = torch.nn.functional.interpolate(total, (next_h, next_w), mode="bilinear")
        reads.append(small.flatten(2).transpose(1, 2))
    with torch.no_grad():
        rows_of_text = system.text(system.features(batch["caption"]))
        hidden = teacher_forced(system.generator, Plan.scales(WIDE), reads, rows_of_text)
        logits = system.head(hidden)
    picked = logits.log_softmax(-1).gather(-1, batch["tokens"].long()[..., None])[..., 0]
    entropy = -picked.mean(-1)
    weight = torch.cat([torch.full((n,), n**-0.5) for n in rows])
    torch.testing.assert_close(loss, (entropy * weight).mean(0).sum() / weight.sum(), atol=1e-5, rtol=1e-5)


def test_every_shape_is_compiled_however_many_there_are(cache: Path) -> None:
    torch._dynamo.reset()
    system, counter = tiny_infinity(depth=1), CompileCounterWithBackend("eager")
    batches = [*one_of_each(loader(cache)).values()]
    with torch._dynamo.config.patch(recompile_limit=1):
        task = GeneratorTask(system, compile="on", backend=counter,  # type: ignore[arg-type]
                             plans=[system.training_plan(batch) for batch in batches])
        for batch in batches * 2:
            task.loss("main", batch, NOW)
    assert counter.frame_count == len(batches) == 3


def test_flexvar_trains_on_buckets_too(pictures: Path, tmp_path: Path) -> None:
    system = tiny_flexvar()
    dataset, schedules = opened(pictures, system)
    assert tokenize(system.tokenizer, dataset, tmp_path / "train", schedules=schedules)
    tokens = TokenDataset(tmp_path / "train")
    assert tokens.bucket_of is not None and len(tokens.jobs) == 3
    source = TokenLoader(tokens, BucketOrder(tokens.bucket_of), 4)
    task = GeneratorTask(system, plans=plans_of(system, tokens))
    for grid, batch in one_of_each(source).items():
        alone = tiny_flexvar(batch["schedule"][0])
        alone.load_state_dict(system.state_dict())
        plan = system.training_plan(batch)
        assert plan.grid == grid
        losses = []
        for one, options in ((system, system.training_options(batch)), (alone, {})):
            one.generator.train()
            torch.manual_seed(1)
            parts = one.training_tokens(batch["tokens"], plan)
            losses.append(float(one.loss(parts, torch.zeros(4, 1, dtype=torch.long), **options)[0].detach()))
        assert losses[0] == losses[1]
        batch["labels"] = torch.zeros(4, 1, dtype=torch.long)
        assert np.isfinite(float(task.loss("main", batch, NOW)[0].detach()))  # type: ignore[union-attr]


# Trainings


def trained(cache: Path, out: Path, steps: int, resume: bool = False, accumulate: int = 1) -> list[dict[str, Any]]:
    config = TrainConfig(steps=4, batch_size=4, accumulate=accumulate, learning_rate=1e-3, warmup_steps=1, seed=3,
                         precision="fp32", schedule="constant", log_every=1, sample_every=0, checkpoint_every=2,
                         device="cpu")
    system = tiny_infinity()
    source = loader(cache)
    task = GeneratorTask(system, step_weights="root", plans=plans_of(system, source.dataset))
    Trainer(task, source, replace(config, steps=steps), out, resume).train()
    times = ("seconds", "pictures_per_second", "flop_utilisation", "progress")
    return [{name: value for name, value in record.items() if name not in times} for record in read_metrics(out)]


def test_a_resumed_training_has_the_batches_and_losses_of_one_that_never_stopped(cache: Path, tmp_path: Path) -> None:
    grids = [loader(cache).batch_at(step)["schedule"][0][-1] for step in range(4)]
    assert len(set(grids[:2])) == 2 and len(set(grids)) == 3
    whole = trained(cache, tmp_path / "whole", 4)
    trained(cache, tmp_path / "cut", 2)
    assert trained(cache, tmp_path / "cut", 4, resume=True) == whole and len(whole) >= 4
    with pytest.raises(InputError, match="step_weights: 3 are given for 4 scales"):
        GeneratorTask(tiny_infinity(((1, 1), (2, 2), (4, 4))), step_weights=(1.0, 1.0, 1.0),
                      plans=plans_of(tiny_infinity(), TokenDataset(cache)))


def test_commands_train_one_model_on_several_shapes(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pictures, "pictures")
    Path("tokenizer.toml").write_text(TOKENIZER.replace("steps = 2", "steps = 1"))
    Path("generator.toml").write_text(GENERATOR.replace('step_weights = "root"', 'compile = "off"'))
    assert main.run(["train", "tokenizer", "--recipe", "tokenizer.toml", "--out", "tokenizer"]) == 0
    tokens = ["tokenize", "--data", "pictures", "--tokenizer", "tokenizer/tokenizer", "--captions", "--latents"]
    shapes = ["--largest-ratio", "2"]
    assert main.run([*tokens, *shapes, "--system", "infinity", "--out", "tokens"]) == 0
    said = capsys.readouterr().out
    assert "buckets (height x width) 16x8 4, 16x16 11, 8x16 8" in said
    assert len(list(Path("tokens/train").glob(f"*/{MANIFEST}"))) == 3
    train = ["train", "generator", "--recipe", "generator.toml", "--set", "train.sample_every=0"]
    assert main.run([*train, "--tokens", "tokens", "--out", "from-tokens"]) == 0
    assert main.run([*train, "--set", "data.largest_ratio=2", "--out", "from-pictures"]) == 0
    runs = [[{name: value for name, value in record.items() if name.startswith(("main", "nats", "held_out"))}
             for record in read_metrics(Path(out))] for out in ("from-tokens", "from-pictures")]
    assert runs[0] == runs[1] and any("held_out/nats_per_token" in record for record in runs[0])
    capsys.readouterr()
    for arguments, message in (
        ([*tokens, *shapes, "--out", "x"], "name it with --system"),
        ([*tokens, *shapes, "--system", "var", "--out", "x"], "VAR trains on pictures of one shape"),
    ):
        assert main.run(arguments) == 2
        line = capsys.readouterr().err
        assert message in line and line.count("\n") == 1
    assert not Path("x").exists()
