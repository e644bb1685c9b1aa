import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from web import Fault, served

from trainer import cache, remote, remote_index
from trainer.address import Url
from trainer.augment import build_eval_transform, build_train_transform
from trainer.cache import describe_source, open_data_set, read_together
from trainer.config import DataConfig
from trainer.data import build_eval_loader, build_train_loader
from trainer.errors import UserError
from trainer.index import open_index
from trainer.locks import locked
from trainer.mixture import mix
from trainer.order import Position, epoch_order
from trainer.samplers import ShuffledOrder, mixed
from trainer.shards import build_index, write_shards

NUM_SAMPLES, PER_SHARD = 30, 5


def image(i: int) -> bytes:
    return random.Random(i).randbytes(2000)


def pack(folder: Path, count: int = NUM_SAMPLES):
    samples = ((image(i), "png", i % 2) for i in range(count))
    return write_shards(samples, folder, ["ant", "bee"], PER_SHARD)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(remote, "TIMEOUT_SECONDS", 0.5)
    monkeypatch.setenv("NETRC", "/nonexistent")
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def web(tmp_path):
    pack(tmp_path / "web" / "set")
    with served(tmp_path / "web") as web:
        yield web


@pytest.fixture
def here(tmp_path):
    """The settings of a node whose cache is empty."""
    return DataConfig(train="unused", cache_dir=tmp_path / "cache")


def opened(web, data, **changed):
    return open_data_set(Url(web.url("/set", **changed)), "data.train", data)


def limited(data, num_bytes: float):
    return DataConfig(train="unused", cache_dir=data.cache_dir, cache_gib=num_bytes / 2**30)


def tars(data) -> dict[str, Path]:
    return {path.stem: path for path in (data.cache_dir / "shards").iterdir() if path.suffix == ".tar"}


def fetches(web) -> list[str]:
    return [request.path for request in web.requests if request.path.endswith(".tar")]


def test_a_remote_data_set_is_the_local_one(web, here):
    local, index = open_index(web.root / "set", "data.train"), opened(web, here)
    assert not fetches(web)
    assert [index.read(i) for i in range(NUM_SAMPLES)] == [image(i) for i in range(NUM_SAMPLES)]
    assert index.fingerprint == local.fingerprint
    assert index.labels_N.tolist() == local.labels_N.tolist()
    assert index.describe(7) == local.describe(7)
    assert len(fetches(web)) == 6
    assert tars(here).keys() == {shard.sha256 for shard in local.shards}
    assert sorted(path.name for path in here.cache_dir.iterdir()) == ["index", "locks", "shards"]
    assert here.cache_dir.stat().st_mode & 0o777 == 0o700


def test_a_second_run_fetches_the_index_json_only(web, here):
    [opened(web, here).read(i) for i in range(NUM_SAMPLES)]
    web.requests.clear()
    assert [opened(web, here).read(i) for i in range(NUM_SAMPLES)] == [image(i) for i in range(NUM_SAMPLES)]
    assert {request.path for request in web.requests} == {"/set/index/index.json"}


def test_the_index_survives_pickling(web, here):
    index = opened(web, here)
    index.store.expect(0, 0, ShuffledOrder(NUM_SAMPLES, 0))
    index.store.fetch_ahead()  # a thread does not travel
    copy = pickle.loads(pickle.dumps(index))
    assert (copy.read(29), copy.field, copy.num_samples) == (image(29), "data.train", NUM_SAMPLES)


def test_a_changed_data_set_is_seen_and_the_open_one_stays_readable(web, here):
    before = opened(web, here)
    write_shards([(image(99), "png", 0)], web.root / "set", ["ant"], overwrite=True)
    after = opened(web, here)
    assert after.num_samples == 1
    assert after.read(0) == image(99)
    assert before.num_samples == NUM_SAMPLES
    with pytest.raises(UserError, match=r"data.train: http://127.*data-000005.tar: answered 404"):
        before.read(29)


