"""Where images come from before they are packed: folders, archives, tables, other trainers' formats.

A ``Source`` lists its samples first (cheap) and reads them one by one later, so that they can be packed in
any order: shards written class by class would fill every batch with a few classes. Class label = index in
the sorted class names. Nothing is extracted to disk, and files are copied byte for byte where every reader
knows the format. One file per family.
"""

from trainer.sources.cifar import cifar
from trainer.sources.folder import OMNIGLOT_EVALUATION, image_folder, omniglot, orl
from trainer.sources.insightface import rec, verification_bin
from trainer.sources.mnist import mnist, mnist5k
from trainer.sources.people import MARKET_SETS, PIPA_SETS, lfw, market1501, pipa
from trainer.sources.shards import tar_samples
from trainer.sources.source import (
    Source,
    labels_of,
    reencoded,
    shuffled,
    split_by_class,
    split_by_sample,
    with_enough_images,
)
from trainer.sources.table import csv_sets, parquet

__all__ = [
    "MARKET_SETS",
    "OMNIGLOT_EVALUATION",
    "PIPA_SETS",
    "Source",
    "cifar",
    "csv_sets",
    "image_folder",
    "labels_of",
    "lfw",
    "market1501",
    "mnist",
    "mnist5k",
    "omniglot",
    "orl",
    "parquet",
    "pipa",
    "rec",
    "reencoded",
    "shuffled",
    "split_by_class",
    "split_by_sample",
    "tar_samples",
    "verification_bin",
    "with_enough_images",
]
