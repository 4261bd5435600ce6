"""What `split_decode` and `shared_prefix_decode` say of arguments they cannot take."""

import pytest
import torch

from attnlab import shared_prefix_decode, split_decode
from attnlab.testing import gaussian

Q, K, V = gaussian(2, 1, 16, 4, 2, 8)
LENGTHS = torch.tensor([16, 9], dtype=torch.int32)
TABLE = torch.arange(8, dtype=torch.int32).view(2, 4)
PAGES = dict(k=K.reshape(8, 4, 2, 8), v=V.reshape(8, 4, 2, 8), page_table=TABLE, lengths=LENGTHS)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def changed(x, at, value):
    x = x.clone()
    x[at] = value
    return x


BAD = [
    (dict(q=None), TypeError, "q must be a Tensor, got NoneType"),
    (dict(q=Q[0]), ValueError, "q must have shape [B, T, H, D], got [1, 4, 8]"),
    (dict(q=Q.int()), TypeError, "q must be float16, bfloat16, float32 or float64, got int32"),
    (dict(q=Q[..., :4]), ValueError, "k must have q's head size 4, got 8"),
    (dict(q=Q[:, :, :3]), ValueError, "q's heads must be a multiple of k's heads 2, got 3"),
    (dict(k=K[:1]), ValueError, "k must have q's batch size 2, got 1"),
    (dict(k=K.half()), TypeError, "k must have q's dtype float32, got float16"),
    (dict(v=V.bfloat16()), TypeError, "v must have q's dtype float32, got bfloat16"),
    (dict(k=K.to("meta")), ValueError, "k must be on q's device cpu, got meta"),
    (dict(v=V[:, :8]), ValueError, "v must have k's shape [2, 16, 2, 8], got [2, 8, 2, 8]"),
    (dict(k=K[:, :, :0], v=V[:, :, :0]), ValueError, "k must have at least one head"),
    (dict(lengths=LENGTHS.long()), TypeError, "lengths must be an int32 Tensor, got torch.int64"),
    (dict(lengths=[16, 9]), TypeError, "lengths must be an int32 Tensor, got list"),
    (dict(lengths=ints(16)), ValueError, "lengths must have shape [2], got [1]"),
    (dict(lengths=LENGTHS.to("meta")), ValueError, "lengths must be on q's device cpu, got meta"),
    (dict(lengths=ints(16, 17)), ValueError, "lengths must be in 0..16 (the room of a row), got [16, 17]"),
    (dict(lengths=ints(-1, 16)), ValueError, "lengths must be in 0..16 (the room of a row), got [-1, 16]"),
    (dict(page_table=TABLE), ValueError, "page_table needs lengths, the number of keys of each row"),
    (PAGES | dict(page_table=TABLE.long()), TypeError, "page_table must be an int32 Tensor, got torch.int64"),
    (PAGES | dict(page_table=TABLE[0]), ValueError, "page_table must have shape [2, 4], got [4]"),
    (PAGES | dict(page_table=TABLE[:1]), ValueError, "page_table must have shape [2, 4], got [1, 4]"),
    (PAGES | dict(page_table=TABLE.to("meta")), ValueError, "page_table must be on q's device cpu, got meta"),
    (PAGES | dict(page_table=changed(TABLE, (1, 2), 8)), ValueError, "page_table[1, 2] must be in 0..7, got 8"),
    (PAGES | dict(page_table=changed(TABLE, (0, 3), -1)), ValueError, "page_table[0, 3] must be in 0..7, got -1"),
    (PAGES | dict(lengths=ints(17, 3)), ValueError, "lengths must be in 0..16 (the room of a row), got [17, 3]"),
    (PAGES | dict(page_table=TABLE[:, :0]), ValueError, "lengths must be in 0..0 (the room of a row), got [16, 9]"),
    (PAGES | dict(k=K[0]), ValueError, "k must have shape [pages, page_size, H, D], got [16, 2, 8]"),
    (
        PAGES | dict(k=PAGES["k"][:, :0], v=PAGES["v"][:, :0]),
        ValueError,
        "k must have a page_size of at least 1, got [8, 0, 2, 8]",
    ),
    (dict(scale="1"), TypeError, "scale must be a number or None, got str"),
    (dict(splits=0), ValueError, "splits must be a positive int, got 0"),
    (dict(splits=-2), ValueError, "splits must be a positive int, got -2"),
    (dict(splits=2.0), ValueError, "splits must be a positive int, got 2.0"),
    (dict(splits=True), ValueError, "splits must be a positive int, got True"),
    (dict(out_dtype=torch.half), TypeError, "out_dtype must be torch.float32 with q of torch.float32, got torch.f"),
    (dict(out_dtype="float"), TypeError, "out_dtype must be torch.float32 with q of torch.float32, got 'float'"),
    (
        dict(q=Q.half(), k=K.half(), v=V.half(), out_dtype=torch.bfloat16),
        TypeError,
        "out_dtype must be torch.float16 or torch.float32 with q of torch.float16, got torch.bfloat16",
    ),
    (dict(backend="cuda"), ValueError, "backend must be one of 'auto', 'triton',"),
    (dict(q=Q.clone().requires_grad_()), ValueError, "q must not require a gradient: decode under torch.no_grad()"),
    (dict(k=K.clone().requires_grad_()), ValueError, "k must not require a gradient: decode under torch.no_grad()"),
    (dict(v=V.clone().requires_grad_()), ValueError, "v must not require a gradient: decode under torch.no_grad()"),
]  # fmt: skip
BAD_PREFIX = [
    (dict(k_prefix=None), TypeError, "k_prefix must be a Tensor, got NoneType"),
    (dict(k_prefix=K), ValueError, "k_prefix must have shape [T, 2, 8], got [2, 16, 2, 8]"),
    (dict(k_prefix=K[0, :, :1]), ValueError, "k_prefix must have shape [T, 2, 8], got [16, 1, 8]"),
    (dict(v_prefix=V[0, :5]), ValueError, "v_prefix must have k_prefix's shape [16, 2, 8], got [5, 2, 8]"),
    (dict(v_prefix=V[0].half()), TypeError, "v_prefix must have q's dtype torch.float32, got torch.float16"),
    (dict(k_prefix=K[0].to("meta")), ValueError, "k_prefix must be on q's device cpu, got meta"),
    (dict(v_prefix=V[0].clone().requires_grad_()), ValueError, "v_prefix must not require a gradient"),
]


