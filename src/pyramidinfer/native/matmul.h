// Matrix products on packed operands: the inner loop of linears, prefill attention and window
// scores.
//
// A *unit* is the operand of one multiplication: a pair of bf16 numbers, or one float.
// A packed operand is a list of panels of COLUMNS = WIDE x LANES columns: [panel][units][COLUMNS].
#pragma once
#include <omp.h>

#include <type_traits>

#include "lowrank.h"
#include "simd.h"

constexpr int COLUMNS = WIDE * LANES;
constexpr int ROWS = LANES == 16 ? 6 : 4;  // rows of a tile, so that accumulators fill the registers

struct FloatUnit {
    static constexpr int DEPTH = 1;  // numbers in a unit
    using Number = float;
    static inline void mul(Vec& acc, const uint32_t* b, uint32_t a) {
        acc = fma(load((const float*)b), set1(of_bits(a)), acc);
    }
};

struct PairUnit {
    static constexpr int DEPTH = 2;
    using Number = bf16;
    static inline void mul(Vec& acc, const uint32_t* b, uint32_t a) {
#ifdef PAIRS
        acc.v = add_pairs(acc.v, _mm512_loadu_si512(b), _mm512_set1_epi32(int(a)));
#else
        acc = fma(seconds(b), second(a), fma(firsts(b), first(a), acc));
#endif
    }
};

// The unit of a type in linears, whose weights are packed once.
template <class T>
using LinearUnit = std::conditional_t<std::is_same_v<T, bf16>, PairUnit, FloatUnit>;

// The unit of a type in attention, whose operands are packed for each call.
template <class T>
struct UnitOf {
    using type = FloatUnit;
};
#ifdef PAIRS
template <>
struct UnitOf<bf16> {
    using type = PairUnit;
};
#endif

// acc[rows][W] += a[rows][units] · the first W * LANES columns of b[units][COLUMNS].  Prefetches
// `next`, `lines` cache lines of 64 bytes every four units.
template <class U, int R, int W>
inline void tile(Vec (&acc)[R][W], const uint32_t* a, size_t lda, const uint32_t* b, int units,
                 const char*& next, int lines) {
    int u = 0;
    for (; u + 4 <= units; u += 4) {
        for (int i = 0; i < lines; ++i, next += 64) __builtin_prefetch(next, 0, 2);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j, b += COLUMNS) {
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int w = 0; w < W; ++w)
                    U::mul(acc[r][w], b + w * LANES, a[r * lda + u + j]);
        }
    }
    for (; u < units; ++u, b += COLUMNS)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int w = 0; w < W; ++w) U::mul(acc[r][w], b + w * LANES, a[r * lda + u]);
}

// c[rows][COLUMNS] (= or +=) a · b for one panel, rows 1..ROWS.
template <class U, int R>
inline void tile_to(float* c, size_t ldc, bool add, const uint32_t* a, size_t lda,
                    const uint32_t* b, int units) {
    Vec acc[R][WIDE];
    for (int r = 0; r < R; ++r)
        for (int w = 0; w < WIDE; ++w) acc[r][w] = add ? load(c + r * ldc + w * LANES) : set1(0.f);
    const char* none = nullptr;
    tile<U, R>(acc, a, lda, b, units, none, 0);
    for (int r = 0; r < R; ++r)
        for (int w = 0; w < WIDE; ++w) store(c + r * ldc + w * LANES, acc[r][w]);
}

template <class U>
inline void panel_product(float* c, size_t ldc, bool add, const uint32_t* a, size_t lda, int rows,
                          const uint32_t* b, int units) {
    int r = 0;
    for (; r + ROWS <= rows; r += ROWS)
        tile_to<U, ROWS>(c + r * ldc, ldc, add, a + r * lda, lda, b, units);
    c += r * ldc;
    a += r * lda;
    switch (rows - r) {
        case 1: return tile_to<U, 1>(c, ldc, add, a, lda, b, units);
        case 2: return tile_to<U, 2>(c, ldc, add, a, lda, b, units);
        case 3: return tile_to<U, 3>(c, ldc, add, a, lda, b, units);
        case 4: return tile_to<U, ROWS == 6 ? 4 : 1>(c, ldc, add, a, lda, b, units);
        case 5: return tile_to<U, ROWS == 6 ? 5 : 1>(c, ldc, add, a, lda, b, units);
        default: return;
    }
}

