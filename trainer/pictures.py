"""Pictures of losses, from embeddings that runs have saved: side by side, over time, their centres; alpha.

A run with ``eval.save_embeddings`` leaves ``embeddings/<set>-<step>.safetensors`` at every evaluation.
Legend: N images, D width of the embedding, K classes.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer import canvas, figures, rays
from trainer.captions import class_name, titles_of
from trainer.errors import UserError
from trainer.scale import PAPER_LOSS, adacos_scale, paper_scale, simplex_loss, simplex_scale


class Frame(NamedTuple):
    """What one evaluation of a test set leaves for pictures."""

    embeddings_ND: Tensor
    labels_N: Tensor
    class_names: tuple[str, ...]
    """By label of the set; () where it has none."""
    directions_KD: Tensor
    """The unit vectors that stood for the classes of the head; none (0 x D) if they were too many."""
    direction_names: tuple[str, ...]

    def save(self, path: Path) -> None:
        """Write a safetensors file; the folder is made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        save_file(tensors, path, {name: json.dumps(getattr(self, name)) for name in _NAMES})

    @classmethod
    def load(cls, path: Path) -> "Frame":
        """Read what ``save`` wrote. Raises UserError."""
        try:
            with safe_open(path, "pt") as file:
                tensors = [file.get_tensor(name) for name in _TENSORS]
                names = [tuple(json.loads(file.metadata()[name])) for name in _NAMES]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"{path}: cannot read embeddings: {error}") from None
        embeddings_ND, labels_N, directions_KD = tensors
        return cls(embeddings_ND, labels_N, names[0], directions_KD, names[1])


_TENSORS, _NAMES = ("embeddings_ND", "labels_N", "directions_KD"), ("class_names", "direction_names")

Frames = Mapping[int, Frame]
"""step -> frame, in order."""


def draw_runs(folders: Sequence[Path]) -> list[Path]:
    """Draw all that saved embeddings show into ``figures`` of each run and, compared, of the first.

    Returns the files. Raises UserError for a run that has saved none, or a file that cannot be read.
    """
    saved = {folder: read_embeddings(folder) for folder in folders}
    written = []
    for folder, sets in saved.items():
        for name, frames in sets.items():
            last, place, title = frames[max(frames)], folder / "figures", f"{folder.name}: {name}"
            features_ND = F.normalize(last.embeddings_ND)
            drawn = {f"cosines-{name}": figures.cosine_histogram(features_ND, last.labels_N, title)}
            drawn[f"centres-{name}"] = centre_gram(last, title)
            if len(last.directions_KD):
                directions = last.directions_KD.numpy(), last.direction_names
                drawn["centroid-gram"] = figures.gram(*directions, f"{folder.name}: centroids")
            if _is_plain(last):
                scatter = rays.feature_scatter(last.embeddings_ND, last.labels_N, last.class_names, title)
                drawn[f"features-{name}"] = scatter
                written.append(save_animation(frames, place / f"features-{name}.gif", title))
            written += [canvas.save(figure, place / f"{file}.png") for file, figure in drawn.items()]
    first = folders[0] / "figures"
    for name in saved[folders[0]]:
        panels = {folder: sets[name][max(sets[name])] for folder, sets in saved.items() if name in sets}
        if len(panels) > 1 and all(map(_is_plain, panels.values())):
            views = ((frame.embeddings_ND, frame.labels_N) for frame in panels.values())
            titled = dict(zip(titles_of(panels), views, strict=True))
            figure = rays.feature_scatter_pair(titled, panels[folders[0]].class_names)
            written.append(canvas.save(figure, first / f"features-{name}-compared.png"))
    written.append(canvas.save(alpha_bounds(), first / "alpha-bounds.png"))
    return list(dict.fromkeys(written))


def _is_plain(frame: Frame) -> bool:
    return frame.embeddings_ND.shape[1] in (2, 3)


def read_embeddings(folder: Path) -> dict[str, Frames]:
    """Return set -> frames of a run. Raises UserError."""
    found: dict[str, dict[int, Frame]] = {}
    for path in sorted((folder / "embeddings").glob("*.safetensors")):
        name, _, step = path.stem.rpartition("-")
        if not (name and step.isdecimal()):
            raise UserError(f"{path}: is not named <set>-<step>.safetensors")
        found.setdefault(name, {})[int(step)] = Frame.load(path)
    if not found:
        raise UserError(f"{folder}: holds no embeddings; train with eval.save_embeddings=true")
    return dict(found)


def save_animation(frames: Frames, path: Path, title: str) -> Path:
    """Write a GIF: the features at every step that was saved, the last of them for two seconds.

    All are seen from where the last looks best, each in its own range of axes.
    """
    last = frames[max(frames)]
    view = rays.best_view(*last[:2]) if last.embeddings_ND.shape[1] == 3 else None
    images = []
    for step, frame in frames.items():
        figure = rays.feature_scatter(*frame[:3], f"{title}, step {step}", view)
        buffer = io.BytesIO()
        canvas.literal(figure).savefig(buffer, format="png", dpi=80)
        images.append(Image.open(buffer).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE))
    durations = [300] * (len(images) - 1) + [2000]
    path.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)
    return path


def centre_gram(frame: Frame, title: str) -> Figure:
    """Draw the cosines between the mean unit features of all classes."""
    labels = frame.labels_N.unique()
    features_ND = F.normalize(frame.embeddings_ND.double())
    means_KD = torch.stack([features_ND[frame.labels_N == label].mean(0) for label in labels])
    names = [class_name(int(label), frame.class_names) for label in labels]
    return figures.gram(F.normalize(means_KD).numpy(), names, f"{title}, class means")


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
