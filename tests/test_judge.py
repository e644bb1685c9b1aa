"""Protocols from files to figures: what the sets hold reaches the formulas, on any number of ranks.

The formulas themselves are tested in test_ranking.py, test_pairs.py and test_protocols.py.
Dimensions: N images, D feature.
"""

import dataclasses
import io
import json
import sys
import tarfile
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerator import accelerated
from patterns import MODEL, embed, embedded, pattern, save, save_album, save_lfw
from PIL import Image
from ranks import run_on_ranks
from torch import Tensor

from launch import embed as embed_command
from launch import evaluate
from trainer.bench import Model
from trainer.config import InvalidConfigError, ProtocolConfig, protocol_from_dict
from trainer.distributed import World, joined_world
from trainer.embed import Embeddings, claim, write_embeddings, write_rows
from trainer.errors import UserError
from trainer.imagesets import open_images
from trainer.judge import check, judge
from trainer.metrics import verification
from trainer.protocols.ranking import images_of
from trainer.protocols.retrieval import retrieval
from trainer.shards import build_index
from trainer.sources import image_folder


def pack(folder: Path, samples: list[tuple[str, int, int, dict[str, Any]]], note: str = "json") -> None:
    """Write (key, identity, number, notes) as a tar with KEY.json, labels being identities, and index it."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "data-000000.tar", "w") as tar:
        for key, identity, number, notes in samples:
            image = io.BytesIO()
            Image.fromarray(pattern(identity, number)).save(image, "PNG")
            parts = {
                "cls": str(identity).encode(),
                note: json.dumps(notes).encode(),
                "png": image.getvalue(),
            }
            for extension, content in parts.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    build_index(folder, [f"person{i}" for i in range(1 + max(identity for _, identity, *_ in samples))])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("protocols")
    save_lfw(root / "lfw")
    query = [(f"q{i}", i % 4, i, {"person": f"{i % 4 + 1:04d}", "camera": i % 3}) for i in range(11)]
    gallery = [(f"g{i}", i % 6, 50 + i, {"person": i % 6 - 1, "camera": i % 3}) for i in range(23)]
    pack(root / "query", query)
    pack(root / "gallery", gallery)
    for number in range(70):
        save(root / "crowd" / "nobody" / f"{number}.png", 100 + number, number)
    return root


def protocol(name: str, data: Path, **more: Any) -> ProtocolConfig:
    return protocol_from_dict({"protocol": name, "data": str(data), **more})


def judge_on_rank(world: World, config: ProtocolConfig, model: Model | None = MODEL) -> dict[str, float]:
    return dict(judge(config, model, world, lambda path: MODEL))


def judged(config: ProtocolConfig, num_ranks: int = 1) -> dict[str, float]:
    """Return the figures, after a look that every rank has the same."""
    first, *others = run_on_ranks(judge_on_rank, num_ranks, config)
    assert all(other == first for other in others)
    return first


def configs(root: Path) -> dict[str, ProtocolConfig]:
    album = save_album(root / "album") if not (root / "album").exists() else root / "album"
    lfw, gallery = root / "lfw", str(root / "gallery")
    return {
        "pairs": protocol("pairs", lfw, bootstrap=20, fars=[0.9]),
        "pairs-flip": protocol("pairs", lfw, flip=True),
        "open_set": protocol("open_set", lfw, bootstrap=20, fars=[0.1]),
        "closed_set": protocol("closed_set", root / "query", gallery=gallery),
        "retrieval": protocol("retrieval", root / "query", gallery=gallery, bootstrap=20),
        "identification": protocol("identification", root / "query", gallery=gallery),
        "reid": protocol("reid", root / "query", gallery=gallery, rerank=True),
        "distractors": protocol("distractors", lfw, distractors=str(root / "crowd"), sizes=[5, 60]),
        "few_shot": protocol("few_shot", lfw, ways=4, shots=2, queries=2, episodes=30),
        "persons": protocol("persons", album, splits=["time"], regions={"head": None, "upper": "runs/x"}),
    }


NAMES = (
    "pairs", "pairs-flip", "open_set", "closed_set", "retrieval", "identification", "reid", "distractors",
    "few_shot", "persons",
)  # fmt: skip


def judge_all_on_rank(world: World, cases: dict[str, ProtocolConfig]) -> dict[str, dict[str, float]]:
    return {name: judge_on_rank(world, config) for name, config in cases.items()}


@pytest.fixture(scope="module")
def figures(root: Path) -> dict[str, dict[str, float]]:
    """The figures of every protocol, equal to the bit on 1, 2 and 3 ranks."""
    alone, *_ = run_on_ranks(judge_all_on_rank, 1, configs(root))
    for num_ranks in (2, 3):
        for found in run_on_ranks(judge_all_on_rank, num_ranks, configs(root)):
            assert found == alone
    assert tuple(alone) == NAMES
    return alone


def judge_all_accelerated(
    world: World, cases: dict[str, ProtocolConfig]
) -> dict[str, dict[str, float] | str]:
    found: dict[str, dict[str, float] | str] = {}
    for name, config in cases.items():
        try:
            with accelerated(world) as world_there:
                found[name] = judge_on_rank(world_there, config)
        except Exception:
            found[name] = traceback.format_exc()
    return found


def test_an_accelerator_gives_the_same_figures(root: Path, figures: dict[str, dict[str, float]]) -> None:
    for found in run_on_ranks(judge_all_accelerated, 2, configs(root)):
        assert found == figures


def features_of(root: Path, name: str) -> tuple[Tensor, Tensor, list[Path]]:
    paths = sorted((root / name).rglob("*.png"))
    images = [torch.from_numpy(np.array(Image.open(path))) for path in paths]
    labels = torch.tensor([sorted({p.parent for p in paths}).index(path.parent) for path in paths])
    return F.normalize(torch.stack([embed(image[None, None])[0] for image in images])), labels, paths


def test_pairs_of_a_folder_are_those_of_its_file(root: Path, figures: dict[str, dict[str, float]]) -> None:
    lines = [line.split() for line in (root / "lfw" / "pairs.txt").read_text().splitlines()[1:]]
    scores, same = [], []
    for words in lines:
        name, i, *rest = words
        other, j = (name, *rest) if len(rest) == 1 else rest
        both = [
            F.normalize(embedded(int(who[1:]), int(number)), dim=0) for who, number in ((name, i), (other, j))
        ]
        scores.append(float(both[0].double() @ both[1].double()))
        same.append(name == other)
    found = figures["pairs"]
    assert found["num_pairs"] == 24
    right = [np.mean((np.array(scores) >= t) == same) for t in [*scores, 2]]
    assert found["accuracy_all"] == pytest.approx(max(right))
    assert 0.5 < found["accuracy"] <= found["accuracy_all"]
    assert found["accuracy_all_low"] <= found["accuracy_all"] <= found["accuracy_all_high"]
    assert {"accuracy_std", "auc", "eer", "tar@far=9e-1", "tar@far=9e-1_low"} <= found.keys()
    assert "tar@far=1e-1" not in found
    assert figures["pairs-flip"]["auc"] != found["auc"]


def test_all_pairs_of_a_folder(root: Path, figures: dict[str, dict[str, float]]) -> None:
    features_ND, labels_N, _ = features_of(root, "lfw")
    expected = verification(features_ND, labels_N, fars=(0.1,))
    found = figures["open_set"]
    assert (found["auc"], found["tar@far=1e-1"]) == (expected.auc, expected.tar_at_far[0.1])
    for name in ("auc", "best_accuracy", "eer", "tar@far=1e-1"):
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]
    assert found["bin_width"] == 0


def test_retrieval_from_a_gallery_joins_classes_by_name(figures: dict[str, dict[str, float]]) -> None:
    query = torch.stack([embedded(i % 4, i) for i in range(11)])
    gallery = torch.stack([embedded(i % 6, 50 + i) for i in range(23)])
    expected, _ = retrieval(
        images_of(F.normalize(query), torch.arange(11) % 4),
        images_of(F.normalize(gallery), torch.arange(23) % 6, first_id=100),
    )
    for name, values in expected.items():
        assert figures["retrieval"][name] == pytest.approx(float(values.mean()), abs=1e-15)
    assert figures["identification"]["rank1"] == figures["retrieval"]["recall@1"]
    assert figures["identification"]["num_strangers"] == 0


def test_closed_set_against_class_means_of_the_gallery(figures: dict[str, dict[str, float]]) -> None:
    means = torch.stack(
        [torch.stack([embedded(k, 50 + i) for i in range(k, 23, 6)]).double().mean(0) for k in range(6)]
    )
    query = torch.stack([embedded(i % 4, i) for i in range(11)]).double()
    labels = torch.arange(11) % 4
    by_angle = (F.normalize(query) @ F.normalize(means).T).argmax(1)
    by_distance = torch.cdist(query, means).argmin(1)
    found = figures["closed_set"]
    assert found["accuracy"] == pytest.approx(float((by_angle == labels).double().mean()))
    assert found["accuracy_euclidean"] == pytest.approx(float((by_distance == labels).double().mean()))
    wrong = int((by_angle != labels).sum())
    assert sum(value for name, value in found.items() if name.startswith("confused/")) == wrong


def test_reidentification_reads_persons_and_cameras_from_the_notes(
    figures: dict[str, dict[str, float]],
) -> None:
    """Gallery persons are -1 (junk), 0 (background), 1 .. 4; those of the queries 0001 .. 0004."""
    hits = []
    for q in range(11):
        probe = F.normalize(embedded(q % 4, q), dim=0).double()
        scores = {}
        for g in range(23):
            person, camera = g % 6 - 1, g % 3
            if person != -1 and not (person == q % 4 + 1 and camera == q % 3):
                scores[g] = float(probe @ F.normalize(embedded(g % 6, 50 + g), dim=0).double())
        if any(g % 6 - 1 == q % 4 + 1 for g in scores):
            hits.append(max(scores, key=scores.__getitem__) % 6 - 1 == q % 4 + 1)
    found = figures["reid"]
    assert found["num_queries"] == len(hits)
    assert found["rank1"] == pytest.approx(np.mean(hits))
    assert {"map", "minp", "reranked_map", "reranked_rank10"} <= found.keys()


def test_what_looks_like_a_number_of_a_person_is_a_name(root: Path, tmp_path: Path) -> None:
    for name, num in (("query", 11), ("gallery", 23)):
        rows = [f"{name[0]}{i},--5,{name}\n" for i in range(num)]
        (tmp_path / name).write_text("".join(["key,person,camera\n", *rows]))
    config = protocol(
        "reid", root / "query", gallery=str(root / "gallery"),
        notes=str(tmp_path / "query"), gallery_notes=str(tmp_path / "gallery"),
    )  # fmt: skip
    assert judged(config)["rank1"] == 1
    (tmp_path / "query").write_text(f"key,person\nq0,{'1' * 140_000}\n")
    with pytest.raises(UserError, match="query: cannot read notes: field larger than field limit"):
        open_images(root / "query", "--data").note("person", tmp_path / "query")


def test_distractors_are_cut_from_one_fixed_order(figures: dict[str, dict[str, float]]) -> None:
    found = figures["distractors"]
    assert (found["num_probes"], found["num_pairs"]) == (30, 6 * 5 * 4)
    assert 0 < found["rank1@60"] <= found["rank1@5"] <= found["rank10@5"] == 1
    assert {"tpir@fpir=1e-1@60"} & found.keys() == set()  # 30 probes cannot support it


def test_persons_of_an_album_are_recognised_by_their_regions(
    root: Path, figures: dict[str, dict[str, float]]
) -> None:
    found = figures["persons"]
    assert found["time/num_instances"] == 16
    assert found["time/weight_head"] + found["time/weight_upper"] == pytest.approx(1)
    features, identities, halves = [], [], []
    for line in (root / "album" / "split_test_time.txt").read_text().splitlines():
        photoset, photo, *numbers = line.split()
        x, y, w, h, identity, _, half = map(int, numbers)
        picture = Image.open(root / "album" / "test" / f"{photoset}_{photo}.jpg").convert("L")
        head = np.array(picture.crop((x, y, x + w, y + h)))
        features.append(F.normalize(embed(torch.from_numpy(head)[None, None])[0], dim=0).double())
        identities.append(identity)
        halves.append(half)
    accuracies = []
    for half in (0, 1):
        others = [i for i in range(16) if halves[i] != half]
        queries = [i for i in range(16) if halves[i] == half]
        nearest = {q: max(others, key=lambda g: float(features[q] @ features[g])) for q in queries}
        accuracies.append(np.mean([identities[nearest[q]] == identities[q] for q in queries]))
    assert found["time/accuracy_head"] == pytest.approx(np.mean(accuracies))


def test_a_pair_whose_image_is_missing_is_named_or_counted(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(
        "path1,path2,same\np0/p0_0001.png,p0/p0_0002.png,1\np0/p0_0001,p1/p1_0001,0\np0/p0_0001,p9/p9_0001,0\n"
    )
    config = {"pairs": str(path)}
    assert judged(protocol("pairs", root / "lfw", **config, missing="count"), 2)["missing_pairs"] == 1
    with pytest.raises(AssertionError, match=r"pairs: image p9/p9_0001 is not in .*lfw"):
        judged(protocol("pairs", root / "lfw", **config))


def test_an_image_that_cannot_be_decoded_is_named_or_counted(root: Path, tmp_path: Path) -> None:
    for number in range(4):
        save(tmp_path / "data" / "a" / f"{number}.png", 0, number)
        save(tmp_path / "data" / "b" / f"{number}.png", 1, number)
    (tmp_path / "data" / "a" / "2.png").write_bytes(b"broken")
    found = judged(protocol("open_set", tmp_path / "data", missing="count", fars=[0.9]), 2)
    assert (found["num_images"], found["failed_images"]) == (7, 1)
    with pytest.raises(AssertionError, match=r"data: .*a/2.png: cannot decode"):
        judged(protocol("open_set", tmp_path / "data"))
    run_on_ranks(write_on_rank, 1, tmp_path / "data", tmp_path / "out", "float32", False, True)
    embedded = protocol("open_set", tmp_path / "out", missing="count", fars=[0.9])
    assert judged(embedded) == found
    with pytest.raises(AssertionError, match=r"lacks 1 images that could not .* a/2.png; missing=count"):
        judged(protocol("open_set", tmp_path / "out"))


def test_a_photo_of_an_album_that_is_gone_is_named_or_counted(tmp_path: Path) -> None:
    album = save_album(tmp_path / "album")
    (photo,) = album.glob("test/30_0.jpg")  # of two persons
    photo.unlink()
    more = {"splits": ["time"], "regions": {"head": None, "body": None}}
    found = judged(protocol("persons", album, missing="count", **more))
    assert (found["time/num_instances"], found["time/failed_instances"]) == (14, 2)
    with pytest.raises(AssertionError, match=r"data: .*30_0.jpg, head .*: is not there"):
        judged(protocol("persons", album, **more))


def test_rates_that_the_pairs_cannot_support_are_refused_if_asked_for(root: Path) -> None:
    with pytest.raises(
        AssertionError, match="fars: 1e-05 needs 1000000 pairs of different classes, there are 375"
    ):
        judged(protocol("open_set", root / "lfw", fars=[1e-5]))


def refusals_on_rank(world: World, cases: list[tuple[str, ProtocolConfig]]) -> dict[str, str]:
    """Return what each case says; those of ``diverged`` are judged with a model that has."""

    def diverged(images_NCHW: Tensor) -> Tensor:
        return embed(images_NCHW) * torch.nan

    said = {}
    for name, config in cases:
        model = Model(diverged, MODEL.reading) if name.startswith("diverged") else MODEL
        with pytest.raises(UserError) as error:
            dict(judge(config, model, world, lambda path: MODEL, "--"))
        said[name] = str(error.value)
    return said


def test_what_would_be_a_figure_of_nothing_is_refused(root: Path, tmp_path: Path) -> None:
    save(tmp_path / "one" / "alone" / "1.png", 0, 1)
    (tmp_path / "pairs.txt").write_text("1\nq 1 2\nq 1 r 2\n")
    cases = {f"diverged {name}": config for name, config in configs(root).items()}
    cases |= {
        "class": protocol("closed_set", tmp_path / "one", gallery=str(tmp_path / "one")),
        "pairs": protocol("pairs", root / "lfw", pairs=str(tmp_path / "pairs.txt"), missing="count"),
        "fpirs": protocol("identification", root / "query", gallery=str(root / "gallery"), fpirs=[0.1]),
        "fars": protocol("distractors", root / "lfw", distractors=str(root / "crowd"), fars=[1e-4]),
        "ks": protocol("closed_set", root / "query", gallery=str(root / "gallery"), ks=[1, 6]),
    }
    [said] = run_on_ranks(refusals_on_rank, 1, list(cases.items()))
    for name in NAMES:
        assert "its embedding is not finite: the model has diverged" in said.pop(f"diverged {name}")
    assert said == {
        "class": "--data: of one class, all of it is right: there is nothing to tell apart",
        "pairs": f"--pairs: no pair has both of its images in {root / 'lfw'}",
        "fpirs": "--fpirs: 0.1 is of too few errors, or too many: there are 0 probes without a mate",
        "fars": "--fars: 0.0001 is of too few errors, or too many: there are 30 x 70 pairs, and the 100 "
        "nearest of a probe are kept",
        "ks": "--ks: 6 of 6 classes: any image is a hit",
    }
    with pytest.raises(InvalidConfigError, match="invalid"):
        protocol("open_set", root, fars=[0.0])


def test_options_of_another_protocol_are_refused(root: Path) -> None:
    with pytest.raises(UserError, match="--ways: the protocol reid has no use for it"):
        check(protocol("reid", root, gallery="x", ways=5), "--")
    with pytest.raises(UserError, match="--gallery: the protocol reid needs it"):
        check(protocol("reid", root), "--")


def test_templates_are_pooled_by_their_notes(root: Path, tmp_path: Path) -> None:
    rows = ["key,template,media"] + [f"q{i},t{i % 4}{i // 8},m{i}" for i in range(11)]
    (tmp_path / "notes.csv").write_text("\n".join(rows) + "\n")
    config = protocol(
        "retrieval", root / "query", gallery=str(root / "gallery"), template=True,
        notes=str(tmp_path / "notes.csv"), gallery_notes=str(tmp_path / "gallery.csv"),
    )  # fmt: skip
    rows = ["key,template"] + [f"g{i},{i % 6}" for i in range(23)]
    (tmp_path / "gallery.csv").write_text("\n".join(rows) + "\n")
    found = judged(config)
    templates = [[i for i in range(11) if (i % 4, i // 8) == (t, h)] for t in range(4) for h in range(2)]
    templates = [images for images in templates if images]
    assert found["num_queries"] == len(templates)
    queries = [
        F.normalize(F.normalize(torch.stack([embedded(i % 4, i) for i in t])).double().mean(0), dim=0)
        for t in templates
    ]
    gallery = [
        F.normalize(torch.stack([embedded(k, 50 + i) for i in range(k, 23, 6)])).double().mean(0)
        for k in range(6)
    ]
    scores = torch.stack(queries) @ F.normalize(torch.stack(gallery)).T
    expected = (scores.argmax(1) == torch.tensor([t[0] % 4 for t in templates])).double().mean()
    assert found["recall@1"] == pytest.approx(float(expected))


def write_on_rank(
    world: World, data: Path, out: Path, dtype: str, only_first: bool = False, skip_broken: bool = False
) -> dict[str, Any]:
    images = open_images(data, "DATA")
    calls = 0

    def counting(images_NCHW: Tensor) -> Tensor:
        nonlocal calls
        calls += len(images_NCHW)
        if only_first and calls > 12:
            raise KeyboardInterrupt
        return embed(images_NCHW)

    origin = {"model": "fixed", "data": str(data)}
    reading = dataclasses.replace(MODEL.reading, skip_broken=skip_broken)
    write_embeddings(counting, images, reading, world, out, origin=origin, dtype=dtype, rows_per_file=8)
    return {"calls": calls}


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_embeddings_are_written_in_files_and_an_interrupted_run_goes_on(
    root: Path, tmp_path: Path, num_ranks: int
) -> None:
    out = tmp_path / "out"
    with pytest.raises(AssertionError):  # the first rank ends in its second file
        run_on_ranks(write_on_rank, 1, root / "lfw", out, "float32", True)
    assert len(list(out.glob("embeddings-*.npy"))) == 1
    with pytest.raises(UserError, match="incomplete: 3 of 4 files are missing"):
        Embeddings(out, "OUT")
    found = run_on_ranks(write_on_rank, num_ranks, root / "lfw", out, "float32")
    assert sum(each["calls"] for each in found) == 22  # the 8 of the first file are not embedded again
    embeddings = Embeddings(out, "OUT")
    _, labels_N, paths = features_of(root, "lfw")
    assert embeddings.labels_N.tolist() == labels_N.tolist()
    assert embeddings.keys == [path.relative_to(root / "lfw").as_posix() for path in paths]
    expected = torch.stack(
        [embed(torch.from_numpy(np.array(Image.open(path)))[None, None])[0] for path in paths]
    )
    assert torch.equal(embeddings.load(torch.device("cpu")).embeddings_ND, expected)
    assert [file.shape for file in embeddings.files] == [(8, 5)] * 3 + [(6, 5)]


def test_a_protocol_reads_embeddings_instead_of_images(
    root: Path, tmp_path: Path, figures: dict[str, dict[str, float]]
) -> None:
    for name in ("lfw", "query", "gallery", "crowd"):
        run_on_ranks(write_on_rank, 2, root / name, tmp_path / name, "float32")
    cases = {
        "pairs": protocol(
            "pairs", tmp_path / "lfw", pairs=str(root / "lfw" / "pairs.txt"), bootstrap=20, fars=[0.9]
        ),
        "reid": protocol("reid", tmp_path / "query", gallery=str(tmp_path / "gallery"), rerank=True),
        "distractors": protocol(
            "distractors", tmp_path / "lfw", distractors=str(tmp_path / "crowd"), sizes=[5, 60]
        ),
    }
    for name, config in cases.items():
        [found] = run_on_ranks(judge_on_rank, 1, config, None)
        assert found == figures[name]


def test_embeddings_of_something_else_are_not_gone_on_with(root: Path, tmp_path: Path) -> None:
    run_on_ranks(write_on_rank, 1, root / "query", tmp_path, "float16")
    assert Embeddings(tmp_path, "OUT").files[0].dtype == np.float16
    with pytest.raises(AssertionError, match="holds other embeddings: dtype is 'float16', not 'float32'"):
        run_on_ranks(write_on_rank, 1, root / "query", tmp_path, "float32")


def test_embeddings_of_data_that_changed_are_neither_gone_on_with_nor_noted(tmp_path: Path) -> None:
    data, out, summary = tmp_path / "data", tmp_path / "out", tmp_path / "out" / "embeddings.json"
    for number in range(3):
        save(data / "a" / f"{number}.png", 0, number)
    with joined_world(60.0) as world:
        write_on_rank(world, data, out, "float32")
        (data / "a" / "2.png").rename(data / "a" / "3.png")
        with pytest.raises(UserError, match="out: holds other embeddings: data_fingerprint is '"):
            write_on_rank(world, data, out, "float32")
        with pytest.raises(UserError, match=f"--data: {data} has changed since {out} was made of it"):
            Embeddings(out, "--data").images().note("person")
        old = json.loads(summary.read_text())
        del old["data_fingerprint"]  # as it was once written
        summary.write_text(json.dumps(old))
        assert write_on_rank(world, data, out, "float32") == {"calls": 0}
        assert Embeddings(out, "--data").images().note("person") is None
        (data / "a" / "3.png").rename(data / "a" / "3\n.png")
        with pytest.raises(UserError, match=r"DATA: image 'a/3\\n.png' has a line break in its name"):
            write_on_rank(world, data, tmp_path / "other", "float32")


def write_features(out: Path, features_ND: np.ndarray, model: str = "runs/a 1") -> Path:
    num = len(features_ND)
    summary = {"num_images": num, "rows_per_file": num, "num_files": 1, "flip_sum": False, "model": model}
    assert claim(out, summary | {"data": "gone"}, ["person0", "person1"]) is None
    write_rows(out, 0, features_ND, np.arange(num) % 2, [f"key{i}" for i in range(num)], ["key1"])
    return out


def test_embeddings_of_two_models_or_widths_are_not_compared(root: Path, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    data = write_features(tmp_path / "data", rows)
    gallery = write_features(tmp_path / "wide", rows.repeat(2, 1))
    other = write_features(tmp_path / "other", rows, "runs/b 2")
    cases = {
        (name, each): protocol(name, data, gallery=str(each), missing="count")
        for name in ("closed_set", "retrieval")
        for each in (gallery, other, root / "gallery")
    }
    [said] = run_on_ranks(refusals_on_rank, 1, [(str(key), config) for key, config in cases.items()])
    of_images = {
        "closed_set": "centroids of width 5, embeddings of width 8",
        "retrieval": "features of width 8 cannot be compared with those of width 5",
    }
    for (name, each), config in cases.items():
        expected = {
            gallery: f"--gallery: {gallery} has width 16, {data} has 8",
            other: f"--gallery: {other} was made by runs/b 2, {data} by runs/a 1",
        }
        assert said[str((name, each))] == expected.get(each, of_images[config.protocol])


def test_a_negative_number_of_workers_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        embed_command.build_parser().parse_args(["run", "data", "out", "--workers", "-1"])
    assert "--workers: must be a whole number of at least 0, not -1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("nan", r"--data: .*embeddings-00000.npy: row 2 \(key2\) is not finite"),
        ("embeddings-00000.npy", "embeddings-00000.npy: cannot read: mmap length"),
        ("labels-00000.npy", "labels-00000.npy: cannot read: .*No such file"),
        ("keys-00000.txt", "--data: .*keys-00000.txt: cannot read: No such file"),
    ],
)
def test_a_broken_file_of_embeddings_is_named(tmp_path: Path, spoil: str, message: str) -> None:
    rows = np.ones((4, 3), dtype=np.float32)
    rows[[1, 2] if spoil == "nan" else 1] = np.nan
    path = write_features(tmp_path, rows) / spoil
    if spoil.startswith("embeddings"):
        path.write_bytes(path.read_bytes()[:-4])
    elif spoil != "nan":
        path.unlink()
    with pytest.raises(UserError, match=message):
        Embeddings(tmp_path, "--data").load(torch.device("cpu"))


def test_a_folder_is_read_as_it_is_packed(tmp_path: Path) -> None:
    for identity, name in enumerate(("data/ann", "data/.hidden", "elsewhere")):
        save(tmp_path / name / "1.png", identity, 1)
    (tmp_path / "data" / "bob").symlink_to(tmp_path / "elsewhere")
    images = open_images(tmp_path / "data", "--data")
    assert (images.class_names, images.keys) == (("ann", "bob"), ["ann/1.png", "bob/1.png"])
    assert image_folder(tmp_path / "data").classes == ["ann", "bob"]
    (tmp_path / "data" / "bob" / "again").symlink_to(tmp_path / "data")
    with pytest.raises(UserError, match="again is a symbolic link to a folder around it"):
        open_images(tmp_path / "data", "--data")
    pack(tmp_path / "tar", [("q", 0, 0, {"camera": 3})], note="JSON")
    assert open_images(tmp_path / "tar", "--data").list_notes() == [{"camera": 3}]


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    try:
        evaluate.main()
    finally:
        if torch.distributed.is_initialized():  # a failed command leaves its group to the end of the process
            torch.distributed.destroy_process_group()


def test_the_command_judges_embeddings_without_a_model(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    figures: dict[str, dict[str, float]],
) -> None:
    run_on_ranks(write_on_rank, 1, root / "lfw", tmp_path, "float32")
    options = ("--protocol", "open_set", "--data", tmp_path, "--fars", "1e-1", "--bootstrap", "20")
    run_command(monkeypatch, *options, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found.pop("run") == str(tmp_path)
    assert found == {f"eval/open_set/{name}": value for name, value in figures["open_set"].items()}
    run_command(monkeypatch, *options)
    rows = {
        cells[1].strip(): cells[2]
        for line in capsys.readouterr().out.splitlines()
        if len(cells := line.split("\u2502")) > 2
    }
    expected = [figures["open_set"][f"tar@far=1e-1{end}"] for end in ("", "_low", "_high")]
    assert rows["eval/open_set/tar@far=1e-1"].split() == "{:.4f} ({:.4f} to {:.4f})".format(*expected).split()
    assert rows["eval/open_set/num_images"].split() == ["30"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--protocol", "lfw", "--data", "x"), "--protocol: input should be 'closed_set', 'pairs'"),
        (("--data", "x"), "--protocol: is required"),
        (("--protocol", "pairs", "--data", "x", "--ks", "none"), "--ks: "),
        (
            ("--protocol", "pairs", "--data", "x", "--ways", "5"),
            "--ways: the protocol pairs has no use for it",
        ),
        (("--protocol", "pairs", "--data", "{root}/lfw"), "--data: holds images, not embeddings: name a run"),
        (
            ("nowhere", "--protocol", "open_set", "--data", "x"),
            "nowhere: neither a run folder nor a checkpoint",
        ),
        (("--protocol", "open_set", "--data", "{root}/none"), "--data: {root}/none is not a folder"),
        (("{root}/x.onnx", "--protocol", "open_set", "--data", "x"), "{root}/x.onnx: cannot open as ONNX"),
    ],
)
def test_what_is_wrong_with_a_command_is_one_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        run_command(monkeypatch, *(argument.format(root=root) for argument in arguments))
    assert str(caught.value).startswith(message.format(root=root))
    assert "\n" not in str(caught.value)
