// Decode attention: one query per request over its pages, every key read once per group of heads.
#pragma once
#include <omp.h>

#include "matmul.h"
#include "scratch.h"
#include "simd.h"

// Shapes: queries, out [R, H, D|V]; keys [pages, page, D], values [.., V], positions [.., ] int32;
// table [R, K, width] page numbers; lengths [R, K]; at [R]; lse [R, H]; probs [R, K, longest] or
// null.
template <class T>
struct Decode {
    const T *queries, *keys, *values;
    const int32_t *positions, *table;
    const int64_t *lengths, *at;
    T* out;
    float *lse, *probs;
    int requests, heads, kv_heads, key_dim, value_dim, page, width;
    int64_t longest, window;  // window: positions a query sees back, 0 for all
    float scale, softcap;     // softcap 0: none

    int group() const { return heads / kv_heads; }
};

// softcap(x * scale) in place of raw products.
inline Vec logits(Vec x, float scale, float softcap) {
    x = x * set1(scale);
    if (softcap == 0.f) return x;
    const Vec y = x * set1(2.f * LOG2E / softcap);  // tanh(z) = 1 - 2 / (1 + e^2z)
    return set1(softcap) * (set1(1.f) - set1(2.f) / (set1(1.f) + exp2(y)));
}

// Queries of one group, in float: [G][padded D].
template <class T>
inline void widen(float* out, const T* from, int rows, int size, int padded) {
    for (int r = 0; r < rows; ++r)
        for (int d = 0; d < padded; d += LANES)
            store(out + r * padded + d, d < size ? load_at(from + r * size, d, size) : set1(0.f));
}

// products[g][0..n) of a group's queries with n <= LANES keys, rows `size` apart.
template <class T, int G>
inline void products(float* out, const float* queries, const T*, const T* keys, int n, int size,
                     int padded) {
    Vec row[G][LANES];
    for (int e = 0; e < LANES; ++e) {
        Vec acc[G];
        for (int g = 0; g < G; ++g) acc[g] = set1(0.f);
        if (e < n)
            for (int d = 0; d < size; d += LANES) {
                const Vec key = load_at(keys + size_t(e) * size, d, size);
                for (int g = 0; g < G; ++g) acc[g] = fma(key, load(queries + g * padded + d), acc[g]);
            }
        for (int g = 0; g < G; ++g) row[g][e] = acc[g];
    }
    for (int g = 0; g < G; ++g) store(out + g * LANES, sum_each(row[g]));
}

// Whether products are made of the queries as they are, without widening.
template <class T>
inline bool takes_pairs(int size) {
    return UnitOf<T>::type::DEPTH == 2 && (size == 64 || size == 96 || size == 128);
}

#ifdef PAIRS
// The same on pairs of bf16, without widening; size is a multiple of 32.
template <int G, int STEPS>
inline void products_of_pairs(float* out, const bf16* raw, const bf16* keys, int n) {
    constexpr int size = STEPS * 32;
    for (int g = 0; g < G; ++g) {  // keys come from the nearest cache after the first head
        __m512i query[STEPS];
        for (int s = 0; s < STEPS; ++s) query[s] = _mm512_loadu_si512(raw + g * size + s * 32);
        Vec row[LANES];
#pragma GCC unroll 16
        for (int e = 0; e < LANES; ++e) {
            const bf16* key = keys + size_t(e < n ? e : 0) * size;
            row[e] = set1(0.f);
#pragma GCC unroll 4
            for (int s = 0; s < STEPS; ++s)
                row[e].v = add_pairs(row[e].v, _mm512_loadu_si512(key + s * 32), query[s]);
        }
        store(out + g * LANES, sum_each(row));
    }
}

template <class T, int G>
inline void any_products(float* out, const float* queries, const T* raw, const T* keys, int n,
                         int size, int padded) {
    if constexpr (UnitOf<T>::type::DEPTH == 2) {
        switch (size) {
            case 64: return products_of_pairs<G, 2>(out, raw, keys, n);
            case 96: return products_of_pairs<G, 3>(out, raw, keys, n);
            case 128: return products_of_pairs<G, 4>(out, raw, keys, n);
        }
    }
    products<T, G>(out, queries, raw, keys, n, size, padded);
}
#else
#define any_products products
#endif

