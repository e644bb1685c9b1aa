"""Figures show what the numbers say: what is drawn is read back from the artists; files are reproducible."""

import threading
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import normalize

from trainer import canvas, figures, rays
from trainer.errors import UserError
from trainer.metrics import intra_inter_cosine, verification


def make_embeddings(num_images: int, num_classes: int, dim: int, noise: float = 0.2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.arange(num_images) % num_classes
    rays_KD = normalize(torch.randn(num_classes, dim, generator=generator), dim=1)
    lengths_N1 = 1 + 9 * torch.rand(num_images, 1, generator=generator)
    return lengths_N1 * (
        rays_KD[labels_N] + noise * torch.randn(num_images, dim, generator=generator)
    ), labels_N


def texts(figure: Figure) -> list[str]:
    return [
        text.get_text()
        for legend in (*figure.legends, *(a.get_legend() for a in figure.axes))
        if legend
        for text in legend.get_texts()
    ]


def test_scatter_shows_every_point_and_one_ray_per_class_in_two_dimensions() -> None:
    embeddings_ND, labels_N = make_embeddings(300, 4, 2)
    figure = rays.feature_scatter(embeddings_ND, labels_N, ["a", "b", "c", "d"], "Faces")
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.collections[0].get_offsets(), embeddings_ND.numpy(), rtol=1e-6)
    assert len({tuple(colour) for colour in axes.collections[0].get_facecolors()}) == 4
    means_KD = torch.stack([embeddings_ND[labels_N == label].mean(0) for label in range(4)])
    cosines_N = torch.nn.functional.cosine_similarity(embeddings_ND, means_KD[labels_N])
    degrees_N = np.rad2deg(np.arccos(cosines_N.double().clamp(-1, 1)))
    median, mean = np.median(degrees_N), degrees_N.mean()
    assert axes.get_title() == f"Faces\ndegrees from the ray: median {median:.1f}, mean {mean:.1f}"
    assert texts(figure) == ["a", "b", "c", "d"]
    assert axes.get_aspect() == 1
    assert max(axes.get_xlim()) == max(axes.get_ylim()) > embeddings_ND.abs().max()
    for label, line in enumerate(axes.lines):
        (x0, x1), (y0, y1) = line.get_data()
        mean_D = embeddings_ND[labels_N == label].mean(0).numpy()
        assert (x0, y0) == (0, 0)
        assert np.dot([x1, y1], mean_D) == pytest.approx(np.hypot(x1, y1) * np.linalg.norm(mean_D), rel=1e-5)


def test_three_dimensions_are_drawn_within_the_sphere_of_the_longest_embedding() -> None:
    embeddings_ND, labels_N = make_embeddings(200, 10, 3)
    figure = rays.feature_scatter(embeddings_ND, labels_N)
    axes = figure.axes[0]
    radius = float(embeddings_ND.norm(dim=1).max())
    assert axes.get_xlim() == axes.get_ylim() == axes.get_zlim() == pytest.approx((-radius, radius))
    assert len(axes.lines) == 4 + 10  # circles of the globe and rays
    assert [text.get_text() for text in figure.texts] == [f"radius of the sphere: {radius:.3g}"]
    assert texts(figure) == [str(label) for label in range(10)]


def test_the_view_keeps_rays_apart() -> None:
    rays_KD = np.array([[0.0, 1, 0], [0, -1, 0], [1, 0, 0], [1, 0, 1]])
    elevation, azimuth = rays._best_view(dict(enumerate(rays_KD)))
    e, a = np.deg2rad([elevation, azimuth])
    to_viewer = np.array([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)])
    for ray in rays_KD:  # none points at the viewer or away
        assert abs(ray @ to_viewer) < 0.9 * np.linalg.norm(ray)
    np.testing.assert_allclose(rays._screen(elevation, azimuth).T @ to_viewer, 0, atol=1e-12)


def test_panels_share_colours_and_legend_even_if_one_lacks_a_class() -> None:
    embeddings_ND, labels_N = make_embeddings(90, 3, 3)
    some_N = labels_N != 0
    figure = rays.feature_scatter_pair(
        {"COCO": (embeddings_ND, labels_N), "softmax": (embeddings_ND[some_N], labels_N[some_N])}
    )
    assert [axes.get_title().split("\n")[0] for axes in figure.axes] == ["COCO", "softmax"]
    assert texts(figure) == ["0", "1", "2"]
    first, second = (axes.lines[4:] for axes in figure.axes)
    assert [line.get_color() for line in first[1:]] == [line.get_color() for line in second]


