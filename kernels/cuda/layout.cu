// Layout: for each (block, kv head) the ascending list of (query, head, slot) pairs that chose it, by counting sort.
//
// layout_count tallies table[1 + key * chunks + chunk]; an inclusive sum over the table (the launcher's) turns entry
// key * chunks + chunk into the place of the chunk's first pair; layout_place walks each chunk in order and fills. The
// only atomics add up counts, so every run gives the same bits. Numbers come as long long, as in gate.cu.

using Index = long long;

constexpr unsigned FULL = 0xffffffffu;

struct Choice {
  const int* indices;    // of the first query of the segment
  const int* query_seq;  // likewise
  const int* query_pos;  // likewise
  const int* cu_blocks;
  int heads, kv_heads, slots, own, block_size;
};

// The key of a pair; -1 for an own slot, an empty one, or a block that the query cannot choose.
__device__ __forceinline__ Index key_of(const Choice& choice, unsigned pair) {
  unsigned row = pair / choice.slots;
  if (static_cast<int>(pair - row * choice.slots) < choice.own) return -1;
  int block = choice.indices[pair];
  if (block < 0) return -1;
  unsigned token = row / choice.heads;
  int head = static_cast<int>(row - token * choice.heads), seq = choice.query_seq[token];
  int first = choice.cu_blocks[seq];
  int end = choice.own ? choice.query_pos[token] / choice.block_size : choice.cu_blocks[seq + 1] - first;
  if (block >= end) return -1;
  return static_cast<Index>(first + block) * choice.kv_heads + head / (choice.heads / choice.kv_heads);
}

extern "C" __global__ void layout_count(const int* indices, const int* query_seq, const int* query_pos,
                                        const int* cu_blocks, int* table, Index queries, Index heads, Index kv_heads,
                                        Index slots, Index own, Index block_size, Index chunk_queries, Index chunks) {
  Choice choice = {indices,       query_seq,  query_pos, cu_blocks,      (int)heads,
                   (int)kv_heads, (int)slots, (int)own,  (int)block_size};
  unsigned total = static_cast<unsigned>(queries * heads * slots), per_chunk = chunk_queries * heads * slots;
  Index step = static_cast<Index>(gridDim.x) * blockDim.x;
  for (Index pair = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x; pair < total; pair += step) {
    Index key = key_of(choice, static_cast<unsigned>(pair));
    if (key >= 0) atomicAdd(&table[1 + key * chunks + static_cast<unsigned>(pair) / per_chunk], 1);
  }
}

// A warp per (chunk, kv head): no other warp touches its entries of the table.
extern "C" __global__ void layout_place(const int* indices, const int* query_seq, const int* query_pos,
                                        const int* cu_blocks, int* table, int* pairs, Index queries, Index heads,
                                        Index kv_heads, Index slots, Index own, Index block_size, Index chunk_queries,
                                        Index chunks) {
  Choice choice = {indices,       query_seq,  query_pos, cu_blocks,      (int)heads,
                   (int)kv_heads, (int)slots, (int)own,  (int)block_size};
  Index warp = static_cast<Index>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (warp >= chunks * kv_heads) return;
  Index chunk = warp / kv_heads, first = chunk * chunk_queries;
  unsigned lane = threadIdx.x % 32, width = static_cast<unsigned>(heads / kv_heads * slots);
  unsigned o_head = static_cast<unsigned>(warp % kv_heads) * width, o_row = static_cast<unsigned>(first);
  Index left = queries - first < chunk_queries ? queries - first : chunk_queries;
  for (Index base = 0; base < left * width; base += 32) {
    unsigned item = static_cast<unsigned>(base) + lane, token = item / width;
    unsigned pair = (o_row + token) * static_cast<unsigned>(heads * slots) + o_head + (item - token * width);
    Index key = item < left * width ? key_of(choice, pair) : -1;
    unsigned peers = __match_any_sync(FULL, key);
    int rank = __popc(peers & ((1u << lane) - 1));
    Index o_entry = key * chunks + chunk;
    int place = key >= 0 ? table[o_entry] : 0;
    __syncwarp();
    if (key >= 0) {
      pairs[place + rank] = static_cast<int>(pair);
      if (rank == 0) table[o_entry] = place + __popc(peers);
    }
    __syncwarp();
  }
}
