"""Triplet loss (FaceNet, arXiv 1503.03832): an image is nearer to its class than to others, by a margin.

    L = 1/T sum_(a,p,n) max(0, d_ap - d_an + m),    d_ij = |x_i - x_j|^2,  y_p = y_a != y_n,  p != a

over the T triplets that the mining chooses from the global batch:

    all                every triplet
    random_violating   for each (a, p) one n at random of those with d_an < d_ap + m     (public FaceNet code)
    semi_hard          for each (a, p) the nearest n beyond p, where d_ap < d_an < d_ap + m        (the paper)
    batch_hard         for each a the farthest p and the nearest n      (1703.07737, there with |.| for |.|^2)

Negatives are sorted once for each anchor. Those that violate a pair's margin are then the first v of the row,
so "all" needs B x B numbers, not B^3. The paper's unit features are the default; Caffe's layer has raw
embeddings and m = 1.

Legend: N anchors of this rank, B images of the global batch, D width of the embedding.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.collectives import sum_of_parts, sum_over
from trainer.head import ClassShard, DenseHead, HeadOutput
from trainer.losses.pairs import Pairs, own_images, own_pairs
from trainer.order import fold

Mining = Literal["all", "random_violating", "semi_hard", "batch_hard"]


class TripletLoss(DenseHead):
    """Hinge on squared distances; holds no rows."""

    can_judge = is_per_image = False

    def __init__(
        self,
        shard: ClassShard,
        *,
        margin: float,
        mining: Mining,
        unit_features: bool,
        seed: int,
        group: ProcessGroup,
    ) -> None:
        super().__init__(shard, group)
        self.seed = seed
        self.margin, self.mining, self.unit_features = margin, mining, unit_features
        self._drawn = 0  # micro-batches of this step

    def begin_step(self, step: int) -> None:
        """Say which step the next batches belong to: random triplets are drawn from it."""
        super().begin_step(step)
        self._drawn = 0

    def of_embeddings(self, embeddings_BD: Tensor, labels_B: Tensor) -> HeadOutput:
        """Return the loss of a batch that every rank holds whole. Every rank must call it."""
        x_BD = F.normalize(embeddings_BD.float()) if self.unit_features else embeddings_BD.float()
        pairs = own_pairs(x_BD, labels_B, self.group)
        hinge, count = self._mined(pairs)
        self._drawn += torch.is_grad_enabled()
        count = sum_over(count, self.group).clamp(min=1)
        return HeadOutput(sum_of_parts(hinge / count, self.group), {})

    def _mined(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Return the sum of the hinges of this rank's anchors, and the number of their triplets."""
        squared_NB, (_, is_positive_NB, is_negative_NB) = pairs.distance_NB.square(), pairs
        if self.mining == "batch_hard":
            has_both_N = is_positive_NB.any(1) & is_negative_NB.any(1)
            farthest_N = squared_NB.masked_fill(~is_positive_NB, -torch.inf).amax(1)[has_both_N]
            nearest_N = squared_NB.masked_fill(~is_negative_NB, torch.inf).amin(1)[has_both_N]
            return F.relu(farthest_N - nearest_N + self.margin).sum(), has_both_N.sum()
        sorted_NB = squared_NB.masked_fill(~is_negative_NB, torch.inf).sort(1).values
        reach_NB = squared_NB + self.margin
        violating_NB = torch.searchsorted(sorted_NB.detach(), reach_NB.detach())
        if self.mining == "all":
            hinge_NB = violating_NB * reach_NB - _sum_of_first(sorted_NB, violating_NB)
            return hinge_NB[is_positive_NB].sum(), (is_positive_NB.sum(1) * is_negative_NB.sum(1)).sum()
        if self.mining == "random_violating":
            choice_NB = (self._uniform(violating_NB) * violating_NB).long()
            is_chosen_NB = is_positive_NB & (violating_NB > 0)
        else:
            choice_NB = torch.searchsorted(sorted_NB.detach(), squared_NB.detach(), right=True)
            is_chosen_NB = is_positive_NB & (choice_NB < violating_NB)
        chosen_NB = sorted_NB.gather(1, choice_NB.clamp(max=sorted_NB.shape[1] - 1))
        return (reach_NB - chosen_NB)[is_chosen_NB].sum(), is_chosen_NB.sum()

    def _uniform(self, like_NB: Tensor) -> Tensor:
        """Return a number of 0..1 for each pair, a function of (seed, step, micro-batch, pair)."""
        batch = like_NB.shape[1]
        generator = torch.Generator().manual_seed(fold(self.seed, self.step, self._drawn) >> 1)
        whole_BB = torch.rand(batch, batch, generator=generator, dtype=torch.float64)
        return whole_BB.to(like_NB.device)[own_images(batch, self.group, like_NB.device)]


def _sum_of_first(sorted_NB: Tensor, count_NB: Tensor) -> Tensor:
    """Return for each entry of ``count`` the sum of so many first numbers of its row."""
    sums_NB = sorted_NB.masked_fill(sorted_NB.isinf(), 0.0).cumsum(1)
    return F.pad(sums_NB, (1, 0)).gather(1, count_NB)
