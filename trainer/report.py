"""The report of a run: what it learned, where it errs and how it was made, in one file for a browser.

``runs/NAME/report.html`` needs neither network nor any other file. Legend: N images of a set, D width of the
features.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from trainer import canvas, captions, figures, metrics, page, rays
from trainer.cache import open_data_set
from trainer.captions import class_name
from trainer.config import Config
from trainer.diagnostics import WORST, ClassResult, HeadView, view_head
from trainer.distributed import joined_world
from trainer.errors import UserError
from trainer.evaluate import CMC_DEPTH, EvalSets, SetResult, curves_of
from trainer.gallery import Shown, hard_pairs, spread, thumbnail
from trainer.log import read_metrics
from trainer.manifest import complete_checkpoints, step_of
from trainer.models import load_model
from trainer.options import dump, load
from trainer.page import Html
from trainer.trained import open_trained

FILE = "report.html"
MAX_IMAGES = 20_000
"""Of a larger set this many, evenly spaced, are searched for pairs: 0.4 G cosines, seconds."""
MAX_TSNE = 1500
_MAP_IMAGES = 5000
_WORST_COLUMNS = ("class", "images", "loss", "accuracy", "cosine", "margin", "most taken for")
_LOGARITHMIC = ("train/loss", "train/grad_norm")


def report(folder: Path, overrides: Sequence[str] = ()) -> Path:
    """Judge a run's newest checkpoint and write its report; every rank must call it. Returns the path."""
    config = load(folder / "config.yaml", overrides)
    with joined_world(config.engine.timeout_seconds) as world:
        backbone, head = load_model(folder, config, world)
        names = open_trained(folder).class_names
        results = list(EvalSets(config, world, names, head.shard.num_classes).evaluate(backbone, head))
        view = view_head(head, results, names, list(config.eval.classification))
        return write_report(folder, config, results, view) if world.is_main else folder / FILE


def write_report(run: Path, config: Config, results: Sequence[SetResult], view: HeadView) -> Path:
    """Write ``report.html`` into the run folder and return its path; one rank calls it."""
    seen = [result for result in results if len(result.labels_N)]  # a protocol has numbers only
    sections = [
        ("Results", _results(results, view)),
        ("Training", _training(run)),
        ("Curves", _curves(seen)),
        ("Hardest pairs", Html("".join(_pairs(r, config) for r in seen))),
        ("Map", Html("".join(_map(r) for r in seen))),
        ("Classes", _classes(config, view)),
        ("How it was made", _made(run, config)),
    ]
    subtitle = f"{config.backbone.name} with the {config.loss.name} loss, {config.head.num_classes:,} classes"
    subtitle += "".join(
        f", step {step_of(path):,}" for path in complete_checkpoints(run / "checkpoints")[-1:]
    )
    path = run / FILE
    temporary = run / f".{FILE}"
    temporary.write_text(
        page.page(run.resolve().name, subtitle, _tiles(results, view), [each for each in sections if each[1]])
    )
    temporary.replace(path)
    return path


def figures_of_head(view: HeadView) -> Iterator[tuple[str, Figure]]:
    """Yield (name, picture) of what is known of the head alone."""
    counts = view.neighbours.histogram.numpy()
    title = "Cosines between centroids of different classes"
    yield "centroid-cosines", figures.centroid_cosines(counts, title)
    if rows := len(view.directions_KD):
        yield (
            "centroid-gram",
            figures.gram(view.directions_KD.numpy(), view.direction_names, f"{rows} centroids"),
        )


def tables_of_head(view: HeadView) -> Iterator[tuple[str, list[str | int], list[list[Any]]]]:
    """Yield (name, columns, rows) of what is known of the head alone."""
    yield "near-classes", ["cosine", "class", "nearest other"], [list(row) for row in _near_classes(view)]
    for name, classes in view.classes.items():
        yield f"worst-classes-{name}", list(_WORST_COLUMNS), [list(row) for row in _worst(classes)]


