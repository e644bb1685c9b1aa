import dataclasses
from operator import attrgetter
from pathlib import Path

import pytest

from trainer.config import Config, InvalidConfigError, from_dict, to_dict
from trainer.consistency import check_across_fields
from trainer.errors import UserError
from trainer.options import sections


def tree(**changed: dict) -> dict:
    """Return the smallest tree that is a run, with whole sections replaced."""
    return {"data": {"train": "shards"}, "optim": {"steps": 1}, **changed}


def refusal(**changed: dict) -> str:
    with pytest.raises(UserError) as caught:
        check_across_fields(from_dict(tree(**changed)))
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_the_smallest_configuration_passes_every_check():
    check_across_fields(from_dict(tree()))


@pytest.mark.parametrize("optim", [{}, {"steps": 1, "epochs": 1.0}])
def test_exactly_one_of_steps_and_epochs_is_given(optim):
    assert refusal(optim=optim) == "optim.steps, optim.epochs: give exactly one of the two"


def test_float16_needs_a_zero_stage_that_scales_the_loss():
    assert refusal(engine={"dtype": "float16"}).startswith("engine.zero_stage: float16 needs 1 or 2")
    for stage in (1, 2):
        check_across_fields(from_dict(tree(engine={"dtype": "float16", "zero_stage": stage})))


@pytest.mark.parametrize(
    ("loss", "head", "engine", "field"),
    [
        ({"name": "softmax", "label_smoothing": 0.1}, {}, {}, "loss.label_smoothing: 0.1 is not defined"),
        ({"name": "normface", "label_smoothing": 0.1}, {}, {}, "loss.label_smoothing: 0.1 is not defined"),
        ({"name": "softmax"}, {"sub_centroids": 2}, {}, "head.sub_centroids: 2 needs a loss of cosines"),
        ({"label_smoothing": 0.1}, {"sub_centroids": 2}, {}, "head.sub_centroids: 2 needs a loss of cosines"),
        ({}, {"sample_rate": 0.5, "update": "autograd"}, {}, "head.sample_rate: 0.5 needs head.update=fused"),
        ({"name": "softmax"}, {"sample_rate": 0.5}, {}, "head.sample_rate: 0.5 needs a loss of cosines"),
        ({}, {"sample_rate": 0.5}, {"accumulation_steps": 2}, "head.sample_rate: 0.5 needs engine.accum"),
        ({}, {"side_stream": True}, {}, "head.side_stream: True needs optim.clip_norm=null, got 5.0"),
        (
            {"name": "softmax", "margins": {"margin": 0.4}},
            {},
            {},
            "loss.margins: softmax has none, got",
        ),
    ],
)
def test_what_a_head_cannot_do_together_is_refused(loss, head, engine, field):
    assert refusal(loss=loss, head=head, engine=engine).startswith(field)


def test_a_stream_of_its_own_is_for_cosines():
    tuned = {"optim": {"steps": 1, "clip_norm": None}, "head": {"side_stream": True}}
    expected = "head.side_stream: true needs a loss of cosines, got center"
    assert refusal(loss={"name": "center"}, **tuned) == expected
    check_across_fields(from_dict(tree(**tuned)))


@pytest.mark.parametrize(
    ("name", "extra", "judge"),
    [
        ("triplet", {"center": 0.1, "softmax": 1}, "softmax"),
        ("triplet", {"softmax": 1, "center": 0.1}, "softmax"),
        ("contrastive", {"center": 0.1, "standalone_center": 1}, "standalone_center"),
        ("triplet", {}, "center"),
        ("center", {}, "softmax"),
    ],
)
def test_centres_judge_only_where_no_other_part_can(name, extra, judge):
    assert from_dict(tree(loss={"name": name, "extra": extra})).loss.judge == judge


