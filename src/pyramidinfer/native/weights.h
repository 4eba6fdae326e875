// Linears with quantized weights: codes of 8 or 4 bits with a scale for every GROUP inputs (or every
// half of a group), and a minimum if the format has one.  Input rows are quantized to 8 bits, each
// independently of the others, so that products are products of integers.  Sums over groups are sums
// of floats, in the order of the groups.
//
// A panel is [groups] of: scales [parts][COLUMNS]; minima [parts][COLUMNS], if the format has them;
// codes: bytes [units of four inputs][COLUMNS][4].  A byte with 4-bit codes has unit u in its low half
// and unit u + 4 in its high half.
#pragma once
#include "matmul.h"
#include "scratch.h"

constexpr int GROUP = 32;
constexpr int HALF = GROUP / 2;
constexpr int FOURS = GROUP / 4;       // units per group
constexpr int EACH_ITS_OWN = 16 << 10;  // up to this many numbers, every thread quantizes all rows itself
constexpr int MIDDLE = 128;            // the code of zero in 8-bit formats without a minimum

constexpr bool has_four_bits(int64_t format) { return format & FOUR; }
constexpr bool has_least(int64_t format) { return format & LEAST; }
constexpr int parts_of(int64_t format) { return format & HALVES ? 2 : 1; }  // scales per group

inline int64_t groups_of(int64_t depth) { return ceil_div(depth, GROUP); }
// Bytes of a group's scales, or of its minima; and of both, which precede its codes.
constexpr size_t scale_bytes(int64_t format) {
    return size_t(COLUMNS) * parts_of(format) * (format & FLOATS ? 4 : 2);
}
constexpr size_t head_bytes(int64_t format) {
    return scale_bytes(format) * (has_least(format) ? 2 : 1);
}
constexpr size_t group_bytes(int64_t format) {
    return head_bytes(format) + size_t(COLUMNS) * (has_four_bits(format) ? GROUP / 2 : GROUP);
}
inline size_t panel_bytes(int64_t format, int64_t depth) {
    return group_bytes(format) * size_t(groups_of(depth));
}

// Scales (or minima) of a group from index `at` on, converted from the stored type.
inline Vec load_scales(const uint8_t* from, int at, int64_t format) {
    if (format & FLOATS) return load(reinterpret_cast<const float*>(from) + at);
    return load(reinterpret_cast<const fp16*>(from) + at);
}
inline float scale_at(const uint8_t* from, int at, int64_t format) {
    if (format & FLOATS) return reinterpret_cast<const float*>(from)[at];
    return to_float(reinterpret_cast<const fp16*>(from)[at]);
}
inline void put_scale(uint8_t* to, int at, int64_t format, float scale) {
    if (format & FLOATS) reinterpret_cast<float*>(to)[at] = scale;
    else from_float(scale, reinterpret_cast<fp16*>(to)[at]);
}

// --- input rows ---------------------------------------------------------------------------------

// Rows as codes -127..127 with a scale for every group, ROWS of them next to each other, as a tile
// reads them: codes [tiles][groups][ROWS][GROUP], scales [tiles][groups][ROWS].  In addition, for each
// half of a group, [tiles][groups][2][ROWS], a multiple of the sum of its codes: `excess` cancels the
// offset MIDDLE of the weights' codes; formats with a minimum use `sums`, the sum times the scale.
// If the halves of a group share a scale, the first half has the sum of both.
struct CodedRows {
    int8_t* codes;
    float* scales;
    int32_t* excess;
    float* sums;  // the same memory as excess
};
inline size_t coded_bytes(int64_t rows, int64_t depth) {
    return size_t(round_up(rows, ROWS)) * size_t(groups_of(depth)) * (GROUP + 12);
}
inline CodedRows coded_rows(char* room, int64_t rows, int64_t depth) {
    const size_t groups = size_t(round_up(rows, ROWS)) * size_t(groups_of(depth));
    auto* scales = reinterpret_cast<float*>(room);
    auto* excess = reinterpret_cast<int32_t*>(scales + groups);
    return {reinterpret_cast<int8_t*>(excess + 2 * groups), scales, excess,
            reinterpret_cast<float*>(excess)};
}

