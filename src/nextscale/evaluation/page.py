"""The report of an evaluation as one HTML file: figures, curves and sheets inside it, nothing fetched from anywhere."""
from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nextscale.data.sheets import sheet
from nextscale.errors import DataError, MissingExtraError

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; } th, td { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; } td.note { text-align: left; color: #666; }
img { max-width: 100%; image-rendering: pixelated; } img.curve { image-rendering: auto; }
p.note { color: #666; }
"""


def write_page(figures: Mapping[str, Any], sheets: Mapping[str, tuple[Tensor, int]], path: Path) -> Path:
    """Write the page under a temporary name, then rename. Raises DataError where the disk refuses.

    figures: as ``Evaluation.report`` makes them; sheets: title to pictures (N, 3, S, S') in [-1, 1] and columns.
    """
    parts = [f"<h1>Evaluation of {_text(figures['model'])}</h1>", _facts(figures)]
    for name, found in figures["features"].items():
        parts.append(f"<h2>In features of {_text(name)} ({found['width']} wide)</h2>{_features(found)}")
    if "text" in figures:
        parts.append(f"<h2>Pictures and prompts, by {_text(figures['text']['judge'])}</h2>{_prompts(figures['text'])}")
    if "likelihood" in figures:
        parts.append(f"<h2>Likelihood</h2>{_likelihood(figures['likelihood'])}")
    if "tokenizer" in figures:
        parts.append(f"<h2>Tokenizer</h2>{_tokenizer(figures['tokenizer'])}")
    if "copies" in figures:
        parts.append(f"<h2>Distance to the nearest training picture</h2>{_copies(figures['copies'])}")
    if "diversity" in figures:
        parts.append(f"<h2>Distance between pictures of one label</h2>{_diversity(figures['diversity'])}")
    curves = _curves(figures)
    if curves is not None:
        parts.append(f'<h2>Curves</h2><img class="curve" alt="curves" src="data:image/png;base64,{curves}">')
    for title, (pictures, columns) in sheets.items():
        parts.append(f'<h2>{_text(title)}</h2><img alt="{_text(title)}" src="data:image/png;base64,'
                     f'{_sheet(pictures, columns)}">')
    text = (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Evaluation of '
            f'{_text(figures["model"])}</title><style>{STYLE}</style></head><body>{"".join(parts)}</body></html>')
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"{path} can't be written ({error.strerror}); free some space and run again") from None
    return path


def _text(value: Any) -> str:
    return html.escape(str(value))


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else _text(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{_number(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _facts(figures: Mapping[str, Any]) -> str:
    wanted, reference, training = figures["wanted"], figures["reference"], figures["training"]
    facts = [f"version {figures['version']}, weights {figures['fingerprint']}, "
             f"{figures['size'][0]}x{figures['size'][1]} pixels"]
    for name, of in (("reference", reference), ("training pictures", training)):
        if of is not None:
            facts.append(f"{name}: {of['data']}, split {of['split']}, {of['pictures']:,} pictures")
    if "sampling" in figures:
        chosen = ", ".join(f"{name} {value}" for name, value in figures["sampling"].items())
        facts.append(f"{wanted['count']:,} pictures drawn, seeds from {wanted['seed']}, labels: {wanted['labels']}; "
                     f"{chosen}")
    if "prompts" in figures:
        facts.append(f"prompts: {figures['prompts']['different']:,} different ones, {figures['prompts']['source']}")
    return "".join(f"<p>{_text(fact)}</p>" for fact in facts)


COLUMNS = {"samples": "samples", "real_training_pictures": "real training pictures",
           "reconstruction": "reconstructions of the reference"}


def _features(found: Mapping[str, Any]) -> str:
    columns = [key for key in COLUMNS if key in found]
    rows: list[list[Any]] = []

    def row(title: str, *path: str) -> None:
        cells: list[Any] = []
        for column in columns:
            value: Any = found[column]
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            cells.append("" if value is None else value)
        if any(cell != "" for cell in cells):
            rows.append([title, *cells])

    row("pictures", "pictures")
    row("reference pictures", "reference_pictures")
    row("distance is called", "frechet_distance", "name")
    row("Fréchet distance", "frechet_distance", "value")
    row("... few-sample bias", "frechet_distance", "bias")
    row("... at infinitely many samples", "frechet_distance", "at_infinity")
    row("... R² of that line", "frechet_distance", "r_squared")
    row("kernel distance (KID form)", "kernel_distance", "mean")
    row("... standard deviation over subsets", "kernel_distance", "std")
    row("classifier score", "classifier_score", "mean")
    for name in ("precision", "recall", "density", "coverage"):
        row(name, "overlap", name)
    for name, title in (("class", "class"), ("class_plain", "class, plain share"), ("style", "style")):
        row(f"agreement: {title}", "agreement", name)
    notes = sorted({found[c]["note"] for c in columns if "note" in found[c]})
    if any(found[c].get("frechet_distance", {}).get("rank_deficient") for c in columns):
        notes.append("Some set has no more pictures than features: its covariance has no full rank, the distance is "
                     "far too large and its extrapolation a rough guess. Compare only equal numbers of pictures.")
    if "reference_agreement" in found:
        real = found["reference_agreement"]
        notes.append(f"Agreement on the reference's own pictures: class {real['class']:.4g}, "
                     f"plain {real['class_plain']:.4g} of {real['pictures']:,} pictures.")
    if not found["published"]:
        notes.append("Not the published Inception: none of these figures is an FID or an Inception score.")
    below = "".join(f'<p class="note">{_text(note)}</p>' for note in notes)
    return _table(["", *(COLUMNS[c] for c in columns)], rows) + below


def _prompts(found: Mapping[str, Any]) -> str:
    roles = {"samples": "samples", "reference": "real pictures, their captions"}
    of = {title: found[role] for role, title in roles.items() if "phrases" in found.get(role, {})}
    notes = sorted({found[role]["note"] for role in roles if "note" in found.get(role, {})})

    def rate(figures: Mapping[str, Any], name: str) -> str:
        if name not in figures:
            return ""
        return "{rate:.1%} ({low:.1%} to {high:.1%})".format(**figures[name])

    rows: list[list[Any]] = [[name, *(one["phrases"][key] for one in of.values())] for name, key in (
        ("pictures", "pictures"), ("different phrases", "phrases"), ("phrases to choose from", "candidates"),
        ("median rank of the asked one", "median_rank"), ("cosine with it", "cosine"),
        ("... with the others", "cosine_of_others"))]
    rows += [[f"asked phrase among the best {k}", *(rate(one["phrases"], f"top_{k}") for one in of.values())]
             for k in (1, 5)]
    rows.append(["asked style the best of five", *(rate(one.get("styles", {}), "top_1") for one in of.values())])
    rows.append(["CLIPScore", *(one["clip_score"] for one in of.values())])
    apart = [one.get("diversity", {}).get("mean", "") for one in of.values()]
    rows.append(["distance of pictures of one phrase", *apart])
    below = "".join(f'<p class="note">{_text(note)}</p>' for note in notes)
    return (_table(["", *of], rows) if of else "") + below


def _likelihood(found: Mapping[str, Any]) -> str:
    names = list(found)
    rows: list[list[Any]] = [["pictures", *(found[n]["pictures"] for n in names)]]
    for key, title in (("nats_a_token", "nats a token"), ("bits_a_dimension", "bits a dimension")):
        rows.append([title, *(f"{found[n][key]:.4f} ± {found[n][key + '_error']:.4f}" for n in names)])
    rows.append(["bits a picture", *(found[n]["bits_a_picture"] for n in names)])
    rows.append(["condition", *(found[n]["condition"] for n in names)])
    by_step = [[f"step {k}", *(found[n]["nats_a_token_by_step"][k] for n in names)]
               for k in range(len(found[names[0]]["nats_a_token_by_step"]))]
    return _table(["", *names], rows) + "<p>Nats a token, step by step:</p>" + _table(["", *names], by_step)


def _tokenizer(found: Mapping[str, Any]) -> str:
    psnr, ssim = found["psnr"], found["ssim"]
    rows = [["pictures", found["pictures"], ""], ["PSNR, dB: mean, median", psnr["mean"], psnr["median"]],
            ["SSIM: mean, median", ssim["mean"], ssim["median"]]]
    note = f'<p class="note">Reconstructions rounded to {_text(found["rounding"])}.</p>'
    if "usage" not in found:
        return _table(["", "", ""], rows) + note
    rows += [["tokens a picture", found["tokens"], ""], ["vocabulary", found["vocabulary"], ""],
             ["bits a picture", found["bits_a_picture"], ""]]
    titles = [*(f"scale {k}" for k in range(len(found["tokens_by_scale"]))), "all"]
    usage = [[title, *(tokens for tokens in [t]), u["codes"], u["share"], u["perplexity"]] for title, t, u in
             zip(titles, [*found["tokens_by_scale"], found["tokens"]], found["usage"], strict=True)]
    return (_table(["", "", ""], rows) + "<p>Codebook usage:</p>"
            + _table(["", "tokens", "codes used", "share", "perplexity"], usage) + note)


def _copies(found: Mapping[str, Any]) -> str:
    rows = []
    for way, figures in found.items():
        rows.append([way, figures["samples"]["p5"], figures["samples"]["median"],
                     figures.get("reference", {}).get("p5", ""), figures.get("reference", {}).get("median", ""),
                     figures.get("median_ratio", ""), figures.get("nearer_than_any_reference", "")])
    return _table(["by", "samples: 5%", "median", "held out: 5%", "median", "ratio of medians",
                   "share nearer than any held-out one"], rows) + (
        '<p class="note">A model that copies has samples much nearer to training pictures than held-out pictures are: '
        "a ratio far below 1. Distances by pixels are root mean square errors in grey levels.</p>")


def _diversity(found: Mapping[str, Any]) -> str:
    roles = [role for role in ("samples", "reference", "training") if any(role in of for of in found.values())]
    rows = [[way, *(of.get(role, {}).get("mean", "") for role in roles)] for way, of in found.items()]
    of_pixels = next(iter(found.values()))
    rows.append(["labels with two or more", *(of_pixels.get(role, {}).get("labels", "") for role in roles)])
    return _table(["by", *roles], rows) + (
        '<p class="note">The mean over labels of the mean over their pairs of pictures: samples that are all alike are '
        "near to each other. By pixels root mean square errors in grey levels.</p>")


def _sheet(pictures: Tensor, columns: int) -> str:
    scale = max(1, 64 // pictures.shape[-1])
    buffer = io.BytesIO()
    sheet(pictures, columns, scale=scale).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _curves(figures: Mapping[str, Any]) -> str | None:
    """Fréchet distance over 1/N, nats over steps, PSNR and perplexity over scales, as one PNG in base64."""
    panels = []
    lines = {name: found["samples"]["frechet_distance"] for name, found in figures["features"].items()
             if "frechet_distance" in found.get("samples", {})}
    if lines:
        panels.append(lambda axis: _draw_extrapolation(axis, lines))
    if "likelihood" in figures:
        panels.append(lambda axis: _draw_steps(axis, {n: f["nats_a_token_by_step"] for n, f in
                                                      figures["likelihood"].items()}, "nats a token", "step"))
    if "tokenizer" in figures:
        found = figures["tokenizer"]
        panels.append(lambda axis: _draw_steps(axis, {"preview": found["psnr_after_scale"]}, "PSNR, dB", "after scale"))
        used = [u["perplexity"] for u in found.get("usage", [])[:-1]]
        if used:
            panels.append(lambda axis: _draw_steps(axis, {"codes used": used}, "perplexity of the codes", "scale"))
    if not panels:
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "eval", "draw the curves of a report") from None
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for place, draw in enumerate(panels, 1):
        axis = figure.add_subplot(1, len(panels), place)
        draw(axis)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


def _draw_extrapolation(axis: Any, lines: Mapping[str, Mapping[str, Any]]) -> None:
    for name, line in lines.items():
        inverse = [1 / n for n in line["counts"]]
        points = axis.plot(inverse, line["distances"], "o", markersize=3, label=name)
        ends = [0, inverse[0]]
        axis.plot(ends, [line["at_infinity"] + line["slope"] * x for x in ends], linewidth=1,
                  color=points[0].get_color())
    axis.set(title="Fréchet distance of samples", xlabel="1 / number of samples")
    axis.set_xlim(left=0)


def _draw_steps(axis: Any, series: Mapping[str, Sequence[float]], title: str, over: str) -> None:
    for name, values in series.items():
        axis.plot(range(len(values)), values, "o-", markersize=3, label=name)
    axis.set(title=title, xlabel=over)
