// Linears on weights of few bits: codes of 8 or 4 bits with a scale for every GROUP inputs (or half
// of them), and a least value where the format has one.  Rows are coded in 8 bits on their way in,
// each for itself, so that products are of whole numbers; sums over groups are of floats, in the
// order of the groups.
//
// A panel is [groups] of: scales [parts][COLUMNS], least values [parts][COLUMNS] where there are
// any, codes: bytes [units of four inputs][COLUMNS][4].  Bytes of 4-bit codes hold unit u in their
// low halves and unit u + 4 in their high ones.
#pragma once
#include "matmul.h"
#include "scratch.h"

constexpr int GROUP = 32;
constexpr int HALF = GROUP / 2;
constexpr int FOURS = GROUP / 4;       // units of a group
constexpr int EACH_ITS_OWN = 16 << 10;  // up to so many numbers every thread codes all rows itself
constexpr int MIDDLE = 128;            // what codes of 8 bits without a least value stand above

constexpr bool has_four_bits(int64_t format) { return format & FOUR; }
constexpr bool has_least(int64_t format) { return format & LEAST; }
constexpr int parts_of(int64_t format) { return format & HALVES ? 2 : 1; }  // scales of a group

inline int64_t groups_of(int64_t depth) { return ceil_div(depth, GROUP); }
// Bytes of a group's scales, or of its least values; and of both, which lie before its codes.
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

// Scales (or least values) of a group from place `at` on, as they are stored.
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

// --- rows on their way in -----------------------------------------------------------------------

// Rows [rows, groups * GROUP] as codes -127..127 with a scale for every group, and sums of the codes
// of each half of it.
struct CodedRows {
    int8_t* codes;
    float* scales;
    int32_t* sums;
};
inline size_t coded_bytes(int64_t rows, int64_t depth) {
    return size_t(rows) * size_t(groups_of(depth)) * (GROUP + 12);
}
inline CodedRows coded_rows(char* room, int64_t rows, int64_t depth) {
    const size_t groups = size_t(rows) * size_t(groups_of(depth));
    auto* scales = reinterpret_cast<float*>(room);
    auto* sums = reinterpret_cast<int32_t*>(scales + groups);
    return {reinterpret_cast<int8_t*>(sums + 2 * groups), scales, sums};
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
        out.scales[row * groups + g] = largest / 127.f + lost;
        for (int h = 0; h < 2; ++h) {
            int32_t total = 0;
            for (int i = h * HALF; i < (h + 1) * HALF; ++i) total += codes[i];
            out.sums[2 * (row * groups + g) + h] = total;
        }
    }
}

// --- products -----------------------------------------------------------------------------------

// sum[rows][N] += one group's products of rows with the columns of vectors first..first+N.  Where
// its halves have scales of their own, what the first one gave is added before the second begins.
template <bool IS_FOUR, int R, int N>
inline void add_group(Vec (&sum)[R][N], const uint8_t* group, int64_t format, int first,
                      const CodedRows& a, int64_t row, int64_t groups, int64_t g) {
    constexpr int units = FOURS / 2;
    const bool is_low = has_least(format), has_halves = parts_of(format) == 2;
    const uint8_t* codes = group + head_bytes(format) + first * LANES * 4;
    const int8_t* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = a.codes + ((row + r) * groups + g) * GROUP;
    const auto four = [&](int r, int u) {
        int32_t bits;
        std::memcpy(&bits, rows[r] + 4 * u, 4);
        return as_signed(bits);
    };
    const auto total = [&](int r, int half) {  // of the row's codes under one scale
        const int32_t* both = a.sums + 2 * ((row + r) * groups + g);
        return has_halves ? both[half] : both[0] + both[1];
    };
    Ints acc[R][N];
    for (int half = 0; half < (IS_FOUR ? 1 : 2); ++half, codes += units * COLUMNS * 4) {
        if (half == 0 || has_halves)
            for (int r = 0; r < R; ++r)
                for (int n = 0; n < N; ++n) acc[r][n] = ints(is_low ? 0 : -MIDDLE * total(r, half));
#pragma GCC unroll 4
        for (int u = 0; u < units; ++u)
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) {
                const Bytes bytes = load_bytes(codes + (u * COLUMNS + n * LANES) * 4);
                if (IS_FOUR) {
                    const Unsigned low = as_unsigned(low_halves(bytes));
                    const Unsigned high = as_unsigned(high_halves(bytes));
#pragma GCC unroll 6
                    for (int r = 0; r < R; ++r) {
                        acc[r][n] = dot(acc[r][n], low, four(r, u));
                        acc[r][n] = dot(acc[r][n], high, four(r, u + units));
                    }
                } else {
                    const Unsigned all = as_unsigned(bytes);
#pragma GCC unroll 6
                    for (int r = 0; r < R; ++r)
                        acc[r][n] = dot(acc[r][n], all, four(r, half * units + u));
                }
            }
        if (!IS_FOUR && half == 0 && !has_halves) continue;
        const int part = has_halves ? half * COLUMNS : 0;
        for (int n = 0; n < N; ++n) {
            const int at = part + (first + n) * LANES;
            const Vec scale = load_scales(group, at, format);
            const Vec least =
                is_low ? load_scales(group + scale_bytes(format), at, format) : set1(0.f);
            for (int r = 0; r < R; ++r) {
                const float by = a.scales[(row + r) * groups + g];
                sum[r][n] = fma(to_float(acc[r][n]), scale * set1(by), sum[r][n]);
                if (is_low) sum[r][n] = fma(least, set1(by * float(total(r, half))), sum[r][n]);
            }
        }
    }
}

// acc[rows] = rows · the columns of a panel; nothing in it depends on the layer's dtype.
template <bool IS_FOUR, int R>
__attribute__((noinline)) void coded_sums(Vec (&acc)[R][WIDE], const CodedRows& a, const Linear& w,
                                          int64_t row, int64_t panel, const char*& next, int lines) {
    constexpr int N = R > ROWS / 2 ? WIDE / 2 : WIDE;  // vectors at once: what fits the registers
    const int64_t groups = groups_of(w.depth), format = w.format;
    const size_t size = group_bytes(format);
    const auto* from = reinterpret_cast<const uint8_t*>(w.packed) + size_t(panel) * groups * size;
    for (int first = 0; first < WIDE; first += N) {
        Vec sum[R][N];
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n) sum[r][n] = set1(0.f);
        for (int64_t g = 0; g < groups; ++g) {
            for (int i = first; i < lines; i += WIDE / N, next += 64) __builtin_prefetch(next, 0, 2);
            add_group<IS_FOUR, R, N>(sum, from + size_t(g) * size, format, first, a, row, groups, g);
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
                   if (has_four_bits(w.format))
                       coded_sums<true, count.value>(acc, a, w, row, panel, next, lines);
                   else coded_sums<false, count.value>(acc, a, w, row, panel, next, lines);
                   finish<T, count.value>(acc, w, how, residual, out, row, panel, low);
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
        return coded_linear<T>(mine, rows, w, how, residual, out, low);
    }
    const CodedRows shared = coded_rows(room, rows, w.depth);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) code_row(a, row, w.depth, shared);
    coded_linear<T>(shared, rows, w, how, residual, out, low);
}

// Columns of a linear's weights as numbers: out [count, depth].
template <class T>
inline void read_numbers(const Linear& w, const int64_t* columns, int64_t count, T* out) {
    using U = typename UnitOf<T>::type;
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
