"""Reading an offline W&B run back: the client ships the records' types, and no longer a reader."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a W&B file.

    LevelDB's log format behind 7 bytes of header: blocks of 32 KiB; each part of a record has 4 bytes of
    checksum, 2 of length and 1 of kind (1 whole, 2 first, 3 middle, 4 last). Of a file that is being written,
    what is there.
    """
    data, at, parts = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B") or not data
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + length > len(data):
            return
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""


def read_wandb(path: Path) -> dict:
    """Return what a W&B file says: id, project, name, configuration, history by step, exit code."""
    told: dict = {"history": {}}
    for record in read_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            told.update(id=record.run.run_id, project=record.run.project, name=record.run.display_name)
            told["config"] = {u.key: json.loads(u.value_json) for u in record.run.config.update}
        elif kind == "history":
            values = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            step = values.pop("_step")
            told["history"].setdefault(step, {}).update(values)
        elif kind == "exit":
            told["exit"] = record.exit.exit_code
    return told
