// Gate: every query's best blocks by q . centroid, streamed over tiles of centroids; no score matrix is ever stored.
//
// A program owns SIDE queries of one routed head. Per tile of SIDE centroids it forms float32 dot products, each summed
// in the order d = 0 .. D-1, so that a score never depends on where its query sits. Then a warp per row keeps the row's
// best 32 keys, one per lane. More than 32 picks take further rounds, each below the last key of the round before.
//
// A key orders like (score, -block): unique, so ties, rounds and reruns are exact. NaN ranks above everything.
// Numbers come as long long, so that a launch need not know their sizes. DEPTH (of kernels/configs.py) and ELEMENT
// (Half, Brain or float: what q holds) are macros of the build.

using Index = long long;
using Key = long long;

constexpr int SIDE = 64;
constexpr int PATCH = 8;
constexpr int THREADS = (SIDE / PATCH) * (SIDE / PATCH);
constexpr int WARPS = THREADS / 32;
constexpr int STRIDE = SIDE + 4;  // keeps 16-byte stores aligned and free of bank conflicts
constexpr unsigned FULL = 0xffffffffu;
constexpr Key NONE = -0x7fffffffffffffffll - 1;
constexpr int MINUS_INF = static_cast<int>(0xff800000u);
static_assert(THREADS == SIDE, "a thread fetches one row of q and one centroid");

struct Half { unsigned short bits; };
struct Brain { unsigned short bits; };
template <typename T> struct alignas(16) Pack { T x[16 / sizeof(T)]; };

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(Brain x) { return __int_as_float(static_cast<int>(x.bits * 65536u)); }
__device__ __forceinline__ float widen(Half x) {
#ifdef __CUDACC__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  return half_bits_to_float(x.bits);
#endif
}

struct Shape {
  Index queries, q_stride_token, q_stride_head;
  int heads, kv_heads, summed, dim;
  bool q_aligned, c_aligned;
};

struct Rule { int block_size, own, sink, local, picks, slots; };

// Blocks in the pack's numbering: where the row's sequence starts, and the candidates [begin, end).
struct Row { int first, begin, end; };

struct Shared {
  union {
    struct { float q[DEPTH][SIDE], c[DEPTH][SIDE]; } stage[2];
    float scores[SIDE][STRIDE];
  };
  Key best[SIDE][32];
  Key limit[SIDE];
  Row row[SIDE];
  int begin, end;
};

__device__ __forceinline__ Key pack(float score, int block) {
  // A sum that starts at 0.0 is never -0.0, so equal scores have equal bits.
  int bits = score == score ? __float_as_int(score) : 0x7fc00000;
  Index ordered = bits ^ ((bits >> 31) & 0x7fffffff);
  return ordered * (1ll << 32) + (0x7fffffff - block);
}

__device__ __forceinline__ int block_of(Key key) { return 0x7fffffff - static_cast<int>(key & 0x7fffffff); }

__device__ __forceinline__ float score_of(Key key) {
  int ordered = static_cast<int>(key >> 32);
  return __int_as_float(ordered ^ ((ordered >> 31) & 0x7fffffff));
}

// x += p[0 .. DEPTH), with zeros past `left`.
template <typename T>
__device__ __forceinline__ void add_row(float (&x)[DEPTH], const T* p, int left, bool aligned) {
  constexpr int WIDTH = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < DEPTH; i += WIDTH) {
    if (aligned && i + WIDTH <= left) {
      Pack<T> b_p = *reinterpret_cast<const Pack<T>*>(p + i);
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) x[i + j] += widen(b_p.x[j]);
    } else {
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) x[i + j] += i + j < left ? widen(p[i + j]) : 0.0f;
    }
  }
}

// The slots that rule, not score, decides; and the range of candidates.
__device__ Row open_row(const Rule& rule, int first, int count, int position, int* indices, float* scores) {
  int own = rule.own ? position / rule.block_size : count;
  for (int slot = 0; slot < rule.own + rule.sink + rule.local; ++slot) {
    int block = own;
    if (slot >= rule.own + rule.sink) {
      block = own - 1 - (slot - rule.own - rule.sink);
      if (block < rule.sink) block = -1;
    } else if (slot >= rule.own) {
      block = slot - rule.own;
      if (block >= own) block = -1;
    }
    indices[slot] = block;
    if (scores) scores[slot] = __int_as_float(block < 0 ? MINUS_INF : 0x7f800000);
  }
  return {first, first + rule.sink, first + own - rule.local};
}

