"""Options that several commands share, and what they turn into."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nextscale.errors import InputError, WeightsError

if TYPE_CHECKING:
    from PIL import Image


class Purpose(str, Enum):
    """Which of the model's published settings to start from."""

    pictures = "pictures"
    fid = "fid"


class Precision(str, Enum):
    """In which number format the weights are held."""

    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"


class FileFormat(str, Enum):
    """In which number format weights are written."""

    fp32 = "fp32"
    bf16 = "bf16"


FileFormatOption = Annotated[
    FileFormat, typer.Option("--dtype", help="fp32 keeps every bit, bf16 takes half the space.")
]
Model = Annotated[str, typer.Option("--model", help="A name that `nextscale models` lists, or a model's folder.")]
Labels = Annotated[
    list[str] | None,
    typer.Option(
        "--label",
        help="What to draw: a class name or index, or one of each kind of label as class/style. May be repeated.",
        show_default=False,
    ),
]
Prompts = Annotated[
    Path | None, typer.Option("--prompts", help="A file of prompts: .txt, .json, .jsonl, .tsv or .csv.")
]
CaptionField = Annotated[
    str | None,
    typer.Option("--caption-field", help="Column or field of the captions.", show_default="text, caption, prompt"),
]
Grids = Annotated[
    str | None,
    typer.Option("--schedule", help="Other scales, as in 1,2,4,6x8, where the system can.", show_default="the model's"),
]
Ratio = Annotated[
    str | None, typer.Option("--ratio", help="Width to height, as in 4:3; the nearest that the model has.")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the first picture; the next ones count up.")]
GuidanceScale = Annotated[
    float | None,
    typer.Option("--guidance-scale", help="Strength of the label or prompt; 1 is none.", show_default="the model's"),
]
Schedule = Annotated[
    str | None,
    typer.Option(
        "--guidance-schedule",
        help="ramp, cosine, power-cosine:1.5 (they grow over the steps), constant, interval:0.2:0.8 (within these "
        "shares of the steps), or a share for every step, as in 0,0.5,1,1.",
        show_default="the model's",
    ),
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", help="Below 1 safer, above 1 wilder.", show_default="the model's")
]
TopK = Annotated[
    int | None, typer.Option("--top-k", help="Likeliest codes to choose among; 0 for all.", show_default="the model's")
]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", help="Share of the probability to choose among, in (0, 1].", show_default="the model's"),
]
Smooth = Annotated[
    bool | None,
    typer.Option(
        "--smooth/--no-smooth", help="VAR's smooth mode: prettier, less varied.", show_default="the model's"
    ),
]
OwnSettings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Another setting of the model's, as in iterations=16. May be repeated."),
]
Hooks = Annotated[
    list[str] | None,
    typer.Option("--hook", help="Something to act on the run, as in 'fastvar ratio=0.5'. May be repeated; the first "
                 "acts innermost. `nextscale hooks` lists them."),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile network and decoder: for many batches of one size.")
]
Graphs = Annotated[
    bool, typer.Option("--graphs", help="Capture the steps as CUDA graphs: for many batches of one size.")
]
PurposeOption = Annotated[Purpose, typer.Option("--purpose", help="Which published settings to start from.")]
PrecisionOption = Annotated[
    Precision,
    typer.Option("--precision", help="bf16 is faster where the machine has it; int8 is bf16 with smaller weights."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")]


def _use_threads(count: int | None) -> int | None:
    """Torch is imported for it only where it was given."""
    if count is not None:
        import torch

        torch.set_num_threads(count)
    return count


Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        help="Threads of the processor that one operation may use.",
        show_default="torch's",
        callback=_use_threads,
    ),
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        "--memory-limit",
        help="Most memory to take, weights included, as in 6GB or 800MB; larger batches are split.",
        show_default="what is free",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option("--weights", help="Published transformer of a size without weights: a file, a folder of shards, or "
                                   "owner/name/file of the hub."),
]
TokenizerWeights = Annotated[
    str | None, typer.Option("--tokenizer-weights", help="The published tokenizer that goes with it.")
]
ControlWeights = Annotated[
    str | None, typer.Option("--control-weights", help="The published control of a published car size.")
]
Controls = Annotated[
    list[str] | None,
    typer.Option("--control", help="A map that says where things are, for car and scalar. To mix several kinds: "
                 "KIND=FILE or KIND=FILE:WEIGHT, repeated.", show_default=False),
]
ControlKinds = Annotated[
    list[str] | None,
    typer.Option("--control-kind", help="Make the map of the --control picture: canny, edges, depth:FOLDER, ... In a "
                 "mix it may be repeated.", show_default="it is a map"),
]
DrafterWeights = Annotated[
    str | None, typer.Option("--drafter-weights", help="The published drafter of a published code pair.")
]
Resize = Annotated[bool, typer.Option("--resize", help="Fit pictures to the model's size (cut to its shape).")]


def open_model(
    name: str,
    precision: Precision = Precision.fp32,
    device: str = "auto",
    weights: str | None = None,
    tokenizer_weights: str | None = None,
    control_weights: str | None = None,
    drafter_weights: str | None = None,
) -> Any:
    """The model to work with; published sizes, which come without weights, must be given their files.

    Raises:
        NextscaleError: unknown name, weights missing or not fitting, device absent.
    """
    import nextscale
    from nextscale import hub
    from nextscale.devices import choose_device

    choose_device(device)
    if needs_weights(name) and not (weights and tokenizer_weights):
        raise WeightsError(
            f"{name} comes without weights; give --weights and --tokenizer-weights, or a folder that "
            "`nextscale convert` wrote as --model"
        )
    if needs_weights(name) and not drafter_weights and is_pair(name):
        raise WeightsError(f"{name} is two networks; give --drafter-weights, too, or a folder as --model")
    # A wrong path is told before a large model is built.
    given = {
        "tokenizer": tokenizer_weights,
        "generator": weights,
        "control": control_weights,
        "drafter": drafter_weights,
    }
    files = {part: where and str(hub.find_weights(where)) for part, where in given.items()}
    return nextscale.load(name, precision=precision.value, device=device, **files)


