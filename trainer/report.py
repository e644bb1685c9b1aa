"""The report of a run: what it learned, where it errs and how it was made, in one file for a browser.

``runs/NAME/report.html`` needs neither network nor any other file. Legend: N images of a set, D width of the
features.
"""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from trainer import canvas, figures, page, rays
from trainer.augment import build_eval_transform
from trainer.backbone import image_size_of
from trainer.cache import open_data_set
from trainer.config import Config
from trainer.decode import decode
from trainer.diagnostics import WORST, ClassResult, HeadView, view_head
from trainer.distributed import joined_world
from trainer.errors import UserError
from trainer.evaluate import EvalSets, SetResult, curves_of
from trainer.hardpairs import Pairs, hardest_pairs
from trainer.index import Index
from trainer.models import load_model
from trainer.options import dump, load
from trainer.page import Html
from trainer.trained import open_trained

FILE = "report.html"
MAX_IMAGES = 20_000
"""Of a larger set this many, evenly spaced, are searched for pairs: 0.4 G cosines, seconds."""
MAX_TSNE = 1500
_MAP_IMAGES, _PAIRS, _STRIPS, _SHOWN = 5000, 8, 6, 7
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
        ("Cosines", _cosines(seen)),
        ("Hardest pairs", Html("".join(_pairs(r, config) for r in seen))),
        ("Map", Html("".join(_map(r) for r in seen))),
        ("Classes", _classes(config, view)),
        ("How it was made", _made(run, config)),
    ]
    subtitle = f"{config.backbone.name} with the {config.loss.name} loss, {config.head.num_classes:,} classes"
    path = run / FILE
    temporary = run / f".{FILE}"
    temporary.write_text(page.page(run.resolve().name, subtitle, _tiles(results, view), sections))
    temporary.replace(path)
    return path


def figures_of_head(view: HeadView) -> Iterator[tuple[str, Figure]]:
    """Yield (name, picture) of what is known of the head alone."""
    counts = view.neighbours.histogram.numpy()
    yield (
        "centroid-cosines",
        figures.centroid_cosines(counts, "Cosines between centroids of different classes"),
    )


def tables_of_head(view: HeadView) -> Iterator[tuple[str, list[str | int], list[list[Any]]]]:
    """Yield (name, columns, rows) of what is known of the head alone."""
    yield "near-classes", ["cosine", "class", "nearest other"], [list(row) for row in _near_classes(view)]
    for name, classes in view.classes.items():
        yield f"worst-classes-{name}", list(_WORST_COLUMNS), [list(row) for row in _worst(classes)]


def _tiles(results: Sequence[SetResult], view: HeadView) -> list[tuple[str, str]]:
    """Return the few numbers to be seen first."""
    wanted = ("accuracy", "best_accuracy", "tar@far=1e-3", "tar@far=1e-2", "eer", "rank1")
    tiles = []
    for result in results:
        for metric in wanted:
            value = result.metrics.get(f"eval/{result.name}/{metric}")
            if value is not None:
                tiles.append((f"{result.name}: {metric.replace('_', ' ')}", f"{100 * value:.2f} %"))
    nearest = view.metrics["head/cosine_nearest_mean"]
    return [*tiles[:7], ("mean cosine of a centroid to its nearest other", f"{nearest:.3f}")]


def _results(results: Sequence[SetResult], view: HeadView) -> Html:
    """Return a table for every test set, and one for the head."""
    every = {name: value for result in results for name, value in result.metrics.items()} | view.metrics
    areas = {result.name: f"eval/{result.name}/" for result in results} | {"head": "head/"}
    return page.cards(
        (
            page.table(
                (title, ""),
                [(name.removeprefix(area), v) for name, v in every.items() if name.startswith(area)],
            )
            for title, area in areas.items()
        ),
        "small",
    )


def _training(run: Path) -> Html:
    """Draw every metric of metrics.jsonl that has more than one value."""
    curves: dict[str, list[tuple[int, float]]] = {}
    path = run / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else ():
        values = json.loads(line)
        for name, value in values.items():
            if name != "step" and isinstance(value, int | float):
                curves.setdefault(name, []).append((values["step"], float(value)))
    drawn = []
    for name, points in curves.items():
        steps, values = zip(*points, strict=True)
        if len(points) > 1 and np.isfinite(values).all():
            logarithmic = name in _LOGARITHMIC and min(values) > 0
            drawn.append(_svg(figures.small_curve(name, steps, values, logarithmic=logarithmic)))
    return page.cards(drawn, "small") if drawn else page.note("This run has no metrics over time.")


