"""Pictures of losses, read back: frames of the animation, cosines of the means, curves of alpha."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from trainer.captions import titles_of
from trainer.errors import UserError
from trainer.pictures import Frame, alpha_bounds, centre_gram, draw_runs, read_embeddings
from trainer.scale import paper_scale, simplex_loss


def save_run(folder: Path, steps: tuple[int, ...], dim: int) -> Path:
    labels_N = torch.arange(60) % 3
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x_ND = torch.randn(60, dim, generator=generator) + 3 * torch.eye(3, dim)[labels_N]
        frame = Frame(x_ND, labels_N, ("a", "b", "c"), normalize(torch.eye(3, dim)), ("a", "b", "c"))
        frame.save(folder / "embeddings" / f"te-st-{step:08d}.safetensors")
    return folder


def test_runs_are_drawn_over_time_and_side_by_side(tmp_path: Path) -> None:
    one, other = save_run(tmp_path / "one", (1, 20, 100), 2), save_run(tmp_path / "other", (100,), 3)
    written = draw_runs([one, other])
    names = {str(path.relative_to(tmp_path)) for path in written}
    assert names == {
        *(
            f"{run}/figures/{name}"
            for run in ("one", "other")
            for name in (
                "centres-te-st.png",
                "centroid-gram.png",
                "cosines-te-st.png",
                "features-te-st.gif",
                "features-te-st.png",
            )
        ),
        "one/figures/features-te-st-compared.png",
        "one/figures/alpha-bounds.png",
    }
    with Image.open(one / "figures" / "features-te-st.gif") as animation:
        assert animation.n_frames == 3


def test_saved_embeddings_have_their_own_names(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "run", (7,), 2)
    (folder / "classes.json").write_text('["x"]')  # those of training say nothing about the set
    [frame] = read_embeddings(folder)["te-st"].values()
    assert (frame.class_names, frame.direction_names) == (("a", "b", "c"), ("a", "b", "c"))
    assert centre_gram(frame, "").axes[0].get_xticklabels()[2].get_text() == "c"


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    folders = [save_run(tmp_path / place / "same", (1,), 2) for place in ("x", "y")]
    assert titles_of(folders) == list(map(str, folders))
    assert folders[0] / "figures" / "features-te-st-compared.png" in draw_runs(folders)
    assert titles_of([Path("x/one"), Path("y/two")]) == ["one", "two"]


def test_the_gram_matrix_is_that_of_the_mean_unit_features() -> None:
    labels_N = torch.tensor([0, 0, 2, 2, 2])
    x_ND = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [1.0, 1.0], [-1.0, 0.0]])
    frame = Frame(x_ND, labels_N, ("a", "b", "c"), torch.zeros(0, 2), ())
    axes = centre_gram(frame, "Digits").axes[0]
    first, second = (normalize(x_ND[labels_N == k]).mean(0) for k in (0, 2))
    cosine = float(first @ second / (first.norm() * second.norm()))
    np.testing.assert_allclose(axes.images[0].get_array(), [[1, cosine], [cosine, 1]], atol=1e-6)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "c"]


def test_the_curves_of_alpha_are_the_rules() -> None:
    scales, losses = alpha_bounds(1000).axes
    classes, alphas = scales.lines[0].get_data()
    np.testing.assert_allclose(alphas, [paper_scale(int(k)) for k in classes])
    np.testing.assert_allclose(
        losses.lines[0].get_ydata(), [simplex_loss(int(k), paper_scale(int(k))) for k in classes]
    )


def test_a_run_without_embeddings_is_told_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no embeddings; train with eval.save_embeddings=true"):
        draw_runs([tmp_path])


@pytest.mark.parametrize("name", ["test-x.safetensors", "00000001.safetensors", "test-00000001.safetensors"])
def test_a_file_that_holds_no_embeddings_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "embeddings" / name
    path.parent.mkdir()
    path.write_bytes(b"{}")
    with pytest.raises(UserError, match=str(path)):
        draw_runs([tmp_path])
