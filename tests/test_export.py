"""Exports: timm alone, onnxruntime and torch.export give the trained model's embeddings of real photos."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from launching import REPOSITORY, Started
from PIL import Image
from safetensors.torch import load_file
from small_run import make_run, pack_photos, random_backbone
from torch import Tensor, nn

from trainer import export, shards
from trainer.augment import build_eval_transform
from trainer.config import protocol_from_dict
from trainer.embed import Embeddings
from trainer.errors import UserError
from trainer.export import fold_neck
from trainer.head import ClassShard, initial_rows
from trainer.models import embed_data, judge_models
from trainer.options import load

CLASSES = {"arch": 5, "bird": 4, "cup": 6}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_photos(tmp_path_factory.mktemp("photos"), "train", CLASSES, size=(32, 32))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    run = make_run(tmp_path_factory.mktemp("runs"), data)
    export.export(run, formats=export.FORMATS)
    return run


def images_of(data: Path) -> list[Image.Image]:
    return [Image.open(path) for path in sorted(data.with_name("train-images").rglob("*.png"))]


def expected_features(run: Path, images: list[Image.Image]) -> Tensor:
    """The model as training has it, on our own evaluation transform."""
    config = load(run / "config.yaml")
    transform = build_eval_transform(image_size=32)
    pixels = [transform(torch.from_numpy(np.array(image)).permute(2, 0, 1)) for image in images]
    with torch.no_grad():
        return F.normalize(random_backbone(config)(torch.stack(pixels)))


@pytest.mark.parametrize("neck", ["none", "linear", "bn_linear", "bn_linear_bn"])
def test_timm_alone_gives_the_same_embeddings_of_photos(tmp_path, data, neck):
    dim = 512 if neck == "none" else 12
    run = make_run(tmp_path, data, neck=neck, embedding_dim=dim)
    out = export.export(run).folder
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        found = F.normalize(model(torch.stack([transform(image) for image in images_of(data)])))
    expected = expected_features(run, images_of(data))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert expected.std(0).mean() > 1e-3  # the photos do not all look the same to it


def test_photos_of_another_size_differ_by_the_rounding_of_the_resize_only(run):
    """PIL resizes for timm, torch for us: pixels differ by one of 255 at most."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 12, 3), np.uint8)).resize((57, 45))
    model = timm.create_model(f"local-dir:{run / 'export'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        found = F.normalize(model(transform(photo)[None]))
    torch.testing.assert_close(found, expected_features(run, [photo]), rtol=0, atol=5e-3)


def test_a_folded_neck_is_the_neck_in_float64():
    torch.manual_seed(0)
    neck = nn.Sequential(nn.BatchNorm1d(7), nn.Dropout(0.5), nn.Linear(7, 5), nn.BatchNorm1d(5)).double()
    for norm in (neck[0], neck[3]):
        for tensor in (norm.running_mean, norm.weight.data, norm.bias.data):
            tensor.normal_()
        norm.running_var.uniform_(0.1, 3.0)
    x_NF = torch.randn(11, 7, dtype=torch.float64)
    weight_DF, bias_D = fold_neck(neck.eval(), 7)
    torch.testing.assert_close(x_NF.float() @ weight_DF.T + bias_D, neck(x_NF).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 5])
