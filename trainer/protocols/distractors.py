"""Identification among distractors: the MegaFace challenge.

For every probe photo p and every *other* photo g of the same person, the gallery is g and N distractors. The
rank of g is 1 + the number of distractors whose cosine with p is >= that of g. Distractors of a smaller N are
a subset of those of a larger one.

    rank1@N           fraction of the pairs (p, g) with rank 1; cmc: the same with rank <= k
    tpir@fpir=x@N     open set: the search of p without g enrolled is non-mated, with g it is mated
    tar@far=x@N       verification: pairs (p, g) against pairs (p, distractor)

Distractors come in blocks and are forgotten: what is kept is, of every probe and size, the best ``deepest``
cosines. Each rank embeds its own blocks. A million distractors cost memory of 3 530 x sizes x deepest floats.

Dimensions: P probes, Q pairs (p, g), B distractors of a block, k deepest, S sizes.
"""

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.protocols.ranking import tpir_at_fpir
from trainer.tiles import ALONE, BLOCK, Images, Sharing, blocks, cosines


class BestDistractors:
    """The best cosines of each probe with the distractors of each size, block after block."""

    def __init__(self, probes: Images, sizes: Sequence[int], deepest: int = 100) -> None:
        if sorted(set(sizes)) != list(sizes) or sizes[0] < 1:
            raise UserError(f"sizes: {list(sizes)} are not rising numbers of distractors")
        self.probes, self.sizes, self.deepest = probes, tuple(sizes), deepest
        # Ring s holds the distractors of size s that no smaller size has.
        shape = (len(sizes), len(probes), deepest)
        self._best_SPk = torch.full(shape, -torch.inf, device=probes.features.device)
        self._seen = torch.zeros(len(sizes), dtype=torch.int64, device=probes.features.device)
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, features_BD: Tensor, place_B: Tensor) -> None:
        """Take distractors; ``place_B`` is each one's place in the fixed order that sizes are cut from."""
        self._waiting.append((features_BD, place_B))
        if sum(len(places) for _, places in self._waiting) >= BLOCK:
            self._compare()

    def _compare(self) -> None:
        """Compare all that wait: products of a few columns would be five times as slow."""
        if not self._waiting:
            return
        features_BD, place_B = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting = []
        ring_B = torch.searchsorted(torch.tensor(self.sizes, device=place_B.device), place_B, right=True)
        for ring in ring_B.unique().tolist():
            if ring == len(self.sizes):
                continue  # beyond the largest size
            chosen_BD = features_BD[ring_B == ring]
            self._seen[ring] += len(chosen_BD)
            ids_B = torch.zeros(len(chosen_BD), dtype=torch.int64, device=chosen_BD.device)
            crowd = Images(chosen_BD, ids_B, ids_B)
            for columns, rows in itertools.product(
                blocks(len(crowd), BLOCK), blocks(len(self.probes), BLOCK)
            ):
                best_Bk = self._best_SPk[ring, rows]
                self._best_SPk[ring, rows] = _improved(best_Bk, cosines(self.probes[rows], crowd[columns]))

    def finish(self, sharing: Sharing = ALONE) -> Iterable[tuple[int, int, Tensor]]:
        """Yield (size, how many distractors there were, P x k best cosines, falling) over all ranks.

        Every rank must go through it.
        """
        self._compare()
        seen_S = sharing.total(self._seen).cumsum(dim=0)
        deepest = self._best_SPk.shape[2]
        so_far_Pk = self._best_SPk[0, :, :0]
        for ring, size in enumerate(self.sizes):
            of_all_ranks = sharing.gather(self._best_SPk[ring][None])  # each has seen other distractors
            so_far_Pk = torch.cat([so_far_Pk, *of_all_ranks], dim=1)
            so_far_Pk = so_far_Pk.topk(min(deepest, so_far_Pk.shape[1]), dim=1).values
            yield size, int(seen_S[ring]), so_far_Pk


def _improved(best_Bk: Tensor, cosines_BC: Tensor) -> Tensor:
    """Return the k best of both; after the first blocks only few of a block are better than the k-th."""
    most = int((cosines_BC > best_Bk[:, -1:]).sum(dim=1).max())
    if most == 0:
        return best_Bk
    k = best_Bk.shape[1]
    few_Bm = cosines_BC.topk(min(most, k), dim=1).values
    return torch.cat([best_Bk, few_Bm], dim=1).topk(k, dim=1).values


def genuine_pairs(probes: Images) -> tuple[Tensor, Tensor, Tensor]:
    """Return all ordered pairs of photos of one person: which probe, which other photo, their cosine."""
    first, second, scores = [], [], []
    for label in probes.labels.unique().tolist():
        own = (probes.labels == label).nonzero().squeeze(1)
        of_label = Images(probes.features[own], probes.labels[own], probes.ids[own])
        i, j = (of_label.ids[:, None] != of_label.ids).nonzero(as_tuple=True)
        first.append(own[i])
        second.append(own[j])
        scores.append(cosines(of_label, of_label)[i, j])
    if not sum(map(len, first)):
        raise UserError("probes: no two are of the same person")
    return torch.cat(first), torch.cat(second), torch.cat(scores)


def rank_among(first_Q: Tensor, scores_Q: Tensor, best_Pk: Tensor) -> Tensor:
    """Return the rank of each pair's photo among the distractors; beyond the deepest it is deepest + 1."""
    return 1 + (best_Pk[first_Q] >= scores_Q[:, None]).sum(dim=1)


def open_set_rates(
    first_Q: Tensor, scores_Q: Tensor, best_Pk: Tensor, fpirs: tuple[float, ...]
) -> dict[float, Tensor]:
    """Return fpir -> hits: every pair is a mated search, every probe without a mate a non-mated one."""
    found_Q = rank_among(first_Q, scores_Q, best_Pk) == 1
    return tpir_at_fpir(scores_Q, found_Q, best_Pk[:, 0], fpirs)


def accept_rates(
    first_Q: Tensor, scores_Q: Tensor, best_Pk: Tensor, size: int, fars: Sequence[float]
) -> dict[float, Tensor]:
    """Return far -> hits: which pairs (p, g) are accepted, against all P x size pairs (p, distractor).

    Left out are rates that fewer than ten errors make up, and those for which some probe has more errors
    than the k that were kept.
    """
    best = best_Pk.flatten().sort(descending=True).values
    num_impostor = len(best_Pk) * size
    rates = {}
    for far in fars:
        allowed = int(far * num_impostor + 1e-6)
        forgotten = best_Pk[:, -1].max() if best_Pk.shape[1] < size else -torch.inf
        if 10 <= allowed < len(best) and best[allowed] >= forgotten:
            rates[far] = (scores_Q > best[allowed]).double()
    return rates
