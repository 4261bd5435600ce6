// Attention states (out, lse) merge, N of a row in one pass; and a query's own token joins its state.
//
// The weights of LANES heads of a row are made together, a lane a head; then each head's outputs are added in the order
// of the states, in registers. What a row reads it has read before it writes there, so a state may be its own result.
// Nothing depends on threads.
#include "narrow.h"
#include "parallel.h"

enum { TOGETHER = 8 };       // vectors of a row that are summed at a time
enum { BYTES = 256 << 10 };  // read and written by an item, about
enum { ALONE = 1 << 20 };    // bytes that one more thread is worth starting for

struct Merge {
    const void *outs;
    const float *lses, *factors;  // factors may be NULL
    const int64_t *indptr;        // NULL: every row merges all `count` states
    void *out;
    float *lse;
    const float *out_scale;  // NULL: 1
    int64_t type, out_type, count, heads, dim, o_n, o_m, o_h, l_n, l_m, l_h, y_m, y_h, z_m, z_h;
    float unit;                  // of the lses, in natural logarithms
    int64_t blocks, step, last;  // LANES heads of a row are a block; blocks of a row, of an item, and of all rows
};

INLINE int64_t size_of(int64_t type) { return type == FLOAT ? 4 : type == E4M3 ? 1 : 2; }

// LANES elements at element `at`.
INLINE Vec load_as(const int type, const void *x, int64_t at)
{
    const uint16_t *h = (const uint16_t *)x + at;
    if (type == FLOAT)
        return load((const float *)x + at);
#if LANES == 16
    if (type == HALF)
        return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)h));
#elif LANES == 8 && defined(__F16C__)
    if (type == HALF)
        return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)h));
#endif
    Vec found;
    for (int i = 0; i < LANES; i++)
        found[i] = type == BRAIN ? from_bits((uint32_t)h[i] << 16) : from_half(h[i]);
    return found;
}

// `live` lanes of numbers `step` apart, -INFINITY in the others and where +INFINITY means no keys.
INLINE Vec load_lses(const float *lses, int64_t step, int64_t live)
{
    Vec x = splat(-INFINITY);
    if (step == 1 && live == LANES)
        x = load(lses);
    else
        for (int64_t i = 0; i < live; i++)
            x[i] = lses[i * step];
    return pick(x == INFINITY, splat(-INFINITY), x);
}

// weights [end - begin, LANES], of sum 1, of the states [begin, end) of heads `head` on; their lses go to `lse`.
static void weigh_states(const struct Merge *c, int64_t begin, int64_t end, int64_t m, int64_t head, int64_t live,
                         float *weights, float *lse)
{
    const float *lses = c->lses + m * c->l_m + head * c->l_h;
    Vec top = splat(-INFINITY), sum = {0};
    for (int64_t n = begin; n < end; n++) {
        Vec x = load_lses(lses + n * c->l_n, c->l_h, live);
        x = c->factors ? x * c->factors[n] : x;
        top = larger(x, top);
        store(weights + (n - begin) * LANES, x);
    }
    Vec base = pick(top == -INFINITY, (Vec){0}, top);
    for (int64_t i = 0; i < end - begin; i++) {
        Vec weight = exp_of((load(weights + i * LANES) - base) * c->unit);
        sum += weight;
        store(weights + i * LANES, weight);
    }
    Vec share = pick(sum == 0.0f, (Vec){0}, 1.0f / sum);
    for (int64_t i = 0; i < end - begin; i++)
        store(weights + i * LANES, load(weights + i * LANES) * share);
    for (int64_t i = 0; i < live; i++)
        lse[i] = top[i] + logf(sum[i]) / c->unit;
}

// sums [vectors] of `count` rows, `step` elements apart, by their weights; a weight of 0 reads nothing.
INLINE void sum_rows(const int type, const int vectors, const struct Merge *c, int64_t at, const float *weights,
                     int64_t count, Vec *sums)
{
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++)
        sums[v] = (Vec){0};
    for (int64_t n = 0; n < count; n++, at += c->o_n) {
        float weight = weights[n * LANES];
        if (weight == 0.0f)
            continue;
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++)
            sums[v] += load_as(type, c->outs, at + v * LANES) * weight;
    }
}

