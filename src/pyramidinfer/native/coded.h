// Tiles of entries that decoding multiplies: as they lie, or stored by a codec.  A tile offers, for G
// query heads of its KV head from head g on:
//   products<G>(out, g): [G][LANES] products of the queries with the tile's keys;
//   peak(x): e^x or a little more, for x <= 0, if weigh wants to know the largest weights;
//   weigh<G>(acc, weights, peaks): acc [G][padded V] += weights [G][LANES] · values.
#pragma once
#include "codec.h"
#include "products.h"
#include "scratch.h"

// What all of a request's tiles of one KV head share.
struct Shape {
    int group, key_dim, value_dim, padded_key, padded_value;
};

// Numbers of type N as they lie; queries widened [group][padded D], and as they are.
template <class N>
struct PlainTile {
    Shape shape;
    const float* queries;
    const N *raw, *keys, *values;
    int n;

    template <int G>
    void products(float* out, int g) const {
        any_products<N, G>(out, queries + g * shape.padded_key, raw + g * shape.key_dim, keys, n,
                           shape.key_dim, shape.padded_key);
    }
    static float peak(float) { return 0.f; }
    template <int G>
    void weigh(float* acc, const float* weights, const float*) const {
        ::weigh<N, G>(acc, weights, values, n, shape.value_dim, shape.padded_value);
    }
};

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define INTEGER_TILES 1
// Whether codes are multiplied as integers: groups must fill a register.
inline bool takes_integers(int codec, const Shape& s) {
    return (codec == INT8 || codec == INT4) && s.key_dim % 64 == 0 && s.value_dim % 64 == 0;
}

// What codes of 8 bits are multiplied with has 16, in two signed bytes, high · 256 + low.  With codes
// of 4 bits one byte is enough: its step is a seventeenth of theirs.
constexpr float SIXTEEN_BITS = 127 * 256.f;

// A block of 64 numbers of a query as integers; by: what one of them counts.
struct IntegerQuery {
    int8_t high[64], low[64];
    int32_t sum;
    float by;

    void set(const float* x, float most) {  // most: the largest integer
        float top = 0.f, all = 0.f;
        for (int i = 0; i < 64; ++i) top = std::max(top, std::fabs(x[i])), all += x[i] * 0.f;
        by = top / most + all;
        const float scale = top > 0.f ? most / top : 0.f;
        sum = 0;
        for (int i = 0; i < 64; ++i) {
            const int32_t number = int32_t(std::nearbyintf(x[i] * scale));
            const int32_t upper = (number + 128) >> 8;
            high[i] = int8_t(upper), low[i] = int8_t(number - upper * 256);
            sum += number;
        }
    }
};

// The sum of each of 16 vectors of integers.
inline __m512i sum_each(const __m512i* r) {
    __m512i four[4];
    for (int i = 0; i < 4; ++i) {
        __m512i two[2];
        for (int j = 0; j < 2; ++j) {
            const __m512i x = r[4 * i + 2 * j], y = r[4 * i + 2 * j + 1];
            two[j] = _mm512_add_epi32(_mm512_unpacklo_epi32(x, y), _mm512_unpackhi_epi32(x, y));
        }
        four[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(two[0], two[1]),
                                   _mm512_unpackhi_epi64(two[0], two[1]));
    }
    const auto fold = [](__m512i x, __m512i y) {
        return _mm512_add_epi32(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xdd));
    };
    return fold(fold(four[0], four[1]), fold(four[2], four[3]));
}

