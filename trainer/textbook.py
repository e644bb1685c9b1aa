"""The class-parallel head as trainers usually write it: what ``launch/benchmark.py`` compares with.

A normalised copy of the rows, materialised logits, MAX and SUM all-reduce, a dense gradient and torch's
SGD (InsightFace's PartialFC at sample rate 1, PLSC and TFace do the same steps). Written as well as its
design allows: in-place where possible, gradients set to None, torch's fastest SGD of the device.

Legend: N images of this rank, B of all, C classes of this rank, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from trainer.collectives import gather_batch, max_over, sum_over
from trainer.head import ClassShard, initial_centroids, own_targets


class TextbookHead(nn.Module):
    """Rows of one rank and their SGD; products in ``product_type``, all else float32, as autocast does."""

    def __init__(
        self, shard: ClassShard, dim: int, *, scale: float, product_type: torch.dtype, group: ProcessGroup
    ) -> None:
        super().__init__()
        self.shard, self.scale, self.product_type, self.group = shard, scale, product_type, group
        self.centroids_CD = nn.Parameter(initial_centroids(0, shard, dim))
        self.optimizer = torch.optim.SGD([self.centroids_CD], lr=0.1, momentum=0.9, fused=True)

    def step(self, embeddings_ND: Tensor, labels_N: Tensor) -> Tensor:
        """Return the loss; leave the embeddings' gradient in ``.grad`` and update the rows."""
        features_BD = gather_batch(F.normalize(embeddings_ND), self.group)
        labels_B = gather_batch(labels_N, self.group)
        unit_CD = F.normalize(self.centroids_CD)
        cosine_BC = features_BD.to(self.product_type) @ unit_CD.to(self.product_type).T
        loss = _CrossEntropy.apply(cosine_BC.float() * self.scale, labels_B, self.shard, self.group)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy; the logits are overwritten by the probabilities."""

    @staticmethod
    def forward(ctx: Any, z_BC: Tensor, labels_B: Tensor, shard: ClassShard, group: ProcessGroup) -> Tensor:
        z_BC -= max_over(z_BC.amax(dim=1, keepdim=True), group)
        rows, columns = own_targets(labels_B, shard)
        p_BC = z_BC.exp_()
        p_BC /= sum_over(p_BC.sum(dim=1, keepdim=True), group)
        target_B = p_BC.new_zeros(len(labels_B))
        target_B[rows] = p_BC[rows, columns]
        ctx.save_for_backward(p_BC, rows, columns)
        return -sum_over(target_B, group).clamp_min_(1e-30).log().mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        p_BC, rows, columns = ctx.saved_tensors
        p_BC[rows, columns] -= 1.0
        return p_BC.mul_(grad / len(p_BC)), None, None, None