// --- packing ------------------------------------------------------------------------------------

// Pack columns first..first+COLUMNS of an operand whose column c is the contiguous vector column(c)
// of `depth` numbers; out [units][COLUMNS].  Missing columns, and the partner of a last odd number,
// are zero.
template <class U, class T, class Column>
inline void pack_columns(uint32_t* out, int64_t first, int64_t count, int depth, Column column) {
    const int units = int(ceil_div(depth, U::DEPTH));
    auto* numbers = reinterpret_cast<typename U::Number*>(out);
    for (int c = 0; c < COLUMNS; ++c) {
        const T* from = first + c < count ? column(first + c) : nullptr;
        for (int d = 0; d < units * U::DEPTH; ++d) {
            auto& to = numbers[(size_t(d / U::DEPTH) * COLUMNS + c) * U::DEPTH + d % U::DEPTH];
            if (from && d < depth) from_float(to_float(from[d]), to);
            else from_float(0.f, to);
        }
    }
}

#ifdef PAIRS
inline void transpose16(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 2; ++j) {
            r[4 * i + 2 * j] = _mm512_unpacklo_epi64(t[4 * i + j], t[4 * i + j + 2]);
            r[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(t[4 * i + j], t[4 * i + j + 2]);
        }
    for (int j = 0; j < 4; ++j) {
        t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
        t[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
        t[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    }
    for (int j = 0; j < 4; ++j) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
        r[4 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
        r[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd);
    }
}

// Pack keys as columns: 16 keys and 32 numbers of each at a time.
template <class Column>
inline void pack_pairs(uint32_t* out, int64_t first, int64_t count, int depth, Column column) {
    if (depth % 32) return pack_columns<PairUnit, bf16>(out, first, count, depth, column);
    for (int c = 0; c < COLUMNS; c += 16)
        for (int d = 0; d < depth; d += 32) {
            __m512i r[16];
            for (int i = 0; i < 16; ++i)
                r[i] = first + c + i < count ? _mm512_loadu_si512(column(first + c + i) + d)
                                             : _mm512_setzero_si512();
            transpose16(r);
            for (int i = 0; i < 16; ++i)
                _mm512_storeu_si512(out + size_t(d / 2 + i) * COLUMNS + c, r[i]);
        }
}
#endif

template <class T, class Column>
inline void pack_keys(uint32_t* out, int64_t first, int64_t count, int depth, Column column) {
#ifdef PAIRS
    if constexpr (sizeof(T) == 2 && UnitOf<T>::type::DEPTH == 2)
        return pack_pairs(out, first, count, depth, column);
#endif
    pack_columns<typename UnitOf<T>::type, T>(out, first, count, depth, column);
}

// Pack the weights of a linear as columns.
template <class T, class Column>
inline void pack_weights(uint32_t* out, int64_t first, int64_t count, int depth, Column column) {
    using U = LinearUnit<T>;
    if constexpr (std::is_same_v<U, typename UnitOf<T>::type>)
        return pack_keys<T>(out, first, count, depth, column);
    pack_columns<U, T>(out, first, count, depth, column);
}

// Pack rows (values) as units: entries from `first` on, columns at..at+COLUMNS; out [units][COLUMNS].
template <class T, class Row>
inline void pack_rows(uint32_t* out, int64_t first, int64_t end, int units, int at, int size,
                      Row row) {
    using U = typename UnitOf<T>::type;
    for (int u = 0; u < units; ++u, out += COLUMNS) {
        const int64_t entry = first + int64_t(u) * U::DEPTH;
        const T* one = entry < end ? row(entry) : nullptr;
        const T* two = U::DEPTH == 2 && entry + 1 < end ? row(entry + 1) : nullptr;
#ifdef PAIRS
        if constexpr (U::DEPTH == 2) {
            for (int c = 0; c < COLUMNS; c += 16) {
                auto half = [&](const T* from) {
                    if (!from || at + c >= size) return _mm512_setzero_si512();
                    T padded[16] = {};
                    std::memcpy(padded, from + at + c, sizeof(T) * std::min(16, size - at - c));
                    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)padded));
                };
                const __m512i high = _mm512_slli_epi32(half(two), 16);
                _mm512_storeu_si512(out + c, _mm512_or_si512(half(one), high));
            }
            continue;
        }
#endif
        for (int c = 0; c < COLUMNS; c += LANES) {
            const bool there = one && at + c < size;
            store((float*)out + c, there ? load_at(one + at, c, size - at) : set1(0.f));
        }
        (void)two;
    }
}

