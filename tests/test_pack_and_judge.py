"""Published data sets from their own files, packed by the command, to figures: nothing is lost on the way."""

import pickle
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from patterns import MODEL, embedded, save, save_album, save_lfw
from ranks import run_on_ranks

from launch import pack
from trainer.album import crops, read_split
from trainer.config import ProtocolConfig, Region, protocol_from_dict
from trainer.decode import decode
from trainer.distributed import World
from trainer.index import open_index
from trainer.judge import judge
from trainer.regions import REGIONS


def packed(source: str, path: Path, *more: str | Path) -> None:
    pack.main([source, str(path), *map(str, more), "--jobs", "1"])


def judge_on_rank(world: World, config: ProtocolConfig) -> dict[str, float]:
    return dict(judge(config, MODEL, world, lambda path: MODEL, "--"))


def judged(name: str, data: Path, num_ranks: int = 1, **more: Any) -> dict[str, float]:
    config = protocol_from_dict({"protocol": name, "data": str(data), **more})
    first, *others = run_on_ranks(judge_on_rank, num_ranks, config)
    assert all(other == first for other in others)
    return first


@pytest.fixture(scope="module")
def lfw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faces") / "lfw"
    save_lfw(folder)
    return folder


def test_lfw_packed_gives_the_figures_of_its_folder(lfw: Path, tmp_path: Path) -> None:
    packed("lfw", lfw, lfw / "pairs.txt", tmp_path / "packed")
    options = {"fars": [0.9], "bootstrap": 10}
    found = judged("pairs", tmp_path / "packed", num_ranks=2, **options)
    assert found == judged("pairs", lfw, **options)
    assert found["num_pairs"] == 24
    assert found["auc_low"] <= found["auc"] <= found["auc_high"]
    assert {"accuracy_low", "eer_high", "tar@far=9e-1_low"} <= found.keys()


def test_a_verification_bin_has_the_figures_of_the_pairs_it_was_made_of(lfw: Path, tmp_path: Path) -> None:
    images, same = [], []
    for line in (lfw / "pairs.txt").read_text().splitlines()[1:]:
        name, i, *rest = line.split()
        other, j = (name, *rest) if len(rest) == 1 else rest
        for who, number in ((name, i), (other, j)):
            images.append((lfw / who / f"{who}_{int(number):04d}.png").read_bytes())
        same.append(name == other)
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps((images, same)))
    packed("bin", tmp_path / "lfw.bin", tmp_path / "packed")
    found, expected = judged("pairs", tmp_path / "packed"), judged("pairs", lfw)
    for figure in ("num_pairs", "accuracy_all", "auc", "eer"):
        assert found[figure] == expected[figure]
    assert "accuracy" in found  # its ten folds are others than those of the text file
    with pytest.raises(
        AssertionError, match="--bootstrap: draws persons"
    ):  # of a .bin nobody knows who is who
        judged("pairs", tmp_path / "packed", bootstrap=10)


def test_market_1501_packed_gives_the_figures_of_its_file_names(tmp_path: Path) -> None:
    queries = [(person, camera) for person in (1, 2, 3, 4) for camera in (1, 2)]
    gallery = [(person, 1 + i // 6 % 3) for i, person in enumerate([-1, 0, 1, 2, 3, 4] * 4)]
    places = {"query": (queries, 0), "bounding_box_test": (gallery, 50)}
    for folder, (seen, first) in places.items():
        for i, (person, camera) in enumerate(seen, first):
            name = f"{'-1' if person == -1 else f'{person:04d}'}_c{camera}s1_{i:06d}_00.png"
            save(tmp_path / "market" / folder / name, person + 1, i)
    save(tmp_path / "market" / "bounding_box_train" / "0009_c1s1_1.png", 9, 0)
    packed("market1501", tmp_path / "market", tmp_path / "packed")
    found = judged("reid", tmp_path / "packed" / "query", 2, gallery=str(tmp_path / "packed" / "gallery"))

    first_hits, precisions = [], []
    for q, (person, camera) in enumerate(queries):
        probe = F.normalize(embedded(person + 1, q), dim=0).double()
        rivals = [
            (float(probe @ F.normalize(embedded(other + 1, g), dim=0).double()), other == person)
            for g, (other, where) in enumerate(gallery, 50)
            if other != -1 and (other, where) != (person, camera)
        ]
        right = np.array([hit for _, hit in sorted(rivals, reverse=True)])
        first_hits.append(right[0])
        precisions.append(np.mean([right[: k + 1].mean() for k in np.flatnonzero(right)]))
    assert found["num_queries"] == len(queries)
    assert found["rank1"] == pytest.approx(np.mean(first_hits))
    assert found["map"] == pytest.approx(np.mean(precisions))


def test_pipa_is_packed_as_it_is_judged(tmp_path: Path) -> None:
    """Models are trained on packed regions and judged on those of the album: the same cuts."""
    album = save_album(tmp_path / "album")
    assert get_args(Region) == REGIONS
    for region in REGIONS:
        packed("pipa", album, tmp_path / region, "--region", region)
        index = open_index(tmp_path / region / "test", "data")
        instances = read_split(album, "test", "original")
        judged_images = crops(instances, region, "data")
        of_identity: dict[int, list[torch.Tensor]] = {}
        for i in range(index.num_samples):
            identity = int(index.class_names[int(index.labels_N[i])])
            of_identity.setdefault(identity, []).append(decode(index.read(i), 1).float())
        assert sum(map(len, of_identity.values())) == len(instances.photos)
        for i, identity in enumerate(instances.identities_N.tolist()):
            cut = decode(judged_images.read(i), 1).float()
            alike = [one for one in of_identity[identity] if one.shape == cut.shape]
            assert min(float((one - cut).abs().mean()) for one in alike) < 4  # JPEG, once more


def test_pipa_has_all_its_splits_and_regions(tmp_path: Path) -> None:
    album = save_album(tmp_path / "album")
    found = judged("persons", album, 2, regions={name: None for name in REGIONS}, bootstrap=5)
    for split in ("original", "album", "time", "day"):
        assert found[f"{split}/num_instances"] == 16
        assert sum(found[f"{split}/weight_{name}"] for name in REGIONS) == pytest.approx(1)
        assert 0 < found[f"{split}/accuracy_low"] <= found[f"{split}/accuracy"] <= 1
        assert found[f"{split}/accuracy_head_low"] <= found[f"{split}/accuracy_head"]
        assert found[f"{split}/accuracy"] <= found[f"{split}/accuracy_high"]