@pytest.mark.parametrize("name", ["mean", "std"])
def test_pixel_statistics_have_one_number_or_one_per_channel(name):
    assert refusal(backbone={name: [0.5, 0.5]}) == f"backbone.{name}: has 2 numbers for 3 channels"
    assert (
        refusal(backbone={name: [0.5] * 3, "channels": 1}) == f"backbone.{name}: has 3 numbers for 1 channels"
    )
    assert refusal(backbone={name: []}) == f"backbone.{name}: has 0 numbers for 3 channels"
    for numbers in ([0.5], [0.5, 0.4, 0.3]):
        check_across_fields(from_dict(tree(backbone={name: numbers})))


@pytest.mark.parametrize("name", ["crop_scale", "zoom"])
def test_a_range_is_given_smaller_number_first(name):
    expected = f"augment.{name}: the first number is the smaller, got [1.0, 0.5]"
    assert refusal(augment={name: [1.0, 0.5]}) == expected
    check_across_fields(from_dict(tree(augment={name: [1.0, 1.0]})))


def test_the_global_batch_divides_into_micro_batches():
    expected = "data.batch_size: 10 is not divisible by engine.accumulation_steps=4"
    assert refusal(data={"train": "a", "batch_size": 10}, engine={"accumulation_steps": 4}) == expected


def test_nesterov_needs_momentum():
    assert refusal(optim={"steps": 1, "nesterov": True, "momentum": 0.0}).startswith("optim.nesterov: needs")


def test_two_test_sets_cannot_share_a_name_and_thus_a_metric():
    expected = "eval.verification.faces: eval.classification has a set of the same name"
    sets = {"classification": {"faces": "a", "digits": "b"}, "verification": {"faces": "c"}}
    assert refusal(eval=sets) == expected


def test_a_configuration_cannot_be_changed():
    config = from_dict(tree())
    for section in [config, *(attrgetter(name)(config) for name, _ in sections())]:
        name = dataclasses.fields(section)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, name, None)
        with pytest.raises((AttributeError, TypeError)):  # slots: no new names either
            section.new_name = 1


def test_sections_take_keywords_only():
    with pytest.raises(Exception, match="positional"):
        type(from_dict(tree()).optim)("sgd")


def test_replace_checks_like_from_dict():
    optim = from_dict(tree()).optim
    assert dataclasses.replace(optim, steps=5).steps == 5
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        dataclasses.replace(optim, steps=0)


def test_two_configurations_share_no_mutable_default():
    first, second = from_dict(tree()), from_dict(tree())
    first.eval.classification["new"] = Path("a")
    first.engine.deepspeed_overrides["new"] = 1
    assert second.eval.classification == {}
    assert second.engine.deepspeed_overrides == {}


def test_plain_values_and_back_is_the_identity():
    changed = tree(augment={"zoom": [0.5, 2]}, eval={"verification": {"faces": "a/b"}})
    config = from_dict(changed)
    assert from_dict(to_dict(config)) == config
    assert to_dict(config)["eval"]["verification"] == {"faces": "a/b"}


def test_the_errors_of_a_tree_are_pydantics_records():
    with pytest.raises(InvalidConfigError) as caught:
        from_dict({"data": {}, "seed": -1})
    assert {error["loc"] for error in caught.value.errors} == {("data", "train"), ("seed",)}


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_every_allowed_seed_is_taken_by_the_generators(seed):
    import numpy as np
    import torch

    from trainer.order import fold

    assert from_dict(tree(seed=seed)).seed == seed
    torch.manual_seed(seed)
    torch.manual_seed(fold(seed, 0, 0))
    np.random.Philox(key=[seed, 0])


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True])
def test_other_seeds_are_refused(seed):
    with pytest.raises(InvalidConfigError):
        from_dict(tree(seed=seed))


def test_a_field_without_a_default_is_only_the_data():
    with pytest.raises(InvalidConfigError) as caught:
        from_dict({})
    assert [error["loc"] for error in caught.value.errors] == [("data",)]


def test_no_field_asks_for_a_secret():
    """W&B and Hugging Face read theirs from the environment; what is a field is printed and uploaded."""
    for section, cls in [("", Config), *sections()]:
        for field in dataclasses.fields(cls):
            words = set(field.name.split("_"))
            assert not words & {"key", "token", "secret", "password"}, f"{section}.{field.name}"
