"""`SlotTable`: rows that share slots behave as lists of their own, and what does not fit changes nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnlab.fusionrag import SlotTable

ROWS, WIDTH, SLOTS = 3, 12, 40


def view(table, row):
    return table.table[row, : int(table.lengths[row])].tolist()


class Model:
    """Rows as plain lists of values; the pool as a dict from slots to values."""

    def __init__(self):
        self.table = SlotTable(ROWS, WIDTH, SLOTS)
        self.rows = [[] for _ in range(ROWS)]
        self.pool, self.shared, self.chunks, self.clock = {}, set(), [], 0

    def write(self, slot):
        assert slot not in self.shared, "a shared slot was handed out for writing"
        self.clock += 1
        self.pool[slot] = self.clock
        return self.clock

    def reserve(self, count):
        chunk = self.table.reserve(count).tolist()
        assert len(set(chunk)) == count and not set(chunk) & set(self.pool)
        for slot in chunk:
            self.write(slot)
        self.shared.update(chunk)
        self.chunks.append(chunk)

    def share(self, row, chunk):
        self.table.share(row, torch.tensor(chunk, dtype=torch.int32))
        self.rows[row] += [self.pool[slot] for slot in chunk]

    def own(self, positions):
        found = self.table.own(positions).tolist()
        for row, (slots, places) in enumerate(zip(found, positions.tolist(), strict=True)):
            assert [slot < 0 for slot in slots] == [place < 0 for place in places]
            for slot, place in zip(slots, places, strict=True):
                if place >= 0:
                    self.rows[row][place] = self.write(slot)

    def extend(self, counts):
        found = self.table.extend(counts)
        assert found.shape == (ROWS, max(counts))
        for row, (slots, count) in enumerate(zip(found.tolist(), counts, strict=True)):
            assert slots[count:] == [-1] * (max(counts) - count)
            self.rows[row] += [self.write(slot) for slot in slots[:count]]

    def check(self):
        assert self.table.lengths.tolist() == [len(row) for row in self.rows]
        assert [[self.pool[slot] for slot in view(self.table, row)] for row in range(ROWS)] == self.rows
        assert self.table.free == SLOTS - len(self.pool)


@given(st.data())
def test_rows_are_lists_of_their_own(data):
    model = Model()
    for _ in range(data.draw(st.integers(1, 12))):
        lengths, free = [len(row) for row in model.rows], model.table.free
        room = [min(WIDTH - n, 3) for n in lengths]
        kind = data.draw(st.sampled_from(["reserve", "share", "own", "extend"]))
        if kind == "reserve":
            model.reserve(data.draw(st.integers(0, min(4, free))))
        elif kind == "share" and model.chunks:
            row, chunk = data.draw(st.integers(0, ROWS - 1)), data.draw(st.sampled_from(model.chunks))
            if lengths[row] + len(chunk) <= WIDTH:
                model.share(row, chunk)
        elif kind == "own" and free >= 9:
            n = data.draw(st.integers(0, 3))
            draw = [[data.draw(st.integers(-1, m - 1)) for _ in range(n)] for m in lengths]
            model.own(torch.tensor(draw, dtype=data.draw(st.sampled_from([torch.int32, torch.int64]))).view(ROWS, n))
        elif kind == "extend" and free >= 9:
            model.extend([data.draw(st.integers(0, n)) for n in room])
        model.check()


def test_owning_copies_on_write_for_one_row():
    table = SlotTable(3, 10, 20)
    chunk = table.reserve(4)
    assert chunk.tolist() == [0, 1, 2, 3] and chunk.dtype == torch.int32
    for row in (0, 1):
        table.share(row, chunk)
    table.share(1, chunk[2:])
    assert [view(table, row) for row in range(3)] == [[0, 1, 2, 3], [0, 1, 2, 3, 2, 3], []]
    found = table.own(torch.tensor([[3, 1, 3], [-1, 4, -1], [-1, -1, -1]]))
    assert found.tolist() == [[5, 4, 5], [-1, 6, -1], [-1, -1, -1]]
    assert [view(table, row) for row in range(3)] == [[0, 4, 2, 5], [0, 1, 2, 3, 6, 3], []]
    assert table.own(torch.tensor([[1, 0], [4, -1], [-1, -1]])).tolist() == [[4, 7], [6, -1], [-1, -1]]
    assert table.extend([1, 0, 2]).tolist() == [[8, -1], [-1, -1], [9, 10]]
    assert table.own(torch.tensor([[4], [0], [1]])).tolist() == [[8], [11], [10]]
    assert table.extend(1).tolist() == [[12], [13], [14]]
    assert table.lengths.tolist() == [6, 7, 3] and table.free == 5
    assert repr(table) == "SlotTable(3 rows of 10, 5 of 20 slots free, cpu, lengths=[6, 7, 3])"


def test_addresses_stay_and_results_are_copies():
    table = SlotTable(2, 6, 12)
    addresses = [table.table.data_ptr(), table.lengths.data_ptr()]
    chunk = table.reserve(2)
    table.share(0, chunk.tolist())
    chunk.fill_(9)
    found = table.extend(torch.tensor([1, 2]))
    found.fill_(9)
    assert table.own(torch.tensor([[0], [1]])).tolist() == [[5], [4]]
    assert [view(table, row) for row in range(2)] == [[5, 1, 2], [3, 4]]
    assert [table.table.data_ptr(), table.lengths.data_ptr()] == addresses
    assert (table.table.dtype, table.lengths.dtype) == (torch.int32, torch.int32)


def test_nothing_to_do():
    table = SlotTable(2, 4, 3)
    assert table.reserve(0).shape == (0,)
    assert table.extend(0).shape == (2, 0) and table.extend([0, 0]).shape == (2, 0)
    assert table.own(torch.zeros(2, 0, dtype=torch.int32)).shape == (2, 0)
    table.share(1, [])
    assert table.free == 3 and table.lengths.tolist() == [0, 0]


INTS = "must be a sequence of ints or an integer tensor of one dimension"
BAD = [
    ("", dict(rows=0), ValueError, "rows must be a positive int, got 0"),
    ("", dict(width=1.5), ValueError, "width must be a positive int, got 1.5"),
    ("", dict(slots=True), ValueError, "slots must be a positive int, got True"),
    ("", dict(slots=2**31), ValueError, "slots must be under 2**31, got 2147483648"),
    (".reserve", dict(count=-1), ValueError, "count must be a non-negative int, got -1"),
    (".reserve", dict(count=5), ValueError, "5 slots are needed, 4 of the pool's 12 are free"),
    (".share", dict(row=2, slots=[0]), ValueError, "row must be in 0..1, got 2"),
    (".share", dict(row=-1, slots=[0]), ValueError, "row must be a non-negative int, got -1"),
    (".share", dict(row=0, slots=[0, 4]), ValueError, "slots must be reserved ones, got 4"),
    (".share", dict(row=0, slots=[1, -1]), ValueError, "slots must be reserved ones, got -1"),
    (".share", dict(row=0, slots=[12]), ValueError, "slots must be reserved ones, got 12"),
    (".share", dict(row=0, slots=torch.zeros(1)), TypeError, f"slots {INTS}, got a torch.float32 tensor of shape [1]"),
    (".share", dict(row=0, slots=[0] * 3), ValueError, "row 0 holds 4 tokens, 3 more pass the table's width=6"),
    (".own", dict(positions=[[0], [0]]), TypeError, "positions must be an int32 or int64 Tensor, got list"),
    (".own", dict(positions=torch.zeros(2, 1)), TypeError, "positions must be an int32 or int64 Tensor, got torch.flo"),
    (".own", dict(positions=torch.tensor([0, 1])), ValueError, "positions must have shape [2, n], got [2]"),
    (".own", dict(positions=torch.tensor([[0]])), ValueError, "positions must have shape [2, n], got [1, 1]"),
    (".own", dict(positions=torch.tensor([[0, 0], [0, 5]])), ValueError, "row holds, got 5 in row 1 of 5"),
    (".own", dict(positions=torch.tensor([[-2], [0]])), ValueError, "-1 or of tokens their row holds, got -2 in row 0"),
    (
        ".own",
        dict(positions=torch.tensor([[0, 1, 2], [0, 1, -1]])),
        ValueError,
        "5 slots are needed, 4 of the pool's 1",
    ),
    (".extend", dict(counts=-1), ValueError, "counts must be a non-negative int, got -1"),
    (".extend", dict(counts=True), TypeError, f"counts {INTS}, got True"),
    (".extend", dict(counts=[1]), ValueError, "counts must be a non-negative int or 2 of them, got [1]"),
    (".extend", dict(counts=[1, -1]), ValueError, "counts must be a non-negative int or 2 of them, got [1, -1]"),
    (".extend", dict(counts=[2, 2]), ValueError, "row 1 holds 5 tokens, 2 more pass the table's width=6"),
    (".extend", dict(counts=3), ValueError, "row 0 holds 4 tokens, 3 more pass the table's width=6"),
]


@pytest.mark.parametrize("name, change, error, message", BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_input_changes_nothing(name, change, error, message):
    table = SlotTable(2, 6, 12)
    chunk = table.reserve(4)
    table.share(0, chunk)
    table.share(1, chunk)
    table.extend([0, 1])
    table.reserve(3)
    before = repr(table), table.table.clone(), table.lengths.clone()
    with pytest.raises(error) as caught:
        getattr(table, name[1:])(**change) if name else SlotTable(**dict(rows=2, width=6, slots=12) | change)
    assert str(caught.value).startswith(f"SlotTable{name}: ") and message in str(caught.value)
    assert (repr(table), table.table.tolist(), table.lengths.tolist()) == (before[0], *(x.tolist() for x in before[1:]))
    assert table.own(torch.tensor([[0], [-1]])).tolist() == [[8], [-1]]


def test_slots_run_out_for_extend():
    table = SlotTable(2, 9, 5)
    table.extend([2, 1])
    with pytest.raises(ValueError, match=r"SlotTable.extend: 4 slots are needed, 2 of the pool's 5 are free"):
        table.extend(2)
    assert table.extend(1).tolist() == [[3], [4]] and table.free == 0
