"""Batch norm over the images of all ranks: without it the loss curve would depend on the number of ranks.

torch's SyncBatchNorm needs a GPU; this one runs wherever the process group does.
Legend: N images of this rank, C channels, ... positions, R ranks.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from trainer.collectives import gather_batch, sum_over


class _Normalise(torch.autograd.Function):
    """(x - mean) / std over all ranks. One all-gather forward, one all-reduce backward, 2 C numbers each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
        dims = [d for d in range(x.ndim) if d != 1]
        local_var_C, local_mean_C = torch.var_mean(x, dims, correction=0)
        # Equal counts on all ranks: the variance is the mean of variances plus the variance of means.
        var_RC, mean_RC = gather_batch(torch.stack([local_var_C, local_mean_C])[None], group).unbind(1)
        mean_C = mean_RC.mean(0)
        var_C = (var_RC + (mean_RC - mean_C).square()).mean(0)
        scale_C = torch.rsqrt(var_C + eps)
        ctx.group, ctx.dims = group, dims
        y = (x - _along(mean_C, x)).mul_(_along(scale_C, x))
        ctx.save_for_backward(y, scale_C)
        ctx.mark_non_differentiable(mean_C, var_C)
        return y, mean_C, var_C

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None, None]:  # type: ignore[override]
        y, scale_C = ctx.saved_tensors
        count = y.numel() // y.shape[1] * ctx.group.size()
        sums_2C = torch.stack([grad.sum(ctx.dims), (grad * y).sum(ctx.dims)])
        mean_C, slope_C = sum_over(sums_2C, ctx.group) / count
        # scale * (grad - mean(grad) - y mean(grad y))
        grad_x = torch.addcmul(grad - _along(mean_C, y), y, _along(slope_C, y), value=-1)
        return grad_x.mul_(_along(scale_C, y)), None, None


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
        y, mean_C, var_C = _Normalise.apply(x.float(), self.eps, self.group)
        if self.running_mean is not None and self.running_var is not None:
            self._remember(mean_C, var_C, x.numel() // x.shape[1] * self.group.size())
        if self.affine:
            y = torch.addcmul(_along(self.bias.float(), y), y, _along(self.weight.float(), y))
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