def test_equal_shards_of_two_data_sets_are_one_file(web, here):
    pack(web.root / "other", count=PER_SHARD)
    opened(web, here).read(0)
    other = open_data_set(Url(web.url("/other")), "eval.classification.x", here)
    assert other.read(1) == image(1)
    assert len(fetches(web)) == len(tars(here)) == 1


def test_a_cached_file_that_is_not_whole_is_fetched_again(web, here):
    index = opened(web, here)
    index.read(0)
    os.truncate(tars(here)[index.shards[0].sha256], 100)
    assert opened(web, here).read(0) == image(0)


@pytest.mark.parametrize("damage", ["array", "no hashes", "json", "outside", "too long", "version"])
def test_a_remote_index_that_is_not_whole_is_refused_and_not_kept(web, here, damage):
    folder = web.root / "set" / "index"
    head = json.loads((folder / "index.json").read_text())
    expected = f"data.train: the index of {web.url('/set')} is broken ("
    if damage == "array":
        content = bytearray((folder / "label.npy").read_bytes())
        content[-1] ^= 1
        (folder / "label.npy").write_bytes(content)
        expected = f"data.train: {web.url('/set/index/label.npy')}: has sha256 "
    elif damage == "no hashes":
        del head["arrays"]
        expected = f"data.train: the index of {web.url('/set')} has no hashes of its arrays"
    elif damage == "outside":
        head["shards"][0]["name"] = "../../etc/passwd"
    elif damage == "too long":
        head["arrays"]["label"]["bytes"] = 2**45
        expected = (
            f"data.train: the index of {web.url('/set')} has {2**45 + 248 + 368} bytes, above data.cache_gib"
        )
    elif damage == "version":
        head["version"] = 99
    (folder / "index.json").write_text("{" if damage == "json" else json.dumps(head))
    with pytest.raises(UserError) as caught:
        opened(web, here)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)
    assert not [path for path in (here.cache_dir / "index").iterdir() if not path.name.startswith(".")]


def test_a_shard_that_was_tampered_with_is_named_and_not_kept(web, here):
    path = web.root / "set" / "data-000002.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    index = opened(web, here)
    with pytest.raises(
        UserError, match=r"data.train: http.*/set/data-000002.tar: has sha256 .* its index says"
    ):
        index.read(12)
    assert index.read(0) == image(0)
    assert len(list((here.cache_dir / "shards").iterdir())) == 1


def test_a_pipe_needs_permission_and_then_reads_the_same(web, here):
    pipe = Url(f"pipe:cat {web.root}/set/{{}}")
    with pytest.raises(
        UserError, match=r"data.train: pipe:cat ... is a command; it needs data.allow_pipe=true"
    ):
        open_data_set(pipe, "data.train", here)
    allowed = DataConfig(train="unused", cache_dir=here.cache_dir, allow_pipe=True)
    assert open_data_set(pipe, "data.train", allowed).read(8) == image(8)


def test_a_cache_that_others_can_change_is_refused(web, here):
    (here.cache_dir / "shards").mkdir(parents=True)
    (here.cache_dir / "shards").chmod(0o777)
    with pytest.raises(UserError, match=r"data.cache_dir: .*shards can be changed by other users"):
        opened(web, here)


def test_a_cache_without_room_for_one_shard_is_refused(web, here):
    with pytest.raises(UserError, match=r"data.cache_gib: .* has no room for a shard of \d+ bytes"):
        opened(web, limited(here, 5000))


def test_a_disk_without_room_is_an_error(web, here, monkeypatch):
    index = opened(web, here)
    monkeypatch.setattr(
        cache.shutil, "disk_usage", lambda _: cache.shutil._ntuple_diskusage(10**9, 10**9, 100)
    )
    with pytest.raises(UserError, match=r"data.cache_dir: .*cache is on a disk with \d+ bytes too few"):
        index.read(0)


