// Attention states (out, lse) merge, N of a row in one pass; and the key of each query joins its state.
//
// `lanes` threads of one warp own a row, UNIT elements next to each other a thread, and `split` such groups share its
// states. The largest lse is found first, so partial sums only add up, in one order: results repeat bit for bit. A
// thread writes what it alone has read, and a row's lse once all have read it: a state may be its own result.
//
// Numbers come as long long or double, as in gate.cu. ELEMENT (of outs, or of q, k and v), STATE (of the state that a
// key joins), RESULT (Half, Brain, float, or E4M3 from sm_89 on), UNIT, BATCH and THREADS are macros of the build.

using Index = long long;

constexpr unsigned FULL = 0xffffffffu;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

struct Half { unsigned short bits; };
struct Brain { unsigned short bits; };
struct E4M3 { unsigned char bits; };

template <int BYTES> struct WordOf { using type = unsigned; };
template <> struct WordOf<2> { using type = unsigned short; };
template <> struct WordOf<1> { using type = unsigned char; };

// UNIT elements, moved 16 bytes at a time where they are as many. They stay in whole registers until they are used.
template <typename T> struct Run {
  static constexpr int BYTES = UNIT * sizeof(T), ACCESS = BYTES < 16 ? BYTES : 16;
  using Word = typename WordOf<BYTES>::type;
  static constexpr int WORDS = BYTES / sizeof(Word), EACH = sizeof(Word) / sizeof(T), BITS = 8 * sizeof(T);
  struct alignas(ACCESS) Part { Word x[ACCESS / sizeof(Word)]; };
  Part part[BYTES / ACCESS];

  __device__ __forceinline__ unsigned bits(int i) const {
    constexpr int PER = ACCESS / sizeof(Word);
    return static_cast<unsigned>(part[i / EACH / PER].x[i / EACH % PER]) >> i % EACH * BITS;
  }
  __device__ __forceinline__ void set(int word, unsigned x) {
    constexpr int PER = ACCESS / sizeof(Word);
    part[word / PER].x[word % PER] = static_cast<Word>(x);
  }
};

template <typename T> __device__ __forceinline__ Run<T> load(const T* p) {
  Run<T> x;
#pragma unroll
  for (int i = 0; i < Run<T>::BYTES / Run<T>::ACCESS; ++i)
    x.part[i] = reinterpret_cast<const typename Run<T>::Part*>(p)[i];
  return x;
}

__device__ __forceinline__ float minus_inf() { return __int_as_float(static_cast<int>(0xff800000u)); }

// An infinite lse means no keys.
__device__ __forceinline__ float known(float lse) { return fabsf(lse) == -minus_inf() ? minus_inf() : lse; }

__device__ __forceinline__ float base_of(float top) { return top == minus_inf() ? 0.0f : top; }

__device__ __forceinline__ float widen(float, unsigned bits) { return __int_as_float(static_cast<int>(bits)); }
__device__ __forceinline__ float widen(Brain, unsigned bits) { return __int_as_float(static_cast<int>(bits << 16)); }
__device__ __forceinline__ float widen(Half, unsigned bits) {
#ifdef __CUDACC__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(static_cast<unsigned short>(bits)));
  return y;
#else
  return half_bits_to_float(static_cast<unsigned short>(bits));
#endif
}

template <typename T> __device__ __forceinline__ float element(const Run<T>& x, int i) { return widen(T(), x.bits(i)); }

