import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_shards import every_file, png

from trainer import packing
from trainer.check import check
from trainer.decode import decode
from trainer.errors import UserError
from trainer.index import is_packed, open_index
from trainer.jobs import Jobs
from trainer.order import epoch_order
from trainer.packing import pack
from trainer.sources import (
    Source,
    image_folder,
    reencoded,
    split_by_class,
    split_by_sample,
    with_enough_images,
)
from trainer.sources.pictures import recode

REPOSITORY = Path(__file__).resolve().parent.parent


def make_source(count: int = 23, **more) -> Source:
    return Source([f"c{i % 3}" for i in range(count)], lambda i: (png(i), "png"), **more)


def test_every_sample_is_written_once_in_the_keyed_order(tmp_path):
    packed = pack(make_source(), tmp_path / "out", samples_per_shard=5, seed=4)
    order = epoch_order(23, 4, 0).tolist()
    assert [packed.read(i) for i in range(23)] == [png(i) for i in order]
    assert packed.labels_N.tolist() == [i % 3 for i in order]
    assert [shard.n for shard in packed.shards] == [5, 5, 5, 5, 3]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *(f"data-00000{i}.tar" for i in range(5)),
        "index",
    ]


def test_the_number_of_processes_changes_no_byte_but_the_seed_does(tmp_path):
    counted = Counter()
    for jobs in (1, 2, 4):
        told = Jobs(jobs, told=lambda count, jobs=jobs: counted.update({jobs: count}))
        pack(make_source(notes=lambda i: {"i": i}), tmp_path / str(jobs), samples_per_shard=4, jobs=told)
    assert counted == {1: 23, 2: 23, 4: 23}
    names = {"index/classes.png"}  # its title is the folder's name
    first, *others = [
        {name: content for name, content in every_file(tmp_path / str(jobs)).items() if name not in names}
        for jobs in (1, 2, 4)
    ]
    assert all(other == first for other in others)
    assert len(first) == 6 + 4
    other_seed = pack(make_source(), tmp_path / "seed", samples_per_shard=4, seed=1)
    assert other_seed.fingerprint != open_index(tmp_path / "1", "").fingerprint


def test_notes_are_read_back_by_the_index(tmp_path):
    packed = pack(
        make_source(notes=lambda i: {"i": i, "who": "caf\u00e9"}), tmp_path / "a", samples_per_shard=9
    )
    order = epoch_order(23, 0, 0).tolist()
    assert [packed.read_note(i) for i in range(23)] == [{"i": i, "who": "caf\u00e9"} for i in order]
    assert pack(make_source(), tmp_path / "b").read_note(3) == {}


def test_pairs_are_written_by_key(tmp_path):
    pairs = [(0, 5, True, 0), (22, 1, False, 3)]
    packed = pack(make_source(pairs=pairs), tmp_path / "out", samples_per_shard=9)
    head, *lines = (tmp_path / "out" / "pairs.csv").read_text().splitlines()
    assert head == "key1,key2,same,fold"
    for line, (first, second, same, fold) in zip(lines, pairs, strict=True):
        key1, key2, *rest = line.split(",")
        assert rest == [str(int(same)), str(fold)]
        assert packed.read(int(key1)) == png(first)
        assert packed.read(int(key2)) == png(second)
    pack(make_source(), tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "pairs.csv").exists()


def interrupted(tmp_path: Path, after: int, source: Source, **options) -> Path:
    """Pack until so many images were read, and no further; returns OUT."""
    left = [after]

    def read(i: int) -> tuple[bytes, str]:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return png(i), "png"

    broken = Source(source.classes, read, files=source.files, variant=source.variant)
    with pytest.raises(KeyboardInterrupt):
        pack(broken, tmp_path / "out", samples_per_shard=5, **options)
    assert not is_packed(tmp_path / "out")
    return tmp_path / "out"