def test_scatter_of_a_large_set_draws_at_most_five_thousand_points() -> None:
    axes = rays.feature_scatter(*make_embeddings(10_001, 3, 2)).axes[0]
    assert 3000 < len(axes.collections[0].get_offsets()) <= 5000


def test_scatter_refuses_other_dimensions() -> None:
    with pytest.raises(UserError, match=r"2 or 3 dimensions can be drawn, not \[6, 5\]"):
        rays.feature_scatter(*make_embeddings(6, 2, 5))


def test_histogram_shows_densities_and_means_of_all_pairs() -> None:
    embeddings_ND, labels_N = make_embeddings(120, 6, 8)
    features_ND = normalize(embeddings_ND, dim=1)
    intra, inter = intra_inter_cosine(features_ND, labels_N)
    figure = figures.cosine_histogram(features_ND, labels_N, "Faces")
    axes = figure.axes[0]
    assert axes.get_title() == "Faces (all pairs of 120 images)"
    assert texts(figure) == [
        f"different classes: mean {inter:.3f} (6,000 pairs)",
        f"same class: mean {intra:.3f} (1,140 pairs)",
    ]
    for patch in axes.patches:
        density, edges, _ = patch.get_data()
        assert np.sum(density * np.diff(edges)) == pytest.approx(1)


def test_histogram_of_a_large_set_says_so_and_still_has_genuine_pairs() -> None:
    embeddings_ND, labels_N = make_embeddings(9000, 3000, 4)
    figure = figures.cosine_histogram(normalize(embeddings_ND, dim=1), labels_N, "Faces")
    assert figure.axes[0].get_title() == "Faces (all pairs of 600 out of 9,000 images)"
    assert "(600 pairs)" in texts(figure)[1]  # 200 classes of 3 images


@pytest.mark.parametrize(("labels", "shown"), [(range(5), ["different"]), ([3] * 5, ["same"]), ([3], [])])
def test_histogram_has_the_pairs_that_there_are(labels: Sequence[int], shown: list[str]) -> None:
    features_ND = normalize(torch.randn(len(labels), 4), dim=1)
    figure = figures.cosine_histogram(features_ND, torch.tensor(labels), "Faces")
    figure.canvas.draw()
    assert [text.split()[0] for text in texts(figure)] == shown


@pytest.mark.parametrize("count", [400, 2000])  # beyond a million impostor pairs the curve begins left of it
def test_roc_draws_the_curve_and_names_its_numbers(count: int) -> None:
    embeddings_ND, labels_N = make_embeddings(count, 20, 16)
    result = verification(normalize(embeddings_ND, dim=1), labels_N)
    few = verification(normalize(embeddings_ND, dim=1)[:40], labels_N[:40])
    figure = figures.roc({"big": result, "small": few})
    axes = figure.axes[0]
    assert (axes.get_xscale(), axes.get_xlim()) == ("log", (1e-4, 1))
    assert texts(figure) == [
        f"big: AUC {result.auc:.5f}, TAR {100 * result.tar_at_far[1e-3]:.2f} % at FAR 1e-3",
        f"small: AUC {few.auc:.5f}, TAR {100 * few.tar_at_far[1e-1]:.2f} % at FAR 1e-1",
        "chance",
    ]
    far, tar = axes.lines[1].get_data()
    assert far[0] == 10 / result.num_impostor
    np.testing.assert_array_equal(tar[1:], result.tar[result.far >= 10 / result.num_impostor])
    assert tar[0] == np.interp(far[0], result.far, result.tar)


def test_cmc_draws_every_rank_and_names_the_ends() -> None:
    figure = figures.cmc({"a": [0.5, 0.75, 0.9], "b": [0.25, 0.5, 0.5]})
    axes = figure.axes[0]
    lines = [line.get_xydata() for line in axes.lines]
    np.testing.assert_allclose(lines[0], [[1, 0.5], [2, 0.75], [3, 0.9]])
    np.testing.assert_allclose(lines[1][:, 1], [0.25, 0.5, 0.5])
    assert axes.get_xscale() == "log"
    assert axes.get_ylim()[0] == pytest.approx(0.1)
    assert axes.lines[0].get_label() == "a: 50.00 % at rank 1, 90.00 % at rank 3"