def _tiles(results: Sequence[SetResult], view: HeadView) -> list[tuple[str, str]]:
    """Return the few numbers to be seen first."""
    wanted = ("accuracy", "best_accuracy", "tar@far=1e-3", "tar@far=1e-2", "eer", "rank1", "map")
    tiles = []
    for result in results:
        for metric in wanted:
            name = f"eval/{result.name}/{metric}"
            if (value := result.metrics.get(name)) is not None:
                low, high = (result.metrics.get(f"{name}_{end}", math.nan) for end in ("low", "high"))
                interval = f" (95 %: {100 * low:.2f} to {100 * high:.2f})" if low <= high else ""
                tiles.append((f"{result.name}: {metric.replace('_', ' ')}{interval}", f"{100 * value:.2f} %"))
    nearest = view.metrics["head/cosine_nearest_mean"]
    return [*tiles[:7], ("mean cosine of a centroid to its nearest other", f"{nearest:.3f}")]


def _results(results: Sequence[SetResult], view: HeadView) -> Html:
    """Return a table for every test set, one for the head, and what the figures mean."""
    every = {name: value for result in results for name, value in result.metrics.items()} | view.metrics
    areas = {result.name: f"eval/{result.name}/" for result in results} | {"head": "head/"}
    tables: list[Html] = []
    names: list[str] = []
    for title, area in areas.items():
        values = {name.removeprefix(area): value for name, value in every.items() if name.startswith(area)}
        tables.append(_with_intervals(title, values))
        names += values
    meanings = [
        (name, text)
        for name, text in captions.FIGURES.items()
        if any(name in (n, re.split(r"=|\d", n)[0]) for n in names)
    ]
    return Html(page.cards(tables, "small") + page.folded("What the figures mean", page.terms(meanings)))


def _with_intervals(title: str, values: dict[str, float]) -> Html:
    """Return a table of figures; those that have an interval have it beside them."""
    ends = {name: [values.get(f"{name}_{end}") for end in ("low", "high")] for name in values}
    intervals = {
        name: (low, high) for name, (low, high) in ends.items() if low is not None and high is not None
    }
    inside = {f"{name}_{end}" for name in intervals for end in ("low", "high")}
    shown = {name: value for name, value in values.items() if name not in inside}
    if not intervals:
        return page.table((title, ""), shown.items())
    text = {name: f"{low:.4f} to {high:.4f}" for name, (low, high) in intervals.items()}
    rows = [(name, value, text.get(name, "")) for name, value in shown.items()]
    return page.table((title, "", "95 % interval"), rows)


def _training(run: Path) -> Html:
    """Draw every metric of metrics.jsonl that changes, area by area, with its interval if it has one."""
    curves = _metrics_over_time(run / "metrics.jsonl")
    ends = {name: [curves.get(f"{name}_{end}", {}) for end in ("low", "high")] for name in curves}
    inside = {f"{name}_{end}" for name, found in ends.items() for end in ("low", "high") if all(found)}
    drawn: dict[str, list[Html]] = {}
    still = []
    for name, points in curves.items():
        if name in inside:
            continue
        if len(set(points.values())) > 1:
            logarithmic = name in _LOGARITHMIC and min(points.values()) > 0
            figure = figures.small_curve(name, points, *ends[name], logarithmic=logarithmic)
            drawn.setdefault(name.partition("/")[0], []).append(_svg(figure))
        elif len(points) > 1:
            still.append(f"{name} {min(points.values()):g}")
    if not drawn:
        return page.note("This run has no metrics over time.")
    parts = [
        page.heading(area) + page.note(captions.AREAS.get(area, "")) + page.cards(drawn[area], "small")
        for area in sorted(drawn, key=[*captions.AREAS, *drawn].index)
    ]
    return Html("".join(parts) + (page.note("Never changed: " + ", ".join(still)) if still else ""))


