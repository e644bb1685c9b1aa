"""From the configuration to one term of the loss. Softmaxes of cosines are built by ``trainer/state.py``."""

from torch.distributed import ProcessGroup

from trainer.config import Config, LossConfig
from trainer.head import ClassShard, DenseHead, SoftmaxHead
from trainer.losses.center import CenterLoss
from trainer.losses.coco_minibatch import CocoMinibatchLoss
from trainer.losses.contrastive import ContrastiveLoss
from trainer.losses.standalone_center import StandaloneCenterLoss
from trainer.losses.triplet import TripletLoss
from trainer.scale import scale_of


def build_term(name: str, config: Config, shard: ClassShard, dim: int, group: ProcessGroup) -> DenseHead:
    """Build the term of that name, one of ``config.UNFUSED``; communicates nothing."""
    loss, seed = config.loss, config.seed
    if name == "softmax":
        return SoftmaxHead(shard, dim, seed=seed, group=group, has_bias=loss.softmax.bias)
    if name == "center":
        rule, rate, unit = loss.center.update, loss.center.rate, _are_centres_unit(loss)
        return CenterLoss(shard, dim, rule=rule, rate=rate, unit_features=unit, seed=seed, group=group)
    if name == "triplet":
        margin, mining, unit = loss.triplet.margin, loss.triplet.mining, loss.triplet.features == "unit"
        return TripletLoss(shard, margin=margin, mining=mining, unit_features=unit, seed=seed, group=group)
    if name == "contrastive":
        margin, unit = loss.contrastive.margin, loss.contrastive.features == "unit"
        return ContrastiveLoss(shard, margin=margin, unit_features=unit, group=group)
    if name == "coco_minibatch":
        scale = scale_of(config.head.scale, shard.num_classes)
        return CocoMinibatchLoss(shard, scale=scale, group=group)
    assert name == "standalone_center"
    own = loss.standalone_center
    return StandaloneCenterLoss(
        shard,
        dim,
        inter=own.inter,
        intra_weight=own.intra_weight,
        inter_weight=own.inter_weight,
        log_offset=own.log_offset,
        exponent=own.exponent,
        seed=seed,
        group=group,
    )


def num_matrices(name: str, config: Config, trained: int) -> int:
    """Return how many float32 matrices of C x D a term holds, ``trained`` being a row and its optimizer's."""
    is_double = name == "standalone_center" and config.loss.standalone_center.inter == "classifier"
    with_gradient = trained + 1
    counts = {"softmax": with_gradient, "standalone_center": (1 + is_double) * with_gradient, "center": 1}
    return counts.get(name, 0)


def _are_centres_unit(loss: LossConfig) -> bool:
    """Return whether center loss looks at unit features; centres that only evaluate do as the main loss."""
    if "center" in (loss.name, *loss.extra):
        return loss.center.features == "unit"
    features = {"triplet": loss.triplet.features, "contrastive": loss.contrastive.features}
    return features.get(loss.name, "unit") == "unit"
