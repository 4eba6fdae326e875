// Linears on weights of few bits: codes of 8 or 4 bits with a scale for every GROUP inputs (and a
// least value, where codes have 4).  Rows are coded in 8 bits on their way in, each for itself, so
// that products are of whole numbers; sums over groups are of floats, in the order of the groups.
//
// A panel is [groups] of: scales [COLUMNS] of fp16, least values [COLUMNS] of fp16 (4 bits only),
// codes: bytes [units of four inputs][COLUMNS][4].  Bytes of 4-bit codes hold unit u in their low
// halves and unit u + 4 in their high ones.
#pragma once
#include "matmul.h"
#include "scratch.h"

constexpr int GROUP = 32;
constexpr int FOURS = GROUP / 4;       // units of a group
constexpr int EACH_ITS_OWN = 16 << 10;  // up to so many numbers every thread codes all rows itself

inline int64_t groups_of(int64_t depth) { return ceil_div(depth, GROUP); }
inline size_t group_bytes(int64_t format) {
    return format == EIGHT_BITS ? COLUMNS * (GROUP + 2) : COLUMNS * (GROUP / 2 + 4);
}
inline size_t panel_bytes(int64_t format, int64_t depth) {
    return group_bytes(format) * size_t(groups_of(depth));
}

// --- rows on their way in -----------------------------------------------------------------------

// Rows [rows, groups * GROUP] as codes -127..127 with a scale for every group, and sums of codes.
struct CodedRows {
    int8_t* codes;
    float* scales;
    int32_t* sums;
};
inline size_t coded_bytes(int64_t rows, int64_t depth) {
    return size_t(rows) * size_t(groups_of(depth)) * (GROUP + 8);
}
inline CodedRows coded_rows(char* room, int64_t rows, int64_t depth) {
    const size_t groups = size_t(rows) * size_t(groups_of(depth));
    auto* scales = reinterpret_cast<float*>(room);
    auto* sums = reinterpret_cast<int32_t*>(scales + groups);
    return {reinterpret_cast<int8_t*>(sums + groups), scales, sums};
}

template <class T>
inline void code_row(const T* x, int64_t row, int64_t depth, const CodedRows& out) {
    const int64_t groups = groups_of(depth);
    for (int64_t g = 0; g < groups; ++g) {
        Vec part[GROUP / LANES], most = set1(0.f), none = set1(0.f);
        for (int i = 0; i < GROUP / LANES; ++i) {
            const int64_t at = g * GROUP + i * LANES;
            part[i] = at < depth ? load_at(x + row * depth, int(at), int(depth)) : set1(0.f);
            most = max(most, max(part[i], set1(0.f) - part[i]));
            none = fma(part[i], set1(0.f), none);
        }
        const float largest = top(most), lost = sum(none);  // lost: no number where one is none
        const bool is_plain = largest > 0.f && lost == 0.f;
        const Vec by = set1(is_plain ? 127.f / largest : 0.f);
        int8_t* codes = out.codes + (row * groups + g) * GROUP;
        for (int i = 0; i < GROUP / LANES; ++i)
            store_signed(codes + i * LANES, is_plain ? part[i] * by : set1(0.f));
        int32_t total = 0;
        for (int i = 0; i < GROUP; ++i) total += codes[i];
        out.scales[row * groups + g] = largest / 127.f + lost;
        out.sums[row * groups + g] = total;
    }
}

// --- products -----------------------------------------------------------------------------------

