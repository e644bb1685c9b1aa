"""Finished runs side by side: the same test sets, one table, one picture."""

import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from trainer import figures
from trainer.backbone import Backbone, build_backbone
from trainer.bench import Model
from trainer.checkpoint import load_head, read_rows, read_tensors
from trainer.config import Config, ProtocolConfig
from trainer.distributed import World, joined_world
from trainer.embed import Embeddings, Reading, write_embeddings
from trainer.errors import UserError
from trainer.evaluate import EvalSets, SetResult, figures_of, reading_of
from trainer.head import ClassShard, DenseHead
from trainer.imagesets import open_images
from trainer.judge import judge
from trainer.log import CLASSES
from trainer.manifest import complete_checkpoints, read_record
from trainer.options import load
from trainer.report import FILE, view_head, write_report
from trainer.state import build_head, load_loss_statistics
from trainer.trained import open_trained


def compare(folders: Sequence[Path], overrides: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """Evaluate the newest checkpoint of every run; return folder -> metrics. Every rank must call it.

    Rank 0 draws the first run's pictures, and the features of all runs side by side, into the first run's
    ``figures`` folder. Raises UserError for a folder without configuration or checkpoint.
    """
    configs = [load(folder / "config.yaml", overrides) for folder in folders]
    with joined_world(configs[0].engine.timeout_seconds) as world:
        found = {
            str(folder): evaluate_run(folder, config, world)
            for folder, config in zip(folders, configs, strict=True)
        }
        if world.is_main:
            _draw(found, folders[0] / "figures")
    return {
        folder: {name: value for result in results for name, value in result.metrics.items()}
        for folder, results in found.items()
    }


def judge_models(
    paths: Sequence[Path], protocol: ProtocolConfig, timeout_seconds: float = 1800.0
) -> dict[str, dict[str, float]]:
    """Judge models by a protocol; return path -> ``eval/PROTOCOL/FIGURE`` -> value. Every rank must call it.

    A path is a run folder, a checkpoint or an ONNX file; none is needed if all data are embeddings.
    """
    with joined_world(timeout_seconds) as world:

        def open_any(path: Path) -> Model:
            return open_model(path, world)

        models: dict[str, Model | None] = {str(path): open_any(path) for path in paths}
        models = models or {str(protocol.data): None}
        return {
            path: {
                f"eval/{protocol.protocol}/{name}": value
                for name, value in judge(protocol, model, world, open_any, "--")
            }
            for path, model in models.items()
        }


def embed_data(
    path: Path,
    data: Path,
    out: Path,
    *,
    dtype: str,
    rows_per_file: int,
    timeout_seconds: float = 1e6,
    **reading: Any,
) -> dict[str, Any]:
    """Write the embeddings of a data set; return what is there. Every rank must call it.

    Ranks may end hours apart, hence the long timeout: they meet only when all files are written. ``reading``
    are fields of ``Reading``.
    """
    with joined_world(timeout_seconds) as world:
        model = open_model(path, world)
        origin = {"model": _fingerprint(path), "data": str(data.resolve())}
        how = dataclasses.replace(model.reading, **reading)
        images = open_images(data, "DATA")
        write_embeddings(
            model.embed, images, how, world, out, origin=origin, dtype=dtype, rows_per_file=rows_per_file
        )
        written = Embeddings(out, "OUT")
        return {"path": str(out), **written.summary, "width": written.width, "num_failed": written.num_failed}


def _fingerprint(path: Path) -> str:
    """Return what tells a model from others: its checkpoint (or file) and the hash of its weights."""
    file = path if path.suffix == ".onnx" else _checkpoint_of(path) / "backbone.safetensors"
    with file.open("rb") as content:
        return f"{file.resolve()} {hashlib.file_digest(content, 'sha256').hexdigest()}"


def open_model(path: Path, world: World) -> Model:
    """Open a run folder (its newest checkpoint), a checkpoint folder, or an ONNX file. Raises UserError."""
    if path.suffix == ".onnx":
        return _open_onnx(path, world)
    checkpoint = _checkpoint_of(path)
    config = load(checkpoint.parents[1] / "config.yaml")
    backbone = _load_backbone(checkpoint, config, world)
    num_classes = config.head.num_classes
    assert num_classes is not None  # the configuration of a run is resolved

    def centroids() -> Tensor:
        rows_each = config.head.sub_centroids
        rows = read_rows(checkpoint, ClassShard(0, num_classes, num_classes).times(rows_each))
        matrix_RD = next(v for name, v in rows.items() if name.startswith("parameter.") and v.ndim == 2)
        return matrix_RD.unflatten(0, (num_classes, rows_each))

    return Model(backbone, reading_of(config), centroids, tuple(_class_names(checkpoint.parents[1])))


def _open_onnx(path: Path, world: World) -> Model:
    """Open a network from N x C x H x W pixels 0..255 to embeddings, N free; it runs on the CPU."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises what it likes
        raise UserError(f"{path}: cannot open as ONNX: {' '.join(str(error).split())}") from None
    (images,) = session.get_inputs()
    _, channels, height, width = images.shape
    if channels not in (1, 3) or height != width:
        raise UserError(f"{path}: takes {images.shape} instead of N x 1 or 3 x H x H images")
    as_float = images.type == "tensor(float)"

    def embed(images_NCHW: Tensor) -> Tensor:
        pixels = images_NCHW.float() if as_float else images_NCHW
        return torch.from_numpy(session.run(None, {images.name: pixels.cpu().numpy()})[0]).to(world.device)

    return Model(embed, Reading(image_size=height, channels=channels))


def _checkpoint_of(path: Path) -> Path:
    """Return the checkpoint that a path means. Raises UserError."""
    if (path / "state.json").is_file():
        return path.resolve()
    found = complete_checkpoints(path / "checkpoints")
    if not found:
        raise UserError(f"{path}: holds no complete checkpoint")
    return found[-1].resolve()


def evaluate_run(folder: Path, config: Config, world: World) -> list[SetResult]:
    """Return the results of a run's newest checkpoint; every rank must call it. No DeepSpeed needed."""
    backbone, head = load_model(folder, config, world)
    test_sets = EvalSets(
        config, world, _class_names(folder), head.shard.num_classes, lambda path: open_model(path, world)
    )
    return list(test_sets.evaluate(backbone, head))


def _class_names(folder: Path) -> list[str]:
    try:
        return json.loads((folder / CLASSES).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CLASSES}: cannot read the names of the classes: {error}") from None


def load_model(folder: Path, config: Config, world: World) -> tuple[Backbone, DenseHead]:
    """Build backbone and this rank's part of the head from a run's newest checkpoint, for evaluation."""
    checkpoint = _checkpoint_of(folder)
    backbone = _load_backbone(checkpoint, config, world)
    head = build_head(config, world, backbone.dim)
    load_head(head, None, read_rows(checkpoint, head.row_shard))
    load_loss_statistics(head, read_record(checkpoint))
    return backbone, head


def _load_backbone(checkpoint: Path, config: Config, world: World) -> Backbone:
    backbone = build_backbone(config.backbone, world.group).to(world.device).eval()
    tensors = read_tensors(checkpoint / "backbone.safetensors")
    state = {
        name.partition(".")[2]: value
        for name, value in tensors.items()
        if name.startswith(("parameter.", "buffer."))
    }
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"{checkpoint}: checkpoint of another model: {' '.join(str(error).split())}"
        ) from None
    return backbone


