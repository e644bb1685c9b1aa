"""Whether all ranks agree on the weights and compute numbers: and what to say when not."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from trainer.collectives import from_all
from trainer.order import fold

_MOST_KEPT = 20
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}

log = logging.getLogger("trainer")


class HealthError(RuntimeError):
    """What this file finds."""


class DivergedError(HealthError):
    """The backbone's copies on the ranks are not the same; raised by every rank in the same step."""


class NonFiniteError(HealthError):
    """The loss or a gradient is not a number; raised by every rank in the same step."""


def require_equal_weights(module: nn.Module, group: ProcessGroup, step: int) -> None:
    """Raise DivergedError, naming the ranks, if the parameters are not the same bits on every rank.

    Every rank must call it. Costs one pass over the parameters and a few bytes of traffic.
    """
    hashes = from_all(weights_hash(module), group)
    [(common, _)] = Counter(hashes).most_common(1)
    others = [rank for rank, value in enumerate(hashes) if value != common]
    if others:
        raise DivergedError(
            f"step {step}: the backbone of ranks {others} is not that of the other ranks: memory or network "
            "corrupted it, or their software differs; go on from the last checkpoint"
        )


def weights_hash(module: nn.Module) -> int:
    """Return a sum over the bits of all parameters: cheap, and any single change shows."""
    total = 0
    for number, parameter in enumerate(module.parameters()):
        bits = parameter.detach().view(_INTEGERS[parameter.element_size()])
        total += fold(number) * int(bits.sum(dtype=torch.int64))
    return total % 2**64


class NonFinite:
    """What happens in a step whose loss or gradient is not a number. Every rank makes the same calls."""

    def __init__(self, policy: str, limit: int, folder: Path, group: ProcessGroup) -> None:
        self.policy, self.limit, self.folder, self.group = policy, limit, folder, group
        self._in_a_row = self._num_kept = 0
        self._before: list[tuple[Tensor, Tensor]] = []

    def before_step(self, buffers: Sequence[Tensor]) -> None:
        """Keep what a forward pass changes and a skipped step must not: running statistics."""
        if self.policy == "skip":
            self._before = [(buffer, buffer.clone()) for buffer in buffers]

    def passed(self) -> None:
        """Count a step that was good."""
        self._in_a_row = 0

    @torch.no_grad()
    def failed(self, step: int, what: str, batch: dict[str, Tensor], samples: Sequence[str]) -> None:
        """Keep this rank's batch and name it; return if the step is to be skipped, else raise NonFiniteError.

        ``batch`` holds its tensors, ``embeddings_ND`` among them; ``samples`` says where each image lies.
        """
        self._in_a_row += 1
        bad = (~torch.isfinite(batch["embeddings_ND"]).all(1)).tolist()
        suspects = [sample for sample, is_bad in zip(samples, bad, strict=True) if is_bad]
        self._keep(step, what, batch, samples, suspects)
        told = from_all((len(suspects), (suspects or samples)[0]), self.group)
        ranks = [
            f"rank {rank}: {count} images, first {key}" for rank, (count, key) in enumerate(told) if count
        ]
        where = f"embeddings not finite on {'; '.join(ranks)}" if ranks else f"batch from {told[0][1]} on"
        message = f"step {step}: {what}; {where}; kept in {self.folder}"
        if self.policy == "skip" and self._in_a_row <= self.limit:
            for buffer, before in self._before:
                buffer.copy_(before)
            log.warning("skipped %s", message)
            return
        if self.policy == "skip":
            message += f"; more than engine.max_skipped_steps={self.limit} in a row"
        raise NonFiniteError(
            f"{message}. No weight was changed; "
            "try a lower optim.lr, optim.clip_norm or more optim.warmup_steps"
        )

    def _keep(
        self, step: int, what: str, batch: dict[str, Tensor], samples: Sequence[str], suspects: Sequence[str]
    ) -> None:
        """Write a rank's batch for study; the first few of a run, so that they cannot fill the disk."""
        self._num_kept += 1
        if self._num_kept > _MOST_KEPT:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:08d}-rank-{self.group.rank():05d}.safetensors"
        save_file({name: tensor.cpu().contiguous() for name, tensor in batch.items()}, path)
        about = {"step": step, "what": what, "not_finite": list(suspects), "samples": list(samples)}
        path.with_suffix(".json").write_text(json.dumps(about, indent=1))