def test_the_source_is_described_without_its_credentials(web, here):
    index = opened(web, here, user="ann:hunter2@")
    text = describe_source(Url(web.url("/set", user="ann:hunter2@")), index, here)
    assert text == f"{web.url('/set')} (not encrypted), cached in {here.cache_dir}, room for all of it"
    size = sum(shard.bytes for shard in index.shards)
    text = describe_source(Url("https://host/set"), index, limited(here, size / 4))
    assert text.endswith(f"{here.cache_dir}, room for 25% of it: shards come again and again")
    assert "encrypted" not in text


def fewest_fetches(uses: list[int], room: int) -> int:
    """Belady's rule by hand, for shards of equal size: remove what is used again last."""
    kept: set[int] = set()
    fetched = 0
    for k, shard in enumerate(uses):
        if shard not in kept:
            if len(kept) == room:
                after = uses[k:]
                kept.remove(max(kept, key=lambda s: after.index(s) if s in after else len(uses)))
            kept.add(shard)
            fetched += 1
    return fetched


def read_epoch(index, seed: int) -> None:
    """Read an epoch as a loader does, but keep no shard open: the cache sees every use."""
    for position, sample in enumerate(epoch_order(NUM_SAMPLES, seed, 0).tolist()):
        index.store.expect(0, position, ShuffledOrder(NUM_SAMPLES, seed))
        shard = int(np.searchsorted(index.starts, sample, side="right")) - 1
        os.close(index.store.open(index.shards[shard]))


