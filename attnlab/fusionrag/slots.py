"""Slots of a request's key-value pool: writing rows into them, and the copy-on-write table of who reads which."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import Call, Reasons, check_int, check_ints, pick, portable_reasons, reference_reasons, triton_reasons
from ..kernels.fusionrag import portable_keys
from ..packs import capturing, remember, unchanged
from ..reference import fusionrag as reference


def scatter_kv(k: Tensor, v: Tensor, k_slots: Tensor, v_slots: Tensor, slots: Tensor, *, backend: str = "auto") -> None:
    """Write recomputed keys and values into the slots of a pool, in place and in one launch.

    Args:
        k, v: `[B, T, Hkv, D]`, float16, bfloat16, float32 (float64: reference and portable only).
        k_slots, v_slots: the pool, `[N, Hkv, D]` of the same dtype, with any strides (Triton: the last one 1).
        slots: int32 or int64 `[B, T]`: token `(b, t)` goes to row `slots[b, t]` of the pool; -1 is skipped. Which token
            of several with the same slot stays is undefined. Values are read once per tensor; those that a `SlotTable`
            made, never.
        backend: `"auto"`, `"reference"`, `"portable"` or `"triton"`.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; a tensor that requires a gradient.
        BackendError: an explicit backend cannot serve this call.
    """
    fn = "scatter_kv"
    for name, x in (("k", k), ("v", v)):
        check_rows(fn, name, x)
    _same(fn, "v", v, "k", k)
    if v.shape != k.shape:
        raise ValueError(f"{fn}: v must have k's shape {list(k.shape)}, got {list(v.shape)}")
    check_pool(fn, "k_slots", k_slots, "k", k)
    check_pool(fn, "v_slots", v_slots, "v", v)
    if len(v_slots) != len(k_slots):
        raise ValueError(f"{fn}: v_slots must have as many rows as k_slots {len(k_slots)}, got {len(v_slots)}")
    check_slots(fn, slots, k)
    no_gradient(fn, k=k, v=v, k_slots=k_slots, v_slots=v_slots)
    name = pick(Call(fn, k.device, k.dtype, k.shape[3]), backend, serving(k_slots=k_slots, v_slots=v_slots))
    _scatter(k, v, k_slots, v_slots, slots, name)


@torch.library.custom_op("attnlab::scatter_kv", mutates_args=("k_slots", "v_slots"))
def _scatter(k: Tensor, v: Tensor, k_slots: Tensor, v_slots: Tensor, slots: Tensor, backend: str) -> None:
    check_slot_values("scatter_kv", slots, len(k_slots))
    if backend == "triton":
        from ..kernels.fusionrag.scatter import scatter_kv as launch

        launch(k, v, k_slots, v_slots, slots)
    elif backend == "portable":
        portable_keys.scatter((k, v), slots, (k_slots, v_slots))
    else:
        for x, pool in ((k, k_slots), (v, v_slots)):
            reference.scatter(x, slots, pool)


@_scatter.register_fake
def _(*args: object) -> None:
    return None


def serving(**pools: Tensor) -> dict[str, Reasons]:
    """The backends of a call that writes into `pools`."""

    def triton(call: Call) -> list[str]:
        why = [f"the last dimension of {name} is not dense" for name, pool in pools.items() if pool.stride(-1) != 1]
        return triton_reasons(call) + why

    return {"triton": triton, "portable": portable_reasons, "reference": reference_reasons}


def check_rows(fn: str, name: str, x: Tensor) -> None:
    """A floating-point tensor `[B, T, Hkv, D]`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{fn}: {name} must be a Tensor, got {type(x).__name__}")
    if not x.dtype.is_floating_point or x.dtype.itemsize < 2:
        raise TypeError(f"{fn}: {name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.ndim != 4 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"{fn}: {name} must have shape [B, T, Hkv, D] with Hkv, D >= 1, got {list(x.shape)}")


def check_pool(fn: str, name: str, pool: Tensor, of: str, x: Tensor) -> None:
    """A pool `[N, Hkv, D]` that takes the rows `x [B, T, Hkv, D]`."""
    if not isinstance(pool, Tensor):
        raise TypeError(f"{fn}: {name} must be a Tensor, got {type(pool).__name__}")
    _same(fn, name, pool, of, x)
    if pool.ndim != 3 or pool.shape[1:] != x.shape[2:]:
        raise ValueError(f"{fn}: {name} must have shape [N, {x.shape[2]}, {x.shape[3]}], got {list(pool.shape)}")


def check_slots(fn: str, slots: Tensor, x: Tensor) -> None:
    """The slots of the rows `x [B, T, ...]`; reads no values."""
    if not isinstance(slots, Tensor) or slots.dtype not in (torch.int32, torch.int64):
        came = getattr(slots, "dtype", type(slots).__name__)
        raise TypeError(f"{fn}: slots must be an int32 or int64 Tensor, got {came}")
    if slots.shape != x.shape[:2]:
        raise ValueError(f"{fn}: slots must have shape {list(x.shape[:2])}, got {list(slots.shape)}")
    if slots.device != x.device:
        raise ValueError(f"{fn}: slots must be on k's device {x.device}, got {slots.device}")


def check_slot_values(fn: str, slots: Tensor, count: int) -> None:
    """Runs inside the ops; reads back once per tensor, and under graph capture not at all."""
    facts = ("slots", count)
    if slots.numel() == 0 or capturing(slots) or unchanged(slots, (), facts):
        return
    low, high = torch.stack(slots.aminmax()).tolist()
    if low < -1 or high >= count:
        raise ValueError(f"{fn}: slots must be -1 or in 0..{count - 1}, got {low if low < -1 else high}")
    remember(slots, (), facts)


def no_gradient(fn: str, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{fn}: {name} must not require a gradient: write under torch.no_grad()")


def _same(fn: str, name: str, x: Tensor, of: str, like: Tensor) -> None:
    if x.dtype != like.dtype:
        raise TypeError(f"{fn}: {name} must have {of}'s dtype {like.dtype}, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{fn}: {name} must be on {of}'s device {like.device}, got {x.device}")


class SlotTable:
    """Which slot of a pool each position of each row reads: chunks shared by rows, copied on write.

    Slots are either shared, filled once and never handed out for writing again, or owned by one row. The books are on
    the host; `table` and `lengths` are what kernels read, keep their addresses, and are written by each call. A table
    hands out every slot once: a new set of requests takes a new table.

    Args:
        rows: requests.
        width: tokens a row can hold.
        slots: slots of the pool.
        device: of `table`, `lengths` and the slots returned; the default device if None.

    Attributes:
        table: `[rows, width]` int32; places past a row's length hold 0.
        lengths: `[rows]` int32.
        free: slots not handed out yet.

    Every method raises ValueError or TypeError, naming the argument or the numbers that do not fit, and then changes
    nothing.
    """

    def __init__(self, rows: int, width: int, slots: int, *, device: torch.device | str | None = None) -> None:
        for name, value in (("rows", rows), ("width", width), ("slots", slots)):
            check_int("SlotTable", name, value, 1)
        if slots >= 2**31:
            raise ValueError(f"SlotTable: slots must be under 2**31, got {slots}")
        self.rows, self.width, self.slots, self._next = rows, width, slots, 0
        with torch.inference_mode(False):
            self._table = torch.zeros(rows, width, dtype=torch.int32, device="cpu")
            self._lengths = torch.zeros(rows, dtype=torch.int64, device="cpu")
            self._owned = torch.zeros(rows, width, dtype=torch.bool, device="cpu")
            self._reserved = torch.zeros(slots, dtype=torch.bool, device="cpu")
            self.table = torch.zeros(rows, width, dtype=torch.int32, device=device)
            self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)

    def __repr__(self) -> str:
        return (
            f"SlotTable({self.rows} rows of {self.width}, {self.free} of {self.slots} slots free, "
            f"{self.table.device}, lengths={self._lengths.tolist()})"
        )

    @property
    def free(self) -> int:
        return self.slots - self._next

    def reserve(self, count: int) -> Tensor:
        """`count` fresh slots in a row, int32 `[count]`, to be shared: write them once, then `share` them."""
        check_int("SlotTable.reserve", "count", count, 0)
        found = self._take("reserve", count)
        self._reserved[found.long()] = True
        return self._hand_out(found)

    def share(self, row: int, slots: Tensor | Sequence[int]) -> None:
        """Append reserved slots at the end of a row, for reading; rows may share them, and a row may hold one twice."""
        fn = "SlotTable.share"
        check_int(fn, "row", row, 0)
        if row >= self.rows:
            raise ValueError(f"{fn}: row must be in 0..{self.rows - 1}, got {row}")
        values = check_ints(fn, "slots", slots)
        given = torch.tensor(values, dtype=torch.int64, device="cpu")
        known = (given >= 0) & (given < self.slots)
        known[known.clone()] = self._reserved[given[known]]
        if not known.all():
            raise ValueError(f"{fn}: slots must be reserved ones, got {int(given[~known][0])}")
        more = torch.zeros_like(self._lengths)
        more[row] = len(values)
        self._check_room(fn, more)
        places = int(self._lengths[row]) + torch.arange(len(values), device="cpu")
        self._write(torch.full_like(given, row), places, given)
        self._grow(more)

    def own(self, positions: Tensor) -> Tensor:
        """Slots in which the tokens at `positions` may be written.

        Args:
            positions: `[rows, n]` integers, of tokens the rows hold, in any order, repeats allowed; -1: none.

        Returns:
            `[rows, n]` int32: slots of that row alone, -1 where there is no position. Shared slots were replaced by
            fresh ones in `table`, and hold nothing until written; other rows read what they did.
        """
        fn = "SlotTable.own"
        at = self._check_positions(fn, positions)
        held = at.clamp(min=0)
        row, column = ((at >= 0) & ~self._owned.gather(1, held)).nonzero(as_tuple=True)
        token = torch.unique(row * self.width + at[row, column])
        row, place = token // self.width, token % self.width
        self._write(row, place, self._take("own", len(token)))
        self._owned[row, place] = True
        return self._hand_out(self._table.gather(1, held).masked_fill_(at < 0, -1))

    def extend(self, counts: int | Sequence[int] | Tensor) -> Tensor:
        """Append new tokens at the rows' ends: `counts` to every row, or `counts[b]` to row `b`.

        Returns int32 `[rows, max(counts)]`: their slots, owned by the rows; -1 where a row has fewer.
        """
        fn = "SlotTable.extend"
        if isinstance(counts, int) and not isinstance(counts, bool):
            check_int(fn, "counts", counts, 0)
            more = torch.full_like(self._lengths, counts)
        else:
            values = check_ints(fn, "counts", counts)
            if len(values) != self.rows or min(values) < 0:
                raise ValueError(f"{fn}: counts must be a non-negative int or {self.rows} of them, got {values}")
            more = torch.tensor(values, dtype=torch.int64, device="cpu")
        self._check_room(fn, more)
        row, number = (torch.arange(int(more.max()), device="cpu") < more[:, None]).nonzero(as_tuple=True)
        place = self._lengths[row] + number
        fresh = self._take("extend", len(row))
        found = torch.full((self.rows, int(more.max())), -1, dtype=torch.int32, device="cpu")
        found[row, number] = fresh
        self._write(row, place, fresh)
        self._owned[row, place] = True
        self._grow(more)
        return self._hand_out(found)

    def _check_positions(self, fn: str, positions: Tensor) -> Tensor:
        if not isinstance(positions, Tensor) or positions.dtype not in (torch.int32, torch.int64):
            came = getattr(positions, "dtype", type(positions).__name__)
            raise TypeError(f"{fn}: positions must be an int32 or int64 Tensor, got {came}")
        if positions.ndim != 2 or len(positions) != self.rows:
            raise ValueError(f"{fn}: positions must have shape [{self.rows}, n], got {list(positions.shape)}")
        at = positions.detach().to("cpu", torch.int64)
        bad = (at < -1) | (at >= self._lengths[:, None])
        if bad.any():
            row, place = bad.nonzero()[0].tolist()
            raise ValueError(
                f"{fn}: positions must be -1 or of tokens their row holds, got {int(at[row, place])} in row {row} "
                f"of {int(self._lengths[row])}"
            )
        return at

    def _check_room(self, fn: str, counts: Tensor) -> None:
        over = self._lengths + counts > self.width
        if over.any():
            row = int(over.nonzero()[0])
            raise ValueError(
                f"{fn}: row {row} holds {int(self._lengths[row])} tokens, {int(counts[row])} more pass the table's "
                f"width={self.width}"
            )

    def _take(self, name: str, count: int) -> Tensor:
        if count > self.free:
            raise ValueError(
                f"SlotTable.{name}: {count} slots are needed, {self.free} of the pool's {self.slots} are free"
            )
        first, self._next = self._next, self._next + count
        return torch.arange(first, self._next, dtype=torch.int32, device="cpu")

    def _write(self, row: Tensor, place: Tensor, slots: Tensor) -> None:
        self._table[row, place] = slots.int()
        row, place, slots = torch.stack([row, place, slots.long()]).to(self.table.device)
        self.table[row, place] = slots.int()

    def _grow(self, counts: Tensor) -> None:
        self._lengths += counts
        self.lengths.copy_(self._lengths)

    def _hand_out(self, slots: Tensor) -> Tensor:
        """A copy on the device, known to be slots of the pool; inference tensors cannot carry that note."""
        with torch.inference_mode(False):
            found = slots.to(self.table.device, copy=True)
        remember(found, (), ("slots", self.slots))
        return found
