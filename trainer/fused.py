"""The COCO head at its limit: exact softmax that never holds logits, normalised copies or dense gradients.

Rows are visited in tiles small enough for the cache, twice in a step (docs/coco.md derives the formulas):

    1. all-gather features, lengths and labels                              N x D -> B x D
    2. first pass      e = exp(alpha F c^T), 0 at the targets;  s_i = sum_k e_ik;  U = e c
    3. all-reduce SUM of [s_i, cosine of target i]     2B numbers: loss and every probability are exact
       (B more for a learned scale or bias, D more for label smoothing)
       (all-reduce MAX of the nearest other, B numbers, runs beside it: for the metrics alone)
    4. dL/dF = U / (s + e_target) + target term; reduce-scattered in backward by the gather of step 1
    5. second pass     e again, dL/dc = p^T F, onto the tangent of c, and the optimizer *on that tile*

|z| <= alpha leaves room in a float32, so no maximum has to be found before the sums. What pass 1 computed
is kept for pass 2 as far as ``cache_bytes`` goes: three matrix products instead of four.

Targets are left out of the sums and enter the loss as softplus(log s - z_target): a loss of 1e-9 and its
gradient keep all their digits, and a margin changes B numbers instead of B x K.

Legend: N images of this rank, B of all, C classes of this rank, K of all, D width, T classes of a tile.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from trainer.collectives import start_max_over, sum_over
from trainer.head import ClassShard, CocoHead, HeadOutput
from trainer.margins import CosineSoftmax
from trainer.passes import PassBatch, Slopes, Sums, Workspace, bytes_to_keep, drawn_classes
from trainer.rows import RowUpdate

_LOG2_E = math.log2(math.e)  # exp2 is 2.5 times as fast as exp on a CPU, and as exact
_ROOM = 86.0  # exp of +- this is an ordinary float32
HIGHEST_LOGIT = 128.0  # above about 160 the sums of ordinary features could underflow, which gives NaN
_BOUND_ROUNDING = 1.02  # bfloat16 products round by up to 1/256
_SHORTEST = 1e-12  # as in torch's normalize


class FusedCocoHead(CocoHead):
    """``CocoHead`` with another arithmetic: the same loss, metrics, gradients and updates, to rounding."""

    norm_is_cheap = False

    _inverse_C1: Tensor
    """1 / length of each row, as the first pass has found it."""

    def __init__(
        self,
        shard: ClassShard,
        dim: int,
        *,
        loss: CosineSoftmax,
        seed: int,
        group: ProcessGroup,
        row_type: torch.dtype = torch.float32,
        product_type: torch.dtype = torch.float32,
        tile_rows: int | None = None,
        cache_bytes: int | None = None,
        sub_centroids: int = 1,
        label_smoothing: float = 0.0,
        sample_rate: float = 1.0,
    ) -> None:
        super().__init__(
            shard,
            dim,
            loss=loss,
            seed=seed,
            group=group,
            row_type=row_type,
            sub_centroids=sub_centroids,
            label_smoothing=label_smoothing,
        )
        self.sample_rate = sample_rate
        self.product_type, self.tile_rows, self.cache_bytes = product_type, tile_rows, cache_bytes
        self.seed = seed
        self._row_update: RowUpdate | None = None
        self._early: tuple[Optimizer, int] | None = None
        self._early_norm: Tensor | None = None
        self._side_stream: torch.Stream | None = None
        self._is_kept = False  # whether a batch of this step has its exponentials in the buffers
        self._waiting: list[tuple[PassBatch, Slopes]] = []
        self._workspaces: dict[int, Workspace] = {}
        self.register_buffer("_inverse_C1", torch.empty(len(self.row_shard), 1), persistent=False)

    def of_features(self, features_BD: Tensor, lengths_B: Tensor, labels_B: Tensor) -> HeadOutput:
        """Return loss and metrics of a batch that every rank holds whole. Every rank must call it.

        With gradients enabled the batch waits for ``update``, after its backward pass.
        """
        loss, targets_B, others_B = _TwoPasses.apply(features_BD, lengths_B, labels_B, self)
        return self._output(loss, targets_B, others_B)

    # ------------------------------------------------------------------------------------- first pass

    def prepare(self, features_BD: Tensor, labels_B: Tensor, with_gradient: bool) -> tuple[PassBatch, Tensor]:
        """Return the batch, and the targets' centroids where this rank holds them (B x D, else any)."""
        places_B = labels_B - self.shard.start
        is_own_B = (places_B >= 0) & (places_B < len(self.shard))
        own_B, many = places_B.clamp(0, len(self.shard) - 1), self.sub_centroids
        own_BS = own_B[:, None] * many + torch.arange(many, device=labels_B.device)
        rows_BSD = F.normalize(self.centroids_CD[own_BS].float(), dim=2)
        cosine_BS = (features_BD[:, None].double() * rows_BSD).sum(2)
        cosine_B, winner_B = cosine_BS.max(1)
        target_rows_BD = rows_BSD.take_along_dim(winner_B[:, None, None], 1).squeeze(1)
        barred_BS = (own_BS - own_B[:, None] * many) + places_B[:, None] * many
        sampled = self._sample(labels_B) if with_gradient and self.sample_rate < 1.0 else None
        if sampled is not None:
            position_B = torch.searchsorted(sampled, own_B)
            barred_BS = torch.where(is_own_B, position_B, -1)[:, None]
        batch = PassBatch(
            features_BD=features_BD,
            scaled_BD=(features_BD * (self.loss.scale * _LOG2_E)).to(self.product_type),
            places_B=barred_BS.take_along_dim(winner_B[:, None], 1).squeeze(1),
            barred_BS=barred_BS,
            columns_B=torch.arange(len(labels_B), device=labels_B.device),
            is_own_B=is_own_B,
            targets_B=cosine_B * is_own_B,
            shift=0.0 if self.loss.is_unified else self._shift(len(labels_B)),
            sampled=sampled,
        )
        return batch, target_rows_BD

    def _sample(self, labels_B: Tensor) -> Tensor:
        """Return the rows that take part in this step, in order: the batch's classes and random others.

        Whether a class is drawn is a function of (seed, step, class), whoever holds it.
        """
        drawn = torch.from_numpy(
            drawn_classes(self.seed, self.step, self.shard.start, self.shard.stop, self.sample_rate)
        )
        drawn = drawn.to(labels_B.device)
        places_B = labels_B - self.shard.start
        drawn[places_B[(places_B >= 0) & (places_B < len(self.shard))]] = True
        return drawn.nonzero().squeeze(1)

    def _shift(self, batch: int) -> float:
        """Return what exponents are lowered by so that B times a sum over all classes is a float32."""
        log_terms = math.log(self.shard.num_classes) + math.log(batch)
        return max(0.0, self.loss.highest_logit() + log_terms - _ROOM)

    def loss_of(
        self,
        batch: PassBatch,
        sums_B: Tensor,
        highest_B: Tensor,
        lengths_B: Tensor,
        direction_D: Tensor | None,
    ) -> tuple[Tensor, Slopes, Tensor]:
        """Return the mean loss, its slopes in the cosines and, per image, in the length of the embedding.

        All in float64, the same on every rank; communicates nothing.
        """
        with torch.enable_grad():
            cosine_B = batch.targets_B.detach().requires_grad_()
            length_B = lengths_B.detach().double().requires_grad_()
            target_B = self.loss.target(cosine_B, length_B)
            if self.loss.is_unified:
                loss_B = F.softplus(self.loss.bias - target_B) + self.loss.weight * sums_B
                weight_B = torch.full_like(sums_B, self.loss.scale * self.loss.weight / len(sums_B))
            else:
                # -log(e_y / (s + e_y)): of what is small, not a difference of what is large
                log_odds_B = self._log(sums_B) + batch.shift - target_B
                loss_B = F.softplus(log_odds_B)
                weight_B = self.loss.scale * torch.sigmoid(log_odds_B.detach()) / (sums_B * len(sums_B))
            if direction_D is not None:
                sum_of_others_B = batch.features_BD.double() @ direction_D - cosine_B
                mean_B = (self.loss.scale * sum_of_others_B + target_B) / self.shard.num_classes
                loss_B = loss_B + self.label_smoothing * (target_B - mean_B)
            if (penalty_B := self.loss.penalty(length_B)) is not None:
                loss_B = loss_B + penalty_B
            loss = loss_B.mean()
            slope_B, slope_of_length_B = torch.autograd.grad(
                loss, (cosine_B, length_B), allow_unused=True, materialize_grads=True
            )
        norm_B = None
        if not (self.loss.is_unified or self.loss.needs_target_first or self.label_smoothing):
            # sum_k e_k^2 <= (highest e) (sum_k e_k)
            squared_B = weight_B.square() * self._highest(highest_B, batch) * sums_B
            norm_B = (squared_B + slope_B.square()).sqrt()
        common = self.label_smoothing * self.loss.scale / (self.shard.num_classes * len(sums_B))
        slopes = Slopes(weight_B, slope_B, sums_B.new_tensor(common), norm_B)
        return loss.detach(), slopes, slope_of_length_B

    def _highest(self, highest_B: Tensor, batch: PassBatch) -> Tensor:
        """Return the highest exponential of each image from its exponent."""
        return torch.exp2(highest_B.double() - batch.shift * _LOG2_E)

    def _log(self, sums_B: Tensor) -> Tensor:
        """Return the logarithm; NaN, which ends the run, where exponentials below 1e-38 could be missed.

        Those of K classes are less than 1e-7 of a sum of at least K e^-71. Without a shift they all count;
        with one, up to HIGHEST_LOGIT, a feature would have to point away from *all* other classes.
        """
        if self._shift(len(sums_B)) == 0.0:
            return sums_B.log()
        lowest = self.shard.num_classes * math.exp(15.0 - _ROOM)
        return sums_B.log().masked_fill(sums_B < lowest, torch.nan)

    def first_pass(self, batch: PassBatch, with_gradient: bool) -> Sums:
        """Return the sums over this rank's rows."""
        features_BD, work = batch.features_BD, self._workspace(len(batch.features_BD))
        sums_B = features_BD.new_zeros(len(features_BD), dtype=torch.float64)
        highest_B = features_BD.new_full((len(features_BD),), -torch.inf)
        gradient_BD = torch.zeros_like(features_BD)
        slope_B = torch.zeros_like(sums_B) if self.loss.learns and with_gradient else None
        direction_D = sums_B.new_zeros(features_BD.shape[1]) if self.label_smoothing else None
        num_kept = self._num_kept(len(features_BD)) if with_gradient else 0
        high = 0
        self._is_kept |= with_gradient
        for number, (low, high) in enumerate(self.tiles(len(features_BD), batch.sampled)):
            rows_TD = self._rows(low, high, batch.sampled, work)
            inverse_T1 = torch.linalg.vector_norm(rows_TD, dim=1).clamp_min_(_SHORTEST).reciprocal_()[:, None]
            self._inverse_C1[low:high] = inverse_T1  # for the second pass
            unit_TD = self._unit(rows_TD, inverse_T1, work)
            if number < num_kept:
                batch.kept.append(work.buffer_to_keep(number, high - low))
            out_TB = batch.kept[number] if number < len(batch.kept) else work.product_TB[: high - low + 1]
            e_TB = self._exponentials(unit_TD, low, batch, work, out_TB, highest_B)
            sums_B += e_TB.sum(0)
            if direction_D is not None:
                direction_D += unit_TD.sum(0)
            if slope_B is not None and self.loss.learns == "bias":
                slope_B -= out_TB[: high - low].sum(0)
            if with_gradient:
                self._add_product(gradient_BD, out_TB[: high - low].T, unit_TD, work.product_BD)
        if slope_B is not None and self.loss.learns == "scale":
            slope_B = (gradient_BD.double() * features_BD).sum(1)
        longest_inverse = self._inverse_C1[:high].max()
        return Sums(sums_B, slope_B, direction_D, gradient_BD, highest_B, longest_inverse)

    def _exponentials(
        self,
        unit_TD: Tensor,
        low: int,
        batch: PassBatch,
        work: Workspace,
        out_TB: Tensor,
        highest_B: Tensor | None = None,
    ) -> Tensor:
        """Return e in float32, and in ``out_TB`` its derivative in the exponent, for the products.

        Both are 0 at the targets. ``highest_B`` is raised to the highest exponent before margins. With
        sub-centroids e has a row per class, and ``out_TB`` is 0 in the rows that are not a class' nearest.
        """
        rows = len(unit_TD)
        torch.mm(unit_TD, batch.scaled_BD.T, out=out_TB[:rows])
        z_TB = out_TB if out_TB.dtype == torch.float32 else work.e_TB[: rows + 1].copy_(out_TB)
        for barred_B in batch.barred_BS.unbind(1):
            z_TB.index_put_((self._in_tile(barred_B, low, rows), batch.columns_B), work.nothing)
        z_TB, winner_TB, slope_TB = z_TB[:rows], None, None
        if self.sub_centroids > 1:
            z_TB, winner_TB = z_TB.unflatten(0, (-1, self.sub_centroids)).max(1)
        if highest_B is not None:
            torch.maximum(highest_B, z_TB.amax(0), out=highest_B)
        if self.loss.is_unified:
            z_TB = z_TB.div(_LOG2_E).sub_(self.loss.bias)
            e_TB, slope_TB = F.softplus(z_TB), torch.sigmoid(z_TB)
        else:
            if self.loss.needs_target_first:
                z_TB, slope_TB = self.loss.others(z_TB / _LOG2_E, batch.targets_B)
                z_TB = z_TB * _LOG2_E
            if batch.shift:
                z_TB.sub_(batch.shift * _LOG2_E)
            e_TB = z_TB.exp2_()
            slope_TB = e_TB if slope_TB is None else e_TB * slope_TB
        if winner_TB is not None:
            spread_TSB = torch.zeros_like(out_TB[:rows], dtype=torch.float32).unflatten(
                0, (-1, self.sub_centroids)
            )
            slope_TB = spread_TSB.scatter_(1, winner_TB[:, None], slope_TB[:, None].float()).flatten(0, 1)
        if slope_TB.data_ptr() != out_TB.data_ptr():
            out_TB[:rows] = slope_TB
        return e_TB

    # ------------------------------------------------------------------------------------ second pass

    def _gradients(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Yield (low, high, rows_TD, gradient_TD) of each tile, over all batches that wait.

        Both are float32 and only good until the next tile; ``rows_TD`` may be the rows themselves.
        """
        if not self._waiting:
            raise RuntimeError("no batch has gone forward and backward since the last step")
        prepared = [(batch, *self._factors(batch, slopes)) for batch, slopes in self._waiting]
        common_D = sum(
            (slopes.common * slopes.factor * batch.features_BD.sum(0)).float()
            for batch, slopes in self._waiting
        )
        first = self._waiting[0][0]  # all micro-batches have its size
        work = self._workspace(len(first.features_BD))
        for number, (low, high) in enumerate(self.tiles(len(first.features_BD), first.sampled)):
            rows, gradient_TD = high - low, work.gradient_TD[: high - low]
            rows_TD = self._rows(low, high, first.sampled, work)
            inverse_T1, unit_TD = self._inverse_C1[low:high], None
            for i, (batch, weighted_BD, entry_B) in enumerate(prepared):
                if number < len(batch.kept):
                    weighted_TB = batch.kept[number]
                else:
                    weighted_TB = work.product_TB[: rows + 1]
                    if unit_TD is None:
                        unit_TD = self._unit(rows_TD, inverse_T1, work)
                    self._exponentials(unit_TD, low, batch, work, weighted_TB)
                weighted_TB.index_put_((self._in_tile(batch.places_B, low, rows), batch.columns_B), entry_B)
                if i == 0:
                    product_TD = torch.mm(weighted_TB[:rows], weighted_BD, out=work.product_TD[:rows])
                    if product_TD.dtype != torch.float32:
                        gradient_TD.copy_(product_TD)
                else:
                    self._add_product(gradient_TD, weighted_TB[:rows], weighted_BD, work.product_TD)
            if self.label_smoothing:
                gradient_TD.sub_(common_D)
            # d/dw of c = w / |w|: onto the tangent of the sphere, shorter by |w|.
            radial_T1 = torch.mul(gradient_TD, rows_TD, out=work.scratch_TD[:rows]).sum(1, keepdim=True)
            gradient_TD.addcmul_(rows_TD, radial_T1.mul_(inverse_T1.square()), value=-1.0)
            yield low, high, rows_TD, gradient_TD.mul_(inverse_T1)

    def _factors(self, batch: PassBatch, slopes: Slopes) -> tuple[Tensor, Tensor]:
        """Return what turns exponentials into a gradient by one product, and the entries of the targets."""
        weight_B = slopes.weight_B * slopes.factor  # which divides nothing: it may be 0
        weighted_BD = (batch.features_BD * weight_B[:, None].float()).to(self.product_type)
        return weighted_BD, (slopes.slope_B / slopes.weight_B).to(self.product_type)

    @torch.no_grad()
    def norm_bound(self) -> float:
        """Return a number that the length of the gradient over all ranks does not exceed.

        |P^T F|^2 = sum_ij (P P^T)_ij (F F^T)_ij <= n^T |F F^T| n with n_i >= |P_i|, and the step from
        centroids to rows divides by at least the shortest. Micro-batches add up.
        """
        total = 0.0
        for batch, slopes in self._waiting:
            if slopes.norm_B is None or slopes.longest_inverse is None:
                return math.inf
            alike_BB = (batch.features_BD @ batch.features_BD.T).abs_().double()
            squared = slopes.norm_B @ alike_BB @ slopes.norm_B
            total += abs(float(slopes.longest_inverse * squared.sqrt() * slopes.factor))
        return _BOUND_ROUNDING * total

    @torch.no_grad()
    def squared_norm(self) -> Tensor:
        """Return the squared length of the gradient of this rank's rows (float64): costs a second pass."""
        total = torch.zeros((), dtype=torch.float64, device=self.centroids_CD.device)
        for *_, gradient_TD in self._gradients():
            total += gradient_TD.square().sum()
        return total

    @torch.no_grad()
    def update(self, optimizer: Optimizer, *, divisor: float, step: int) -> Tensor:
        """Divide the gradient of all waiting batches by ``divisor`` and apply it, tile by tile.

        ``step``, from 0, selects the random bits that round rows in bfloat16. Returns the squared length of
        the gradient (float64), of this rank's rows and before the division.
        """
        if self._early_norm is not None:
            if self._side_stream is not None:
                torch.accelerator.current_stream().wait_stream(self._side_stream)
            assert divisor == 1.0
            return self._early_norm
        return self._second_pass(optimizer, divisor, step)

    def _second_pass(self, optimizer: Optimizer, divisor: float, step: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.centroids_CD.device)
        if self._row_update is None or self._row_update.optimizer is not optimizer:
            rows = self.centroids_CD
            self._row_update = RowUpdate(optimizer, rows, first_row=self.row_shard.start, seed=self.seed)
        self._row_update.begin_step(step)
        sampled = self._waiting[0][0].sampled if self._waiting else None
        for low, high, rows_TD, gradient_TD in self._gradients():
            total += torch.linalg.vector_norm(gradient_TD).square()
            if divisor != 1.0:
                gradient_TD.div_(divisor)
            which = slice(low, high) if sampled is None else sampled[low:high]
            self._row_update.apply(which, rows_TD, gradient_TD)
        return total

    def wait_for_update(self, batch: PassBatch, slopes: Slopes) -> None:
        """Add a batch to those of the next ``update``; called by the backward pass."""
        self._waiting.append((batch, slopes))
        if self._early is None:
            return
        if self.centroids_CD.device.type == "cpu":
            self._early_norm = self._second_pass(self._early[0], 1.0, self._early[1])
            return
        if self._side_stream is None:
            self._side_stream = torch.Stream(self.centroids_CD.device)
        self._side_stream.wait_stream(torch.accelerator.current_stream())
        with self._side_stream:
            self._early_norm = self._second_pass(self._early[0], 1.0, self._early[1])

    def update_in_backward(self, optimizer: Optimizer, step: int) -> None:
        """Apply the next batch when its backward pass begins, with nothing to divide by.

        On an accelerator in a stream of its own, beside the backward pass of the backbone; what it reads
        lives until ``end_step``. On CPU it only changes the order of things.
        """
        self._early = (optimizer, step)

    def end_step(self, applied: bool = True) -> None:
        """Drop the batches that wait: they were used, or the step was skipped."""
        super().end_step(applied)
        self._waiting.clear()
        self._is_kept = False
        self._early = self._early_norm = None

    # ------------------------------------------------------------------------------------------ tiles

    def tiles(self, batch: int, sampled: Tensor | None = None) -> Iterator[tuple[int, int]]:
        """Yield (low, high) of each tile of this rank's rows, or of those sampled."""
        rows = len(self.row_shard) if sampled is None else len(sampled)
        tile = self.rows_of_tile(batch)
        for low in range(0, rows, tile):
            yield low, min(low + tile, rows)

    def rows_of_tile(self, batch: int) -> int:
        """Return T: a tile with all its buffers should stay in the cache, and fill an accelerator.

        A class is never cut.
        """
        numbers = 3 << 18 if self.centroids_CD.device.type == "cpu" else 1 << 26
        rows = self.tile_rows or 1 << max(6, int(math.log2(numbers / (self.centroids_CD.shape[1] + batch))))
        return max(1, rows // self.sub_centroids) * self.sub_centroids

    def _workspace(self, batch: int) -> Workspace:
        if batch not in self._workspaces:
            self._workspaces.clear()  # an evaluation may come with other sizes
            rows = min(self.rows_of_tile(batch), len(self.row_shard))
            dim, device = self.centroids_CD.shape[1], self.centroids_CD.device
            self._workspaces[batch] = Workspace(rows, batch, dim, self.product_type, device)
        return self._workspaces[batch]

    def _rows(self, low: int, high: int, sampled: Tensor | None, work: Workspace) -> Tensor:
        """Return the rows of a tile as float32: themselves if they are, and are not a sample."""
        if sampled is not None:
            return work.rows_TD[: high - low].copy_(self.centroids_CD[sampled[low:high]])
        rows_TD = self.centroids_CD[low:high]
        return rows_TD if rows_TD.dtype == torch.float32 else work.rows_TD[: high - low].copy_(rows_TD)

    def _unit(self, rows_TD: Tensor, inverse_T1: Tensor, work: Workspace) -> Tensor:
        """Return the centroids c = w / |w| of a tile in the type of the products."""
        unit_TD = work.unit_TD[: len(rows_TD)]
        if unit_TD.dtype == torch.float32:
            return torch.mul(rows_TD, inverse_T1, out=unit_TD)
        return unit_TD.copy_(torch.mul(rows_TD, inverse_T1, out=work.scratch_TD[: len(rows_TD)]))

    def _in_tile(self, places_B: Tensor, low: int, rows: int) -> Tensor:
        """Return these rows as rows of a tile: the one behind its last if they are elsewhere."""
        places_B = places_B - low
        return places_B.masked_fill_((places_B < 0) | (places_B > rows), rows)

    def _num_kept(self, batch: int) -> int:
        """Return how many tiles' exponentials are kept for the second pass: none but of the first batch."""
        tile_bytes = (self.rows_of_tile(batch) + 1) * batch * self.product_type.itemsize
        kept_bytes = bytes_to_keep(self.cache_bytes, batch, self.product_type.itemsize)
        return 0 if self._is_kept else kept_bytes // tile_bytes

    def _add_product(self, sum_: Tensor, left: Tensor, right: Tensor, buffer: Tensor) -> None:
        """Add a product to a float32 sum; ``buffer`` has its size and the type of the products."""
        if self.product_type == torch.float32:
            sum_.addmm_(left, right)
        else:
            sum_.add_(torch.mm(left, right, out=buffer[: len(sum_)]))


class _TwoPasses(torch.autograd.Function):
    """The loss of the global batch. Forward is the first pass; backward hands the batch to the second."""

    @staticmethod
    def forward(
        ctx: Any, features_BD: Tensor, lengths_B: Tensor, labels_B: Tensor, head: FusedCocoHead
    ) -> tuple[Tensor, Tensor, Tensor]:
        with_gradient = ctx.needs_input_grad[0]
        batch, target_rows_BD = head.prepare(features_BD, labels_B, with_gradient)
        if head.loss.needs_target_first:
            batch.targets_B = sum_over(batch.targets_B, head.group)
        sums = head.first_pass(batch, with_gradient)
        finish_highest = start_max_over(torch.cat([sums.highest_B, sums.longest_inverse.view(1)]), head.group)
        parts = {"sums": sums.sums_B, "slope": sums.slope_B, "direction": sums.direction_D}
        if not head.loss.needs_target_first:
            parts["targets"] = batch.targets_B
        total = _sum_together(parts, head.group)
        sums_B, batch.targets_B = total["sums"], total.get("targets", batch.targets_B)
        highest_B, longest_inverse = finish_highest().split([len(sums_B), 1])
        loss, slopes, slope_of_length_B = head.loss_of(
            batch, sums_B, highest_B, lengths_B, total.get("direction")
        )
        slopes.longest_inverse = longest_inverse
        gradient_BD = sums.gradient_BD
        if with_gradient:
            head.mark_seen(labels_B)
            slope_B = total.get("slope", torch.zeros_like(sums_B))
            slope_B = slope_B / sums_B if head.loss.learns == "scale" else slope_B
            head.observe_later(batch.targets_B, lengths_B, sums_B.log() + batch.shift, slope_B)
            gradient_BD.mul_(slopes.weight_B[:, None].float())
            gradient_BD.addcmul_(target_rows_BD, (slopes.slope_B * batch.is_own_B)[:, None].float())
            if sums.direction_D is not None:
                gradient_BD.sub_((slopes.common * sums.direction_D).float())
            ctx.save_for_backward(gradient_BD, (slope_of_length_B * batch.is_own_B).to(lengths_B.dtype))
            ctx.head, ctx.batch, ctx.slopes = head, batch, slopes
        others_B = highest_B / (head.loss.scale * _LOG2_E)
        targets_B = batch.targets_B.float()
        ctx.mark_non_differentiable(targets_B, others_B)
        return loss.float(), targets_B, others_B

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        gradient_BD, slope_of_length_B = ctx.saved_tensors
        ctx.head.wait_for_update(ctx.batch, replace(ctx.slopes, factor=grad))
        return gradient_BD * grad, slope_of_length_B * grad, None, None


def _sum_together(parts: dict[str, Tensor | None], group: ProcessGroup) -> dict[str, Tensor]:
    """Return the sums over ranks of what is not None, in one all-reduce."""
    given = {name: part for name, part in parts.items() if part is not None}
    total = sum_over(torch.cat(list(given.values())), group)
    return dict(zip(given, total.split([len(part) for part in given.values()]), strict=True))
