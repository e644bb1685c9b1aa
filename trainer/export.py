"""A trained model for use elsewhere: timm's own format, ONNX, torch.export, TorchScript; its model card.

Behind the pooled output everything is affine once training is over (dropout is gone, batch norm is a scale
and a shift), so any neck is *one* linear layer, and that is the classifier of the timm model. timm alone
then gives our embeddings. The other formats take pixels 0..255 and give unit features. TorchScript is for
programs that load nothing else: torch calls it deprecated and points to torch.export.

Legend: N images, C channels, H x W pixels, F width of the pooled output, D of the embedding, K classes.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.augment import build_eval_transform
from trainer.backbone import Backbone, image_size_of, is_from_timm, load_timm, save_timm, with_classifier
from trainer.decode import decode
from trainer.embed import write_whole
from trainer.errors import UserError
from trainer.index import Index, open_index
from trainer.options import dump
from trainer.trained import Trained, open_trained, rows_name

FORMATS = ("timm", "onnx", "torch", "torchscript")
FILES = {
    "README.md", "centroids.safetensors", "classes.json", "config.yaml", "config.json", "model.safetensors",
    "model.onnx", "model.pt2", "model.ts",
}  # fmt: skip
CHECK_IMAGES = 32
TOLERANCE = 1e-3
"""Largest difference of a coordinate of unit features; float32 networks differ by about 1e-6."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    differences: dict[str, float]
    """Format -> largest difference of a coordinate of the unit features of real images."""


class PixelsToFeatures(nn.Module):
    """Pixels 0..255, uint8 or float, N x C x H x W -> unit features N x D."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Return N x D float32."""
        return F.normalize(self.backbone(images_NCHW).float())


def export(
    path: Path,
    out: Path | None = None,
    *,
    formats: Sequence[str] = ("timm",),
    input_type: str = "uint8",
    images: Path | None = None,
    overwrite: bool = False,
) -> Exported:
    """Export a run folder or a checkpoint into ``out`` (default: ``export`` in the run folder), whole or not.

    Every format is compared with the model on real images: of ``images``, a packed data set, or else of the
    run's own sets. Raises UserError if one differs, or cannot hold the model.
    """
    trained = open_trained(path)
    out = (out or trained.run_folder / "export").resolve()
    _check_free(out, overwrite)
    name = trained.config.backbone.name
    if "timm" in formats and not is_from_timm(name):
        raise UserError(f"--format: timm has no {name}, which is this project's own; take onnx or torch")
    images_NCHW = _some_images(trained, images)
    model = PixelsToFeatures(trained.build_backbone()).eval()
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out: {out}: cannot write: {error.strerror}") from None
    try:
        with torch.inference_mode():
            expected_ND = model(images_NCHW)
        writers = {
            "timm": _write_timm,
            "onnx": _write_onnx,
            "torch": _write_torch,
            "torchscript": _write_torchscript,
        }
        differences = {}
        for each in formats:
            found_ND = writers[each](temporary, trained, model, images_NCHW, input_type)
            differences[each] = _require_close(each, expected_ND, found_ND)
        write_centroids(trained, temporary / "centroids.safetensors")
        (temporary / "classes.json").write_text(json.dumps(list(trained.class_names)) + "\n")
        (temporary / "config.yaml").write_text(dump(trained.config))
        (temporary / "README.md").write_text(model_card(trained, differences, input_type))
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(out, differences)


