"""Tile shapes per (kernel, architecture, head size, element size): data, so first calls are fast and results repeat.

A row is keyed `(arch, head_dim, dtype_bytes)` and covers every head size and element size up to its own. `arch` is 80,
90, 100 or 120 (shared memory a program may use: 163, 227, 227 and 99 KB), or 0 for a row that suits all of them.
Kernels are named `<folder>.<stage>`, after the file they live in. A launcher splats a row into its call, so a row holds
the launch's own names: constexprs in capitals, `num_warps`, `num_stages`.
"""

Row = dict[str, int]
Table = dict[tuple[int, int, int], Row]

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

TABLES: dict[str, Table] = {
    # DEPTH: elements of the head that a step stages; two steps of q and of centroids lie in shared memory at once.
    "cuda.gate": {
        (0, 256, 4): {"DEPTH": 16},
    },
    # CHUNK: queries a warp places at least; more where there are more blocks, so that the table stays O(pairs).
    "cuda.layout": {
        (0, 256, 4): {"THREADS": 128, "CHUNK": 128},
    },
    # BLOCKS: of the copy, about; more would only find nothing left to do.
    "cuda.buffer": {
        (0, 256, 4): {"THREADS": 256, "BLOCKS": 1024},
    },
    # BYTES a thread has under way at once; FILL: threads from which on rows are not shared, they fill the GPU.
    "cuda.states": {
        (0, 256, 4): {"THREADS": 128, "BYTES": 64, "FILL": 65536},
    },
    "states.forward": {
        (80, 64, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
        (80, 128, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        (80, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        (90, 64, 2): {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
        (90, 128, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        (90, 256, 2): {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3},
        (100, 64, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        (100, 128, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        (100, 256, 2): {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3},
        (120, 64, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (120, 128, 2): {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        (120, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        (0, 64, 4): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        (0, 128, 4): {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
        (0, 256, 4): {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
    },
    "fusionrag.selective": {
        (80, 64, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        (80, 128, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        (80, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        (90, 64, 2): {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
        (90, 128, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        (90, 256, 2): {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3},
        (100, 64, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        (100, 128, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        (100, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3},
        (120, 64, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (120, 128, 2): {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        (120, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        (0, 64, 4): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        (100, 128, 4): {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
        (0, 128, 4): {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
        (0, 256, 4): {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
    },
    # BLOCK_P: pairs of columns that are turned at a time; where that is not all of a row, q is read again for each.
    "fusionrag.turned": {
        (80, 64, 2): {"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_P": 32, "num_warps": 8, "num_stages": 2},
        (80, 128, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_P": 64, "num_warps": 8, "num_stages": 2},
        (80, 256, 2): {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_P": 32, "num_warps": 8, "num_stages": 2},
        (90, 64, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_P": 32, "num_warps": 8, "num_stages": 3},
        (90, 128, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_P": 64, "num_warps": 8, "num_stages": 2},
        (90, 256, 2): {"BLOCK_M": 128, "BLOCK_N": 16, "BLOCK_P": 128, "num_warps": 8, "num_stages": 3},
        (100, 64, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_P": 32, "num_warps": 8, "num_stages": 3},
        (100, 128, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_P": 64, "num_warps": 8, "num_stages": 2},
        (100, 256, 2): {"BLOCK_M": 128, "BLOCK_N": 16, "BLOCK_P": 128, "num_warps": 8, "num_stages": 3},
        (120, 64, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_P": 32, "num_warps": 4, "num_stages": 2},
        (120, 128, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_P": 64, "num_warps": 8, "num_stages": 2},
        (120, 256, 2): {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_P": 16, "num_warps": 8, "num_stages": 1},
        (0, 64, 4): {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_P": 16, "num_warps": 8, "num_stages": 1},
        (0, 128, 4): {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_P": 16, "num_warps": 8, "num_stages": 1},
        (0, 256, 4): {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_P": 16, "num_warps": 8, "num_stages": 1},
    },
    # Few rows for many keys.
    "fusionrag.few": {
        (80, 128, 2): {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (80, 256, 2): {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
        (0, 128, 2): {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        (0, 256, 2): {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
        (0, 256, 4): {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
    },
    # Few rows for many keys. BLOCK_M is the most, here and in `lamina.many`: a tile is no higher than its rows ask for.
    "lamina.few": {
        (100, 128, 2): {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (120, 128, 2): {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3},
        (0, 128, 2): {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        (0, 256, 2): {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
        (0, 128, 4): {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1},
        (0, 256, 4): {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
    },
    # Many rows, such as those that share a prefix.
    "lamina.many": {
        (80, 64, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        (80, 128, 2): {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3},
        (80, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        (90, 64, 2): {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
        (90, 128, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        (90, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3},
        (100, 64, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        (100, 128, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        (100, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3},
        (120, 64, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (120, 128, 2): {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        (120, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        (0, 64, 4): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        (100, 128, 4): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        (0, 128, 4): {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
        (0, 256, 4): {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
    },
    # BLOCK_M rows times the shards of a row that are read together; 16 bytes a thread.
    "states.merge": {
        (0, 64, 2): {"BLOCK_M": 16, "num_warps": 4},
        (0, 128, 2): {"BLOCK_M": 8, "num_warps": 4},
        (0, 256, 2): {"BLOCK_M": 4, "num_warps": 4},
        (0, 64, 4): {"BLOCK_M": 16, "num_warps": 8},
        (0, 128, 4): {"BLOCK_M": 8, "num_warps": 8},
        (0, 256, 4): {"BLOCK_M": 4, "num_warps": 8},
    },
    "states.dkv": {
        (80, 64, 2): {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
        (80, 128, 2): {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (80, 256, 2): {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1},
        (90, 64, 2): {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
        (90, 128, 2): {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
        (90, 256, 2): {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (100, 128, 2): {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
        (100, 256, 2): {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (120, 64, 2): {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
        (120, 128, 2): {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (120, 256, 2): {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        (0, 128, 4): {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        (0, 256, 4): {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
    },
    "states.dq": {
        (80, 128, 2): {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        (80, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        (90, 128, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (90, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        (100, 128, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (100, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        (120, 64, 2): {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (120, 128, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
        (120, 256, 2): {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        (0, 128, 4): {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        (0, 256, 4): {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
    },
    "moba.dkv": {
        (80, 64, 2): {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
        (80, 128, 2): {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (80, 256, 2): {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1},
        (90, 64, 2): {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
        (90, 128, 2): {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
        (90, 256, 2): {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (100, 128, 2): {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
        (100, 256, 2): {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (120, 64, 2): {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
        (120, 128, 2): {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (120, 256, 2): {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        (0, 128, 4): {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        (0, 256, 4): {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
    },
    "moba.dq": {
        (80, 128, 2): {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        (80, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        (90, 128, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (90, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        (100, 128, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (100, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        (120, 64, 2): {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (120, 128, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
        (120, 256, 2): {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        (0, 128, 4): {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        (0, 256, 4): {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
    },
    "moba.dq_finish": {
        (80, 128, 2): {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        (80, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        (90, 128, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (90, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        (100, 128, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (100, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        (120, 64, 2): {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (120, 128, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
        (120, 256, 2): {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        (0, 128, 4): {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
        (0, 256, 4): {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
    },
    # BLOCK_M block sums scored at once, BLOCK_N keys attended at once.
    "moba.decode": {
        (80, 128, 2): {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (80, 256, 2): {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
        (0, 128, 2): {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        (0, 256, 2): {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
        (0, 256, 4): {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
    },
    # BLOCK_N clusters scored at once.
    "retroinfer.score": {
        (0, 128, 2): {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        (0, 256, 2): {"BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
        (0, 256, 4): {"BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
    },
    # BLOCK_N clusters ranked at once, after the sums of BLOCK_T tiles of scores at a time.
    "retroinfer.rank": {
        (0, 256, 4): {"BLOCK_N": 256, "BLOCK_T": 64, "num_warps": 4},
    },
    "retroinfer.select": {
        (0, 256, 4): {"BLOCK_N": 1024, "num_warps": 8},
    },
    # BLOCK_N keys attended at once.
    "retroinfer.exact": {
        (80, 128, 2): {"BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (80, 256, 2): {"BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
        (0, 128, 2): {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        (0, 256, 2): {"BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
        (0, 256, 4): {"BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
    },
    # BLOCK_N clusters estimated at once.
    "retroinfer.estimate": {
        (0, 128, 2): {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        (0, 256, 2): {"BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
        (0, 256, 4): {"BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
    },
    # BLOCK_S shares merged at once.
    "retroinfer.merge": {
        (0, 256, 4): {"BLOCK_S": 16, "num_warps": 4},
    },
    # BLOCK_M keys against BLOCK_N centroids.
    "retroinfer.assign": {
        (100, 256, 4): {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (0, 256, 4): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    },
    # BLOCK_N members added at once.
    "retroinfer.update": {
        (0, 128, 4): {"BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
        (0, 256, 4): {"BLOCK_N": 16, "num_warps": 4, "num_stages": 2},
    },
    # BLOCK_M rows moved at once.
    "fusionrag.rotate": {
        (0, 128, 4): {"BLOCK_M": 32, "num_warps": 4},
        (0, 256, 4): {"BLOCK_M": 16, "num_warps": 4},
    },
    "fusionrag.scatter": {
        (0, 128, 4): {"BLOCK_M": 32, "num_warps": 4},
        (0, 256, 4): {"BLOCK_M": 16, "num_warps": 4},
    },
    # BLOCK_M rows of a question against BLOCK_N keys.
    "fusionrag.norm": {
        (0, 128, 2): {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
        (0, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
        (0, 256, 4): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
    },
    "fusionrag.sum": {
        (0, 128, 2): {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
        (0, 256, 2): {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2},
        (0, 64, 4): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
        (0, 128, 4): {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
        (0, 256, 4): {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
    },
    "moba.centroids": {
        (0, 128, 4): {"BLOCK_N": 32, "num_warps": 4, "num_stages": 3},
        (0, 256, 4): {"BLOCK_N": 16, "num_warps": 4, "num_stages": 3},
    },
    # DEPTH: elements of the head multiplied at a time; all of them where registers do not hold the centroids.
    "moba.gate": {
        (80, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "DEPTH": 32, "num_warps": 4, "num_stages": 1},
        (90, 128, 2): {"BLOCK_M": 64, "BLOCK_N": 64, "DEPTH": 256, "num_warps": 4, "num_stages": 2},
        (90, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "DEPTH": 64, "num_warps": 4, "num_stages": 1},
        (100, 128, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "DEPTH": 256, "num_warps": 4, "num_stages": 2},
        (100, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "DEPTH": 64, "num_warps": 4, "num_stages": 1},
        (120, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "DEPTH": 16, "num_warps": 4, "num_stages": 1},
        (90, 256, 4): {"BLOCK_M": 32, "BLOCK_N": 32, "DEPTH": 32, "num_warps": 8, "num_stages": 1},
        (100, 256, 4): {"BLOCK_M": 32, "BLOCK_N": 32, "DEPTH": 32, "num_warps": 8, "num_stages": 1},
        (0, 256, 4): {"BLOCK_M": 32, "BLOCK_N": 32, "DEPTH": 16, "num_warps": 4, "num_stages": 1},
    },
    # COUNT and PLACE choices at a time; PLACE compares every one with every other.
    "moba.layout": {
        (0, 256, 4): {"COUNT": 1024, "PLACE": 64, "num_warps": 4},
    },
    "moba.gathered": {
        (80, 64, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        (80, 128, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3},
        (80, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        (90, 64, 2): {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
        (90, 128, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        (90, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (100, 64, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        (100, 128, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (100, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        (120, 64, 2): {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
        (120, 128, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3},
        (120, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        (0, 128, 4): {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
        (0, 256, 4): {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
    },
    "moba.finish": {
        (80, 64, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        (80, 128, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3},
        (80, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        (90, 64, 2): {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
        (90, 128, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        (90, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        (100, 64, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        (100, 128, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
        (100, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        (120, 64, 2): {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
        (120, 128, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 3},
        (120, 256, 2): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
        (0, 128, 4): {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
        (0, 256, 4): {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
    },
}


def family(arch: int) -> int:
    """The architecture whose rows serve compute capability `arch`, 10 * major + minor."""
    if arch in (86, 89) or arch >= 120:
        return 120
    return max((a for a in SHARED_LIMIT if a <= arch), default=80)


def get(kernel: str, arch: int, head_dim: int, dtype_bytes: int) -> Row:
    """The row of `kernel` for a head size and an element size; raises KeyError naming what the table lacks."""
    table = TABLES.get(kernel, {})
    for a in (family(arch), 0):
        fits = [key for key in table if key[0] == a and key[1] >= head_dim and key[2] >= dtype_bytes]
        if fits:
            return dict(table[min(fits, key=lambda key: (key[2], key[1]))])
    raise KeyError(f"configs.py has no row of {kernel} for sm_{arch}, head_dim {head_dim}, {dtype_bytes}-byte elements")