// One depth step of this thread's row of q (summed over the heads that share a choice) and of its centroid.
template <typename T>
__device__ __forceinline__ void fetch(float (&b_q)[DEPTH], float (&b_c)[DEPTH], const T* p_q, const float* p_c,
                                      const Shape& shape, int depth) {
#pragma unroll
  for (int d = 0; d < DEPTH; ++d) b_q[d] = b_c[d] = 0.0f;
  if (p_q) {
    for (int h = 0; h < shape.summed; ++h)
      add_row(b_q, p_q + h * shape.q_stride_head + depth, shape.dim - depth, shape.q_aligned);
  }
  if (p_c) add_row(b_c, p_c + depth, shape.dim - depth, shape.c_aligned);
}

__device__ __forceinline__ void stash(Shared& s, int buffer, const float (&b_q)[DEPTH], const float (&b_c)[DEPTH]) {
#pragma unroll
  for (int d = 0; d < DEPTH; ++d) {
    s.stage[buffer].q[d][threadIdx.x] = b_q[d];
    s.stage[buffer].c[d][threadIdx.x] = b_c[d];
  }
}

__device__ __forceinline__ void multiply(float (&acc)[PATCH][PATCH], const Shared& s, int buffer) {
  int y = threadIdx.x / (SIDE / PATCH) * 4, x = threadIdx.x % (SIDE / PATCH) * 4;
#pragma unroll
  for (int d = 0; d < DEPTH; ++d) {
    Pack<float> a[2], b[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      a[i] = *reinterpret_cast<const Pack<float>*>(&s.stage[buffer].q[d][y + i * SIDE / 2]);
      b[i] = *reinterpret_cast<const Pack<float>*>(&s.stage[buffer].c[d][x + i * SIDE / 2]);
    }
#pragma unroll
    for (int i = 0; i < PATCH; ++i)
#pragma unroll
      for (int j = 0; j < PATCH; ++j) acc[i][j] = fmaf(a[i / 4].x[i % 4], b[j / 4].x[j % 4], acc[i][j]);
  }
}

// s.scores = q . centroids of one tile. Enters and leaves with the stage buffers free.
template <typename T>
__device__ __forceinline__ void score_tile(Shared& s, const T* p_q, const float* p_c, const Shape& shape) {
  float acc[PATCH][PATCH] = {};
  float b_q[DEPTH], b_c[DEPTH];
  fetch(b_q, b_c, p_q, p_c, shape, 0);
  stash(s, 0, b_q, b_c);
  __syncthreads();
  int buffer = 0;
  for (int depth = DEPTH; depth < shape.dim + DEPTH; depth += DEPTH) {
    bool more = depth < shape.dim;
    if (more) fetch(b_q, b_c, p_q, p_c, shape, depth);
    multiply(acc, s, buffer);
    buffer ^= 1;
    if (more) stash(s, buffer, b_q, b_c);
    __syncthreads();
  }
  int y = threadIdx.x / (SIDE / PATCH) * 4, x = threadIdx.x % (SIDE / PATCH) * 4;
#pragma unroll
  for (int i = 0; i < PATCH; ++i)
#pragma unroll
    for (int j = 0; j < PATCH; j += 4) {
      float* p = &s.scores[y + i % 4 + i / 4 * SIDE / 2][x + j / 4 * SIDE / 2];
      *reinterpret_cast<Pack<float>*>(p) = {acc[i][j], acc[i][j + 1], acc[i][j + 2], acc[i][j + 3]};
    }
  __syncthreads();
}

// Put the warp's 32 keys into its sorted list (lane 0 holds the best), of which the first `keep` matter.
__device__ __forceinline__ Key insert(Key best, Key key, int keep) {
  int lane = threadIdx.x % 32;
  Key floor = __shfl_sync(FULL, best, keep - 1);
  for (unsigned beats = __ballot_sync(FULL, key > floor); beats; beats &= beats - 1) {
    Key fresh = __shfl_sync(FULL, key, __ffs(beats) - 1);
    if (fresh <= floor) continue;
    int rank = __popc(__ballot_sync(FULL, best > fresh));
    Key above = __shfl_up_sync(FULL, best, 1);
    best = lane < rank ? best : lane == rank ? fresh : above;
    floor = __shfl_sync(FULL, best, keep - 1);
  }
  return best;
}