def _check_free(out: Path, overwrite: bool) -> None:
    """Raise UserError if OUT is taken: by an export (unless ``overwrite``) or by anything else (always)."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out: {out} is not a folder")
    if foreign := sorted({path.name for path in out.iterdir()} - FILES):
        raise UserError(f"--out: {out} holds {foreign[0]}, which is not of an export; choose another folder")
    if not overwrite:
        raise UserError(f"--out: {out} exists already; --overwrite replaces it")


@torch.no_grad()
def fold_neck(neck: nn.Module, width: int) -> tuple[Tensor, Tensor]:
    """Return (weight_DF, bias_D) of the one linear layer that a neck is in evaluation; sums in float64."""
    weight_DF, bias_D = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for layer in neck if isinstance(neck, nn.Sequential) else [neck]:
        if isinstance(layer, nn.Linear):
            a = layer.weight.double()
            weight_DF, bias_D = a @ weight_DF, a @ bias_D + layer.bias.double()
        elif isinstance(layer, nn.BatchNorm1d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            scale_D = layer.weight.double() / torch.sqrt(layer.running_var.double() + layer.eps)
            shift_D = layer.bias.double() - scale_D * layer.running_mean.double()
            weight_DF, bias_D = scale_D[:, None] * weight_DF, scale_D * bias_D + shift_D
        elif not isinstance(layer, nn.Dropout | nn.Identity):
            raise AssertionError(f"a neck of {type(layer).__name__} is not affine")
    return weight_DF.float(), bias_D.float()


def write_centroids(trained: Trained, path: Path) -> None:
    """Write all unit rows, float32, as ``centroids`` of one safetensors file; a block at a time.

    K x D, or K x S x D with S sub-centroids a class.

    safetensors has no writer that streams; its format is 8 bytes of length, a JSON header, and the numbers.
    Raises UserError.
    """
    write_whole(path, lambda file: file.writelines(_centroid_bytes(trained)))


def _centroid_bytes(trained: Trained) -> Iterator[bytes]:
    for low, tensors in trained.stream_rows():
        rows = F.normalize(tensors[rows_name(tensors, trained.config.loss.judge)].float(), dim=-1)
        if low == 0:
            per_class = [trained.config.head.sub_centroids] if trained.num_rows > trained.num_classes else []
            shape = [trained.num_classes, *per_class, rows.shape[1]]
            entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * int(np.prod(shape))]}
            header = json.dumps({"centroids": entry}).encode()
            header += b" " * (-len(header) % 8)
            yield len(header).to_bytes(8, "little") + header
        yield rows.contiguous().numpy().astype("<f4", copy=False).tobytes()


def _write_timm(
    folder: Path, trained: Trained, model: PixelsToFeatures, images_NCHW: Tensor, _: str
) -> Tensor:
    """Write timm's files, read them back with timm alone and return the unit features of the images."""
    backbone = model.backbone
    network = backbone.network
    if not isinstance(backbone.neck, nn.Identity):
        width = next(m.in_features for m in backbone.neck.modules() if isinstance(m, nn.Linear))
        network = with_classifier(network, *fold_neck(backbone.neck, width))
    save_timm(network, folder, trained.config.backbone, backbone)
    normalised_NCHW = (images_NCHW.float() - backbone.mean_C11) / backbone.std_C11
    with torch.inference_mode():
        return F.normalize(load_timm(folder)(normalised_NCHW))


def _write_onnx(
    folder: Path, trained: Trained, model: PixelsToFeatures, images_NCHW: Tensor, input_type: str
) -> Tensor:
    """Write ``model.onnx``; return what onnxruntime makes of the images, one alone and then the others."""
    import onnxruntime  # seconds to import, and only this format needs it

    path = folder / "model.onnx"
    images_NCHW = images_NCHW.to(getattr(torch, input_type))
    torch.onnx.export(
        model,
        (images_NCHW[:2],),
        path,
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes={"images_NCHW": {0: torch.export.Dim("batch")}},
        external_data=False,
        dynamo=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    parts = (images_NCHW[:1], images_NCHW[1:])
    found = [session.run(["features"], {"images": part.numpy()})[0] for part in parts if len(part)]
    return torch.from_numpy(np.concatenate(found))


def _write_torch(
    folder: Path, trained: Trained, model: PixelsToFeatures, images_NCHW: Tensor, input_type: str
) -> Tensor:
    """Write ``model.pt2`` by torch.export; return what it makes of the images, read back."""
    images_NCHW = images_NCHW.to(getattr(torch, input_type))
    dynamic = {"images_NCHW": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (images_NCHW[:2],), dynamic_shapes=dynamic)
    torch.export.save(program, folder / "model.pt2")
    loaded = torch.export.load(folder / "model.pt2").module()
    with torch.inference_mode():
        return torch.cat([loaded(part) for part in (images_NCHW[:1], images_NCHW[1:]) if len(part)])


def _write_torchscript(
    folder: Path, trained: Trained, model: PixelsToFeatures, images_NCHW: Tensor, input_type: str
) -> Tensor:
    """Write ``model.ts`` by tracing; return what it makes of the images, read back."""
    images_NCHW = images_NCHW.to(getattr(torch, input_type))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)  # see the module's docstring
        torch.jit.trace(model, images_NCHW[:2]).save(folder / "model.ts")
        loaded = torch.jit.load(folder / "model.ts")
        return torch.cat([loaded(part) for part in (images_NCHW[:1], images_NCHW[1:]) if len(part)])


