import contextlib
import random

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from trainer.augment import (
    build_eval_transform,
    build_train_transform,
    random_state_kept,
    seed_generators,
)


def noise(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, shape, dtype=np.uint8)


def test_eval_transform_leaves_an_image_of_the_right_size_alone():
    pixels_CHW = torch.from_numpy(noise(3, 8, 8))
    assert build_eval_transform(image_size=8)(pixels_CHW) is pixels_CHW
    assert torch.equal(build_train_transform(image_size=8)(pixels_CHW), pixels_CHW)


def test_eval_transform_resizes_the_shorter_side_and_crops_the_centre():
    # Three square tiles side by side: the middle one is what remains.
    tiles_CHW = torch.cat(
        [torch.full((1, 20, 20), value, dtype=torch.uint8) for value in (0, 100, 200)], dim=2
    )
    square = build_eval_transform(image_size=10)(tiles_CHW)
    assert square.shape == (1, 10, 10)
    assert square.dtype == torch.uint8
    assert (square[:, :, 2:8] == 100).all()
    upright = build_eval_transform(image_size=10)(tiles_CHW.transpose(1, 2))
    assert torch.equal(upright, square.transpose(1, 2))


@pytest.mark.parametrize("length", [64, 20_001])
def test_only_the_middle_of_a_very_long_image_is_resized(monkeypatch, length):
    seen, resize = [], v2.functional.resize
    monkeypatch.setattr(
        v2.functional, "resize", lambda x, *a, **k: seen.append(x.shape) or resize(x, *a, **k)
    )
    line_CHW = torch.arange(length).mul(255).floor_divide(length).to(torch.uint8).expand(3, 1, -1)
    for image_CHW in (line_CHW, line_CHW.transpose(1, 2)):
        square_CHW = build_eval_transform(image_size=8)(image_CHW)
        assert square_CHW.shape == (3, 8, 8)
        assert (square_CHW.int() - 127).abs().max() <= 4
    assert seen == [(3, 1, 64), (3, 64, 1)]


EVERYTHING = {
    "image_size": 16,
    "crop_scale": (0.5, 1.0),
    "flip_probability": 0.5,
    "rotate_degrees": 20.0,
    "shift_fraction": 0.1,
    "scale_range": (0.9, 1.1),
    "color_jitter": 0.3,
    "erase_probability": 0.5,
    "rand_augment": 9,
    "low_resolution_probability": 0.5,
    "occlusion_probability": 0.5,
}


@pytest.mark.parametrize("channels", [1, 3])
def test_all_stages_together_give_a_uint8_square_and_leave_the_input_alone(channels):
    pixels_CHW = torch.from_numpy(noise(channels, 20, 30))
    before = pixels_CHW.clone()
    transform = build_train_transform(**EVERYTHING)
    varied = []
    for key in range(5):
        seed_generators(key)
        varied.append(transform(pixels_CHW))
    assert all(image.shape == (channels, 16, 16) and image.dtype == torch.uint8 for image in varied)
    assert len({image.numpy().tobytes() for image in varied}) == 5
    assert torch.equal(pixels_CHW, before)


@pytest.mark.parametrize("stage", [name for name in EVERYTHING if name != "image_size"])
def test_every_stage_alone_changes_pixels(stage):
    pixels_CHW = torch.from_numpy(noise(3, 16, 16))
    transform = build_train_transform(image_size=16, **{stage: EVERYTHING[stage]})
    results = set()
    for key in range(8):
        seed_generators(key)
        results.add(transform(pixels_CHW).numpy().tobytes())
    assert len(results - {pixels_CHW.numpy().tobytes()}) >= 1


def test_flip_mirrors_left_and_right():
    pixels_CHW = torch.from_numpy(noise(3, 16, 16))
    flipped = build_train_transform(image_size=16, flip_probability=1.0)(pixels_CHW)
    assert torch.equal(flipped, pixels_CHW.flip(2))


def test_rotation_shift_and_scale_repeat_the_edge_and_never_show_a_fill():
    paper_CHW = torch.full((1, 21, 21), 255, dtype=torch.uint8)
    transform = build_train_transform(
        image_size=21, rotate_degrees=180.0, shift_fraction=0.5, scale_range=(0.4, 1.5)
    )
    for _ in range(50):
        assert torch.equal(transform(paper_CHW), paper_CHW)


