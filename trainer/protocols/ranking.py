"""Exact nearest neighbours in bounded memory, ties against the model: what lookup protocols count.

A cosine and whether it would be a hit become one integer, its *key*: the bits of the float32, in an order
that integers keep, twice, plus one for a miss. Sorting keys sorts by cosine and, among equals, puts misses
first; which neighbours are hits can be read off the sorted keys, and nothing else need be carried along.

Dimensions: P probes, G gallery, B and C of a tile, k nearest.
"""

import torch
from torch import Tensor

from trainer.tiles import ALONE, BLOCK, Images, Sharing, blocks, cosines, share

NOTHING = torch.iinfo(torch.int64).min
"""The key of what is not in the gallery."""


def keys_of(cosines_BC: Tensor, hit_BC: Tensor, excluded_BC: Tensor) -> Tensor:
    """Return the int64 keys of float32 cosines; what is excluded comes last of all, as ``NOTHING``."""
    bits_BC = (cosines_BC + 0.0).view(torch.int32)  # + 0.0: minus zero equals zero
    ordered_BC = torch.where(bits_BC < 0, bits_BC ^ 0x7FFFFFFF, bits_BC).long()
    return (2 * ordered_BC + (~hit_BC).long()).masked_fill_(excluded_BC, NOTHING)


def hits_of(keys: Tensor) -> Tensor:
    """Say which keys are hits."""
    return (keys & 1 == 0) & (keys != NOTHING)


def cosines_of(keys: Tensor) -> Tensor:
    """Return the cosines that keys were made of; -inf for ``NOTHING``."""
    ordered = (keys >> 1).clamp(min=-(2**31)).to(torch.int32)
    values = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)
    return values.masked_fill(keys == NOTHING, -torch.inf)


def nearest(probes: Images, gallery: Images, k: int, sharing: Sharing = ALONE, block: int = BLOCK) -> Tensor:
    """Return P x k keys of each probe's nearest of the gallery, itself (the same id) excluded.

    A hit is of the probe's label. With fewer than k in the gallery the rest is ``NOTHING``. Every rank must
    call it and gets all rows.
    """
    keys_Pk = torch.zeros(len(probes), k, dtype=torch.int64, device=probes.features.device)
    for rows in share(blocks(len(probes), block), sharing.part):
        own = probes[rows]
        best_Bk = torch.full((len(own), k), NOTHING, device=keys_Pk.device)
        for columns in blocks(len(gallery), block):
            best_Bk = torch.cat([best_Bk, tile_keys(own, gallery[columns])], dim=1).topk(k, dim=1).values
        keys_Pk[rows] = best_Bk
    return sharing.total(keys_Pk)


def tile_keys(probes: Images, gallery: Images) -> Tensor:
    """Return B x C keys of a tile."""
    hit_BC = probes.labels[:, None] == gallery.labels
    return keys_of(cosines(probes, gallery), hit_BC, probes.ids[:, None] == gallery.ids)


def images_of(features_ND: Tensor, labels_N: Tensor, first_id: int = 0) -> Images:
    """Give images ids from ``first_id`` on; sets with different ids have no image in common."""
    ids_N = torch.arange(first_id, first_id + len(labels_N), device=features_ND.device)
    return Images(features_ND, labels_N.to(features_ND.device), ids_N)


def tpir_at_fpir(
    mated_P: Tensor, found_P: Tensor, alone_Q: Tensor, fpirs: tuple[float, ...]
) -> dict[float, Tensor]:
    """Open-set identification: return fpir -> hit of each mated search (float64); their mean is the TPIR.

    FPIR(t) is the fraction of the Q searches without a mate in the gallery whose nearest (``alone_Q``)
    reaches t; TPIR(t) that of the P searches whose mate is the nearest (``found_P``) and reaches t
    (``mated_P``). TPIR at x is the highest of any threshold with FPIR <= x; an x that the
    non-mated searches cannot support, x * Q < 10, is left out.
    """
    falling_Q = alone_Q.sort(descending=True).values
    rates = {}
    for fpir in fpirs:
        if fpir * len(falling_Q) < 10:
            continue
        allowed = int(fpir * len(falling_Q) + 1e-9)  # so many may reach the threshold
        limit = falling_Q[allowed] if allowed < len(falling_Q) else falling_Q.new_tensor(-torch.inf)
        rates[fpir] = (found_P & (mated_P > limit)).double()
    return rates
