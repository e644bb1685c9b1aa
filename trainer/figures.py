"""Pictures of an evaluation and of a training run, made without a display.

Every function returns a ``Figure`` of its own and touches no global state (no pyplot), so it may run in any
thread; ``save`` writes it. The same input gives the same bytes.

Dimensions: N images, D embedding (2 or 3) or feature (any), K classes, P points of a circle.
"""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from trainer.errors import UserError
from trainer.metrics import Verification

SCATTER_POINTS = 5000  # more than this hide one another
HISTOGRAM_IMAGES = 4000  # 8 million pairs, 64 MB
HISTOGRAM_CLASSES = 200  # so that a subset holds at least 20 images of a class, and thus genuine pairs
LEGEND_CLASSES = 20
BAR_CLASSES = 40
LOWEST_FAR = 1e-4
PANEL_INCHES = 5.4
INK, FAINT = "#333333", "#d9d9d9"


View = tuple[float, float]
"""Elevation and azimuth in degrees, whence a 3-D picture is seen."""


def feature_scatter(
    embeddings_ND: Tensor,
    labels_N: Tensor,
    class_names: Sequence[str] | None = None,
    title: str = "",
    view: View | None = None,
) -> Figure:
    """Draw embeddings of 2 or 3 dimensions, not normalised, with a ray along the mean of each class.

    At most 5000 images are drawn, evenly spaced in the given order. A 3-D picture is seen from ``view``, or
    from where its rays look farthest apart. ``class_names[label]`` is the name of a class; without them, the
    labels are used.
    """
    return feature_scatter_pair({title: (embeddings_ND, labels_N)}, class_names, view)


def feature_scatter_pair(
    panels: Mapping[str, tuple[Tensor, Tensor]],
    class_names: Sequence[str] | None = None,
    view: View | None = None,
) -> Figure:
    """Draw ``feature_scatter`` of several (embeddings_ND, labels_N) side by side; the keys are the titles.

    All panels share classes, colours and legend, and each has its own range of axes.
    """
    labels = sorted({int(label) for _, labels_N in panels.values() for label in labels_N.unique()})
    colours = dict(zip(labels, _colours(len(labels)), strict=True))
    names = [str(label) if class_names is None else class_names[label] for label in labels]
    legend_inches = 0.7 + 0.09 * max(map(len, names)) if len(labels) <= LEGEND_CLASSES else 0
    inches = PANEL_INCHES * len(panels) + legend_inches
    figure, width = _new_figure(inches, PANEL_INCHES + 0.3), PANEL_INCHES / inches
    for number, (title, (embeddings_ND, labels_N)) in enumerate(panels.items()):
        if embeddings_ND.ndim != 2 or embeddings_ND.shape[1] not in (2, 3):
            raise UserError(
                f"only embeddings of 2 or 3 dimensions can be drawn, not {[*embeddings_ND.shape]}"
            )
        points_ND, shown_N = _shown(embeddings_ND, labels_N)
        rays = _rays(points_ND, shown_N)
        if points_ND.shape[1] == 2:
            axes = _new_plane(figure, number * width, width, points_ND)
        else:
            axes = _new_globe(figure, number * width, width, points_ND, view or _best_view(rays))
        marks = axes.scatter(
            *points_ND.T, c=[colours[i] for i in shown_N.tolist()], s=6, alpha=0.45, linewidths=0
        )
        if points_ND.shape[1] == 3:
            marks.set_depthshade(False)  # it fades the far half of the points to nothing
        for label, ray_D in rays.items():
            axes.plot(*np.stack([0 * ray_D, ray_D]).T, color=_darker(colours[label]), linewidth=1.2)
        degrees_N = _degrees_from_ray(points_ND, shown_N, rays)  # errors lie far off and rule the mean
        spread = f"degrees from the ray: median {np.median(degrees_N):.1f}, mean {degrees_N.mean():.1f}"
        axes.set_title(f"{title}\n{spread}", fontsize=12, color=INK, pad=12)
    if legend_inches:
        marks = [
            Line2D([], [], marker="o", linestyle="", markersize=7, color=colours[label]) for label in labels
        ]
        anchor = (len(panels) * width, 0.5)
        figure.legend(
            marks, names, loc="center left", bbox_to_anchor=anchor, frameon=False, handletextpad=0.2
        )
    return figure