def needs_weights(name: str) -> bool:
    """Whether a name stands for a published size, built with random weights until some are loaded."""
    from nextscale.registry import weights_of

    return not Path(name).is_dir() and weights_of(name) == "published"


def is_pair(name: str) -> bool:
    """Whether a published size has a drafter beside its network."""
    from nextscale.systems.folders import model_config

    return hasattr(model_config(name), "drafter")


def sampling_changes(
    guidance_scale: float | None,
    guidance_schedule: str | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    smooth: bool | None,
) -> dict[str, Any]:
    """The settings that were given, by their names in the library."""
    given = {
        "guidance_scale": guidance_scale,
        "guidance_schedule": guidance_schedule and read_schedule(guidance_schedule),
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "smooth": smooth,
    }
    return {name: value for name, value in given.items() if value is not None}


def read_schedule(text: str) -> str | tuple[float, ...]:
    """A guidance schedule: a name, or numbers with commas between. Raises InputError for others."""
    from nextscale.sampling.guidance import check_schedule

    try:
        found: Any = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = text
    check_schedule(found)
    return found


def own_settings(given: list[str] | None, system: Any, purpose: str = "pictures") -> dict[str, Any]:
    """Settings of a model's own kind given as ``name=value``.

    Raises:
        InputError: not of that form, no setting of the model's, or of another type.
    """
    from nextscale.cli.train import read_override
    from nextscale.configuration import build

    values = dict(read_override(text) for text in given or [])
    if not values:
        return {}
    checked = build(type(system.settings_for(purpose, {})), values, "--set")
    return {name: getattr(checked, name) for name in values}


def read_label(text: str, system: Any) -> Any:
    """A label as a model of classes takes it: ``class`` or ``class/style``, each a name or an index; ``none`` or
    nothing leaves a kind open.

    Raises:
        InputError: unknown names (the nearest is suggested), too many parts.
    """
    kinds = system.config.class_names
    parts = [text] if len(system.config.classes) == 1 or (kinds and text in kinds[0]) else text.split("/")
    found = tuple(None if part in ("", "none") else part for part in map(str.strip, parts))
    system.label_rows([found])
    return found


def read_size(text: str | None, name: str) -> int | None:
    """Bytes of a size such as ``6GB``, ``800MB`` or a plain number. Raises InputError for others."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([kMGT]?)B?", text.strip())
    count = float(found[1]) * 1000 ** " kMGT".index(found[2] or " ") if found else 0.0
    if not 1 <= count < 1e18:
        raise InputError(f"{name} is {text!r}; give a size such as 6GB, 800MB or a number of bytes")
    return int(count)


def read_pixels(text: str, name: str) -> tuple[int, int]:
    """Height and width in pixels, as in ``256x384``. Raises InputError for others."""
    found = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text.strip().lower())
    if found is None:
        raise InputError(f"{name} is {text!r}; give height x width in pixels, as in 256x384")
    return int(found[1]), int(found[2])


def read_numbers(text: str, name: str) -> list[int]:
    """Integers with commas between. Raises InputError for others."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{name} is {text!r}; give whole numbers with commas between, as in 1,2,3") from None


def fit_picture(image: Image.Image, name: str, size: tuple[int, int], resize: bool) -> Image.Image:
    """A picture of the model's size (height, width).

    Raises:
        InputError: it has another size, and ``resize`` does not allow to fit it.
    """
    from nextscale.data.images import resize_crop

    height, width = size
    if image.size == (width, height):
        return image
    if not resize:
        raise InputError(
            f"{name} is {image.width}x{image.height} pixels, this model takes {width}x{height}; add --resize to fit it"
        )
    return resize_crop(image, size)


def check_graphs(system: Any) -> None:
    """Raises InputError where a system's device has no CUDA graphs."""
    if system.device.type != "cuda":
        raise InputError("--graphs: steps are captured as CUDA graphs; leave it out, or use --device cuda")


def make_hooks(given: list[str] | None) -> list[Any]:
    """The hooks that were asked for, each as ``name setting=value ...``; ``refiner/name`` is for one of a pair's two
    networks.

    Raises:
        InputError: not of that form, unknown names or settings, or settings of another type.
    """
    import shlex

    import nextscale
    from nextscale.cli.train import read_override

    made = []
    for text in given or []:
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise InputError(f"--hook {text!r}: {error}") from None
        if not words:
            raise InputError("--hook is empty; name a hook, as in --hook fastvar")
        role, _, name = words[0].rpartition("/")
        hook = nextscale.hook(name, **dict(read_override(word) for word in words[1:]))
        if role:
            from nextscale.acceleration.code_decoding import Only

            hook = Only(role, hook)  # type: ignore[arg-type]
        made.append(hook)
    return made


def provenance(model: str, settings: dict[str, Any], labels: Sequence[Any], seeds: Sequence[int]) -> dict[str, Any]:
    """What is needed to draw pictures again, for their metadata."""
    from nextscale import __version__

    # Of a folder its name alone: where it lay is nobody's business.
    name = Path(model).name if Path(model).is_dir() else model
    return {"version": __version__, "model": name, **settings, "labels": list(labels), "seeds": list(seeds)}
