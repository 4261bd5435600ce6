"""The paged pool against a plain list per request."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnlab.lamina.kv_pool import KVPool

CPU = torch.device("cpu")


def pool(layers: int = 2, **options: int | None) -> KVPool:
    return KVPool(layers, 1, 2, torch.float32, CPU, **options)


def read(pool: KVPool, layer: int, id: int) -> list[tuple[list, list]]:
    """A request's keys and values through the table, as decode reads them."""
    pages = pool.table([id])[0].long()
    return [x[layer][pages].flatten(0, 1)[: pool.tokens(id)].tolist() for x in (pool.k, pool.v)]


steps = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=30)


@given(steps, st.integers(1, 4), st.sampled_from([None, 8, 40]))
def test_bookkeeping_against_lists(steps: list[tuple[int, int]], page_size: int, capacity: int | None) -> None:
    """Each step gives a request more tokens, or drops it (0 tokens); a full pool takes nothing."""
    held, made, clock = pool(page_size=page_size, capacity=capacity), {}, 0
    for id, tokens in steps:
        if tokens == 0 and id in held:
            held.drop(id)
            del made[id]
        else:
            x = torch.arange(clock, clock + 2 * tokens, dtype=torch.float32).view(tokens, 1, 2)
            clock += 2 * tokens
            before = held.free, held.pages
            pages = sum(-(-len(rows) // page_size) for other, rows in made.items() if other != id)
            wanted = pages + -(-(len(made.get(id, [])) + tokens) // page_size)
            if capacity is not None and wanted > capacity // page_size:
                with pytest.raises(MemoryError, match=f"request {id} needs"):
                    held.extend(id, tokens)
                assert (held.free, held.pages) == before
            else:
                slots = torch.tensor(held.extend(id, tokens), dtype=torch.int64)
                for layer in range(2):
                    held.write(layer, slots, x + layer, -x - layer)
                made.setdefault(id, []).extend(x.tolist())
        assert held.free == held.pages - sum(-(-len(rows) // page_size) for rows in made.values())
        for id, rows in made.items():
            x = torch.tensor(rows).view(-1, 1, 2)
            assert read(held, 1, id) == [(x + 1).tolist(), (-x - 1).tolist()]


def test_growth_keeps_what_is_there_and_one_table_serves_all_layers() -> None:
    held = pool(layers=3, page_size=2)
    slots = torch.tensor(held.extend(7, 2))
    x = torch.ones(2, 1, 2)
    for layer in range(3):
        held.write(layer, slots, layer * x, layer * x + 1)
    assert held.pages == 1
    held.extend(8, 9)
    assert held.pages == 8 and held.free == 2
    assert all(len(k) == len(v) == 8 for k, v in zip(held.k, held.v))
    assert [read(held, layer, 7)[1] for layer in range(3)] == [(layer * x + 1).tolist() for layer in range(3)]


def test_tables_are_int32_and_never_narrower_than_a_page() -> None:
    held = pool(page_size=2)
    assert held.table([]).shape == (0, 1)
    assert held.table([1, 2]).tolist() == [[0], [0]]
    held.extend(1, 5)
    held.extend(2, 1)
    table = held.table([2, 1])
    assert table.dtype == torch.int32 and table.shape == (2, 3)
    assert table[0, 1:].tolist() == [0, 0]
    assert len({int(table[0, 0]), *table[1].tolist()}) == 4


def test_a_capacity_is_allocated_at_once_and_never_passed() -> None:
    held = pool(page_size=4, capacity=11)
    assert held.pages == 2
    held.extend(1, 4)
    with pytest.raises(MemoryError, match="request 1 needs 2 more pages of 4 tokens, 1 of 2 are free"):
        held.extend(1, 5)
    assert len(held.extend(1, 4)) == 4
    held.drop(1)
    assert held.free == 2 and 1 not in held and held.tokens(1) == 0


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(page_size=0), "KVPool: page_size must be a positive int, got 0"),
        (dict(capacity=0), "KVPool: capacity must be a positive int, got 0"),
        (dict(page_size=8, capacity=7), "KVPool: capacity must be at least a page of 8 tokens, got 7"),
    ],
)
def test_bad_options(options: dict, text: str) -> None:
    with pytest.raises(ValueError) as e:
        pool(**options)
    assert str(e.value) == text
