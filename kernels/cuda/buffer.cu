// Wave buffer: look the chosen clusters' pages up, choose the places of those that are missing, copy them in.
//
// buffer_admit, one block per (row, KV head), is a step of the policy and leaves a list of copies; buffer_fetch makes
// them, keys and values in one go, straight from pinned host memory. All ranks come from prefix sums and there is no
// atomic, so every run gives the same bits. Nothing waits for the host: a head that asks for more pages than its cache
// holds leaves the cache as it is, notes how many they were, and its missing pages are read where they are.
//
// Page ids and the policy are those of kernels/retroinfer/buffer.py. Numbers come as long long, as in gate.cu. THREADS,
// a power of two, is a macro of the build.

using Index = long long;

constexpr unsigned FULL = 0xffffffffu;
constexpr int WARPS = THREADS / 32;
constexpr int BATCH = 4;
static_assert(WARPS * 32 == THREADS && !(THREADS & (THREADS - 1)) && THREADS < 1 << 15, "scans pack two counts");

// One copy: `vectors` keys and values from `first` on, for page `page` in place `place`.
struct alignas(16) Copy { int page, first, vectors, place; };
struct alignas(16) Wide { Index x[2]; };

struct Cluster { int id, begin, size, pages; };

// One cache.
struct Head {
  const int* chosen;   // [slots] clusters, -1: none
  const int* offsets;  // [clusters + 1]
  int* slot_map;       // [ids]
  int* pages;          // [capacity]
  int* used;           // [capacity]
  Copy* copies;        // [capacity]
  int slots, capacity, page;
  int step;  // this step's number: what it marks its places with
};

struct Shared {
  Cluster cluster[THREADS];
  int ends[THREADS];
  int sums[WARPS];
  int last;
};

// The sum of x over the threads up to this one, and over all.
__device__ __forceinline__ int scan(Shared& s, int x, int& total) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, below = 0;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    int y = __shfl_up_sync(FULL, x, d);
    if (lane >= d) x += y;
  }
  if (lane == 31) s.sums[warp] = x;
  __syncthreads();
  total = 0;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) {
    if (i == warp) below = total;
    total += s.sums[i];
  }
  __syncthreads();
  return below + x;
}

__device__ __forceinline__ int sum(Shared& s, int x) {
  int total;
  scan(s, x, total);
  return total;
}

__device__ __forceinline__ Cluster open_cluster(const Head& head, int i) {
  int id = i < head.slots ? head.chosen[i] : -1;
  if (id < 0) return {-1, 0, 0, 0};
  int begin = head.offsets[id], size = head.offsets[id + 1] - begin;
  return {id, begin, size, (size + head.page - 1) / head.page};
}

__device__ __forceinline__ int count_pages(const Head& head, Shared& s) {
  int pages = 0;
  for (int i = threadIdx.x; i < head.slots; i += THREADS) pages += open_cluster(head, i).pages;
  return sum(s, pages);
}

// Marks the places of pages that are there and lists the others by rising id; returns how many those are. `vectors`
// counts what this thread listed.
__device__ __forceinline__ int look_up(const Head& head, Shared& s, int& vectors) {
  int missing = 0;
  for (int base = 0; base < head.slots; base += THREADS) {
    Cluster cluster = open_cluster(head, base + threadIdx.x);
    int total, end = scan(s, cluster.pages, total);
    s.cluster[threadIdx.x] = cluster;
    s.ends[threadIdx.x] = end;
    __syncthreads();
    for (int first = 0; first < total; first += THREADS) {
      int place = -1, rank = first + threadIdx.x, found;
      bool m_page = rank < total;
      Copy copy = {};
      if (m_page) {
        int owner = 0;
#pragma unroll
        for (int width = THREADS / 2; width; width /= 2)
          if (s.ends[owner + width - 1] <= rank) owner += width;
        cluster = s.cluster[owner];
        int i = rank - (s.ends[owner] - cluster.pages);
        copy = {cluster.begin / head.page + cluster.id + i, cluster.begin + i * head.page,
                min(head.page, cluster.size - i * head.page), 0};
        place = head.slot_map[copy.page];
        if (place >= 0) head.used[place] = head.step;
      }
      bool miss = m_page && place < 0;
      int at = missing + scan(s, miss, found) - 1;
      if (miss) {
        head.copies[at] = copy;
        vectors += copy.vectors;
      }
      missing += found;
    }
  }
  return missing;
}

// CLOCK: the first round takes places whose bit is clear, the second those that lost it in the first.
__device__ __forceinline__ void sweep(const Head& head, Shared& s, int missing, int* p_hand) {
  int hand = *p_hand, taken = 0, rounds = 0;
  for (; rounds < 2 && taken < missing; ++rounds) {
    for (int base = 0; base < head.capacity && taken < missing; base += THREADS) {
      int i = base + threadIdx.x, place = i < head.capacity - hand ? hand + i : hand + i - head.capacity, total;
      bool m_free = false;
      if (i < head.capacity) {
        int used = head.used[place];
        m_free = rounds ? used && used != head.step : !used;
      }
      int rank = taken + scan(s, m_free, total) - 1;
      if (m_free && rank < missing) head.copies[rank].place = place;
      if (m_free && rank == missing - 1) s.last = i;
      taken += total;
    }
  }
  __syncthreads();
  int passed = rounds == 1 ? s.last : head.capacity;
  for (int i = threadIdx.x; i < passed; i += THREADS) {
    int place = i < head.capacity - hand ? hand + i : hand + i - head.capacity;
    if (head.used[place] != head.step) head.used[place] = 0;
  }
  if (threadIdx.x == 0) *p_hand = (hand + s.last + 1) % head.capacity;
}