#ifdef PAIRS
// Sums of values are kept in the order in which two rows of pairs interleave: of every 32 numbers
// the quarters 0, 2, 4, 6 of four come first.
template <class T>
inline bool is_interleaved(int value_dim) {
    return UnitOf<T>::type::DEPTH == 2 && value_dim % 32 == 0;
}
inline Vec in_order(const float* block, int half) {  // numbers 16 * half.. of a block of 32
    const __m512i index = half ? _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28,
                                                   29, 30, 31)
                               : _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21,
                                                   22, 23);
    return {_mm512_permutex2var_ps(load(block).v, index, load(block + 16).v)};
}

// acc[g] += weights[g][0..n) · values two entries at a time, weights rounded to bf16.
template <int G>
inline void weigh_pairs(float* acc, const float* weights, const bf16* values, int n, int size,
                        int padded) {
    alignas(64) uint32_t pair[G][LANES / 2];
    for (int g = 0; g < G; ++g) store((bf16*)pair[g], load(weights + g * LANES));
    for (int d = 0; d < size; d += 32) {
        Vec low[G], high[G];
        for (int g = 0; g < G; ++g) {
            low[g] = load(acc + g * padded + d);
            high[g] = load(acc + g * padded + d + 16);
        }
        for (int e = 0; e < n; e += 2) {
            const __m512i one = _mm512_loadu_si512(values + size_t(e) * size + d);
            const __m512i two = e + 1 < n ? _mm512_loadu_si512(values + size_t(e + 1) * size + d)
                                          : _mm512_setzero_si512();
            const __m512i first = _mm512_unpacklo_epi16(one, two);
            const __m512i second = _mm512_unpackhi_epi16(one, two);
            for (int g = 0; g < G; ++g) {
                const __m512i weight = _mm512_set1_epi32(int(pair[g][e / 2]));
                low[g].v = add_pairs(low[g].v, first, weight);
                high[g].v = add_pairs(high[g].v, second, weight);
            }
        }
        for (int g = 0; g < G; ++g) {
            store(acc + g * padded + d, low[g]);
            store(acc + g * padded + d + 16, high[g]);
        }
    }
}
#else
template <class T>
inline bool is_interleaved(int) {
    return false;
}
inline Vec in_order(const float* block, int) { return load(block); }
#endif

// acc[g][value_dim] += weights[g][0..n) · values, for G heads.
template <class T, int G>
inline void weigh(float* acc, const float* weights, const T* values, int n, int size, int padded) {
#ifdef PAIRS
    if constexpr (UnitOf<T>::type::DEPTH == 2)
        if (is_interleaved<T>(size)) return weigh_pairs<G>(acc, weights, values, n, size, padded);
#endif
    int d = 0;
    for (; d + 4 * LANES <= size; d += 4 * LANES) {
        Vec sum[G][4];
        for (int g = 0; g < G; ++g)
            for (int i = 0; i < 4; ++i) sum[g][i] = load(acc + g * padded + d + i * LANES);
        for (int e = 0; e < n; ++e) {
            Vec value[4];
            for (int i = 0; i < 4; ++i) value[i] = load(values + size_t(e) * size + d + i * LANES);
            for (int g = 0; g < G; ++g) {
                const Vec weight = set1(weights[g * LANES + e]);
                for (int i = 0; i < 4; ++i) sum[g][i] = fma(value[i], weight, sum[g][i]);
            }
        }
        for (int g = 0; g < G; ++g)
            for (int i = 0; i < 4; ++i) store(acc + g * padded + d + i * LANES, sum[g][i]);
    }
    for (; d < size; d += LANES)
        for (int e = 0; e < n; ++e) {
            const Vec value = load_at(values + size_t(e) * size, d, size);
            for (int g = 0; g < G; ++g) {
                float* to = acc + g * padded + d;
                store(to, fma(value, set1(weights[g * LANES + e]), load(to)));
            }
        }
}

// What one span of entries gives a group's heads: [G][padded V] values, then [G] tops, [G] sums.
struct Partial {
    float *values, *top, *sum;
};

