// Blocks of 8-bit or 4-bit codes, multiplied without decoding.
#pragma once
#include "pairs.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define INTEGER_BLOCKS 1
// Whether codes are multiplied as integers, which requires groups that fill a register.
inline bool takes_integers(int codec, const Shape& s) {
    return (codec == INT8 || codec == INT4) && s.key_dim % 64 == 0 && s.value_dim % 64 == 0;
}

// The other operand of 8-bit codes has 16 bits, in two signed bytes: high · 256 + low.  With 4-bit
// codes one byte is enough, because its step is a seventeenth of that of the codes.
constexpr float SIXTEEN_BITS = 127 * 256.f;

// A block of 64 numbers of a query as integers; by: the value of the integer 1.
struct IntegerQuery {
    alignas(64) int8_t high[4][64], low[4][64];  // in the layout of spread_quarters
    int32_t sum;
    float by;

    void set(const float* x, float most) {  // most: the largest integer
        float top = 0.f, all = 0.f;
        for (int i = 0; i < 64; ++i) top = std::max(top, std::fabs(x[i])), all += x[i] * 0.f;
        by = top / most + all;
        const float scale = top > 0.f ? most / top : 0.f;
        int8_t upper_bytes[64], lower_bytes[64];
        sum = 0;
        for (int i = 0; i < 64; ++i) {
            const int32_t number = int32_t(std::nearbyintf(x[i] * scale));
            const int32_t upper = (number + 128) >> 8;
            upper_bytes[i] = int8_t(upper), lower_bytes[i] = int8_t(number - upper * 256);
            sum += number;
        }
        spread_quarters(_mm512_loadu_si512(upper_bytes), (__m512i*)high);
        spread_quarters(_mm512_loadu_si512(lower_bytes), (__m512i*)low);
    }
};

// Sums over the quarters of four vectors, as sum_quarters of floats.
inline __m512i sum_quarters(const __m512i* x) {
    const auto fold = [](__m512i a, __m512i b) {
        return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
    };
    return fold(fold(x[0], x[1]), fold(x[2], x[3]));
}

template <int CODEC>
struct IntegerBlock {
    static constexpr int TILES = MOST_TILES;
    static constexpr int BYTES = CODEC == INT4 ? 32 : 64;  // per group of 64 numbers
    static constexpr int TWICE_MIDDLE = CODEC == INT4 ? 15 : 255;
    static constexpr bool IS_WIDE = CODEC == INT8;  // the other operand has two bytes
    static constexpr float QUERY_MOST = IS_WIDE ? SIXTEEN_BITS : 127.f;
    static constexpr float WEIGHT_MOST = IS_WIDE ? SIXTEEN_BITS : 255.f;
    Shape shape;
    IntegerQuery* queries;  // [heads][groups]
    const uint8_t *keys, *values;
    const fp16 *key_scales, *value_scales;
    bool fetches;
    Block block, next;