template <class T>
inline void code_row(const T* x, int64_t row, int64_t depth, int64_t format, const CodedRows& out) {
    const int64_t groups = groups_of(depth);
    for (int64_t g = 0; g < groups; ++g) {
        Vec part[GROUP / LANES], most = set1(0.f), none = set1(0.f);
        for (int i = 0; i < GROUP / LANES; ++i) {
            const int64_t at = g * GROUP + i * LANES;
            part[i] = at < depth ? load_at(x + row * depth, int(at), int(depth)) : set1(0.f);
            most = max(most, max(part[i], set1(0.f) - part[i]));
            none = fma(part[i], set1(0.f), none);
        }
        const float largest = top(most), lost = sum(none);  // lost: NaN if an input is not finite, else 0
        const bool is_plain = largest > 0.f && lost == 0.f;
        const Vec by = set1(is_plain ? 127.f / largest : 0.f);
        const int64_t tile = (row / ROWS * groups + g) * ROWS, r = row % ROWS;
        int8_t* codes = out.codes + (tile + r) * GROUP;
        for (int i = 0; i < GROUP / LANES; ++i)
            store_signed(codes + i * LANES, is_plain ? part[i] * by : set1(0.f));
        const float scale = out.scales[tile + r] = largest / 127.f + lost;
        int32_t total[2] = {0, 0};
        for (int i = 0; i < HALF; ++i) total[0] += codes[i], total[1] += codes[i + HALF];
        if (parts_of(format) == 1) total[0] += total[1];
        for (int h = 0; h < 2; ++h) {
            const int64_t at = 2 * tile + h * ROWS + r;
            if (has_least(format)) out.sums[at] = scale * float(total[h]);
            else out.excess[at] = -MIDDLE * total[h];
        }
    }
}

// --- products -----------------------------------------------------------------------------------

// acc[rows][N] += products of `units` units of codes with those of rows [ROWS][GROUP].  4-bit codes
// have the same number of units again in their high halves, which are units FOURS / 2 and following.
template <bool IS_FOUR, int R, int N>
inline void add_units(Ints (&acc)[R][N], const uint8_t* codes, const int8_t* rows, int units) {
    const auto four = [&](int r, int u) {
        int32_t bits;
        std::memcpy(&bits, rows + r * GROUP + 4 * u, 4);
        return as_signed(bits);
    };
#pragma GCC unroll 8
    for (int u = 0; u < units; ++u, codes += COLUMNS * 4) {
        Unsigned low[N], high[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            const Bytes bytes = load_bytes(codes + n * LANES * 4);
            low[n] = as_unsigned(IS_FOUR ? low_halves(bytes) : bytes);
            if (IS_FOUR) high[n] = as_unsigned(high_halves(bytes));
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            const Signed first = four(r, u);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) acc[r][n] = dot(acc[r][n], low[n], first);
            if (!IS_FOUR) continue;
            const Signed second = four(r, u + FOURS / 2);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) acc[r][n] = dot(acc[r][n], high[n], second);
        }
    }
}

template <int N>
using Coding = std::integral_constant<int64_t, N>;

// f(format as a constant), for every format that exists.
template <class F>
inline void by_format(int64_t format, F f) {
    constexpr int coarse = CODES | LEAST | FLOATS, fine = CODES | HALVES | FLOATS;
    switch (format) {
        case CODES: return f(Coding<CODES>{});
        case CODES | FOUR | LEAST: return f(Coding<CODES | FOUR | LEAST>{});
        case coarse | FOUR: return f(Coding<coarse | FOUR>{});
        case coarse: return f(Coding<coarse>{});
        case fine: return f(Coding<fine>{});
        case coarse | fine: return f(Coding<coarse | fine>{});
    }
}

// sum[rows][N] += one group's products of a tile's rows with the columns of vectors first..first+N.
template <int64_t FORMAT, int R, int N>
inline void add_group(Vec (&sum)[R][N], const uint8_t* group, int first,
                      const CodedRows& a, int64_t tile) {
    constexpr bool is_four = has_four_bits(FORMAT), is_low = has_least(FORMAT);
    constexpr int parts = parts_of(FORMAT), units = (is_four ? FOURS / 2 : FOURS) / parts;
    const uint8_t* codes = group + head_bytes(FORMAT) + first * LANES * 4;
    const int8_t* rows = a.codes + tile * GROUP;
    const float* scales = a.scales + tile;
#pragma GCC unroll 2
    for (int part = 0; part < parts; ++part) {
        const int32_t* excess = a.excess + 2 * tile + part * ROWS;
        Ints acc[R][N];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) acc[r][n] = ints(is_low ? 0 : excess[r]);
        add_units<is_four>(acc, codes + part * units * COLUMNS * 4, rows + part * units * 4, units);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            const int place = part * COLUMNS + (first + n) * LANES;
            const Vec scale = load_scales(group, place, FORMAT);
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r)
                sum[r][n] = fma(to_float(acc[r][n]), scale * set1(scales[r]), sum[r][n]);
            if (!is_low) continue;
            const Vec least = load_scales(group + scale_bytes(FORMAT), place, FORMAT);
            const float* sums = a.sums + 2 * tile + part * ROWS;
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) sum[r][n] = fma(least, set1(sums[r]), sum[r][n]);
        }
    }
}