// Two floats to nearest and even, as the hardware converts them; E4M3 ends at +-448, and a NaN stays one.
#ifdef __CUDACC__
__device__ __forceinline__ unsigned narrow(Half, float low, float high) {
  unsigned both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
__device__ __forceinline__ unsigned narrow(Brain, float low, float high) {
  unsigned both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
#if __CUDA_ARCH__ >= 890
__device__ __forceinline__ unsigned narrow(E4M3, float low, float high) {
  unsigned short both;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(high), "f"(low));
  return both;
}
#endif
#else
__device__ unsigned narrow(Half, float low, float high) {
  return float_to_half_bits(low) | static_cast<unsigned>(float_to_half_bits(high)) << 16;
}
__device__ unsigned narrow(Brain, float low, float high) {
  return float_to_brain_bits(low) | static_cast<unsigned>(float_to_brain_bits(high)) << 16;
}
__device__ unsigned narrow(E4M3, float low, float high) {
  return float_to_e4m3_bits(low) | static_cast<unsigned>(float_to_e4m3_bits(high)) << 8;
}
#endif

// Floats as the words of a run of T.
template <typename T> struct Packed {
  static __device__ __forceinline__ unsigned word(const float* x, int count) {
    unsigned low = narrow(T(), x[0], count > 1 ? x[1] : 0.0f);
    return count < 4 ? low : low | narrow(T(), x[2], x[3]) << 16;
  }
};
template <> struct Packed<float> {
  static __device__ __forceinline__ unsigned word(const float* x, int) {
    return static_cast<unsigned>(__float_as_int(x[0]));
  }
};

__device__ __forceinline__ void store(RESULT* p, const float (&x)[UNIT]) {
  using R = Run<RESULT>;
  R y;
#pragma unroll
  for (int i = 0; i < R::WORDS; ++i) y.set(i, Packed<RESULT>::word(x + i * R::EACH, R::EACH));
#pragma unroll
  for (int i = 0; i < R::BYTES / R::ACCESS; ++i) reinterpret_cast<typename R::Part*>(p)[i] = y.part[i];
}

// The lses of a row, times the factors.
struct Lses {
  const float *p, *factors;
  Index stride;
  __device__ __forceinline__ float operator[](Index n) const {
    float x = known(p[n * stride]);
    return factors ? x * factors[n] : x;
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 5)
merge_states(const ELEMENT* outs, const float* lses, const float* factors, const Index* indptr, RESULT* out, float* lse,
             const float* out_scale, Index count, Index rows, Index heads, Index dim, Index o_n, Index o_m, Index o_h,
             Index l_n, Index l_m, Index l_h, Index y_m, Index y_h, Index z_m, Index z_h, Index base2, Index lanes,
             Index split, Index width) {
  __shared__ float s_acc[UNIT][THREADS], s_sum[THREADS];
  int group = threadIdx.x / static_cast<int>(lanes), lane = threadIdx.x % static_cast<int>(lanes);
  int part = group % static_cast<int>(split), together = THREADS / static_cast<int>(lanes * split);
  Index row = static_cast<Index>(blockIdx.x) * together + group / static_cast<int>(split), m = row / heads;
  Index h = row - m * heads, begin = 0, end = 0;
  bool m_row = row < rows * heads;
  if (m_row) {
    begin = indptr ? indptr[m] : 0;
    end = indptr ? indptr[m + 1] : count;
  }
  const ELEMENT* p_x = outs + m * o_m + h * o_h;
  Lses x = {lses + m * l_m + h * l_h, factors, l_n};
  Index first = begin + part * BATCH, step = split * BATCH;
  Run<ELEMENT> b_x[BATCH];
  auto fetch = [&](Index n, Index d) {
    const ELEMENT* p = p_x + n * o_n + d;
#pragma unroll
    for (int i = 0; i < BATCH; ++i, p += o_n)
      if (n + i < end && d < dim) b_x[i] = load(p);
  };

  // The first states are asked for before their weights are known: one latency, not two.
  fetch(first, lane * UNIT);
  float top = minus_inf(), unit = base2 ? 1.0f : LOG2E, sum = 0.0f;
#pragma unroll 2
  for (Index n = begin + lane % static_cast<int>(width); n < end; n += width) top = fmaxf(top, x[n]);
  for (int d = static_cast<int>(width) / 2; d; d /= 2) top = fmaxf(top, __shfl_xor_sync(FULL, top, d));
  float base = base_of(top);

#pragma unroll 1
  for (Index d = lane * UNIT; d < dim + lane * UNIT; d += lanes * UNIT) {
    float acc[UNIT] = {};
    sum = 0.0f;
#pragma unroll 1
    for (Index n = first; n < end; n += step) {
      if (n != first || d != lane * UNIT) fetch(n, d);
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        float weight = n + i < end ? exp2f((x[n + i] - base) * unit) : 0.0f;
        sum += weight;
        if (weight == 0.0f || d >= dim) continue;
#pragma unroll
        for (int j = 0; j < UNIT; ++j) acc[j] += weight * element(b_x[i], j);
      }
    }
    if (split > 1) {
      s_sum[threadIdx.x] = sum;
#pragma unroll
      for (int j = 0; j < UNIT; ++j) s_acc[j][threadIdx.x] = acc[j];
      __syncthreads();
      for (int i = 1; part == 0 && i < split; ++i) {
        int other = threadIdx.x + i * static_cast<int>(lanes);
        sum += s_sum[other];
#pragma unroll
        for (int j = 0; j < UNIT; ++j) acc[j] += s_acc[j][other];
      }
      __syncthreads();
    }
    if (!m_row || part || d >= dim) continue;
    float share = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
    for (int j = 0; j < UNIT; ++j) acc[j] *= share;
    if (out_scale) {  // not in `share`, which a small one would make infinite
#pragma unroll
      for (int j = 0; j < UNIT; ++j) acc[j] /= *out_scale;
    }
    store(out + m * y_m + h * y_h + d, acc);
  }
  __syncwarp();
  if (m_row && part == 0 && lane == 0) lse[m * z_m + h * z_h] = top + log2f(sum) * (base2 ? 1.0f : LN2);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
append_token(const STATE* before, const float* lse_before, const ELEMENT* q, const ELEMENT* k, const ELEMENT* v,
             RESULT* out, float* lse, Index rows, Index heads, Index kv_heads, Index dim, Index p_m, Index p_h,
             Index l_m, Index l_h, Index q_m, Index q_h, Index k_m, Index k_h, Index v_m, Index v_h, Index y_m,
             Index y_h, Index z_m, Index z_h, double scale, Index base2, Index lanes) {
  int lane = threadIdx.x % static_cast<int>(lanes), together = THREADS / static_cast<int>(lanes);
  Index row = static_cast<Index>(blockIdx.x) * together + threadIdx.x / static_cast<int>(lanes), m = row / heads;
  Index h = row - m * heads, g = h / (heads / kv_heads), start = lane * UNIT;
  bool m_row = row < rows * heads;
  if (!m_row) dim = 0;
  before += m * p_m + h * p_h, q += m * q_m + h * q_h, k += m * k_m + g * k_h, v += m * v_m + g * v_h;
  float old = m_row ? known(lse_before[m * l_m + h * l_h]) : 0.0f, score = 0.0f;
  Run<STATE> b_p;
  Run<ELEMENT> b_v;
  if (start < dim) b_p = load(before + start), b_v = load(v + start);
#pragma unroll 1
  for (Index d = start; d < dim; d += lanes * UNIT) {
    Run<ELEMENT> b_q = load(q + d), b_k = load(k + d);
#pragma unroll
    for (int j = 0; j < UNIT; ++j) score += element(b_q, j) * element(b_k, j);
  }
  for (int d = static_cast<int>(lanes) / 2; d; d /= 2) score += __shfl_xor_sync(FULL, score, d);
  score *= static_cast<float>(scale) * (base2 ? LOG2E : 1.0f);
  float top = fmaxf(old, score), base = base_of(top), unit = base2 ? 1.0f : LOG2E;
  float kept = exp2f((old - base) * unit), fresh = exp2f((score - base) * unit), sum = kept + fresh;
  float share = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll 1
  for (Index d = start; d < dim; d += lanes * UNIT) {
    if (d != start) b_p = load(before + d), b_v = load(v + d);
    float acc[UNIT];
#pragma unroll
    for (int j = 0; j < UNIT; ++j)
      acc[j] = (fresh * element(b_v, j) + (kept == 0.0f ? 0.0f : kept * element(b_p, j))) * share;
    store(out + m * y_m + h * y_h + d, acc);
  }
  __syncwarp();
  if (m_row && lane == 0) lse[m * z_m + h * z_h] = top + log2f(sum) * (base2 ? 1.0f : LN2);
}
