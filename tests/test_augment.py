import contextlib
import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from trainer import augment
from trainer.augment import (
    build_eval_transform,
    build_train_transform,
    decode,
    random_state_kept,
    seed_generators,
)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, shape, dtype=np.uint8)


def test_decode_gives_channels_height_width_of_the_same_pixels():
    pixels_HWC = noise(4, 7, 3)
    decoded = decode(encode(Image.fromarray(pixels_HWC)), 3)
    assert decoded.dtype == torch.uint8
    assert decoded.is_contiguous()
    assert np.array_equal(decoded.numpy(), pixels_HWC.transpose(2, 0, 1))


def test_decode_repeats_grey_for_three_channels_and_weighs_colours_for_one():
    grey_HW, colour_HWC = noise(3, 5), noise(3, 5, 3)
    assert np.array_equal(decode(encode(Image.fromarray(grey_HW)), 3).numpy(), np.stack([grey_HW] * 3))
    luma = colour_HWC @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    assert np.abs(decode(encode(Image.fromarray(colour_HWC)), 1).numpy()[0] - luma).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_decode_makes_one_bit_images_black_and_white(channels):
    bits_HW = noise(6, 6) > 127
    decoded = decode(encode(Image.fromarray(bits_HW)), channels)
    assert np.array_equal(decoded.numpy(), np.stack([bits_HW * np.uint8(255)] * channels))


def test_decode_shows_what_is_transparent_as_white_paper():
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 0], rgba[0, :, 3] = 100, (0, 255, 128)
    expected_red = [255, 100, round(255 + (100 - 255) * 128 / 255)]
    assert (
        np.abs(
            decode(encode(Image.fromarray(rgba)), 3)[0, 0].numpy() - np.array(expected_red, dtype=float)
        ).max()
        <= 1
    )
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert decode(encode(palette), 3).flatten().tolist() == [10, 40, 20, 50, 30, 60]
    assert decode(encode(palette, transparency=0), 3).flatten().tolist() == [255, 40, 255, 50, 255, 60]
    grey_alpha = Image.merge("LA", [Image.new("L", (1, 1), 9), Image.new("L", (1, 1), 0)])
    assert decode(encode(grey_alpha), 1).item() == 255


def test_decode_scales_sixteen_bits():
    values = np.array([[0, 255, 256, 65535]], dtype=np.uint16)
    assert decode(encode(Image.fromarray(values)), 1).flatten().tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "BMP"])
def test_decode_reads_every_format_of_the_shards(kind):
    assert decode(encode(Image.new("RGB", (5, 4), (200, 10, 10)), kind), 3).shape == (3, 4, 5)


def test_decode_of_cmyk_jpeg_gives_rgb():
    decoded = decode(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), 3)
    assert (decoded.float().mean((1, 2)) - torch.tensor([255.0, 0.0, 0.0])).abs().max() < 3


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an image",
        encode(Image.fromarray(noise(64, 64, 3)), "JPEG")[:900],
        encode(Image.fromarray(noise(64, 64)))[:900],
        encode(Image.new("L", (4, 4)), "GIF"),
    ],
)
def test_decode_raises_one_line_for_broken_bytes(content):
    with pytest.raises(ValueError, match=r"^cannot decode: ") as caught:
        decode(content, 3)
    assert "\n" not in str(caught.value)


def test_decode_refuses_an_image_that_would_fill_the_memory(monkeypatch):
    monkeypatch.setattr(augment, "MAX_PIXELS", 99)
    assert decode(encode(Image.new("L", (9, 11))), 1).shape == (1, 11, 9)
    with pytest.raises(ValueError, match="10 x 10 pixels are above the limit of 99"):
        decode(encode(Image.new("L", (10, 10))), 1)


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


EVERYTHING = {
    "image_size": 16,
    "crop_scale": (0.5, 1.0),
    "flip_probability": 0.5,
    "rotate_degrees": 20.0,
    "shift_fraction": 0.1,
    "scale_range": (0.9, 1.1),
    "color_jitter": 0.3,
    "erase_probability": 0.5,
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
