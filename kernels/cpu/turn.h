// Keys turned as kernels/fusionrag's rotation turns them: in float, each product rounded, then once to the key's type.
#pragma once
#include "narrow.h"

INLINE float rounded(float x, int64_t type) { return type == FLOAT ? x : type == BRAIN ? to_brain(x) : to_half(x); }

// Pairs (x[i * step], x[i * step + apart]). The products are stored first: a compiler would fuse one of them with its sum.
INLINE void turn_pairs(const int step, float *x, int64_t apart, const float *cos, const float *sin, int64_t pairs,
                       int64_t type)
{
    float p[4][RUN];
    for (int64_t at = 0; at < pairs; at += RUN, x += RUN * step) {
        int64_t n = least(RUN, pairs - at);
        for (int64_t i = 0; i < n; i++) {
            float a = x[i * step], b = x[i * step + apart], c = cos[at + i], s = sin[at + i];
            p[0][i] = a * c, p[1][i] = b * s, p[2][i] = b * c, p[3][i] = a * s;
        }
        for (int64_t i = 0; i < n; i++) {
            x[i * step] = rounded(p[0][i] - p[1][i], type);
            x[i * step + apart] = rounded(p[2][i] + p[3][i], type);
        }
    }
}

// The first `2 * pairs` elements of `x`, in halves or interleaved.
INLINE void turn(float *x, const float *cos, const float *sin, int64_t pairs, int64_t interleaved, int64_t type)
{
    if (interleaved)
        turn_pairs(2, x, 1, cos, sin, pairs, type);
    else
        turn_pairs(1, x, pairs, cos, sin, pairs, type);
}