def test_onnx_takes_pixels_in_any_number_and_gives_unit_features(run, data, count):
    images = images_of(data)[:count]
    session = onnxruntime.InferenceSession(run / "export" / "model.onnx", providers=["CPUExecutionProvider"])
    pixels = np.stack([np.array(image).transpose(2, 0, 1) for image in images])
    assert pixels.dtype == np.uint8
    (found,) = session.run(None, {"images": pixels})
    torch.testing.assert_close(torch.from_numpy(found), expected_features(run, images), rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_torch_export_gives_the_same(run, data):
    images = images_of(data)
    program = torch.export.load(run / "export" / "model.pt2").module()
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    torch.testing.assert_close(program(pixels), expected_features(run, images), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_torchscript_gives_the_same(run, data):
    images = images_of(data)
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    program = torch.jit.load(run / "export" / "model.ts")
    torch.testing.assert_close(program(pixels), expected_features(run, images), rtol=0, atol=1e-6)


def test_centroids_are_the_unit_rows_in_the_order_of_the_names(run):
    out = run / "export"
    found = load_file(out / "centroids.safetensors")
    rows = initial_rows(9, ClassShard(0, 3, 3), 12)
    torch.testing.assert_close(found["centroids"], F.normalize(rows.double()).float())
    assert json.loads((out / "classes.json").read_text()) == ["arch", "bird", "cup"]


def test_centroids_are_streamed_in_blocks(run, tmp_path, monkeypatch):
    trained = export.open_trained(run)
    stream, blocks = type(trained).stream_rows, []

    def two_at_a_time(self):
        for low, tensors in stream(self, block=2):
            blocks.append((low, len(tensors["parameter.centroids_CD"])))
            yield low, tensors

    monkeypatch.setattr(type(trained), "stream_rows", two_at_a_time)
    export.write_centroids(trained, tmp_path / "c.safetensors")
    assert blocks == [(0, 2), (2, 1)]
    whole = load_file(run / "export" / "centroids.safetensors")["centroids"]
    assert torch.equal(load_file(tmp_path / "c.safetensors")["centroids"], whole)


def test_the_example_of_the_model_card_runs_with_timm_alone(run, data, tmp_path, monkeypatch, capsys):
    card = (run / "export" / "README.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "trainer" not in program
    assert len([line for line in program.splitlines() if line]) <= 10
    for name, image in zip("ab", images_of(data)[:2], strict=True):
        image.save(tmp_path / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    exec(program.replace("FOLDER", str(run / "export")), {})  # in this process: starting one costs 6 s
    a, b = expected_features(run, images_of(data)[:2])
    assert float(capsys.readouterr().out.split()[-1]) == pytest.approx(float(a @ b), abs=1e-5)


def test_the_model_card_tells_where_the_model_comes_from(run, data):
    card = (run / "export" / "README.md").read_text()
    fingerprint = json.loads((data / "index" / "index.json").read_text())["fingerprint"]
    for part in (
        fingerprint,
        "| same/accuracy | 0.7500 |",
        "resnet10t",
        "licence",
        "license: other",
        "step 7",
    ):
        assert part in card
    config = json.loads((run / "export" / "config.json").read_text())
    assert config["pretrained_cfg"]["license"] == "other"  # not that of timm's weights


def message_of(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        export.export(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_exported_is_refused_in_one_line(run, data, tmp_path, monkeypatch):
    assert message_of(run) == f"--out: {run / 'export'} exists already; --overwrite replaces it"
    assert message_of(tmp_path / "none").startswith(f"{tmp_path / 'none'}: neither a run folder nor")
    (tmp_path / "empty").mkdir()
    assert message_of(tmp_path / "empty") == f"{tmp_path / 'empty'}: holds no complete checkpoint"
    lenet = make_run(tmp_path, data, name="lenet", backbone_name="lenetpp", neck="linear")
    assert message_of(lenet).startswith("--format: timm has no lenetpp")
    monkeypatch.setattr(export, "TOLERANCE", 1e-12)
    assert message_of(run, tmp_path / "out").startswith("--format: timm does not reproduce this model")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".out", "out"))]


def test_only_an_export_is_overwritten(run, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("1")
    monkeypatch.chdir(tmp_path)
    for out, foreign in ((tmp_path / "mine", "precious.txt"), (Path("."), "mine"), (run, "checkpoints")):
        expected = f"--out: {out.resolve()} holds {foreign}, which is not of an export; choose another folder"
        assert message_of(run, out, overwrite=True) == expected
    file = tmp_path / "mine" / "precious.txt"
    assert message_of(run, file, overwrite=True) == f"--out: {file} is not a folder"
    assert message_of(run, file / "x").startswith(f"--out: {file / 'x'}: cannot write: ")
    shutil.copytree(run / "export", tmp_path / "old")
    (tmp_path / "old" / "README.md").unlink()
    export.export(run, tmp_path / "old", overwrite=True)
    assert (tmp_path / "old" / "README.md").is_file()


def test_an_image_to_check_on_that_is_broken_is_named(run, tmp_path):
    shards.write_shards([(b"broken", "png", 0)], tmp_path / "data", ["arch"])
    assert message_of(run, tmp_path / "out", images=tmp_path / "data").startswith(
        "--images: shard data-000000.tar, sample 000000000.png: cannot decode"
    )


def test_centroids_are_whole_or_absent(run, tmp_path, monkeypatch):
    trained = export.open_trained(run)
    with pytest.raises(UserError, match=r"no/c.safetensors: cannot write: No such file or directory"):
        export.write_centroids(trained, tmp_path / "no" / "c.safetensors")
    monkeypatch.setattr(export, "rows_name", lambda tensors, judge: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export.write_centroids(trained, tmp_path / "c.safetensors")
    assert not (tmp_path / "c.safetensors").exists()


@pytest.mark.nightly
def test_the_command_says_what_it_wrote(tmp_path, data):
    run = make_run(tmp_path, data, name="lenet", backbone_name="lenetpp", neck="linear")
    program = REPOSITORY / "launch" / "export.py"
    done = Started(sys.executable, program, run, "--format", "torch", "--input", "float32", "--json").wait()
    assert done.code == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["out"] == str(run / "export")
    assert said["differences"]["torch"] < 1e-6


def test_what_was_exported_is_judged_and_embeds_like_the_run(run, data, tmp_path):
    config = protocol_from_dict({"protocol": "closed_set", "data": str(data), "ks": [1, 2]})
    paths = [run, run / "export", run / "export" / "model.onnx"]
    of_run, *others = judge_models(paths, config).values()
    assert of_run["eval/closed_set/num_images"] == 15
    assert others == [of_run, of_run]
    found = []
    for number, path in enumerate(paths):
        out = tmp_path / str(number)
        summary = embed_data(path, data, out, dtype="float32", rows_per_file=8, batch_size=4, workers=0)
        assert summary["model"].startswith(f"{run.resolve()}/")
        found.append(F.normalize(Embeddings(out, "OUT").load(torch.device("cpu")).embeddings_ND))
    for features_ND in found[1:]:
        torch.testing.assert_close(features_ND, found[0], rtol=0, atol=2e-6)


def test_a_folder_that_timm_cannot_load_is_refused_in_one_line(run, data, tmp_path):
    config = protocol_from_dict({"protocol": "open_set", "data": str(data)})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="timm cannot load it: ") as caught:
        judge_models([tmp_path], config)
    assert "\n" not in str(caught.value)
    dist.destroy_process_group()  # a failed command leaves its group to the end of the process
    shutil.copytree(run / "export", tmp_path / "cropped")
    found = json.loads((tmp_path / "cropped" / "config.json").read_text())
    found["pretrained_cfg"]["crop_pct"] = 0.9
    (tmp_path / "cropped" / "config.json").write_text(json.dumps(found))
    with pytest.raises(
        UserError, match=r"config.json: input is 32 x 32 and crop_pct 0.9, not a square and 1.0"
    ):
        judge_models([tmp_path / "cropped"], config)
    dist.destroy_process_group()
