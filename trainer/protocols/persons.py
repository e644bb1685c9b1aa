"""Person recognition in photo albums (PIPA): several regions of a person, one model each, merged.

A split has two halves. Every instance of one half (the query) takes the identity of the best-scoring instance
of the other (the gallery); then the halves are swapped, and the two accuracies averaged. The score is

    s(q, g) = sum_r w_r cos(f_r(q), f_r(g))          over regions r

with weights w found on the *validation* album and only there, on the grid w_r = m / 10, sum 1.

Dimensions: R regions, Q queries, G gallery, B a block of queries, W weights tried.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.tiles import ALONE, Sharing, blocks, share

STEPS = 10  # of the grid of weights


@dataclass(frozen=True)
class Album:
    """The instances of one split: R unit features of each, its identity, and which half it is in."""

    features_R: tuple[Tensor, ...]
    identities: Tensor
    halves: Tensor


def accuracy(album: Album, weights_R: Sequence[float], sharing: Sharing = ALONE) -> tuple[float, Tensor]:
    """Return the swap-averaged accuracy, and for every instance whether it was recognised (float64).

    Every rank must call it and gets the same.
    """
    hits_NW = _hits(album, [tuple(weights_R)], sharing)
    return float(_swap_average(hits_NW, album.halves)), hits_NW[:, 0].double()


def best_weights(album: Album, sharing: Sharing = ALONE) -> tuple[float, ...]:
    """Return the weights of the best accuracy on a validation album; the most even of equals."""
    tried = sorted(weight_grid(len(album.features_R)), key=lambda w: (sum(x * x for x in w), w))
    accuracy_W = _swap_average(_hits(album, tried, sharing), album.halves)
    return tried[int(accuracy_W.argmax())]


def weight_grid(num_regions: int) -> list[tuple[float, ...]]:
    """Return all weights that are multiples of 1 / STEPS and sum to 1."""
    cuts = itertools.combinations(range(STEPS + num_regions - 1), num_regions - 1)
    bounds = ((-1, *cut, STEPS + num_regions - 1) for cut in cuts)
    return [tuple((b - a - 1) / STEPS for a, b in itertools.pairwise(bound)) for bound in bounds]


def _hits(album: Album, tried: Sequence[tuple[float, ...]], sharing: Sharing, block: int = 256) -> Tensor:
    """Return N x W: is each instance, looked up in the other half, recognised with these weights?"""
    device = album.identities.device
    hits_NW = torch.zeros(len(album.identities), len(tried), dtype=torch.int64, device=device)
    for half in (0, 1):
        query = (album.halves == half).nonzero().squeeze(1)
        other = (album.halves == 1 - half).nonzero().squeeze(1)
        if not len(query) or not len(other):
            raise UserError(f"album: half {half if not len(query) else 1 - half} of the split is empty")
        for rows in share(blocks(len(query), block), sharing.part):
            chosen = query[rows]
            cosines_RBG = [f[chosen].double() @ f[other].double().T for f in album.features_R]
            same_BG = album.identities[chosen][:, None] == album.identities[other]
            for column, weights in enumerate(tried):
                hits_NW[chosen, column] = _recognised(cosines_RBG, weights, same_BG)
    return sharing.total(hits_NW)


def _recognised(cosines_RBG: Sequence[Tensor], weights: Sequence[float], same_BG: Tensor) -> Tensor:
    """Say of each query whether the best of its identity beats all others; a tie counts against."""
    score_BG = sum((w * c for w, c in zip(weights, cosines_RBG, strict=True) if w), torch.zeros(()))
    score_BG = score_BG.float()  # hides the order of summation
    best_same_B = score_BG.masked_fill(~same_BG, -torch.inf).amax(dim=1)
    best_other_B = score_BG.masked_fill(same_BG, -torch.inf).amax(dim=1)
    return (best_same_B > best_other_B).long()


def _swap_average(hits_NW: Tensor, halves: Tensor) -> Tensor:
    return torch.stack([hits_NW[halves == half].double().mean(dim=0) for half in (0, 1)]).mean(dim=0)
