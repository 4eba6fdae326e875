// Products of a few queries with a tile of keys, and sums of its values, for decoding.
#pragma once
#include "matmul.h"
#include "simd.h"

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

// Rows x[0..16) of 16 numbers of 32 bits, turned: x[i] becomes column i.
inline void transpose(__m512i* x) {
    __m512i y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + 2 + j]);
            x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + 2 + j]);
        }
    for (int i = 0; i < 4; ++i) {  // quarters of four rows that are four apart
        const __m512i a = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88);
        const __m512i b = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
        y[i] = _mm512_shuffle_i32x4(a, c, 0x88), y[8 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
        y[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88), y[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    for (int i = 0; i < 16; ++i) x[i] = y[i];
}

// n <= 16 keys of 32 * STEPS numbers with their pairs one below the other: out [16 * STEPS][16].
template <int STEPS>
inline void pairs_in_columns(uint32_t* out, const bf16* keys, int n) {
    for (int s = 0; s < STEPS; ++s) {
        __m512i x[16];
        for (int e = 0; e < 16; ++e)
            x[e] = _mm512_loadu_si512(keys + size_t(e < n ? e : 0) * STEPS * 32 + s * 32);
        transpose(x);
        for (int p = 0; p < 16; ++p) _mm512_storeu_si512(out + (s * 16 + p) * 16, x[p]);
    }
}

// products_of_pairs with such keys, for G queries that lie anywhere: the same sums in the same order,
// without summing across a register.
template <int G, int STEPS>
inline void products_of_columns(float* const* out, const bf16* const* raw, const uint32_t* keys) {
    Vec total[G], before[G];
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
        Vec acc[G][4];
        for (int i = 0; i < 4; ++i) {
            for (int g = 0; g < G; ++g) acc[g][i] = set1(0.f);
            for (int s = 0; s < STEPS; ++s) {
                const int pair = s * 16 + part * 4 + i;
                const __m512i key = _mm512_loadu_si512(keys + pair * 16);
                for (int g = 0; g < G; ++g) {
                    int32_t number;
                    std::memcpy(&number, raw[g] + 2 * pair, sizeof(number));
                    acc[g][i].v = add_pairs(acc[g][i].v, key, _mm512_set1_epi32(number));
                }
            }
        }
        for (int g = 0; g < G; ++g) {
            const Vec sum = (acc[g][0] + acc[g][2]) + (acc[g][1] + acc[g][3]);
            if (part % 2 == 0) before[g] = sum;
            else if (part == 1) total[g] = before[g] + sum;
            else total[g] = total[g] + (before[g] + sum);
        }
    }
    for (int g = 0; g < G; ++g) store(out[g], total[g]);
}

#endif

template <class T, int G>
inline void any_products(float* out, const float* queries, const T* raw, const T* keys, int n,
                         int size, int padded) {
#ifdef PAIRS
    if constexpr (UnitOf<T>::type::DEPTH == 2) {
        switch (size) {
            case 64: return products_of_pairs<G, 2>(out, raw, keys, n);
            case 96: return products_of_pairs<G, 3>(out, raw, keys, n);
            case 128: return products_of_pairs<G, 4>(out, raw, keys, n);
        }
    }
#endif
    products<T, G>(out, queries, raw, keys, n, size, padded);
}

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
inline void weigh_pairs(float* const* acc, const float* const* weights, const bf16* values, int n,
                        int size) {
    alignas(64) uint32_t pair[G][LANES / 2];
    for (int g = 0; g < G; ++g) store((bf16*)pair[g], load(weights[g]));
    for (int d = 0; d < size; d += 32) {
        Vec low[G], high[G];
        for (int g = 0; g < G; ++g) {
            low[g] = load(acc[g] + d);
            high[g] = load(acc[g] + d + 16);
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
            store(acc[g] + d, low[g]);
            store(acc[g] + d + 16, high[g]);
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
        if (is_interleaved<T>(size)) {
            float* to[G];
            const float* by[G];
            for (int g = 0; g < G; ++g) to[g] = acc + g * padded, by[g] = weights + g * LANES;
            return weigh_pairs<G>(to, by, values, n, size);
        }
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
