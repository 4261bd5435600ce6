// Floats rounded to narrower types, to nearest and to even, as PyTorch rounds them.
#pragma once
#include "simd.h"

INLINE uint32_t to_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

INLINE float to_brain(float x)
{
    uint32_t bits = to_bits(x);
    return x == x ? from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000) : x;
}

INLINE float to_half(float x)
{
    // 13 bits are rounded off; below 2^-14 it is what lies under 2^-24, the last bit of 0.5.
    uint32_t bits = to_bits(x), sign = bits & 0x80000000, magnitude = bits ^ sign;
    uint32_t small = to_bits((from_bits(magnitude) + 0.5f) - 0.5f);
    uint32_t large = (magnitude + 0xfff + (magnitude >> 13 & 1)) & 0xffffe000;
    large = large < 0x47800000 ? large : 0x7f800000;
    return x == x ? from_bits(sign | (magnitude < 0x38800000 ? small : large)) : x;
}

INLINE uint16_t brain_bits(float x) { return x == x ? to_bits(to_brain(x)) >> 16 : 0x7fc0; }

INLINE uint16_t half_bits(float x)
{
    uint32_t bits = to_bits(to_half(x)), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t small = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000, large = (magnitude >> 13) - 0x1c000;
    large = magnitude < 0x7f800000 ? large : 0x7c00;
    return x == x ? sign | (magnitude < 0x38800000 ? small : large) : 0x7e00;
}

// e4m3 without infinities: what is over 448 becomes 448.
INLINE uint8_t e4m3_bits(float x)
{
    uint32_t bits = to_bits(x), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
    magnitude = magnitude < 0x43e00000 ? magnitude : 0x43e00000;
    // Below 2^-6 numbers are 2^-9 apart, as floats over 2^14 are.
    uint32_t small = to_bits(from_bits(magnitude) + 0x1p14f) - 0x46800000;
    uint32_t large = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - 0x3c0;
    return x == x ? sign | (magnitude < 0x3c800000 ? small : large) : 0x7f;
}

// n floats become elements of `type` from element `at` of `to` on.
INLINE void write_row(void *to, int64_t at, const float *from, int64_t n, int64_t type)
{
    uint16_t *h = (uint16_t *)to + at;
    int64_t done = 0;
#if LANES == 16
    for (; type == HALF && done + LANES <= n; done += LANES) {
        __m256i x = _mm512_cvtps_ph((__m512)load(from + done), _MM_FROUND_TO_NEAREST_INT);
        _mm256_storeu_si256((__m256i *)(h + done), x);
    }
#endif
    if (type == FLOAT)
        memcpy((float *)to + at, from, n * sizeof *from);
    else if (type == BRAIN)
        for (int64_t i = 0; i < n; i++)
            h[i] = brain_bits(from[i]);
    else if (type == HALF)
        for (int64_t i = done; i < n; i++)
            h[i] = half_bits(from[i]);
    else
        for (int64_t i = 0; i < n; i++)
            ((uint8_t *)to)[at + i] = e4m3_bits(from[i]);
}
