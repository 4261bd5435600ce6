// Vectors as wide as the target's registers, in GNU C: GCC and Clang, any CPU. Kernels take raw pointers and strides in
// elements, accumulate in float, and know nothing of torch.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// A register tile is ROWS x VECTORS vectors: its sums, one row of the right factor and a broadcast fill the registers.
#if defined(__x86_64__) && defined(__AVX512F__)
#define LANES 16
#define ROWS 6
#define VECTORS 4
#elif defined(__x86_64__) && defined(__AVX__)
#define LANES 8
#define ROWS 6
#define VECTORS 2
#elif defined(__aarch64__)
#define LANES 4
#define ROWS 6
#define VECTORS 4
#else
#define LANES 4
#define ROWS 4
#define VECTORS 2
#endif
#define WIDTH (VECTORS * LANES)
#define RUN 128
#define INLINE static inline __attribute__((always_inline, unused))

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Int __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));

enum { FLOAT, BRAIN, HALF, E4M3 };  // element types, E4M3 only written; kernels/cpu/module.py has the same order

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

INLINE Vec load(const float *p)
{
    Vec x;
    memcpy(&x, p, sizeof x);
    return x;
}

INLINE void store(float *p, Vec x) { memcpy(p, &x, sizeof x); }

INLINE Vec splat(float x) { return x - (Vec){0}; }

INLINE Vec pick(Int mask, Vec yes, Vec no) { return (Vec)((mask & (Int)yes) | (~mask & (Int)no)); }

// Of a NaN and a number the second.
INLINE Vec larger(Vec x, Vec y)
{
#if LANES == 16
    return (Vec)_mm512_max_ps((__m512)x, (__m512)y);
#elif LANES == 8
    return (Vec)_mm256_max_ps((__m256)x, (__m256)y);
#else
    return pick(x > y, x, y);
#endif
}

INLINE float sum_of(Vec x)
{
    float lane[LANES];
    memcpy(lane, &x, sizeof x);
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++)
            lane[i] += lane[i + half];
    return lane[0];
}

INLINE float max_of(Vec x)
{
    float lane[LANES];
    memcpy(lane, &x, sizeof x);
#pragma GCC unroll 4
    for (int half = LANES / 2; half; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++)
            lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
    return lane[0];
}

// e^x for x <= 0, a rounding or so off; 0 far below the smallest normal number, NaN for NaN. x = n ln 2 + r, and e^r by a
// polynomial fitted at Chebyshev's points.
INLINE Vec exp_of(Vec x)
{
#if LANES == 16
    x = larger((Vec){0} - 200.0f, x);  // a NaN stays
    Vec n = (Vec)_mm512_roundscale_ps((__m512)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    Vec shifted = x * 1.44269504f + round, n = shifted - round;
#endif
    Vec r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Vec p = r * 1.3926176e-3f + 8.3631731e-3f;
    p = p * r + 4.16665547e-2f;
    p = p * r + 1.66665770e-1f;
    p = p * r + 0.5f;
    p = p * (r * r) + r + 1.0f;
#if LANES == 16
    return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    Vec found = (Vec)((Bits)p + ((Bits)shifted << 23));
    found = pick(x < -87.3f, (Vec){0}, found);
    return pick(x == x, found, x);
#endif
}

// `count` scores, a multiple of LANES, join the softmax with maximum `*top` and sum `*sum`: they become weights against
// the new maximum. Returns what the weights so far are worth against it.
INLINE float weigh(float *scores, int64_t count, float *top, float *sum)
{
    Vec best = load(scores), others = best, total = {0};  // two chains: each step waits for the one before it
    int64_t at = LANES;
    for (; at + LANES < count; at += 2 * LANES) {
        best = larger(load(scores + at), best);
        others = larger(load(scores + at + LANES), others);
    }
    if (at < count)
        best = larger(load(scores + at), best);
    float old = *top, now = max_of(larger(others, best));
    now = now > old ? now : old;
    float base = now == -INFINITY ? 0.0f : now;
    for (int64_t i = 0; i < count; i += LANES) {
        Vec weight = exp_of(load(scores + i) - base);
        store(scores + i, weight);
        total += weight;
    }
    float kept = expf(old - base);
    *top = now;
    *sum = *sum * kept + sum_of(total);
    return kept;
}

INLINE float dot(const float *a, const float *b, int64_t dim)
{
    Vec sum = {0};
    int64_t d = 0;
    for (; d + LANES <= dim; d += LANES)
        sum += load(a + d) * load(b + d);
    float rest = 0.0f;
    for (; d < dim; d++)
        rest += a[d] * b[d];
    return sum_of(sum) + rest;
}

// Bit i: lane i of x is not at most `bound`. A NaN on either side sets it.
INLINE unsigned above(Vec x, float bound)
{
#if LANES == 16
    return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(bound), _CMP_NLE_UQ);
#elif LANES == 8
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_set1_ps(bound), _CMP_NLE_UQ));
#else
    unsigned bits = 0;
    for (int i = 0; i < LANES; i++)
        bits |= (unsigned)!(x[i] <= bound) << i;
    return bits;
