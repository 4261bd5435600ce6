"""The flash-attn adapter against stand-ins with the signatures and habits of flash-attn 2 and FlashAttention-4."""

import math
import sys
import types

import pytest
import torch

import attnlab
from attnlab import flash
from attnlab.dispatch import Call
from attnlab.reference.states import full_attention
from attnlab.testing import gaussian, ragged

CALL = Call("full_attention", torch.device("cuda"), torch.float16, 64)


def attend(q, k, v, scale, causal, window, empty):
    out, lse = full_attention(
        q, k, v, scale=scale, causal=causal, window=None if window[0] in (-1, None) else window[0] + 1
    )
    lse = lse.masked_fill(lse == -math.inf, empty)
    return out.masked_fill((lse == empty)[..., None], math.nan), lse


def flash2():
    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), return_attn_probs=False
    ):
        out, lse = attend(q, k, v, softmax_scale, causal, window_size, math.inf)
        return (out, lse.transpose(1, 2), None) if return_attn_probs else out

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        return_attn_probs=False,
    ):
        assert (max_seqlen_q, max_seqlen_k) == (int(cu_seqlens_q.diff().max()), int(cu_seqlens_k.diff().max()))
        cu = dict(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
        out, lse = full_attention(q[None], k[None], v[None], scale=softmax_scale, causal=causal, **cu)
        return out[0], lse[0].masked_fill(lse[0] == -math.inf, math.inf).T, None

    return types.SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)


def flash4():
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(None, None), return_lse=False):
        out, lse = attend(q, k, v, softmax_scale, causal, window_size, -math.inf)
        return out, lse.transpose(1, 2)

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        return_lse=False,
    ):
        cu = dict(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
        out, lse = full_attention(q[None], k[None], v[None], scale=softmax_scale, causal=causal, **cu)
        return out[0], lse[0].T

    return types.SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)


@pytest.fixture(params=[2, 4])
def library(request, monkeypatch):
    """`flash_attn` at version 2 or `flash_attn.cute` of version 4, reasons about the device aside."""
    monkeypatch.setitem(sys.modules, "flash_attn", flash2() if request.param == 2 else types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", flash4() if request.param == 4 else None)
    flash._library.cache_clear()
    monkeypatch.setattr("attnlab.full.flash_reasons", lambda call, **_: [])
    yield request.param
    flash._library.cache_clear()


@pytest.mark.parametrize("options", [dict(), dict(causal=False), dict(window=3), dict(scale=0.5)])
def test_equals_reference(library, options):
    q, k, v = gaussian(2, 7, 11, 4, 2, 8)
    found = attnlab.full_attention(q, k, v, return_lse=True, backend="flash", **options)
    for a, b in zip(found, full_attention(q, k, v, **options), strict=True):
        torch.testing.assert_close(a, b)


def test_pack_and_rows_without_keys(library):
    cu_q, cu_k = ragged([3, 2, 4], [5, 0, 4])
    q, _, _ = gaussian(1, 9, 1, 4, 2, 8)
    _, k, v = gaussian(1, 1, 9, 4, 2, 8)
    options = dict(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=False)
    out, lse = attnlab.full_attention(q, k, v, return_lse=True, backend="flash", **options)
    want = full_attention(q, k, v, **options)
    torch.testing.assert_close(out, want[0])
    torch.testing.assert_close(lse, want[1])
    assert (out[0, 3:5] == 0).all() and (lse[0, 3:5] == -math.inf).all()


def test_reasons(library):
    assert flash.flash_reasons(CALL) == []
    assert flash.flash_reasons(CALL, sinks=torch.zeros(4)) == ["sinks are not supported"]
    assert flash.flash_reasons(CALL, empty=True) == ["there are no keys"]
    assert flash.flash_reasons(CALL._replace(dtype=torch.float32)) == ["dtype float32 is not float16 or bfloat16"]
    assert flash.flash_reasons(CALL._replace(head_dim=36)) == ["head size 36 is not a multiple of 8 up to 256"]
    gradient = flash.flash_reasons(CALL, lse_gradient=True)
    assert gradient == (["flash-attn 2 gives no gradient through the lse"] if library == 2 else [])


def test_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    flash._library.cache_clear()
    assert flash.flash_reasons(CALL) == ["flash-attn is not installed (pip install attnlab[flash])"]
    flash._library.cache_clear()
