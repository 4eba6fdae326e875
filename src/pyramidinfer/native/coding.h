// How weights become codes (models/weights.py has the same rules in torch), and how the blocks of
// GGUF files become codes without being numbers in between; both end in the panels of weights.h.
#pragma once
#include "weights.h"

// One group of an output, whatever it came from: its half h means code * scale[h] + least[h], where
// least[h] = -zero * scale[h] unless `zero` is NO_ZERO.
constexpr int NO_ZERO = -1;
struct Group {
    uint8_t codes[GROUP];
    float scale[2], least[2];
    int zero;
    void all(float step, int from) {
        scale[0] = scale[1] = step, zero = from;
        least[0] = least[1] = -float(from) * step;
    }
    void all_above(float step, float low) {
        scale[0] = scale[1] = step, least[0] = least[1] = low, zero = NO_ZERO;
    }
};

// --- numbers ------------------------------------------------------------------------------------

inline float as_half(float x) {
    fp16 half;
    from_float(x, half);
    return to_float(half);
}
// A float that is rounded before anything else is done with it: no fused multiply-add.
inline float settled(float x) {
    volatile float kept = x;
    return kept;
}
// To the nearest whole number, ties to even, of what is far below 2^22.
inline float whole(float x) { return (x + 12582912.f) - 12582912.f; }

constexpr float RANGES[] = {1.f, 0.96f, 0.92f, 0.88f, 0.84f, 0.8f, 0.75f};
constexpr double SHARES[] = {1., 0.96, 0.92, 0.88, 0.84, 0.8, 0.75};

inline void code_eight(const float* x, float lost, Group& out) {
    float largest = 0.f;
    for (int i = 0; i < GROUP; ++i) largest = std::max(largest, std::fabs(x[i]));
    const float step = as_half(largest / 127.f), by = step > 0.f ? 1.f / step : 0.f;
    for (int i = 0; i < GROUP; ++i) {
        const float code = std::min(127.f, std::max(-127.f, x[i] * by));
        out.codes[i] = uint8_t(int(whole(code)) + MIDDLE);
    }
    out.all(step + lost, MIDDLE);
}

inline void code_four(const float* x, float lost, Group& out) {
    float low = x[0], high = x[0], codes[GROUP];
    for (int i = 1; i < GROUP; ++i) low = std::min(low, x[i]), high = std::max(high, x[i]);
    const float middle = (low + high) / 2, half = (high - low) / 2;
    double best = std::numeric_limits<double>::infinity();
    for (int i = 0; i < int(sizeof RANGES / sizeof *RANGES); ++i) {
        const float least = as_half(middle - settled(half * RANGES[i]));
        const float step = as_half(half * float(2 * SHARES[i] / 15));
        const float by = step > 0.f ? 1.f / step : 0.f;
        double error = 0;
        for (int d = 0; d < GROUP; ++d) {
            codes[d] = whole(std::min(15.f, std::max(0.f, (x[d] - least) * by)));
            const double off = codes[d] * step + (least - x[d]);  // the product is exact
            error += off * off;
        }
        if (i && !(error < best)) continue;
        best = error;
        for (int d = 0; d < GROUP; ++d) out.codes[d] = uint8_t(int(codes[d]));
        out.all_above(step + lost, least);
    }
}

// Inputs g * GROUP.. of an output [depth], zeros behind its end.  No number among them stays none.
template <class T>
inline void code_numbers(int64_t format, const T* row, int64_t depth, int64_t g, Group& out) {
    float x[GROUP], lost = 0.f;
    for (int i = 0; i < GROUP; ++i) {
        x[i] = g * GROUP + i < depth ? to_float(row[g * GROUP + i]) : 0.f;
        lost += x[i] * 0.f;
    }
    if (has_four_bits(format)) code_four(x, lost, out);
    else code_eight(x, lost, out);
}

// --- blocks of GGUF files -----------------------------------------------------------------------

// What a row of weights is made of: numbers, or ggml's types of blocks under ggml's own numbers.
enum Source {
    Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14,
    FLOAT32 = 100, BFLOAT16 = 101, FLOAT16 = 102
};
constexpr int SUPER = 256;  // inputs of a block of the K kinds

inline float half_at(const uint8_t* p) {
    fp16 x;
    std::memcpy(&x, p, 2);
    return to_float(x);
}

// Codes of 4 bits, inputs 0..15 in the low halves; and their fifth bits.
inline void halves_of(const uint8_t* from, Group& out) {
    for (int i = 0; i < HALF; ++i) out.codes[i] = from[i] & 15, out.codes[i + HALF] = from[i] >> 4;
}
inline void add_fifths(const uint8_t* from, Group& out) {
    uint32_t bits;
    std::memcpy(&bits, from, 4);
    for (int i = 0; i < GROUP; ++i) out.codes[i] |= uint8_t((bits >> i & 1) << 4);
}

// Scale and minimum (6 bits each) of group i in the 12 bytes of a block of Q4_K or Q5_K.
inline void six_bits(const uint8_t* p, int i, int& scale, int& least) {
    if (i < 4) {
        scale = p[i] & 63, least = p[i + 4] & 63;
        return;
    }
    scale = (p[i + 4] & 15) | (p[i - 4] >> 6) << 4;
    least = (p[i + 4] >> 4) | (p[i] >> 6) << 4;
}

