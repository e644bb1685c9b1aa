"""One to one: pairs that a file lists, and all pairs of a set.

Dimensions: N images, D feature, P pairs, K identities.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer import metrics
from trainer.bench import FARS, Bench, Figures, interval_of
from trainer.config import ProtocolConfig
from trainer.errors import UserError
from trainer.protocols import open_set
from trainer.protocols import pairs as listed
from trainer.protocols.bootstrap import interval, mean_interval
from trainer.protocols.drawn_pairs import drawn_intervals
from trainer.roc import equal_error_rate

EXACT_UP_TO = 20_000
"""Images up to which all pairs are compared to the last bit; above, to one bin of a histogram."""


def judge_pairs(bench: Bench) -> Figures:
    """Yield the figures of ``protocols/pairs.py``."""
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
    if not there_P.any():
        raise UserError(f"{bench.prefix}pairs: no pair has both of its images in {bench.config.data}")
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
    alike_P = identity_P2[:, 0] == identity_P2[:, 1]
    if bench.config.bootstrap and (alike_P != same_P).any():
        raise UserError(
            f"{bench.prefix}bootstrap: draws persons; the labels of {bench.config.data} are not persons"
        )

    def with_interval(name: str, statistic: Callable[[NDArray], float]) -> Figures:
        """A pair counts as often as both of its persons were drawn."""
        yield name, statistic(np.ones(len(same_P)))
        if bench.config.bootstrap:

            def drawn(counts_K: NDArray) -> float:
                first_P, second_P = counts_K[identity_P2].T.astype(float)
                weights_P = np.where(alike_P, first_P, first_P * second_P)
                both_kinds = weights_P[same_P].any() and weights_P[~same_P].any()
                return statistic(weights_P) if both_kinds else math.nan

            yield from interval_of(name, interval(drawn, len(names_K), bench.config.bootstrap))

    def roc(weights_P: NDArray) -> tuple[NDArray, NDArray]:
        return listed.weighted_roc(cosines_P, same_P, weights_P)

    if len(np.unique(fold_P)) > 1:
        accuracies = listed.fold_accuracies(cosines_P, same_P, fold_P)
        yield from with_interval(
            "accuracy", lambda w: float(np.nanmean(listed.fold_accuracies(cosines_P, same_P, fold_P, w)))
        )
        yield "accuracy_std", float(accuracies.std())
    yield from with_interval("accuracy_all", lambda w: listed.best_accuracy(cosines_P, same_P, w))
    found = listed.curve(cosines_P, same_P, bench.config.fars or FARS)
    yield from with_interval("auc", lambda w: float(np.trapezoid(*roc(w)[::-1])))
    yield from with_interval("eer", lambda w: equal_error_rate(*roc(w)))
    for name, _ in bench.rates(found):
        far = float(name.rpartition("=")[2])
        yield from with_interval(name, partial(listed.weighted_tar, cosines_P, same_P, far))


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


def judge_open_set(bench: Bench) -> Figures:
    """Yield the figures of all pairs of a set: exact, or of ``protocols/open_set.py``."""
    found = bench.embed(bench.open("data"))
    features_ND, labels_N = bench.by_template(found, found.labels_N, bench.config.notes)
    num_failed = len(found.images) - len(found.labels_N)
    del found  # of many images two copies would be a large part of the memory
    fars = bench.config.fars or FARS
    sharing = bench.sharing
    exact = len(labels_N) <= EXACT_UP_TO
    if exact:
        curve = metrics.verification(features_ND, labels_N, fars, sharing.part, sharing.total, sharing.gather)
    else:
        curve = open_set.all_pairs(features_ND, labels_N, fars, sharing)
    yield "num_images", float(len(labels_N))
    yield from bench.left_out(("failed_images", num_failed))
    yield "bin_width", 0.0 if exact else 1 / open_set.BINS_OF_ONE
    intervals: dict[str, tuple[float, float]] = {}
    if bench.config.bootstrap:
        intervals = drawn_intervals(features_ND, labels_N, curve, bench.config.bootstrap, sharing)
    for name, value in (("auc", curve.auc), ("best_accuracy", curve.best_accuracy), ("eer", curve.eer)):
        yield name, value
        if name in intervals:
            yield from interval_of(name, intervals[name])
    genuine = open_set.genuine_by_class(features_ND, labels_N) if bench.config.bootstrap else None
    for name, tar in bench.rates(curve):
        yield name, tar
        if genuine is not None:
            scores_P, classes_P = genuine
            accepted = round(tar * len(scores_P))
            values_P = np.zeros(len(scores_P))
            values_P[np.argsort(-scores_P, kind="stable")[:accepted]] = 1
            yield from interval_of(name, mean_interval(values_P, classes_P, bench.config.bootstrap))
