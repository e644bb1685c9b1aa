"""The mean feature of every class, in one pass over its images: where a centroid best begins.

Every rank embeds its share of the images and keeps the sums of its own classes, so no rank ever holds more
than its rows. Legend: N images of this rank, B of all, C classes of this rank, D width of the embedding.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trainer.collectives import gather_batch
from trainer.config import Config
from trainer.data import Samples
from trainer.distributed import World
from trainer.feed import build_eval_batches
from trainer.head import ClassShard, initial_rows, own_targets
from trainer.index import Index


@torch.no_grad()
def class_means(
    embed: Callable[[Tensor], Tensor],
    index: Samples,
    shard: ClassShard,
    dim: int,
    config: Config,
    world: World,
) -> tuple[Tensor, Tensor]:
    """Return the directions of the mean features, C x D of length 1, and how many images each class has, C.

    Every rank must call it; each gets its own classes, the same on any number of ranks up to the rounding
    of the backbone. A class without images has a row of zeros.
    """
    loader = build_eval_batches(config, index, world)
    sums_CD = torch.zeros(len(shard), dim, device=world.device)
    counts_C = torch.zeros(len(shard), dtype=torch.int64, device=world.device)
    for batch in loader:
        features_ND = F.normalize(embed(batch.images_NCHW.to(world.device)).float())
        features_BD = gather_batch(features_ND, world.group)
        labels_B = gather_batch(batch.labels_N.to(world.device), world.group)  # padding is nobody's class
        rows, columns = own_targets(labels_B, shard)
        sums_CD.index_add_(0, columns, features_BD[rows])
        counts_C += torch.bincount(columns, minlength=len(shard))
    return F.normalize(sums_CD), counts_C


def centroids_at(means_CD: Tensor, sub_centroids: int, seed: int, shard: ClassShard) -> Tensor:
    """Return unit rows for the means of a shard's classes: the mean itself, then others a little beside it.

    Equal sub-centroids would be one for ever; the differences are a function of seed and row.
    """
    beside = initial_rows(seed, shard.times(sub_centroids), means_CD.shape[1]).to(means_CD.device)
    beside.unflatten(0, (-1, sub_centroids))[:, 0] = 0
    return F.normalize(means_CD.repeat_interleave(sub_centroids, dim=0) + 0.1 * beside)


def only_classes(index: Index, is_wanted_K: NDArray[np.bool_]) -> Index:
    """Return an index of the images of some classes alone; labels and class names stay.

    It is not to be pickled, which would open the whole index again: workers are forked.
    """
    chosen = np.flatnonzero(is_wanted_K[index.labels_N])
    return dataclasses.replace(
        index,
        starts=np.searchsorted(chosen, index.starts),
        offsets_N=index.offsets_N[chosen],
        lengths_N=index.lengths_N[chosen],
        labels_N=index.labels_N[chosen],
    )
