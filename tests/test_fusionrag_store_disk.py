"""The folder of stored chunks: damage, full disks, killed writers and several processes."""

import builtins
import contextlib
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from attnlab import WaveIndex
from attnlab.fusionrag import ChunkStore, store_disk
from attnlab.rope import RopeConfig
from tests.test_fusionrag_store import BYTES, chunk, held, same

ROOT = Path(__file__).resolve().parent.parent


def stored(path):
    """The chunks' files, by digest."""
    return {p.stem: p for p in Path(path).glob("*.safetensors")}


def others(path):
    """Whatever else is in the folder, its lock aside."""
    return sorted(set(os.listdir(path)) - {".lock"} - {p.name for p in stored(path).values()})


def on_disk(path, **options):
    """A store without memory: each look-up reads the file."""
    return ChunkStore(path, ram_bytes=0, **options)


def filled(path, count=3, **options):
    chunks = [chunk(i) for i in range(count)]
    store = on_disk(path, **options)
    for one in chunks:
        store.put(one)
    return store, chunks


FILE = BYTES + 600  # a `chunk()`'s file is hardly smaller


def altered(data, how):
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    meta = header["__metadata__"]
    if how == "version":
        meta["version"] = "0"
    elif how == "format":
        meta["format"] = "other"
    elif how == "checksum":
        del meta["sha256"]
    elif how == "neighbours":
        meta["chunk"] = meta["chunk"].replace('"neighbours": []', '"neighbours": ["a"]')
    elif how == "swapped":
        header["k"], header["v"] = header["v"], header["k"]
    elif how == "shape":
        header["k"]["shape"] = [2, 5, 8, 3]
    elif how == "dtype":
        header["k"]["dtype"] = "I32"
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d[:-1], "is truncated or no safetensors file"),
        (lambda d: d[: len(d) // 2], "is truncated or no safetensors file"),
        (lambda d: d[:5], "is truncated or no safetensors file"),
        (lambda d: b"", "is truncated or no safetensors file"),
        (lambda d: d + b"x", "is truncated or no safetensors file"),
        (lambda d: d[:-3] + bytes([d[-3] ^ 1]) + d[-2:], "was altered: its checksum does not fit"),
        (lambda d: d[: -BYTES // 2 - 3] + bytes([d[-BYTES // 2 - 3] ^ 64]) + d[-BYTES // 2 - 2 :], "was altered"),
        (lambda d: altered(d, "neighbours"), "was altered: its checksum does not fit"),
        (lambda d: altered(d, "swapped"), "was altered: its checksum does not fit"),
        (lambda d: altered(d, "shape"), "was altered: its checksum does not fit"),
        (lambda d: altered(d, "dtype"), "was altered: its checksum does not fit"),
        (lambda d: altered(d, "version"), "has version '0', this one reads '1'"),
        (lambda d: altered(d, "format"), "is no saved ChunkKV"),
        (lambda d: altered(d, "checksum"), "is no saved ChunkKV"),
    ],
)
def test_a_damaged_file_is_refused(change, message, tmp_path):
    filled(tmp_path)
    store, one = ChunkStore(tmp_path), chunk(1)
    file = stored(tmp_path)[one.key.digest]
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(change(data))
    for count in (1, 2):
        with pytest.raises(ValueError) as caught:
            store.get(one.key)
        assert str(caught.value).startswith(f"ChunkStore.get: {file} ") and message in str(caught.value)
        assert store.stats().refused == count and store.stats().disk.hits == store.stats().misses == 0
    with pytest.raises(ValueError, match=r"ChunkStore\.get: "):
        store.get_many([chunk(0).key, one.key, chunk(2).key])
    same(store.get(chunk(2).key), chunk(2))
    store.put(one)
    same(ChunkStore(tmp_path).get(one.key), one)
    file.write_bytes(b"")
    assert store.remove(one.key) and not file.exists() and store.get(one.key) is None


@pytest.mark.parametrize(
    "other, message",
    [
        (chunk(2), r"it has tokens '5:[0-9a-f]{64}' instead of '5:"),
        (chunk(1, tokens=6), "it has tokens '6:"),
        (chunk(1, model="n"), "it has model 'n' instead of 'm'$"),
        (chunk(1, system=[7]), "it has system '1:"),
        (chunk(1, rope=RopeConfig(500.0, 8)), r"it has rope '\[500.0, 8, .*' instead of '\[10000.0, 8"),
        (chunk(2, model="n"), "it has tokens .*, model 'n' instead of 'm'$"),
    ],
    ids=["content", "length", "model", "system", "rope", "two"],
)
def test_another_chunks_file_is_refused(other, message, tmp_path):
    one = chunk(1)
    store = ChunkStore(tmp_path)
    on_disk(tmp_path).put(other)
    file = stored(tmp_path)[other.key.digest]
    os.rename(file, file.with_stem(one.key.digest))
    with pytest.raises(ValueError, match=f"{one.key.digest}.safetensors is another chunk's file: {message}"):
        store.get(one.key)
    assert store.stats().refused == 1


def test_another_librarys_file_is_refused(tmp_path):
    key = chunk().key
    WaveIndex(1, 10, 2, 8).save(tmp_path / f"{key.digest}.safetensors")
    with pytest.raises(ValueError, match="is no saved ChunkKV"):
        ChunkStore(tmp_path).get(key)


def test_verification_can_be_turned_off(tmp_path):
    store, chunks = filled(tmp_path)
    file = stored(tmp_path)[chunks[1].key.digest]
    data = file.read_bytes()
    file.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    found = on_disk(tmp_path, verify=False).get(chunks[1].key)
    assert (found.v != chunks[1].v).sum() == 1 and (found.k == chunks[1].k).all()


def test_what_is_in_the_folder_and_no_chunk_stays(tmp_path):
    names = ["notes.txt", "a.safetensors", f"{'g' * 64}.safetensors", "x.scratch", f"{'0' * 64}.scratch"]
    for name in names:
        (tmp_path / name).write_text("mine")
    store, chunks = filled(tmp_path, disk_bytes=2 * FILE)
    assert store.keys() == {c.key.digest for c in chunks[1:]} and store.stats().disk.entries == 2
    store.clear()
    assert set(os.listdir(tmp_path)) == {".lock", *names}
    assert store.keys() == set() and store.get(chunks[2].key) is None


def test_the_disk_drops_the_longest_unused(tmp_path):
    store, chunks = filled(tmp_path, 3, disk_bytes=3 * FILE)
    same(store.get(chunks[0].key), chunks[0])
    store.put(chunk(3))
    assert [c.key in store for c in chunks] == [True, False, True]
    store.put(chunks[2])  # a put counts as use
    store.put(chunk(4))
    assert store.keys() == {chunk(i).key.digest for i in (2, 3, 4)}
    disk = store.stats().disk
    assert (disk.hits, disk.misses, disk.evictions, disk.entries) == (1, 0, 2, 3)
    assert disk.bytes == sum(p.stat().st_size for p in stored(tmp_path).values()) <= disk.budget == 3 * FILE


def test_use_in_another_store_counts(tmp_path):
    mine = ChunkStore(tmp_path)
    for i in range(3):
        mine.put(chunk(i))
    theirs = on_disk(tmp_path, disk_bytes=3 * FILE)
    theirs.get(chunk(1).key)
    mine.get(chunk(0).key)  # from memory
    theirs.put(chunk(3))
    assert theirs.keys() == {chunk(i).key.digest for i in (0, 1, 3)}
    theirs.put(chunk(4))
    assert theirs.keys() == {chunk(i).key.digest for i in (0, 3, 4)}
    same(mine.get(chunk(1).key), chunk(1))  # memory is the store's own
    assert on_disk(tmp_path).get(chunk(1).key) is None
    assert theirs.stats().disk.evictions == 2 and mine.stats().disk.evictions == 0


def test_a_chunk_goes_where_it_fits(tmp_path):
    large = chunk(9, tokens=20)
    store = ChunkStore(tmp_path, ram_bytes=BYTES)
    store.put(large)
    assert held(store, [large]) == [False]
    same(store.get(large.key), large)
    assert held(store, [large]) == [False] and store.stats().ram.entries == 0
    tight = ChunkStore(tmp_path, ram_bytes=9 * BYTES, disk_bytes=FILE)
    new = chunk(9, tokens=20, seed=1)
    tight.put(new)  # the older one must not come back from the disk
    same(tight.get(new.key), new)
    assert held(tight, [new]) == [True] and not stored(tmp_path)
    with pytest.raises(ValueError, match=f"ram_bytes={BYTES}, disk_bytes={FILE}"):
        ChunkStore(tmp_path, ram_bytes=BYTES, disk_bytes=FILE).put(large)
    exact = on_disk(tmp_path, disk_bytes=BYTES)  # the header does not fit
    with pytest.raises(ValueError, match=f"a chunk of {BYTES} bytes is over every budget: disk_bytes={BYTES}"):
        exact.put(chunk(1))
    assert not stored(tmp_path) and not others(tmp_path)


def test_what_memory_drops_the_disk_still_has(tmp_path):
    store = ChunkStore(tmp_path, ram_bytes=2 * BYTES)
    for i in range(5):
        store.put(chunk(i))
    found = store.get_many([chunk(i).key for i in range(6)])
    for i in range(5):
        same(found[i], chunk(i))
    assert found[5] is None and held(store, [chunk(i) for i in range(5)]) == [False, True, True, False, False]
    stats = store.stats()
    assert (stats.ram.hits, stats.ram.misses, stats.disk.hits, stats.disk.misses) == (2, 4, 3, 1)
    assert (stats.hits, stats.misses, stats.disk.entries) == (5, 1, 5) and store.keys() == stored(tmp_path).keys()


def during_a_load(store, monkeypatch, act):
    real = store._folder.get

    def get(key, place):
        found = real(key, place)
        monkeypatch.setattr(store._folder, "get", real)
        act()
        return found

    monkeypatch.setattr(store._folder, "get", get)


def test_a_load_does_not_undo_a_change_made_meanwhile(tmp_path, monkeypatch):
    filled(tmp_path)
    store, new = ChunkStore(tmp_path), chunk(0, seed=5)
    during_a_load(store, monkeypatch, lambda: store.put(new))
    same(store.get(new.key), chunk(0))
    same(store.get(new.key), new)
    during_a_load(store, monkeypatch, lambda: store.remove(chunk(1).key))
    same(store.get(chunk(1).key), chunk(1))
    assert store.get(chunk(1).key) is None
    during_a_load(store, monkeypatch, store.clear)
    same(store.get(chunk(2).key), chunk(2))
    assert store.get(chunk(2).key) is None


def test_threads_that_load_one_chunk_get_one_copy(tmp_path, monkeypatch):
    filled(tmp_path)
    store, first = ChunkStore(tmp_path), []
    during_a_load(store, monkeypatch, lambda: first.append(store.get(chunk(1).key)))
    assert store.get(chunk(1).key) is first[0] and store.stats().ram.bytes == BYTES


@pytest.mark.parametrize("gone", ["unlinked", "replaced"])
def test_a_file_that_goes_while_it_is_read(gone, tmp_path, monkeypatch):
    """Both opens of the safetensors library find the file that was there first."""
    store, chunks = filled(tmp_path)
    file, library = stored(tmp_path)[chunks[0].key.digest], store_disk.safe_file.library()
    real = library.safe_open

    def safe_open(*args, **options):
        file.unlink()
        if gone == "replaced":
            store.put(chunk(0, seed=5))
        return real(*args, **options)

    monkeypatch.setattr(library, "safe_open", safe_open)
    same(store.get(chunks[0].key), chunks[0])
    monkeypatch.undo()
    found = store.get(chunks[0].key)
    assert found is None if gone == "unlinked" else (found.k == chunk(0, seed=5).k).all()


def test_a_full_disk_is_an_error_and_nothing_more(tmp_path):
    store = ChunkStore(tmp_path, disk_bytes=3 * FILE)
    for i in range(3):
        store.put(chunk(i))
    before = {name: file.read_bytes() for name, file in stored(tmp_path).items()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        for one in (chunk(1, seed=5), chunk(4)):
            with pytest.raises(OSError, match=f"ChunkStore.put: cannot store in {tmp_path}: File too large") as caught:
                store.put(one)
            assert caught.value.errno == 27
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {name: file.read_bytes() for name, file in stored(tmp_path).items()} == before and not others(tmp_path)
    same(store.get(chunk(1).key), chunk(1))
    assert held(store, [chunk(i) for i in range(5)]) == [True, True, True, False, False]
    assert store.stats().disk.evictions == 0
    store.put(chunk(4))
    same(on_disk(tmp_path).get(chunk(4).key), chunk(4))


def test_the_folder_lock_is_let_go_though_a_fork_has_its_descriptor(tmp_path, monkeypatch):
    store, _ = filled(tmp_path)
    close, copies = os.close, []
    monkeypatch.setattr(os, "close", copies.append)
    with store._folder._locked():
        pass
    with open(tmp_path / ".lock") as file:
        store_disk.fcntl.flock(file, store_disk.fcntl.LOCK_EX | store_disk.fcntl.LOCK_NB)
    monkeypatch.undo()
    for fd in copies:
        close(fd)


@contextlib.contextmanager
def child(script, *args):
    """Another process; it and those it forked are killed at the end."""
    command = [sys.executable, "-c", f"from tests.test_fusionrag_store_disk import *\n{script}", *map(str, args)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


WAYS = ("half", "whole", "renaming")


def write_and_stop(path, where):
    """Replace a stored chunk, and stop for good before that is done."""
    store, write = on_disk(path), store_disk._write
    store.put(chunk(0))

    def stop(a, b):
        if where != "renaming":
            write(a, b[: len(b) // 2] if where == "half" else b)
        os.write(1, f"{where} {os.getpid()}\n".encode())  # in one piece: the three share a pipe
        signal.pause()

    if where == "renaming":
        os.replace = stop
    else:
        store_disk._write = stop
    store.put(chunk(0, seed=5))


WRITERS = """
for where in WAYS:
    if not os.fork():
        write_and_stop(os.path.join(sys.argv[1], where), where)
for _ in WAYS:
    print(*os.wait(), flush=True)
"""


def test_a_killed_writer_leaves_what_was_stored(tmp_path):
    with child(WRITERS, tmp_path) as parent:
        writers = dict(parent.stdout.readline().split() for _ in WAYS)
        for where in WAYS:
            path = tmp_path / where
            assert len(others(path)) == 1 and len(stored(path)) == 1
            if where != "renaming":  # that one has the folder's lock
                same(on_disk(path).get(chunk(0).key), chunk(0))
                assert len(others(path)) == 1  # a live writer's scratch file stays
            os.kill(int(writers[where]), signal.SIGKILL)
            assert parent.stdout.readline().split() == [writers[where], str(int(signal.SIGKILL))]
            assert len(others(path)) == 1
            store = on_disk(path)
            assert not others(path)
            same(store.get(chunk(0).key), chunk(0))
            store.put(chunk(0, seed=5))
            same(store.get(chunk(0).key), chunk(0, seed=5))


def hammer(path, seed, until):
    """Put, get and remove in a folder that others use too, `until()`; how often a chunk was there."""
    choose, chunks, hits, turn = random.Random(seed), [chunk(i) for i in range(8)], 0, 0
    while not until(turn):
        if turn % 50 == 0:
            store = on_disk(path, disk_bytes=5 * FILE)
        turn += 1
        one, what = choose.choice(chunks), choose.random()
        if what < 0.4:
            store.put(one)
        elif what < 0.45:
            store.remove(one.key)
        elif what < 0.5:
            with store._folder._locked():
                assert sum(s.nbytes for s in store._folder.stored()) <= 5 * FILE
        elif (found := store.get(one.key)) is not None:
            same(found, one)
            hits += 1
    return hits


HAMMER = """
print("ready", flush=True)
print(hammer(sys.argv[1], 0, lambda turn: turn == 400))
"""


def test_processes_share_a_folder(tmp_path):
    with child(HAMMER, tmp_path) as other:
        assert other.stdout.readline() == "ready\n"
        mine = hammer(tmp_path, 1, lambda turn: other.poll() is not None)
        assert other.returncode == 0 and int(other.stdout.read()) > 10 and mine > 10
    store, names = on_disk(tmp_path), stored(tmp_path).keys()
    assert 0 < len(names) <= 5 and not others(tmp_path)
    for one in map(chunk, range(8)):
        assert (store.get(one.key) is not None) == (one.key.digest in names)


def test_the_error_names_the_extra(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args):
        if name.startswith("safetensors"):
            raise ModuleNotFoundError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install attnlab\[hf\]"):
        ChunkStore(tmp_path / "new")
    assert not os.listdir(tmp_path)
    ChunkStore().put(chunk())