// sum[rows][N] += one group's products of rows with the columns of vectors first..first+N.
template <int64_t FORMAT, int R, int N>
inline void add_group(Vec (&sum)[R][N], const uint8_t* group, int first, const CodedRows& a,
                      int64_t row, int64_t groups, int64_t g) {
    constexpr bool is_four = FORMAT == FOUR_BITS;
    const auto* scales = reinterpret_cast<const fp16*>(group) + first * LANES;
    const uint8_t* codes = group + COLUMNS * (is_four ? 4 : 2) + first * LANES * 4;
    Ints acc[R][N];
    for (int r = 0; r < R; ++r) {
        // Codes of 8 bits stand 128 above what they mean.
        const int32_t from = is_four ? 0 : -128 * a.sums[(row + r) * groups + g];
        for (int n = 0; n < N; ++n) acc[r][n] = ints(from);
    }
    const int8_t* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = a.codes + ((row + r) * groups + g) * GROUP;
    const auto four = [&](int r, int u) {
        int32_t bits;
        std::memcpy(&bits, rows[r] + 4 * u, 4);
        return as_signed(bits);
    };
#pragma GCC unroll 8
    for (int u = 0; u < (is_four ? FOURS / 2 : FOURS); ++u)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            const Bytes bytes = load_bytes(codes + (u * COLUMNS + n * LANES) * 4);
            if (is_four) {
                const Unsigned low = as_unsigned(low_halves(bytes));
                const Unsigned high = as_unsigned(high_halves(bytes));
#pragma GCC unroll 6
                for (int r = 0; r < R; ++r) {
                    acc[r][n] = dot(acc[r][n], low, four(r, u));
                    acc[r][n] = dot(acc[r][n], high, four(r, u + FOURS / 2));
                }
            } else {
                const Unsigned all = as_unsigned(bytes);
#pragma GCC unroll 6
                for (int r = 0; r < R; ++r) acc[r][n] = dot(acc[r][n], all, four(r, u));
            }
        }
    for (int n = 0; n < N; ++n) {
        const Vec scale = load(scales + n * LANES);
        const Vec least = is_four ? load(scales + COLUMNS + n * LANES) : set1(0.f);
        for (int r = 0; r < R; ++r) {
            const float by = a.scales[(row + r) * groups + g];
            sum[r][n] = fma(to_float(acc[r][n]), scale * set1(by), sum[r][n]);
            if (is_four) {
                const float all = by * float(a.sums[(row + r) * groups + g]);
                sum[r][n] = fma(least, set1(all), sum[r][n]);
            }
        }
    }
}

template <class T, int64_t FORMAT, int R>
inline void coded_tile(const CodedRows& a, const Linear& w, Epilogue how, const T* residual, T* out,
                       int64_t row, int64_t panel, const Low& low, const char*& next, int lines) {
    constexpr int N = R > ROWS / 2 ? WIDE / 2 : WIDE;  // vectors at once: what fits the registers
    const int64_t groups = groups_of(w.depth);
    const size_t size = group_bytes(FORMAT);
    const auto* from = reinterpret_cast<const uint8_t*>(w.packed) + size_t(panel) * groups * size;
    Vec acc[R][WIDE];
    for (int first = 0; first < WIDE; first += N) {
        Vec sum[R][N];
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n) sum[r][n] = set1(0.f);
        for (int64_t g = 0; g < groups; ++g) {
            for (int i = first; i < lines; i += WIDE / N, next += 64) __builtin_prefetch(next, 0, 2);
            add_group<FORMAT, R, N>(sum, from + size_t(g) * size, first, a, row, groups, g);
        }
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n) acc[r][first + n] = sum[r][n];
    }
    finish<T, R>(acc, w, how, residual, out, row, panel, low);
}

template <class T, int64_t FORMAT>
inline void coded_linear(const CodedRows& a, int64_t rows, const Linear& w, Epilogue how,
                         const T* residual, T* out, const Low& low) {
    over_tiles(rows, w, panel_bytes(FORMAT, w.depth), group_bytes(FORMAT),
               [&](auto count, int64_t row, int64_t panel, const char*& next, int lines) {
                   coded_tile<T, FORMAT, count.value>(a, w, how, residual, out, row, panel, low,
                                                      next, lines);
               });
}

// Room that `linear` needs for rows of weights with codes, shared by all threads.
inline size_t linear_room(int64_t rows, const Linear& w) {
    return w.format == NUMBERS ? 0 : coded_bytes(rows, w.depth);
}