def said(fn, given):
    with pytest.raises((ValueError, TypeError)) as error:
        fn(**given)
    return type(error.value), str(error.value)


@pytest.mark.parametrize("backend", ["reference", "portable"])
@pytest.mark.parametrize("i", range(len(BAD)))
def test_split_decode(i, backend):
    given, kind, message = BAD[i]
    found, text = said(split_decode, dict(q=Q, k=K, v=V, backend=backend) | given)
    assert found is kind and text.startswith("split_decode: ") and message in text


@pytest.mark.parametrize("i", range(len(BAD + BAD_PREFIX)))
def test_shared_prefix_decode(i):
    given, kind, message = (BAD + BAD_PREFIX)[i]
    prefix = dict(k_prefix=K[0], v_prefix=V[0], backend="portable")
    found, text = said(shared_prefix_decode, dict(q=Q, k=K, v=V) | prefix | given)
    assert found is kind and text.startswith("shared_prefix_decode: ") and message in text


def test_gradients_may_be_required_where_none_are_taken():
    with torch.no_grad():
        split_decode(Q.clone().requires_grad_(), K, V)


def test_what_no_row_uses_is_not_checked():
    """Table entries past a row's length may be anything."""
    table = changed(TABLE, (1, 3), -5)
    split_decode(Q, **PAGES | dict(page_table=table), backend="portable")
    with pytest.raises(ValueError, match=r"page_table\[1, 3\]"):
        split_decode(Q, **PAGES | dict(page_table=table, lengths=ints(16, 13)), backend="portable")