def table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Return a table for people: one row per run and test set, one column per metric."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for run, values in metrics.items():
        for name, value in values.items():
            _, test_set, metric = name.split("/", 2)
            rows.setdefault((run, test_set), {})[metric] = value
    columns = list(dict.fromkeys(metric for values in rows.values() for metric in values))
    drawn = Table("run", "test set", *columns)
    for (run, test_set), values in rows.items():
        drawn.add_row(run, test_set, *(f"{values[c]:.4f}" if c in values else "" for c in columns))
    text = io.StringIO()
    Console(file=text, width=40 + 18 * len(columns)).print(drawn)
    return text.getvalue()


def _draw(found: Mapping[str, Sequence[SetResult]], folder: Path) -> None:
    """Draw the first run, and the features of every test set side by side over the runs."""
    first = next(iter(found))
    for name, figure in figures_of(found[first], Path(first).name):
        figures.save(figure, folder / f"{name}.png")
    if len(found) == 1:
        return
    for results in zip(*found.values(), strict=True):
        if all(result.embeddings_ND.shape[1] in (2, 3) for result in results):
            panels = {
                Path(run).name: (result.embeddings_ND, result.labels_N)
                for run, result in zip(found, results, strict=True)
            }
            figure = figures.feature_scatter_pair(panels, results[0].class_names)
            figures.save(figure, folder / f"features-{results[0].name}-compared.png")


def report(folder: Path, overrides: Sequence[str] = ()) -> Path:
    """Judge a run's newest checkpoint and write its report; every rank must call it. Returns the path."""
    config = load(folder / "config.yaml", overrides)
    with joined_world(config.engine.timeout_seconds) as world:
        backbone, head = load_model(folder, config, world)
        names = open_trained(folder).class_names
        results = list(EvalSets(config, world, names, head.shard.num_classes).evaluate(backbone, head))
        view = view_head(head, results, names, list(config.eval.classification))
        return write_report(folder, config, results, view) if world.is_main else folder / FILE
