// Blocks of entries that are multiplied as floats, and the sources of their numbers.  Each kind of
// block has these methods, for G of the query heads that attend to it, from head h on:
//   enter(block, next): prepare a block and prefetch the next one;
//   products<G>(rows, h): write the products with its entries to rows [G][ROW];
//   weigh<G>(acc, rows, below, n): acc [G][padded V] += weights rows [G][ROW] · values, over the first
//     n[i] entries of tile i; the largest weight of head g is e^below[g].
#pragma once
#include "spans.h"

// Call f(std::integral_constant<int, count>), for a count of 1 to 4.
template <class F>
inline void with_count(int count, F f) {
    switch (count) {
        case 1: return f(std::integral_constant<int, 1>());
        case 2: return f(std::integral_constant<int, 2>());
        case 3: return f(std::integral_constant<int, 3>());
        default: return f(std::integral_constant<int, 4>());
    }
}

// Keys and values of a block's tiles as numbers N, and the addresses of those of the next block.
template <class N>
struct Numbers {
    const N *keys[MOST_TILES], *values[MOST_TILES];
    const char *next_keys[MOST_TILES], *next_values[MOST_TILES];
};

// Entries that are read where they are stored.
template <class N>
struct Lying {
    const N *keys, *values;
    int key_dim, value_dim;

    void enter(const Block& block, const Block& next, Numbers<N>& out) const {
        for (int i = 0; i < block.count; ++i) {
            const size_t slot = block.tiles[i].slot, ahead = i < next.count ? next.tiles[i].slot : slot;
            out.keys[i] = keys + slot * key_dim, out.values[i] = values + slot * value_dim;
            out.next_keys[i] = (const char*)(keys + ahead * key_dim);
            out.next_values[i] = (const char*)(values + ahead * value_dim);
        }
    }
};

// Entries stored by a codec, decoded but still rotated.  room [MOST_TILES * LANES][D + V].
template <class N>
struct Decoded {
    const uint8_t *keys, *values;
    const fp16 *key_scales, *value_scales;
    int codec, key_dim, value_dim;
    N* room;

    void enter(const Block& block, const Block& next, Numbers<N>& out) const {
        const auto decode = [&](const uint8_t* codes, const fp16* scales, int size, const Tile& tile, N* to) {
            const int64_t row = code_bytes(codec, size), groups = size / group_size(size);
            for (int e = 0; e < tile.n; ++e)
                decode_rotated(codec, codes + (tile.slot + e) * row, scales + (tile.slot + e) * groups,
                               size, to + e * size);
        };
        for (int i = 0; i < next.count; ++i) {
            fetch(keys + next.tiles[i].slot * code_bytes(codec, key_dim), LANES * code_bytes(codec, key_dim));
            fetch(values + next.tiles[i].slot * code_bytes(codec, value_dim),
                  LANES * code_bytes(codec, value_dim));
        }
        for (int i = 0; i < block.count; ++i) {
            N* own = room + size_t(i) * LANES * (key_dim + value_dim);
            N* own_values = own + LANES * key_dim;
            decode(keys, key_scales, key_dim, block.tiles[i], own);
            decode(values, value_scales, value_dim, block.tiles[i], own_values);
            out.keys[i] = own, out.values[i] = own_values;
            out.next_keys[i] = (const char*)own, out.next_values[i] = (const char*)own_values;
        }
    }
};

// Queries of one group as floats: [G][padded D].
template <class T>
inline void widen(float* out, const T* from, int rows, int size, int padded) {
    for (int r = 0; r < rows; ++r)
        for (int d = 0; d < padded; d += LANES)
            store(out + r * padded + d, d < size ? load_at(from + r * size, d, size) : set1(0.f));
}

// out[g][0..n): products of G queries with n <= LANES keys, rows `size` apart.
template <class T, int G>
inline void products(float* const* out, const float* queries, const T* keys, int n, int size, int padded) {
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
    for (int g = 0; g < G; ++g) store(out[g], sum_each(row[g]));
}

// acc[g][value_dim] += weights[g][0..n) · values, for G heads.
template <class T, int G>
inline void weigh(float* const* acc, const float* const* weights, const T* values, int n, int size) {
    int d = 0;
    for (; d + 4 * LANES <= size; d += 4 * LANES) {
        Vec sum[G][4];
        for (int g = 0; g < G; ++g)
            for (int i = 0; i < 4; ++i) sum[g][i] = load(acc[g] + d + i * LANES);
        for (int e = 0; e < n; ++e) {
            Vec value[4];
            for (int i = 0; i < 4; ++i) value[i] = load(values + size_t(e) * size + d + i * LANES);
            for (int g = 0; g < G; ++g) {
                const Vec weight = set1(weights[g][e]);
                for (int i = 0; i < 4; ++i) sum[g][i] = fma(value[i], weight, sum[g][i]);
            }
        }
        for (int g = 0; g < G; ++g)
            for (int i = 0; i < 4; ++i) store(acc[g] + d + i * LANES, sum[g][i]);
    }
    for (; d < size; d += LANES)
        for (int e = 0; e < n; ++e) {
            const Vec value = load_at(values + size_t(e) * size, d, size);
            for (int g = 0; g < G; ++g) {
                float* to = acc[g] + d;
                store(to, fma(value, set1(weights[g][e]), load(to)));
            }
        }
}

// A tile at a time, multiplied as floats; queries [heads][padded D].
template <class N, class Source>
struct FloatBlock {
    static constexpr int TILES = 1;
    Shape shape;
    Source source;
    const float* queries;
    Numbers<N> at;
    int n;

    void enter(const Block& block, const Block& next) {
        source.enter(block, next, at);
        n = block.tiles[0].n;
        fetch(at.next_keys[0], n * shape.key_dim * sizeof(N));
        fetch(at.next_values[0], n * shape.value_dim * sizeof(N));
    }
    template <int G>
    void products(float* rows, int h) const {
        float* out[G];
        for (int g = 0; g < G; ++g) out[g] = rows + g * ROW;
        ::products<N, G>(out, queries + size_t(h) * shape.padded_key, at.keys[0], n, shape.key_dim,
                         shape.padded_key);
    }
    template <int G>
    void weigh(float* const* acc, const float* const* rows, const float*, const int* seen) const {
        ::weigh<N, G>(acc, rows, at.values[0], seen[0], shape.value_dim);
    }
};
