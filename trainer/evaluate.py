"""Judging a model on test sets: all ranks embed, all share the comparisons, every rank gets the same numbers.

Three kinds of sets: *classification* of classes the head knows, by its own rows; *verification* of classes it
has never seen: are two images of the same class, and is the nearest neighbour? And *protocols* of
``trainer/judge``, which bring their own sets.

Legend: N images of a set, B of a batch over all ranks, D width of the embedding, C classes of this rank, K of
all ranks, S rows of a class.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from trainer import figures, metrics, rays
from trainer.bench import Model, OpenModel
from trainer.cache import open_data_set
from trainer.collectives import concatenate_over, gather_batch, sum_over
from trainer.config import Config, ProtocolConfig
from trainer.data import Batch, EvalLoader
from trainer.distributed import World
from trainer.embed import Embed, reading_of
from trainer.errors import UserError
from trainer.feed import build_eval_batches
from trainer.index import Index
from trainer.judge import check, judge
from trainer.roc import Verification
from trainer.tiles import count_pairs

CMC_DEPTH = 50
_FAR_NAMES = {1e-1: "1e-1", 1e-2: "1e-2", 1e-3: "1e-3", 1e-4: "1e-4"}


@dataclass(frozen=True)
class SetResult:
    """What a model made of one test set."""

    name: str
    metrics: dict[str, float]
    """``eval/<set>/<metric>`` -> value."""
    embeddings_ND: Tensor
    """On the CPU, in the order of the set's index; not normalised. A protocol has none."""
    labels_N: Tensor
    class_names: tuple[str, ...]
    verification: Verification | None
    cmc: tuple[float, ...] = ()
    """Of unseen classes: the fraction of images with one of their class among the 1, 2, ... nearest."""


@dataclass(frozen=True)
class _EvalSet:
    name: str
    index: Index
    loader: EvalLoader
    known_label: Tensor | None
    """Classification only: the head's label of each label of this set."""