    // Set query h of the block; it is rotated.
    void set(int h, const float* query) {
        const int groups = shape.key_dim / 64;
        for (int b = 0; b < groups; ++b) queries[h * groups + b].set(query + b * 64, QUERY_MOST);
    }
    void enter(const Block& now, const Block& ahead) {
        block = now, next = ahead, fetches = true;
        for (int i = 0; i < next.count; ++i) {
            fetch(key_scales + next.tiles[i].slot * (shape.key_dim / 64), LANES * shape.key_dim / 64 * 2);
            fetch(value_scales + next.tiles[i].slot * (shape.value_dim / 64), LANES * shape.value_dim / 64 * 2);
        }
    }
    static __m512i codes(const uint8_t* from) {
        if constexpr (CODEC == INT8) return _mm512_loadu_si512(from);
        const __m256i both = _mm256_loadu_si256((const __m256i*)from);
        const __m256i nibble = _mm256_set1_epi8(15);
        const __m256i low = _mm256_and_si256(both, nibble);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
        return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
    // Load the codes of group b of entries e.. e + 3 of n, at `from` (past the end: those of entry 0),
    // and prefetch the next block's codes `ahead`.  A cache line holds two groups or entries of 4 bits.
    static void load_four(const uint8_t* from, const uint8_t* ahead, int e, int n, int b, int groups,
                          __m512i* four) {
        const size_t row = size_t(groups) * BYTES;
        from += b * BYTES;
        if (IS_WIDE && e + 4 <= n)  // faster, but not with 4 bits
            for (int k = 0; k < 4; ++k) four[k] = codes(from + (e + k) * row);
        else
            for (int k = 0; k < 4; ++k) four[k] = codes(from + (e + k < n ? e + k : 0) * row);
        for (int k = 0; k < 4; ++k)
            if (ahead && (BYTES == 64 || (groups % 2 ? k : b) % 2 == 0))
                __builtin_prefetch(ahead + b * BYTES + (e + k) * row, 0, 2);
    }
    // Scales of group b of n entries; 0 after the last one.
    static __m512 scales(const fp16* from, int n, int b, int groups) {
        if (groups == 1)
            return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), from));
        if (groups == 2) {
            const __m512i both = _mm512_maskz_loadu_epi32(__mmask16((1u << n) - 1), from);
            return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(b ? _mm512_srli_epi32(both, 16) : both));
        }
        alignas(64) float found[16] = {};
        for (int e = 0; e < n; ++e) found[e] = to_float(from[e * groups + b]);
        return _mm512_load_ps(found);
    }
    template <int G>
    void products(float* rows, int h) const {
        constexpr int AT_ONCE = G > 2 ? 2 : 4;  // groups of four entries, as many as fit into registers
        const int groups = shape.key_dim / 64;
        const size_t row = size_t(groups) * BYTES;
        for (int i = 0; i < block.count; ++i) {
            const auto& [t, slot, n] = block.tiles[i];
            const uint8_t* ahead = h || i >= next.count ? nullptr : keys + next.tiles[i].slot * row;
            Vec total[G];
            for (int g = 0; g < G; ++g) total[g] = set1(0.f);
            for (int b = 0; b < groups; ++b) {
                const __m512 steps = scales(key_scales + slot * groups, n, b, groups);
                __m512i found[G][4];
                for (int q = 0; q < 4; q += AT_ONCE) {
                    __m512i upper[G][AT_ONCE], lower[G][AT_ONCE], parts[AT_ONCE][4];
                    for (int g = 0; g < G; ++g)
                        for (int j = 0; j < AT_ONCE; ++j) upper[g][j] = lower[g][j] = _mm512_setzero_si512();
                    for (int j = 0; j < AT_ONCE; ++j) {
                        __m512i four[4];
                        load_four(keys + slot * row, ahead, (q + j) * 4, n, b, groups, four);
                        turn_quarters(four, parts[j]);
                    }
                    for (int g = 0; g < G; ++g) {
                        const IntegerQuery& query = queries[(h + g) * groups + b];
                        for (int p = 0; p < 4; ++p) {
                            const __m512i low = _mm512_load_si512(query.low[p]);
                            for (int j = 0; j < AT_ONCE; ++j)
                                lower[g][j] = _mm512_dpbusd_epi32(lower[g][j], parts[j][p], low);
                            if (!IS_WIDE) continue;
                            const __m512i high = _mm512_load_si512(query.high[p]);
                            for (int j = 0; j < AT_ONCE; ++j)
                                upper[g][j] = _mm512_dpbusd_epi32(upper[g][j], parts[j][p], high);
                        }
                        for (int j = 0; j < AT_ONCE; ++j) {
                            found[g][q + j] = lower[g][j];
                            if (IS_WIDE)
                                found[g][q + j] =
                                    _mm512_add_epi32(lower[g][j], _mm512_slli_epi32(upper[g][j], 8));
                        }
                    }
                }
                for (int g = 0; g < G; ++g) {
                    const IntegerQuery& query = queries[(h + g) * groups + b];
                    const __m512i twice = _mm512_slli_epi32(sum_quarters(found[g]), 1);
                    const __m512i middle = _mm512_set1_epi32(TWICE_MIDDLE * query.sum);
                    const __m512 product = _mm512_cvtepi32_ps(_mm512_sub_epi32(twice, middle));
                    const __m512 by = _mm512_mul_ps(steps, _mm512_set1_ps(query.by * 0.5f));
                    total[g].v = _mm512_fmadd_ps(product, by, total[g].v);
                }
            }
            for (int g = 0; g < G; ++g) store(rows + g * ROW + i * LANES, total[g]);
        }
    }
    // An upper bound of e^below: linear between powers of two, so it is above the curve.
    static float peak(float below) {
        if (below == NEVER) return 0.f;
        const float power = std::max(below * LOG2E, -126.f);
        return of_bits(uint32_t((power + 127.f) * 0x1p23f)) * 1.00001f;
    }
    // Sums are kept in the order of four interleaved rows (integers_in_order).
    template <int G>
    void weigh(float* const* acc, const float* const* rows, const float* below, const int* n) {
        if constexpr (IS_WIDE && G > 2) {  // more sums than fit into registers
            weigh<2>(acc, rows, below, n);
            weigh<G - 2>(acc + 2, rows + 2, below + 2, n);
        } else {
            for (int b = 0; b < shape.value_dim / 64; ++b) group<G>(acc, rows, below, n, b);
            fetches = false;
        }
    }
    template <int G>
    void group(float* const* acc, const float* const* rows, const float* below, const int* n, int b) const {
        const int groups = shape.value_dim / 64, count = block.count;
        const size_t row = size_t(groups) * BYTES;
        alignas(64) int8_t high[G][ROW], low[G][ROW];
        float by[G];
        int32_t sum[G];
        __m512 steps[MOST_TILES], most = _mm512_setzero_ps();
        for (int i = 0; i < count; ++i) {
            steps[i] = scales(value_scales + block.tiles[i].slot * groups, n[i], b, groups);
            most = _mm512_max_ps(steps[i], most);
        }
        const float largest = _mm512_reduce_max_ps(most);
        for (int g = 0; g < G; ++g) {
            const float top = peak(below[g]) * largest;
            const __m512 scale = _mm512_set1_ps(top > 0.f ? WEIGHT_MOST / top : 0.f);
            __m512i all = _mm512_setzero_si512();
            __mmask16 is_nan = 0;
            for (int i = 0; i < count; ++i) {
                const __m512 weight = _mm512_mul_ps(_mm512_loadu_ps(rows[g] + i * LANES), steps[i]);
                const __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps(weight, scale));
                _mm_store_si128((__m128i*)(low[g] + i * LANES), _mm512_cvtepi32_epi8(number));
                if (IS_WIDE) {  // the high byte; the low one is signed
                    const __m512i rest = _mm512_add_epi32(number, _mm512_set1_epi32(128));
                    _mm_store_si128((__m128i*)(high[g] + i * LANES),
                                    _mm512_cvtepi32_epi8(_mm512_srai_epi32(rest, 8)));
                }
                all = _mm512_add_epi32(all, number);
                is_nan |= _mm512_cmp_ps_mask(weight, weight, _CMP_UNORD_Q);
            }
            sum[g] = TWICE_MIDDLE * _mm512_reduce_add_epi32(all);
            by[g] = is_nan ? NAN : top * (0.5f / WEIGHT_MOST);
        }
        __m512i upper[G][4], lower[G][4];
        for (int g = 0; g < G; ++g)
            for (int j = 0; j < 4; ++j) upper[g][j] = lower[g][j] = _mm512_setzero_si512();
        for (int i = 0; i < count; ++i) {
            const uint8_t* from = values + block.tiles[i].slot * row;
            const uint8_t* ahead = fetches && i < next.count ? values + next.tiles[i].slot * row : nullptr;
            for (int e = 0; e < n[i]; e += 4) {
                __m512i r[4];
                load_four(from, ahead, e, n[i], b, groups, r);
                const __m512i x = _mm512_unpacklo_epi8(r[0], r[1]), y = _mm512_unpacklo_epi8(r[2], r[3]);
                const __m512i z = _mm512_unpackhi_epi8(r[0], r[1]), w = _mm512_unpackhi_epi8(r[2], r[3]);
                const __m512i four[4] = {_mm512_unpacklo_epi16(x, y), _mm512_unpackhi_epi16(x, y),
                                         _mm512_unpacklo_epi16(z, w), _mm512_unpackhi_epi16(z, w)};
                for (int g = 0; g < G; ++g) {
                    int32_t bytes;
                    std::memcpy(&bytes, low[g] + i * LANES + e, 4);
                    const __m512i small = _mm512_set1_epi32(bytes);
                    if (!IS_WIDE) {  // weights are not negative, and 4-bit codes fit into signed bytes
                        for (int j = 0; j < 4; ++j)
                            lower[g][j] = _mm512_dpbusd_epi32(lower[g][j], small, four[j]);
                        continue;
                    }
                    std::memcpy(&bytes, high[g] + i * LANES + e, 4);
                    const __m512i large = _mm512_set1_epi32(bytes);
                    for (int j = 0; j < 4; ++j) {
                        upper[g][j] = _mm512_dpbusd_epi32(upper[g][j], four[j], large);
                        lower[g][j] = _mm512_dpbusd_epi32(lower[g][j], four[j], small);
                    }
                }
            }
        }
        for (int g = 0; g < G; ++g)
            for (int j = 0; j < 4; ++j) {
                __m512i whole = lower[g][j];
                if (IS_WIDE) whole = _mm512_add_epi32(whole, _mm512_slli_epi32(upper[g][j], 8));
                const __m512i less = _mm512_sub_epi32(_mm512_slli_epi32(whole, 1), _mm512_set1_epi32(sum[g]));
                float* to = acc[g] + b * 64 + j * 16;
                store(to, fma({_mm512_cvtepi32_ps(less)}, set1(by[g]), load(to)));
            }
    }
};

// Blocks of 64 sums: order of four interleaved rows → natural order.
inline void integers_in_order(float* sums, int size) {
    float block[64];
    for (int at = 0; at < size; at += 64) {
        std::memcpy(block, sums + at, sizeof block);
        for (int i = 0; i < 64; ++i) sums[at + i] = block[i / 4 % 4 * 16 + i / 16 * 4 + i % 4];
    }
}
#else
inline bool takes_integers(int, const Shape&) { return false; }
inline void integers_in_order(float*, int) {}
#endif
