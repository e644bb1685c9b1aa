"""A model judged by a protocol: its sets are embedded by all ranks, and figures come out as (name, value).

What a protocol computes is in ``trainer/protocols``; here is what it is fed with. Every rank must call these
functions, and every rank gets the same figures.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trainer import album, metrics
from trainer.bench import FARS, Bench, EmbeddedSet, Figures, Model, OpenModel, interval_of, rate_name
from trainer.config import ProtocolConfig, Region
from trainer.distributed import World
from trainer.embed import embed_all
from trainer.errors import UserError
from trainer.metrics import Images
from trainer.order import epoch_order
from trainer.protocols import distractors, open_set, persons
from trainer.protocols import pairs as listed
from trainer.protocols.bootstrap import interval, mean_interval
from trainer.protocols.closed_set import class_means, closed_set
from trainer.protocols.few_shot import few_shot
from trainer.protocols.identification import identification, pooled
from trainer.protocols.ranking import images_of
from trainer.protocols.reid import JUNK, Seen, reid
from trainer.protocols.reranking import reranked
from trainer.protocols.retrieval import retrieval

EXACT_UP_TO = 20_000
"""Images up to which all pairs are compared to the last bit; above, to one bin of a histogram."""

# What changes the figures of which protocol; all else is refused. Every protocol has the other fields.
_TAKES = {
    "closed_set": {"gallery", "ks"},
    "pairs": {"pairs", "fars"},
    "open_set": {"fars", "template", "notes"},
    "identification": {"gallery", "gallery_notes", "ks", "fpirs", "template", "notes"},
    "distractors": {"distractors", "sizes", "ks", "fpirs", "fars"},
    "reid": {"gallery", "gallery_notes", "ks", "rerank", "notes"},
    "persons": {"splits", "regions"},
    "retrieval": {"gallery", "gallery_notes", "ks", "template", "notes"},
    "few_shot": {"ways", "shots", "queries", "episodes", "within"},
}
_COMMON = {"protocol", "data", "flip", "bootstrap", "missing"}
_NEEDS = {"identification": ("gallery",), "reid": ("gallery",), "distractors": ("distractors",)}


def check(config: ProtocolConfig, prefix: str) -> None:
    """Refuse fields that cannot take effect, and name those that are missing. Raises UserError."""
    defaults = ProtocolConfig(protocol=config.protocol, data=config.data)
    for name in ProtocolConfig.__slots__:  # type: ignore[attr-defined]
        taken = name in _COMMON | _TAKES[config.protocol]
        if not taken and getattr(config, name) != getattr(defaults, name):
            raise UserError(f"{prefix}{name}: the protocol {config.protocol} has no use for it")
    for name in _NEEDS.get(config.protocol, ()):
        if getattr(config, name) is None:
            raise UserError(f"{prefix}{name}: the protocol {config.protocol} needs it")


def judge(
    config: ProtocolConfig, model: Model | None, world: World, open_model: OpenModel | None, prefix: str = ""
) -> Figures:
    """Yield the figures of a protocol. ``prefix`` begins the names of fields in messages.

    ``model`` may be None if all data are embeddings already. ``open_model`` opens those of other regions.
    """
    check(config, prefix)
    yield from _PROTOCOLS[config.protocol](Bench(config, model, world, open_model, prefix))


def _closed_set(bench: Bench) -> Figures:
    found = bench.embed(bench.open("data"))
    names = found.images.class_names
    if bench.config.gallery is not None:
        gallery = bench.embed(bench.open("gallery"))
        known = gallery.images.class_names
        num_classes = len(known) or int(gallery.labels_N.max()) + 1
        centroids_KD = class_means(gallery.embeddings_ND, gallery.labels_N, num_classes)
    else:
        model = bench.required_model("data")
        if model.centroids is None:
            raise UserError(f"{bench.prefix}gallery: needed where there is no head, to make class means of")
        centroids_KD, known = model.centroids(), model.class_names
    labels_N = found.labels_N
    if names and known:
        label_of = {name: label for label, name in enumerate(known)}
        if unknown := [name for name in names if name not in label_of]:
            raise UserError(f"{bench.prefix}data: class {unknown[0]!r} has no centroid")
        labels_N = torch.tensor([label_of[name] for name in names], device=labels_N.device)[labels_N]
    ks = bench.config.ks or (1, 5)
    result = closed_set(found.embeddings_ND, labels_N, centroids_KD, ks, bench.sharing)
    yield "num_images", float(len(labels_N))
    yield from bench.left_out(("failed_images", len(found.images) - len(labels_N)))
    by_distance = bench.config.gallery is not None  # rows of a head are directions, not points
    hits = {name: hit for name, hit in result.hits.items() if by_distance or not name.endswith("_euclidean")}
    yield from bench.means(hits, labels_N)
    yield from _most_confused(labels_N, result.predicted_N, known)


def _most_confused(labels_N: Tensor, predicted_N: Tensor, names: Sequence[str], most: int = 10) -> Figures:
    """Yield the pairs of classes that are most often taken for one another, with how often."""
    wrong = labels_N != predicted_N
    pairs_M2, counts_M = torch.stack([labels_N, predicted_N], 1)[wrong].unique(dim=0, return_counts=True)
    for row in counts_M.argsort(descending=True, stable=True)[:most].tolist():
        true, taken = (names[label] if names else str(label) for label in pairs_M2[row].tolist())
        yield f"confused/{true}>{taken}", float(counts_M[row])


def _pairs(bench: Bench) -> Figures:
    source = bench.open("data")
    pairs = listed.read_pairs(_pairs_file(bench.config, bench.prefix))
    position_of = source.images.position_of
    rows_P2 = np.array(
        [[position_of.get(key, -1) for key in both] for both in zip(pairs.first, pairs.second, strict=True)]
    )
    there_P = (rows_P2 >= 0).all(axis=1)
    if not there_P.all() and bench.config.missing == "error":
        row = int(np.flatnonzero(~there_P)[0])
        key = (pairs.first, pairs.second)[int(rows_P2[row, 0] >= 0)][row]
        raise UserError(f"{bench.prefix}pairs: image {key} is not in {bench.config.data}")
    found = bench.embed(source, np.unique(rows_P2[there_P]))
    there_P = there_P & np.isin(rows_P2, found.positions_N).all(axis=1)
    pairs, rows_P2 = pairs.only(np.asarray(there_P)), np.searchsorted(found.positions_N, rows_P2[there_P])
    cosines_P = _cosines(found.features_ND, rows_P2)
    yield "num_pairs", float(len(pairs))
    yield from bench.left_out(("missing_pairs", int((~there_P).sum())))
    identities_P2 = found.labels_N.cpu().numpy()[rows_P2]
    yield from _of_pairs(bench, cosines_P, pairs, identities_P2)


def _of_pairs(bench: Bench, cosines_P: NDArray, pairs: listed.Pairs, identities_P2: NDArray) -> Figures:
    same_P, fold_P = pairs.same_P, pairs.fold_P
    if same_P.all() or not same_P.any():
        raise UserError(f"{bench.prefix}pairs: the images that are there make no pair of each kind")
    names_K, identity_P2 = np.unique(identities_P2, return_inverse=True)
    identity_P2 = identity_P2.reshape(-1, 2)

    def with_interval(name: str, statistic: Callable[[NDArray], float]) -> Figures:
        """A pair counts as often as both of its persons were drawn."""
        yield name, statistic(np.ones(len(same_P)))
        if bench.config.bootstrap:

            def drawn(counts_K: NDArray) -> float:
                first_P, second_P = counts_K[identity_P2].T.astype(float)
                return statistic(
                    np.where(identity_P2[:, 0] == identity_P2[:, 1], first_P, first_P * second_P)
                )

            yield from interval_of(name, interval(drawn, len(names_K), bench.config.bootstrap))

    if len(np.unique(fold_P)) > 1:
        accuracies = listed.fold_accuracies(cosines_P, same_P, fold_P)
        yield from with_interval(
            "accuracy", lambda w: float(np.nanmean(listed.fold_accuracies(cosines_P, same_P, fold_P, w)))
        )
        yield "accuracy_std", float(accuracies.std())
    yield from with_interval("accuracy_all", lambda w: listed.best_accuracy(cosines_P, same_P, w))
    found = listed.curve(cosines_P, same_P, bench.config.fars or FARS)
    yield "auc", found.auc
    yield "eer", found.eer
    for name, tar in bench.rates(found):
        far = float(name.rpartition("=")[2])
        yield name, tar
        if bench.config.bootstrap:
            tar_of = partial(listed.weighted_tar, cosines_P, same_P, far)
            yield from list(with_interval(name, tar_of))[1:]


def _pairs_file(config: ProtocolConfig, prefix: str) -> Path:
    if config.pairs is not None:
        return config.pairs
    places = [config.data / name for name in ("index/pairs.csv", "pairs.csv", "pairs.txt")]
    for place in places:
        if place.is_file():
            return place
    raise UserError(
        f"{prefix}pairs: {config.data} has no {' or '.join(p.name for p in places[1:])}: name a file"
    )


def _cosines(features_ND: Tensor, rows_P2: NDArray, block: int = 1 << 16) -> NDArray[np.float32]:
    """Return the cosine of each pair, float64 rounded to float32."""
    parts = [
        (features_ND[i].double() * features_ND[j].double()).sum(dim=1).float()
        for i, j in (
            torch.from_numpy(rows).to(features_ND.device).T
            for rows in np.split(rows_P2, range(block, len(rows_P2), block))
        )
    ]
    return torch.cat(parts).cpu().numpy()


def _open_set(bench: Bench) -> Figures:
    found = bench.embed(bench.open("data"))
    features_ND, labels_N = _pooled(bench, found, found.labels_N, bench.config.notes)
    fars = bench.config.fars or FARS
    sharing = bench.sharing
    exact = len(labels_N) <= EXACT_UP_TO
    if exact:
        curve = metrics.verification(features_ND, labels_N, fars, sharing.part, sharing.total, sharing.gather)
    else:
        curve = open_set.all_pairs(features_ND, labels_N, fars, sharing)
    yield "num_images", float(len(labels_N))
    yield from bench.left_out(("failed_images", len(found.images) - len(found.labels_N)))
    yield "bin_width", 0.0 if exact else 1 / open_set.BINS_OF_ONE
    yield "auc", curve.auc
    yield "best_accuracy", curve.best_accuracy
    yield "eer", curve.eer
    genuine = open_set.genuine_by_class(features_ND, labels_N) if bench.config.bootstrap else None
    for name, tar in bench.rates(curve):
        yield name, tar
        if genuine is not None:
            scores_P, classes_P = genuine
            accepted = round(tar * len(scores_P))
            values_P = np.zeros(len(scores_P))
            values_P[np.argsort(-scores_P, kind="stable")[:accepted]] = 1
            yield from interval_of(name, mean_interval(values_P, classes_P, bench.config.bootstrap))


def _identification(bench: Bench) -> Figures:
    probes, gallery = _probes_and_gallery(bench)
    ks = bench.config.ks or (1, 5, 10)
    values, mated_P, rates = identification(probes, gallery, ks, bench.config.fpirs, bench.sharing)
    yield "num_mated", float(mated_P.sum())
    yield "num_strangers", float((~mated_P).sum())
    yield from bench.means(values, probes.labels[mated_P])
    yield from ((f"tpir@fpir={rate_name(fpir)}", tpir) for fpir, tpir in rates.items())


def _retrieval(bench: Bench) -> Figures:
    queries, gallery = _probes_and_gallery(bench)
    values, counts_P = retrieval(queries, gallery, bench.config.ks or (1, 2, 4, 8), bench.sharing)
    yield "num_queries", float(counts_P.sum())
    yield from bench.means(values, queries.labels[counts_P])


def _probes_and_gallery(bench: Bench) -> tuple[Images, Images]:
    """Return both, with labels that mean the same; without a gallery the data twice."""
    found = bench.embed(bench.open("data"))
    if bench.config.gallery is None:
        probes = images_of(*_pooled(bench, found, found.labels_N, bench.config.notes))
        return probes, probes
    other = bench.embed(bench.open("gallery"))
    labels_N, others_N = _joined(found, other)
    probes = images_of(*_pooled(bench, found, labels_N, bench.config.notes))
    pooled_gallery = _pooled(bench, other, others_N, bench.config.gallery_notes)
    return probes, images_of(*pooled_gallery, first_id=len(probes))


def _joined(first: EmbeddedSet, second: EmbeddedSet) -> tuple[Tensor, Tensor]:
    """Return the labels of two sets in one numbering: by name where both have names, else by number."""
    names = first.images.class_names, second.images.class_names
    if not all(names):
        return first.labels_N, second.labels_N
    label_of = {name: label for label, name in enumerate(dict.fromkeys([*names[0], *names[1]]))}
    tables = (torch.tensor([label_of[name] for name in each]) for each in names)
    both = zip(tables, (first, second), strict=True)
    first_N, second_N = (table.to(found.labels_N.device)[found.labels_N] for table, found in both)
    return first_N, second_N


def _pooled(bench: Bench, found: EmbeddedSet, labels_N: Tensor, notes: Path | None) -> tuple[Tensor, Tensor]:
    """Return unit features and labels: of images, or of templates."""
    if not bench.config.template:
        return found.features_ND, labels_N
    device = labels_N.device
    names_T, first_T, template_N = np.unique(
        found.required_note("template", notes), return_index=True, return_inverse=True
    )
    labels_T = labels_N[torch.from_numpy(first_T).to(device)]
    template = torch.from_numpy(template_N).to(device)
    mixed = (labels_T[template] != labels_N).nonzero()
    if len(mixed):
        raise UserError(
            f"{found.images.field}: template {names_T[template_N[int(mixed[0])]]} is of two classes"
        )
    media = found.note("media", notes)
    media_N = None if media is None else torch.from_numpy(np.unique(media, return_inverse=True)[1]).to(device)
    return pooled(found.features_ND, template, media_N)[0], labels_T


def _distractors(bench: Bench) -> Figures:
    found = bench.embed(bench.open("data"))
    probes = images_of(found.features_ND, found.labels_N)
    first_Q, _, scores_Q = distractors.genuine_pairs(probes)
    source = bench.open("distractors")
    places_N = np.empty(len(source.images), dtype=np.int64)
    places_N[epoch_order(len(source.images), seed=0, epoch=0)] = np.arange(len(source.images))
    sizes = bench.config.sizes or _powers_of_ten(len(source.images))
    ks = bench.config.ks or (1, 10)
    best = distractors.BestDistractors(probes, sizes, deepest=max(100, *ks))
    for part in bench.stream(source):
        places = torch.from_numpy(places_N[part.positions_N.cpu().numpy()]).to(probes.features.device)
        best.add(F.normalize(part.embeddings_ND), places)
    yield "num_probes", float(len(probes))
    yield "num_pairs", float(len(first_Q))
    yield from bench.left_out(("failed_images", len(found.images) - len(probes)))
    identities_Q = probes.labels[first_Q]
    for size, seen, best_Pk in best.finish(bench.sharing):
        if seen < size and bench.config.missing == "error":
            raise UserError(f"{bench.prefix}sizes: {size} distractors are asked for, there are {seen}")
        yield from bench.left_out((f"distractors@{size}", seen))
        ranks_Q = distractors.rank_among(first_Q, scores_Q, best_Pk)
        yield from bench.means({f"rank{k}@{size}": (ranks_Q <= k).double() for k in ks}, identities_Q)
        for fpir, rate in distractors.open_set_rates(first_Q, scores_Q, best_Pk, bench.config.fpirs).items():
            yield f"tpir@fpir={rate_name(fpir)}@{size}", rate
        rates = distractors.accept_rates(first_Q, scores_Q, best_Pk, seen, bench.config.fars or FARS)
        yield from ((f"tar@far={rate_name(far)}@{size}", rate) for far, rate in rates.items())


def _powers_of_ten(num: int) -> tuple[int, ...]:
    """Return 10, 100, ... below ``num``, and ``num``."""
    return (*(10**i for i in range(1, len(str(num))) if 10**i < num), num)


def _reid(bench: Bench) -> Figures:
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
    return [str(int(v)) if v.lstrip("-").isdecimal() else str(v) for v in values]


def _persons(bench: Bench) -> Figures:
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
                yield f"{split}/accuracy_{region}", persons.accuracy(albums["test"], alone, bench.sharing)[0]


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


def _few_shot(bench: Bench) -> Figures:
    config, found = bench.config, bench.embed(bench.open("data"))
    names = found.images.class_names
    if config.within and not names:
        raise UserError(f"{bench.prefix}within: the classes of {config.data} have no names")
    groups = [name.rpartition("/")[0] for name in names] if config.within else None
    counts = config.ways, config.shots, config.queries, config.episodes
    accuracy_E = few_shot(found.features_ND, found.labels_N, *counts, groups, sharing=bench.sharing)
    yield from bench.left_out(("failed_images", len(found.images) - len(found.labels_N)))
    mean = float(accuracy_E.mean())
    yield "accuracy", mean
    half = 1.96 * float(accuracy_E.std()) / math.sqrt(len(accuracy_E)) if len(accuracy_E) > 1 else math.nan
    yield from interval_of("accuracy", (mean - half, mean + half))


_PROTOCOLS: dict[str, Callable[[Bench], Figures]] = {
    "closed_set": _closed_set,
    "pairs": _pairs,
    "open_set": _open_set,
    "identification": _identification,
    "distractors": _distractors,
    "reid": _reid,
    "persons": _persons,
    "retrieval": _retrieval,
    "few_shot": _few_shot,
}
