"""Pictures of losses, read back: frames of the animation, cosines of the means, curves of alpha."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import normalize

from trainer.errors import UserError
from trainer.pictures import alpha_bounds, centre_gram, draw_runs
from trainer.scale import paper_scale, simplex_loss


def save_run(folder: Path, steps: tuple[int, ...], dim: int) -> Path:
    (folder / "embeddings").mkdir(parents=True)
    labels_N = torch.arange(60) % 3
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x_ND = torch.randn(60, dim, generator=generator) + 3 * torch.eye(3, dim)[labels_N]
        save_file(
            {"embeddings_ND": x_ND, "labels_N": labels_N},
            folder / "embeddings" / f"te-st-{step:08d}.safetensors",
        )
    return folder


def test_runs_are_drawn_over_time_and_side_by_side(tmp_path: Path) -> None:
    one, other = save_run(tmp_path / "one", (1, 20, 100), 2), save_run(tmp_path / "other", (100,), 3)
    written = draw_runs([one, other])
    names = {str(path.relative_to(tmp_path)) for path in written}
    assert names == {
        "one/figures/centres-te-st.png",
        "one/figures/features-te-st.gif",
        "other/figures/centres-te-st.png",
        "other/figures/features-te-st.gif",
        "one/figures/features-te-st-compared.png",
        "one/figures/alpha-bounds.png",
    }
    with Image.open(one / "figures" / "features-te-st.gif") as animation:
        assert animation.n_frames == 3


def test_the_gram_matrix_is_that_of_the_mean_unit_features() -> None:
    labels_N = torch.tensor([0, 0, 2, 2, 2])
    x_ND = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [1.0, 1.0], [-1.0, 0.0]])
    axes = centre_gram(x_ND, labels_N, ["a", "b", "c"], "Digits").axes[0]
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