INLINE void put(const struct Merge *c, int64_t to, const Vec *sums, int64_t n)
{
    float x[TOGETHER * LANES];
    if (c->out_type == FLOAT && n % LANES == 0) {
        for (int64_t i = 0; i < n; i += LANES)
            store((float *)c->out + to + i, sums[i / LANES]);
        return;
    }
    float scale = c->out_scale ? *c->out_scale : 1.0f;
    for (int64_t i = 0; i < n; i += LANES)
        store(x + i, c->out_scale ? sums[i / LANES] / scale : sums[i / LANES]);
    write_row(c->out, to, x, n, c->out_type);
}

INLINE void merge_row(const int type, const struct Merge *c, int64_t at, int64_t to, const float *weights,
                      int64_t count)
{
    Vec sums[TOGETHER];
    int64_t d = 0, whole = c->dim / LANES * LANES;
    for (; d + TOGETHER * LANES <= whole; d += TOGETHER * LANES) {
        sum_rows(type, TOGETHER, c, at + d, weights, count, sums);
        put(c, to + d, sums, TOGETHER * LANES);
    }
    for (; d + 4 * LANES <= whole; d += 4 * LANES) {
        sum_rows(type, 4, c, at + d, weights, count, sums);
        put(c, to + d, sums, 4 * LANES);
    }
    for (; d < whole; d += LANES) {
        sum_rows(type, 1, c, at + d, weights, count, sums);
        put(c, to + d, sums, LANES);
    }
    for (; d < c->dim; d++) {
        float sum = 0.0f, x;
        for (int64_t n = 0; n < count; n++) {
            read_scaled(&x, c->outs, at + d + n * c->o_n, 1, type, 1.0f);
            sum += weights[n * LANES] == 0.0f ? 0.0f : x * weights[n * LANES];
        }
        sum = c->out_scale ? sum / *c->out_scale : sum;
        write_row(c->out, to + d, &sum, 1, c->out_type);
    }
}

static int merge_item(const void *call, int64_t item)
{
    const struct Merge *c = call;
    int64_t room = 0;
    float *weights = NULL, lse[LANES];
    for (int64_t block = item * c->step; block < least(c->last, (item + 1) * c->step); block++) {
        int64_t m = block / c->blocks, head = block % c->blocks * LANES, live = least(LANES, c->heads - head);
        int64_t begin = c->indptr ? c->indptr[m] : 0, end = c->indptr ? c->indptr[m + 1] : c->count;
        if (end - begin > room) {
            free(weights);
            room = end - begin;
            weights = malloc(room * LANES * sizeof *weights);
            if (!weights)
                return NO_MEMORY;
        }
        weigh_states(c, begin, end, m, head, live, weights, lse);
        for (int64_t i = 0; i < live; i++) {
            int64_t at = begin * c->o_n + m * c->o_m + (head + i) * c->o_h, to = m * c->y_m + (head + i) * c->y_h;
            if (c->type == FLOAT)
                merge_row(FLOAT, c, at, to, weights + i, end - begin);
            else if (c->type == BRAIN)
                merge_row(BRAIN, c, at, to, weights + i, end - begin);
            else
                merge_row(HALF, c, at, to, weights + i, end - begin);
            c->lse[m * c->z_m + (head + i) * c->z_h] = lse[i];
        }
    }
    free(weights);
    return DONE;
}

INLINE float unit_of(int64_t base2) { return base2 ? 0.6931471805599453f : 1.0f; }

// out [rows, heads, dim] and lse [rows, heads] of outs [count, rows, heads, dim], lses [count, rows, heads]; or, behind
// `indptr [rows + 1]`, of runs of entries, whose o_m and l_m are 0.
int merge_states(const void *outs, const float *lses, const float *factors, const int64_t *indptr, void *out,
                 float *lse, const float *out_scale, int64_t type, int64_t out_type, int64_t base2, int64_t count,
                 int64_t rows, int64_t heads, int64_t dim, int64_t o_n, int64_t o_m, int64_t o_h, int64_t l_n,
                 int64_t l_m, int64_t l_h, int64_t y_m, int64_t y_h, int64_t z_m, int64_t z_h, int64_t threads)
{
    struct Merge call = {
        .outs = outs, .lses = lses, .factors = factors, .indptr = indptr, .out = out, .lse = lse,
        .out_scale = out_scale, .type = type, .out_type = out_type, .count = count, .heads = heads, .dim = dim,
        .o_n = o_n, .o_m = o_m, .o_h = o_h, .l_n = l_n, .l_m = l_m, .l_h = l_h, .y_m = y_m, .y_h = y_h, .z_m = z_m,
        .z_h = z_h, .unit = unit_of(base2),
    };
    if (heads == 1 && !indptr) {  // rows fill the lanes as well
        call.heads = rows, rows = 1;
        call.o_h = o_m, call.l_h = l_m, call.y_h = y_m, call.z_h = z_m;
    }
    int64_t entries = indptr ? count : count * rows;
    int64_t all = call.heads * dim * (rows * size_of(out_type) + entries * size_of(type));
    call.blocks = ceil_div(call.heads, LANES), call.last = rows * call.blocks;
    call.step = most(1, call.last / most(1, all / BYTES));
    return parallel(merge_item, &call, ceil_div(call.last, call.step), least(threads, 1 + all / ALONE));
}

