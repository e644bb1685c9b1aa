"""The plan of ``trainer/plan.py`` for programs (one JSON object) and for people (tables)."""

from dataclasses import asdict, replace
from typing import Any

from trainer.plan import (
    Job,
    advice,
    available_bytes,
    checkpoint,
    fits,
    largest_classes,
    memory,
    seconds,
    traffic,
)


def plan(job: Job) -> dict[str, Any]:
    """Return all that is known of a job as one tree of plain values, for JSON."""
    parts, times = memory(job), seconds(job)
    step = sum(times.values())
    asked = asdict(replace(job, profile=None)) | {"dtype": job.compute_dtype}
    del asked["profile"]
    return {
        **asked,
        "ranks": job.ranks,
        "classes_per_rank": job.head.rows,
        "images_per_rank": job.local_batch,
        "product_dtype": job.product_dtype,
        "tile_rows": job.head.tile_rows,
        "kept_tiles": job.head.kept_tiles,
        "memory_bytes_per_rank": {**parts, "total": sum(parts.values()), "available": available_bytes(job)},
        "checkpoint_bytes": checkpoint(job),
        "fits": fits(job),
        "largest_classes": largest_classes(job),
        "traffic_bytes_per_rank": traffic(job),
        "seconds_per_step": {**times, "total": step},
        "clipping_adds_seconds": times["head_second_pass"],
        "images_per_second": job.batch / step,
        "advice": [asdict(a) for a in advice(job)],
        "measured": asdict(job.profile) if job.profile else None,
    }


def table(job: Job) -> str:
    """Return the same for people: aligned, with units, and beside every number what it rests on."""
    tree = plan(job)
    head = "measured" if job.profile else "data sheet"
    lines = [
        f"{job.classes:,} classes x {job.dim}, batch {job.batch:,}, {job.backbone.name} ({tree['dtype']}), "
        f"rows {job.state_dtype}, {job.optimizer}",
        f"{job.ranks} ranks ({job.nodes} x {job.gpus_per_node} {job.gpu}), each "
        f"{tree['classes_per_rank']:,} classes, {tree['images_per_rank']:,} images, "
        f"tiles of {tree['tile_rows']:,} classes, {tree['kept_tiles']} kept; products in {job.product_dtype}",
        "",
        f"{'memory per rank':<26}{'GiB':>12}",
    ]
    basis = {"gathered_features": "estimate", "backbone_state": "counted", "activations": "estimate"}
    basis |= {"head_libraries": "measured", "reserve": "assumed", "total": "", "available": "assumed"}
    for name, size in tree["memory_bytes_per_rank"].items():
        lines.append(f"  {_words(name):<24}{size / 2**30:>12.3f}  {basis.get(name, 'exact')}".rstrip())
    lines += ["", f"{'checkpoint':<26}{'GiB':>12}"]
    for name, size in tree["checkpoint_bytes"].items():
        lines.append(f"  {_words(name):<24}{size / 2**30:>12.3f}  counted")
    lines += ["", f"{'sent per rank and step':<26}{'inside MB':>12}{'between MB':>12}"]
    for name, sent in tree["traffic_bytes_per_rank"].items():
        lines.append(f"  {_words(name):<24}{sent['inside'] / 1e6:>12.3f}{sent['between'] / 1e6:>12.3f}  ring")
    lines += ["", f"{'seconds per step':<26}{'ms':>12}"]
    for name, value in tree["seconds_per_step"].items():
        source = "" if name == "total" else head if name.endswith("pass") else "data sheet"
        lines.append(f"  {_words(name):<24}{value * 1e3:>12.2f}  {source}".rstrip())
    clipping = tree["clipping_adds_seconds"] * 1e3
    lines.append(f"  {'optim.clip_norm adds':<24}{clipping:>12.2f}  second pass again")
    lines += [f"{'images per second':<26}{tree['images_per_second']:>12,.0f}", "", *_verdict(tree)]
    return "\n".join(lines)


def _verdict(tree: dict[str, Any]) -> list[str]:
    """Return whether it fits, what to change first, and how far the numbers can be trusted."""
    word = "fits" if tree["fits"] else "does not fit"
    lines = [f"{word}; the largest number of classes that fits is {tree['largest_classes']:,}"]
    if not tree["fits"] and not tree["advice"]:
        lines.append("nothing to change was found: take a smaller batch or backbone")
    for entry in tree["advice"]:
        mark = "fits" if entry["fits"] else "not yet"
        size, largest = entry["total_bytes"] / 2**30, entry["largest_classes"]
        lines.append(f"  {entry['change']}: {size:.2f} GiB, up to {largest:,} classes: {mark}")
    if profile := tree["measured"]:
        lines += [
            f"measured: passes and libraries of the head, by {profile['lines']} lines of {profile['path']}",
            f"  which the fit meets within {profile['worst_time_error']:.0%} (time) and "
            f"{profile['worst_memory_error']:.0%} (memory)",
        ]
    rest = "the rest" if tree["measured"] else "nothing is measured: it"
    lines.append(f"{rest} is arithmetic on data sheets; expect seconds within a factor of two at best")
    return lines


def _words(name: str) -> str:
    return name.replace("_", " ")
