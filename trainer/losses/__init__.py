"""Losses of whole batches that stand beside the class softmax: one file per loss, beside its equation.

Each is a ``DenseHead``: it may hold a row per class, cut over the ranks, and a step treats it as it treats
the softmax. ``weighted_sum`` makes one head of several, such as softmax + 0.003 center.

All see the gathered global batch, micro-batch by micro-batch if there are several: then pairs, triplets and
the means of coco_minibatch are those of a micro-batch. A rank computes the part of a loss that belongs to
its own images (pairs, triplets) or its own classes (centres); ``sum_of_parts`` and ``gather_batch`` make
value and gradient those of the whole, on any number of ranks.
"""