struct Append {
    const void *before, *q, *k, *v;
    const float *lse_before;
    void *out;
    float *lse;
    int64_t before_type, type, out_type, hq, hkv, dim;
    int64_t p_m, p_h, l_m, l_h, q_m, q_h, k_m, k_h, v_m, v_h, y_m, y_h, z_m, z_h;
    float scale, unit;
    int64_t step, last;  // query heads of an item, and of all rows
};

static int append_item(const void *call, int64_t item)
{
    const struct Append *c = call;
    float *room = malloc(2 * c->dim * sizeof *room), *more = room + c->dim;
    if (!room)
        return NO_MEMORY;
    for (int64_t i = item * c->step; i < least(c->last, (item + 1) * c->step); i++) {
        int64_t m = i / c->hq, h = i % c->hq, g = h / (c->hq / c->hkv);
        const float *q = read_row(room, c->q, m * c->q_m + h * c->q_h, c->dim, c->type);
        const float *k = read_row(more, c->k, m * c->k_m + g * c->k_h, c->dim, c->type);
        float score = dot(q, k, c->dim) * c->scale / c->unit, old = c->lse_before[m * c->l_m + h * c->l_h];
        old = old == INFINITY ? -INFINITY : old;
        float top = old > score ? old : score, base = top == -INFINITY ? 0.0f : top;
        float kept = expf((old - base) * c->unit), fresh = expf((score - base) * c->unit), sum = kept + fresh;
        kept = kept == 0.0f ? 0.0f : kept / sum, fresh = fresh == 0.0f ? 0.0f : fresh / sum;
        const float *v = read_row(room, c->v, m * c->v_m + g * c->v_h, c->dim, c->type);
        const float *p = read_row(more, c->before, m * c->p_m + h * c->p_h, c->dim, c->before_type);
        for (int64_t d = 0; d < c->dim; d++)
            more[d] = (kept == 0.0f ? 0.0f : p[d] * kept) + v[d] * fresh;
        write_row(c->out, m * c->y_m + h * c->y_h, more, c->dim, c->out_type);
        c->lse[m * c->z_m + h * c->z_h] = top + logf(sum) / c->unit;
    }
    free(room);
    return DONE;
}

// The key `k [rows, hkv, dim]` of each query `q [rows, hq, dim]`, and its value, join the state `before`, `lse_before`.
int append_token(const void *before, const float *lse_before, const void *q, const void *k, const void *v, void *out,
                 float *lse, int64_t before_type, int64_t type, int64_t out_type, int64_t base2, int64_t rows,
                 int64_t hq, int64_t hkv, int64_t dim, int64_t p_m, int64_t p_h, int64_t l_m, int64_t l_h, int64_t q_m,
                 int64_t q_h, int64_t k_m, int64_t k_h, int64_t v_m, int64_t v_h, int64_t y_m, int64_t y_h,
                 int64_t z_m, int64_t z_h, double scale, int64_t threads)
{
    struct Append call = {
        .before = before, .q = q, .k = k, .v = v, .lse_before = lse_before, .out = out, .lse = lse,
        .before_type = before_type, .type = type, .out_type = out_type, .hq = hq, .hkv = hkv, .dim = dim, .p_m = p_m,
        .p_h = p_h, .l_m = l_m, .l_h = l_h, .q_m = q_m, .q_h = q_h, .k_m = k_m, .k_h = k_h, .v_m = v_m, .v_h = v_h,
        .y_m = y_m, .y_h = y_h, .z_m = z_m, .z_h = z_h, .scale = (float)scale, .unit = unit_of(base2),
        .last = rows * hq,
    };
    int64_t bytes = (size_of(type) + size_of(before_type) + size_of(out_type)) * hq + 2 * size_of(type) * hkv;
    int64_t all = rows * dim * bytes;
    call.step = most(1, call.last / most(1, all / BYTES));
    return parallel(append_item, &call, ceil_div(call.last, call.step), least(threads, 1 + all / ALONE));
}
