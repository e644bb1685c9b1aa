"""What every protocol works with: a model, sets that are embedded by all ranks, figures with their intervals.

Every function that embeds must be called by every rank, and every rank gets the same.
"""

import dataclasses
import math
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trainer.collectives import concatenate_over, sum_over
from trainer.config import ProtocolConfig
from trainer.distributed import World
from trainer.embed import Embed, Embedded, Embeddings, Reading, embed_all, is_embeddings, stream
from trainer.errors import UserError
from trainer.imagesets import ImageSet, open_images
from trainer.protocols.bootstrap import mean_interval
from trainer.protocols.identification import pooled
from trainer.roc import Verification
from trainer.tiles import Sharing

Figures = Iterator[tuple[str, float]]

FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
FPIRS = (1e-1, 1e-2, 1e-3)


@dataclass(frozen=True)
class Model:
    """What is judged."""

    embed: Embed
    reading: Reading
    centroids: Callable[[], Tensor] | None = None
    """Returns the rows of the head, K x S x D or K x D, on every rank; None where there is no head."""
    class_names: tuple[str, ...] = ()


OpenModel = Callable[[Path], Model]


@dataclass(frozen=True)
class Source:
    """A set before it is embedded, or the embeddings there are of it."""

    images: ImageSet
    embeddings: Embeddings | None


@dataclass(frozen=True)
class EmbeddedSet:
    """An embedded set: only images that could be decoded."""

    embeddings_ND: Tensor
    labels_N: Tensor
    positions_N: NDArray[np.int64]
    images: ImageSet

    @property
    def features_ND(self) -> Tensor:
        """Unit embeddings."""
        return F.normalize(self.embeddings_ND)

    def note(self, name: str, path: Path | None) -> NDArray[np.str_] | None:
        """Return a note of every embedded image, see ``ImageSet.note``."""
        values = self.images.note(name, path)
        return None if values is None else values[self.positions_N]

    def required_note(self, name: str, path: Path | None) -> NDArray[np.str_]:
        """Return a note that the protocol cannot do without. Raises UserError."""
        return self.images.required_note(name, path)[self.positions_N]