// Group g of a row of blocks.  Blocks of 32 inputs are one group, those of 256 have eight.
inline void read_block(int source, const uint8_t* row, int64_t g, Group& out) {
    const int i = int(g % (SUPER / GROUP));
    switch (source) {
        case Q4_0: {
            const uint8_t* p = row + g * 18;
            halves_of(p + 2, out);
            return out.all(half_at(p), 8);
        }
        case Q4_1: {
            const uint8_t* p = row + g * 20;
            halves_of(p + 4, out);
            return out.all_above(half_at(p), half_at(p + 2));
        }
        case Q5_0: {
            const uint8_t* p = row + g * 22;
            halves_of(p + 6, out);
            add_fifths(p + 2, out);
            return out.all(half_at(p), 16);
        }
        case Q5_1: {
            const uint8_t* p = row + g * 24;
            halves_of(p + 8, out);
            add_fifths(p + 4, out);
            return out.all_above(half_at(p), half_at(p + 2));
        }
        case Q8_0: {
            const uint8_t* p = row + g * 34;
            for (int d = 0; d < GROUP; ++d) out.codes[d] = uint8_t(p[2 + d] ^ 128);
            return out.all(half_at(p), MIDDLE);
        }
        case Q4_K:
        case Q5_K: {
            const bool is_five = source == Q5_K;
            const uint8_t* p = row + g / (SUPER / GROUP) * (is_five ? 176 : 144);
            const uint8_t* low = p + (is_five ? 48 : 16) + i / 2 * GROUP;  // two groups a byte
            for (int d = 0; d < GROUP; ++d) {
                out.codes[d] = i % 2 ? low[d] >> 4 : low[d] & 15;
                if (is_five) out.codes[d] |= uint8_t((p[16 + d] >> i & 1) << 4);
            }
            int scale, least;
            six_bits(p + 4, i, scale, least);
            return out.all_above(half_at(p) * float(scale), -(half_at(p + 2) * float(least)));
        }
        default: {  // Q6_K
            const uint8_t* p = row + g / (SUPER / GROUP) * 210;
            const uint8_t* low = p + i / 4 * 64 + i % 2 * GROUP;
            const uint8_t* high = p + 128 + i / 4 * GROUP;
            for (int d = 0; d < GROUP; ++d) {
                const int four = i % 4 < 2 ? low[d] & 15 : low[d] >> 4;
                out.codes[d] = uint8_t(four | (high[d] >> i % 4 * 2 & 3) << 4);
            }
            out.zero = 32;
            for (int h = 0; h < 2; ++h) {
                out.scale[h] = half_at(p + 208) * float(int8_t(p[192 + 2 * i + h]));
                out.least[h] = -32.f * out.scale[h];
            }
        }
    }
}

// --- packing ------------------------------------------------------------------------------------

inline void make_group(int64_t format, int source, const void* row, int64_t depth, int64_t g,
                       Group& out) {
    switch (source) {
        case FLOAT32: return code_numbers(format, (const float*)row, depth, g, out);
        case BFLOAT16: return code_numbers(format, (const bf16*)row, depth, g, out);
        case FLOAT16: return code_numbers(format, (const fp16*)row, depth, g, out);
        default: return read_block(source, (const uint8_t*)row, g, out);
    }
}

// Column c of a group of a panel.  Formats without least values stand MIDDLE above: what goes there
// has a `zero`.
inline void put_group(int64_t format, const Group& from, int c, uint8_t* to) {
    for (int h = 0; h < parts_of(format); ++h) {
        put_scale(to, h * COLUMNS + c, format, from.scale[h]);
        if (has_least(format))
            put_scale(to + scale_bytes(format), h * COLUMNS + c, format, from.least[h]);
    }
    to += head_bytes(format) + c * 4;
    const bool is_four = has_four_bits(format);
    const int up = has_least(format) ? 0 : MIDDLE - from.zero;
    for (int i = 0; i < (is_four ? HALF : GROUP); ++i) {
        const int high = is_four ? from.codes[i + HALF] << 4 : 0;
        to[i / 4 * COLUMNS * 4 + i % 4] = uint8_t((from.codes[i] + up) | high);
    }
}

// rows [columns]: where each output's weights [depth] lie, and what they are made of → panels.
// Absent columns are zero.
inline void pack_codes(int64_t format, const void* const* rows, const int32_t* sources,
                       int64_t columns, int64_t depth, uint8_t* out) {
    const int64_t groups = groups_of(depth);
#pragma omp parallel for schedule(static)
    for (int64_t panel = 0; panel < ceil_div(columns, COLUMNS); ++panel) {
        uint8_t* to = out + panel * groups * group_bytes(format);
        const int64_t first = panel * COLUMNS, here = std::min<int64_t>(COLUMNS, columns - first);
        if (here < COLUMNS) std::memset(to, 0, groups * group_bytes(format));
        Group group;
        for (int64_t c = 0; c < here; ++c)
            for (int64_t g = 0; g < groups; ++g) {
                make_group(format, sources[first + c], rows[first + c], depth, g, group);
                put_group(format, group, int(c), to + g * group_bytes(format));
            }
    }
}
