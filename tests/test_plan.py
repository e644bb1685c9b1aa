"""The plan against numbers written out by hand, a real head, a ring walked link by link, and its command."""

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import Started
from ranks import run_on_ranks

import launch.plan
from trainer.backbone import build_backbone
from trainer.checkpoint import head_tensors
from trainer.config import BackboneConfig, OptimConfig
from trainer.distributed import World
from trainer.errors import UserError
from trainer.fused import FusedCocoHead
from trainer.head import ClassShard
from trainer.headcost import HeadSpeed, HeadWork, _work_of, read_profile
from trainer.machines import GPUS
from trainer.margins import CosineSoftmax
from trainer.optimizer import allocate_state, build_optimizer
from trainer.plan import (
    BackboneCost,
    Job,
    advice,
    available_bytes,
    checkpoint,
    count_backbone,
    fits,
    largest_classes,
    memory,
    seconds,
    traffic,
)
from trainer.plansheet import plan, table

SMALL = HeadWork(
    classes=1001, dim=8, batch=4, ranks=2, state_dtype="float32", product_dtype="float32", optimizer="sgd",
    on_cpu=True, cache_bytes=0,
)  # fmt: skip
KEPT = {"float32": 10e6, "bfloat16": 5e6, "float16": 5e6}
BACKBONE = BackboneCost("of the test", 1_000_000, 1e9, KEPT, 200_000, 500, 10)
JOB = Job(classes=1_000_000, dim=512, batch=1024, nodes=1, gpus_per_node=8, gpu="v100-32", backbone=BACKBONE)


def test_bytes_of_the_head_are_those_counted_by_hand():
    # C = 501 rows on rank 1, all in one tile (T >= C)
    assert SMALL.rows == 501
    assert SMALL.memory() == {
        "rows": 501 * 8 * 4,
        "row_optimizer_state": 501 * 8 * 4,
        "inverse_lengths": 501 * 4,
        "last_seen": 501 * 4,
        "tile": 4 * 501 * 8 * 4 + 502 * 4 * 4 + 4 * 8 * 4,  # unit, rows, gradient, scratch; e; B x D
        "kept_exponentials": 0,
        "gathered_features": 4 * 11 * 4 + 4 * 8 * (4 + 4 + 4 + 16),
    }


def test_bfloat16_rows_take_half_and_row_adagrad_four_bytes_a_class():
    half = replace(SMALL, state_dtype="bfloat16", product_dtype="bfloat16")
    assert half.memory()["rows"] == half.memory()["row_optimizer_state"] == 501 * 8 * 2
    assert replace(half, optimizer="adamw").memory()["row_optimizer_state"] == 501 * 8 * 2 * 2
    assert replace(half, optimizer="row_adagrad").memory()["row_optimizer_state"] == 501 * 4


def test_a_step_is_four_matrix_products_and_three_when_all_exponentials_are_kept():
    product = 2 * 4 * 8 * 501
    assert SMALL.flop() == (2 * product, 2 * product)
    all_kept = replace(SMALL, cache_bytes=2 << 20)
    assert all_kept.flop() == (2 * product, product)
    assert all_kept.traffic()[1] == 501 * 60 * 8  # no exponentials and no scaling of rows


