"""One optimizer step of two parts: the backbone inside DeepSpeed's engine and the sharded head outside.

The two share the loss (so gradients carry the same loss scale and the same 1/accumulation), one learning
rate schedule, one global gradient norm and one decision to skip. Legend: N images of this rank in a step.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from trainer.collectives import sum_over, undo_rank_average
from trainer.optimizer import set_learning_rate

_EPSILON = 1e-6  # what torch and DeepSpeed add to the norm before dividing by it


@dataclass(frozen=True)
class StepOutput:
    """What came of a step; the same on every rank."""

    metrics: dict[str, Tensor]
    """``loss`` and the head's by-products: means over the global batch."""

    grad_norm: float
    """Length of the gradient over backbone and the whole head, before clipping."""

    applied: bool
    """False if the step was skipped, on all ranks alike, because a gradient was not finite."""


class JointStep:
    """Callable that takes a rank's images of one step and updates backbone and head together."""

    def __init__(
        self,
        engine: Any,
        head: nn.Module,
        head_optimizer: Optimizer,
        *,
        group: ProcessGroup,
        clip_norm: float | None,
        head_lr_multiplier: float,
    ) -> None:
        self.engine, self.head, self.head_optimizer = engine, head, head_optimizer
        self.group, self.clip_norm, self.head_lr_multiplier = group, clip_norm, head_lr_multiplier
        self._zero = bool(engine.zero_optimization())
        self._head_norm = 0.0
        if self._zero:
            self._backbone_norm = engine.optimizer.scaled_global_norm
            engine.optimizer.scaled_global_norm = self._joint_norm

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor, lr: float) -> StepOutput:
        """Forward, backward and update of both parts. Every rank must call it, with equal N."""
        accumulation = self.engine.gradient_accumulation_steps()
        set_learning_rate(self.engine.optimizer, lr)
        set_learning_rate(self.head_optimizer, lr * self.head_lr_multiplier)
        outputs = []
        for images, labels in zip(images_NCHW.chunk(accumulation), labels_N.chunk(accumulation), strict=True):
            embeddings_ND = undo_rank_average(self.engine(images), self.group)
            output = self.head(embeddings_ND, labels)
            self.engine.backward(output.loss)
            outputs.append({"loss": output.loss.detach(), **output.metrics})
            if len(outputs) < accumulation:
                self.engine.step()  # counts micro-batches; updates nothing yet
        grad_norm, applied = self._update_zero() if self._zero else self._update()
        self.head_optimizer.zero_grad()
        metrics = {name: torch.stack([o[name] for o in outputs]).mean() for name in outputs[0]}
        return StepOutput(metrics, grad_norm, applied)

    def _update(self) -> tuple[float, bool]:
        """ZeRO stage 0: the averaged gradients are in ``parameter.grad``; clip both parts here."""
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        backbone_norm = float(torch.nn.utils.get_total_norm(gradients))
        norm = (backbone_norm**2 + self._norm_of_head() ** 2) ** 0.5
        if not _is_finite(norm):
            return norm, False
        for gradient in gradients:
            gradient.div_(self._clip_factor(norm))
        self.engine.step()
        self._step_head(self._clip_factor(norm))
        return norm, True

    def _update_zero(self) -> tuple[float, bool]:
        """ZeRO stages 1 and 2: DeepSpeed clips or skips by the norm that ``_joint_norm`` completes."""
        scale = float(self.engine.optimizer.loss_scale)  # changes inside engine.step()
        self._head_norm = self._norm_of_head()
        self.engine.step()
        if not self.engine.was_step_applied():
            return float("inf"), False
        norm = float(self.engine.optimizer._global_grad_norm)
        self._step_head(scale * self._clip_factor(norm))
        return norm, True

    def _joint_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        """Stand in for ZeRO's norm: backbone and head, in units of the scaled loss; inf if not finite."""
        own = torch.as_tensor(self._backbone_norm(*args, **kwargs))
        if own < 0 or not _is_finite(self._head_norm):  # DeepSpeed reports what is not finite as -1
            return torch.full_like(own, float("inf"))
        return (own**2 + self._head_norm**2).sqrt()

    def _norm_of_head(self) -> float:
        """Return the length of the head's gradient over all ranks, in units of the scaled loss."""
        norms = [
            torch.linalg.vector_norm(p.grad, dtype=torch.float64)
            for p in self.head.parameters()
            if p.grad is not None
        ]
        return float(sum_over(torch.stack(norms).square().sum(), self.group).sqrt())

    def _clip_factor(self, norm: float) -> float:
        """Return what gradients are divided by so that their joint norm is at most ``clip_norm``."""
        return max(1.0, (norm + _EPSILON) / self.clip_norm) if self.clip_norm else 1.0

    def _step_head(self, divisor: float) -> None:
        for parameter in self.head.parameters():
            if parameter.grad is not None and divisor != 1.0:
                parameter.grad.div_(divisor)
        self.head_optimizer.step()


def _is_finite(x: float) -> bool:
    return x - x == 0.0
