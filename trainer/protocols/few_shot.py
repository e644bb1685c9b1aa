"""n-way k-shot: tell n unseen classes apart by k examples of each, over many random episodes.

An episode draws n classes, and of each k examples and q queries; a query goes to the class whose mean
feature has the highest cosine (with k = 1, to the nearest example). Everything drawn is a function of (seed,
episode). With ``within``, the classes of an episode share the first part of their name, as the characters of
an Omniglot alphabet do: the harder way, and that of Lake et al. (2015).

Dimensions: E episodes, n ways, k shots, q queries of a class, D feature.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.errors import UserError
from trainer.order import fold
from trainer.tiles import ALONE, Sharing, share


def few_shot(
    features_ND: Tensor,
    labels_N: Tensor,
    ways: int,
    shots: int,
    queries: int = 1,
    episodes: int = 1000,
    groups_K: Sequence[str] | None = None,
    seed: int = 0,
    sharing: Sharing = ALONE,
) -> Tensor:
    """Return the accuracy of each episode, float64. ``groups_K`` names the group of each class.

    Every rank must call it and gets all episodes. Raises UserError if there are too few classes or images.
    """
    images_of = _images_of_classes(labels_N.cpu().numpy(), shots + queries)
    pools = _pools(sorted(images_of), groups_K, ways)
    if not pools:
        where = "of one group " if groups_K else ""
        raise UserError(
            f"ways: there are not {ways} classes {where}with {shots + queries} images each (shots + queries)"
        )
    features_ND = features_ND.double()
    truth = torch.arange(ways, device=features_ND.device).repeat_interleave(queries)
    accuracy_E = features_ND.new_zeros(episodes)
    for episode in share(range(episodes), sharing.part):
        support_nk, query_nq = _draw(images_of, pools, ways, shots, queries, fold(seed, episode))
        means_nD = F.normalize(features_ND[support_nk].mean(dim=1))
        scores = (features_ND[query_nq.flatten()] @ means_nD.T).float()
        rivals = (scores >= scores.gather(1, truth[:, None])).sum(dim=1) - 1
        accuracy_E[episode] = (rivals == 0).double().mean()
    return sharing.total(accuracy_E)


def _images_of_classes(labels_N: np.ndarray, least: int) -> dict[int, np.ndarray]:
    """Return class -> its images, of the classes that have at least so many."""
    order_N = np.argsort(labels_N, kind="stable")
    names_K, starts_K = np.unique(labels_N[order_N], return_index=True)
    runs = np.split(order_N, starts_K[1:])
    return {int(label): run for label, run in zip(names_K, runs, strict=True) if len(run) >= least}


def _pools(classes: list[int], groups_K: Sequence[str] | None, ways: int) -> list[np.ndarray]:
    """Return the sets of classes that episodes are drawn from."""
    of_group: dict[str, list[int]] = {}
    for label in classes:
        of_group.setdefault(groups_K[label] if groups_K else "", []).append(label)
    return [np.array(pool) for pool in of_group.values() if len(pool) >= ways]


def _draw(
    images_of: dict[int, np.ndarray], pools: list[np.ndarray], ways: int, shots: int, queries: int, key: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return n x k examples and n x q queries of an episode."""
    generator = np.random.Generator(np.random.PCG64(key))
    pool = pools[generator.integers(len(pools))]
    chosen = generator.choice(pool, ways, replace=False).tolist()
    images = np.stack([generator.choice(images_of[c], shots + queries, replace=False) for c in chosen])
    return images[:, :shots], images[:, shots:]