def _require_close(name: str, expected_ND: Tensor, found_ND: Tensor) -> float:
    difference = float((expected_ND - found_ND).abs().max())
    if not difference <= TOLERANCE:
        raise UserError(
            f"--format: {name} does not reproduce this model: features differ by {difference:.2g} "
            f"on real images, allowed are {TOLERANCE:g}"
        )
    return difference


def _some_images(trained: Trained, folder: Path | None) -> Tensor:
    """Return images as the model sees them when it is judged, spread over a data set. Raises UserError."""
    index = _open_some(trained, folder)
    chosen = np.unique(np.linspace(0, index.num_samples - 1, CHECK_IMAGES).astype(int))
    backbone = trained.config.backbone
    transform = build_eval_transform(image_size=image_size_of(backbone))
    images = []
    for i in chosen.tolist():
        try:
            images.append(transform(decode(index.read(i), backbone.channels)))
        except ValueError as error:
            raise UserError(f"{index.describe(i)}: {error}; --images takes another set") from None
    return torch.stack(images)


def _open_some(trained: Trained, folder: Path | None) -> Index:
    if folder is not None:
        return open_index(folder, "--images")
    config = trained.config
    folders = [*config.eval.verification.values(), *config.eval.classification.values(), config.data.train]
    for candidate in folders:
        if isinstance(candidate, Path) and candidate.is_dir():
            return open_index(candidate, "--images")
    raise UserError(f"--images: name a packed data set to check on; {folders[-1]} of the run is not here")


def model_card(trained: Trained, differences: dict[str, float], input_type: str) -> str:
    """Return README.md of an export: what it is, how to use it, what it reached, how it was made."""
    config = trained.config
    size, channels = image_size_of(config.backbone), config.backbone.channels
    parts = [
        _front_matter(config.backbone.name),
        f"# {trained.run_folder.resolve().name}",
        f"{config.backbone.name} with the {config.loss.name} loss over {trained.num_classes} classes, step "
        f"{trained.record['step']}: images of {size} x {size} pixels, {channels} channel"
        f"{'s' if channels > 1 else ''}, to embeddings; compare them by their cosine.",
        "## Use",
    ]
    parts += [
        _USES[name].format(mode="L" if channels == 1 else "RGB", input_type=input_type)
        for name in differences
    ]
    parts += [
        "`centroids.safetensors` holds `centroids`, one unit row per class (K x D, float32); `classes.json` "
        "their names in the same order.",
        "## Reached",
        _metrics_table(trained),
        "## Made from",
        f"- data: `{config.data.train}`, fingerprint `{trained.record['data_fingerprint']}`\n"
        f"- command: `deepspeed launch/train.py --config config.yaml` (the `config.yaml` beside this file)\n"
        f"- licence of weights and data: **to be filled in by whoever publishes this**",
        "## Checked",
        "Largest difference of a coordinate of the unit features, on real images, from the trained model: "
        + ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
        + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(name: str) -> str:
    library = "timm" if is_from_timm(name) else "pytorch"
    return f"---\nlibrary_name: {library}\ntags: [image-feature-extraction, recognition]\nlicense: other\n---"


_USES = {
    "timm": """With timm alone; its classifier holds the neck, so the model's output is the embedding:

```python
import timm, torch
from PIL import Image

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
images = torch.stack([transform(Image.open(path).convert("{mode}")) for path in ("a.png", "b.png")])
with torch.inference_mode():
    a, b = torch.nn.functional.normalize(model(images))
print("cosine:", float(a @ b))
```""",
    "onnx": "`model.onnx` takes `images`, {input_type} pixels 0 to 255, N x C x H x W, any N, and gives "
    "`features`, unit float32.",
    "torch": '`torch.export.load("model.pt2").module()` takes {input_type} pixels 0 to 255, N x C x H x W, '
    "any N, and returns unit features.",
    "torchscript": '`torch.jit.load("model.ts")` takes {input_type} pixels 0 to 255, N x C x H x W, any N, '
    "and returns unit features.",
}


def _metrics_table(trained: Trained) -> str:
    """Return the final metrics, if they are of this very step."""
    try:
        done: dict[str, Any] = json.loads((trained.run_folder / "done.json").read_text())
    except (OSError, ValueError):
        done = {}
    if done.pop("step", None) != trained.record["step"]:
        return "No final test metrics exist for this step."
    rows = [
        f"| {name.removeprefix('eval/')} | {value:.4f} |"
        for name, value in done.items()
        if isinstance(value, float)
    ]
    return "\n".join(["| metric | |", "|---|---|", *rows])