@pytest.mark.parametrize("room", [2, 4])
def test_room_is_made_by_the_shard_whose_next_use_is_farthest(web, here, room):
    size = max(shard.bytes for shard in open_index(web.root / "set", "x").shards)
    index = opened(web, limited(here, room * size))
    read_epoch(index, seed=3)
    uses = (epoch_order(NUM_SAMPLES, 3, 0) // PER_SHARD).tolist()
    assert len(fetches(web)) == fewest_fetches(uses, room)
    assert len(tars(here)) == room


def test_without_an_order_the_least_recently_opened_shard_makes_room(web, here):
    size = open_index(web.root / "set", "x").shards[0].bytes
    index = opened(web, limited(here, 2 * size))
    for shard in (0, 1, 0, 2, 0, 1):
        os.close(index.store.open(index.shards[shard]))
        time.sleep(0.01)  # the clock of a file system is coarse
    assert [path[-5] for path in fetches(web)] == ["0", "1", "2", "1"]


def test_the_cache_never_holds_more_than_its_limit_and_the_bytes_stay_right(web, here):
    size = open_index(web.root / "set", "x").shards[0].bytes
    index = opened(web, limited(here, 2.5 * size))
    for epoch, position in itertools.product(range(2), range(NUM_SAMPLES)):
        sample = int(epoch_order(NUM_SAMPLES, 1, epoch)[position])
        index.store.expect(epoch, position, ShuffledOrder(NUM_SAMPLES, 1))
        assert index.read(sample) == image(sample)
        held = sum(path.stat().st_size for path in (here.cache_dir / "shards").iterdir())
        assert held <= 2.5 * size


def test_a_removed_shard_is_let_go_when_the_next_one_is_opened(web, here):
    size = open_index(web.root / "set", "x").shards[0].bytes
    index = opened(web, limited(here, size))
    for sample in range(0, NUM_SAMPLES, PER_SHARD):
        assert index.read(sample) == image(sample)
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    removed = [link for link in links if os.path.islink(link) and "tar (deleted)" in os.readlink(link)]
    assert len(removed) <= 1
    assert index.read(0) == image(0)


def read_all(url: str, data: DataConfig, seed: int, start, answer) -> None:
    """Be one process of a node: read every sample once, in an order of its own; answer hashes or an error."""
    remote.TIMEOUT_SECONDS = 2.0
    start.wait()  # a process forked later would hold connections of the others open
    try:
        index = open_data_set(Url(url), "data.train", data)
        order = epoch_order(NUM_SAMPLES, seed, 0)
        images = {}
        for position, sample in enumerate(order.tolist()):
            if seed % 2:
                index.store.expect(0, position, ShuffledOrder(NUM_SAMPLES, seed))
            if seed == 1:
                index.store.fetch_ahead()
            images[sample] = hashlib.sha256(index.read(sample)).hexdigest()
        answer.send(images)
    except UserError as error:
        answer.send(str(error))


def in_processes(url: str, data: DataConfig, count: int) -> list:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(count)
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [
        context.Process(target=read_all, args=(url, data, seed, start, pipe[1]))
        for seed, pipe in enumerate(pipes)
    ]
    try:
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        assert all(receiver.poll(60) for receiver, _ in pipes)
        return [receiver.recv() for receiver, _ in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


EXPECTED = {i: hashlib.sha256(image(i)).hexdigest() for i in range(NUM_SAMPLES)}


def test_four_processes_and_a_bad_server_make_one_good_copy_of_every_shard(web, here):
    def choose(path: str, count: int) -> Fault:
        draw = random.Random(f"{path} {count}")
        fault = Fault(delay=draw.uniform(0, 0.05))
        if draw.random() < 0.35:
            fault.cut_after = draw.randrange(1, 8000)
        elif draw.random() < 0.2 and count < 2:
            fault.flip = True
        elif draw.random() < 0.1:
            fault.status = 503
        return fault

    web.choose = choose
    assert in_processes(web.url("/set"), here, 4) == [EXPECTED] * 4
    shards = open_index(web.root / "set", "x").shards
    assert any(r.fault.cut_after for r in web.requests)
    assert any(r.fault.flip for r in web.requests)
    assert set(web.most_at_once.values()) == {1}  # nothing was ever downloaded by two
    for shard in shards:
        answers = [request.fault for request in web.of(f"/set/{shard.name}")]
        whole = [fault for fault in answers if not (fault.flip or fault.status or fault.cut_after)]
        assert len(whole) <= 1 + sum(fault.flip for fault in answers)
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tars(here).values()}
    assert found == {f"{shard.sha256}.tar": shard.sha256 for shard in shards}
    assert len(list((here.cache_dir / "shards").iterdir())) == len(shards)


def test_processes_with_room_for_two_shards_read_right_bytes_and_stay_below_the_limit(web, here):
    size = open_index(web.root / "set", "x").shards[0].bytes
    web.choose = lambda path, count: Fault(delay=0.002)
    data = limited(here, 2.5 * size)
    assert in_processes(web.url("/set"), data, 3) == [EXPECTED] * 3
    assert sum(path.stat().st_size for path in (here.cache_dir / "shards").iterdir()) <= 2.5 * size


def test_who_waits_for_an_index_may_look_while_its_folder_goes(tmp_path):
    folder, enough = tmp_path / "arriving", threading.Event()

    def come_and_go() -> None:
        while not enough.is_set():
            (folder / "index").mkdir(parents=True)
            (folder / "index" / "index.json").write_bytes(b"12345")
            folder.rename(tmp_path / "whole")
            shutil.rmtree(tmp_path / "whole")

    other = threading.Thread(target=come_and_go)
    other.start()
    seen, started = set(), time.monotonic()
    try:
        # For a moment at least, and on a busy machine until it was there twice, and was not.
        while (passed := time.monotonic() - started) < 0.3 or (len(seen) <= 2 and passed < 30):
            seen |= {str(part) for part in remote_index._progress(folder)}
    finally:
        enough.set()
        other.join()
    assert len(seen) > 2


def test_who_waits_for_a_download_that_fails_is_told_why_and_does_not_try_as_long_again(web, here):
    index = opened(web, here)
    shard = f"/set/{index.shards[0].name}"
    web.choose = lambda path, count: Fault(status=503, delay=0.1) if path.endswith(".tar") else Fault()
    answers = in_processes(web.url("/set"), here, 4)
    assert all(isinstance(answer, str) and "answered 503" in answer for answer in answers)
    assert all(len(web.of(path)) <= 2 * remote.ATTEMPTS for path in [shard])


def test_a_download_goes_on_where_a_killed_process_left_it(web, here):
    shard = open_index(web.root / "set", "x").shards[0]
    stalled = Fault(stall_after=4096)
    web.choose = lambda path, count: stalled if path.endswith(shard.name) and count == 0 else Fault()
    process = multiprocessing.get_context("fork").Process(target=read_slowly, args=(web.url("/set"), here))
    process.start()
    partial = here.cache_dir / "shards" / f"{shard.sha256}-{shard.bytes}.part"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert 0 < partial.stat().st_size <= 4096
    there = partial.stat().st_size
    assert opened(web, here).read(0) == image(0)
    assert [request.range for request in web.of(f"/set/{shard.name}")] == [None, f"bytes={there}-"]
    assert not partial.exists()


def read_slowly(url: str, data: DataConfig) -> None:
    remote.TIMEOUT_SECONDS = 60.0
    open_data_set(Url(url), "data.train", data).read(0)


def test_a_lock_whose_holder_is_stuck_is_an_error_in_bounded_time(tmp_path):
    with (
        locked(tmp_path / "lock", "data.train", lambda: None, patience_seconds=0.2),
        pytest.raises(UserError, match=r"data.train: .*lock is held by a process that is stuck for 0 s"),
        locked(tmp_path / "lock", "data.train", lambda: None, patience_seconds=0.2),
    ):
        pass


def test_partial_files_of_dead_processes_make_room_first(web, here):
    size = open_index(web.root / "set", "x").shards[0].bytes
    index = opened(web, limited(here, 2 * size))
    index.read(0)
    abandoned = here.cache_dir / "shards" / f"{'0' * 64}-{size}.part"
    abandoned.write_bytes(b"x" * 100)
    index.read(PER_SHARD)
    assert not abandoned.exists()
    assert len(tars(here)) == 2


def fetch_ahead(index, position: int, seed: int) -> None:
    """Fetch what can be before the sample at a position is read, and wait until it is done."""
    index.store.expect(0, position, ShuffledOrder(NUM_SAMPLES, seed))
    index.store._rest_until = 0
    index.store.fetch_ahead()
    index.store._fetcher.join()


def next_uses(position: int, seed: int) -> list[int]:
    """The shards that an epoch needs from a position on, each once, the next one first."""
    return list(dict.fromkeys((epoch_order(NUM_SAMPLES, seed, 0)[position:] // PER_SHARD).tolist()))


def test_shards_are_fetched_ahead_in_the_order_of_their_first_use(web, here):
    fetch_ahead(opened(web, here), 0, seed=3)
    assert [int(path[-5]) for path in fetches(web)] == next_uses(0, seed=3)


@pytest.mark.parametrize("room", [1, 2, 4])
def test_what_is_fetched_ahead_are_always_the_shards_needed_next(web, here, room):
    index = opened(web, limited(here, room * max(s.bytes for s in open_index(web.root / "set", "x").shards)))
    for position in range(NUM_SAMPLES):
        fetch_ahead(index, position, seed=3)
        here_now = {number for number, shard in enumerate(index.shards) if shard.sha256 in tars(here)}
        assert len(here_now) == room
        assert here_now >= set(next_uses(position, seed=3)[:room])


def test_a_shard_that_is_being_fetched_ahead_is_waited_for_and_not_fetched_twice(web, here):
    index = opened(web, here)
    web.choose = lambda path, count: Fault(delay=0.1)
    index.store.expect(0, 0, ShuffledOrder(NUM_SAMPLES, 3))
    index.store.fetch_ahead()
    for sample in epoch_order(NUM_SAMPLES, 3, 0).tolist():
        assert index.read(sample) == image(sample)
    index.store._fetcher.join()
    assert len(fetches(web)) == len(set(fetches(web))) == len(index.shards)


def test_a_failure_of_fetching_ahead_is_told_by_who_needs_the_shard(web, here):
    index = opened(web, here)
    web.choose = lambda path, count: Fault(status=404)
    fetch_ahead(index, 0, seed=3)
    assert len(fetches(web)) == 1
    index.store.fetch_ahead()  # once is enough
    index.store._fetcher.join()
    assert len(fetches(web)) == 1
    with pytest.raises(UserError, match=r"data-00000\d.tar: answered 404"):
        index.read(0)


def test_an_indexed_folder_of_foreign_tars_can_be_served(web, here):
    folder = web.root / "foreign"
    folder.mkdir()
    (web.root / "set" / "data-000001.tar").rename(folder / "a tar with spaces.tar")
    build_index(folder)
    assert open_data_set(Url(web.url("/foreign")), "data.train", here).read(0) == image(PER_SHARD)


def pack_pictures(folder: Path, seed: int, count: int):
    """Pack so many random pictures of 6 x 6, two to a shard."""
    pictures = []
    for i in range(count):
        buffer = io.BytesIO()
        pixels = np.random.default_rng((seed, i)).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        pictures.append((buffer.getvalue(), "png", i % 2))
    return write_shards(pictures, folder, ["ant", "bee"], 2)


def digests(index, workers: int, order=None) -> list[int]:
    transform = build_train_transform(image_size=6, flip_probability=0.5)
    options = {"channels": 3, "global_batch": 4, "accumulation": 1, "seed": 2, "rank": 0, "world_size": 1}
    steps = build_train_loader(
        index, transform, **options, workers=workers, start=Position(), order=order, with_digests=True
    )
    try:
        return [int(batch.digests_N.sum()) for batch, _ in itertools.islice(steps, 7)]
    finally:
        steps.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_a_remote_data_set_in_a_small_cache_are_those_of_the_local_one(web, here, workers):
    local = pack_pictures(web.root / "pictures", 0, 12)
    room = limited(here, 2 * local.shards[0].bytes)
    there = open_data_set(Url(web.url("/pictures")), "data.train", room)
    assert digests(there, workers) == digests(local, 0)
    assert len(tars(here)) <= 2


@pytest.mark.parametrize("room", [1, 3, 9])
def test_data_sets_that_are_mixed_are_fetched_in_their_common_order(web, here, room):
    near = [pack_pictures(web.root / f"{seed}", seed, count) for seed, count in enumerate((8, 6, 4))]
    data = limited(here, room * max(shard.bytes for part in near for shard in part.shards))
    far = [open_data_set(Url(web.url(f"/{seed}")), f"data.mix.{seed}", data) for seed in (0, 1)]
    names = ["0", "1", "2"]
    mixture = mix(read_together([*far, near[2]]), "offset", names)  # the last one lies in a folder
    order = mixed([8, 6, 4], [1.0, 2.0, 0.5], seed=4)
    samples = order.of_epoch(0)(np.arange(order.num_positions))
    for position in range(order.num_positions):
        mixture.store.expect(0, position, order)
        mixture.store._rest_until = 0
        mixture.store.fetch_ahead()
        mixture.store._fetcher.join()
        needed = list(dict.fromkeys(int(i) // 2 for i in samples[position:] if i < 14))
        here_now = {k for k in range(7) if mixture.store.shards[k].sha256 in tars(here)}
        assert here_now >= set(needed[:room])
        assert len(here_now) <= room
    copy = pickle.loads(pickle.dumps(mixture))
    assert copy.parts[0].store is copy.parts[1].store is copy.store
    local = mix(near, "offset", names)
    for workers in (0, 2) if room == 1 else ():
        assert digests(copy, workers, order) == digests(local, 0, order)
    assert read_together(near) == near
    assert local.store is None


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_of_a_test_set_are_fetched_ahead_too(web, here, workers):
    pack_pictures(web.root / "test", 7, 20)
    index = open_data_set(Url(web.url("/test")), "eval.classification.test", here)
    options = {"channels": 3, "batch_size": 4, "rank": 0, "world_size": 1, "workers": workers}
    batches = iter(build_eval_loader(index, build_eval_transform(image_size=6), **options))
    next(batches)
    deadline = time.monotonic() + 20
    while len(tars(here)) < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(path[-5] for path in fetches(web)) == [*"0123456789"]  # reader and fetcher take turns
    assert sum(int(batch.valid_N.sum()) for batch in batches) == 16