def _metrics_over_time(path: Path) -> dict[str, dict[int, float]]:
    """Return name -> step -> value of what is a finite number; counts of confusions are no curves."""
    curves: dict[str, dict[int, float]] = {}
    for values in read_metrics(path):
        for name, value in values.items():
            is_number = isinstance(value, int | float) and math.isfinite(value)
            if name != "step" and is_number and "/confused/" not in name:
                curves.setdefault(name, {})[values["step"]] = float(value)
    return curves


def _curves(results: Sequence[SetResult]) -> Html:
    """Draw ROC, CMC and the histograms of cosines; sets of known classes are verified here, on a part."""
    verified = [_verified(result) for result in results]
    drawn = [page.captioned(_svg(figure), captions.PICTURES[name]) for name, figure in curves_of(verified)]
    for result in results:
        features_ND = F.normalize(result.embeddings_ND.float())
        figure = figures.cosine_histogram(features_ND, result.labels_N, result.name)
        drawn.append(page.captioned(_svg(figure), captions.PICTURES["cosines"]))
    return page.cards(drawn) if drawn else Html("")


def _verified(result: SetResult) -> SetResult:
    """Return a result with ROC and CMC: those of known classes have none, for their classes are looked up."""
    if result.verification is not None:
        return result
    chosen = figures.subset(result.labels_N)
    features_ND, labels_N = F.normalize(result.embeddings_ND[chosen].float()), result.labels_N[chosen]
    try:
        found = metrics.verification(features_ND, labels_N)
        searched = metrics.identification(features_ND, labels_N, ranks=range(1, CMC_DEPTH + 1))
    except UserError:
        return result
    cmc = tuple(searched[f"rank{k}"] for k in range(1, CMC_DEPTH + 1))
    name = result.name if len(chosen) == len(result.labels_N) else f"{result.name}, {len(chosen):,} images"
    return dataclasses.replace(result, name=name, verification=found, cmc=cmc)


def _pairs(result: SetResult, config: Config) -> Html:
    """Show the hardest pairs of a set, and what lies nearest to some of its images."""
    chosen = spread(len(result.labels_N), MAX_IMAGES)
    features_ND, labels_N = F.normalize(result.embeddings_ND[chosen].float()), result.labels_N[chosen]
    names = result.class_names or tuple(str(i) for i in range(int(labels_N.max()) + 1))
    folder = {**config.eval.classification, **config.eval.verification}[result.name]
    index = open_data_set(folder, f"eval.{result.name}", config.data)
    return hard_pairs(result.name, Shown(features_ND, labels_N, chosen, names, index, config.backbone))


def _map(result: SetResult) -> Html:
    """Draw a set in the plane: its own 2 or 3 dimensions, or its principal axes and, if small, t-SNE."""
    if result.embeddings_ND.shape[1] == 1:
        return page.note("One dimension: the cosines above are all there is to see.")
    if result.embeddings_ND.shape[1] <= 3:
        figure = rays.feature_scatter(result.embeddings_ND, result.labels_N, result.class_names, result.name)
        return page.cards([page.captioned(_svg(figure), captions.PICTURES["rays"])])
    chosen = spread(len(result.labels_N), _MAP_IMAGES)
    features_ND = F.normalize(result.embeddings_ND[chosen].float())
    centred_ND = features_ND - features_ND.mean(0)
    _, variances, axes_DD = torch.linalg.svd(centred_ND, full_matrices=False)
    share = float(variances[:2].square().sum() / variances.square().sum())
    points_N2, title = (centred_ND @ axes_DD[:2].T).numpy(), f"{result.name}: the two principal axes"
    maps = [("axes", points_N2, f"{title}, {100 * share:.0f} % of the variance")]
    if 10 <= len(chosen) <= MAX_TSNE:
        from sklearn.manifold import TSNE  # seconds to import, which every training would wait for

        t_sne = TSNE(perplexity=min(30.0, len(chosen) / 4), init="pca", random_state=0, metric="cosine")
        maps.append(
            ("t-sne", t_sne.fit_transform(features_ND.numpy()), f"{result.name}: t-SNE of the cosines")
        )
    return page.cards(
        page.captioned(
            _svg(figures.embedding_map(points_N2, result.labels_N[chosen], title, result.class_names)),
            captions.PICTURES[name],
        )
        for name, points_N2, title in maps
    )


