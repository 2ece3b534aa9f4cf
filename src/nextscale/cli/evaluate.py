"""``nextscale evaluate``: how good a model or a tokenizer is, measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nextscale.cli import options
from nextscale.errors import InputError, WeightsError
from nextscale.registry import DEFAULT_MODEL

if TYPE_CHECKING:
    from nextscale.data import PictureDataset
    from nextscale.evaluation.evaluate import Evaluation
    from nextscale.evaluation.features import Extractor
    from nextscale.evaluation.sets import Subject
    from nextscale.evaluation.text_judge import PictureTextJudge


POLL_SECONDS = 2.0


class LabelSource(str, Enum):
    """Which labels samples are drawn with."""

    data = "data"
    even = "even"
    none = "none"


def evaluate(
    model: options.Model = DEFAULT_MODEL,
    out: Annotated[Path, typer.Option("--out", help="Folder for figures.json, report.html and what to go on from.")] = (
        Path("out/evaluation")
    ),
    data: Annotated[
        str | None,
        typer.Option("--data", help="Held-out pictures to measure against: a folder, a parquet file, or emoji."),
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Which of them.", show_default="concept-test, or validation")
    ] = None,
    train: Annotated[
        str | None, typer.Option("--train", help="What the model was trained on.", show_default="--data")
    ] = None,
    train_split: Annotated[str, typer.Option("--train-split", help="Which of them.")] = "train",
    statistics: Annotated[
        list[Path] | None,
        typer.Option("--statistics", help="Saved statistics instead of --data, or ADM's .npz. May be repeated."),
    ] = None,
    features: Annotated[
        list[str] | None,
        typer.Option(
            "--features",
            help="emoji-judge, a classifier's folder, resnet20:FILE, dinov2[:PLACE], clip[:PLACE], inception, or "
            "package.module:name. May be repeated.",
            show_default="emoji-judge",
        ),
    ] = None,
    count: Annotated[int, typer.Option("--count", min=0, help="Pictures to draw; 0 for none.")] = 1000,
    labels: Annotated[
        LabelSource | None,
        typer.Option("--labels", help="As often as in the data, all evenly, or none.", show_default="data, else even"),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="What a model that text steers draws: .txt, .json, .jsonl, .tsv or .csv.",
                     show_default="captions of --data"),
    ] = None,
    caption_field: options.CaptionField = None,
    text_judge: Annotated[
        str | None,
        typer.Option(
            "--text-judge",
            help="Says whether pictures show their prompts: emoji-text-judge, a judge's folder, or clip[:PLACE].",
            show_default="emoji-text-judge, where it is there",
        ),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option("--control", help="Steer a car or scalar model by maps of this kind of the held-out pictures, "
                     "each with its own label.", show_default="no map"),
    ] = None,
    likelihood: Annotated[int, typer.Option("--likelihood", min=0, help="Pictures to score; 0 for none.")] = 400,
    reconstruction: Annotated[
        int, typer.Option("--reconstruction", min=0, help="Pictures to send through the tokenizer; 0 for none.")
    ] = 1000,
    training: Annotated[
        int, typer.Option("--training", min=0, help="Most training pictures to look at; 0 for none.")
    ] = 50_000,
    seed: options.Seed = 0,
    guidance_scale: options.GuidanceScale = None,
    guidance_schedule: options.Schedule = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    smooth: options.Smooth = None,
    set_: options.OwnSettings = None,
    hook: options.Hooks = None,
    purpose: options.PurposeOption = options.Purpose.fid,
    shard: Annotated[
        str | None,
        typer.Option("--shard", help="Work on part i of n only, as 0/4; measure nothing.", show_default="torchrun's"),
    ] = None,
    npz: Annotated[
        Path | None, typer.Option("--npz", help="Also write the samples as ADM's evaluator reads them.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pictures at once.")] = 16,
    precision: options.PrecisionOption = options.Precision.fp32,
    device: options.Device = "auto",
    threads: options.Threads = None,
    compile_: options.Compile = False,
    graphs: options.Graphs = False,
    weights: options.Weights = None,
    tokenizer_weights: options.TokenizerWeights = None,
) -> None:
    """Measure a model or a tokenizer: likelihood, distances, coverage, copies, reconstruction.

    A model that text steers draws --prompts, or the captions of --data; a judge tells whether its pictures show them.
    Goes on where it was stopped; --count may grow. Under torchrun the work is shared by all ranks.

    \b
    Examples:
      nextscale evaluate --model emoji-text-64 --data emoji --count 500 --out out/evaluation
      nextscale evaluate --model runs/tokenizer/tokenizer --data photos/ --out out/tokenizer
      nextscale evaluate --model emoji-text-64 --data emoji --split style-test --out out/text
      torchrun --nproc-per-node 4 -m nextscale.cli.main evaluate --model runs/g/model --data photos/ --count 10000
    """
    from nextscale.data.pictures_out import check_writable
    from nextscale.data.prompts import read_prompts
    from nextscale.evaluation.blocks import Shard
    from nextscale.evaluation.distances import check_metrics
    from nextscale.evaluation.evaluate import Evaluation, Wanted
    from nextscale.evaluation.features import open_extractor
    from nextscale.evaluation.prompted import Prompts

    check_writable(out, folder=True)
    check_metrics()
    hooks = options.make_hooks(hook)
    part = Shard.of_environment() if shard is None else Shard.read(shard)
    extractors = _distinct([open_extractor(spec) for spec in features or ["emoji-judge"]])
    files = _statistics(statistics or [])
    of_file = None if prompts is None else read_prompts(prompts)
    subject = open_subject(model, precision, device, weights, tokenizer_weights)
    if subject.system is None:
        for option, given in {"--hook": hooks, "--compile": compile_, "--graphs": graphs}.items():
            if given:
                raise InputError(f"{option}: {model} is a tokenizer, it draws nothing; leave it out")
    if compile_:
        subject.system.compile_networks()
    if graphs:
        from nextscale.sampling.graphs import CapturedSteps

        options.check_graphs(subject.system)
        hooks.append(CapturedSteps())
    if not subject.takes_prompts and (prompts is not None or text_judge is not None):
        given = "--text-judge" if prompts is None else "--prompts"
        raise InputError(f"{given}: {model} draws no prompts; leave it out")
    reference, known = open_pictures(
        data, split, train, train_split if training else None, subject.size, caption_field
    )
    sampling = options.sampling_changes(guidance_scale, guidance_schedule, temperature, top_k, top_p, smooth)
    if subject.system is not None:
        sampling |= options.own_settings(set_, subject.system, purpose.value)
    source = labels.value if labels is not None else "even" if reference is None or prompts is not None else "data"
    asked = judge = None
    if subject.takes_prompts and count:
        if of_file is not None:
            asked = Prompts.of_file(of_file, str(prompts))
        elif reference is not None:
            asked = Prompts.of_dataset(reference)
        judge = open_judge(text_judge, part.index == 0)
    wanted = Wanted(count, seed, source, likelihood, reconstruction, training, purpose.value, sampling, batch_size,
                    control)
    place = subject.system.device if subject.system is not None else None
    if subject.kinds and control is None and part.index == 0:
        typer.echo(f"{model} is measured without a map, which is not what it was trained for; --control "
                   f"{subject.kinds[0]} steers it by the held-out pictures' own", err=True)
    evaluation = Evaluation(
        subject, out, [e if place is None else e.to(place) for e in extractors], wanted, reference, known, files, hooks,
        asked, judge if place is None else to_device(judge, place),
    )
    with progress_lines(part.index == 0) as progress:
        evaluation.work(part, progress)
    if shard is not None:
        left = evaluation.missing()
        typer.echo(f"shard {shard} is done; {left} blocks are missing. The same command without --shard measures.")
        return
    if part.index == 0:
        _wait_for_others(evaluation)
        _show(evaluation, npz)


def _show(evaluation: Evaluation, npz: Path | None) -> None:
    found = evaluation.report()
    if npz is not None:
        write_samples(evaluation, npz)
    for line in headlines(found):
        typer.echo(line)
    typer.echo(f"{evaluation.out / 'figures.json'}, {evaluation.out / 'report.html'}: done")


def headlines(found: dict[str, Any]) -> Iterator[str]:
    """The figures that matter most, a line each; everything is in ``figures.json``."""
    for name, of in found["features"].items():
        for role in ("samples", "real_training_pictures", "reconstruction"):
            distance = of.get(role, {}).get("frechet_distance")
            if distance:
                yield (
                    f"{role.replace('_', ' ')}: {distance['name']} {distance['value']:.4g}, "
                    f"{distance['at_infinity']:.4g} without few-sample bias"
                )
        if "agreement" in of.get("samples", {}):
            real = of.get("reference_agreement", {}).get("class")
            beside = "" if real is None else f" (real pictures {real:.3f})"
            yield f"agreement with the asked class by {name}: {of['samples']['agreement']['class']:.3f}{beside}"
    if "phrases" in found.get("text", {}).get("samples", {}):
        of, real = found["text"]["samples"]["phrases"], found["text"].get("reference", {}).get("phrases")
        k = next((k for k in (5, 1) if f"top_{k}" in of), 0)
        beside = "" if real is None or f"top_{k}" not in real else f" (real pictures {real[f'top_{k}']['rate']:.1%})"
        if k:
            low, high = of[f"top_{k}"]["low"], of[f"top_{k}"]["high"]
            yield (f"asked prompt among the best {k} of {of['candidates']} by {found['text']['judge']}: "
                   f"{of[f'top_{k}']['rate']:.1%}, {low:.1%} to {high:.1%}{beside}")
    for name, of in found.get("likelihood", {}).items():
        bits = of["bits_a_dimension"]
        yield f"likelihood, {name}: {of['nats_a_token']:.4f} nats a token, {bits:.4f} bits a dimension"
    if "tokenizer" in found:
        of = found["tokenizer"]
        line = f"tokenizer: PSNR {of['psnr']['mean']:.2f} dB, SSIM {of['ssim']['mean']:.4f}"
        if "usage" in of:
            line += f", {of['usage'][-1]['share']:.1%} of the codebook, {of['bits_a_picture']:.0f} bits a picture"
        yield line
    for way, of in found.get("diversity", {}).items():
        real = of.get("reference") or of.get("training")
        beside = "" if real is None else f" (real pictures {real['mean']:.4g})"
        yield f"distance of samples of one label by {way}: {of['samples']['mean']:.4g}{beside}"
    if "copies" in found:
        known = {way: of["median_ratio"] for way, of in found["copies"].items() if "median_ratio" in of}
        ratios = ", ".join(f"{way} {ratio:.3f}" for way, ratio in known.items())
        yield f"nearest training picture, samples over held-out pictures: {ratios}"


def open_subject(
    model: str, precision: options.Precision, device: str, weights: str | None, tokenizer_weights: str | None
) -> Subject:
    """What is evaluated: a system by name or folder, or a tokenizer's folder.

    Raises:
        NextscaleError: unknown, damaged, not fitting.
    """
    from nextscale.evaluation.features import fingerprint
    from nextscale.evaluation.sets import Subject
    from nextscale.training.tokens import own_device

    name = Path(model).name if Path(model).is_dir() else model
    if is_tokenizer(Path(model)):
        from nextscale.devices import choose_device
        from nextscale.training.tokenizer_recipe import load_tokenizer

        tokenizer = load_tokenizer(Path(model)).to(choose_device(own_device(device)))
        return Subject(
            name, fingerprint(tokenizer), TokenizerCodec(tokenizer), tokenizer.picture_size,
            tokenizer.config.vocabulary, tokenizer.config.bits,
        )
    system = options.open_model(model, precision, own_device(device), weights, tokenizer_weights)
    config = system.config
    return Subject(
        name, fingerprint(system), system, system.tokenizer.picture_size, config.tokenizer.vocabulary,
        config.tokenizer.bits, system, tuple(getattr(config, "classes", ())), getattr(config, "class_names", ()),
    )


def open_judge(spec: str | None, tell: bool) -> PictureTextJudge | None:
    """The judge of pictures and prompts that was asked for; else the one that ships, None where it isn't there, as one
    line then tells.

    Raises:
        NextscaleError: the one that was asked for is unknown, missing or damaged.
    """
    from nextscale.evaluation.text_judge import open_text_judge

    if spec is not None:
        return open_text_judge(spec)
    try:
        return open_text_judge("emoji-text-judge")
    except WeightsError as error:
        if tell:
            typer.echo(f"agreement of pictures and prompts is left out: {error} by --text-judge", err=True)
        return None


def to_device(judge: Any, place: Any) -> Any:
    """A judge on a device, in place."""
    network: Any = getattr(judge, "network", judge)
    if network is not None:
        network.to(place)
    return judge


def is_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer alone."""
    from nextscale import hub

    if not (folder / "config.json").is_file():
        return False
    found = hub.read_json(folder / "config.json")
    return "system" not in found and "generator" not in found


