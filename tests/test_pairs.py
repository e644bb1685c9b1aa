"""Verification of listed pairs against the published procedure in plain loops; reading of pairs files.

Dimensions: P pairs.
"""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from trainer.errors import UserError
from trainer.protocols.pairs import (
    NO_FOLD,
    best_accuracy,
    curve,
    fold_accuracies,
    read_pairs,
    weighted_roc,
    weighted_tar,
)
from trainer.roc import equal_error_rate


def make_scores(
    num: int = 600, seed: int = 0, tied: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    same_P = generator.random(num) < 0.5
    cosines_P = np.clip(0.25 + 0.3 * same_P + 0.25 * generator.normal(size=num), -1, 1).astype(np.float32)
    if tied:
        cosines_P = np.round(cosines_P * 4) / 4
    return cosines_P, same_P, generator.integers(0, 10, num)


def published_accuracies(cosines_P: np.ndarray, same_P: np.ndarray, fold_P: np.ndarray) -> list[float]:
    """evaluation/verification code of LFW trainers: all thresholds, one after another, fold by fold."""
    distance_P = 2 - 2 * cosines_P.astype(np.float64)
    results = []
    for fold in range(10):
        train, test = fold_P != fold, fold_P == fold
        best, chosen = -1.0, None
        for threshold in np.arange(0, 4, 0.01):
            accuracy = np.mean((distance_P[train] < threshold) == same_P[train])
            if accuracy > best:  # argmax: the first of equals
                best, chosen = accuracy, threshold
        results.append(np.mean((distance_P[test] < chosen) == same_P[test]))
    return results


@pytest.mark.parametrize("tied", [False, True])
def test_fold_accuracies_equal_the_published_procedure(tied: bool) -> None:
    scores = make_scores(tied=tied)
    np.testing.assert_allclose(fold_accuracies(*scores), published_accuracies(*scores), atol=1e-15)


def test_the_threshold_of_a_fold_does_not_see_the_fold() -> None:
    cosines_P, same_P, fold_P = make_scores()
    flipped_P = np.where(fold_P == 3, ~same_P, same_P)
    before, after = fold_accuracies(cosines_P, same_P, fold_P), fold_accuracies(cosines_P, flipped_P, fold_P)
    assert after[3] == pytest.approx(1 - before[3])


def test_weights_count_like_repeated_pairs() -> None:
    cosines_P, same_P, fold_P = make_scores(200, tied=True)
    weights_P = np.random.default_rng(1).integers(0, 4, 200)
    repeated = [np.repeat(x, weights_P) for x in (cosines_P, same_P, fold_P)]
    np.testing.assert_allclose(
        fold_accuracies(cosines_P, same_P, fold_P, weights_P), fold_accuracies(*repeated), atol=1e-12
    )
    assert best_accuracy(cosines_P, same_P, weights_P) == pytest.approx(best_accuracy(*repeated[:2]))
    ones = np.ones(len(repeated[0]))
    for far in (0.5, 0.1, 0.01):
        assert weighted_tar(cosines_P, same_P, far, weights_P) == pytest.approx(
            weighted_tar(*repeated[:2], far, ones)
        )


@pytest.mark.parametrize("tied", [False, True])
def test_best_accuracy_tries_every_threshold(tied: bool) -> None:
    cosines_P, same_P, _ = make_scores(300, tied=tied)
    tried = [np.mean((cosines_P >= t) == same_P) for t in [*cosines_P, np.inf]]
    assert best_accuracy(cosines_P, same_P) == pytest.approx(max(tried), abs=1e-15)


@pytest.mark.parametrize("tied", [False, True])
def test_curve_equals_scikit_learn(tied: bool) -> None:
    cosines_P, same_P, _ = make_scores(900, tied=tied)
    far, tar, _ = roc_curve(same_P, cosines_P, drop_intermediate=False)
    found = curve(cosines_P, same_P, fars=(0.1, 0.03, 1e-3))
    assert found.auc == pytest.approx(roc_auc_score(same_P, cosines_P), abs=1e-12)
    assert found.tar_at_far == {x: tar[far <= x].max() for x in (0.1, 0.03)}  # 1e-3 of 450: no ten errors
    weights_P = np.ones(900)
    assert all(weighted_tar(cosines_P, same_P, x, weights_P) == found.tar_at_far[x] for x in (0.1, 0.03))
    far_V, tar_V = weighted_roc(cosines_P, same_P, weights_P)
    assert np.trapezoid(tar_V, far_V) == pytest.approx(found.auc, abs=1e-12)
    assert equal_error_rate(far_V, tar_V) == pytest.approx(found.eer, abs=1e-12)


def test_lfw_pairs_are_read_in_folds(tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_text("2\t1\nAnn\t1\t4\nAnn\t2\tBob_Lee\t13\nCid\t3\t1\nCid\t1\tAnn\t1\n")
    pairs = read_pairs(path)
    assert pairs.first == ("Ann/Ann_0001", "Ann/Ann_0002", "Cid/Cid_0003", "Cid/Cid_0001")
    assert pairs.second == ("Ann/Ann_0004", "Bob_Lee/Bob_Lee_0013", "Cid/Cid_0001", "Ann/Ann_0001")
    assert pairs.same_P.tolist() == [True, False, True, False]
    assert pairs.fold_P.tolist() == [0, 0, 1, 1]
    path.write_text("1\nAnn 1 4\nAnn 2 Bob 13\n")  # LFW's development sets have one number and no folds
    assert read_pairs(path).fold_P.tolist() == [NO_FOLD, NO_FOLD]


def test_pairs_of_a_csv_are_read_by_their_header(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("fold,path1,path2,same\n3,a/x.jpg,b/y.jpg,0\n4,a/x.jpg,a/z.jpg,true\n")
    pairs = read_pairs(path)
    assert (pairs.first, pairs.second) == (("a/x.jpg",) * 2, ("b/y.jpg", "a/z.jpg"))
    assert (pairs.same_P.tolist(), pairs.fold_P.tolist()) == ([False, True], [3, 4])
    path.write_text("\ufeffkey1, key2, same\n1, 2, 1\n1, 3, 0\n")  # as a spreadsheet or a hand has it
    assert read_pairs(path).second == ("2", "3")
    assert read_pairs(path).fold_P.tolist() == [NO_FOLD, NO_FOLD]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("key1,key2\n1,2\n", "its header 'key1,key2' has no key1,key2,same"),
        ("key1,key2,same\n1,2,maybe\n", ":2: same is 'maybe'"),
        (
            "key1,key2,same,fold\n1,2,1,9999999999999999999\n",
            ":2: same is '1' and fold '9999999999999999999'",
        ),
        (f"key1,key2,same\n1,{'2' * 140_000},1\n", "cannot read pairs: field larger than field limit"),
        ("key1,key2,same\n1,2,1\n", "all of its 1 pairs are same"),
        ("2 3\nAnn 1 2\n", "1 pairs instead of 2 x 2 x 3"),
        ("1 1\nAnn 1 2\nAnn one Bob 2\n", ":3: not 'name i j'"),
        ("", ":1: neither a CSV header nor"),
    ],
)
def test_what_is_wrong_with_a_pairs_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_pairs(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