class EvalSets:
    """The test sets of a configuration, opened once.

    ``class_names`` and ``num_classes`` are those the head was trained on; ``open_model`` opens the models of
    other regions for the protocol of persons.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        class_names: Sequence[str],
        num_classes: int,
        open_model: OpenModel | None = None,
    ) -> None:
        self.world, self._open_model, self._class_names = world, open_model, tuple(class_names)
        self._protocols, self._reading = config.eval.protocols, reading_of(config)
        for name, protocol in self._protocols.items():
            check(protocol, f"eval.protocols.{name}.")
            _require_places(f"eval.protocols.{name}", protocol)
        self._sets: list[_EvalSet] = []
        for name, folder in config.eval.classification.items():
            field = f"eval.classification.{name}"
            index = open_data_set(folder, field, config.data)
            known_label = _match_labels(field, index, class_names, num_classes)
            self._sets.append(_EvalSet(name, index, build_eval_batches(config, index, world), known_label))
        for name, folder in config.eval.verification.items():
            index = open_data_set(folder, f"eval.verification.{name}", config.data)
            _require_pairs(f"eval.verification.{name}", index)
            self._sets.append(_EvalSet(name, index, build_eval_batches(config, index, world), None))

    def evaluate(self, embed: Embed, head: Any) -> Iterator[SetResult]:
        """Yield the result of every set. Every rank must go through all of them."""
        for test_set in self._sets:
            embeddings_ND, labels_N = _embed_all(embed, test_set.loader, self.world)
            verification: Verification | None = None
            cmc: tuple[float, ...] = ()
            if test_set.known_label is not None:
                known_label = test_set.known_label.to(labels_N.device)
                values = _classify(embeddings_ND, known_label[labels_N], head)
            else:
                verification, cmc, values = _verify(F.normalize(embeddings_ND), labels_N, self.world)
            yield SetResult(
                name=test_set.name,
                metrics={f"eval/{test_set.name}/{key}": value for key, value in values.items()},
                embeddings_ND=embeddings_ND.cpu(),
                labels_N=labels_N.cpu(),
                class_names=tuple(test_set.index.class_names),
                verification=verification,
                cmc=cmc,
            )

        def centroids_KSD() -> Tensor:
            whole = concatenate_over(head.directions_CD(), head.group)
            return whole.unflatten(0, (head.shard.num_classes, -1))

        model = Model(embed, self._reading, centroids_KSD, self._class_names)
        for name, protocol in self._protocols.items():
            prefix = f"eval.protocols.{name}."
            figures = judge(protocol, model, self.world, self._open_model, prefix)
            values = {f"eval/{name}/{key}": value for key, value in figures}
            yield SetResult(name, values, torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64), (), None)


def figures_of(results: Iterable[SetResult], title: str) -> Iterator[tuple[str, Figure]]:
    """Yield (name, picture) of what results show: features if they have 2 or 3 dimensions, cosines, ROC."""
    seen = [result for result in results if len(result.labels_N)]  # a protocol has numbers only
    for result in seen:
        if result.embeddings_ND.shape[1] in (2, 3):
            scatter = rays.feature_scatter(
                result.embeddings_ND, result.labels_N, result.class_names, f"{title}: {result.name}"
            )
            yield f"features-{result.name}", scatter
        features_ND = F.normalize(result.embeddings_ND)
        yield f"cosines-{result.name}", figures.cosine_histogram(features_ND, result.labels_N, title)
    yield from curves_of(seen)


def curves_of(results: Iterable[SetResult]) -> Iterator[tuple[str, Figure]]:
    """Yield (name, picture): ROC and CMC of the sets of unseen classes, if there are any."""
    verified = [result for result in results if result.verification is not None]
    if verified:
        yield "roc", figures.roc({r.name: r.verification for r in verified if r.verification is not None})
        yield "cmc", figures.cmc({r.name: r.cmc for r in verified})


def _require_places(field: str, protocol: ProtocolConfig) -> None:
    """Raise UserError for a folder or file that is not there: now, not at the first evaluation."""
    for name in ProtocolConfig.__slots__:  # type: ignore[attr-defined]
        place = getattr(protocol, name)
        if isinstance(place, Path) and not place.exists():
            raise UserError(f"{field}.{name}: there is no {place}")


def _require_pairs(field: str, index: Index) -> None:
    """Raise UserError for a set without pairs of each kind: now, not at the first evaluation."""
    try:
        count_pairs(torch.from_numpy(np.sort(index.labels_N)))
    except UserError as error:
        raise UserError(f"{field}: {index.folder}: {error}") from None


def _match_labels(field: str, index: Index, class_names: Sequence[str], num_classes: int) -> Tensor:
    """Return the head's label for each label of a test set: by name where both have names, else by number.

    A set packed by itself numbers its own classes from 0, and need not have all of them. Raises UserError
    for a class that the head does not know.
    """
    if class_names and index.class_names:
        label_of = {name: label for label, name in enumerate(class_names)}
        unknown = next((name for name in index.class_names if name not in label_of), None)
        if unknown is not None:
            raise UserError(f"{field}: class {unknown!r} of {index.folder} is not among those trained on")
        return torch.tensor([label_of[name] for name in index.class_names])
    if index.num_classes > num_classes:
        raise UserError(
            f"{field}: {index.folder} has label {index.num_classes - 1}, the head has {num_classes} classes"
        )
    return torch.arange(num_classes)


@torch.no_grad()
def _embed_all(embed: Embed, loader: Iterable[Batch], world: World) -> tuple[Tensor, Tensor]:
    """Return embeddings (N x D, float32) and labels of a whole set, on every rank."""
    embeddings, labels = [], []
    for batch in loader:
        own_D = embed(batch.images_NCHW.to(world.device)).float()
        valid_B = gather_batch(batch.valid_N.to(world.device), world.group)
        embeddings.append(gather_batch(own_D, world.group)[valid_B])
        labels.append(gather_batch(batch.labels_N.to(world.device), world.group)[valid_B])
    return torch.cat(embeddings), torch.cat(labels)


@torch.no_grad()
def _classify(embeddings_ND: Tensor, labels_N: Tensor, head: Any) -> dict[str, float]:
    """Return loss and accuracy by the head's own scores, by its nearest unit row, and by class centres."""
    sums: dict[str, float] = {}
    for embeddings_BD, labels_B in zip(embeddings_ND.split(1024), labels_N.split(1024), strict=True):
        output = head.of_embeddings(embeddings_BD, labels_B)
        means = {
            "loss": output.loss,
            "accuracy": output.metrics["accuracy"],
            "nearest_centroid": head.accuracy_by_direction(embeddings_BD, labels_B),
            **head.accuracy_by_centres(embeddings_BD, labels_B),
        }
        for name, mean in means.items():
            sums[name] = sums.get(name, 0.0) + len(labels_B) * float(mean)
    intra, inter = metrics.intra_inter_cosine(F.normalize(embeddings_ND), labels_N)
    means_of_all = {name: total / len(labels_N) for name, total in sums.items()}
    cosines = {"cosine_intra": intra, "cosine_inter": inter}
    return means_of_all | {name: cosine for name, cosine in cosines.items() if cosine is not None}


def _verify(
    features_ND: Tensor, labels_N: Tensor, world: World
) -> tuple[Verification, tuple[float, ...], dict[str, float]]:
    """Return all-pairs verification, CMC, and the figures of both."""
    part = (world.rank, world.size)
    total = partial(sum_over, group=world.group)
    gather = partial(concatenate_over, group=world.group)
    found = metrics.verification(features_ND, labels_N, part=part, total=total, gather=gather)
    values = {"auc": found.auc, "best_accuracy": found.best_accuracy, "eer": found.eer}
    values |= {f"tar@far={_FAR_NAMES[far]}": tar for far, tar in found.tar_at_far.items()}
    ranks = range(1, CMC_DEPTH + 1)
    identified = metrics.identification(features_ND, labels_N, part=part, total=total, ranks=ranks)
    cmc = tuple(identified[f"rank{k}"] for k in ranks)
    values |= {"rank1": cmc[0], "rank5": cmc[4]}
    return found, cmc, values
