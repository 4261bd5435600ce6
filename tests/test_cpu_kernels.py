"""The C kernels: against the oracle of loops on every shape, on other targets, whatever the threads and the chunks."""

import shutil

import pytest
import torch

from attnlab.kernels import cache as caches
from attnlab.kernels.cpu import moba, module
from attnlab.testing import assert_accurate, gaussian
from tests import test_portable_moba as shared

MORE = {
    "a block of two tiles of keys": ([1300], None, 2, 1, 16, 700, 2, {}),
    "lists over many tiles": ([900], None, 3, 1, 24, 16, 5, {}),
    "many sequences": ([3, 0, 40, 1, 90, 0, 17], None, 4, 2, 16, 8, 3, dict(group=True)),
}
CASES = shared.CASES | MORE


class Problem(shared.Problem):
    kernels = moba

    def forward(self, indices=None):
        if indices is None:
            indices, _ = moba.select(self.q, self.k, *self.cu, self.spec, self.slots, False)
        return super().forward(indices)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache of compiled code, and nothing loaded."""

    def forget():
        for found in (module.missing, module._library):
            found.cache_clear()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield tmp_path / "attnlab" / "cpu"
    forget()


def check(name, dtype, with_sinks, strided):
    p = Problem(CASES[name], dtype=dtype, with_sinks=with_sinks, strided=strided)
    out, lse, indices = p.forward()
    assert (out.dtype, lse.dtype, indices.dtype) == (dtype, torch.float32, torch.int32)
    truth, plain = p.expected(indices=indices, dlse=False), p.expected(dtype, indices, dlse=False)
    for i, (what, got) in enumerate((("out", out), ("lse", lse))):
        # An lse of few keys may happen to be exact in plain PyTorch.
        assert_accurate(got, truth[i], plain[i], roundings=2, what=f"{name}: {what}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_accuracy(name, dtype):
    check(name, dtype, with_sinks=dtype == torch.float32, strided=dtype == torch.bfloat16)


@pytest.mark.parametrize("name", CASES)
def test_selection_is_the_oracle_s(name):
    p = Problem(CASES[name], dtype=torch.float32)
    indices, scores = moba.select(p.q, p.k, *p.cu, p.spec, p.slots)
    want = shared.oracle.select(p.q.double(), p.k.double(), *p.cu, p.spec)
    for row, expected in zip(indices.tolist(), want, strict=True):
        for found, blocks in zip(row, expected, strict=True):
            assert [b for b in found if b >= 0] == blocks
    assert torch.equal(scores == -torch.inf, indices < 0)
    assert (moba.select(p.q, p.k, *p.cu, p.spec, p.slots, False)[0] == indices).all()


@pytest.mark.parametrize("name", ["gqa 3", "gqa 8, group", "pack", "not causal", "lists over many tiles"])
def test_threads_and_chunks_change_no_bit(name, monkeypatch):
    p = Problem(CASES[name], dtype=torch.float32)
    want = p.forward()
    before = torch.get_num_threads()
    try:
        for threads, rows, workspace in ((1, 8192, 2 << 30), (3, 8192, 2 << 30), (2, 24, 2 << 30), (2, 8192, 4096)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(moba, "CHUNK_ROWS", rows)
            p.spec = p.spec._replace(workspace_bytes=workspace)
            assert all(map(torch.equal, p.forward(), want))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_and_bfloat16_is_read_right(dtype):
    """Centroids of blocks of one key are the keys."""
    keys = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 2, 16)
    cu, means = torch.tensor([0, len(keys)], dtype=torch.int32), torch.empty(keys.shape)
    module.call("centroids", keys, cu, cu, means, module.ELEMENTS[dtype], 1, 2, 16, 1, *keys.stride()[:2], 2)
    torch.testing.assert_close(means, keys.float(), rtol=0, atol=0, equal_nan=True)


def test_a_nan_of_any_payload_stays():
    p = Problem(CASES["gqa 3"], dtype=torch.float32)
    indices = moba.select(p.q, p.k, *p.cu, p.spec, p.slots)[0]
    p.q[20, 1] = torch.tensor(0x7FC00001, dtype=torch.int32).view(torch.float32)
    out, lse, _ = p.forward(indices)
    assert out[20, 1].isnan().all() and lse[20, 1].isnan() and lse.isnan().sum() == 1


def test_narrower_vectors(narrower):
    for name in ("B=48", "gqa 3", "D=80", "pack", "not causal", "lists over many tiles", "70 blocks, 66 selected"):
        check(name, torch.float32, with_sinks=False, strided=False)
        test_selection_is_the_oracle_s(name)


def test_compiled_once_and_damage_is_noticed(fresh, monkeypatch):
    assert module.missing() == ""
    (entry,) = fresh.iterdir()
    calls, real = [], module._run
    monkeypatch.setattr(module, "_run", lambda *options: calls.append("-o" in options) or real(*options))
    for damage in (False, True, False):
        if damage:
            code = entry.read_bytes()
            entry.unlink()  # the file itself is mapped: whoever damages it in place damages this process
            entry.write_bytes(code[:-9])
        calls.clear()
        module._library.cache_clear()
        check("gqa 3", torch.float32, with_sinks=False, strided=False)
        assert any(calls) == damage


def test_a_cache_that_cannot_be_written_costs_only_time(fresh, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert module.missing() == "" and not caches.folder("cpu").exists()
    check("gqa 3", torch.float32, with_sinks=False, strided=False)


def test_without_a_compiler_auto_is_portable_and_says_why(fresh, monkeypatch):
    import attnlab

    x = gaussian(1, 20, 20, 2, 1, 8)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    found = attnlab.explain(attnlab.moba_attention, *x, block_size=4, topk=2)
    assert found.chosen == "portable" and found.reasons["cpu"] == ["no C compiler is found (cc, gcc, clang)"]
    with pytest.raises(attnlab.BackendError, match="no C compiler is found"):
        attnlab.moba_attention(*x, block_size=4, topk=2, backend="cpu")


def test_a_compiler_that_fails_is_a_reason(fresh, monkeypatch):
    monkeypatch.setattr(module, "OPTIONS", (*module.OPTIONS, "-include", "absent.h"))
    assert module.missing().startswith("the C kernels do not compile here: ") and "absent.h" in module.missing()


def test_another_compiler_is_tried(fresh, monkeypatch, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    real = shutil.which("cc")
    monkeypatch.setattr(module.shutil, "which", {"cc": str(broken), "gcc": real}.get)
    assert module.missing() == ""


@pytest.mark.parametrize("name", ["selective.c", "choose.h", "parallel.h", "simd.h", "tiles.h", "turn.h"])
def test_every_source_counts(fresh, monkeypatch, tmp_path, name):
    """An edited source is compiled anew."""
    copy = tmp_path / "sources"
    shutil.copytree(module.HERE, copy, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.setattr(module, "HERE", copy)
    assert module.missing() == ""
    (copy / name).write_text((copy / name).read_text() + "\n#error edited\n")
    module.missing.cache_clear()
    module._library.cache_clear()
    assert "edited" in module.missing()


def test_an_entry_that_does_not_load_costs_only_time(fresh, monkeypatch):
    assert module.missing() == ""
    (entry,) = fresh.iterdir()
    real = module.ctypes.CDLL

    def load(path):
        if path == str(entry):
            raise OSError("not here")
        return real(path)

    monkeypatch.setattr(module.ctypes, "CDLL", load)
    module.missing.cache_clear()
    module._library.cache_clear()
    assert module.missing() == ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_the_default_dtype_is_no_matter(dtype):
    p = Problem(CASES["pack"], dtype=torch.float32)
    want = p.forward()
    torch.set_default_dtype(dtype)
    try:
        assert all(map(torch.equal, p.forward(), want))
    finally:
        torch.set_default_dtype(torch.float32)


def test_cumulative_lengths_of_any_stride():
    p = Problem(CASES["pack"], dtype=torch.float32)
    want = p.forward()
    p.cu = tuple(torch.stack([x, x + 10**6], 1)[:, 0] for x in p.cu)
    assert all(map(torch.equal, p.forward(), want))


@pytest.mark.parametrize("block", [2**31 - 1, 2**40, 2**63 - 1])
@pytest.mark.parametrize("backend", ["cpu", "portable"])
def test_a_huge_block_is_one_block(block, backend):
    import attnlab

    x = gaussian(1, 40, 40, 2, 1, 8)
    options = dict(topk=1, backend=backend)
    assert torch.equal(
        attnlab.moba_attention(*x, block_size=block, sink_blocks=0, **options),
        attnlab.moba_attention(*x, block_size=40, **options),
    )
    assert (attnlab.moba_select(*x[:2], block_size=block, **options).indices == 0).all()


def test_a_block_that_does_not_exist_is_an_error():
    p = Problem(CASES["gqa 3"], dtype=torch.float32)
    indices = moba.select(p.q, p.k, *p.cu, p.spec, p.slots)[0]
    indices[30, 2, 1] = 1000
    with pytest.raises(ValueError, match="a block or page that does not exist"):
        p.forward(indices)


def test_subnormal_halves_survive_flushing():
    cu = torch.tensor([0, 4], dtype=torch.int32)
    keys, means = torch.full((4, 1, 8), 2.0**-20, dtype=torch.float16), torch.empty(4, 1, 8)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        module.call("centroids", keys, cu, cu, means, module.ELEMENTS[torch.float16], 1, 1, 8, 1, 8, 8, 1)
    finally:
        torch.set_flush_denormal(False)
    assert (means == 2.0**-20).all()


def test_decode_pays_for_blocks_that_are_there_only(monkeypatch):
    """A short row of a large cache with room for many choices; and queries in parts, bit for bit."""
    from attnlab import MoBACache, moba_decode

    q, k, v = gaussian(3, 40, 40, 4, 2, 8)
    cache = MoBACache(3, 1 << 16, 2, 8, block_size=16)
    cache.append(k, v)
    asked, real = [], moba.call
    monkeypatch.setattr(moba, "call", lambda name, *rest: asked.append(rest[11].numel()) or real(name, *rest))
    want = moba_decode(q[:, -1:], cache, topk=4000, backend="portable")
    got = moba_decode(q[:, -1:], cache, topk=4000, backend="cpu")
    torch.testing.assert_close(got, want)
    assert asked == [3 * 4 * 3 * 10]
    monkeypatch.setattr(moba, "PART_BYTES", 1)
    assert torch.equal(moba_decode(q[:, -1:], cache, topk=4000, backend="cpu"), got)
    assert len(asked) == 4
