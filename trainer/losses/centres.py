"""Class centres, cut over the ranks like the rows of the head, and what is measured from them.

Legend: B images of the global batch, M of them of classes of this rank, C classes of this rank, K of all,
D width of the embedding.
"""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from trainer.collectives import gather_rows
from trainer.head import ClassShard, initial_rows, own_targets, target_and_other


class Centres(nn.Module):
    """One point per class. They have a gradient and an optimizer only if they are trained."""

    def __init__(
        self, shard: ClassShard, dim: int, *, seed: int, group: ProcessGroup, is_trained: bool
    ) -> None:
        super().__init__()
        self.shard, self.group = shard, group
        self.rows_CD = nn.Parameter(initial_rows(seed, shard, dim), requires_grad=is_trained)

    def offsets(self, x_BD: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return x_i - c_{y_i} of the images whose class this rank holds (M x D), and their rows of it."""
        images_M, rows_M = own_targets(labels_B, self.shard)
        return x_BD[images_M] - self.rows_CD[rows_M], rows_M

    def whole_KD(self) -> Tensor:
        """Return all centres on every rank, with gradient. Every rank must call it."""
        num_ranks, num_classes = self.group.size(), self.shard.num_classes
        shards = [ClassShard.of_rank(num_classes, rank, num_ranks) for rank in range(num_ranks)]
        return gather_rows(self.rows_CD, [len(shard) for shard in shards], self.group)

    @torch.no_grad()
    def accuracy(self, x_BD: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        """Return the share of a whole batch whose nearest centre is the right one, by distance and by angle.

        Every rank must call it; each gets the same.
        """
        centres_CD = self.rows_CD.detach()
        scores = {  # |x - c|^2 = |x|^2 - 2 (<x, c> - |c|^2 / 2)
            "nearest_centre_euclidean": x_BD @ centres_CD.T - 0.5 * centres_CD.square().sum(1),
            "nearest_centre_cosine": x_BD @ nn.functional.normalize(centres_CD).T,
        }
        found = {name: target_and_other(z, labels_B, self.shard, self.group) for name, z in scores.items()}
        return {name: (target > other).float().mean() for name, (target, other) in found.items()}