def test_a_small_curve_marks_few_values_and_names_them_on_a_logarithmic_axis() -> None:
    figure = figures.small_curve("train/loss", {1: 0.9, 2: 2.0, 3: 3.1}, {}, {}, logarithmic=True)
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    assert axes.lines[0].get_marker() == "o"
    figure.draw_without_rendering()
    inside = [label.get_text() for label in axes.get_yticklabels() if 0.9 <= label.get_position()[1] <= 3.1]
    assert inside == ["1", "2"]
    many = figures.small_curve("x", {i: i for i in range(100)}, {5: 1}, {5: 9, 6: 8}, logarithmic=False).axes[
        0
    ]
    assert many.lines[0].get_marker() == "None"
    np.testing.assert_array_equal(many.collections[0].get_paths()[0].get_extents().intervaly, [1, 9])


def test_same_input_gives_same_bytes_from_any_thread_and_leaves_nothing_else(tmp_path: Path) -> None:
    settings = dict(matplotlib.rcParams)
    contents: list[bytes] = []

    def draw(name: str) -> None:
        figure = rays.feature_scatter(*make_embeddings(100, 10, 3), title="Faces")
        contents.append(canvas.save(figure, tmp_path / "new" / "folder" / name).read_bytes())

    draw("a.png")
    thread = threading.Thread(target=draw, args=("b.png",))
    thread.start()
    thread.join()
    assert len(contents) == 2
    assert contents[0] == contents[1]
    assert contents[0].startswith(b"\x89PNG")
    assert b"Software" not in contents[0]
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["a.png", "b.png"]
    assert dict(matplotlib.rcParams) == settings


def test_a_failed_save_keeps_the_old_file_and_leaves_no_rest(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "loss.png"
    path.write_bytes(b"old")
    figure = figures.small_curve("loss", {1: 2.0}, {}, {}, logarithmic=False)

    def write_half_and_fail(target: Path, **_: object) -> None:
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(figure, "savefig", write_half_and_fail)
    with pytest.raises(OSError, match="No space"):
        canvas.save(figure, path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"loss.png": b"old"}
    with pytest.raises(UserError, match=r"PNG files, not .*loss\.svg"):
        canvas.save(figure, tmp_path / "loss.svg")


def test_names_are_no_formulas_but_the_numbers_of_logarithmic_axes_are(tmp_path: Path) -> None:
    name = "a$b^$"
    legend = figures.cmc({name: [0.5] * 30})
    bars = figures.class_sizes(np.array([0, 1, 1]), [name, r"c\$"], name)
    mapped = figures.embedding_map(np.eye(2), torch.arange(2), name, [name, name])
    rayed = rays.feature_scatter(torch.eye(3), torch.arange(3), [name] * 3, name)
    rayed.text(0, 0, name)
    for figure in (legend, bars, mapped, rayed):
        assert canvas.save(figure, tmp_path / "a.png").stat().st_size > 0
        assert name in canvas.as_svg(figure)
    assert r"c\$" in canvas.as_svg(bars)
    svg = canvas.as_svg(figures.centroid_cosines(np.array([1, 100_000]), name))  # powers of ten beside it
    assert r"<!-- $\mathdefault{10^{4}}$ -->" in svg  # matplotlib's note on a formula
    assert r">$\mathdefault" not in svg


def test_class_sizes_are_bars_of_few_classes_and_a_histogram_of_many() -> None:
    few = figures.class_sizes(np.array([0, 0, 2]), ["ant", "bee", "cat"], "set").axes[0]
    assert [bar.get_height() for bar in few.patches] == [2, 0, 1]
    assert few.get_title() == "set: 3 images of 3 classes\n0 to 2 per class, median 1, mean 1.0"
    for counts_K in (np.full(50, 20), np.arange(100) + 30, np.array([1] * 90 + [2] * 9 + [5000])):
        many = figures.class_sizes(np.repeat(np.arange(len(counts_K)), counts_K), [], "set").axes[0]
        [stairs] = many.patches
        values, edges, _ = stairs.get_data()
        assert values.sum() == len(counts_K)
        assert np.array_equal(values, np.histogram(counts_K, edges)[0])
        assert f"median {np.median(counts_K):,.0f}, mean {counts_K.mean():,.1f}" in many.get_title()
    assert many.get_xscale() == "log"
    sparse = figures.class_sizes(np.array([2**31 - 1, 2**31 - 1, 7], dtype=np.int32), [], "set").axes[0]
    assert sparse.patches[0].get_data().values.tolist() == [2**31 - 2, 1, 1]
    assert "3 images of 2,147,483,648 classes\n0 to 2 per class, median 0" in sparse.get_title()
