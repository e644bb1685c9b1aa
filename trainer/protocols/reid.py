"""Re-identification of persons over cameras: Market-1501 and its kin.

For each query, gallery images of the same person *and* the same camera are left out, and so is junk (person
-1); person 0 is background and stays as a distractor. Queries without any right image left do not count.

    rank@k   (CMC) is one of the first k right?
    map      mean over queries of AP = mean over the right images of the precision at their place
    minp     mean over queries of (right images) / (place of the last one)

Dimensions: Q queries, G gallery, B queries of a block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.protocols.ranking import hits_of, keys_of
from trainer.tiles import ALONE, Sharing, blocks, share

JUNK = -1


@dataclass(frozen=True)
class Seen:
    """Who was seen by which camera."""

    persons: Tensor
    cameras: Tensor

    def __len__(self) -> int:
        return len(self.persons)


def reid(
    similarities: Callable[[slice], Tensor],
    queries: Seen,
    gallery: Seen,
    ks: Sequence[int] = (1, 5, 10),
    sharing: Sharing = ALONE,
    block_cosines: int = 1 << 24,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return name -> value of each query that counts, float64, and which do (Q bools).

    ``similarities(rows)`` returns the B x G float32 similarities of a slice of the queries, higher is nearer.
    Ties count against the model. Every rank must call it and gets the same.
    """
    table_QV = torch.zeros(len(queries), len(ks) + 3, dtype=torch.float64, device=queries.persons.device)
    for rows in share(blocks(len(queries), max(1, block_cosines // len(gallery))), sharing.part):
        persons_B1, cameras_B1 = queries.persons[rows, None], queries.cameras[rows, None]
        right_BG = persons_B1 == gallery.persons
        excluded_BG = (right_BG & (cameras_B1 == gallery.cameras)) | (gallery.persons == JUNK)
        keys_BG = (
            keys_of(similarities(rows).float(), right_BG, excluded_BG).sort(dim=1, descending=True).values
        )
        table_QV[rows] = _judge(hits_of(keys_BG), ks)
    table_QV = sharing.total(table_QV)
    counts_Q = table_QV[:, -1] > 0
    if not counts_Q.any():
        raise UserError("no query has an image of the same person by another camera in the gallery")
    names = [*(f"rank{k}" for k in ks), "map", "minp"]
    return {name: table_QV[counts_Q, i] for i, name in enumerate(names)}, counts_Q


def _judge(hits_BG: Tensor, ks: Sequence[int]) -> Tensor:
    """Return the figures of ranked lists, one column each, and in the last whether the query counts."""
    place_G = torch.arange(1, hits_BG.shape[1] + 1, device=hits_BG.device)
    num_right_B = hits_BG.sum(dim=1)
    precision_BG = hits_BG.cumsum(dim=1).double() / place_G
    at_least_one_B = num_right_B.clamp(min=1)
    average_B = (precision_BG * hits_BG).sum(dim=1) / at_least_one_B
    last_B = (hits_BG * place_G).amax(dim=1).clamp(min=1)
    columns = [hits_BG[:, :k].any(dim=1) for k in ks]
    columns += [average_B, num_right_B / last_B, num_right_B > 0]
    return torch.stack([column.double() for column in columns], dim=1)
