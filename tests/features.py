"""Features to judge, and ranks that are threads: cheap to start, for what communicates by plain functions."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.tiles import Sharing


def make_features(
    num_images: int, num_classes: int, dim: int, noise: float, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centroids_KD = torch.randn(num_classes, dim, generator=generator)
    labels_N = torch.randint(num_classes, (num_images,), generator=generator)
    features_ND = centroids_KD[labels_N] + noise * torch.randn(num_images, dim, generator=generator)
    return torch.nn.functional.normalize(features_ND, dim=1), labels_N


def make_tied_features(num_images: int, num_classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Corners of a cube in 4-D, scaled to unit length: cosines are -1, -1/2, 0, 1/2 or 1, exactly."""
    generator = torch.Generator().manual_seed(seed)
    signs_ND = torch.randint(2, (num_images, 4), generator=generator) * 2 - 1
    return signs_ND / 2, torch.randint(num_classes, (num_images,), generator=generator)


def cosines_by_brute_force(features_ND: Tensor) -> np.ndarray:
    """In float64, rounded to float32: the precision that scores are specified to have."""
    features = features_ND.double().numpy()
    return (features @ features.T).astype(np.float32)


class FakeWorld:
    """Threads for ranks; each collective hands every rank the tensors of all ranks."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.barrier = threading.Barrier(world, timeout=20)
        self.slots: list[Any] = [None] * world

    def exchange(self, rank: int, values: Tensor) -> list[Tensor]:
        self.slots[rank] = values
        self.barrier.wait()
        everything = list(self.slots)
        self.barrier.wait()
        return everything

    def run(
        self, metric: Callable[..., Any], *args: Any, collectives: tuple[str, ...] = ("total",), **kwargs: Any
    ):
        def on_rank(rank: int) -> Any:
            available = {
                "total": lambda values: torch.stack(self.exchange(rank, values)).sum(0),
                "gather": lambda values: torch.cat(self.exchange(rank, values)),
            }
            chosen = {name: available[name] for name in collectives}
            return metric(*args, part=(rank, self.world), **chosen, **kwargs)

        with ThreadPoolExecutor(self.world) as pool:
            return list(pool.map(on_rank, range(self.world)))

    def share(self, function: Callable[[Sharing], Any]) -> list[Any]:
        """Return ``function(sharing)`` of every rank."""

        def on_rank(rank: int) -> Any:
            return function(
                Sharing(
                    part=(rank, self.world),
                    total=lambda values: torch.stack(self.exchange(rank, values)).sum(0),
                    gather=lambda values: torch.cat(self.exchange(rank, values)),
                )
            )

        with ThreadPoolExecutor(self.world) as pool:
            return list(pool.map(on_rank, range(self.world)))