def test_finished_shards_are_kept_verified_and_the_half_one_is_written_again(tmp_path):
    out = interrupted(
        tmp_path, packing.PROBES + 5 + 5 + 2 - 9, make_source()
    )  # 23 probes; two shards and a bit
    staging = out / ".partial"
    assert sorted(path.name for path in staging.glob("*.tar")) == ["data-000000.tar", "data-000001.tar"]
    damaged = staging / "data-000001.tar"
    damaged.write_bytes(damaged.read_bytes().replace(b"PNG", b"GNP", 1))
    kept = (staging / "data-000000.tar").stat().st_ino
    reads = []

    def read(i: int) -> tuple[bytes, str]:
        reads.append(i)
        return png(i), "png"

    source = make_source()
    pack(Source(source.classes, read), out, samples_per_shard=5)
    assert len(reads) == 23 + 18  # the probes, and all but the first shard
    assert (out / "data-000000.tar").stat().st_ino == kept
    pack(make_source(), tmp_path / "at once" / "out", samples_per_shard=5)
    assert every_file(out) == every_file(tmp_path / "at once" / "out")


@pytest.mark.parametrize("change", ["file", "seed", "variant", "classes"])
def test_another_plan_starts_again(tmp_path, change):
    file = tmp_path / "list"
    file.write_text("a")
    out = interrupted(tmp_path, 23 + 12, make_source(files=[file]))
    inode = (out / ".partial" / "data-000000.tar").stat().st_ino
    if change == "file":
        file.write_text("bb")
    os.link(out / ".partial" / "data-000000.tar", tmp_path / "held")  # its inode cannot come again
    source = make_source(24 if change == "classes" else 23, files=[file], variant="x" * (change == "variant"))
    pack(source, out, samples_per_shard=5, seed=int(change == "seed"))
    assert (out / "data-000000.tar").stat().st_ino != inode


def test_a_pack_killed_with_its_processes_goes_on(tmp_path):
    """SIGKILL of the parent ends the writers as well, and the lock with them."""
    program = f"""
import sys, time
sys.path[:0] = [{str(REPOSITORY)!r}, {str(REPOSITORY / "tests")!r}]
from pathlib import Path
from test_packing import make_source, pack, Jobs, Source
source = make_source()
slow = Source(source.classes, lambda i: (time.sleep(0.03), source.read(i))[1])
pack(slow, Path({str(tmp_path / "out")!r}), samples_per_shard=3, jobs=Jobs(2))
"""
    process = subprocess.Popen([sys.executable, "-c", program])
    staging = tmp_path / "out" / ".partial"
    deadline = time.monotonic() + 60
    while len(list(staging.glob("*.npz"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(UserError, match="out: another process is packing into it"):
        pack(make_source(), tmp_path / "out", samples_per_shard=3)
    process.kill()
    process.wait()
    time.sleep(0.2)
    kept = {path.name: path.stat().st_ino for path in staging.glob("data-*.npz")}
    assert len(kept) >= 2
    kept = {n: (staging / n).with_suffix(".tar").stat().st_ino for n in kept}
    pack(make_source(), tmp_path / "out", samples_per_shard=3)
    assert {n: (tmp_path / "out" / n).with_suffix(".tar").stat().st_ino for n in kept} == kept
    pack(make_source(), tmp_path / "at once" / "out", samples_per_shard=3)
    assert every_file(tmp_path / "out") == every_file(tmp_path / "at once" / "out")


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 23 * 2100))
    with pytest.raises(UserError, match=r"out: about 0\.00 GB are needed, its disk has 0\.00 GB free"):
        pack(make_source(), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tar*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 23 * 2600))
    assert pack(make_source(), tmp_path / "out").num_samples == 23


def test_an_image_that_cannot_be_read_is_named_from_any_process(tmp_path):
    def read(i: int) -> tuple[bytes, str]:
        if i == 17 and (tmp_path / "out" / ".partial" / "data-000000.npz").exists():
            raise UserError("seventeen.png: cannot read")
        return png(i), "png"

    order = epoch_order(23, 0, 0).tolist()
    assert order.index(17) >= 2
    with pytest.raises(UserError, match=r"^seventeen\.png: cannot read$"):
        pack(Source(make_source().classes, read), tmp_path / "out", samples_per_shard=2, jobs=Jobs(2))


def test_copies_are_counted_and_those_with_another_label_too(tmp_path):
    shown = [0, 1, 2, 0, 0, 1, 5, 6]
    source = Source(list("abcabbca"), lambda i: (png(shown[i]), "png"))
    assert pack(source, tmp_path / "out").duplicates == {"images": 3, "of_other_classes": 1}