// Pack numbers as units of the left operand: [units]; one more unit is overwritten.
template <class T>
inline void pack_left(uint32_t* out, const T* from, int depth) {
    using U = typename UnitOf<T>::type;
    if constexpr (U::DEPTH == 2) {
        out[depth / 2] = 0;
        std::memcpy(out, from, size_t(depth) * sizeof(T));
        return;
    }
    for (int d = 0; d < depth; d += LANES) store_at((float*)out, load_at(from, d, depth), d, depth);
}

// --- linears ------------------------------------------------------------------------------------

// GELU: GATED with GELU in place of SiLU.
enum Epilogue { PLAIN = 0, ADD = 1, GATED = 2, GELU = 3 };

// How weights are stored: as numbers of the layer's dtype, or as codes of 8 or 4 bits (weights.h),
// with a minimum, two scales per group, or 32-bit scales if these bits are set.
enum Format { NUMBERS = 0, CODES = 1, FOUR = 2, LEAST = 4, FLOATS = 8, HALVES = 16 };

// A linear's weights [columns][depth] packed for `linear`, with an optional bias [columns].
// GATED: every panel holds COLUMNS/2 gate columns, then the up columns that belong to them.
struct Linear {
    const uint32_t* packed;
    const float* bias;
    int64_t columns, depth, format;
};

inline Vec silu(Vec x) { return x / (set1(1.f) + exp2(x * set1(-LOG2E))); }

// The tanh approximation of GELU: x · sigmoid(2u), u = sqrt(2 / pi) · (x + 0.044715 x³).
inline Vec gelu(Vec x) {
    const Vec u = fma(x * x * x, set1(0.044715f), x) * set1(0.79788456080286536f);
    return x / (set1(1.f) + exp2(u * set1(-2.f * LOG2E)));
}

// A value rounded to the layer's dtype.
template <class T>
inline Vec rounded(Vec x) {
    T as[LANES];
    store(as, x);
    return load(as);
}

template <class T, int R>
inline void finish(Vec (&acc)[R][WIDE], const Linear& w, Epilogue how, const T* residual, T* out,
                   int64_t row, int64_t panel, const Low& low) {
    const int64_t first = panel * COLUMNS;
    if (low.who) add_low<T>(acc, low, row, panel);
    for (int r = 0; r < R; ++r) {
        if (w.bias)
            for (int i = 0; i < WIDE; ++i) acc[r][i] = acc[r][i] + load(w.bias + first + i * LANES);
        if (how == GATED || how == GELU) {
            const int64_t size = w.columns / 2;
            for (int i = 0; i < WIDE / 2; ++i) {
                const int64_t at = panel * (COLUMNS / 2) + i * LANES;
                if (at >= size) continue;
                const Vec in = rounded<T>(acc[r][i]), gate = rounded<T>(how == GELU ? gelu(in) : silu(in));
                store_at(out + (row + r) * size, gate * rounded<T>(acc[r][i + WIDE / 2]), int(at),
                         int(size));
            }
            continue;
        }
        for (int i = 0; i < WIDE; ++i) {
            const int64_t at = first + i * LANES;
            if (at >= w.columns) continue;
            Vec x = acc[r][i];
            if (how == ADD)
                x = rounded<T>(x) + load_at(residual + (row + r) * w.columns, int(at), int(w.columns));
            store_at(out + (row + r) * w.columns, x, int(at), int(w.columns));
        }
    }
}

