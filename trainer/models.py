"""A trained model wherever it lies: opened, judged by a protocol, made to embed whole data sets.

::

    runs/NAME                            its newest checkpoint
    runs/NAME/checkpoints/step-...       this one
    FOLDER of launch/export.py           its timm model; or any folder with timm's config.json
    MODEL.onnx                           pixels 0..255 to embeddings, on the CPU

Legend: K classes, S sub-centroids, R = K S rows, D width of the embedding.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from trainer.backbone import Backbone, open_timm
from trainer.bench import Model
from trainer.checkpoint import load_head, read_rows
from trainer.config import Config, ProtocolConfig
from trainer.distributed import World, joined_world
from trainer.embed import Embeddings, Reading, reading_of, write_embeddings
from trainer.errors import UserError
from trainer.head import DenseHead
from trainer.imagesets import open_images
from trainer.judge import judge
from trainer.log import CLASSES
from trainer.manifest import read_record, verify
from trainer.state import build_head, load_loss_statistics
from trainer.trained import open_trained, rows_name

CENTROIDS = "centroids.safetensors"


def judge_models(
    paths: Sequence[Path], protocol: ProtocolConfig, timeout_seconds: float = 1800.0
) -> dict[str, dict[str, float]]:
    """Judge models by a protocol; return path -> ``eval/PROTOCOL/FIGURE`` -> value. Every rank must call it.

    None is needed if all data are embeddings.
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


def open_model(path: Path, world: World) -> Model:
    """Open what the docstring of this module lists; communicates nothing. Raises UserError."""
    if path.suffix == ".onnx":
        return _open_onnx(path, world)
    if _is_timm(path):
        backbone, image_size, channels = open_timm(path)
        return _with_centroids(
            Model(backbone.to(world.device).eval(), Reading(image_size=image_size, channels=channels)), path
        )
    trained = open_trained(path)

    def centroids_KSD() -> Tensor:
        judge = trained.config.loss.judge
        rows = [tensors[rows_name(tensors, judge)] for _, tensors in trained.stream_rows()]
        return torch.cat(rows).unflatten(0, (trained.num_classes, -1))

    backbone = trained.build_backbone().to(world.device)
    return Model(backbone, reading_of(trained.config), centroids_KSD, trained.class_names)


def load_model(folder: Path, config: Config, world: World) -> tuple[Backbone, DenseHead]:
    """Build backbone and this rank's part of the head from a run's newest checkpoint, for evaluation.

    ``config`` is that of the run, changed where this does not change the model. Ranks share the look for
    damaged files: one of them raises UserError.
    """
    trained = dataclasses.replace(open_trained(folder), config=config)
    verify(trained.path, "head-*", world.rank, world.size)
    backbone = trained.build_backbone().to(world.device)
    head = build_head(config, world, backbone.dim)
    load_head(head, None, read_rows(trained.path, head.row_shard))
    load_loss_statistics(head, read_record(trained.path))
    return backbone, head


def _open_onnx(path: Path, world: World) -> Model:
    """Open a network from N x C x H x W pixels 0..255 to embeddings, N free; it runs on the CPU."""
    import onnxruntime  # seconds to import, and only this kind of file needs it

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

    return _with_centroids(Model(embed, Reading(image_size=height, channels=channels)), path.parent)


def _with_centroids(model: Model, folder: Path) -> Model:
    """Add the centroids that ``launch/export.py`` writes beside a model, if they are there."""
    if not (folder / CENTROIDS).is_file():
        return model

    def centroids() -> Tensor:
        with safe_open(folder / CENTROIDS, "pt") as file:
            return file.get_tensor("centroids")

    names = tuple(json.loads((folder / CLASSES).read_text()))
    return dataclasses.replace(model, centroids=centroids, class_names=names)


def _is_timm(path: Path) -> bool:
    return (path / "config.json").is_file()


def _fingerprint(path: Path) -> str:
    """Return what tells a model from others: the file of its weights and their hash."""
    if path.suffix != ".onnx":
        path = (
            path / "model.safetensors" if _is_timm(path) else open_trained(path).path / "backbone.safetensors"
        )
    with path.open("rb") as content:
        return f"{path.resolve()} {hashlib.file_digest(content, 'sha256').hexdigest()}"