#endif
}

// Ask for `bytes` at `p` ahead of their use: gathered rows follow no pattern that hardware foresees.
INLINE void fetch(const void *p, int64_t bytes)
{
    for (int64_t i = 0; i < bytes; i += 64)
        __builtin_prefetch((const char *)p + i);
}

INLINE float from_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE float from_half(uint16_t h)
{
    // The exponent moves by 112; a subnormal is what its bits add to 2^-14, so that no number here is one; infinities and
    // NaNs get all ones.
    uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13, sign = (uint32_t)(h & 0x8000) << 16, bits;
    float small = from_bits(magnitude | 0x38800000) - 0x1p-14f;
    memcpy(&bits, &small, 4);
    bits = magnitude < 0x00800000 ? bits : magnitude + 0x38000000;
    bits = magnitude < 0x0f800000 ? bits : magnitude | 0x7f800000;
    return from_bits(bits | sign);
}

// n elements of `type` at element `at` of `x`, times `scale`.
INLINE void read_scaled(float *to, const void *x, int64_t at, int64_t n, int64_t type, float scale)
{
    const float *f = (const float *)x + at;
    const uint16_t *h = (const uint16_t *)x + at;
    if (type == FLOAT)
        for (int64_t i = 0; i < n; i++)
            to[i] = f[i] * scale;
    else if (type == BRAIN)
        for (int64_t i = 0; i < n; i++)
            to[i] = from_bits((uint32_t)h[i] << 16) * scale;
    else
        for (int64_t i = 0; i < n; i++)
            to[i] = from_half(h[i]) * scale;
}

// The same without a copy where the elements are floats.
INLINE const float *read_row(float *room, const void *x, int64_t at, int64_t n, int64_t type)
{
    if (type == FLOAT)
        return (const float *)x + at;
    read_scaled(room, x, at, n, type, 1.0f);
    return room;
}

// c[r][:] (+)= sum_i a[r][i] b[i][:] of one register tile; the sums of a column run in one order whatever the tile.
INLINE void tile(const int rows, const int vectors, const float *a, int64_t lda, const float *b, int64_t depth, int add,
                 float *c, int64_t ldc)
{
    Vec sum[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++)
            sum[r][v] = (Vec){0};
    for (int64_t i = 0; i < depth; i++) {
        Vec right[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++)
            right[v] = load(b + (i * vectors + v) * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++)
                sum[r][v] += a[r * lda + i] * right[v];
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++)
            store(c + r * ldc + v * LANES, add ? load(c + r * ldc + v * LANES) + sum[r][v] : sum[r][v]);
}

// Long sums go in runs of RUN, whose rows of b stay in the first cache and whose roundings do not add up.
INLINE void strip(const int vectors, int64_t rows, const float *a, int64_t lda, const float *b, int64_t depth, float *c,
                  int64_t ldc)
{
    for (int64_t at = 0; at < depth; at += RUN, a += RUN, b += RUN * vectors * LANES) {
        int64_t run = least(RUN, depth - at), r = 0;
        for (; r + ROWS <= rows; r += ROWS)
            tile(ROWS, vectors, a + r * lda, lda, b, run, at > 0, c + r * ldc, ldc);
        for (; r < rows; r++)
            tile(1, vectors, a + r * lda, lda, b, run, at > 0, c + r * ldc, ldc);
    }
}

// c [rows, vectors * LANES] = a [rows, depth] b, with b in panels: WIDTH columns (the last one fewer) of all its rows.
// `stride` rows lie between the panels of b. Inlined, its tiles would run out of registers for addresses.
static __attribute__((noinline, unused)) void product(int64_t rows, int64_t vectors, const float *a, int64_t lda,
                                                      const float *b, int64_t stride, int64_t depth, float *c,
                                                      int64_t ldc)
{
    for (int64_t at = 0; at < vectors; at += VECTORS, b += stride * WIDTH, c += WIDTH) {
        switch (least(vectors - at, VECTORS)) {
        case 1: strip(1, rows, a, lda, b, depth, c, ldc); break;
#if VECTORS > 2
        case 2: strip(2, rows, a, lda, b, depth, c, ldc); break;
        case 3: strip(3, rows, a, lda, b, depth, c, ldc); break;
#endif
        default: strip(VECTORS, rows, a, lda, b, depth, c, ldc);
        }
    }
}