// acc[rows] = rows · columns of a panel; independent of the layer's dtype.
template <int64_t FORMAT, int R>
__attribute__((noinline)) void coded_sums(Vec (&acc)[R][WIDE], const CodedRows& a, const Linear& w,
                                          int64_t row, int64_t panel, const char*& next, int lines) {
    constexpr int N = R > ROWS / 2 ? WIDE / 2 : WIDE;  // vectors at a time, as many as fit into registers
    const int64_t groups = groups_of(w.depth);
    constexpr size_t size = group_bytes(FORMAT);
    const auto* from = reinterpret_cast<const uint8_t*>(w.packed) + size_t(panel) * groups * size;
    for (int first = 0; first < WIDE; first += N) {
        Vec sum[R][N];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sum[r][n] = set1(0.f);
        for (int64_t g = 0; g < groups; ++g) {
            for (int i = first; i < lines; i += WIDE / N, next += 64) __builtin_prefetch(next, 0, 2);
            add_group<FORMAT>(sum, from + size_t(g) * size, first, a, (row / ROWS * groups + g) * ROWS);
        }
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n) acc[r][first + n] = sum[r][n];
    }
}

template <class T>
inline void coded_linear(const CodedRows& a, int64_t rows, const Linear& w, Epilogue how,
                         const T* residual, T* out, const Low& low) {
    over_tiles(rows, w, panel_bytes(w.format, w.depth), group_bytes(w.format),
               [&](auto count, int64_t row, int64_t panel, const char*& next, int lines) {
                   Vec acc[count.value][WIDE];
                   by_format(w.format, [&](auto format) {
                       coded_sums<format.value, count.value>(acc, a, w, row, panel, next, lines);
                   });
                   finish<T, count.value>(acc, w, how, residual, out, row, panel, low);
               });
}

// Working memory that `linear` needs for quantized rows, shared by all threads.
inline size_t linear_room(int64_t rows, const Linear& w) {
    return w.format == NUMBERS ? 0 : coded_bytes(rows, w.depth);
}

// out [rows, columns (or half of them, GATED)] = a [rows, depth] · weights of any format, plus the
// outputs of the rows' adapters.  All threads of a parallel region must call it (or a single thread).
template <class T>
inline void linear(const T* a, int64_t rows, const Linear& w, Epilogue how, const T* residual,
                   T* out, char* room, const Low& low = {}) {
    if (low.who) low_products(a, w.depth, low);
    if (w.format == NUMBERS) return number_linear<T>(a, rows, w, how, residual, out, low);
    static thread_local Scratch kept;
    if (rows * w.depth <= EACH_ITS_OWN) {
        const CodedRows mine = coded_rows(kept.get<char>(coded_bytes(rows, w.depth)), rows, w.depth);
        for (int64_t row = 0; row < rows; ++row) code_row(a, row, w.depth, w.format, mine);
        return coded_linear<T>(mine, rows, w, how, residual, out, low);
    }
    const CodedRows shared = coded_rows(room, rows, w.depth);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) code_row(a, row, w.depth, w.format, shared);
    coded_linear<T>(shared, rows, w, how, residual, out, low);
}

// Columns of a linear's weights, dequantized: out [count, depth].
template <class T>
inline void read_numbers(const Linear& w, const int64_t* columns, int64_t count, T* out) {
    using U = LinearUnit<T>;
    constexpr int deep = U::DEPTH;
    const int64_t units = ceil_div(w.depth, deep);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t panel = columns[i] / COLUMNS, c = columns[i] % COLUMNS;
        const auto* from = reinterpret_cast<const typename U::Number*>(w.packed);
        from += (panel * units * COLUMNS + c) * deep;
        for (int64_t d = 0; d < w.depth; ++d)
            from_float(to_float(from[d / deep * COLUMNS * deep + d % deep]), out[i * w.depth + d]);
    }
}
template <class T>
inline void read_columns(const Linear& w, const int64_t* columns, int64_t count, T* out) {
    if (w.format == NUMBERS) return read_numbers(w, columns, count, out);
    const int64_t groups = groups_of(w.depth), format = w.format;
    const bool is_four = has_four_bits(format);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; ++i) {
        const int64_t panel = columns[i] / COLUMNS, c = columns[i] % COLUMNS;
        for (int64_t g = 0; g < groups; ++g) {
            const auto* group = reinterpret_cast<const uint8_t*>(w.packed) +
                                (panel * groups + g) * group_bytes(format);
            const uint8_t* codes = group + head_bytes(format) + c * 4;
            for (int d = 0; d < GROUP && g * GROUP + d < w.depth; ++d) {
                const int place = d * parts_of(format) / GROUP * COLUMNS + int(c);
                const int at = is_four ? d % HALF : d;
                const int byte = codes[at / 4 * COLUMNS * 4 + at % 4];
                const int code = is_four ? (d < HALF ? byte & 15 : byte >> 4) : byte;
                const float scale = scale_at(group, place, format);
                const float value =
                    has_least(format)
                        ? float(code) * scale + scale_at(group + scale_bytes(format), place, format)
                        : float(code - MIDDLE) * scale;
                from_float(value, out[i * w.depth + g * GROUP + d]);
            }
        }
    }
}
