"""The images of a report: the hardest pairs of a set, what lies nearest to some, one example of a class.

Legend: N images of a set, D width of a feature.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from trainer import page
from trainer.augment import build_eval_transform
from trainer.backbone import image_size_of
from trainer.config import BackboneConfig
from trainer.decode import decode
from trainer.hardpairs import Pairs, hardest_pairs
from trainer.index import Index
from trainer.page import Html

_PAIRS, _STRIPS, _SHOWN, _PIXELS = 8, 6, 7, 160
_PIXELATED = 64
"""Images up to this size are enlarged without blur."""


@dataclass(frozen=True)
class Shown:
    """Some images of a set with their unit features."""

    features_ND: Tensor
    labels_N: Tensor
    places_N: Tensor
    """Where each image is in the index."""
    names: tuple[str, ...]
    index: Index
    backbone: BackboneConfig

    def image(self, i: int) -> Html:
        """Return an image; its class and number are shown on hover."""
        place = int(self.places_N[i])
        return thumbnail(self.index, place, self.backbone, f"{self.name(i)}, image {place}")

    def name(self, i: int) -> str:
        """Return the name of an image's class."""
        return self.names[int(self.labels_N[i])]


def hard_pairs(title: str, shown: Shown) -> Html:
    """Show the pairs that the model finds hardest, and the neighbours of some images."""
    pairs = hardest_pairs(shown.features_ND, shown.labels_N, _PAIRS)

    def card(found: tuple[float, int, int]) -> Html:
        cosine, i, j = found
        classes = " / ".join(dict.fromkeys((shown.name(i), shown.name(j))))
        return page.pair(shown.image(i), shown.image(j), f"{cosine:.3f}", classes)

    return Html(
        page.heading(f"{title}: one class, yet far apart")
        + page.note("The lowest cosines between two images of one class, one pair of a class.")
        + page.cards(map(card, pairs.positives), "pairs")
        + page.heading(f"{title}: two classes, yet close")
        + page.note(
            "The highest cosines between images of two classes: the model errs here, or the labels do."
        )
        + page.cards(map(card, pairs.negatives), "pairs")
        + page.heading(f"{title}: nearest neighbours")
        + page.note(
            "The first image of a row, then the nearest others with their cosine: green if of its class, red "
            "and crossed if of another, which is named. Rows whose nearest is wrong come first."
        )
        + page.cards((page.strip(_strip(query, shown)) for query in _queries(pairs)), "rows")
    )


def thumbnail(index: Index, i: int, backbone: BackboneConfig, text: str) -> Html:
    """Return an image as the model sees it, or grey with the reason if it cannot be decoded."""
    size = image_size_of(backbone)
    try:
        pixels_CHW = build_eval_transform(image_size=size)(decode(index.read(i), backbone.channels))
    except ValueError as error:  # training may have replaced it (data.on_bad_sample)
        pixels_CHW = torch.full((backbone.channels, size, size), 128, dtype=torch.uint8)
        text = f"{text}: {error}"
    array = pixels_CHW.permute(1, 2, 0).numpy()
    image = Image.fromarray(array[:, :, 0] if backbone.channels == 1 else array)
    image.thumbnail((_PIXELS, _PIXELS))
    content, kind = io.BytesIO(), "png" if size <= _PIXELATED else "jpeg"
    image.save(content, kind, **({} if kind == "png" else {"quality": 85}))
    return page.picture(content.getvalue(), kind, text, "tiny" if size <= _PIXELATED else "")


def spread(length: int, count: int) -> Tensor:
    """Return at most ``count`` places of ``length``, evenly spaced."""
    return torch.linspace(0, length - 1, min(length, count), dtype=torch.float64).round().long()


def _queries(pairs: Pairs) -> list[int]:
    """Choose images whose nearest neighbour is of another class, as far as there are, and others."""
    wrong, right = pairs.is_wrong_N.nonzero().flatten(), (~pairs.is_wrong_N).nonzero().flatten()
    wrong = wrong[spread(len(wrong), _STRIPS // 2)]
    right = right[spread(len(right), _STRIPS - len(wrong))]
    return [*wrong.tolist(), *right.tolist()]


def _strip(query: int, shown: Shown) -> Iterator[tuple[Html, str, str]]:
    """Yield (image, caption, mark) of an image and of the nearest to it."""
    yield shown.image(query), shown.name(query), ""
    cosine_N = shown.features_ND @ shown.features_ND[query]
    cosine_N[query] = -torch.inf
    for i in cosine_N.topk(min(_SHOWN, len(cosine_N) - 1)).indices.tolist():
        is_same = bool(shown.labels_N[i] == shown.labels_N[query])
        caption = f"{cosine_N[i]:.3f}" + ("" if is_same else f" {shown.name(i)}")
        yield shown.image(i), caption, "same" if is_same else "other"