// out [rows, columns (or half of them, GATED)] = a [rows, depth] · weights, whatever their format,
// and what rows' adapters add.
// To be called by all threads of a parallel region (or by one alone).
template <class T>
inline void linear(const T* a, int64_t rows, const Linear& w, Epilogue how, const T* residual,
                   T* out, char* room, const Low& low = {}) {
    if (low.who) low_products(a, w.depth, low);
    if (w.format == NUMBERS) return number_linear<T>(a, rows, w, how, residual, out, low);
    static thread_local Scratch kept;
    if (rows * w.depth <= EACH_ITS_OWN) {
        const CodedRows mine = coded_rows(kept.get<char>(coded_bytes(rows, w.depth)), rows, w.depth);
        for (int64_t row = 0; row < rows; ++row) code_row(a, row, w.depth, mine);
        if (w.format == EIGHT_BITS)
            return coded_linear<T, EIGHT_BITS>(mine, rows, w, how, residual, out, low);
        return coded_linear<T, FOUR_BITS>(mine, rows, w, how, residual, out, low);
    }
    const CodedRows shared = coded_rows(room, rows, w.depth);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) code_row(a, row, w.depth, shared);
    if (w.format == EIGHT_BITS)
        return coded_linear<T, EIGHT_BITS>(shared, rows, w, how, residual, out, low);
    coded_linear<T, FOUR_BITS>(shared, rows, w, how, residual, out, low);
}

// --- packing ------------------------------------------------------------------------------------

// codes [columns, groups * GROUP] (those of 8 bits with 128 added), scales and least values
// [columns, groups] → panels.  Absent columns are zero.
inline void pack_codes(int64_t format, const uint8_t* codes, const fp16* scales, const fp16* least,
                       int64_t columns, int64_t depth, uint8_t* out) {
    const int64_t groups = groups_of(depth);
    const bool is_four = format == FOUR_BITS;
#pragma omp parallel for schedule(static)
    for (int64_t panel = 0; panel < ceil_div(columns, COLUMNS); ++panel)
        for (int64_t g = 0; g < groups; ++g) {
            uint8_t* to = out + (panel * groups + g) * group_bytes(format);
            auto* steps = reinterpret_cast<fp16*>(to);
            std::memset(to, 0, group_bytes(format));
            to += COLUMNS * (is_four ? 4 : 2);
            for (int c = 0; c < COLUMNS && panel * COLUMNS + c < columns; ++c) {
                const int64_t at = (panel * COLUMNS + c) * groups + g;
                steps[c] = scales[at];
                if (is_four) steps[COLUMNS + c] = least[at];
                const uint8_t* from = codes + at * GROUP;
                for (int i = 0; i < (is_four ? GROUP / 2 : GROUP); ++i) {
                    const uint8_t high = is_four ? uint8_t(from[i + GROUP / 2] << 4) : 0;
                    to[(i / 4 * COLUMNS + c) * 4 + i % 4] = uint8_t(from[i] | high);
                }
            }
        }
}

// Columns of a linear's weights as numbers: out [count, depth].
template <class T>
inline void read_columns(const Linear& w, const int64_t* columns, int64_t count, T* out) {
    const int64_t groups = groups_of(w.depth);
    const bool is_four = w.format == FOUR_BITS;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; ++i) {
        const int64_t panel = columns[i] / COLUMNS, c = columns[i] % COLUMNS;
        for (int64_t g = 0; g < groups; ++g) {
            const auto* group = reinterpret_cast<const uint8_t*>(w.packed) +
                                (panel * groups + g) * group_bytes(w.format);
            const auto* steps = reinterpret_cast<const fp16*>(group);
            const uint8_t* codes = group + COLUMNS * (is_four ? 4 : 2);
            const float step = to_float(steps[c]);
            const float least = is_four ? to_float(steps[COLUMNS + c]) : -128.f * step;
            for (int d = 0; d < GROUP && g * GROUP + d < w.depth; ++d) {
                const int at = is_four ? d % (GROUP / 2) : d;
                const int byte = codes[(at / 4 * COLUMNS + c) * 4 + at % 4];
                const int code = is_four ? (d < GROUP / 2 ? byte & 15 : byte >> 4) : byte;
                from_float(float(code) * step + least, out[i * w.depth + g * GROUP + d]);
            }
        }
    }
}
