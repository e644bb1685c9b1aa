"""Center loss (Wen et al., ECCV 2016): every image is pulled to the centre of its class.

    L = 1/(2B) sum_i |x_i - c_{y_i}|^2                                                           (their eq. 2)

    centres, after each step, n_j being how many images of class j are in the batch:
    alpha:  c_j <- c_j - rate * sum_{y_i = j} (c_j - x_i) / (1 + n_j)                               (eq. 4)
    sgd:    c_j <- c_j - rate * sum_{y_i = j} (c_j - x_i) / B              (descent of L, whatever its weight)

By itself it collapses to a point: ``loss.name: center`` is softmax + weight * L. The paper sums over the
batch; its Caffe code and this take the mean, so a weight means the same at any batch size. Caffe puts the
alpha rule through the solver, with momentum; KaiyangZhou/pytorch-center-loss has no 1/2 and the sgd rule.

With weight 0 nothing is pulled and the centres are running means of the classes: by them any loss without
rows of its own is evaluated.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.collectives import sum_of_parts
from trainer.head import ClassShard, DenseHead, HeadOutput
from trainer.losses.centres import Centres


class CenterLoss(DenseHead):
    """Distance to centres that follow the images, of raw embeddings or of unit features."""

    def __init__(
        self,
        shard: ClassShard,
        dim: int,
        *,
        rule: Literal["alpha", "sgd"],
        rate: float,
        unit_features: bool,
        seed: int,
        group: ProcessGroup,
    ) -> None:
        super().__init__(shard, group)
        self.rule, self.rate, self.unit_features = rule, rate, unit_features
        self.centres = Centres(shard, dim, seed=seed, group=group, is_trained=False)
        self._seen: list[tuple[Tensor, Tensor, int]] = []

    def of_embeddings(self, embeddings_BD: Tensor, labels_B: Tensor) -> HeadOutput:
        """Return the loss of a batch that every rank holds whole. Every rank must call it."""
        offsets_MD, rows_M = self.centres.offsets(self._points(embeddings_BD), labels_B)
        if torch.is_grad_enabled():
            self._seen.append((offsets_MD.detach(), rows_M, len(labels_B)))
        part = 0.5 * offsets_MD.square().sum() / len(labels_B)
        return HeadOutput(sum_of_parts(part, self.group), {})

    @torch.no_grad()
    def settle(self) -> None:
        """Move the centres by the images of the step, all its micro-batches together."""
        offsets, rows, sizes = zip(*self._seen, strict=True)
        seen_P, place_M, count_P = torch.cat(rows).unique(return_inverse=True, return_counts=True)
        offsets_MD = torch.cat(offsets)
        sum_PD = offsets_MD.new_zeros(len(seen_P), offsets_MD.shape[1]).index_add_(0, place_M, offsets_MD)
        sum_PD /= (1 + count_P)[:, None] if self.rule == "alpha" else sum(sizes)
        self.centres.rows_CD.index_add_(0, seen_P, sum_PD, alpha=self.rate)

    def end_step(self, applied: bool = True) -> None:
        """Forget the images of the step, applied or not."""
        self._seen.clear()

    def directions_CD(self) -> Tensor:
        """Return the unit vectors that stand for this rank's classes; communicates nothing."""
        return F.normalize(self.centres.rows_CD.detach())

    def accuracy_by_centres(self, embeddings_BD: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        """Return the accuracies by nearest centre. Every rank must call it."""
        return self.centres.accuracy(self._points(embeddings_BD), labels_B)

    def accuracy_by_direction(self, embeddings_BD: Tensor, labels_B: Tensor) -> Tensor:
        """Return the accuracy by the centre of the smallest angle. Every rank must call it."""
        return self.accuracy_by_centres(embeddings_BD, labels_B)["nearest_centre_cosine"]

    def _points(self, embeddings_BD: Tensor) -> Tensor:
        return F.normalize(embeddings_BD.float()) if self.unit_features else embeddings_BD.float()