def best_view(embeddings_N3: Tensor, labels_N: Tensor) -> View:
    """Return whence the rays of these classes look farthest apart."""
    return _best_view(_rays(*_shown(embeddings_N3, labels_N)))


def cosine_histogram(features_ND: Tensor, labels_N: Tensor, title: str) -> Figure:
    """Draw the densities of the cosine over pairs of the same class and of different classes.

    Takes unit features. All pairs of up to 4000 images are drawn; a larger set is represented by the first
    few images of each of up to 200 classes. The title says how many.
    """
    chosen_N = _subset(labels_N)
    features_ND, shown_N = features_ND[chosen_N].float().cpu(), labels_N[chosen_N].cpu()
    cosines_NN, pair_NN = features_ND @ features_ND.T, torch.ones(len(shown_N), len(shown_N)).triu(1).bool()
    same_NN = shown_N[:, None] == shown_N
    figure = _new_figure(8, 4.6)
    axes = _new_axes(figure, "cosine", "density (square-root scale)")  # a narrow peak would flatten the rest
    axes.set_yscale("function", functions=(lambda y: np.sqrt(np.maximum(y, 0)), np.square))
    edges = np.linspace(-1, 1, 161)
    for name, wanted_NN, colour in (
        ("different classes", pair_NN & ~same_NN, "tab:gray"),
        ("same class", pair_NN & same_NN, "tab:blue"),
    ):
        cosines = cosines_NN.masked_select(wanted_NN).double().clamp(-1, 1).numpy()
        if len(cosines) == 0:
            raise UserError(f"{title}: there is no pair of {name} among {len(shown_N)} images")
        density, _ = np.histogram(cosines, edges, density=True)
        label = f"{name}: mean {cosines.mean():.3f} ({len(cosines):,} pairs)"
        axes.stairs(density, edges, fill=True, alpha=0.35, color=colour)
        axes.stairs(density, edges, linewidth=1.3, color=colour, label=label)
        axes.axvline(cosines.mean(), linestyle=(0, (4, 3)), linewidth=1, color=colour)
    axes.set_xlim(-1.02, 1.02)
    axes.set_ylim(bottom=0)
    what = "all pairs of" if len(shown_N) == len(labels_N) else f"all pairs of {len(shown_N):,} out of"
    axes.set_title(f"{title} ({what} {len(labels_N):,} images)", fontsize=13, color=INK, pad=10)
    figure.legend(loc="outside lower center", frameon=False)
    return figure


def roc(curves: Mapping[str, Verification]) -> Figure:
    """Draw TAR over FAR (logarithmic, 1e-4 to 1) of one or several models.

    Where fewer than ten impostor pairs are accepted, the curve says little and is drawn thin.
    """
    figure = _new_figure(8, 5.4)
    axes = _new_axes(figure, "false accept rate (FAR)", "true accept rate (TAR)")
    lowest = 1.0
    for (name, result), colour in zip(curves.items(), _colours(len(curves)), strict=True):
        tar = f"{100 * result.tar_at_far[1e-3]:.2f} %" if 1e-3 in result.tar_at_far else "n/a"
        label = f"{name}: AUC {result.auc:.5f}, TAR {tar} at FAR 1e-3"
        far = result.far.clip(LOWEST_FAR / 10)  # a logarithmic axis has no 0
        supported = 10 / result.num_impostor
        axes.plot(far, result.tar, linewidth=0.8, alpha=0.5, color=colour)
        axes.plot(far[far >= supported], result.tar[far >= supported], linewidth=2, color=colour, label=label)
        lowest = min(lowest, float(np.interp(LOWEST_FAR, result.far, result.tar)))
    chance = np.geomspace(LOWEST_FAR, 1, 200)
    axes.plot(chance, chance, linestyle=":", linewidth=1.2, color="tab:gray", label="chance")
    axes.set_xscale("log")
    axes.set_xlim(LOWEST_FAR, 1)
    bottom = max(0.0, np.floor(lowest * 10 - 1) / 10)
    axes.set_ylim(bottom, 1 + 0.02 * (1 - bottom))
    axes.set_title("Verification", fontsize=13, color=INK, pad=10)
    figure.legend(loc="outside lower center", frameon=False)
    return figure


