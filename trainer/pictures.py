"""Pictures of losses, from embeddings that runs have saved: side by side, over time, their centres; alpha.

A run with ``eval.save_embeddings`` leaves ``embeddings/<set>-<step>.safetensors`` at every evaluation.
Legend: N images, D width of the embedding, K classes.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trainer import canvas, rays
from trainer.errors import UserError
from trainer.scale import PAPER_LOSS, adacos_scale, paper_scale, simplex_loss, simplex_scale

Frames = Mapping[int, tuple[Tensor, Tensor]]
"""step -> (embeddings_ND, labels_N), in order."""


def draw_runs(folders: Sequence[Path]) -> list[Path]:
    """Draw all that saved embeddings show into ``figures`` of each run and, compared, of the first.

    Returns the files. Raises UserError for a run that has saved none, or a file that cannot be read.
    """
    saved = {folder: read_embeddings(folder) for folder in folders}
    written = []
    for folder, sets in saved.items():
        names = _class_names(folder)
        for name, frames in sets.items():
            embeddings_ND, labels_N = frames[max(frames)]
            gram = centre_gram(embeddings_ND, labels_N, names, f"{folder.name}: {name}")
            written.append(canvas.save(gram, folder / "figures" / f"centres-{name}.png"))
            if embeddings_ND.shape[1] in (2, 3):
                path = folder / "figures" / f"features-{name}.gif"
                written.append(save_animation(frames, path, names, f"{folder.name}: {name}"))
    first = folders[0] / "figures"
    for name in saved[folders[0]]:
        panels = {folder.name: sets[name][max(sets[name])] for folder, sets in saved.items() if name in sets}
        if len(panels) > 1 and all(x_ND.shape[1] in (2, 3) for x_ND, _ in panels.values()):
            figure = rays.feature_scatter_pair(panels, _class_names(folders[0]))
            written.append(canvas.save(figure, first / f"features-{name}-compared.png"))
    written.append(canvas.save(alpha_bounds(), first / "alpha-bounds.png"))
    return written


def read_embeddings(folder: Path) -> dict[str, Frames]:
    """Return set -> frames of a run. Raises UserError."""
    found: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    for path in sorted((folder / "embeddings").glob("*.safetensors")):
        name, _, step = path.stem.rpartition("-")
        try:
            tensors = load_file(path)
            found.setdefault(name, {})[int(step)] = (tensors["embeddings_ND"], tensors["labels_N"])
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(f"{path}: cannot read embeddings: {error}") from None
    if not found:
        raise UserError(f"{folder}: holds no embeddings; train with eval.save_embeddings=true")
    return dict(found)


def save_animation(frames: Frames, path: Path, class_names: Sequence[str] | None, title: str) -> Path:
    """Write a GIF: the features at every step that was saved, the last of them for two seconds.

    All are seen from where the last looks best, each in its own range of axes.
    """
    last = frames[max(frames)]
    view = rays.best_view(*last) if last[0].shape[1] == 3 else None
    images = []
    for step, (embeddings_ND, labels_N) in frames.items():
        figure = rays.feature_scatter(embeddings_ND, labels_N, class_names, f"{title}, step {step}", view)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=80)
        images.append(Image.open(buffer).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE))
    durations = [300] * (len(images) - 1) + [2000]
    path.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)
    return path


def centre_gram(
    embeddings_ND: Tensor, labels_N: Tensor, class_names: Sequence[str] | None, title: str
) -> Figure:
    """Draw the cosines between the mean unit features of all classes; a simplex has -1/(K-1) everywhere."""
    labels = labels_N.unique()
    features_ND = F.normalize(embeddings_ND.double())
    means = [features_ND[labels_N == label].mean(0) for label in labels]
    unit_KD = np.stack([(mean / mean.norm()).numpy() for mean in means])
    gram_KK = unit_KD @ unit_KD.T
    figure = _figure(6.4, 5.6)
    axes = figure.add_subplot()
    shown = axes.imshow(gram_KK, cmap="RdBu_r", vmin=-1, vmax=1)
    figure.colorbar(shown, label="cosine of class means")
    if len(labels) <= rays.LEGEND_CLASSES:
        names = [str(int(label)) if class_names is None else class_names[int(label)] for label in labels]
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        for i, j in np.ndindex(gram_KK.shape):
            colour = "white" if abs(gram_KK[i, j]) > 0.6 else canvas.INK
            axes.text(j, i, f"{gram_KK[i, j]:.2f}", ha="center", va="center", fontsize=7, color=colour)
    others = gram_KK[~np.eye(len(labels), dtype=bool)]
    simplex = -1 / max(1, len(labels) - 1)
    axes.set_title(
        f"{title}\nothers: mean {others.mean():.3f}, highest {others.max():.3f}; simplex {simplex:.3f}",
        fontsize=11,
        color=canvas.INK,
    )
    return figure


def alpha_bounds(largest: int = 1_000_000) -> Figure:
    """Draw the rules for alpha over the number of classes, and the lowest loss that each leaves reachable."""
    classes = np.unique(np.geomspace(2, largest, 200).astype(int))
    rules = {"paper, 0.5 log(K-1) + 3": paper_scale, "simplex": simplex_scale, "AdaCos, fixed": adacos_scale}
    figure = _figure(10.5, 4.4)
    scales, losses = figure.subplots(1, 2)
    for name, rule in rules.items():
        alphas = [rule(int(k)) for k in classes]
        scales.plot(classes, alphas, label=name)
        reachable = [simplex_loss(int(k), alpha) for k, alpha in zip(classes, alphas, strict=True)]
        losses.plot(classes, reachable, label=name)
    losses.axhline(
        PAPER_LOSS, linestyle=":", color="tab:gray", label=f"{PAPER_LOSS:.4f}, what the paper asks"
    )
    losses.set_yscale("log")
    for axes, text in ((scales, "alpha"), (losses, "lowest reachable loss (D >= K-1)")):
        axes.set_xscale("log")
        axes.set_xlabel("classes K", color=canvas.INK)
        axes.set_ylabel(text, color=canvas.INK)
        axes.grid(color=canvas.FAINT, linewidth=0.6)
        axes.legend(frameon=False, fontsize=9)
    return figure


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _class_names(folder: Path) -> list[str] | None:
    try:
        return json.loads((folder / "classes.json").read_text()) or None
    except (OSError, ValueError):
        return None