def _near_classes(view: HeadView) -> Iterator[tuple[float, str, str]]:
    for cosine, a, b in view.neighbours.pairs:
        yield cosine, class_name(a, view.class_names), class_name(b, view.class_names)


def _worst(classes: Sequence[ClassResult]) -> Iterator[tuple[str | float, ...]]:
    for c in classes[:WORST]:
        yield c.name, c.images, "" if c.loss is None else c.loss, c.accuracy, c.cosine, c.margin, c.taken_for


def _classes(config: Config, view: HeadView) -> Html:
    """Show the classes that are close, those that are weak, and what the number of images does."""
    if config.data.reader == "stream" or config.data.mix:
        return page.note("No one index holds the images of every class: they are streamed, or mixed.")
    index = open_data_set(config.data.train, "data.train", config.data)
    first = {
        int(label): int(i) for label, i in zip(*np.unique(index.labels_N, return_index=True), strict=True)
    }

    def example(label: int) -> Html:
        return (
            thumbnail(index, first[label], config.backbone, f"class {label}") if label in first else Html("")
        )

    near = zip(view.neighbours.pairs, _near_classes(view), strict=True)
    pairs = (
        page.pair(example(a), example(b), f"{cosine:.3f}", f"{left} / {right}")
        for (cosine, a, b), (_, left, right) in near
    )
    parts = [
        page.heading("Classes that may be one"),
        page.note(captions.PICTURES["near"]),
        page.cards(pairs, "pairs"),
    ]
    drawn = [page.captioned(_svg(figure), captions.PICTURES[name]) for name, figure in figures_of_head(view)]
    sizes = np.bincount(index.labels_N, minlength=config.head.num_classes or 0)
    for name, classes in view.classes.items():
        parts += [page.heading(f"Weakest classes of {name}"), page.note(captions.PICTURES["weak"])]
        parts.append(page.table(_WORST_COLUMNS, _worst(classes)))
        images = [int(sizes[c.label]) for c in classes]
        if len(set(images)) > 1:
            margins, title = [c.margin for c in classes], f"{name}: does a class need images?"
            figure = figures.value_by_class_size(images, margins, "margin", title)
            drawn.append(page.captioned(_svg(figure), captions.PICTURES["sizes"]))
        elif images:
            parts.append(page.note(f"All classes have {images[0]:,} training images: size explains nothing."))
    return Html("".join([*parts, page.heading("All classes"), page.cards(drawn)]))


def _made(run: Path, config: Config) -> Html:
    """Show command, run sheet and configuration."""
    sheet = _sheet(run / "log.txt")
    parts = [page.heading("Command")]
    if typed := sheet.pop("command", ""):
        parts += [
            page.note(f"As it was typed, on {sheet.get('ranks', 'unknown ranks')}:"),
            page.command(typed),
        ]
    parts += [
        page.note("The same run again, on any number of ranks:"),
        page.command(f"deepspeed launch/train.py --config {run / 'config.yaml'} run.name=again"),
        page.heading("Run sheet"),
        page.terms(sheet.items()) if sheet else page.note("log.txt holds none."),
        page.folded("config.yaml", page.preformatted(dump(config))),
    ]
    return Html("".join(parts))


def _sheet(path: Path) -> dict[str, str]:
    """Return the last run sheet of a log, title -> text; empty if there is none."""
    _, _, after = (path.read_text() if path.is_file() else "").rpartition("run sheet\n")
    lines = itertools.takewhile(lambda line: line.startswith("  "), after.splitlines())
    return dict(re.split(r"  +", line.strip(), maxsplit=1) for line in lines)


def _svg(figure: Figure) -> Html:
    return Html(canvas.as_svg(figure))
