"""One optimizer step of two parts: the backbone inside DeepSpeed's engine and the sharded head outside.

The two share the loss (so gradients carry the same loss scale and the same 1/accumulation), one learning
rate schedule, one global gradient norm and one decision to skip. Legend: N images of this rank in a step.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from trainer.collectives import max_over, sum_over, undo_rank_average
from trainer.head import DenseHead
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

    embeddings_ND: Tensor
    """Of this rank's images."""


class JointStep:
    """Callable that takes a rank's images of one step and updates backbone and head together."""

    def __init__(
        self,
        engine: Any,
        head: DenseHead,
        head_optimizer: Optimizer,
        *,
        group: ProcessGroup,
        clip_norm: float | None,
        head_lr_multiplier: float,
        side_stream: bool = False,
    ) -> None:
        self.engine, self.head, self.head_optimizer = engine, head, head_optimizer
        self.group, self.clip_norm, self.head_lr_multiplier = group, clip_norm, head_lr_multiplier
        self.side_stream = side_stream
        self._zero = bool(engine.zero_optimization())
        self._is_finite, self._head_norm = True, 0.0  # what DeepSpeed's norm is completed with
        if self._zero:
            self._backbone_norm = engine.optimizer.scaled_global_norm
            engine.optimizer.scaled_global_norm = self._joint_norm

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor, lr: float, step: int) -> StepOutput:
        """Forward, backward and update of both parts. Every rank must call it, with equal N.

        ``step`` counts from 0; bfloat16 rows draw their rounding from it.
        """
        accumulation = self.engine.gradient_accumulation_steps()
        set_learning_rate(self.engine.optimizer, lr)
        set_learning_rate(self.head_optimizer, lr * self.head_lr_multiplier)
        self.head.begin_step(step)
        outputs, embeddings = [], []
        for images, labels in zip(images_NCHW.chunk(accumulation), labels_N.chunk(accumulation), strict=True):
            embeddings_ND = undo_rank_average(self.engine(images), self.group)
            embeddings.append(embeddings_ND.detach())
            output = self.head(embeddings_ND, labels)
            if self.side_stream and math.isfinite(float(output.loss.detach())):
                self.head.update_in_backward(self.head_optimizer, step)
            self.engine.backward(output.loss)
            outputs.append({"loss": output.loss.detach(), **output.metrics})
            if len(outputs) < accumulation:
                self.engine.step()  # counts micro-batches; updates nothing yet
        metrics = {name: torch.stack([o[name] for o in outputs]).mean() for name in outputs[0]}
        # A finite loss has finite gradients in the rows; whether the backbone's are is seen in their norm.
        is_finite = math.isfinite(float(metrics["loss"]))
        grad_norm, applied = (self._update_zero if self._zero else self._update)(is_finite, step)
        self.head.end_step(applied)
        return StepOutput(metrics, grad_norm, applied, torch.cat(embeddings))

    def _update(self, is_finite: bool, step: int) -> tuple[float, bool]:
        """ZeRO stage 0: the averaged gradients are in ``parameter.grad``; clip both parts here."""
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        backbone_norm = float(torch.nn.utils.get_total_norm(gradients))
        if not (is_finite and math.isfinite(backbone_norm)):
            self._leave_out()
            return backbone_norm, False
        norm = math.hypot(backbone_norm, self._norm_of_head_to_clip(backbone_norm))
        if not math.isfinite(norm):
            self._leave_out()
            return norm, False
        divisor = self._clip_factor(norm)
        for gradient in gradients:
            gradient.div_(divisor)
        self.engine.step()
        return math.hypot(backbone_norm, self._update_head(divisor, step)), True

    def _leave_out(self) -> None:
        """Do at ZeRO stage 0 what DeepSpeed's stages do by themselves when they skip a step."""
        self.engine.module.zero_grad()
        self.engine.micro_steps += 1  # engine.step() would count it, and apply momentum and decay

    def _update_zero(self, is_finite: bool, step: int) -> tuple[float, bool]:
        """ZeRO stages 1 and 2: DeepSpeed clips or skips by the norm that ``_joint_norm`` completes."""
        scale = float(self.engine.optimizer.loss_scale)  # changes inside engine.step()
        self._is_finite, self._head_norm = is_finite, 0.0
        self.engine.step()
        if not self.engine.was_step_applied():
            return math.inf, False
        norm = float(self.engine.optimizer._global_grad_norm)
        head_norm = self._update_head(scale * self._clip_factor(norm), step) / scale
        return (norm if self._head_norm else math.hypot(norm, head_norm)), True

    def _joint_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        """Stand in for ZeRO's norm: backbone and head, in units of the scaled loss; inf if not finite."""
        own = torch.as_tensor(self._backbone_norm(*args, **kwargs))
        # DeepSpeed reports what is not finite as -1; all ranks see the same number.
        if not self._is_finite or own < 0 or not math.isfinite(float(own)):
            return torch.full_like(own, float("inf"))
        self._head_norm = self._norm_of_head_to_clip(float(own), float(self.engine.optimizer.loss_scale))
        return (own**2 + self._head_norm**2).sqrt()

    def _norm_of_head_to_clip(self, backbone_norm: float, loss_scale: float = 1.0) -> float:
        """Return the length of the head's gradient over all ranks, in units of the scaled loss.

        0 where it changes nothing: if nothing is clipped, or a cheap bound shows that nothing will be, and
        the head would have to go through its rows once more to know it.
        """
        if not self.head.norm_is_cheap:
            if not self.clip_norm:
                return 0.0
            longest = math.hypot(backbone_norm, self.head.norm_bound())
            # Agreed upon: a rank that rounds otherwise must not wait alone in a collective.
            may_clip = torch.tensor(float(longest >= self.clip_norm * loss_scale), device=self.engine.device)
            if not max_over(may_clip, self.group):
                return 0.0
        return self._over_ranks(self.head.squared_norm())

    def _over_ranks(self, squared_norm: Tensor) -> float:
        return float(sum_over(squared_norm, self.group).sqrt())

    def _clip_factor(self, norm: float) -> float:
        """Return what gradients are divided by so that their joint norm is at most ``clip_norm``."""
        return max(1.0, (norm + _EPSILON) / self.clip_norm) if self.clip_norm else 1.0

    def _update_head(self, divisor: float, step: int) -> float:
        """Apply the head's gradient over ``divisor``; return its length before that."""
        return self._over_ranks(self.head.update(self.head_optimizer, divisor=divisor, step=step))