def loss_curve(metrics: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Draw (step, loss) of one or several runs: every value thin, its running mean over 2 % of them thick."""
    figure = _new_figure(8, 4.6)
    axes = _new_axes(figure, "step", "loss")
    for (name, points), colour in zip(metrics.items(), _colours(len(metrics)), strict=True):
        if not points:
            raise UserError(f"{name}: there is no loss to draw")
        steps, losses = np.array(points, dtype=np.float64).T
        window = max(1, len(losses) // 50)
        sums = np.concatenate([[0], losses.cumsum()])
        first = np.maximum(np.arange(1, len(losses) + 1) - window, 0)
        means = (sums[1:] - sums[first]) / (np.arange(1, len(losses) + 1) - first)
        axes.plot(steps, losses, linewidth=0.8, alpha=0.3, color=colour)
        axes.plot(
            steps, means, linewidth=2, color=colour, label=f"{name}: {means[-1]:.4g} at step {steps[-1]:,.0f}"
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.01)
    axes.set_title("Training loss", fontsize=13, color=INK, pad=10)
    axes.legend(loc="upper right", frameon=False)
    return figure


def class_sizes(labels_N: np.ndarray, class_names: Sequence[str], title: str) -> Figure:
    """Draw how many images classes have: a bar for each of up to 40 classes, else how many have how many."""
    counts_K = np.bincount(labels_N, minlength=len(class_names))
    few = len(counts_K) <= BAR_CLASSES
    figure = _new_figure(8, 4.6)
    axes = _new_axes(figure, "class" if few else "images of the class", "images" if few else "classes")
    if few:
        names = [str(i) for i in range(len(counts_K))] if not class_names else [*class_names]
        axes.bar(range(len(counts_K)), counts_K, color="tab:blue", alpha=0.7)
        axes.set_xticks(range(len(counts_K)), [name[:20] for name in names])
        if len(names) * min(20, max(map(len, names))) > 75:
            axes.tick_params(axis="x", rotation=90)
    else:
        long_tailed = counts_K.max() > 20 * max(1, np.median(counts_K))
        edges = _whole_edges(
            max(1, counts_K.min()) if long_tailed else counts_K.min(), counts_K.max(), long_tailed
        )
        axes.stairs(np.histogram(counts_K, edges)[0], edges, fill=True, color="tab:blue", alpha=0.7)
        axes.axvline(counts_K.mean(), linestyle=(0, (4, 3)), linewidth=1, color=INK)
        if long_tailed:
            axes.set_xscale("log")
            axes.set_yscale("symlog", linthresh=1)
            axes.set_ylim(bottom=0)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlim(counts_K.min() - 5, counts_K.max() + 5)
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(
        f"{title}: {len(labels_N):,} images of {len(counts_K):,} classes\n"
        f"{counts_K.min():,} to {counts_K.max():,} per class, median {np.median(counts_K):,.0f},"
        f" mean {counts_K.mean():,.1f}",
        fontsize=12,
        color=INK,
        pad=10,
    )
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a PNG of 150 dpi and return its path; the folder is made, and the file is complete or absent."""
    path = Path(path)
    if path.suffix != ".png":
        raise UserError(f"figures are PNG files, not {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(
            unfinished, format="png", dpi=150, metadata={"Software": None}
        )  # no version of matplotlib
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _new_axes(figure: Figure, x_label: str, y_label: str) -> Axes:
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.tick_params(colors=INK)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def _whole_edges(lowest: int, highest: int, logarithmic: bool) -> np.ndarray:
    """Return at most 61 edges of bins that each hold as many whole numbers as their width says."""
    if logarithmic:
        return np.unique(np.geomspace(lowest, highest + 1, 61).round()) - 0.5
    width = -(-(highest - lowest + 1) // 60)
    return np.arange(lowest, highest + width + 1, width) - 0.5


def _colours(count: int) -> list[Any]:
    """Return distinct colours: the ten of tab10, and for more the hues of a circle."""
    if count <= 10:
        return [matplotlib.colormaps["tab10"](i) for i in range(count)]
    return [matplotlib.colormaps["hsv"](i / count) for i in range(count)]


def _new_plane(figure: Figure, left: float, width: float, points_N2: np.ndarray) -> Any:
    axes = figure.add_axes((left + 0.11 * width, 0.08, 0.86 * width, 0.81))
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[:].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)
    reach = 1.05 * np.abs(points_N2).max()
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    return axes


def _new_globe(figure: Figure, left: float, width: float, points_N3: np.ndarray, view: View) -> Any:
    """Draw the sphere of the longest embedding: its outline, equator and two meridians."""
    axes: Any = figure.add_axes((left, 0.02, width, 0.88), projection="3d", computed_zorder=False)
    axes.view_init(*view)
    axes.set_proj_type("ortho")
    axes.set_axis_off()
    reach = float(np.linalg.norm(points_N3, axis=1).max())
    turn_P = np.linspace(0, 2 * np.pi, 181)
    circle_P2 = reach * np.stack([np.cos(turn_P), np.sin(turn_P)], axis=1)
    for plane_23 in (_screen(*view).T, *np.eye(3)[[[0, 1], [1, 2], [0, 2]]]):
        axes.plot(*(circle_P2 @ plane_23).T, color=FAINT, linewidth=0.8)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), zlim=(-reach, reach))
    axes.set_box_aspect((1, 1, 1), zoom=1.5)
    text = f"radius of the sphere: {reach:.3g}"
    figure.text(left + width / 2, 0.03, text, ha="center", color=INK, fontsize=9)
    return axes


