"""What `WaveConfig`, `WaveIndex` and `wave_attention` refuse, and with which words."""

import pytest
import torch

from attnlab import WaveBuffer, WaveConfig, WaveIndex, wave_attention
from attnlab.testing import gaussian

CONFIG = WaveConfig(sink=2, local=5, segment=40, tokens_per_cluster=4, iterations=4, update_every=12)
Q, K, V = gaussian(3, 1, 131, 4, 2, 8, dtype=torch.float64)

BAD_CONFIG = [
    (dict(segment=8), ValueError, "segment must be at least tokens_per_cluster=16, got 8"),
    (dict(update_every=15), ValueError, "update_every must be at least tokens_per_cluster=16, got 15"),
    (dict(max_cluster=4), ValueError, "max_cluster must be at least tokens_per_cluster=16, got 4"),
    (dict(sink=-1), ValueError, "sink must be a non-negative int, got -1"),
    (dict(local=1.5), ValueError, "local must be a non-negative int, got 1.5"),
    (dict(tokens_per_cluster=0), ValueError, "tokens_per_cluster must be a positive int, got 0"),
    (dict(iterations=0), ValueError, "iterations must be a positive int, got 0"),
    (dict(max_cluster=True), ValueError, "max_cluster must be a positive int, got True"),
    (dict(retrieval_ratio=1.1), ValueError, "retrieval_ratio must be in [0, 1], got 1.1"),
    (dict(estimation_ratio=-0.1), ValueError, "estimation_ratio must be in [0, 1], got -0.1"),
    (dict(retrieval_ratio=float("nan")), ValueError, "retrieval_ratio must be in [0, 1], got nan"),
    (dict(retrieval_ratio="all"), TypeError, "retrieval_ratio must be a number in [0, 1], got 'all'"),
    (dict(final_pass="all"), ValueError, "final_pass must be one of 'segment', 'global', got 'all'"),
    (dict(estimation=None), ValueError, "estimation must be one of 'ratio', 'all', 'none', got None"),
    (dict(group_reduce="min"), ValueError, "group_reduce must be one of 'sum', 'mean', 'max', got 'min'"),
    (dict(budget=0.02), ValueError, "budget must be one of 'fixed', 'adaptive', got 0.02"),
    (dict(clustering="kmeans"), ValueError, "clustering must be one of 'native', 'faiss', got 'kmeans'"),
    (dict(meta_dtype=torch.int8), ValueError, "meta_dtype must be one of None, 'int8', got torch.int8"),
    (dict(weight_by_size=1), TypeError, "weight_by_size must be a bool, got 1"),
    (dict(max_error=0), ValueError, "max_error must be in (0, 1), got 0"),
    (dict(max_error=1.0), ValueError, "max_error must be in (0, 1), got 1.0"),
]
BIG = torch.zeros(1, 9, 2, 257)
INTS = "must be a sequence of ints or an integer tensor of one dimension"
BAD_BUILD = [
    (dict(k=K[0]), ValueError, "k must have shape [B, T, G, D], got [131, 2, 8]"),
    (dict(k=K.tolist()), TypeError, "k must be a Tensor, got list"),
    (dict(v=None), TypeError, "v must be a Tensor, got NoneType"),
    (dict(k=K.int(), v=V.int()), TypeError, "k must be float16, bfloat16, float32 or float64, got torch.int32"),
    (dict(v=V.float()), TypeError, "v must have k's dtype torch.float64, got torch.float32"),
    (dict(v=V[:, :8]), ValueError, "v must have k's shape [3, 131, 2, 8], got [3, 8, 2, 8]"),
    (dict(v=V.to("meta")), ValueError, "v must be on k's device cpu, got meta"),
    (dict(k=BIG, v=BIG), ValueError, "head_dim must be at most 256, got 257"),
    (dict(k=K[:, :, :0], v=V[:, :, :0]), ValueError, "kv_heads must be a positive int, got 0"),
    (dict(config={}), TypeError, "config must be a WaveConfig, got dict"),
    (dict(capacity=0), ValueError, "capacity must be a positive int, got 0"),
    (dict(capacity=130), ValueError, "row 0 holds 0 tokens, 131 more pass the index's capacity=130"),
    (dict(lengths=[1.7, 2, 3]), TypeError, f"lengths {INTS}, got [1.7, 2, 3]"),
    (dict(lengths=3), TypeError, f"lengths {INTS}, got 3"),
    (dict(lengths=[True, 2, 3]), TypeError, f"lengths {INTS}, got [True, 2, 3]"),
    (dict(lengths=torch.ones(3)), TypeError, f"lengths {INTS}, got a torch.float32 tensor of shape [3]"),
    (dict(starts=["a", 0, 0]), TypeError, f"starts {INTS}, got ['a', 0, 0]"),
    (dict(starts=torch.ones(3, 1).int()), TypeError, f"starts {INTS}, got a torch.int32 tensor of shape [3, 1]"),
    (dict(starts=torch.tensor(1)), TypeError, f"starts {INTS}, got a torch.int64 tensor of shape []"),
    (dict(lengths=[1, 2]), ValueError, "lengths must be 3 ints from 0 to at most [131, 131, 131], got [1, 2]"),
    (dict(lengths=[1, 2, 132]), ValueError, "lengths must be 3 ints from 0 to at most [131, 131, 131]"),
    (dict(starts=[0, -1, 0]), ValueError, "starts must be 3 ints from 0 to at most [131, 131, 131], got [0, -1, 0]"),
    (dict(starts=[0, 1, 2], lengths=[131] * 3), ValueError, "lengths must be 3 ints from 0 to at most [131, 130, 129]"),
    (dict(backend="cuda"), ValueError, "backend must be one of 'auto', 'triton', 'portable', 'reference', got 'cuda'"),
]
INDEX = WaveIndex.build(K, V, CONFIG)
BAD_APPEND = [
    (dict(k=K[:2], v=V[:2]), ValueError, "k must have shape [3, T, 2, 8], got [2, 131, 2, 8]"),
    (dict(k=K[..., :4], v=V[..., :4]), ValueError, "k must have shape [3, T, 2, 8], got [3, 131, 2, 4]"),
    (dict(v=V[:, :1]), ValueError, "v must have k's shape [3, 131, 2, 8], got [3, 1, 2, 8]"),
    (dict(k=K.half(), v=V.half()), TypeError, "k must have the index's dtype torch.float64, got torch.float16"),
    (dict(k=K.to("meta"), v=V.to("meta")), ValueError, "k must be on the index's device cpu, got meta"),
    (dict(lengths=[1.7, 2, 3]), TypeError, f"lengths {INTS}, got [1.7, 2, 3]"),
    (dict(lengths=3), TypeError, f"lengths {INTS}, got 3"),
    (dict(lengths=[0, 0, 132]), ValueError, "lengths must be 3 ints from 0 to at most [131, 131, 131]"),
    (dict(), ValueError, "row 0 holds 131 tokens, 131 more pass the index's capacity=143"),
]
BAD_ROW = [
    (dict(b=3), ValueError, "b must be an int in 0..2, got 3"),
    (dict(b=-1), ValueError, "b must be an int in 0..2, got -1"),
    (dict(b=1.0), ValueError, "b must be an int in 0..2, got 1.0"),
    (dict(b=True), ValueError, "b must be an int in 0..2, got True"),
]
BAD_QUERY = [
    (dict(index=K), TypeError, "index must be a WaveIndex, got Tensor"),
    (dict(q=None), TypeError, "q must be a Tensor, got NoneType"),
    (dict(q=Q[0]), ValueError, "q must have shape [3, 1, Hq, 8], got [1, 4, 8]"),
    (dict(q=Q[:2]), ValueError, "q must have shape [3, 1, Hq, 8], got [2, 1, 4, 8]"),
    (dict(q=Q[..., :4]), ValueError, "q must have shape [3, 1, Hq, 8], got [3, 1, 4, 4]"),
    (dict(q=Q.expand(3, 2, 4, 8)), ValueError, "q must have shape [3, 1, Hq, 8], got [3, 2, 4, 8]"),
    (dict(q=Q[:, :, :3]), ValueError, "q's heads must be a multiple of the index's heads 2, got 3"),
    (dict(q=Q[:, :, :0]), ValueError, "q's heads must be a multiple of the index's heads 2, got 0"),
    (dict(q=Q.float()), TypeError, "q must have the index's dtype torch.float64, got torch.float32"),
    (dict(q=Q.to("meta")), ValueError, "q must be on the index's device cpu, got meta"),
    (dict(q=Q.clone().requires_grad_()), ValueError, "q must not require a gradient"),
    (dict(retrieval_ratio=1.01), ValueError, "retrieval_ratio must be in [0, 1], got 1.01"),
    (dict(estimation_ratio=-1), ValueError, "estimation_ratio must be in [0, 1], got -1"),
    (dict(retrieval_ratio=True), TypeError, "retrieval_ratio must be a number in [0, 1], got True"),
    (dict(estimation="some"), ValueError, "estimation must be one of 'ratio', 'all', 'none', got 'some'"),
    (
        dict(selector="best"),
        ValueError,
        "selector must be one of 'wave', 'full', 'oracle', 'quest', 'cluster', 'random', got 'b",
    ),
    (dict(selector="quest"), ValueError, "selector='quest' needs token_budget"),
    (dict(token_budget=0), ValueError, "token_budget must be in (0, 1], got 0"),
    (dict(token_budget=1.5), ValueError, "token_budget must be in (0, 1], got 1.5"),
    (dict(token_budget="2%"), TypeError, "token_budget must be a number in (0, 1], got '2%'"),
    (dict(token_budget=0.1, retrieval_ratio=0.1), ValueError, "retrieval_ratio needs selector='wave' and no token_bud"),
    (dict(selector="full", return_error_bound=True), ValueError, "return_error_bound needs selector='wave' and no tok"),
    (dict(scale="1"), TypeError, "scale must be a number or None, got str"),
    (dict(return_lse=1), TypeError, "return_lse must be a bool, got 1"),
    (dict(return_error_bound=None), TypeError, "return_error_bound must be a bool, got None"),
    (dict(backend="cuda"), ValueError, "backend must be one of 'auto', 'triton', 'portable', 'reference', got 'cuda'"),
]
BUFFER, OTHER = (WaveBuffer(WaveIndex.build(K, V, CONFIG)) for _ in range(2))
CLOSED = WaveBuffer(BUFFER.index)
CLOSED.close()
BAD_BUFFER = [
    (dict(index=K), TypeError, "index must be a WaveIndex, got Tensor"),
    (dict(device_budget=0), ValueError, "device_budget must be in (0, 1], got 0"),
    (dict(device_budget=1.01), ValueError, "device_budget must be in (0, 1], got 1.01"),
    (dict(device_budget=float("nan")), ValueError, "device_budget must be in (0, 1], got nan"),
    (dict(device_budget="5%"), TypeError, "device_budget must be a number in (0, 1], got '5%'"),
    (dict(policy="fifo"), ValueError, "policy must be one of 'clock', 'lru', got 'fifo'"),
    (dict(policy=None), ValueError, "policy must be one of 'clock', 'lru', got None"),
    (dict(page=0), ValueError, "page must be a positive int, got 0"),
    (dict(page=8.0), ValueError, "page must be a positive int, got 8.0"),
]
BAD_BUFFERED = [
    (dict(buffer=BUFFER.cache), TypeError, "buffer must be a WaveBuffer or None, got Cache"),
    (dict(buffer=CLOSED), ValueError, "buffer is closed"),
    (dict(buffer=OTHER), ValueError, "buffer must be one of index's, got one of WaveIndex(3 rows of 143"),
    (dict(selector="full"), ValueError, "buffer needs selector='wave' and no token_budget"),
    (dict(selector="oracle", token_budget=0.1), ValueError, "buffer needs selector='wave' and no token_budget"),
    (dict(token_budget=0.1), ValueError, "buffer needs selector='wave' and no token_budget"),
    (dict(q=Q.to("meta")), ValueError, "q must be on the index's device cpu, got meta"),
    (dict(retrieval_ratio=1), ValueError, "pages of 8 vectors in one step, its cache holds 1: it takes a larger devi"),
]
BAD_CLOSED = [
    ("WaveBuffer.stats", lambda: CLOSED.stats(), [({}, ValueError, "the buffer is closed")]),
    ("WaveBuffer.check", lambda: CLOSED.check(), [({}, ValueError, "the buffer is closed")]),
    ("WaveBuffer.reset", lambda: CLOSED.reset(), [({}, ValueError, "the buffer is closed")]),
    ("WaveBuffer.cache", lambda: CLOSED.cache, [({}, ValueError, "the buffer is closed")]),
]
CALLS = [
    ("WaveConfig", lambda **x: WaveConfig(**x), BAD_CONFIG),
    ("WaveIndex", lambda **x: WaveIndex.build(**dict(k=K, v=V, config=CONFIG) | x), BAD_BUILD),
    ("WaveIndex.row", lambda **x: INDEX.row(**x), BAD_ROW),
    ("WaveIndex.append", lambda **x: INDEX.append(**dict(k=K, v=V) | x), BAD_APPEND),
    ("wave_attention", lambda **x: wave_attention(**dict(q=Q, index=INDEX) | x), BAD_QUERY),
    ("WaveBuffer", lambda **x: WaveBuffer(**dict(index=INDEX) | x), BAD_BUFFER),
    ("wave_attention", lambda **x: wave_attention(**dict(q=Q, index=BUFFER.index, buffer=BUFFER) | x), BAD_BUFFERED),
    *BAD_CLOSED,
]


@pytest.mark.parametrize(
    "fn, call, change, error, message",
    [pytest.param(fn, call, *row, id=f"{fn}: {row[2][:60]}") for fn, call, rows in CALLS for row in rows],
)
def test_bad_input(fn, call, change, error, message):
    with pytest.raises(error) as caught:
        call(**change)
    assert str(caught.value).startswith(fn) and message in str(caught.value)
