// Partial softmaxes of one row over several sets of keys become its state.
#pragma once
#include "simd.h"

// out [dim] and lse of `count` partial softmaxes `step` floats apart, added in their order: the first one's maximum and
// sum are at `sums`, its weighted values at `values`.
INLINE void merge_parts(const float *sums, const float *values, int64_t step, int64_t count, int64_t dim, float *out,
                        float *lse)
{
    float top = -INFINITY, sum = 0.0f;
    for (int64_t i = 0; i < count; i++)
        top = sums[i * step] > top ? sums[i * step] : top;
    float base = top == -INFINITY ? 0.0f : top;
    memset(out, 0, dim * sizeof *out);
    for (int64_t i = 0; i < count; i++) {
        if (sums[i * step + 1] == 0.0f)
            continue;
        float weight = expf(sums[i * step] - base);
        sum += sums[i * step + 1] * weight;
        for (int64_t d = 0; d < dim; d++)
            out[d] += values[i * step + d] * weight;
    }
    for (int64_t d = 0; sum != 0.0f && d < dim; d++)
        out[d] /= sum;
    *lse = top + logf(sum);
}
