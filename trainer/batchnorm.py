"""Batch norm over the images of all ranks: without it the loss curve would depend on the number of ranks.

torch's SyncBatchNorm needs a GPU; this one runs wherever the process group does.
Legend: N images of this rank, C channels, ... positions, R ranks.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from trainer.collectives import gather_batch, sum_over


class _NormaliseGlobally(torch.autograd.Function):
    """Batch norm with statistics over all ranks, on torch's own kernels, which one rank alone uses too.

    Forward all-gathers, backward all-reduces 2 C numbers. Gradients of weight and bias are this rank's part.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, eps: float, group: ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, mean_C, inverse_std_C = torch.native_batch_norm(x, None, None, None, None, True, 0.0, eps)
        var_C = inverse_std_C.pow(-2) - eps
        var_RC, mean_RC = gather_batch(torch.stack([var_C, mean_C])[None], group).unbind(1)
        mean_C = mean_RC.mean(0)
        # Equal counts on all ranks: the variance is the mean of variances plus the variance of means.
        var_C = (var_RC + (mean_RC - mean_C).square()).mean(0).clamp_(min=0.0)
        y, *_ = torch.native_batch_norm(x, weight_C, bias_C, mean_C, var_C, False, 0.0, eps)
        ctx.group, ctx.eps = group, eps
        ctx.save_for_backward(x, weight_C, mean_C, var_C)
        ctx.mark_non_differentiable(mean_C, var_C)
        return y, mean_C, var_C

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight_C, mean_C, var_C = ctx.saved_tensors
        # With the statistics taken as constants: scale * grad, sum(grad y^), sum(grad), y^ normalised x.
        grad_x, dot_C, sum_C = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight_C, mean_C, var_C, None, None, False, ctx.eps, [True, True, True]
        )
        count = x.numel() // x.shape[1] * ctx.group.size()
        mean_dot_C, mean_grad_C = sum_over(torch.stack([dot_C, sum_C]), ctx.group) / count
        # What the statistics add: - scale * (mean(grad) + y^ mean(grad y^)), linear in x.
        inverse_std_C = torch.rsqrt(var_C + ctx.eps)
        scale_C = inverse_std_C if weight_C is None else inverse_std_C * weight_C
        slope_C = scale_C * mean_dot_C * inverse_std_C
        offset_C = scale_C * mean_grad_C - slope_C * mean_C
        grad_x = torch.addcmul(grad_x, x, _along(slope_C, x), value=-1).sub_(_along(offset_C, x))
        parts = (None, None) if weight_C is None else (dot_C, sum_C)
        return grad_x, *parts, None, None


def use_global_statistics(model: nn.Module, group: ProcessGroup, activated: type[nn.Module]) -> None:
    """Let every batch norm of ``model`` take its statistics over all ranks.

    ``activated`` is the class of batch norms that bring their own ``drop`` and ``act`` (timm's). Names and
    values of parameters and buffers stay. While training, every rank must run the forward and the backward
    pass on equally many images. With one rank nothing is changed: it is plain batch norm.
    """
    if group.size() == 1:
        return
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            # Changing the class keeps attributes and state dict of other people's modules as they are.
            base = _GlobalBatchNormAct if isinstance(module, activated) else _GlobalBatchNorm
            module.__class__ = type(base.__name__, (base, type(module)), {})
            module.group = group  # type: ignore[assignment]


class _GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Any batch norm of torch, with global statistics while training."""

    group: ProcessGroup

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        """Normalise N x C x ... ."""
        if not self.training:
            return super().forward(x)
        weight_C, bias_C = (self.weight.float(), self.bias.float()) if self.affine else (None, None)
        y, mean_C, var_C = _NormaliseGlobally.apply(x.float(), weight_C, bias_C, self.eps, self.group)
        if self.running_mean is not None and self.running_var is not None:
            self._remember(mean_C, var_C, x.numel() // x.shape[1] * self.group.size())
        return y.to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean_C: Tensor, var_C: Tensor, count: int) -> None:
        """Move the running statistics, the variance unbiased, as torch does."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        step = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), step)
        self.running_var.lerp_((var_C * count / max(1, count - 1)).to(self.running_var.dtype), step)


class _GlobalBatchNormAct(_GlobalBatchNorm):
    """The same for a batch norm that brings its own dropout and activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, drop, activate."""
        y = super().forward(x)
        return self.act(self.drop(y)) if self.training else y  # the base class has done it in evaluation


def _along(values_C: Tensor, x: Tensor) -> Tensor:
    """View C values so that they broadcast along dimension 1 of x."""
    return values_C.view(1, -1, *([1] * (x.ndim - 2)))