__device__ __forceinline__ int count_used_until(const Head& head, Shared& s, int step) {
  int count = 0;
  for (int i = threadIdx.x; i < head.capacity; i += THREADS) count += head.used[i] <= step;
  return sum(s, count);
}

// LRU: the places used longest ago, the lowest among equals, from the lowest up.
__device__ __forceinline__ void take_oldest(const Head& head, Shared& s, int missing) {
  int low = 0, high = head.step - 1;
  while (low < high) {
    int middle = low + (high - low) / 2;
    if (count_used_until(head, s, middle) >= missing)
      high = middle;
    else
      low = middle + 1;
  }
  // All places older than `low` go, and of those as old as it the lowest.
  int equals = missing - count_used_until(head, s, low - 1), older = 0, equal = 0;
  for (int base = 0; base < head.capacity; base += THREADS) {
    int i = base + threadIdx.x, used = i < head.capacity ? head.used[i] : head.step, total;
    int both = (used < low) + ((used == low) << 16), before = scan(s, both, total) - both;
    int o_equal = equal + (before >> 16), rank = older + (before & 0xffff) + min(o_equal, equals);
    if (used < low || (used == low && o_equal < equals)) head.copies[rank].place = i;
    older += total & 0xffff;
    equal += total >> 16;
  }
}

// Gives the missing pages their places; returns how many pages this thread drove out.
__device__ __forceinline__ int replace(const Head& head, int missing) {
  int evicted = 0;
  for (int i = threadIdx.x; i < missing; i += THREADS) {
    Copy copy = head.copies[i];
    int old = head.pages[copy.place];
    if (old >= 0) {
      head.slot_map[old] = -1;
      ++evicted;
    }
    head.pages[copy.place] = copy.page;
    head.used[copy.place] = head.step;
    head.slot_map[copy.page] = copy.place;
  }
  return evicted;
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
buffer_admit(const int* chosen, const int* offsets, int* slot_map, int* pages, int* used, int* hand, int* steps,
             Index* counters, int* overflow, Copy* copies, int* counts, Index slots, Index clusters, Index ids,
             Index capacity, Index page, Index vector_bytes, Index lru) {
  __shared__ Shared s;
  Index i_head = blockIdx.x, o_place = i_head * capacity;
  Head head = {chosen + i_head * slots, offsets + i_head * (clusters + 1), slot_map + i_head * ids, pages + o_place,
               used + o_place,          copies + o_place,                  (int)slots,              (int)capacity,
               (int)page,               steps[i_head] + 1};
  int asked = count_pages(head, s);
  if (asked > capacity) {
    if (threadIdx.x == 0) {
      overflow[i_head] = max(overflow[i_head], asked);
      counts[i_head] = 0;
    }
    return;
  }
  int vectors = 0, missing = look_up(head, s, vectors);
  __syncthreads();
  if (missing && lru) take_oldest(head, s, missing);
  if (missing && !lru) sweep(head, s, missing, hand + i_head);
  __syncthreads();
  int evicted = sum(s, replace(head, missing));
  vectors = sum(s, vectors);
  if (threadIdx.x == 0) {
    counts[i_head] = missing;
    steps[i_head] = head.step;
    Index* counter = counters + i_head * 4;
    counter[0] += asked - missing;
    counter[1] += missing;
    counter[2] += evicted;
    counter[3] += vectors * vector_bytes;
  }
}

// BATCH loads of each tier are under way before the first store: the bus is slow to answer, not narrow.
template <typename T>
__device__ __forceinline__ void copy_both(const char* k, const char* v, char* to_k, char* to_v, Index bytes) {
  int count = static_cast<int>(bytes / sizeof(T));
  for (int base = threadIdx.x % 32; base < count; base += 32 * BATCH) {
    T b_k[BATCH] = {}, b_v[BATCH] = {};
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      if (base + 32 * i < count) {
        b_k[i] = reinterpret_cast<const T*>(k)[base + 32 * i];
        b_v[i] = reinterpret_cast<const T*>(v)[base + 32 * i];
      }
    }
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      if (base + 32 * i < count) {
        reinterpret_cast<T*>(to_k)[base + 32 * i] = b_k[i];
        reinterpret_cast<T*>(to_v)[base + 32 * i] = b_v[i];
      }
    }
  }
}

// A warp per copy. `width`: bytes of a key; `unit`: 16, 8, 4 or 2, divides it and all four addresses.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
buffer_fetch(const char* k, const char* v, char* to_k, char* to_v, const Copy* copies, const int* counts, Index tokens,
             Index capacity, Index page, Index width, Index unit) {
  Index i_head = blockIdx.x, count = counts[i_head];
  for (Index i = blockIdx.y * WARPS + threadIdx.x / 32; i < count; i += gridDim.y * WARPS) {
    Copy copy = copies[i_head * capacity + i];
    Index o_from = (i_head * tokens + copy.first) * width, o_to = (i_head * capacity + copy.place) * page * width;
    Index bytes = copy.vectors * width;
    if (unit == 16)
      copy_both<Wide>(k + o_from, v + o_from, to_k + o_to, to_v + o_to, bytes);
    else if (unit % 4 == 0)
      copy_both<int>(k + o_from, v + o_from, to_k + o_to, to_v + o_to, bytes);
    else
      copy_both<short>(k + o_from, v + o_from, to_k + o_to, to_v + o_to, bytes);
  }
}