// n <= LANES entries from entry t on, at `slot` of the storage, for G heads from head `first` on.
template <class T, int G>
inline void attend_tile(const Decode<T>& a, int r, int first, int64_t t, size_t slot, int n,
                        const float* queries, int padded_key, int padded_value, Partial to,
                        float* kept_logits) {
    float weights[G * LANES];
    const T* raw = a.queries + (size_t(r) * a.heads + first) * a.key_dim;
    const int64_t oldest = a.window ? a.at[r] - a.window : -1;
    any_products<T, G>(weights, queries, raw, a.keys + slot * a.key_dim, n, a.key_dim, padded_key);
    for (int g = 0; g < G; ++g) {
        float* row = weights + g * LANES;
        store(row, logits(load(row), a.scale, a.softcap));
        for (int e = n; e < LANES; ++e) row[e] = NEVER;
        if (a.window)
            for (int e = 0; e < n; ++e)
                if (a.positions[slot + e] <= oldest) row[e] = NEVER;
        if (kept_logits)
            std::memcpy(kept_logits + (size_t(r) * a.heads + first + g) * a.longest + t, row,
                        n * sizeof(float));
        const float best = top(load(row)), any = sum(load(row));
        if (best == NEVER && any == any) {  // nothing is seen here (and nothing is NaN)
            store(row, set1(0.f));
            continue;
        }
        if (!(best <= to.top[g])) {  // a new top (or NaN): what is there shrinks
            const float less = to.top[g] == NEVER ? 0.f : std::exp(to.top[g] - best);
            float* held = to.values + g * padded_value;
            for (int d = 0; d < padded_value; d += LANES)
                store(held + d, load(held + d) * set1(less));
            to.sum[g] *= less;
            to.top[g] = best;
        }
        const Vec weight = exp2((load(row) - set1(to.top[g])) * set1(LOG2E));
        to.sum[g] += sum(weight);
        store(row, weight);
    }
    weigh<T, G>(to.values, weights, a.values + slot * a.value_dim, n, a.value_dim, padded_value);
}

// A tile for all heads of a KV head (whose widened queries are given), four at a time.
template <class T>
inline void attend_group(const Decode<T>& a, int r, int kv_head, int64_t t, size_t slot, int n,
                         const float* queries, int padded_key, int padded_value, Partial to,
                         float* kept_logits) {
    const int group = a.group();
    for (int g = 0; g < group; g += 4) {
        const Partial part{to.values + g * padded_value, to.top + g, to.sum + g};
        const float* wide = queries + g * padded_key;
#define HEADS(G)                                                                              \
    attend_tile<T, G>(a, r, kv_head * group + g, t, slot, n, wide, padded_key, padded_value, part, \
                      kept_logits)
        switch (std::min(4, group - g)) {
            case 1: HEADS(1); break;
            case 2: HEADS(2); break;
            case 3: HEADS(3); break;
            default: HEADS(4); break;
        }
#undef HEADS
    }
}

// Have memory bring `count` numbers close; pages lie anywhere, so no hardware can foresee them.
template <class T>
inline void fetch(const T* from, int count) {
    for (int i = 0; i < count; i += int(64 / sizeof(T))) __builtin_prefetch(from + i, 0, 2);
}

// How the work is cut: every KV head's entries into spans, so that a long head is shared by all
// cores.  Spans go by a head's own length alone, so a request's outputs do not depend on who else
// is there.
struct Cut {
    int spans, size;  // size: entries of a span
};
constexpr int SPAN = 256;