template <class T, int R>
inline void linear_tile(const T* a, const Linear& w, Epilogue how, const T* residual, T* out,
                        int64_t row, int64_t panel, const Low& low, const char*& next, int lines) {
    using U = LinearUnit<T>;
    const int units = int(ceil_div(w.depth, U::DEPTH));
    Vec acc[R][WIDE];
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < WIDE; ++i) acc[r][i] = set1(0.f);
    tile<U, R>(acc, reinterpret_cast<const uint32_t*>(a + row * w.depth), size_t(units),
               w.packed + size_t(panel) * units * COLUMNS, units, next, lines);
    finish<T, R>(acc, w, how, residual, out, row, panel, low);
}

template <int N>
using Count = std::integral_constant<int, N>;

// Call f(R, row, panel, next, lines) for every tile of R rows (a constant of 1..ROWS) and every panel,
// divided among the threads of a parallel region.  Each tile prefetches a part of the next panel:
// `lines` cache lines of 64 bytes from `next` on, for every `step` bytes of the panel.
template <class F>
inline void over_tiles(int64_t rows, const Linear& w, size_t panel_size, size_t step, F f) {
    const int64_t panels = ceil_div(w.columns, COLUMNS), block = 32 * ROWS;
    const int64_t blocks = ceil_div(rows, block);
    const int64_t tiles = std::max<int64_t>(1, ceil_div(std::min(rows, block), ROWS));
    const int lines = int(ceil_div(int64_t(step) / 64, tiles));
#pragma omp for schedule(static)
    for (int64_t task = 0; task < panels * blocks; ++task) {
        const int64_t panel = task / blocks, first = task % blocks * block;
        const int64_t end = std::min(rows, first + block);
        const bool is_last = first + block >= rows && panel + 1 < panels;
        const char* next = (const char*)w.packed + (panel + 1) * panel_size;
        const char* stop = next + panel_size;
        const auto more = [&] { return is_last && next < stop ? lines : 0; };
        int64_t row = first;
        for (; row + ROWS <= end; row += ROWS) f(Count<ROWS>{}, row, panel, next, more());
        switch (end - row) {
            case 1: f(Count<1>{}, row, panel, next, more()); break;
            case 2: f(Count<2>{}, row, panel, next, more()); break;
            case 3: f(Count<3>{}, row, panel, next, more()); break;
            case 4: f(Count<ROWS == 6 ? 4 : 1>{}, row, panel, next, more()); break;
            case 5: f(Count<ROWS == 6 ? 5 : 1>{}, row, panel, next, more()); break;
        }
    }
}

// out [rows, columns (or half of them, GATED)] = a [rows, depth] · weights.  `depth` is a multiple
// of a unit's.  All threads of a parallel region must call it (or a single thread).
template <class T>
inline void number_linear(const T* a, int64_t rows, const Linear& w, Epilogue how,
                          const T* residual, T* out, const Low& low) {
    const size_t panel_size = size_t(w.depth / LinearUnit<T>::DEPTH) * COLUMNS * 4;
    over_tiles(rows, w, panel_size, 4 * COLUMNS * 4,
               [&](auto count, int64_t row, int64_t panel, const char*& next, int lines) {
                   linear_tile<T, count.value>(a, w, how, residual, out, row, panel, low, next, lines);
               });
}