@dataclass(frozen=True)
class Bench:
    """What every protocol works with."""

    config: ProtocolConfig
    model: Model | None
    world: World
    open_model: OpenModel | None
    """Opens the model of another region; None where there is no way to."""
    prefix: str

    @property
    def sharing(self) -> Sharing:
        """How the ranks share work."""
        group = self.world.group
        return Sharing(
            part=(self.world.rank, self.world.size),
            total=partial(sum_over, group=group),
            gather=partial(concatenate_over, group=group),
        )

    def open(self, field: str) -> Source:
        """Open the set that a field of the configuration names. Raises UserError."""
        path, name = getattr(self.config, field), self.prefix + field
        if not is_embeddings(path):
            return Source(open_images(path, name), None)
        found = Embeddings(path, name)
        if field != "data" and is_embeddings(self.config.data):
            self._require_alike(Embeddings(self.config.data, f"{self.prefix}data"), found)
        if self.config.flip != found.summary["flip_sum"]:
            made = "with" if found.summary["flip_sum"] else "without"
            raise UserError(f"{self.prefix}flip: the embeddings of {path} were made {made} mirror images")
        if self.config.missing == "error" and (failed := found.failed_keys):
            raise UserError(
                f"{name}: {path} lacks {len(failed)} images that could not be decoded, the first is "
                f"{failed[0]}; {self.prefix}missing=count leaves them out"
            )
        return Source(found.images(), found)

    @staticmethod
    def _require_alike(data: Embeddings, other: Embeddings) -> None:
        """Raise UserError if they are of two models: by the hash, the path before it may be another."""
        models = [str(each.summary.get("model")) for each in (data, other)]
        if models[0].rpartition(" ")[2] != models[1].rpartition(" ")[2]:
            raise UserError(
                f"{other.field}: {other.folder} was made by {models[1]}, {data.folder} by {models[0]}"
            )
        if data.width != other.width:
            raise UserError(
                f"{other.field}: {other.folder} has width {other.width}, {data.folder} has {data.width}"
            )

    def embed(self, source: Source, rows: NDArray[np.int64] | None = None) -> EmbeddedSet:
        """Embed a set, or some rows of it. Every rank must call it."""
        rows = np.arange(len(source.images)) if rows is None else rows
        if source.embeddings is not None:
            positions_N, embeddings_ND = source.embeddings.load(self.world.device)
            if len(rows) < len(source.images):
                wanted = torch.isin(positions_N, torch.from_numpy(rows).to(positions_N.device))
                positions_N, embeddings_ND = positions_N[wanted], embeddings_ND[wanted]
            positions = positions_N.cpu().numpy()
        else:
            model = self.required_model(source.images.field)
            whole = len(rows) == len(source.images)
            chosen = source.images if whole else source.images.only(rows.tolist())
            found = embed_all(model.embed, chosen, self.reading(model), self.world)
            positions, embeddings_ND = rows[found.positions_N.cpu().numpy()], found.embeddings_ND
        labels_N = torch.from_numpy(source.images.labels_N[positions]).to(embeddings_ND.device)
        return EmbeddedSet(embeddings_ND, labels_N, positions, source.images)

    def stream(self, source: Source) -> Iterator[Embedded]:
        """Yield this rank's part of a set, batch after batch; communicates nothing."""
        if source.embeddings is not None:
            return source.embeddings.stream(self.world)
        model = self.required_model(source.images.field)
        return stream(model.embed, source.images, self.reading(model), self.world)

    def reading(self, model: Model) -> Reading:
        """Return how a model's images are read under this protocol."""
        skip = self.config.missing == "count"
        return dataclasses.replace(model.reading, flip_sum=self.config.flip, skip_broken=skip)

    def required_model(self, field: str) -> Model:
        """Return the model. Raises UserError if there is none."""
        if self.model is None:
            raise UserError(f"{field}: holds images, not embeddings: name a run that embeds them")
        return self.model

    def left_out(self, *counts: tuple[str, int]) -> Figures:
        """Say how many were left out, if that was allowed."""
        if self.config.missing == "count":
            yield from ((name, float(count)) for name, count in counts)

    def by_template(self, found: EmbeddedSet, labels_N: Tensor, notes: Path | None) -> tuple[Tensor, Tensor]:
        """Return unit features and labels: of images or, if asked, of templates. Raises UserError."""
        if not self.config.template:
            return found.features_ND, labels_N
        device = labels_N.device
        names_T, first_T, template_N = np.unique(
            found.required_note("template", notes), return_index=True, return_inverse=True
        )
        labels_T = labels_N[torch.from_numpy(first_T).to(device)]
        template = torch.from_numpy(template_N).to(device)
        mixed = (labels_T[template] != labels_N).nonzero()
        if len(mixed):
            name = names_T[template_N[int(mixed[0])]]
            raise UserError(f"{found.images.field}: template {name} is of two classes")
        media = found.note("media", notes)
        media_N = (
            None if media is None else torch.from_numpy(np.unique(media, return_inverse=True)[1]).to(device)
        )
        return pooled(found.features_ND, template, media_N)[0], labels_T

    def require_rates(self, field: str, found: Container[float], why: str) -> None:
        """Refuse a rate that was asked for and is not among those found. Raises UserError."""
        for rate in getattr(self.config, field) or ():
            if rate not in found:
                raise UserError(f"{self.prefix}{field}: {rate:g} is of too few errors, or too many: {why}")

    def means(self, values: dict[str, Tensor], identities_N: Tensor) -> Figures:
        """Yield the mean of each figure's values, and its interval if asked."""
        for name, values_N in values.items():
            yield name, float(values_N.double().mean())
            if self.config.bootstrap:
                found = values_N.cpu().numpy(), identities_N.cpu().numpy()
                yield from interval_of(name, mean_interval(*found, self.config.bootstrap))

    def rates(self, found: Verification) -> Figures:
        """Yield TAR at the FARs asked for. Raises UserError for one that the pairs cannot support."""
        for far in self.config.fars or FARS:
            if far in found.tar_at_far:
                yield f"tar@far={rate_name(far)}", found.tar_at_far[far]
            elif self.config.fars:
                raise UserError(
                    f"{self.prefix}fars: {far:g} needs {math.ceil(10 / far)} pairs of different classes, "
                    f"there are {found.num_impostor}"
                )


def rate_name(rate: float) -> str:
    """Return 0.001 as 1e-3."""
    mantissa, exponent = f"{rate:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def interval_of(name: str, bounds: tuple[float, float]) -> Figures:
    """Yield both ends of an interval."""
    yield f"{name}_low", bounds[0]
    yield f"{name}_high", bounds[1]