class TokenizerCodec:
    """A tokenizer alone, with the two methods that evaluation asks of a system."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.device = next(tokenizer.parameters()).device

    def encode(self, pictures: Any) -> Any:
        return self.tokenizer.encode(pictures.to(self.device)).tokens

    def decode(self, tokens: Any) -> Any:
        return self.tokenizer.decode_tokens([step.to(self.device) for step in tokens])


def open_pictures(
    data: str | None, split: str | None, train: str | None, train_split: str | None, size: tuple[int, int],
    caption_field: str | None = None,
) -> tuple[PictureDataset | None, PictureDataset | None]:
    """Held-out pictures and training pictures, None where nothing was asked for.

    Raises:
        DataError, InputError: no such place or split; both would be the same pictures.
    """
    from nextscale.data import open_dataset
    from nextscale.data.datasets import terminal_report
    from nextscale.data.sources import open_source

    reference = known = None
    if data is not None:
        named = split or ("concept-test" if "concept-test" in open_source(data).named_splits() else "validation")
        reference = open_dataset(data, size, named, report=terminal_report, caption_field=caption_field)
        split = named
    spec = train or data
    if spec is not None and train_split is not None:
        if spec == data and (train_split == split or "all" in (train_split, split)):
            if train is not None:
                raise InputError(
                    f"--data and --train are the same pictures ({spec}, {split}, {train_split}); name other splits"
                )
        else:
            known = open_dataset(spec, size, train_split, report=terminal_report, caption_field=caption_field)
    return reference, known


def _statistics(paths: list[Path]) -> dict[str, Path]:
    from nextscale.evaluation.distances import read_statistics

    return {read_statistics(path).features: path for path in paths}


def _distinct(extractors: list[Extractor]) -> list[Extractor]:
    names = [e.name for e in extractors]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"--features: {name} was given twice")
    return extractors


def write_samples(evaluation: Evaluation, path: Path) -> None:
    """The drawn pictures as ``arr_0`` uint8 (N, H, W, 3). Raises InputError where none were drawn."""
    from nextscale.data.pictures_out import write_npz

    if evaluation.samples is None:
        raise InputError("--npz: no pictures were drawn; give a model and --count")
    pictures = evaluation.samples[0].gather()["pictures"].permute(0, 2, 3, 1).numpy()
    write_npz(pictures, path, {"model": evaluation.subject.name, "seed": evaluation.wanted.seed})
    typer.echo(f"{path}: {len(pictures)} pictures")


def _wait_for_others(evaluation: Evaluation) -> None:
    """Until the other ranks' blocks are there. torchrun ends every process when one dies, so this ends too."""
    while evaluation.missing():
        time.sleep(POLL_SECONDS)


@contextmanager
def progress_lines(show: bool) -> Iterator[Callable[[str, int], Callable[[int], None]] | None]:
    """A progress bar a job, with rate and time left, on terminals."""
    import sys

    if not (show and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text("" if task.speed is None else f"{task.speed:.1f}/s")

    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bar:

        def start(what: str, total: int) -> Callable[[int], None]:
            task = bar.add_task(what, total=total)
            return lambda done: bar.update(task, completed=done)

        yield start