// To be called by all threads of a parallel region; `room` comes from decode_room.
template <class T>
inline void decode(const Decode<T>& a, Cut cut, float* room, float* kept_logits) {
    const int group = a.group(), spans = cut.spans;
    const int padded_key = int(round_up(a.key_dim, LANES)), padded_value = int(round_up(a.value_dim, LANES));
    const size_t each = size_t(group) * (padded_value + 2);
    const int tasks = a.requests * a.kv_heads * spans;
#pragma omp for schedule(dynamic, 1)
    for (int task = 0; task < tasks; ++task) {
        static thread_local Scratch widened;
        const int span = task % spans, head = task / spans, r = head / a.kv_heads;
        const int kv_head = head % a.kv_heads;
        const int64_t begin = int64_t(span) * cut.size;
        const int64_t end = std::min(a.lengths[head], begin + cut.size);
        if (begin >= end) continue;
        float* queries = widened.get<float>(size_t(group) * padded_key);
        if (!takes_pairs<T>(a.key_dim))
            widen(queries, a.queries + size_t(r * a.heads + kv_head * group) * a.key_dim, group,
                  a.key_dim, padded_key);
        float* values = room + size_t(task) * each;
        float* top = values + size_t(group) * padded_value;
        const Partial mine{values, top, top + group};
        std::fill(mine.values, mine.top, 0.f);
        std::fill(mine.top, mine.sum, NEVER);
        std::fill(mine.sum, mine.sum + group, 0.f);
        const int32_t* table = a.table + size_t(head) * a.width;
        for (int64_t t = begin; t < end; t += a.page) {
            const size_t page = table[t / a.page];
            const size_t next = t + a.page < end ? table[t / a.page + 1] : page;
            fetch(a.keys + next * a.page * a.key_dim, a.page * a.key_dim);
            fetch(a.values + next * a.page * a.value_dim, a.page * a.value_dim);
            for (int off = 0; off < a.page && t + off < end; off += LANES) {
                const int n = int(std::min<int64_t>({LANES, a.page - off, end - t - off}));
                attend_group(a, r, kv_head, t + off, page * a.page + off, n, queries, padded_key,
                             padded_value, mine, kept_logits);
            }
        }
    }
#pragma omp for schedule(static)
    for (int task = 0; task < a.requests * a.heads; ++task) {
        const int head = task % a.heads, r = task / a.heads, kv_head = head / group, g = head % group;
        const float* first = room + size_t(r * a.kv_heads + kv_head) * spans * each;
        const size_t top_at = size_t(group) * padded_value + g, sum_at = top_at + group;
        const int used = int(ceil_div(a.lengths[r * a.kv_heads + kv_head], cut.size));
        float best = NEVER, total = 0.f;
        for (int s = 0; s < used; ++s) best = std::max(best, first[s * each + top_at]);
        for (int s = 0; s < used; ++s) {
            const float held = first[s * each + top_at];
            if (held != NEVER) total += first[s * each + sum_at] * std::exp(held - best);
        }
        if (a.lse) a.lse[task] = best + std::log(total);
        T* out = a.out + size_t(task) * a.value_dim;
        const bool mixed = is_interleaved<T>(a.value_dim);
        for (int d = 0; d < a.value_dim; d += LANES) {
            Vec acc = set1(0.f);
            for (int s = 0; s < used; ++s) {
                const float held = first[s * each + top_at];
                if (held == NEVER) continue;
                const Vec share = set1(std::exp(held - best) / total);
                const float* from = first + s * each + size_t(g) * padded_value;
                acc = fma(mixed ? in_order(from + d / 32 * 32, d / 16 % 2) : load(from + d), share, acc);
            }
            store_at(out, acc, d, a.value_dim);
        }
    }
    if (!a.probs) return;
#pragma omp for schedule(static)
    for (int task = 0; task < a.requests * a.kv_heads; ++task) {
        const int kv_head = task % a.kv_heads, r = task / a.kv_heads;
        float* probs = a.probs + size_t(task) * a.longest;
        const size_t head = size_t(r) * a.heads + kv_head * group;
        std::fill(probs, probs + a.longest, 0.f);
        for (int g = 0; g < group; ++g)
            for (int64_t t = 0; t < a.lengths[task]; ++t)
                probs[t] += std::exp(kept_logits[(head + g) * a.longest + t] - a.lse[head + g]);
    }
}

// The cut, and the floats of working room it needs.
template <class T>
inline Cut decode_cut(const Decode<T>& a) {
    const int size = int(round_up(SPAN, a.page));
    return {int(std::max<int64_t>(1, ceil_div(a.longest, size))), size};
}
template <class T>
inline size_t decode_room(const Decode<T>& a, Cut cut) {
    const size_t each = size_t(a.group()) * (round_up(a.value_dim, LANES) + 2);
    return size_t(a.requests) * a.kv_heads * cut.spans * each;
}
