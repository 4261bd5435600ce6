"""A `WaveIndex` in a file: it goes on as it would have, and a damaged file is refused whole."""

import builtins
import json
import os
import struct

import pytest
import torch

from attnlab import WaveIndex, wave_attention, wave_file
from tests.test_retroinfer_api import CONFIG, K, Q, V, assert_same, built


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_saved_index_goes_on_as_it_would_have(dtype, tmp_path):
    k, v, q = (x.to(dtype) for x in (K, V, Q))
    index = built(k, v, lengths=[80, 50, 4], capacity=131)
    index.append(k[:, 80:90], v[:, 80:90], [10, 4, 0])
    index.save(tmp_path / "one")
    again = WaveIndex.load(tmp_path / "one", capacity=200)
    assert os.listdir(tmp_path) == ["one"] and again.config == CONFIG and again.capacity == 200
    assert WaveIndex.load(tmp_path / "one").capacity == 131
    for tokens in (0, 20, 1, 1):
        for i in (index, again):
            i.append(k[:, :tokens], v[:, :tokens])
        assert_same(index, again)
        assert torch.equal(wave_attention(q, index), wave_attention(q, again))
    empty = WaveIndex(1, 10, 2, 8, CONFIG)
    empty.save(tmp_path / "none")
    assert_same(empty, WaveIndex.load(tmp_path / "none"))


def altered(data, how):
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    meta = header["__metadata__"]
    if how == "version":
        meta["version"] = "1"
    elif how == "format":
        del meta["format"]
    elif how == "facts":
        del meta["index"]
    elif how == "config":
        meta["index"] = meta["index"].replace('"local": 5', '"local": 6')
    elif how == "tensors":
        header["k"], header["v"] = header["v"], header["k"]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d[:-1], "is truncated or no safetensors file"),
        (lambda d: d[: len(d) // 2], "is truncated or no safetensors file"),
        (lambda d: d[:5], "is truncated or no safetensors file"),
        (lambda d: b"", "is truncated or no safetensors file"),
        (lambda d: d[:-3] + bytes([d[-3] ^ 1]) + d[-2:], "was altered: its checksum does not fit"),
        (lambda d: altered(d, "config"), "was altered: its checksum does not fit"),
        (lambda d: altered(d, "tensors"), "was altered: its checksum does not fit"),
        (lambda d: altered(d, "version"), "has version '1', this one reads '2'"),
        (lambda d: altered(d, "format"), "is no saved WaveIndex"),
        (lambda d: altered(d, "facts"), "is no saved WaveIndex"),
    ],
    ids=["byte short", "half", "no header", "empty", "bit", "config", "tensors", "version", "format", "facts"],
)
def test_a_damaged_file_is_refused(change, message, tmp_path):
    path = tmp_path / "index"
    built().save(path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError) as caught:
        WaveIndex.load(path)
    assert str(caught.value).startswith(f"WaveIndex.load: {path} ") and message in str(caught.value)


def test_loading_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        WaveIndex.load(tmp_path / "nothing")
    built().save(tmp_path / "index")
    with pytest.raises(ValueError, match="rows of 131 tokens, over capacity=100"):
        WaveIndex.load(tmp_path / "index", capacity=100)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path, index = tmp_path / "index", built()
    index.save(path)
    before = path.read_bytes()
    index.append(K[:, :1], V[:, :1])

    def fail(_):
        raise OSError("no space left")

    monkeypatch.setattr(wave_file, "_flush", fail)
    with pytest.raises(OSError, match="no space left"):
        index.save(path)
    assert os.listdir(tmp_path) == ["index"] and path.read_bytes() == before


def test_saving_names_the_extra(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args):
        if name.startswith("safetensors"):
            raise ModuleNotFoundError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install attnlab\[hf\]"):
        built().save(tmp_path / "index")