def _darker(colour: tuple[float, float, float, float]) -> tuple[float, float, float]:
    red, green, blue, _ = colour
    return 0.7 * red, 0.7 * green, 0.7 * blue


def _shown(embeddings_ND: Tensor, labels_N: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the images that are drawn, evenly spaced in the given order."""
    step = -(-len(labels_N) // SCATTER_POINTS)
    return embeddings_ND[::step].double().cpu().numpy(), labels_N[::step].cpu().numpy()


def _rays(points_ND: np.ndarray, labels_N: np.ndarray) -> dict[int, np.ndarray]:
    """Return for each class the mean direction of its points, as long as their 95th percentile."""
    rays = {}
    for label in np.unique(labels_N).tolist():
        points = points_ND[labels_N == label]
        mean_D = points.mean(axis=0)
        length = np.quantile(np.linalg.norm(points, axis=1), 0.95)
        rays[label] = mean_D * (length / max(np.linalg.norm(mean_D), 1e-12))
    return rays


def _degrees_from_ray(points_ND: np.ndarray, labels_N: np.ndarray, rays: dict[int, np.ndarray]) -> np.ndarray:
    """Return the angle between each point and the ray of its class."""
    rays_ND = np.stack([rays[label] for label in labels_N.tolist()])
    lengths_N = np.linalg.norm(points_ND, axis=1) * np.linalg.norm(rays_ND, axis=1)
    cosines_N = (points_ND * rays_ND).sum(axis=1) / np.maximum(lengths_N, 1e-12)
    return np.rad2deg(np.arccos(cosines_N.clip(-1, 1)))


def _screen(elevation: float, azimuth: float) -> np.ndarray:
    """Return the 3 x 2 directions of right and up on the screen, seen from these angles in degrees."""
    e, a = np.deg2rad([elevation, azimuth])
    right = [-np.sin(a), np.cos(a), 0]
    up = [-np.sin(e) * np.cos(a), -np.sin(e) * np.sin(a), np.cos(e)]
    return np.array([right, up]).T


def _best_view(rays: Mapping[int, np.ndarray]) -> View:
    """Return whence the closest two tips, or tip and origin, look farthest apart."""
    some_K3 = np.stack(list(rays.values())[:100])  # of more classes, no view can keep all apart
    tips_K3 = np.concatenate([np.zeros((1, 3)), some_K3])
    first, second = np.triu_indices(len(tips_K3), 1)
    views = [(float(e), float(a)) for e in range(10, 51, 5) for a in range(5, 360, 5)]
    seen = [tips_K3 @ _screen(*view) for view in views]
    gaps = [np.linalg.norm(tips[first] - tips[second], axis=1).min() for tips in seen]
    return views[int(np.argmax(gaps))]


def _subset(labels_N: Tensor) -> Tensor:
    """Choose at most 4000 images: the first few of each class, or of each of 200 evenly spaced classes."""
    if len(labels_N) <= HISTOGRAM_IMAGES:
        return torch.arange(len(labels_N))
    labels_N = labels_N.cpu()
    classes_K = labels_N.unique()
    count = min(len(classes_K), HISTOGRAM_CLASSES)
    chosen = classes_K[torch.linspace(0, len(classes_K) - 1, count).long()]
    per_class = HISTOGRAM_IMAGES // count
    return torch.cat([(labels_N == label).nonzero()[:per_class, 0] for label in chosen])


def small_curve(name: str, steps: Sequence[int], values: Sequence[float], *, logarithmic: bool) -> Figure:
    """Draw one metric of a run over its steps, small enough to stand beside others."""
    figure = _new_figure(4.2, 2.5)
    axes = _new_axes(figure, "", "")
    axes.plot(steps, values, linewidth=1.6, color="tab:blue", marker="o" if len(values) == 1 else None)
    if logarithmic:
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.margins(x=0.01)
    axes.set_title(name, fontsize=11, color=INK, loc="left")
    return figure


def embedding_map(points_N2: np.ndarray, labels_N: Tensor, title: str) -> Figure:
    """Draw a map of embeddings in the plane, coloured by class; near points are meant to look alike."""
    figure = _new_figure(6.4, 5.6)
    axes = _new_axes(figure, "", "")
    classes, places_N = np.unique(labels_N.numpy(), return_inverse=True)
    colours = np.array(_colours(len(classes)))
    size = float(np.clip(6000 / len(points_N2), 4, 36))
    x_N, y_N = points_N2.T
    axes.scatter(x_N, y_N, s=size, c=colours[places_N], linewidths=0, alpha=0.8, rasterized=True)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=11, color=INK, loc="left")
    return figure


def centroid_cosines(counts: np.ndarray, title: str) -> Figure:
    """Draw how many pairs of centroids of different classes have which cosine, by ``counts`` of -1 to 1."""
    figure = _new_figure(6.4, 3.2)
    axes = _new_axes(figure, "cosine", "pairs of classes")
    axes.stairs(counts, np.linspace(-1, 1, len(counts) + 1), fill=True, color="tab:blue", alpha=0.7)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xlim(-1, 1)
    axes.set_title(title, fontsize=11, color=INK, loc="left")
    return figure


def value_by_class_size(images_K: Sequence[int], values_K: Sequence[float], value: str, title: str) -> Figure:
    """Draw what classes reach over how many images they were trained on."""
    figure = _new_figure(6.4, 3.2)
    axes = _new_axes(figure, "training images of the class", value)
    axes.scatter(images_K, values_K, s=16, color="tab:blue", alpha=0.6, linewidths=0)
    if max(images_K) > 20 * min(images_K):
        axes.set_xscale("log")
    axes.set_title(title, fontsize=11, color=INK, loc="left")
    return figure


def as_svg(figure: Figure) -> str:
    """Return the figure as an SVG element for a page whose CSS has --grid and --muted and sets the colour.

    Texts stay texts, and take font and colour from the page, so the picture fits light and dark.
    """
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        figure.savefig(text, format="svg", transparent=True, dpi=150, metadata={"Date": None})
    svg = text.getvalue()
    before, _, after = svg[svg.index("<svg") :].partition("<metadata>")
    svg = before + after.partition("</metadata>")[2]
    for colour, variable in ((INK, "currentColor"), (FAINT, "var(--grid)"), ("#888888", "var(--muted)")):
        svg = svg.replace(colour, variable)
    return svg