def test_split_by_sample_takes_the_fraction_of_every_class_and_loses_nothing():
    source = Source(["a"] * 10 + ["b"] * 5 + ["c"], lambda i: (b"%d" % i, "png"), notes=lambda i: {"i": i})
    halves = split_by_sample(source, 0.2, seed=1)
    assert {name: Counter(half.classes) for name, half in halves.items()} == {
        "train": {"a": 8, "b": 4, "c": 1},
        "test": {"a": 2, "b": 1},
    }
    images = {name: [image for image, _, _ in half] for name, half in halves.items()}
    assert sorted(images["train"] + images["test"]) == sorted(image for image, _, _ in source)
    assert [halves["test"].notes(i)["i"] for i in range(3)] == [int(image) for image in images["test"]]
    assert list(split_by_sample(source, 0.2, seed=1)["test"]) == list(halves["test"])
    assert list(split_by_sample(source, 0.2, seed=2)["test"]) != list(halves["test"])
    with pytest.raises(UserError, match="0 of 16 images are for the test"):
        split_by_sample(source, 0.01, seed=1)


def test_split_by_class_leaves_no_class_on_both_sides():
    source = Source([f"c{i % 10}" for i in range(40)], lambda i: (b"%d" % i, "png"))
    halves = split_by_class(source, 0.3, seed=0)
    train, test = (set(halves[name].classes) for name in ("train", "test"))
    assert (len(train), len(test), train & test) == (7, 3, set())
    assert len(halves["train"]) + len(halves["test"]) == 40
    assert set(split_by_class(source, 0.3, seed=1)["test"].classes) != test
    with pytest.raises(UserError, match=r"--split class 0\.01: 0 of 10 classes"):
        split_by_class(source, 0.01, seed=0)


def test_small_classes_are_dropped_and_protocols_are_not_cut():
    source = Source(list("aabbbc"), lambda i: (b"%d" % i, "png"))
    assert [(image, name) for image, _, name in with_enough_images(source, 3)] == [
        (b"2", "b"),
        (b"3", "b"),
        (b"4", "b"),
    ]
    with pytest.raises(UserError, match="--min-per-class 4: the largest class has 3 images"):
        with_enough_images(source, 4)
    paired = Source(list("aabb"), source.read, pairs=[(0, 1, True, 0)])
    with pytest.raises(UserError, match="--split: this set has a protocol of pairs"):
        split_by_sample(paired, 0.5, 0)


def test_images_are_scaled_down_never_up_and_encoded_again_as_asked(tmp_path):
    for name, mode, size in (("a.png", "RGB", (60, 40)), ("b.jpg", "L", (20, 90)), ("c.png", "1", (8, 9))):
        Image.new(mode, size, 1).save(tmp_path / name)
    names = ["a.png", "b.jpg", "c.png"]
    source = Source(names, lambda i: ((tmp_path / names[i]).read_bytes(), names[i][-3:]))

    def shapes(*options) -> list[tuple]:
        found = []
        for i, (content, extension, _) in enumerate(reencoded(source, *options)):
            (tmp_path / "x").write_bytes(content)
            with Image.open(tmp_path / "x") as image:
                found.append((image.format, extension, image.size, content == source.read(i)[0]))
        return found

    assert shapes(20, None) == [
        ("PNG", "png", (30, 20), False),
        ("JPEG", "jpg", (20, 90), True),
        ("PNG", "png", (8, 9), True),
    ]
    assert [shape[:3] for shape in shapes(None, 80)] == [
        ("JPEG", "jpg", (60, 40)),
        ("JPEG", "jpg", (20, 90)),
        ("JPEG", "jpg", (8, 9)),
    ]
    (tmp_path / "a.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"sample 0 of class a\.png: cannot decode: not an image"):
        shapes(20, None)


def test_the_summary_says_what_is_in_a_folder(tmp_path):
    found = packing.summarize(pack(make_source(), tmp_path / "out"))
    assert json.loads(json.dumps(found)) == found
    sizes = np.array([len(png(i)) for i in range(23)])
    assert found["image_bytes"] == {"min": sizes.min(), "mean": sizes.mean(), "max": sizes.max()}
    assert found["bytes"] == (tmp_path / "out" / "data-000000.tar").stat().st_size
    assert (tmp_path / "out" / "index" / "classes.png").read_bytes().startswith(b"\x89PNG")


def test_who_waits_to_pack_does_not_replace_what_another_has_finished(tmp_path, monkeypatch):
    def finish_first(staging, out):
        monkeypatch.undo()
        pack(make_source(4), out)
        staging.mkdir()
        return contextlib.nullcontext()

    monkeypatch.setattr(packing, "_lock", finish_first)
    with pytest.raises(UserError, match="already holds a packed data set"):
        pack(make_source(9), tmp_path / "out")
    assert open_index(tmp_path / "out", "x").num_samples == 4


@pytest.mark.parametrize("quality", [None, 95])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_a_smaller_image_is_what_training_would_have_seen_made_smaller(mode, quality):
    values = np.random.default_rng(0).integers(0, 256, (12, 16, 4), dtype=np.uint8)
    image = Image.fromarray(values, "RGBA")
    if mode == "I;16":
        image = Image.fromarray(values[..., 0].astype(np.uint16) << 8 | 7)
    elif mode != "RGBA":
        image = image.convert("RGB" if mode in ("1", "CMYK") else "RGBA").convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if mode == "CMYK" else "PNG", **({"quality": 100} if mode == "CMYK" else {}))
    small, extension = recode(buffer.getvalue(), "jpg" if mode == "CMYK" else "png", 6, quality)
    seen = Image.fromarray(decode(buffer.getvalue(), 3).permute(1, 2, 0).numpy())
    expected = np.asarray(seen.resize((8, 6), Image.Resampling.LANCZOS)).astype(int)
    found = decode(small, 3).permute(1, 2, 0).numpy().astype(int)
    lossless = extension == "png"
    assert np.abs(found - expected).mean() <= (1 if lossless else 25)  # random pixels are hard for JPEG
    assert lossless == (quality is None and mode != "CMYK")


