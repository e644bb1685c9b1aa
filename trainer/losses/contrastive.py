"""Contrastive loss (Hadsell et al. 2006): pairs of a class meet, others keep a distance of the margin.

    L = 1/(2P) sum_(i,j) [ s_ij d_ij^2 + (1 - s_ij) max(0, m - d_ij)^2 ],   d_ij = |x_i - x_j|

with s_ij = 1 for images of one class, else 0, over all P = B (B - 1) ordered pairs of the global batch: no
mining. Caffe's layer has this formula with m = 1 and raw embeddings. On unit features by default, as in
NormFace (arXiv 1704.06369, eq. 7), whose hinge is of squares, as Caffe's legacy one: max(0, m - d^2).

Legend: N images of this rank, B of the global batch, D width of the embedding.
"""

import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.collectives import sum_of_parts
from trainer.head import ClassShard, DenseHead, HeadOutput
from trainer.losses.pairs import own_pairs


class ContrastiveLoss(DenseHead):
    """Squared distances within a class, squared hinges between classes; holds no rows."""

    can_judge = is_per_image = False

    def __init__(self, shard: ClassShard, *, margin: float, unit_features: bool, group: ProcessGroup) -> None:
        super().__init__(shard, group)
        self.margin, self.unit_features = margin, unit_features

    def of_embeddings(self, embeddings_BD: Tensor, labels_B: Tensor) -> HeadOutput:
        """Return the loss of a batch that every rank holds whole. Every rank must call it."""
        x_BD = F.normalize(embeddings_BD.float()) if self.unit_features else embeddings_BD.float()
        pairs = own_pairs(x_BD, labels_B, self.group)
        attraction = pairs.distance_NB[pairs.is_positive_NB].square().sum()
        repulsion = F.relu(self.margin - pairs.distance_NB[pairs.is_negative_NB]).square().sum()
        num_pairs = max(1, len(labels_B) * (len(labels_B) - 1))
        return HeadOutput(sum_of_parts((attraction + repulsion) / (2 * num_pairs), self.group), {})
