// Blocks of entries in bf16 whose keys and values are multiplied in pairs.
#pragma once
#include "matmul.h"
#include "products.h"

// Whether entries are multiplied in pairs: the remainder of a row that is no multiple of 32 would
// cost more than pairs save.
template <class T>
inline bool takes_pairs(int key_dim, int value_dim) {
    return UnitOf<T>::type::DEPTH == 2 && key_dim % 32 == 0 && value_dim % 32 == 0;
}

#ifdef PAIRS
// Transpose the 32-bit numbers of four rows, each with four quarters of four numbers: part i has the
// i-th number of every quarter of all rows.
inline void turn_quarters(const __m512i* rows, __m512i* parts) {
    const __m512i a = _mm512_unpacklo_epi32(rows[0], rows[1]), b = _mm512_unpackhi_epi32(rows[0], rows[1]);
    const __m512i c = _mm512_unpacklo_epi32(rows[2], rows[3]), d = _mm512_unpackhi_epi32(rows[2], rows[3]);
    parts[0] = _mm512_unpacklo_epi64(a, c), parts[1] = _mm512_unpackhi_epi64(a, c);
    parts[2] = _mm512_unpacklo_epi64(b, d), parts[3] = _mm512_unpackhi_epi64(b, d);
}
// The matching operand of these parts: part i has the i-th number of every quarter, four times.
inline void spread_quarters(const __m512i row, __m512i* parts) {
    parts[0] = _mm512_shuffle_epi32(row, _MM_PERM_AAAA), parts[1] = _mm512_shuffle_epi32(row, _MM_PERM_BBBB);
    parts[2] = _mm512_shuffle_epi32(row, _MM_PERM_CCCC), parts[3] = _mm512_shuffle_epi32(row, _MM_PERM_DDDD);
}
// Sums over the quarters of four vectors, one vector after the other.
inline Vec sum_quarters(const Vec* x) {
    const auto fold = [](__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return {fold(fold(x[0].v, x[1].v), fold(x[2].v, x[3].v))};
}

// Sums of values are kept in the order of two interleaved rows of pairs: of every 32 numbers, the
// groups of four 0, 2, 4 and 6 come first.
inline Vec in_order(const float* block, int half) {  // numbers from 16 * half on, of a block of 32
    const __m512i index = half ? _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28,
                                                   29, 30, 31)
                               : _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21,
                                                   22, 23);
    return {_mm512_permutex2var_ps(load(block).v, index, load(block + 16).v)};
}

// queries [heads][D / 32][4 parts][16 pairs].  The first heads prefetch the same cache lines of the
// next block.
template <class Source>
struct PairBlock {
    static constexpr int TILES = 2;
    Shape shape;
    Source source;
    uint32_t* queries;
    Block block;
    Numbers<bf16> at;
    bool fetches;

