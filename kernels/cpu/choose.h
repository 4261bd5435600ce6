// The best blocks so far, in a heap of unsigned keys whose order is the rule for ties and NaN. Key 0: no block.
#pragma once
#include "simd.h"

// A score and its block as one unsigned number, larger for the better one: NaN is above everything, -0 equals 0, and
// the lower of two equal blocks wins.
INLINE uint64_t key_of(float score, uint32_t block)
{
    uint32_t bits;
    score = score == score ? score + 0.0f : from_bits(0x7fc00000);
    memcpy(&bits, &score, 4);
    bits = bits & 0x80000000 ? ~bits : bits | 0x80000000;
    return (uint64_t)bits << 32 | (uint32_t)~block;
}

INLINE float score_of(uint64_t key)
{
    uint32_t bits = key >> 32;
    return from_bits(bits & 0x80000000 ? bits & 0x7fffffff : ~bits);
}

// The smallest of `count` keys is at heap[0]; `key` takes the place of it.
INLINE void replace_least(uint64_t *heap, int64_t count, uint64_t key)
{
    int64_t at = 0, child;
    while ((child = 2 * at + 1) < count) {
        child += child + 1 < count && heap[child + 1] < heap[child];
        if (heap[child] >= key)
            break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = key;
}