def _cosines(results: Sequence[SetResult]) -> Html:
    drawn = [_svg(figure) for _, figure in curves_of(results)]
    for result in results:
        try:
            features_ND = F.normalize(result.embeddings_ND.float())
            drawn.append(_svg(figures.cosine_histogram(features_ND, result.labels_N, result.name)))
        except UserError:
            continue  # a set without two images of a class has no such picture
    text = (
        "ROC: the same class or not, over all pairs. CMC: is one of the k nearest others of the same class? "
        "Histograms: between images of one class and of different ones; the less they overlap, the better."
    )
    return Html(page.note(text) + page.cards(drawn))


def _pairs(result: SetResult, config: Config) -> Html:
    """Show the hardest pairs of a set, and what lies nearest to some of its images."""
    index = _index_of(result.name, config)
    chosen = _spread(len(result.labels_N), MAX_IMAGES)
    features_ND = F.normalize(result.embeddings_ND[chosen].float())
    labels_N = result.labels_N[chosen]
    pairs = hardest_pairs(features_ND, labels_N, _PAIRS)
    name = list(result.class_names) or [str(i) for i in range(int(labels_N.max()) + 1)]

    def show(i: int, mark: str = "") -> Html:
        return _thumbnail(index, int(chosen[i]), config, f"{name[labels_N[i]]}, image {int(chosen[i])}", mark)

    def card(found: tuple[float, int, int]) -> Html:
        cosine, i, j = found
        classes = dict.fromkeys((name[labels_N[i]], name[labels_N[j]]))
        return page.pair(show(i), show(j), f"{cosine:.3f}", " / ".join(classes))

    return Html(
        page.heading(f"{result.name}: one class, yet far apart")
        + page.cards(map(card, pairs.positives), "pairs")
        + page.heading(f"{result.name}: two classes, yet close")
        + page.note("Either the model errs here, or the labels do.")
        + page.cards(map(card, pairs.negatives), "pairs")
        + page.heading(f"{result.name}: nearest neighbours")
        + page.note(
            "The first image of a row, and what lies nearest to it: green of its class, red of another."
        )
        + page.cards((page.strip(_strip(q, features_ND, labels_N, show)) for q in _queries(pairs)), "wide")
    )