    // Set query h of the block.
    void set(int h, const bf16* query) {
        for (int s = 0; s < shape.key_dim / 32; ++s) {
            __m512i parts[4];
            spread_quarters(_mm512_loadu_si512(query + s * 32), parts);
            for (int p = 0; p < 4; ++p)
                _mm512_storeu_si512(queries + (size_t(h) * (shape.key_dim / 32) + s) * 64 + p * 16, parts[p]);
        }
    }
    void enter(const Block& now, const Block& next) {
        block = now, fetches = true;
        source.enter(now, next, at);
    }
    template <int G>
    void products(float* rows, int h) const {
        for (int i = 0; i < block.count; ++i) {
            const bool whole = block.tiles[i].n == LANES;
            if (h) whole ? tile<G, true, false>(rows, h, i) : tile<G, false, false>(rows, h, i);
            else whole ? tile<G, true, true>(rows, h, i) : tile<G, false, true>(rows, h, i);
        }
    }
    template <int G, bool WHOLE, bool FETCH>
    void tile(float* rows, int h, int i) const {
        constexpr int AT_ONCE = G > 2 ? 2 : 4;  // groups of four entries, as many as fit into registers
        const int steps = shape.key_dim / 32, n = block.tiles[i].n;
        const uint32_t* query = queries + size_t(h) * steps * 64;
        Vec found[G][4];
        for (int q = 0; q < 4; q += AT_ONCE) {
            Vec acc[G][AT_ONCE];
            for (int g = 0; g < G; ++g)
                for (int j = 0; j < AT_ONCE; ++j) acc[g][j] = set1(0.f);
            for (int s = 0; s < steps; ++s) {
                __m512i parts[AT_ONCE][4];
                for (int j = 0; j < AT_ONCE; ++j) {
                    __m512i four[4];
                    for (int k = 0; k < 4; ++k) {
                        const int entry = (q + j) * 4 + k;
                        const size_t from = size_t(WHOLE || entry < n ? entry : 0) * shape.key_dim + s * 32;
                        four[k] = _mm512_loadu_si512(at.keys[i] + from);
                    }
                    if (FETCH) fetch(at.next_keys[i] + (q * steps + s * AT_ONCE + j) * 256, 256);
                    turn_quarters(four, parts[j]);
                }
                for (int g = 0; g < G; ++g)
                    for (int p = 0; p < 4; ++p) {
                        const __m512i part = _mm512_loadu_si512(query + (g * steps + s) * 64 + p * 16);
                        for (int j = 0; j < AT_ONCE; ++j)
                            acc[g][j].v = add_pairs(acc[g][j].v, parts[j][p], part);
                    }
            }
            for (int g = 0; g < G; ++g)
                for (int j = 0; j < AT_ONCE; ++j) found[g][q + j] = acc[g][j];
        }
        for (int g = 0; g < G; ++g) store(rows + g * ROW + i * LANES, sum_quarters(found[g]));
    }
    // Weights are rounded to bf16, and two entries are read at a time.
    template <int G>
    void weigh(float* const* acc, const float* const* rows, const float*, const int* n) {
        alignas(64) uint32_t pair[G][ROW / 2];
        for (int g = 0; g < G; ++g)
            for (int i = 0; i < block.count; ++i)
                store((bf16*)(pair[g] + i * LANES / 2), load(rows[g] + i * LANES));
        if (fetches) all_columns<G, true>(acc, pair, n);
        else all_columns<G, false>(acc, pair, n);
        fetches = false;
    }
    template <int G, bool FETCH>
    void all_columns(float* const* acc, const uint32_t (*pair)[ROW / 2], const int* n) const {
        int d = 0;
        for (; d + 64 <= shape.value_dim; d += 64) columns<G, true, FETCH>(acc, pair, n, d);
        if (d < shape.value_dim) columns<G, false, FETCH>(acc, pair, n, d);
    }
    // Sums of the value dimensions d..d + 32, or d..d + 64 if IS_WIDE.
    template <int G, bool IS_WIDE, bool FETCH>
    void columns(float* const* acc, const uint32_t (*pair)[ROW / 2], const int* n, int d) const {
        const int size = shape.value_dim;
        __m512 a[G], b[G], c[G], e[G];
        for (int g = 0; g < G; ++g) {
            a[g] = load(acc[g] + d).v, b[g] = load(acc[g] + d + 16).v;
            if (IS_WIDE) c[g] = load(acc[g] + d + 32).v, e[g] = load(acc[g] + d + 48).v;
        }
        for (int i = 0; i < block.count; ++i)
            for (int entry = 0; entry < n[i]; entry += 2) {
                const size_t from = size_t(entry) * size + d;
                const bf16 *one = at.values[i] + from, *two = one + size;
                constexpr int LINES = IS_WIDE ? 4 : 2;
                if (FETCH) fetch(at.next_values[i] + d * 32 + entry * (LINES * 32), LINES * 64);
                const bool is_odd = entry + 1 == n[i];  // the memory after it may be uninitialized
                const uint32_t* weights = *pair + (i * LANES + entry) / 2;
                const auto load_two = [&](int at, __m512i& low, __m512i& high) {
                    const __m512i x = _mm512_loadu_si512(one + at);
                    const __m512i y = is_odd ? _mm512_setzero_si512() : _mm512_loadu_si512(two + at);
                    low = _mm512_unpacklo_epi16(x, y), high = _mm512_unpackhi_epi16(x, y);
                };
                __m512i p, q, r, s;
                load_two(0, p, q);
                if (IS_WIDE) load_two(32, r, s);
#pragma GCC unroll 4
                for (int g = 0; g < G; ++g) {
                    const __m512i weight = _mm512_set1_epi32(int(weights[g * (ROW / 2)]));
                    a[g] = add_pairs(a[g], p, weight), b[g] = add_pairs(b[g], q, weight);
                    if (IS_WIDE) c[g] = add_pairs(c[g], r, weight), e[g] = add_pairs(e[g], s, weight);
                }
            }
        for (int g = 0; g < G; ++g) {
            store(acc[g] + d, {a[g]}), store(acc[g] + d + 16, {b[g]});
            if (IS_WIDE) store(acc[g] + d + 32, {c[g]}), store(acc[g] + d + 48, {e[g]});
        }
    }
};
#else
inline Vec in_order(const float* block, int) { return load(block); }
#endif
