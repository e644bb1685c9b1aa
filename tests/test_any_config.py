"""Any choice of options trains two steps or is refused in one line: drawn at random, as nobody would choose.

ANY_CONFIGS=300 pytest tests/test_any_config.py     # as many as one likes; a failure prints its options
"""

import os
import random
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
from ranks import run_on_ranks
from small_run import pack_photos

from trainer import loop
from trainer.config import UNFUSED
from trainer.distributed import World
from trainer.errors import UserError
from trainer.margins import MARGINS
from trainer.options import load

NUM_CONFIGS = int(os.environ.get("ANY_CONFIGS", "6"))
OPTIONS: dict[str, Sequence[str]] = {
    "loss.name": (*MARGINS, *sorted(UNFUSED)),
    "loss.extra": (
        "{triplet: 0.1}",
        "{center: 0.01}",
        "{center: 0}",
        "{softmax: 1}",
        "{coco: 1}",
        "{contrastive: 0.1}",
    ),
    "loss.label_smoothing": ("0.1",),
    "loss.center.update": ("sgd",),
    "loss.triplet.mining": ("all", "semi_hard", "batch_hard"),
    "loss.standalone_center.inter": ("centres", "classifier"),
    "head.scale": ("paper", "adacos", "16", "64", "1"),
    "head.sub_centroids": ("2", "3"),
    "head.sample_rate": ("0.5",),
    "head.update": ("autograd",),
    "head.optimizer": ("sgd", "adamw", "row_adagrad"),
    "head.side_stream": ("true",),
    "head.state_dtype": ("bfloat16",),
    "head.product_dtype": ("bfloat16", "float32"),
    "head.cache_mib": ("0", "4"),
    "head.weight_decay": ("0.1",),
    "head.dead_after_steps": ("1",),
    "init.centroids": ("class_means",),
    "optim.name": ("adamw",),
    "optim.nesterov": ("true",),
    "optim.momentum": ("0",),
    "optim.schedule": ("linear", "constant"),
    "optim.warmup_steps": ("1", "5"),
    "optim.clip_norm": ("null", "0.01"),
    "engine.dtype": ("bfloat16", "float16"),
    "engine.zero_stage": ("1", "2"),
    "engine.accumulation_steps": ("2",),
    "engine.on_nonfinite": ("skip",),
    "engine.check_weights_every": ("1", "null"),
    "data.batch_size": ("12", "4", "2"),
    "data.sampler": ("balanced", "class_weighted"),
    "data.samples_per_class": ("2", "3"),
    "data.shuffle_window": ("8",),
    "data.mix": ("{ROOT/unseen: 1}",),
    "data.mix_labels": ("offset",),
    "data.reader": ("stream",),
    "data.on_bad_sample": ("replace",),
    "data.reduced_decode": ("true",),
    "data.log_batch_digest": ("true",),
    "augment.crop_scale": ("[0.5, 1]",),
    "augment.rotate_degrees": ("10",),
    "augment.rand_augment": ("5",),
    "augment.erase": ("0.5",),
    "augment.occlusion": ("0.5",),
    "augment.low_resolution": ("0.5",),
    "backbone.name": ("lenetpp", "vit_tiny_patch16_224", "preact_resnet", "convnext_atto", "cifarnet"),
    "backbone.channels": ("1",),
    "backbone.neck": ("none", "linear", "linear_prelu", "bn_linear_bn"),
    "backbone.embedding_dim": ("2", "3", "null"),
    "backbone.dropout": ("0.3",),
    "backbone.drop_path": ("0.2",),
    "backbone.gradient_checkpointing": ("true",),
    "backbone.channels_last": ("true",),
    "backbone.batch_norm": ("local",),
    "checkpoint.asynchronous": ("true",),
    "checkpoint.every_steps": ("1",),
    "checkpoint.keep_best": ("eval/known/accuracy",),
    "eval.classification": ("{known: ROOT/known}",),
    "eval.verification": ("{unseen: ROOT/unseen}",),
    "eval.protocols": tuple(
        f"{{judged: {{protocol: {name}, data: ROOT/{data}}}}}"
        for name, data in (("open_set", "unseen"), ("closed_set", "known"), ("retrieval", "unseen"))
    ),
    "eval.every_steps": ("1",),
    "eval.batch_size": ("3",),
    "eval.save_embeddings": ("true",),
}
BASE = {
    "data.train": "ROOT/known", "data.batch_size": "8", "data.workers": "0",
    "backbone.name": "resnet10t", "backbone.image_size": "32", "backbone.embedding_dim": "8",
    "optim.lr": "0.001", "optim.steps": "2", "engine.dtype": "float32",
    "log.wandb": "disabled", "log.report": "false", "run.root": "ROOT/runs",
}  # fmt: skip


def draw(generator: random.Random) -> dict[str, str]:
    names = generator.sample(list(OPTIONS), generator.randint(3, 9))
    chosen = {name: generator.choice(OPTIONS[name]) for name in names}
    if "data.reader" in chosen:
        chosen |= {"data.epoch_images": "24", "head.num_classes": "5"}
    return chosen


def train_all(world: World, root: Path, cases: Sequence[dict[str, str]]) -> list[str]:
    """Return what is neither trained nor refused in one line."""
    wrong = []
    for number, chosen in enumerate(cases):
        options = BASE | {"run.name": f"run-{world.size}-{number}"} | chosen
        texts = [f"{name}={value}".replace("ROOT", str(root)) for name, value in options.items()]
        try:
            with mock.patch.object(loop, "joined_world", return_value=nullcontext(world)):
                loop.train(load(None, texts))
        except UserError as error:
            wrong += [f"{chosen}: {error}"] if "\n" in str(error) else []
        except Exception:
            wrong.append(f"{chosen}: {traceback.format_exc()}")
    return wrong


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("any")
    pack_photos(root, "known", {"ant": 6, "bee": 5, "cat": 3, "dog": 4, "eel": 6}, (36, 36))
    pack_photos(root, "unseen", {"fox": 4, "gnu": 5, "hen": 3}, (36, 36))
    return root


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_any_options_train_or_are_refused_in_one_line(root: Path, num_ranks: int) -> None:
    generator = random.Random(num_ranks if NUM_CONFIGS <= 6 else None)
    cases = [draw(generator) for _ in range(NUM_CONFIGS)]
    if num_ranks == 1:
        cases += [{"data.batch_size": "1"}, {"loss.extra": "{center: 0.01}", "init.centroids": "class_means"}]
    for wrong in run_on_ranks(train_all, num_ranks, root, cases, timeout_seconds=60 + 20 * len(cases)):
        assert not wrong, wrong[0]
