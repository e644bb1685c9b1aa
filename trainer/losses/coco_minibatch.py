"""COCO loss, version 1 (arXiv 1702.06890): centroids of the mini-batch, none of them learned.

    c_k = 1/N_k sum_{y_i = k} f_i
    L = -1/B sum_i log( exp(s <f_i, c_{y_i}>) / sum_{k in batch} exp(s <f_i, c_k>) )

with f_i and c_k made unit vectors in the cosines, f_i as it is in the mean. Classes that the batch does not
hold are left out. The paper has no scale (s = 1); here s is ``head.scale``, as in version 2. The gradient
goes through the centroids; that of the paper's first revision, called wrong by its authors, is not this one.

Legend: N images of this rank, B of the global batch, P classes present in it, D width of the embedding.
"""

import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.collectives import sum_of_parts
from trainer.head import ClassShard, DenseHead, HeadOutput
from trainer.losses.pairs import own_images


class CocoMinibatchLoss(DenseHead):
    """Cosine softmax over the mean embeddings of the classes in the batch; holds no rows."""

    can_judge = is_per_image = False

    def __init__(self, shard: ClassShard, *, scale: float, group: ProcessGroup) -> None:
        super().__init__(shard, group)
        self.scale = scale

    def of_embeddings(self, embeddings_BD: Tensor, labels_B: Tensor) -> HeadOutput:
        """Return the loss of a batch that every rank holds whole. Every rank must call it."""
        x_BD = embeddings_BD.float()
        classes_P, places_B = labels_B.unique(return_inverse=True)
        # The sum points where the mean does.
        sums_PD = x_BD.new_zeros(len(classes_P), x_BD.shape[1]).index_add(0, places_B, x_BD)
        own_N = own_images(len(labels_B), self.group, x_BD.device)
        z_NP = self.scale * F.normalize(x_BD[own_N]) @ F.normalize(sums_PD).T
        part = F.cross_entropy(z_NP, places_B[own_N], reduction="sum") / len(labels_B)
        return HeadOutput(sum_of_parts(part, self.group), {})