@pytest.mark.parametrize("degrees", [0.0, 25.0])
@pytest.mark.parametrize("scale", [0.8, 1.0, 1.3])
def test_affine_is_the_one_of_torchvision_away_from_the_edge(degrees, scale):
    y, x = np.mgrid[0:41, 0:41]
    smooth = 128 + 60 * np.sin(x / 5) + 60 * np.cos(y / 7)
    pixels_CHW = torch.from_numpy(smooth.astype(np.uint8)[None])
    ours = build_train_transform(
        image_size=41, rotate_degrees=degrees, shift_fraction=0.1, scale_range=(scale, scale + 1e-9)
    )
    seed_generators(3)
    turn, right, down = (2 * torch.rand(3) - 1).tolist()
    seed_generators(3)
    result = ours(pixels_CHW)
    expected = v2.functional.affine(
        pixels_CHW,
        angle=turn * degrees,
        translate=[right * 4.1, down * 4.1],
        scale=scale,
        shear=[0.0, 0.0],
        interpolation=v2.InterpolationMode.BILINEAR,
    )
    # v2 works in uint8 and rounds positions to whole shifts only when it draws them: one grey level apart.
    assert (result.int() - expected.int())[:, 12:-12, 12:-12].abs().max() <= 1
    assert (result.int() - pixels_CHW.int()).abs().max() > 10


def test_a_shift_alone_moves_whole_pixels_and_repeats_the_edge():
    pixels_CHW = torch.from_numpy(noise(3, 12, 16))
    transform = build_train_transform(image_size=12, shift_fraction=0.25)
    square_CHW = build_eval_transform(image_size=12)(pixels_CHW)
    padded_CHW = torch.nn.functional.pad(square_CHW.float(), (3, 3, 3, 3), mode="replicate").to(torch.uint8)
    places = {(y, x): padded_CHW[:, y : y + 12, x : x + 12] for y in range(7) for x in range(7)}
    seen = set()
    for key in range(1000):
        seed_generators(key)
        moved_CHW = transform(pixels_CHW)
        seen |= {place for place, expected in places.items() if torch.equal(moved_CHW, expected)}
    assert seen == set(places)


def test_shift_reaches_its_fraction_and_no_further():
    dot_CHW = torch.zeros(1, 41, 41, dtype=torch.uint8)
    dot_CHW[0, 20, 20] = 255
    transform = build_train_transform(image_size=41, shift_fraction=0.2)
    shifts = []
    for key in range(200):
        seed_generators(key)
        y, x = divmod(int(transform(dot_CHW).argmax()), 41)
        shifts += [y - 20, x - 20]
    assert (min(shifts), max(shifts)) == (-8, 8)  # 0.2 of 41


def test_low_resolution_keeps_the_size_and_the_mean_and_loses_detail():
    pixels_CHW = torch.from_numpy(noise(3, 32, 32))
    seed_generators(1)
    coarse = build_train_transform(image_size=32, low_resolution_probability=1.0)(pixels_CHW)
    assert coarse.shape == pixels_CHW.shape
    assert abs(coarse.float().mean() - pixels_CHW.float().mean()) < 4
    assert coarse.float().std() < 0.8 * pixels_CHW.float().std()


def test_occlusion_covers_a_quarter_to_a_half_from_each_side_with_one_grey():
    pixels_CHW = torch.from_numpy(noise(3, 16, 16))
    transform = build_train_transform(image_size=16, occlusion_probability=1.0)
    sides, greys = set(), set()
    for key in range(60):
        seed_generators(key)
        changed_HW = (transform(pixels_CHW) != pixels_CHW).any(0)
        rows, columns = (changed_HW.float().mean(dim) > 0.9 for dim in (1, 0))  # covered from end to end
        assert bool(rows.any()) != bool(columns.any())
        edges = rows if rows.any() else columns
        assert 4 <= int(edges.sum()) <= 8
        sides.add((bool(rows.any()), bool(edges[0]), bool(edges[-1])))
        greys.add(int(transform(torch.zeros(1, 16, 16, dtype=torch.uint8)).max()))
    assert sides == {(True, True, False), (True, False, True), (False, True, False), (False, False, True)}
    assert len(greys) > 10


def test_the_new_stages_draw_nothing_but_what_the_key_decides():
    pixels_CHW = torch.from_numpy(noise(3, 16, 16))
    transform = build_train_transform(
        image_size=16, rand_augment=9, low_resolution_probability=0.5, occlusion_probability=0.5
    )
    for key in range(10):
        seed_generators(key)
        once = transform(pixels_CHW)
        seed_generators(key)
        assert torch.equal(transform(pixels_CHW), once)


def draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), np.random.rand()


def test_draws_are_a_function_of_the_key():
    draws = []
    for key in (0, 2**64 - 1, 2**64 - 1, 5):
        seed_generators(key)
        draws.append(draw())
    assert draws[1] == draws[2]
    assert len(set(draws)) == 3


def test_random_state_is_kept_also_when_something_is_raised():
    seed_generators(1)
    expected = [draw(), draw()]
    seed_generators(1)
    outside = [draw()]
    with contextlib.suppress(KeyError), random_state_kept():
        seed_generators(2)
        raise KeyError
    outside.append(draw())
    assert outside == expected
