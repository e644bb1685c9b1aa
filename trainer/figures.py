"""Pictures of an evaluation and of a training run: each function returns a ``Figure`` of its own.

Dimensions: N images, D feature, K classes.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from trainer.canvas import INK, colours_of, new_axes, new_figure
from trainer.captions import class_name
from trainer.roc import Verification

HISTOGRAM_IMAGES = 4000  # 8 million pairs, 64 MB
HISTOGRAM_CLASSES = 200  # so that a subset holds at least 20 images of a class, and thus genuine pairs
BAR_CLASSES = 40
LEGEND_CLASSES = 20
FEW_VALUES = 12  # a curve of so few shows each
LOWEST_FAR = 1e-4


def cosine_histogram(features_ND: Tensor, labels_N: Tensor, title: str) -> Figure:
    """Draw the densities of the cosine over pairs of the same class and of different classes, if there are.

    Takes unit features. All pairs of up to 4000 images are drawn; a larger set is represented by the first
    few images of each of up to 200 classes. The title says how many.
    """
    chosen_N = subset(labels_N)
    features_ND, shown_N = features_ND[chosen_N].float().cpu(), labels_N[chosen_N].cpu()
    cosines_NN, pair_NN = features_ND @ features_ND.T, torch.ones(len(shown_N), len(shown_N)).triu(1).bool()
    same_NN = shown_N[:, None] == shown_N
    figure = new_figure(6.4, 4.6)
    axes = new_axes(figure, "cosine", "density (square-root scale)")  # a narrow peak would flatten the rest
    axes.set_yscale("function", functions=(lambda y: np.sqrt(np.maximum(y, 0)), np.square))
    edges = np.linspace(-1, 1, 161)
    for name, wanted_NN, colour in (
        ("different classes", pair_NN & ~same_NN, "tab:gray"),
        ("same class", pair_NN & same_NN, "tab:blue"),
    ):
        cosines = cosines_NN.masked_select(wanted_NN).double().clamp(-1, 1).numpy()
        if len(cosines) == 0:
            continue
        density, _ = np.histogram(cosines, edges, density=True)
        label = f"{name}: mean {cosines.mean():.3f} ({len(cosines):,} pairs)"
        axes.stairs(density, edges, fill=True, alpha=0.35, color=colour)
        axes.stairs(density, edges, linewidth=1.3, color=colour, label=label)
        axes.axvline(cosines.mean(), linestyle=(0, (4, 3)), linewidth=1, color=colour)
    axes.set_xlim(-1.02, 1.02)
    axes.set_ylim(bottom=0)
    what = "all pairs of" if len(shown_N) == len(labels_N) else f"all pairs of {len(shown_N):,} out of"
    axes.set_title(f"{title} ({what} {len(labels_N):,} images)", fontsize=11, color=INK, pad=10)
    if axes.patches:
        figure.legend(loc="outside lower center", frameon=False)
    return figure


def roc(curves: Mapping[str, Verification]) -> Figure:
    """Draw TAR over FAR (logarithmic, 1e-4 to 1) of one or several models.

    Where fewer than ten impostor pairs are accepted, the curve says little and is drawn thin.
    """
    figure = new_figure(6.4, 4.6)
    axes = new_axes(figure, "false accept rate (FAR), logarithmic", "true accept rate (TAR)")
    lowest = 1.0
    for (name, result), colour in zip(curves.items(), colours_of(len(curves)), strict=True):
        label = f"{name}: AUC {result.auc:.5f}"
        if result.tar_at_far:
            far, tar = min(result.tar_at_far.items(), key=lambda rate: abs(np.log10(rate[0]) + 3))
            label += f", TAR {100 * tar:.2f} % at FAR 1e{np.log10(far):.0f}"
        far_V = result.far.clip(LOWEST_FAR / 10)  # a logarithmic axis has no 0
        axes.plot(far_V, result.tar, linewidth=0.8, alpha=0.5, color=colour)
        supported = min(1.0, 10 / result.num_impostor)
        is_supported_V, first = result.far >= supported, np.interp(supported, result.far, result.tar)
        tar_V = np.append(first, result.tar[is_supported_V])
        axes.plot(np.append(supported, far_V[is_supported_V]), tar_V, linewidth=2, color=colour, label=label)
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


def cmc(curves: Mapping[str, Sequence[float]]) -> Figure:
    """Draw the fractions of searches that find the right class among the 1, 2, 3, ... nearest (CMC)."""
    figure = new_figure(6.4, 4.6)
    axes = new_axes(figure, "rank k (logarithmic)", "found among the k nearest")
    for (name, found), colour in zip(curves.items(), colours_of(len(curves)), strict=True):
        label = f"{name}: {100 * found[0]:.2f} % at rank 1, {100 * found[-1]:.2f} % at rank {len(found)}"
        axes.plot(range(1, len(found) + 1), found, linewidth=2, color=colour, label=label)
    axes.set_xscale("log")
    ticks = [k for k in (1, 2, 5, 10, 20, 50, 100) if k <= max(map(len, curves.values()))]
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    bottom = max(0.0, np.floor(10 * min(found[0] for found in curves.values())) / 10 - 0.1)
    axes.set_ylim(bottom, 1 + 0.02 * (1 - bottom))
    axes.set_title("Identification", fontsize=13, color=INK, pad=10)
    figure.legend(loc="outside lower center", frameon=False)
    return figure


def small_curve(
    name: str,
    points: Mapping[int, float],
    lows: Mapping[int, float],
    highs: Mapping[int, float],
    *,
    logarithmic: bool,
) -> Figure:
    """Draw step -> value of one metric, small enough to stand beside others; an interval is a band."""
    figure = new_figure(4.2, 2.6)
    axes = new_axes(figure, "step", "")
    steps, values = list(points), list(points.values())
    marker = "o" if len(values) <= FEW_VALUES else None
    axes.plot(steps, values, linewidth=1.6, color="tab:blue", marker=marker, markersize=4)
    both = [step for step in lows if step in highs]
    bounds = [lows[step] for step in both], [highs[step] for step in both]
    axes.fill_between(both, *bounds, color="tab:blue", alpha=0.15, linewidth=0)
    if logarithmic:
        axes.set_yscale("log")
        decades = np.log10(max(values) / min(values))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.margins(x=0.01)
    axes.set_title(name, fontsize=11, color=INK, loc="left")
    return figure


def class_sizes(labels_N: np.ndarray, class_names: Sequence[str], title: str) -> Figure:
    """Draw how many images classes have: a bar for each of up to 40 classes, else how many have how many."""
    num_classes = max(len(class_names), int(labels_N.max()) + 1)  # up to 2^31, so nothing has their length
    _, counts = np.unique(labels_N, return_counts=True)
    sizes, times = np.unique(counts, return_counts=True)
    if empty := num_classes - len(counts):
        sizes, times = np.append(0, sizes), np.append(empty, times)
    middle = [(num_classes - 1) // 2, num_classes // 2]
    median = sizes[np.searchsorted(times.cumsum(), middle, side="right")].mean()
    few = num_classes <= BAR_CLASSES
    figure = new_figure(8, 4.6)
    axes = new_axes(figure, "class" if few else "images of the class", "images" if few else "classes")
    if few:
        names = [*class_names] or [str(i) for i in range(num_classes)]
        axes.bar(range(len(names)), np.bincount(labels_N, minlength=len(names)), color="tab:blue", alpha=0.7)
        axes.set_xticks(range(len(names)), [name[:20] for name in names])
        if len(names) * min(20, max(map(len, names))) > 75:
            axes.tick_params(axis="x", rotation=90)
    else:
        long_tailed = sizes[-1] > 20 * max(1, median)
        edges = _whole_edges(max(1, sizes[0]) if long_tailed else sizes[0], sizes[-1], long_tailed)
        heights, _ = np.histogram(sizes, edges, weights=times)
        axes.stairs(heights, edges, fill=True, color="tab:blue", alpha=0.7)
        axes.axvline(len(labels_N) / num_classes, linestyle=(0, (4, 3)), linewidth=1, color=INK)
        if long_tailed:
            axes.set_xscale("log")
            axes.set_yscale("symlog", linthresh=1)
            axes.set_ylim(bottom=0)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlim(sizes[0] - 5, sizes[-1] + 5)
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(
        f"{title}: {len(labels_N):,} images of {num_classes:,} classes\n"
        f"{sizes[0]:,} to {sizes[-1]:,} per class, median {median:,.0f},"
        f" mean {len(labels_N) / num_classes:,.1f}",
        fontsize=12,
        color=INK,
        pad=10,
    )
    return figure


def embedding_map(
    points_N2: np.ndarray, labels_N: Tensor, title: str, class_names: Sequence[str] = ()
) -> Figure:
    """Draw a map of embeddings in the plane, coloured by class; near points are meant to look alike.

    Up to 20 classes are named beside it.
    """
    figure = new_figure(6.4, 5.6)
    axes = new_axes(figure, "", "")
    classes, places_N = np.unique(labels_N.numpy(), return_inverse=True)
    colours = np.array(colours_of(len(classes)))
    size = float(np.clip(6000 / len(points_N2), 4, 36))
    x_N, y_N = points_N2.T
    axes.scatter(x_N, y_N, s=size, c=colours[places_N], linewidths=0, alpha=0.8, rasterized=True)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=11, color=INK, loc="left")
    if len(classes) <= LEGEND_CLASSES:
        for label, colour in zip(classes.tolist(), colours, strict=True):
            axes.scatter([], [], color=colour, label=class_name(label, class_names))
        figure.legend(loc="outside lower center", ncols=5, frameon=False, columnspacing=1, handletextpad=0.2)
    return figure


def centroid_cosines(counts: np.ndarray, title: str) -> Figure:
    """Draw how many pairs of centroids of different classes have which cosine, by ``counts`` of -1 to 1."""
    figure = new_figure(6.4, 3.2)
    axes = new_axes(figure, "cosine", "pairs of classes")
    axes.stairs(counts, np.linspace(-1, 1, len(counts) + 1), fill=True, color="tab:blue", alpha=0.7)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xlim(-1, 1)
    axes.set_title(title, fontsize=11, color=INK, loc="left")
    return figure


def gram(unit_KD: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """Draw the cosines between unit vectors that stand for classes; a simplex has -1/(K-1) everywhere.

    Up to 20 are named, and their cosines written.
    """
    gram_KK = unit_KD @ unit_KD.T
    figure = new_figure(6.4, 5.6)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    figure.colorbar(axes.imshow(gram_KK, cmap="RdBu_r", vmin=-1, vmax=1), label="cosine")
    if len(names) <= LEGEND_CLASSES:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        for i, j in np.ndindex(gram_KK.shape):
            colour = "white" if abs(gram_KK[i, j]) > 0.6 else INK
            axes.text(j, i, f"{gram_KK[i, j]:.2f}", ha="center", va="center", fontsize=7, color=colour)
    if len(names) > 1:
        others = gram_KK[~np.eye(len(names), dtype=bool)]
        simplex = -1 / (len(names) - 1)
        title += f"\nothers: mean {others.mean():.3f}, highest {others.max():.3f}; simplex {simplex:.3f}"
    axes.set_title(title, fontsize=11, color=INK)
    return figure


def value_by_class_size(images_K: Sequence[int], values_K: Sequence[float], value: str, title: str) -> Figure:
    """Draw what classes reach over how many images they were trained on."""
    figure = new_figure(6.4, 3.2)
    axes = new_axes(figure, "training images of the class", value)
    axes.scatter(images_K, values_K, s=16, color="tab:blue", alpha=0.6, linewidths=0)
    if max(images_K) > 20 * min(images_K):
        axes.set_xscale("log")
    axes.set_title(title, fontsize=11, color=INK, loc="left")
    return figure


def _whole_edges(lowest: int, highest: int, logarithmic: bool) -> np.ndarray:
    """Return at most 61 edges of bins that each hold as many whole numbers as their width says."""
    if logarithmic:
        return np.unique(np.geomspace(lowest, highest + 1, 61).round()) - 0.5
    width = -(-(highest - lowest + 1) // 60)
    return np.arange(lowest, highest + width + 1, width) - 0.5


def subset(labels_N: Tensor) -> Tensor:
    """Choose the places of at most 4000 images.

    They are the first few of each class, or of each of 200 evenly spaced classes.
    """
    if len(labels_N) <= HISTOGRAM_IMAGES:
        return torch.arange(len(labels_N))
    labels_N = labels_N.cpu()
    classes_K = labels_N.unique()
    count = min(len(classes_K), HISTOGRAM_CLASSES)
    chosen = classes_K[torch.linspace(0, len(classes_K) - 1, count).long()]
    per_class = HISTOGRAM_IMAGES // count
    return torch.cat([(labels_N == label).nonzero()[:per_class, 0] for label in chosen])
