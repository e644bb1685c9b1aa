"""Standalone center loss (github.com/mo-vic/standalone-center-loss): center loss without a softmax.

    L = w_intra L_intra + w_inter L_inter,  and against the collapse of the centres one of

    images:      L_intra = 1/B sum_i |x_i - c_{y_i}|^2
                 L_inter = -1/B sum_i sum_{j: y_j != y_i} log(|x_i - x_j|^2 + offset)
    centres:     L_intra = 1/B sum_i exp(a |x_i - c_{y_i}|^2)                          ("Misc", alternative 1)
                 L_inter = -1/K sum_k sum_{m != k} log |c_k - c_m|^2
    classifier:  L_intra = 1/B sum_i |x_i - c_{y_i}|^2                                 ("Misc", alternative 2)
                 L_inter = 1/K sum_k CE(W c_k + b, k)        a linear layer over the centres tells them apart

The centres are trained by the optimizer of the head. The text has offset 0, the code (and so the published
rows) offset 1: log of less than 1 is then no reward. Arguments of log are at least 1e-12, as in the code,
which has at most 1e12, too, and whose centres begin sqrt(D) long, ours about 1.

Legend: B images of the global batch, M of them of classes of this rank, N embedded by this rank, C classes of
this rank, K of all, D width of the embedding.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer.collectives import sum_of_parts
from trainer.head import ClassShard, DenseHead, HeadOutput, SoftmaxHead
from trainer.losses.centres import Centres
from trainer.losses.pairs import own_pairs

_SMALLEST = 1e-12


class StandaloneCenterLoss(DenseHead):
    """Trained centres that draw their images, and a term that keeps classes apart."""

    def __init__(
        self,
        shard: ClassShard,
        dim: int,
        *,
        inter: Literal["images", "centres", "classifier"],
        intra_weight: float,
        inter_weight: float,
        log_offset: float,
        exponent: float,
        seed: int,
        group: ProcessGroup,
    ) -> None:
        super().__init__(shard, group)
        self.inter, self.is_per_image = inter, inter != "images"
        self.intra_weight, self.inter_weight = intra_weight, inter_weight
        self.log_offset, self.exponent = log_offset, exponent
        self.centres = Centres(shard, dim, seed=seed, group=group, is_trained=True)
        # Rows of its own: those of the same seed would be the centres themselves.
        self.classifier = (
            SoftmaxHead(shard, dim, seed=seed + 1, group=group) if inter == "classifier" else None
        )

    def of_embeddings(self, embeddings_BD: Tensor, labels_B: Tensor) -> HeadOutput:
        """Return the loss of a batch that every rank holds whole. Every rank must call it."""
        x_BD = embeddings_BD.float()
        distance_M = self.centres.offsets(x_BD, labels_B)[0].square().sum(1)
        pull_M = torch.exp(self.exponent * distance_M) if self.inter == "centres" else distance_M
        intra = sum_of_parts(pull_M.sum() / len(labels_B), self.group)
        inter = self._inter_classes() if self.inter != "images" else self._inter_images(x_BD, labels_B)
        return HeadOutput(self.intra_weight * intra + self.inter_weight * inter, {})

    def _inter_images(self, x_BD: Tensor, labels_B: Tensor) -> Tensor:
        pairs = own_pairs(x_BD, labels_B, self.group)
        squared = pairs.distance_NB[pairs.is_negative_NB].square()
        log_sum = torch.log((squared + self.log_offset).clamp(min=_SMALLEST)).sum()
        return sum_of_parts(-log_sum / len(labels_B), self.group)

    def _inter_classes(self) -> Tensor:
        centres_KD = self.centres.whole_KD()
        labels_K = torch.arange(len(centres_KD), device=centres_KD.device)
        if self.classifier is not None:
            return self.classifier.of_embeddings(centres_KD, labels_K).loss
        pairs = own_pairs(centres_KD, labels_K, self.group)
        squared = pairs.distance_NB[pairs.is_negative_NB].square()
        return sum_of_parts(-torch.log(squared.clamp(min=_SMALLEST)).sum() / len(labels_K), self.group)

    def directions_CD(self) -> Tensor:
        """Return the unit vectors that stand for this rank's classes; communicates nothing."""
        return F.normalize(self.centres.rows_CD.detach())

    def accuracy_by_centres(self, embeddings_BD: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        """Return the accuracies by nearest centre. Every rank must call it."""
        return self.centres.accuracy(embeddings_BD.float(), labels_B)

    def accuracy_by_direction(self, embeddings_BD: Tensor, labels_B: Tensor) -> Tensor:
        """Return the accuracy by the centre of the smallest angle. Every rank must call it."""
        return self.accuracy_by_centres(embeddings_BD, labels_B)["nearest_centre_cosine"]