def test_images_of_any_name_and_kind_come_out_as_they_went_in(tmp_path):
    colours = Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    files = {
        "a class/img 1.JPG": (colours, "JPEG"),
        "a class/img.with.dots.JPEG": (colours.convert("L"), "JPEG"),
        "\u00fcn\u00ef/\u65e5\u672c.jpg": (colours.convert("CMYK"), "JPEG"),
        "-rf/'quote\".png": (colours.convert("P"), "PNG"),
        "%20+&/x;y$(z).PNG": (colours.convert("RGBA"), "PNG"),
        "new\nline/\x1b[2J.png": (
            Image.fromarray(np.arange(0, 63000, 1000, dtype=np.uint16).reshape(9, 7)),
            "PNG",
        ),
        "only/one.WEBP": (colours, "WEBP"),
    }
    seen = []
    for name, (image, kind) in files.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, kind)
        seen.append((path.parent.name, decode(path.read_bytes(), 3).numpy().tobytes()))
    packed = pack(image_folder(tmp_path / "in"), tmp_path / "out", samples_per_shard=3)
    names = [packed.class_names[label] for label in packed.labels_N]
    images = [decode(packed.read(i), 3).numpy().tobytes() for i in range(len(files))]
    assert sorted(zip(names, images, strict=True)) == sorted(seen)
    assert check(tmp_path / "out").problems == []


def test_a_name_that_is_not_text_is_refused_before_anything_is_written(tmp_path):
    folder = os.fsencode(tmp_path / "in") + b"/\xff\xfe"
    os.makedirs(folder)
    Path(os.fsdecode(folder + b"/a.png")).write_bytes(png(0))
    with pytest.raises(UserError, match=r"class '.udcff.udcfe' has a name that is not UTF-8; rename it"):
        pack(image_folder(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_image_that_no_index_would_take_is_told_first_or_by_its_place(tmp_path, monkeypatch):
    for i in range(3):
        (tmp_path / "in" / "ant").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "ant" / f"{i}.png").write_bytes(png(i) if i else b"")
    with pytest.raises(UserError, match=r"/in/ant/0\.png is empty"):
        pack(image_folder(tmp_path / "in"), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tar"))
    monkeypatch.setattr(packing, "MAX_IMAGE_BYTES", 4)
    with pytest.raises(UserError, match=r"sample \d of class c\d: image is empty or above"):
        pack(make_source(3), tmp_path / "other")
