"""One to many: who of a gallery is it, or of all other images of the set?

Dimensions: N images, P probes, Q pairs of a probe and a photo of its person.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.bench import FARS, FPIRS, Bench, EmbeddedSet, Figures, rate_name
from trainer.errors import UserError
from trainer.order import epoch_order
from trainer.protocols import distractors
from trainer.protocols.identification import identification
from trainer.protocols.ranking import images_of
from trainer.protocols.retrieval import retrieval
from trainer.tiles import Images


def judge_identification(bench: Bench) -> Figures:
    """Yield the figures of ``protocols/identification.py``."""
    probes, gallery = _probes_and_gallery(bench)
    ks = bench.config.ks or (1, 5, 10)
    fpirs = bench.config.fpirs or FPIRS
    values, mated_P, rates = identification(probes, gallery, ks, fpirs, bench.sharing)
    bench.require_rates("fpirs", rates, f"there are {int((~mated_P).sum())} probes without a mate")
    yield "num_mated", float(mated_P.sum())
    yield "num_strangers", float((~mated_P).sum())
    yield from bench.means(values, probes.labels[mated_P])
    named = {f"tpir@fpir={rate_name(fpir)}": hits for fpir, hits in rates.items()}
    yield from bench.means(named, probes.labels[mated_P])


def judge_retrieval(bench: Bench) -> Figures:
    """Yield the figures of ``protocols/retrieval.py``."""
    queries, gallery = _probes_and_gallery(bench)
    values, counts_P = retrieval(queries, gallery, bench.config.ks or (1, 2, 4, 8), bench.sharing)
    yield "num_queries", float(counts_P.sum())
    yield from bench.means(values, queries.labels[counts_P])


def _probes_and_gallery(bench: Bench) -> tuple[Images, Images]:
    """Return both, with labels that mean the same; without a gallery the data twice."""
    found = bench.embed(bench.open("data"))
    if bench.config.gallery is None:
        probes = images_of(*bench.by_template(found, found.labels_N, bench.config.notes))
        return probes, probes
    other = bench.embed(bench.open("gallery"))
    labels_N, others_N = _joined(found, other)
    probes = images_of(*bench.by_template(found, labels_N, bench.config.notes))
    pooled_gallery = bench.by_template(other, others_N, bench.config.gallery_notes)
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


def judge_distractors(bench: Bench) -> Figures:
    """Yield the figures of ``protocols/distractors.py``."""
    found = bench.embed(bench.open("data"))
    probes = images_of(found.features_ND, found.labels_N)
    first_Q, _, scores_Q = distractors.genuine_pairs(probes)
    source = bench.open("distractors")
    places_N = np.empty(len(source.images), dtype=np.int64)
    places_N[epoch_order(len(source.images), seed=0, epoch=0)] = np.arange(len(source.images))
    sizes = bench.config.sizes or _powers_of_ten(len(source.images))
    if sizes[-1] > len(source.images):
        raise UserError(f"{bench.prefix}sizes: {sizes[-1]} are asked for, there are {len(source.images)}")
    ks = bench.config.ks or (1, 10)
    best = distractors.BestDistractors(probes, sizes, deepest=max(100, *ks))
    for part in bench.stream(source):
        places = torch.from_numpy(places_N[part.positions_N.cpu().numpy()]).to(probes.features.device)
        best.add(F.normalize(part.embeddings_ND), places)
    yield "num_probes", float(len(probes))
    yield "num_pairs", float(len(first_Q))
    yield from bench.left_out(("failed_images", len(found.images) - len(probes)))
    identities_Q = probes.labels[first_Q]
    fars, fpirs = bench.config.fars or FARS, bench.config.fpirs or FPIRS
    supported: dict[str, set[float]] = {"fpirs": set(), "fars": set()}
    for size, seen, best_Pk in best.finish(bench.sharing):
        yield from bench.left_out((f"distractors@{size}", seen))
        ranks_Q = distractors.rank_among(first_Q, scores_Q, best_Pk)
        found_at = distractors.open_set_rates(first_Q, scores_Q, best_Pk, fpirs)
        accepted_at = distractors.accept_rates(first_Q, scores_Q, best_Pk, seen, fars)
        supported["fpirs"] |= found_at.keys()
        supported["fars"] |= accepted_at.keys()
        values = {f"rank{k}@{size}": (ranks_Q <= k).double() for k in ks}
        values |= {f"tpir@fpir={rate_name(fpir)}@{size}": hits for fpir, hits in found_at.items()}
        values |= {f"tar@far={rate_name(far)}@{size}": hits for far, hits in accepted_at.items()}
        yield from bench.means(values, identities_Q)
    bench.require_rates("fpirs", supported["fpirs"], f"there are {len(probes)} probes")
    kept = f"there are {len(probes)} x {sizes[-1]} pairs, and the {best.deepest} nearest of a probe are kept"
    bench.require_rates("fars", supported["fars"], kept)


def _powers_of_ten(num: int) -> tuple[int, ...]:
    """Return 10, 100, ... below ``num``, and ``num``."""
    return (*(10**i for i in range(1, len(str(num))) if 10**i < num), num)