def test_bytes_moved_outside_of_products_are_those_counted_by_hand():
    # pass 1, per exponential: maximum 4, exp2 8, sum 4; per number of a row: length 4, scale 8
    assert SMALL.traffic()[0] == 501 * (16 * 4 + 12 * 8)
    # pass 2: exp2 8 | scale again 8, product and its sum 16, addcmul 12, scale 8, length 4, SGD 20
    assert SMALL.traffic()[1] == 501 * (8 * 4 + 68 * 8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_by_parts_is_that_of_a_real_head(dtype: str):
    works = [
        HeadWork(
            classes=3001, dim=256, batch=512, ranks=2, state_dtype=dtype, product_dtype=dtype,
            optimizer=optimizer, on_cpu=True, cache_bytes=cache_bytes,
        )
        for optimizer in ("sgd", "adamw", "row_adagrad") for cache_bytes in (0, 3 << 20, 64 << 20)
    ]  # fmt: skip
    for work, of_ranks in zip(
        works, zip(*run_on_ranks(real_bytes_of_all, 2, works), strict=True), strict=True
    ):
        for part in of_ranks[0]:
            assert work.memory()[part] == max(found[part] for found in of_ranks), (work, part)


def test_a_checkpoint_has_rows_and_backbone_with_their_state():
    # 1 000 003 rows and their momentum; weights and momentum of 1 000 000 parameters
    job = replace(JOB, classes=1_000_003, nodes=2)
    backbone = 2 * 4 * 1_000_000
    assert checkpoint(job)["on_disk"] == 2 * 4 * 512 * 1_000_003 + backbone
    # 62 501 rows on the ranks with one more, 8 of which may share a host
    assert checkpoint(job)["copy_per_host"] == 2 * 4 * 512 * 62_501 * 8 + backbone
    # one number a row; its backbone has momentum all the same
    adagrad = replace(job, optimizer="row_adagrad", state_dtype="bfloat16")
    assert checkpoint(adagrad)["on_disk"] == (2 * 512 + 4) * 1_000_003 + backbone


def real_bytes_of_all(world: World, works: list[HeadWork]) -> list[dict[str, int]]:
    return [real_bytes(world, work) for work in works]


def real_bytes(world: World, work: HeadWork) -> dict[str, int]:
    """Return the bytes of the tensors that a head holds after a step."""
    dtype = getattr(torch, work.state_dtype)
    shard = ClassShard.of_rank(work.classes, world.rank, world.size)
    head = FusedCocoHead(
        shard, work.dim, loss=CosineSoftmax(10.0), seed=0, group=world.group, row_type=dtype,
        product_type=dtype, cache_bytes=work.cache_bytes,
    )  # fmt: skip
    assert head.rows_of_tile(work.batch) == work.tile_rows < work.rows
    optimizer = build_optimizer(OptimConfig(), [{"params": [head.centroids_CD]}], work.optimizer)
    allocate_state(optimizer)
    embeddings_ND = torch.randn(work.batch // world.size, work.dim, requires_grad=True)
    head(embeddings_ND, torch.zeros(len(embeddings_ND), dtype=torch.int64)).loss.backward()
    head.update(optimizer, divisor=1.0, step=0)
    update = head._row_update
    assert update is not None
    (workspace,) = head._workspaces.values()
    tile = [x for name, x in vars(workspace).items() if name[-3:] in ("_TD", "_TB", "_BD")]
    saved = head_tensors(head, optimizer).values()
    kept = [head.centroids_CD, *(x for x in optimizer.state[head.centroids_CD].values() if x.ndim)]
    assert sum(x.nbytes for x in saved) == storage_bytes(kept), "what plan counts is what a checkpoint holds"
    noise = [update._noise_PD] if update._noise_PD is not None else []
    return {
        "rows": storage_bytes([head.centroids_CD]),
        "row_optimizer_state": storage_bytes(
            [x for x in optimizer.state[head.centroids_CD].values() if x.ndim]
        ),
        "inverse_lengths": storage_bytes([head._inverse_C1]),
        "last_seen": storage_bytes([head.last_seen_C]),
        "tile": storage_bytes([*tile, *noise, *update._buffers]),
        "kept_exponentials": storage_bytes(workspace._kept),
    }


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    return sum({x.data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@pytest.mark.parametrize(("nodes", "gpus_per_node"), [(1, 1), (1, 4), (2, 1), (2, 3), (4, 2)])
def test_bytes_on_the_links_are_those_of_a_ring(nodes: int, gpus_per_node: int):
    job = replace(JOB, nodes=nodes, gpus_per_node=gpus_per_node, batch=1008)
    ranks = nodes * gpus_per_node
    inside, between = (
        0,
        0,
    )  # parts sent in an all-gather: R-1 rounds, in each every rank sends one to the next
    for _, rank in itertools.product(range(ranks - 1), range(ranks)):
        if rank // gpus_per_node == (rank + 1) % ranks // gpus_per_node:
            inside += 1
        else:
            between += 1
    features, gradient = 1008 * 515 * 4, 1_000_000 * (4 if job.compute_dtype == "float32" else 2)
    for name, size, times in (
        ("all_gather_features", features, 1),
        ("reduce_scatter_features", features, 1),
        ("all_reduce_sums", 2 * 1008 * 8, 2),
        ("all_reduce_nearest", 1008 * 4, 2),
        ("all_reduce_backbone", gradient, 2),
    ):
        sent = traffic(job)[name]
        assert sent["bytes"] == size
        assert sent["inside"] == pytest.approx(times * size * inside / ranks**2, abs=1)
        assert sent["between"] == pytest.approx(times * size * between / ranks**2, abs=1)


@pytest.mark.parametrize("gpu", sorted(GPUS))
def test_the_largest_number_of_classes_fits_and_one_more_does_not(gpu: str):
    job = replace(JOB, gpu=gpu)
    largest = largest_classes(job)
    assert fits(replace(job, classes=largest))
    assert not fits(replace(job, classes=largest + 1))
    assert sum(memory(replace(job, classes=largest + 1)).values()) > available_bytes(job)


def test_more_classes_cost_more_and_more_gpus_less():
    by_classes = [replace(JOB, classes=10**n) for n in range(3, 9)]
    by_gpus = [replace(JOB, nodes=n) for n in (1, 2, 4, 8)]
    for measure in (lambda job: sum(memory(job).values()), head_seconds):
        values = [measure(job) for job in by_classes]
        assert values == sorted(values)
        assert values[0] < values[-1]
        values = [measure(job) for job in by_gpus]
        assert values == sorted(values, reverse=True)
    largest = [largest_classes(job) for job in by_gpus]
    assert largest == sorted(largest)
    assert largest[0] < largest[-1]


def head_seconds(job: Job) -> float:
    times = seconds(job)
    return times["head_first_pass"] + times["head_second_pass"]


def test_nothing_fits_beside_a_backbone_that_is_too_large_and_smaller_batches_come_first():
    job = replace(JOB, backbone=replace(BACKBONE, kept_bytes=dict.fromkeys(KEPT, 3e8)))
    assert largest_classes(job) == 0
    assert [entry.change.split()[0] for entry in advice(job)] == ["--accumulation-steps"]
    assert advice(job)[0].fits


@pytest.mark.parametrize(
    ("classes", "changes"),
    [
        (10_000_000, []),
        (80_000_000, ["--state-dtype bfloat16"]),
        (
            150_000_000,
            [
                "--state-dtype bfloat16",
                "--optimizer row_adagrad",
                "--state-dtype bfloat16 --optimizer row_adagrad",
            ],
        ),
    ],
)
def test_advice_ends_with_the_first_change_that_fits(classes: int, changes: list[str]):
    given = advice(replace(JOB, classes=classes))
    assert [entry.change for entry in given] == changes
    assert [entry.fits for entry in given] == [False] * (len(given) - 1) + [True] * bool(given)


def test_advice_names_the_smallest_number_of_nodes_that_fits():
    job = replace(JOB, classes=1_000_000_000, state_dtype="bfloat16", optimizer="row_adagrad")
    (entry,) = advice(job)
    nodes = int(entry.change.split()[1])
    possible = [n for n in range(1, 129) if 1024 % (8 * n) == 0]
    assert nodes == next(n for n in possible if fits(replace(job, nodes=n)))


@pytest.fixture(scope="module")
def resnet50() -> BackboneCost:
    return count_backbone("resnet50", None, 512)


def test_a_backbone_is_counted_as_its_papers_count_it(resnet50: BackboneCost):
    cost = resnet50
    assert cost.parameters == 25_557_032 - 2048 * 1000 - 1000 + 2 * 2048 + 2048 * 512 + 512  # without classes
    assert cost.forward_flop == pytest.approx(2 * 4.09e9, rel=0.01)
    assert cost.norm_layers == 53 + 1
    assert cost.norm_channels == 26_560 + 2048


def test_what_autograd_keeps_is_that_of_a_real_forward_pass():
    kept = [kept_in_memory(images) for images in (2, 4)]
    counted = count_backbone("resnet10t", 64, 16).kept_bytes["float32"]
    assert counted == (kept[1] - kept[0]) / 2


def kept_in_memory(images: int) -> int:
    config = BackboneConfig(name="resnet10t", image_size=64, embedding_dim=16, batch_norm="local")
    backbone = build_backbone(config, None)  # type: ignore[arg-type]
    saved: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        backbone(torch.zeros(images, 3, 64, 64, dtype=torch.uint8))
    own = {x.untyped_storage().data_ptr() for x in (*backbone.parameters(), *backbone.buffers())}
    return sum(x.untyped_storage().nbytes() for pointer, x in saved.items() if pointer not in own)


@pytest.mark.parametrize(
    ("gpu", "dtype", "published"),
    [("a100-80", "bfloat16", 2470), ("v100-16", "float16", 1200), ("v100-16", "float32", 367)],
)
def test_resnet50_is_as_fast_as_published_within_a_quarter(
    gpu: str, dtype: str, published: float, resnet50: BackboneCost
):
    job = replace(JOB, gpus_per_node=1, gpu=gpu, dtype=dtype, backbone=resnet50, batch=256)
    assert 256 / seconds(job)["backbone"] == pytest.approx(published, rel=0.25)


# ----------------------------------------------------------------------------------------------- profile

TRUE = HeadSpeed(
    seconds_per_flop=1 / 8e10, seconds_per_byte=1 / 3e10, constant_seconds=2e-3, fixed_bytes=12_000_000
)


def profile_line(classes: int, dim: int, batch: int, **changes: Any) -> dict[str, Any]:
    """Return what the benchmark would print on a machine of the speed ``TRUE``."""
    work = replace(SMALL, classes=classes, dim=dim, batch=batch, ranks=1, cache_bytes=None)
    parts = work.memory()
    state = parts["rows"] + parts["row_optimizer_state"]
    return {
        "name": "head-fused",
        "classes": classes,
        "dim": dim,
        "global_batch": batch,
        "ranks": 1,
        "processors": 2,
        "dtype": "float32",
        "device": "cpu",
        "step_seconds": sum(TRUE.seconds(work)),
        "gemm_seconds": 8 * batch * dim * classes * TRUE.seconds_per_flop,
        "state_bytes_per_rank": state,
        "peak_extra_bytes_per_rank": sum(parts.values()) - state + TRUE.fixed_bytes,
    } | changes


LINES = [profile_line(k, d, b) for k in (20_000, 100_000) for d in (256, 512) for b in (64, 256)]


def write_profile(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def test_a_fit_finds_the_speed_that_made_the_lines(tmp_path: Path):
    profile = read_profile(write_profile(tmp_path / "profile.jsonl", LINES))
    found = profile.speeds["float32"]
    assert found.seconds_per_flop == pytest.approx(TRUE.seconds_per_flop, rel=1e-6)
    assert found.seconds_per_byte == pytest.approx(TRUE.seconds_per_byte, rel=1e-6)
    assert found.constant_seconds == pytest.approx(TRUE.constant_seconds, rel=1e-6)
    assert found.fixed_bytes == TRUE.fixed_bytes
    assert profile.worst_time_error < 1e-6
    assert profile.worst_memory_error < 1e-6


def test_ranks_that_share_a_core_take_turns(tmp_path: Path):
    alone = read_profile(write_profile(tmp_path / "profile.jsonl", LINES))
    crowded = [line | {"ranks": 4, "step_seconds": 0.0} for line in LINES]
    for line in crowded:
        work = replace(_work_of(line), turns=1.0)
        line["step_seconds"] = 2 * sum(replace(TRUE, constant_seconds=0.0).seconds(work)) + 2e-3
        line["gemm_seconds"] = 2 * 2 * work.flop()[0] * TRUE.seconds_per_flop
    found = read_profile(write_profile(tmp_path / "crowded.jsonl", crowded)).speeds["float32"]
    assert found.seconds_per_flop == pytest.approx(alone.speeds["float32"].seconds_per_flop, rel=1e-6)
    assert found.seconds_per_byte == pytest.approx(alone.speeds["float32"].seconds_per_byte, rel=1e-6)
    job = replace(JOB, gpu="cpu", nodes=1, profile=alone)
    assert replace(job, gpus_per_node=4).head.turns == 2.0
    assert replace(job, gpus_per_node=2).head.turns == 1.0


def test_a_fit_gives_no_negative_speed_when_steps_are_faster_than_their_products(tmp_path: Path):
    lines = [line | {"step_seconds": 0.7 * line["gemm_seconds"]} for line in LINES]
    found = read_profile(write_profile(tmp_path / "profile.jsonl", lines)).speeds["float32"]
    assert found.seconds_per_flop > 0
    assert found.seconds_per_byte >= 0
    assert found.constant_seconds >= 0


def test_a_profile_decides_the_seconds_of_the_head_and_of_nothing_else(tmp_path: Path):
    job = replace(JOB, gpu="cpu")
    lines = [line | {"processors": job.gpus_per_node} for line in LINES]
    profile = read_profile(write_profile(tmp_path / "profile.jsonl", lines))
    before, after = seconds(job), seconds(replace(job, profile=profile))
    assert after["head_first_pass"] + after["head_second_pass"] == pytest.approx(sum(TRUE.seconds(job.head)))
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"head_first_pass", "head_second_pass"}
    assert memory(replace(job, profile=profile))["head_libraries"] == TRUE.fixed_bytes
    assert "measured" in table(replace(job, profile=profile))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "No such file or directory"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "not a text file"),
        (lambda path: path.write_text("\n"), "lines of one device are needed, got none"),
        (lambda path: path.write_text("{"), "profile.jsonl:1: not JSON"),
        (lambda path: write_profile(path, [{"name": "data"}]), '"name" is not "head-fused"'),
        (lambda path: write_profile(path, [LINES[0], profile_line(9, 9, 9, gemm_seconds="x")]),
         ''':2: "gemm_seconds" is 'x\''''),
        (lambda path: write_profile(path, [profile_line(9, 9, 9, step_seconds=float("nan"))]),
         '"step_seconds" is nan, not above 0'),
        (lambda path: write_profile(path, [profile_line(9, 9, 9, ranks=True)]), '"ranks" is True'),
        (lambda path: write_profile(path, [profile_line(9, 9, 9, dtype="int8")]), '''"dtype" is 'int8\''''),
        (lambda path: write_profile(path, [LINES[0]] * 5), "needs lines with different numbers of classes"),
    ],
)  # fmt: skip
def test_a_profile_that_cannot_be_used_is_refused(
    write: Callable[[Path], object], message: str, tmp_path: Path
):
    path = tmp_path / "profile.jsonl"
    write(path)
    with pytest.raises(UserError) as caught:
        read_profile(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_profile_of_another_device_or_type_is_refused(tmp_path: Path):
    profile = read_profile(write_profile(tmp_path / "profile.jsonl", LINES))
    with pytest.raises(UserError, match="measured on cpu, but --gpu is h100"):
        replace(JOB, gpu="h100", profile=profile)
    with pytest.raises(UserError, match="no line has dtype bfloat16"):
        plan(replace(JOB, gpu="cpu", state_dtype="bfloat16", profile=profile))


# ------------------------------------------------------------------------------------------- command line

ARGUMENTS = [
    "--classes", "100000", "--dim", "64", "--batch", "256", "--backbone", "lenetpp", "--gpu", "h100",
    "--nodes", "2", "--gpus-per-node", "4",
]  # fmt: skip


def test_the_command_prints_json_or_ends_with_one_line_and_code_2():
    right = Started(sys.executable, "launch/plan.py", *ARGUMENTS, "--json")
    wrong = Started(sys.executable, "launch/plan.py", *ARGUMENTS, "--gpu", "h200")
    done = right.wait()
    assert done.code == 0, done.stderr
    tree = json.loads(done.stdout)
    assert tree.keys() == plan(JOB).keys()
    assert tree["classes_per_rank"] == 12_500
    parts = tree["memory_bytes_per_rank"]
    assert parts["rows"] == 12_500 * 64 * 4
    assert parts["total"] == sum(v for k, v in parts.items() if k not in ("total", "available"))
    assert tree["seconds_per_step"]["total"] * tree["images_per_second"] == pytest.approx(256)
    assert (tree["dtype"], tree["product_dtype"], tree["measured"]) == ("bfloat16", "bfloat16", None)
    done = wrong.wait()
    assert done.code == 2
    assert done.stderr == f"error: --gpu: unknown 'h200'; one of {', '.join(GPUS)}\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--batch", "1001"], "--batch: 1001 is not divisible by 8 ranks"),
        (["--batch", "8", "--accumulation-steps", "2"], "by 8 ranks x --accumulation-steps 2"),
        (["--classes", "7"], "--classes: 7 classes cannot be cut over 8 ranks"),
        (["--nodes", "0"], "--nodes: 0 is not above 0"),
        (["--dim", "-1"], "--dim: -1 is not above 0"),
        (["--image-size", "0"], "--image-size: 0 is not above 0"),
        (["--cache-mib", "-1"], "--cache-mib: -1 is below 0"),
        (["--gpu", "v100-16", "--dtype", "bfloat16"], "--dtype: v100-16 does not compute in bfloat16"),
        (["--backbone", "resnet5O"], "timm has no model 'resnet5O'"),
        (["--profile", "/nowhere.jsonl"], "--profile /nowhere.jsonl: No such file or directory"),
    ],
)
def test_what_a_user_gets_wrong_is_named_in_one_line(
    changes: list[str], message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["plan.py", *ARGUMENTS, *changes])
    with pytest.raises(UserError) as caught:
        launch.plan.main()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_table_has_units_and_says_what_is_only_arithmetic():
    text = table(replace(JOB, classes=80_000_000))
    for words in ("GiB", "inside MB", "ms", "exact", "estimate", "does not fit", "nothing is measured"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 120
