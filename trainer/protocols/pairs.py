"""Verification of listed pairs, as LFW and its kin: do two images show the same person?

    accuracy           mean over folds; each fold's threshold is the best of the other folds      (LFW)
    accuracy_std       standard deviation over folds (population, as published code has it)
    accuracy_all       best threshold on all pairs at once, which some papers report; never lower by chance
    auc, eer, tar@far=x   of all pairs, see ``roc.Verification``

Thresholds of folds are those of published code: squared Euclidean distance d = 2 - 2 cos of unit features, 0
to 4 in steps of 0.01, the smallest of the best. Embeddings of an image and its mirror image may be summed
first.

Dimensions: P pairs, T thresholds, F folds.
"""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.roc import Verification, curve_of_counts

GRID_T = np.arange(0, 4, 0.01)
NO_FOLD = -1

_SAME = {"1": True, "true": True, "0": False, "false": False}


@dataclass(frozen=True)
class Pairs:
    """Pairs of images by their keys."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    same_P: NDArray[np.bool_]
    fold_P: NDArray[np.int64]
    """``NO_FOLD`` everywhere if the file has none."""

    def __len__(self) -> int:
        return len(self.first)

    def only(self, kept_P: NDArray[np.bool_]) -> "Pairs":
        """Return some of the pairs."""
        rows = np.flatnonzero(kept_P)
        first, second = tuple(self.first[i] for i in rows), tuple(self.second[i] for i in rows)
        return Pairs(first, second, self.same_P[rows], self.fold_P[rows])


def read_pairs(path: Path) -> Pairs:
    """Read a pairs.txt of LFW's form, or a CSV with a header line. Raises UserError naming the line.

    CSV columns: ``key1`` or ``path1``, ``key2`` or ``path2``, ``same`` (1, 0, true, false), and perhaps
    ``fold`` (a whole number).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # Excel begins a CSV with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read pairs: {error}") from None
    try:
        pairs = _read_csv(path, text) if "," in text.partition("\n")[0] else _read_lfw(path, text)
    except csv.Error as error:
        raise UserError(f"{path}: cannot read pairs: {error}") from None
    if pairs.same_P.all() or not pairs.same_P.any():
        raise UserError(f"{path}: all of its {len(pairs)} pairs are {'same' if len(pairs) else 'missing'}")
    return pairs


def fold_accuracies(
    cosines_P: NDArray, same_P: NDArray[np.bool_], fold_P: NDArray, weights_P: NDArray | None = None
) -> NDArray[np.float64]:
    """Return the accuracy of each fold at the threshold that is best on all other folds."""
    weights_P = np.ones(len(same_P)) if weights_P is None else weights_P
    distances_P = 2 - 2 * cosines_P.astype(np.float64)
    accuracies = []
    for fold in np.unique(fold_P):
        inside_P = fold_P == fold
        others_T = _accuracies(distances_P[~inside_P], same_P[~inside_P], weights_P[~inside_P])
        threshold = GRID_T[others_T.argmax()]
        right = (distances_P[inside_P] < threshold) == same_P[inside_P]
        total = weights_P[inside_P].sum()
        accuracies.append(right @ weights_P[inside_P] / total if total else np.nan)
    return np.array(accuracies)


def best_accuracy(cosines_P: NDArray, same_P: NDArray[np.bool_], weights_P: NDArray | None = None) -> float:
    """Return the highest accuracy of any threshold, on the very pairs it is chosen on."""
    weights_P = np.ones(len(same_P)) if weights_P is None else weights_P
    order_P = np.argsort(-cosines_P, kind="stable")
    falling_P = cosines_P[order_P]
    # Accept the first n: right are the same ones among them, and the different ones after them.
    gain_P = np.where(same_P, weights_P, -weights_P)[order_P]
    right_P = np.concatenate([[0], gain_P.cumsum()]) + weights_P[~same_P].sum()
    possible_P = np.concatenate([[True], falling_P[1:] != falling_P[:-1], [True]])
    return float(right_P[possible_P].max() / weights_P.sum())


def curve(
    cosines_P: NDArray,
    same_P: NDArray[np.bool_],
    fars: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6),
) -> Verification:
    """Return ROC, AUC, EER and TAR at those FARs that the number of different pairs can support."""
    scores_P = cosines_P.astype(np.float32)
    thresholds_T, genuine_T = np.unique(scores_P[same_P], return_counts=True)
    impostors = np.sort(scores_P[~same_P])
    above_T = len(impostors) - np.searchsorted(impostors, thresholds_T, side="right")
    reaching_T = len(impostors) - np.searchsorted(impostors, thresholds_T, side="left")
    edges_T = np.nextafter(thresholds_T, np.float32(np.inf))
    return curve_of_counts(thresholds_T, edges_T, genuine_T, above_T, reaching_T, len(impostors), fars)


