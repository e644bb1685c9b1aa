"""Persons rather than faces: over cameras (Market-1501), and in albums by their regions (PIPA).

Dimensions: N instances, Q queries, G gallery, D feature.
"""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer import album
from trainer.bench import Bench, EmbeddedSet, Figures, Model
from trainer.config import Region
from trainer.embed import embed_all
from trainer.errors import UserError
from trainer.protocols import persons
from trainer.protocols.reid import JUNK, Seen, reid
from trainer.protocols.reranking import reranked


def judge_reid(bench: Bench) -> Figures:
    """Yield the figures of ``protocols/reid.py``."""
    config, found, other = bench.config, bench.embed(bench.open("data")), bench.embed(bench.open("gallery"))
    people = [_people(found, config.notes), _people(other, config.gallery_notes)]
    names = {name: number for number, name in enumerate(dict.fromkeys([*people[0], *people[1]]))}
    names["-1"] = JUNK
    cameras = [
        found.required_note("camera", config.notes),
        other.required_note("camera", config.gallery_notes),
    ]
    camera_of = {name: number for number, name in enumerate(dict.fromkeys([*cameras[0], *cameras[1]]))}
    device = found.embeddings_ND.device
    queries, gallery = (
        Seen(
            torch.tensor([names[name] for name in people[i]], device=device),
            torch.tensor([camera_of[name] for name in cameras[i]], device=device),
        )
        for i in (0, 1)
    )
    queries_QD, gallery_GD = found.features_ND, other.features_ND
    similarities: dict[str, Callable[[slice], Tensor]] = {
        "": lambda rows: (queries_QD[rows].double() @ gallery_GD.double().T).float()
    }
    if config.rerank:
        similarities["reranked_"] = reranked(queries_QD, gallery_GD, sharing=bench.sharing)
    for prefix, function in similarities.items():
        values, counts_Q = reid(function, queries, gallery, config.ks or (1, 5, 10), bench.sharing)
        if not prefix:
            yield "num_queries", float(counts_Q.sum())
            failed = len(found.images) + len(other.images) - len(queries) - len(gallery)
            yield from bench.left_out(("failed_images", failed))
        named = {prefix + name: value for name, value in values.items()}
        yield from bench.means(named, queries.persons[counts_Q])


def _people(found: EmbeddedSet, notes: Path | None) -> list[str]:
    """Return the person of every image: the note of that name, else the class; 0002 is 2."""
    values = found.note("person", notes)
    if values is None:
        names = found.images.class_names
        values = np.array([names[label] if names else str(label) for label in found.labels_N.tolist()])
    return [str(int(v)) if re.fullmatch(r"-?\d{1,18}", v) else str(v) for v in values]


def judge_persons(bench: Bench) -> Figures:
    """Yield the figures of ``protocols/persons.py``."""
    config, folder = bench.config, bench.config.data
    models = {
        region: bench.required_model(f"{bench.prefix}regions") if run is None else _open(bench, run)
        for region, run in config.regions.items()
    }
    for split in config.splits:
        albums = {}
        for part in ("val", "test"):
            instances = album.read_split(folder, part, split)
            albums[part], num_failed = _album(bench, instances, models)
            if part == "test":
                yield f"{split}/num_instances", float(len(albums[part].halves))
                yield from bench.left_out((f"{split}/failed_instances", num_failed))
        weights = persons.best_weights(albums["val"], bench.sharing)
        _, hits_N = persons.accuracy(albums["test"], weights, bench.sharing)
        yield from _swapped(bench, f"{split}/accuracy", hits_N, albums["test"])
        for number, region in enumerate(models):
            yield f"{split}/weight_{region}", weights[number]
            if len(models) > 1:
                alone = tuple(float(i == number) for i in range(len(models)))
                _, hits_N = persons.accuracy(albums["test"], alone, bench.sharing)
                yield from _swapped(bench, f"{split}/accuracy_{region}", hits_N, albums["test"])


def _open(bench: Bench, run: Path) -> Model:
    if bench.open_model is None:
        raise UserError(f"{bench.prefix}regions: while training only the model itself is judged, not {run}")
    return bench.open_model(run)


def _swapped(bench: Bench, name: str, hits_N: Tensor, found: persons.Album) -> Figures:
    """Yield the mean of the two halves' accuracies: the mean of hits that weigh as much for each half."""
    sizes_N = torch.where(found.halves == 0, (found.halves == 0).sum(), (found.halves == 1).sum())
    weighted = hits_N * len(hits_N) / (2 * sizes_N)
    yield from bench.means({name: weighted}, found.identities)


def _album(
    bench: Bench, instances: album.Instances, models: dict[Region, Model]
) -> tuple[persons.Album, int]:
    """Embed all regions of a split; an instance that lacks one is left out."""
    num = len(instances.photos)
    kept = torch.ones(num, dtype=torch.bool, device=bench.world.device)
    features = []
    for region, model in models.items():
        images = album.crops(instances, region, f"{bench.prefix}data")
        found = embed_all(model.embed, images, bench.reading(model), bench.world)
        whole_ND = found.embeddings_ND.new_zeros(num, found.embeddings_ND.shape[1])
        whole_ND[found.positions_N] = F.normalize(found.embeddings_ND)
        features.append(whole_ND)
        kept &= torch.isin(torch.arange(num, device=kept.device), found.positions_N)
    identities, halves = (
        torch.from_numpy(x).to(kept.device) for x in (instances.identities_N, instances.halves_N)
    )
    chosen = tuple(features_ND[kept] for features_ND in features)
    return persons.Album(chosen, identities[kept], halves[kept]), int((~kept).sum())
