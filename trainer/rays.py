"""Embeddings of 2 or 3 dimensions as they are, with a ray along the mean of each class.

Dimensions: N images, D embedding (2 or 3), K classes, P points of a circle.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from trainer.canvas import FAINT, INK, colours_of, new_figure
from trainer.captions import class_name
from trainer.errors import UserError

SCATTER_POINTS = 5000  # more than this hide one another
LEGEND_CLASSES = 20
PANEL_INCHES = 5.4
View = tuple[float, float]
"""Elevation and azimuth in degrees, whence a 3-D picture is seen."""


def feature_scatter(
    embeddings_ND: Tensor,
    labels_N: Tensor,
    class_names: Sequence[str] = (),
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
    class_names: Sequence[str] = (),
    view: View | None = None,
) -> Figure:
    """Draw ``feature_scatter`` of several (embeddings_ND, labels_N) side by side; the keys are the titles.

    All panels share classes, colours and legend, and each has its own range of axes.
    """
    labels = sorted({int(label) for _, labels_N in panels.values() for label in labels_N.unique()})
    colours = dict(zip(labels, colours_of(len(labels)), strict=True))
    names = [class_name(label, class_names) for label in labels]
    legend_inches = 0.7 + 0.09 * max(map(len, names)) if len(labels) <= LEGEND_CLASSES else 0
    inches = PANEL_INCHES * len(panels) + legend_inches
    figure, width = new_figure(inches, PANEL_INCHES + 0.3), PANEL_INCHES / inches
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
            *points_ND.T,
            c=[colours[i] for i in shown_N.tolist()],
            s=6,
            alpha=0.45,
            linewidths=0,
            rasterized=True,
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