def weighted_roc(
    cosines_P: NDArray, same_P: NDArray[np.bool_], weights_P: NDArray
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return FAR and TAR from (0, 0) to (1, 1) of pairs that count so often; each kind must count."""
    order_P = np.argsort(-cosines_P, kind="stable")
    falling_P, same_P, weights_P = cosines_P[order_P], same_P[order_P], weights_P[order_P]
    last_P = np.append(falling_P[1:] != falling_P[:-1], True)
    sums = [np.cumsum(weights_P * kind) for kind in (~same_P, same_P)]
    far_V, tar_V = (np.concatenate([[0], sum_P[last_P]]) / sum_P[-1] for sum_P in sums)
    return far_V, tar_V


def weighted_tar(cosines_P: NDArray, same_P: NDArray[np.bool_], far: float, weights_P: NDArray) -> float:
    """Return the highest weighted TAR of any threshold with weighted FAR <= ``far``."""
    far_V, tar_V = weighted_roc(cosines_P, same_P, weights_P)
    return float(tar_V[np.searchsorted(far_V, far + 1e-12, side="right") - 1])


def _accuracies(distances_P: NDArray, same_P: NDArray[np.bool_], weights_P: NDArray) -> NDArray:
    """Return the accuracy of each threshold of the grid."""
    accepted_T = [_below(distances_P[kind], weights_P[kind]) for kind in (same_P, ~same_P)]
    return accepted_T[0] - accepted_T[1]  # but for a constant, and a positive factor


def _below(distances: NDArray, weights: NDArray) -> NDArray:
    """Return the weight of the distances below each threshold of the grid."""
    order = np.argsort(distances, kind="stable")
    sums = np.concatenate([[0], weights[order].cumsum()])
    return sums[np.searchsorted(distances[order], GRID_T, side="left")]


def _read_csv(path: Path, text: str) -> Pairs:
    rows = csv.DictReader(text.splitlines(), skipinitialspace=True)
    fields = rows.fieldnames or []
    columns = [next((f for f in (f"key{i}", f"path{i}") if f in fields), None) for i in "12"]
    if None in columns or "same" not in fields:
        raise UserError(
            f"{path}: its header {','.join(fields)!r} has no key1,key2,same (or path1,path2,same)"
        )
    first, second, same, folds = [], [], [], []
    for row in rows:
        text_same, text_fold = row["same"], row.get("fold") or str(NO_FOLD)
        if (
            text_same is None
            or text_same.strip().lower() not in _SAME
            or not re.fullmatch(r"-?\d{1,18}", text_fold)
        ):
            raise UserError(f"{path}:{rows.line_num}: same is {text_same!r} and fold {text_fold!r}")
        first.append(str(row[columns[0] or ""]))
        second.append(str(row[columns[1] or ""]))
        same.append(_SAME[text_same.strip().lower()])
        folds.append(int(text_fold))
    return Pairs(tuple(first), tuple(second), np.array(same, dtype=bool), np.array(folds, dtype=np.int64))


def _read_lfw(path: Path, text: str) -> Pairs:
    """Read "FOLDS N" and then, for each fold, N lines "name i j" and N lines "name i other j"."""
    head, *lines = [line.split() for line in text.splitlines() if line.strip()] or [[]]
    if not 1 <= len(head) <= 2 or not all(word.isdecimal() for word in head):
        raise UserError(f"{path}:1: neither a CSV header nor LFW's 'folds pairs'")
    num_folds, per_kind = (int(head[0]), int(head[1])) if len(head) == 2 else (1, int(head[0]))
    if len(lines) != 2 * num_folds * per_kind:
        raise UserError(f"{path}: {len(lines)} pairs instead of 2 x {num_folds} x {per_kind}")
    first, second, same = [], [], []
    for number, words in enumerate(lines, start=2):
        if len(words) == 3:
            words = [words[0], words[1], words[0], words[2]]
            same.append(True)
        else:
            same.append(False)
        if len(words) != 4 or not (words[1].isdecimal() and words[3].isdecimal()):
            raise UserError(f"{path}:{number}: not 'name i j' or 'name i other j'")
        first.append(_lfw_key(words[0], words[1]))
        second.append(_lfw_key(words[2], words[3]))
    folds = np.repeat(np.arange(num_folds) if num_folds > 1 else [NO_FOLD], 2 * per_kind)
    return Pairs(tuple(first), tuple(second), np.array(same, dtype=bool), folds.astype(np.int64))


def _lfw_key(name: str, number: str) -> str:
    return f"{name}/{name}_{int(number):04d}"
