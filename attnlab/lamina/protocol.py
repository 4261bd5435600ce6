"""Who sends what to whom: the protocol between model workers and attention workers.

Ranks `0..R-1` are model workers, replicas of one model, of which rank 0 leads; ranks `R..R+A-1` are the attention
workers, one for each shard of the `SplitPlan`.

**Commands** are JSON, from the leader to every other rank, who work them in order. Everybody keeps the length of every
request from these alone (`Placement`).

- `{"op": "model", "layers", "heads", "kv_heads", "head_dim", "dtype", "scale"}`: once, first. Everybody replies;
  attention workers with `{"page_size", "capacity"}` (tokens, or null where the pool grows).
- `{"op": "prefill", "id", "length", "replica", "shard"}`: a new request. `shard` is null unless the plan is by request.
  The leader sends the prompt's ids (`token`) to the replica, which runs it and after each layer sends `k, v`
  (`prompt`, `[2, tokens, KV heads, D]`) to the shards that hold some of it, and at the end the first generated token
  (`token`, `[1]`) to the leader. The request's length is the prompt's: the new token has no key yet.
- `{"op": "round", "drop": [ids], "batches": [[ids], ...], "tokens": [[token of each], ...]}`: first forget `drop`, then
  one step of every request in every batch. With no batches it only drops; an empty batch sends nothing.
- `{"op": "stats"}`: everybody replies with `Group.report()`.
- `{"op": "close"}`: the end.

**A round** has at most `R + 1` batches. Slice `k` of batch `j` runs on replica `(j + k) % R` (`runner`), for `k` in
`0..L`; slice `k < L` ends in the attention of layer `k`, whose answer starts slice `k + 1`. Every rank works its own
`(k, j)` in lexicographic order (`steps`).

| kind     | from -> to                     | shape                        | when                               |
|----------|--------------------------------|------------------------------|------------------------------------|
| `q`      | runner(k, j) -> attention      | `[rows, heads, D]`           | first, before k and v are computed |
| `kv`     | runner(k, j) -> attention      | `[2, new rows, KV heads, D]` | at the end of the slice            |
| `hidden` | runner(k, j) -> runner(k+1, j) | `[batch, hidden]`            | after kv; not to oneself           |
| `out`    | attention -> runner(k+1, j)    | `[rows, heads, D]`           | once the new rows' k, v came       |
| `lse`    | attention -> runner(k+1, j)    | `[rows, heads]` float32      | after out; only by sequence        |
| `token`  | runner(L, j) -> leader         | `[batch]` int64              | not to oneself                     |

`Placement.parts` says which rows and heads of a batch a shard has, in the batch's order; a shard without rows is
neither sent to nor waited for, and a message without elements is not sent. `out` has the model's dtype. By sequence it
has lse's, float32 (float64 for float64), so that partial states are rounded after the merge only. By head and by
request `q + kv + out` are `(2 + 2/G) e d L` bytes a token, for `d` numbers of `e` bytes in all query heads, `G` to a
KV head.

On one pair and direction, receives are posted in the order in which the other side sends, whatever the kinds: NCCL has
no tags, so both sides must agree on the order.
"""

from collections.abc import Iterator

KINDS = ("q", "kv", "out", "lse", "prompt", "hidden", "token")


def runner(slice_: int, batch: int, replicas: int) -> int:
    """The rank that runs a slice of a batch."""
    return (batch + slice_) % replicas


def steps(slices: int, batches: int) -> Iterator[tuple[int, int]]:
    """`(slice, batch)` in the order in which everybody works."""
    return ((k, j) for k in range(slices) for j in range(batches))
