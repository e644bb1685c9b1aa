"""The benchmark as a user runs it: its own ranks, JSON on stdout, figures that hang together."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_run import pack_photos

from launch.benchmark import build_parser
from trainer.benchmark_train import TrainCase, measure_training
from trainer.config import from_dict
from trainer.databench import DataCase, measure_data
from trainer.distributed import joined_world
from trainer.errors import UserError
from trainer.shards import write_shards

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--classes", "3001", "--dim", "64", "--batch", "24", "--steps", "3")


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launch/benchmark.py", "head", *arguments],
        cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def result_of(*arguments: str) -> dict[str, Any]:
    done = benchmark(*arguments)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()  # one JSON object and nothing else
    return dict(json.loads(line))


def test_a_line_holds_what_was_asked_and_figures_that_hang_together() -> None:
    found = result_of(*SMALL, "--ranks", "2", "--against", "textbook")
    asked = {"classes": 3001, "dim": 64, "global_batch": 24, "ranks": 2, "dtype": "float32", "threads": 1}
    assert {key: found[key] for key in asked} == asked
    assert found["name"] == "head-fused"
    assert found["state_bytes_per_rank"] == 1501 * 64 * 4 * 2  # rows and momentum of the larger shard
    assert 0 < found["gemm_seconds"] < found["step_seconds"]
    assert found["speedup"] == pytest.approx(found["textbook_seconds"] / found["step_seconds"])
    assert 0 <= found["peak_extra_bytes_per_rank"] < 128 << 20


def test_the_loss_depends_neither_on_ranks_nor_on_the_way_of_updating() -> None:
    one, two = result_of(*SMALL), result_of(*SMALL, "--ranks", "3", "--update", "autograd")
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
    assert "gemm_seconds" not in two
    half = result_of(*SMALL, "--dtype", "bfloat16")
    assert half["loss"] == pytest.approx(one["loss"], rel=1e-2)
    assert half["state_bytes_per_rank"] == 3001 * 64 * 2 * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--classes", "10", "--batch", "25", "--ranks", "2"), "--batch: 25 is not divisible by 2 ranks"),
        (("--classes", "2", "--batch", "3", "--ranks", "3"), "--classes: 2 classes cannot be cut over 3"),
        (("--classes", "100000000000", "--batch", "2"), "needs 409600000000000 bytes on this host"),
        (("--classes", "1"), "--classes: must be a whole number of at least 2, not 1"),
        (("--classes", "2", "--dim", "0"), "--dim: must be a whole number of at least 1, not 0"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = benchmark(*arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_negative_number_of_distractors_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["judge", "x", "--images", "5", "--distractors", "-5"])
    assert "--distractors: must be a whole number of at least 0, not -5" in capsys.readouterr().err


def test_reading_is_measured_stage_by_stage_beside_the_usual_ways(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    samples = []
    for i, pixels in enumerate(noise):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        samples.append((buffer.getvalue(), "jpg", i % 3))
    write_shards(samples, tmp_path / "packed", ["a", "b", "c"], samples_per_shard=8)
    case = DataCase(
        folder=tmp_path / "packed",
        workers=1,
        against=("webdataset", "pil"),
        batch=8,
        image_size=16,
        images=20,
        rounds=1,
    )
    found = {figures["name"]: figures for figures in measure_data(case)}
    assert list(found) == ["data-read", "data-decode", "data-batch", "data-loader"]
    assert found["data-loader"]["workers"] == 1
    for stage, ways in {"read": ("webdataset", "pil"), "decode": ("pil",), "batch": ("pil",)}.items():
        figures = found[f"data-{stage}"]
        for way in ways:
            speedup = figures["images_per_second"] / figures[f"{way}_images_per_second"]
            assert figures[f"speedup_over_{way}"] == pytest.approx(speedup)
            ratio = figures[f"{way}_cpu_seconds_per_1000"] / figures["cpu_seconds_per_1000"]
            assert figures[f"cpu_ratio_to_{way}"] == pytest.approx(ratio)
    with pytest.raises(UserError, match="--batch: 21 is more than the 20 images"):
        next(measure_data(dataclasses.replace(case, batch=21)))
    with pytest.raises(UserError, match=r"--workers: webdataset needs a shard for each, .* has 3"):
        next(measure_data(dataclasses.replace(case, workers=4)))
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    write_shards([(buffer.getvalue()[:-40], "jpg", 0)] * 3, tmp_path / "cut", ["only"])
    with pytest.raises(UserError, match=r"^FOLDER: shard data-000000.tar, sample \S+.jpg: cannot decode: "):
        next(measure_data(dataclasses.replace(case, folder=tmp_path / "cut", batch=1)))


def test_a_step_is_measured_beside_a_plain_loop_that_computes_the_same(tmp_path: Path) -> None:
    photos = pack_photos(tmp_path, "photos", {"a": 5, "b": 4, "c": 7})
    tree = {
        "data": {"train": photos, "batch_size": 8, "workers": 0},
        "backbone": {"name": "lenetpp", "image_size": 12, "embedding_dim": 5, "neck": "bn_linear"},
        "engine": {"accumulation_steps": 2, "dtype": "float32"},
        "optim": {"name": "sgd", "steps": 3},
    }  # fmt: skip
    with joined_world(30.0) as world:
        case = TrainCase(config=from_dict(tree), steps=2, against="plain")
        found = measure_training(case, world)
        asked = {"classes": 3, "dim": 5, "global_batch": 8, "ranks": 1, "dtype": "float32", "workers": 0}
        assert {key: found[key] for key in asked} == asked
        assert found["plain_loss"] == pytest.approx(found["loss"], rel=1e-5)
        assert found["images_per_second"] == pytest.approx(8 / found["step_seconds"])
        assert found["speedup"] == pytest.approx(found["plain_seconds"] / found["update_seconds"])
        assert 0 < found["data_wait_fraction"] < 1
        assert not (tmp_path / "runs").exists()
        other = dataclasses.replace(case, config=from_dict(tree | {"loss": {"name": "softmax"}}))
        with pytest.raises(
            UserError, match=r"^--against plain: computes the COCO loss, not loss\.name=softmax$"
        ):
            measure_training(other, world)


def test_a_checkpoint_s_line_tells_pause_and_memory(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "launch/benchmark.py", "checkpoint", "--classes", "20001", "--dim", "128",
            "--rounds", "1", "--folder", str(tmp_path),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bytes"] == 20001 * 128 * 4 * 2
    assert found["async_copy_bytes_per_rank"] == 20001 * 128 * 4 * 2
    assert 0 < found["async_pause_seconds"] < found["async_behind_seconds"] + found["blocking_seconds"]
    assert 0 < found["async_pause_cpu_seconds"] <= found["async_pause_seconds"]
    assert 0.5 < found["load_memory_factor"] < 2.5  # a buffer of 16 MiB beside a state of 20
    assert not list(tmp_path.iterdir())
