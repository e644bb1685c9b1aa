from pathlib import Path

import pytest
from ranks import run_on_ranks
from test_data import NUM_SAMPLES, png

from trainer.config import from_dict
from trainer.errors import UserError
from trainer.feed import build_order, open_training_data, require_agreement, smallest_side
from trainer.index import open_index
from trainer.mixture import mix
from trainer.samplers import BalancedOrder, ShuffledOrder
from trainer.shards import write_shards


def pack(folder: Path, names: list[str], count: int = NUM_SAMPLES) -> Path:
    samples = [(png(i), "png", i % len(names)) for i in range(count)]
    write_shards(samples, folder, names, samples_per_shard=16)
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return pack(tmp_path_factory.mktemp("feed") / "packed", ["ant", "bee", "cat", "dog"])


def config(packed: Path, **data):
    sections = {"augment": data.pop("augment", {}), "engine": data.pop("engine", {})}
    tree = {"data": {"train": packed, "batch_size": 8, **data}, "backbone": {"image_size": 8}}
    return from_dict({**tree, "optim": {"steps": 1}, **sections})


def agree(world, different: dict[int, str]) -> str:
    facts = {"data.train: the data": different.get(world.rank, "usual"), "the configuration": "same"}
    try:
        require_agreement(facts, world.group, world.device)
    except UserError as error:
        return str(error)
    return "agreed"


@pytest.mark.parametrize(
    ("ranks", "different", "expected"),
    [
        (1, {}, "agreed"),
        (3, {}, "agreed"),
        (2, {1: "x"}, "data.train: the data of rank 1 is not that of the other ranks"),
        (3, {0: "x"}, "data.train: the data of rank 0 is not"),
        (3, {0: "x", 2: "y"}, "data.train: the data of rank 1, 2 is not"),
    ],
)
def test_ranks_that_differ_are_named_on_all_ranks(ranks, different, expected):
    said = run_on_ranks(agree, ranks, different)
    assert len(set(said)) == 1
    assert said[0].startswith(expected)


def test_what_is_configured_decides_the_order_and_the_fingerprint(packed):
    plain = open_training_data(config(packed))
    assert isinstance(plain.order, ShuffledOrder)
    assert plain.fingerprint == plain.index.fingerprint
    assert plain.num_samples == NUM_SAMPLES
    fingerprints = {plain.fingerprint}
    for options in (
        {"sampler": "balanced", "samples_per_class": 2},
        {"sampler": "balanced", "samples_per_class": 4},
        {"sampler": "class_weighted"},
        {"sampler": "class_weighted", "class_power": 0.0},
        {"shuffle_window": 2},
    ):
        fingerprints.add(open_training_data(config(packed, **options)).fingerprint)
    assert len(fingerprints) == 6
    balanced = build_order(config(packed, sampler="balanced", samples_per_class=2), plain.index)
    assert isinstance(balanced, BalancedOrder)
    assert balanced.groups_per_batch == 4
    with pytest.raises(
        UserError, match=r"data.samples_per_class: 3 does not divide the 8 images of a micro-"
    ):
        open_training_data(config(packed, sampler="balanced", samples_per_class=3))


def test_a_reduced_decode_leaves_the_smallest_crop_its_pixels(packed):
    assert smallest_side(config(packed)) is None
    assert smallest_side(config(packed, reduced_decode=True)) == 8
    # The smallest crop is a third of the area and 3 to 4: its shorter side is half of the image's.
    assert smallest_side(config(packed, reduced_decode=True, augment={"crop_scale": [1 / 3, 1.0]})) == 16


def test_mixed_sets_share_classes_by_name_or_keep_them_apart(packed, tmp_path):
    other = pack(tmp_path / "other", ["dog", "eel"], 10)
    one, two = open_index(packed, "data.train"), open_index(other, "data.mix")
    both = mix([one, two], "name", ["one", "two"])
    assert both.class_names == ("ant", "bee", "cat", "dog", "eel")
    assert both.labels_N[NUM_SAMPLES:].tolist() == [3, 4] * 5
    apart = mix([one, two], "offset", ["one", "two"])
    assert apart.class_names == ("one/ant", "one/bee", "one/cat", "one/dog", "two/dog", "two/eel")
    assert apart.num_classes == 6
    alike = mix([one, two], "offset", ["train", "train"])
    assert alike.class_names[2:5] == ("train-1/cat", "train-1/dog", "train-2/dog")
    assert apart.labels_N[NUM_SAMPLES:].tolist() == [4, 5] * 5
    assert both.num_samples == NUM_SAMPLES + 10
    asked = [60, 0, 53, 52, 62, 1]
    expected = [png(i if i < NUM_SAMPLES else i - NUM_SAMPLES) for i in asked]
    assert both.read_many(asked) == expected
    for sample in (0, 52, 53, 62):
        assert both.find(*both.locate(sample)) == sample
    assert both.find("nowhere/data-000000.tar", 512) is None
    assert both.fingerprint != apart.fingerprint
    data = open_training_data(config(packed, mix={str(other): 0.5}))
    assert data.num_classes == 5
    assert data.num_samples == round(NUM_SAMPLES * 1.5)


def test_foreign_shards_without_names_are_not_matched_by_name(packed, tmp_path):
    other = pack(tmp_path / "other", ["dog", "eel"], 10)
    head = other / "index" / "index.json"
    head.write_text(head.read_text().replace('"dog",', "").replace('"eel"', ""))
    with pytest.raises(UserError, match=r"data.mix_labels: the classes of .*other have no names to match by"):
        mix([open_index(packed, "a"), open_index(other, "b")], "name", ["a", "b"])