// Feed the scores of the tile at block `base` to the lists of this warp's rows.
__device__ __forceinline__ void choose(Shared& s, int base, int keep) {
  int lane = threadIdx.x % 32;
  for (int i_row = threadIdx.x / 32; i_row < SIDE; i_row += WARPS) {
    Row row = s.row[i_row];
    if (row.begin >= base + SIDE || row.end <= base) continue;
    Key limit = s.limit[i_row], best = s.best[i_row][lane];
#pragma unroll
    for (int half = 0; half < SIDE; half += 32) {
      int block = base + half + lane;
      Key key = pack(s.scores[i_row][half + lane], block - row.first);
      bool m_key = block >= row.begin && block < row.end && key < limit;
      best = insert(best, m_key ? key : NONE, keep);
    }
    s.best[i_row][lane] = best;
  }
}

template <typename T>
__device__ __forceinline__ void rank_blocks(const T* q, const float* centroids, const int* query_seq,
                                            const int* query_pos, const int* cu_blocks, int* indices, float* scores,
                                            const Shape& shape, const Rule& rule) {
  __shared__ Shared s;
  // Late queries see the most blocks: they start first.
  Index start = static_cast<Index>(gridDim.x - 1 - blockIdx.x) * SIDE, token = start + threadIdx.x;
  int head = blockIdx.y, kv_head = static_cast<int>(static_cast<Index>(head) * shape.kv_heads / shape.heads);
  const T* p_q = nullptr;
  Row row = {0, 0, 0};
  if (token < shape.queries) {
    Index o_slots = (token * shape.heads + head) * rule.slots;
    int seq = query_seq[token], first = cu_blocks[seq];
    p_q = q + token * shape.q_stride_token + static_cast<Index>(head) * shape.summed * shape.q_stride_head;
    row = open_row(rule, first, cu_blocks[seq + 1] - first, query_pos[token], indices + o_slots,
                   scores ? scores + o_slots : nullptr);
  }
  if (threadIdx.x == 0) {
    s.begin = 0x7fffffff;
    s.end = 0;
  }
  s.row[threadIdx.x] = row;
  s.limit[threadIdx.x] = ~NONE;
  __syncthreads();
  if (row.begin < row.end) {
    atomicMin(&s.begin, row.begin);
    atomicMax(&s.end, row.end);
  }
  __syncthreads();

  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int done = 0; done < rule.picks; done += 32) {
    int keep = min(32, rule.picks - done);
    for (int i_row = warp; i_row < SIDE; i_row += WARPS) s.best[i_row][lane] = NONE;
    for (Index base = s.begin; base < s.end && s.end - s.begin > done; base += SIDE) {
      Index block = base + threadIdx.x;
      const float* p_c = block < s.end ? centroids + (block * shape.kv_heads + kv_head) * shape.dim : nullptr;
      score_tile(s, p_q, p_c, shape);
      choose(s, static_cast<int>(base), keep);
      __syncthreads();
    }
    for (int i_row = warp; i_row < SIDE && start + i_row < shape.queries; i_row += WARPS) {
      Key best = s.best[i_row][lane];
      Index o_slot = ((start + i_row) * shape.heads + head) * rule.slots + rule.slots - rule.picks + done + lane;
      if (lane < keep) indices[o_slot] = best == NONE ? -1 : block_of(best);
      if (lane < keep && scores) scores[o_slot] = best == NONE ? __int_as_float(MINUS_INF) : score_of(best);
      if (lane == 31) s.limit[i_row] = best;
    }
    __syncthreads();
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
gate(const ELEMENT* q, const float* centroids, const int* query_seq, const int* query_pos, const int* cu_blocks,
     int* indices, float* scores, Index queries, Index q_stride_token, Index q_stride_head, Index heads, Index kv_heads,
     Index summed, Index dim, Index q_aligned, Index c_aligned, Index block_size, Index own, Index sink, Index local,
     Index picks) {
  Shape shape = {queries,     q_stride_token, q_stride_head,  (int)heads,    (int)kv_heads,
                 (int)summed, (int)dim,       q_aligned != 0, c_aligned != 0};
  Rule rule = {(int)block_size, (int)own, (int)sink, (int)local, (int)picks, (int)(own + sink + local + picks)};
  rank_blocks(q, centroids, query_seq, query_pos, cu_blocks, indices, scores, shape, rule);
}