def _queries(pairs: Pairs) -> list[int]:
    """Choose images whose nearest neighbour is of another class, as far as there are, and others."""
    wrong, right = pairs.is_wrong_N.nonzero().flatten(), (~pairs.is_wrong_N).nonzero().flatten()
    wrong = wrong[_spread(len(wrong), _STRIPS // 2)]
    right = right[_spread(len(right), _STRIPS - len(wrong))]
    return [*wrong.tolist(), *right.tolist()]


def _strip(query: int, features_ND: Tensor, labels_N: Tensor, show: Any) -> list[Html]:
    cosine_N = features_ND @ features_ND[query]
    cosine_N[query] = -2
    nearest = cosine_N.topk(min(_SHOWN, len(cosine_N) - 1)).indices.tolist()
    marks = ["same" if labels_N[i] == labels_N[query] else "other" for i in nearest]
    return [show(query), *(show(i, mark) for i, mark in zip(nearest, marks, strict=True))]


def _map(result: SetResult) -> Html:
    """Draw a set in the plane: its own 2 or 3 dimensions, or its principal axes and, if small, t-SNE."""
    if result.embeddings_ND.shape[1] <= 3:
        scatter = rays.feature_scatter(
            result.embeddings_ND, result.labels_N, result.class_names or None, result.name
        )
        content = io.BytesIO()
        scatter.savefig(content, format="png", dpi=110)
        return page.cards([page.picture(content.getvalue(), "png", f"embeddings of {result.name}", "paper")])
    chosen = (
        torch.linspace(0, len(result.labels_N) - 1, min(len(result.labels_N), _MAP_IMAGES)).round().long()
    )
    features_ND = F.normalize(result.embeddings_ND[chosen].float())
    centred_ND = features_ND - features_ND.mean(0)
    _, variances, axes_DD = torch.linalg.svd(centred_ND, full_matrices=False)
    share = float(variances[:2].square().sum() / variances.square().sum())
    labels_N = result.labels_N[chosen]
    title = f"{result.name}: the two principal axes, {100 * share:.0f} % of the variance"
    drawn = [figures.embedding_map((centred_ND @ axes_DD[:2].T).numpy(), labels_N, title)]
    if 10 <= len(chosen) <= MAX_TSNE:
        from sklearn.manifold import TSNE  # seconds to import, which every training would wait for

        t_sne = TSNE(perplexity=min(30.0, len(chosen) / 4), init="pca", random_state=0, metric="cosine")
        points_N2 = t_sne.fit_transform(features_ND.numpy())
        drawn.append(figures.embedding_map(points_N2, labels_N, f"{result.name}: t-SNE of the cosines"))
    return page.cards(map(_svg, drawn))


def _near_classes(view: HeadView) -> Iterator[tuple[float, str, str]]:
    names = view.class_names
    for cosine, a, b in view.neighbours.pairs:
        yield cosine, names[a] if names else str(a), names[b] if names else str(b)


def _worst(classes: Sequence[ClassResult]) -> Iterator[tuple[str | float, ...]]:
    for c in classes[:WORST]:
        assert c.loss is not None
        yield c.name, c.images, c.loss, c.accuracy, c.cosine, c.margin, c.taken_for


def _classes(config: Config, view: HeadView) -> Html:
    """Show the classes that are close, those that are weak, and what the number of images does."""
    if config.data.reader == "stream" or config.data.mix:
        return Html("")  # no one index holds the images of every class
    index = open_data_set(config.data.train, "data.train", config.data)
    first = {
        int(label): int(i) for label, i in zip(*np.unique(index.labels_N, return_index=True), strict=True)
    }

    def example(label: int) -> Html:
        if label not in first:
            return Html("")
        return _thumbnail(index, first[label], config, f"class {label}")

    near = zip(view.neighbours.pairs, _near_classes(view), strict=True)
    parts = [
        page.heading("Classes that may be one"),
        page.note(
            "The closest pairs of centroids. Near 1 the two are probably one person or thing "
            "with two labels: launch/classes.py merge joins them."
        ),
        page.cards(
            (
                page.pair(example(a), example(b), f"{cosine:.3f}", f"{left} / {right}")
                for (cosine, a, b), (_, left, right) in near
            ),
            "pairs",
        ),
    ]
    drawn = [figure for _, figure in figures_of_head(view)]
    sizes = np.bincount(index.labels_N, minlength=index.num_classes)
    label_of = {name: label for label, name in enumerate(view.class_names)}
    for name, classes in view.classes.items():
        note = "Margin: mean cosine to the own centroid less that of the nearest other."
        parts += [page.heading(f"Weakest classes of {name}"), page.note(note)]
        parts.append(page.table(_WORST_COLUMNS, _worst(classes)))
        images = [int(sizes[label_of[c.name]]) for c in classes if view.class_names]
        if len(set(images)) > 1:
            margins, title = [c.margin for c in classes], f"{name}: does a class need images?"
            drawn.append(figures.value_by_class_size(images, margins, "margin", title))
    return Html("".join([*parts, page.cards(map(_svg, drawn))]))


def _made(run: Path, config: Config) -> Html:
    """Show command, run sheet and configuration."""
    parts = [page.preformatted(f"deepspeed launch/train.py --config {run / 'config.yaml'}")]
    sheet = _sheet(run / "log.txt")
    if sheet:
        parts.append(page.preformatted(sheet))
    parts.append(page.folded("config.yaml", page.preformatted(dump(config))))
    return Html("".join(parts))


def _sheet(path: Path) -> str:
    """Return the last run sheet of a log, or nothing."""
    if not path.is_file():
        return ""
    _, found, after = path.read_text().rpartition("run sheet\n")
    lines = after.splitlines() if found else []
    indented = [line for line in lines if line.startswith("  ")]
    return "\n".join(line[2:] for line in indented)


def _spread(length: int, count: int) -> Tensor:
    """Return at most ``count`` places of ``length``, evenly spaced."""
    return torch.linspace(0, length - 1, min(length, count), dtype=torch.float64).round().long()


def _index_of(name: str, config: Config) -> Index:
    folder = {**config.eval.classification, **config.eval.verification}[name]
    return open_data_set(folder, f"eval.{name}", config.data)


def _thumbnail(index: Index, i: int, config: Config, text: str, mark: str = "") -> Html:
    """Return an image as the model sees it; small ones are enlarged without blur."""
    size, channels = image_size_of(config.backbone), config.backbone.channels
    pixels_CHW = build_eval_transform(image_size=size)(decode(index.read(i), channels))
    array = pixels_CHW.permute(1, 2, 0).numpy()
    content, kind = io.BytesIO(), "png" if size <= 64 else "jpeg"
    image = Image.fromarray(array[:, :, 0] if channels == 1 else array)
    image.thumbnail((160, 160))
    image.save(content, kind, **({} if kind == "png" else {"quality": 85}))
    return page.picture(content.getvalue(), kind, text, f"{mark} tiny" if size <= 64 else mark)


def _svg(figure: Figure) -> Html:
    return Html(canvas.as_svg(figure))