// Codes of 8 or 4 bits, multiplied as they are.
template <int CODEC>
struct IntegerTile {
    static constexpr int BYTES = CODEC == INT4 ? 32 : 64;  // of a block of 64 numbers
    static constexpr int TWICE_MIDDLE = CODEC == INT4 ? 15 : 255;
    static constexpr bool IS_WIDE = CODEC == INT8;  // two bytes for what is multiplied with codes
    static constexpr float QUERY_MOST = IS_WIDE ? SIXTEEN_BITS : 127.f;
    static constexpr float WEIGHT_MOST = IS_WIDE ? SIXTEEN_BITS : 255.f;
    Shape shape;
    const IntegerQuery* queries;  // [group][blocks]
    const uint8_t *keys, *values;
    const fp16 *key_scales, *value_scales;
    int n;

    static __m512i block(const uint8_t* codes) {
        if constexpr (CODEC == INT8) return _mm512_loadu_si512(codes);
        const __m256i both = _mm256_loadu_si256((const __m256i*)codes);
        const __m256i nibble = _mm256_set1_epi8(15);
        const __m256i low = _mm256_and_si256(both, nibble);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
        return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
    // Scales of block b of all entries; 0 behind the last one.
    __m512 scales(const fp16* from, int b, int blocks) const {
        if (blocks == 1)
            return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), from));
        alignas(64) float found[16] = {};
        for (int e = 0; e < n; ++e) found[e] = to_float(from[e * blocks + b]);
        return _mm512_load_ps(found);
    }
    template <int G>
    void products(float* out, int g) const {
        const int blocks = shape.key_dim / 64;
        Vec total[G];
        for (int h = 0; h < G; ++h) total[h] = set1(0.f);
        for (int b = 0; b < blocks; ++b) {
            const __m512 steps = scales(key_scales, b, blocks);
            alignas(64) uint8_t wide[16 * 64];
            const bool is_shared = CODEC == INT4 && G > 1;  // unpacked once for all heads
            if (is_shared)
                for (int e = 0; e < 16; ++e)
                    _mm512_store_si512(wide + e * 64, block(at(keys, e, b, blocks)));
            for (int h = 0; h < G; ++h) {
                const IntegerQuery& query = queries[(g + h) * blocks + b];
                const __m512i low = _mm512_loadu_si512(query.low);
                __m512i high = low;
                if (IS_WIDE) high = _mm512_loadu_si512(query.high);
                __m512i row[16];
#pragma GCC unroll 16
                for (int e = 0; e < 16; ++e) {
                    const __m512i key = is_shared ? _mm512_load_si512(wide + e * 64)
                                                  : block(at(keys, e, b, blocks));
                    row[e] = _mm512_setzero_si512();
                    if (IS_WIDE)
                        row[e] = _mm512_slli_epi32(_mm512_dpbusd_epi32(row[e], key, high), 8);
                    row[e] = _mm512_dpbusd_epi32(row[e], key, low);
                }
                const __m512i twice = _mm512_slli_epi32(sum_each(row), 1);
                const __m512i middle = _mm512_set1_epi32(TWICE_MIDDLE * query.sum);
                const __m512 product = _mm512_cvtepi32_ps(_mm512_sub_epi32(twice, middle));
                const __m512 by = _mm512_mul_ps(steps, _mm512_set1_ps(query.by * 0.5f));
                total[h].v = _mm512_fmadd_ps(product, by, total[h].v);
            }
        }
        for (int h = 0; h < G; ++h) store(out + h * LANES, total[h]);
    }
    const uint8_t* at(const uint8_t* codes, int e, int b, int blocks) const {
        return codes + (size_t(e < n ? e : 0) * blocks + b) * BYTES;
    }
    // Between the powers of two along a straight line, which is above the curve.
    static float peak(float x) {
        const float power = std::max(x * LOG2E, -126.f);
        return of_bits(uint32_t((power + 127.f) * 0x1p23f)) * 1.00001f;
    }
    // Sums are kept in the order that four interleaved rows have: see integers_in_order.
    template <int G>
    void weigh(float* acc, const float* weights, const float* peaks) const {
        const int blocks = shape.value_dim / 64;
        for (int b = 0; b < blocks; ++b) {
            const __m512 steps = scales(value_scales, b, blocks);
            const float largest = _mm512_reduce_max_ps(steps);
            alignas(64) int8_t high[G][16], low[G][16];
            float by[G];
            int32_t sum[G];
            for (int h = 0; h < G; ++h) {
                const __m512 weight = _mm512_mul_ps(_mm512_loadu_ps(weights + h * LANES), steps);
                const float top = peaks[h] * largest;
                const __m512 scale = _mm512_set1_ps(top > 0.f ? WEIGHT_MOST / top : 0.f);
                const __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps(weight, scale));
                _mm_store_si128((__m128i*)low[h], _mm512_cvtepi32_epi8(number));
                if (IS_WIDE) {  // what the low byte, which is signed, leaves
                    const __m512i rest = _mm512_add_epi32(number, _mm512_set1_epi32(128));
                    _mm_store_si128((__m128i*)high[h],
                                    _mm512_cvtepi32_epi8(_mm512_srai_epi32(rest, 8)));
                }
                sum[h] = TWICE_MIDDLE * _mm512_reduce_add_epi32(number);
                const bool is_nan = _mm512_cmp_ps_mask(weight, weight, _CMP_UNORD_Q);
                by[h] = is_nan ? NAN : top * (0.5f / WEIGHT_MOST);
            }
            __m512i upper[G][4], lower[G][4];
            for (int h = 0; h < G; ++h)
                for (int i = 0; i < 4; ++i) upper[h][i] = lower[h][i] = _mm512_setzero_si512();
            for (int e = 0; e < n; e += 4) {
                const __m512i r0 = block(at(values, e, b, blocks));
                const __m512i r1 = block(at(values, e + 1, b, blocks));
                const __m512i r2 = block(at(values, e + 2, b, blocks));
                const __m512i r3 = block(at(values, e + 3, b, blocks));
                const __m512i a = _mm512_unpacklo_epi8(r0, r1), c = _mm512_unpacklo_epi8(r2, r3);
                const __m512i d = _mm512_unpackhi_epi8(r0, r1), f = _mm512_unpackhi_epi8(r2, r3);
                const __m512i four[4] = {_mm512_unpacklo_epi16(a, c), _mm512_unpackhi_epi16(a, c),
                                         _mm512_unpacklo_epi16(d, f), _mm512_unpackhi_epi16(d, f)};
                for (int h = 0; h < G; ++h) {
                    int32_t bytes;
                    std::memcpy(&bytes, low[h] + e, 4);
                    const __m512i small = _mm512_set1_epi32(bytes);
                    if (!IS_WIDE) {  // weights have no sign here, and codes have none to lose
                        for (int i = 0; i < 4; ++i)
                            lower[h][i] = _mm512_dpbusd_epi32(lower[h][i], small, four[i]);
                        continue;
                    }
                    std::memcpy(&bytes, high[h] + e, 4);
                    const __m512i large = _mm512_set1_epi32(bytes);
                    for (int i = 0; i < 4; ++i) {
                        upper[h][i] = _mm512_dpbusd_epi32(upper[h][i], four[i], large);
                        lower[h][i] = _mm512_dpbusd_epi32(lower[h][i], four[i], small);
                    }
                }
            }
            for (int h = 0; h < G; ++h)
                for (int i = 0; i < 4; ++i) {
                    __m512i whole = lower[h][i];
                    if (IS_WIDE) whole = _mm512_add_epi32(whole, _mm512_slli_epi32(upper[h][i], 8));
                    const __m512i less =
                        _mm512_sub_epi32(_mm512_slli_epi32(whole, 1), _mm512_set1_epi32(sum[h]));
                    float* to = acc + h * shape.padded_value + b * 64 + i * 16;
                    store(to, fma({_mm512_cvtepi32_ps(less)}, set1(by[h]), load(to)));
                }
        }
    }
};

// Blocks of 64 sums in the order of four interleaved rows → as they are.
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
