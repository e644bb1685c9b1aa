import io

import numpy as np
import pytest
import torch
from PIL import Image

from trainer import pixels
from trainer.decode import decode


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
    assert decoded.permute(1, 2, 0).is_contiguous()  # as libjpeg writes it: not turned around on the CPU
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
    monkeypatch.setattr(pixels, "MAX_PIXELS", 99)
    for kind in ("PNG", "JPEG"):
        assert decode(encode(Image.new("L", (9, 11)), kind), 1).shape == (1, 11, 9)
        with pytest.raises(ValueError, match="10 x 10 pixels are above the limit of 99"):
            decode(encode(Image.new("L", (10, 10)), kind), 1)


def photograph(width: int, height: int) -> Image.Image:
    return Image.fromarray(noise(height // 8, width // 8, 3)).resize(
        (width, height), Image.Resampling.BICUBIC
    )


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_has_the_pixels_that_pil_gives(subsampling, progressive):
    jpeg = encode(photograph(75, 50), "JPEG", quality=80, subsampling=subsampling, progressive=progressive)
    expected = np.asarray(Image.open(io.BytesIO(jpeg)))
    assert np.array_equal(decode(jpeg, 3).permute(1, 2, 0).numpy(), expected)
    luma = Image.open(io.BytesIO(jpeg))
    luma.draft("L", luma.size)  # as it is stored, not rounded and clipped through RGB
    assert np.array_equal(decode(jpeg, 1)[0].numpy(), np.asarray(luma))


def test_a_jpeg_with_rubbish_between_its_markers_is_still_read():
    jpeg = encode(photograph(64, 64), "JPEG")
    spoilt = jpeg[:-2] + b"rubbish" + jpeg[-2:]
    assert torch.equal(decode(spoilt, 3), decode(jpeg, 3))


def test_a_large_jpeg_is_decoded_smaller_only_if_asked_and_never_below_the_side():
    jpeg = encode(photograph(400, 304), "JPEG", quality=95, subsampling=0)
    assert decode(jpeg, 3).shape == (3, 304, 400)
    sides = {side: tuple(decode(jpeg, 3, side).shape[1:]) for side in (305, 153, 152, 115, 76, 58, 38, 5)}
    whole, half, quarter, eighth = (304, 400), (152, 200), (76, 100), (38, 50)
    assert list(sides.values()) == [whole, whole, half, half, quarter, quarter, eighth, eighth]
    assert decode(encode(Image.new("RGB", (64, 64))), 3, 8).shape == (3, 64, 64)
    smaller = np.asarray(photograph(400, 304).resize((200, 152), Image.Resampling.BOX)).astype(int)
    assert np.abs(decode(jpeg, 3, 152).permute(1, 2, 0).numpy() - smaller).mean() < 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_note_on_which_side_is_up_turns_nothing(kind):
    image, note = Image.fromarray(noise(6, 9, 3)), Image.Exif()
    note[0x0112] = 6  # turned by a quarter
    assert decode(encode(image, kind, exif=note), 3).equal(decode(encode(image, kind), 3))
