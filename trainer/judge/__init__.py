"""A model judged by a protocol: its sets are embedded by all ranks, and figures come out as (name, value).

What a protocol computes is in ``trainer/protocols``; here is what it is fed with. Every rank must call these
functions, and every rank gets the same figures.
"""

from collections.abc import Callable
from typing import NamedTuple

from trainer.bench import Bench, Figures, Model, OpenModel
from trainer.config import ProtocolConfig
from trainer.distributed import World
from trainer.errors import UserError
from trainer.judge.classes import judge_closed_set, judge_few_shot
from trainer.judge.people import judge_persons, judge_reid
from trainer.judge.search import judge_distractors, judge_identification, judge_retrieval
from trainer.judge.verification import judge_open_set, judge_pairs


class _Protocol(NamedTuple):
    judge: Callable[[Bench], Figures]
    takes: str
    """Fields, beside ``_COMMON``, that change its figures; any other is refused."""
    needs: str = ""
    """Those of them that it cannot do without."""


_COMMON = {"protocol", "data", "flip", "bootstrap", "missing"}

_PROTOCOLS = {
    "closed_set": _Protocol(judge_closed_set, "gallery ks"),
    "pairs": _Protocol(judge_pairs, "pairs fars"),
    "open_set": _Protocol(judge_open_set, "fars template notes"),
    "identification": _Protocol(
        judge_identification, "gallery gallery_notes ks fpirs template notes", "gallery"
    ),
    "distractors": _Protocol(judge_distractors, "distractors sizes ks fpirs fars", "distractors"),
    "reid": _Protocol(judge_reid, "gallery gallery_notes ks rerank notes", "gallery"),
    "persons": _Protocol(judge_persons, "splits regions"),
    "retrieval": _Protocol(judge_retrieval, "gallery gallery_notes ks template notes"),
    "few_shot": _Protocol(judge_few_shot, "ways shots queries episodes within"),
}


def check(config: ProtocolConfig, prefix: str) -> None:
    """Refuse fields that cannot take effect, and name those that are missing. Raises UserError."""
    protocol = _PROTOCOLS[config.protocol]
    defaults = ProtocolConfig(protocol=config.protocol, data=config.data)
    for name in ProtocolConfig.__slots__:  # type: ignore[attr-defined]
        taken = name in _COMMON or name in protocol.takes.split()
        if not taken and getattr(config, name) != getattr(defaults, name):
            raise UserError(f"{prefix}{name}: the protocol {config.protocol} has no use for it")
    for name in protocol.needs.split():
        if getattr(config, name) is None:
            raise UserError(f"{prefix}{name}: the protocol {config.protocol} needs it")


def judge(
    config: ProtocolConfig, model: Model | None, world: World, open_model: OpenModel | None, prefix: str = ""
) -> Figures:
    """Yield the figures of a protocol. ``prefix`` begins the names of fields in messages.

    ``model`` may be None if all data are embeddings already. ``open_model`` opens those of other regions.
    """
    check(config, prefix)
    yield from _PROTOCOLS[config.protocol].judge(Bench(config, model, world, open_model, prefix))
