"""Which training images are probably of somebody else: found by sub-centroids, left out by a quarantine list.

Sub-center ArcFace (Deng et al., ECCV 2020): with several centroids a class, clean images gather around one
and noise around the others. Afterwards the centroid nearest to most images of a class is its dominant one,
and images farther than 75 degrees from it are dropped before training again with one centroid.

Legend: N images of a rank, B of all, S centroids of a class, K classes.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.cache import open_data_set
from trainer.collectives import gather_batch, sum_over
from trainer.distributed import joined_world
from trainer.errors import UserError
from trainer.feed import build_eval_batches
from trainer.head import DenseHead, own_targets
from trainer.index import Index
from trainer.models import load_model
from trainer.options import load


class Noise(NamedTuple):
    """What was found in the training data of a run."""

    images: int
    suspects: list[tuple[int, float]]
    """(sample, degrees to the dominant centroid of its class)."""
    beside_dominant: int
    """Images whose nearest centroid is not the dominant one."""


def find_noise(run: Path, degrees: float, overrides: Sequence[str] = ()) -> tuple[Noise, Path]:
    """Look through the training data of a run; return what was found and the list that names it.

    Rank 0 writes ``noise/suspects.jsonl`` into the run's folder, for ``data.quarantine``. Every rank must
    call it. Raises UserError for a run without sub-centroids or an index.
    """
    config = load(run / "config.yaml", overrides)
    if config.head.sub_centroids < 2:
        raise UserError(f"head.sub_centroids: {run} was trained with 1; noise shows with 2 or 3")
    if config.data.reader == "stream" or config.data.mix:
        raise UserError(f"data.train: {run} was not trained on one indexed set")
    path = run / "noise" / "suspects.jsonl"
    with joined_world(config.engine.timeout_seconds) as world:
        index = open_data_set(config.data.train, "data.train", config.data)
        backbone, head = load_model(run, config, world)
        loader = build_eval_batches(config, index, world)
        cosines, labels = [], []
        with torch.no_grad():
            for batch in loader:
                valid_B = gather_batch(batch.valid_N.to(world.device), world.group)
                labels_B = gather_batch(batch.labels_N.to(world.device), world.group)[valid_B]
                features_ND = F.normalize(backbone(batch.images_NCHW.to(world.device)).float())
                features_BD = gather_batch(features_ND, world.group)[valid_B]
                cosines.append(cosines_to_own(features_BD, labels_B, head).cpu())
                labels.append(labels_B.cpu())
        found = judge_noise(torch.cat(cosines), torch.cat(labels), degrees)
        if world.is_main:
            write_suspects(path, index, found, degrees)
    return found, path


def cosines_to_own(features_BD: Tensor, labels_B: Tensor, head: DenseHead) -> Tensor:
    """Return the B x S cosines of a batch, that all ranks hold, to its own classes' rows. Collective."""
    rows, columns = own_targets(labels_B, head.shard)
    centroids_CSD = head.directions_CD().unflatten(0, (len(head.shard), -1))
    cosine_BS = features_BD.new_zeros(len(labels_B), centroids_CSD.shape[1])
    cosine_BS[rows] = (features_BD[rows, None] * centroids_CSD[columns]).sum(2)
    return sum_over(cosine_BS, head.group)


def judge_noise(cosine_BS: Tensor, labels_B: Tensor, degrees: float) -> Noise:
    """Return the images farther than ``degrees`` from their class' dominant centroid, farthest first."""
    num_classes, many = int(labels_B.max()) + 1, cosine_BS.shape[1]
    nearest_B = cosine_BS.argmax(1)
    counts_KS = torch.bincount(labels_B * many + nearest_B, minlength=num_classes * many).view(-1, many)
    dominant_B = counts_KS.argmax(1)[labels_B]
    cosine_B = cosine_BS.take_along_dim(dominant_B[:, None], 1).squeeze(1)
    order = cosine_B.argsort(stable=True)
    far = order[cosine_B[order] < math.cos(math.radians(degrees))]
    angles = torch.rad2deg(torch.acos(cosine_B[far].clamp(-1.0, 1.0)))
    suspects = list(zip(far.tolist(), angles.tolist(), strict=True))
    return Noise(len(labels_B), suspects, int((nearest_B != dominant_B).sum()))


def write_suspects(path: Path, index: Index, found: Noise, degrees: float) -> None:
    """Write one JSON line for every suspect, in the form of the ledger of bad samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="ascii") as file:
        for sample, angle in found.suspects:
            shard, offset = index.locate(sample)
            line = {
                "shard": shard,
                "offset": offset,
                "key": index.member_name(sample),
                "label": int(index.labels_N[sample]),
                "reason": f"{angle:.1f} degrees from the dominant centroid, more than {degrees:g}",
            }
            file.write(json.dumps(line) + "\n")
