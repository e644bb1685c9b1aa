"""Several losses on the same embeddings as one head: L = sum_t w_t L_t, such as softmax + 0.003 center.

The first part that holds a row per class judges: its rows give accuracy and directions. Legend: N images of
this rank, B of the global batch, D width of the embedding, C classes of this rank.
"""

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.collectives import gather_labelled, sum_over
from trainer.head import DenseHead, HeadOutput, apply_gradients, squared_length


class WeightedSum(DenseHead):
    """Parts by name, each with its weight; one gather of the embeddings serves them all."""

    def __init__(self, parts: Mapping[str, tuple[float, DenseHead]]) -> None:
        judge = next(part for _, part in parts.values() if part.can_judge)
        super().__init__(judge.shard, judge.group, judge.row_shard)
        self.weights = {name: weight for name, (weight, _) in parts.items()}
        self.parts = nn.ModuleDict({name: part for name, (_, part) in parts.items()})
        self.norm_is_cheap = all(part.norm_is_cheap for part in self._parts())
        self.is_per_image = all(part.is_per_image for part in self._parts())

    @property
    def judge(self) -> DenseHead:
        """The part that classifies."""
        return next(part for part in self._parts() if part.can_judge)

    def forward(self, embeddings_ND: Tensor, labels_N: Tensor) -> HeadOutput:
        """Return loss and metrics of the global batch. Every rank must call it, with equal N."""
        return self.of_embeddings(*gather_labelled(embeddings_ND.float(), labels_N, self.group))

    def of_embeddings(self, embeddings_BD: Tensor, labels_B: Tensor) -> HeadOutput:
        """The same for a batch that every rank holds whole. Every rank must call it.

        Metrics are those of the part that judges, and ``loss_<part>`` of each, without its weight.
        """
        if torch.is_grad_enabled():
            self.mark_seen(labels_B)
        loss, metrics = embeddings_BD.new_zeros(()), {}
        for name, part in zip(self.weights, self._parts(), strict=True):
            output = part.of_embeddings(embeddings_BD, labels_B)
            loss = loss + self.weights[name] * output.loss
            metrics[f"loss_{name}"] = output.loss.detach()
            if part is self.judge:
                metrics |= output.metrics
        if "accuracy" not in metrics:
            by_centres = self.judge.accuracy_by_centres(embeddings_BD.detach(), labels_B)
            metrics["accuracy"] = by_centres["nearest_centre_euclidean"]
        return HeadOutput(loss, metrics)

    def squared_norm(self) -> Tensor:
        """Return the squared length of the gradient of this rank's rows (float64); communicates nothing."""
        return sum((part.squared_norm() for part in self._fused()), squared_length(self._dense()))

    def norm_bound(self) -> float:
        """Return a number that the length of the gradient over all ranks does not exceed. Collective."""
        dense = self._dense()
        squared = float(sum_over(squared_length(dense), self.group)) if dense else 0.0
        return math.hypot(squared**0.5, *(part.norm_bound() for part in self._fused()))

    def rows_by_angle(self) -> list[Tensor]:
        """Return the rows of all parts that compare directions."""
        return [rows for part in self._parts() for rows in part.rows_by_angle()]

    @torch.no_grad()
    def update(self, optimizer: Optimizer, *, divisor: float, step: int) -> Tensor:
        """Divide the gradient by ``divisor`` and apply it; return its squared length before that."""
        squared_norm = apply_gradients(self._dense(), optimizer, divisor)
        for part in self._fused():
            squared_norm = squared_norm + part.update(optimizer, divisor=divisor, step=step)
        self.settle()
        return squared_norm

    def settle(self) -> None:
        """Let every part move what it moves without a gradient."""
        for part in self._parts():
            part.settle()

    def begin_step(self, step: int) -> None:
        """Tell every part which step the next batches belong to."""
        super().begin_step(step)
        for part in self._parts():
            part.begin_step(step)

    def end_step(self, applied: bool = True) -> None:
        """Let every part forget its step."""
        for part in self._parts():
            part.end_step(applied)

    def statistics(self) -> dict[str, Tensor]:
        """Return the running numbers of all parts, under ``<part>.<name>``."""
        return {
            f"{name}.{key}": value
            for name, part in zip(self.weights, self._parts(), strict=True)
            for key, value in part.statistics().items()
        }

    def directions_CD(self) -> Tensor:
        """Return the unit vectors that stand for this rank's classes; communicates nothing."""
        return self.judge.directions_CD()

    def accuracy_by_direction(self, embeddings_BD: Tensor, labels_B: Tensor) -> Tensor:
        """Return the accuracy by the judge's direction of the smallest angle. Every rank must call it."""
        return self.judge.accuracy_by_direction(embeddings_BD, labels_B)

    def accuracy_by_centres(self, embeddings_BD: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        """Return the accuracies by nearest centre of a part that has centres. Every rank must call it."""
        found = (part.accuracy_by_centres(embeddings_BD, labels_B) for part in self._parts())
        return next(filter(None, found), {})

    def _parts(self) -> list[DenseHead]:
        return [cast(DenseHead, part) for part in self.parts.values()]

    def _fused(self) -> list[DenseHead]:
        """Return the parts that update themselves, tile by tile."""
        return [part for part in self._parts() if not part.norm_is_cheap]

    def _dense(self) -> list[Tensor]:
        """Return the parameters of the others, whose one optimizer must be stepped once."""
        return [p for part in self._parts() if part.norm_is_cheap for p in part.parameters()]
