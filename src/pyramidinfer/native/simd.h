// A vector of floats for the CPU's instructions: 16 lanes (AVX-512) or 8 (AVX2, plain C++).
// Entries are bf16, fp16 or fp32 in memory; all arithmetic is in float.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if (defined(__AVX512F__) && defined(__AVX512BW__)) || defined(__AVX2__)
#include <immintrin.h>
#endif

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

inline uint32_t bits_of(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return u;
}
inline float of_bits(uint32_t u) {
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return of_bits(uint32_t(x.bits) << 16); }
inline float to_float(fp16 x) {
#ifdef __F16C__
    return _cvtsh_ss(x.bits);
#else
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, size = x.bits & 0x7fff;
    if (size >= 0x7c00) return of_bits(sign | 0x7f800000 | (size & 0x3ff) << 13);
    return of_bits(sign) + (sign ? -1.f : 1.f) * of_bits(size << 13) * 0x1p112f;
#endif
}
inline void from_float(float x, float& out) { out = x; }
inline void from_float(float x, bf16& out) {  // to nearest even; NaN stays NaN
    const uint32_t u = bits_of(x);
    out.bits = x != x ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline void from_float(float x, fp16& out) {
#ifdef __F16C__
    out.bits = uint16_t(_cvtss_sh(x, 0));
#else
    const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000, size = u & 0x7fffffff;
    if (size > 0x7f800000) out.bits = 0x7e00;
    else if (size >= 0x47800000) out.bits = uint16_t(sign | 0x7c00);
    else if (size < 0x38800000)  // subnormal: an addition rounds it
        out.bits = uint16_t(sign | (bits_of(of_bits(size) + 0.5f) - 0x3f000000));
    else out.bits = uint16_t(sign | ((size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13));
#endif
}

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define ISA_NAME "avx512"
constexpr int LANES = 16;
constexpr int WIDE = 4;  // vectors of a matrix tile's row
struct Vec {
    __m512 v;
};
inline Vec set1(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const bf16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Vec load(const fp16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
}
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(bf16* p, Vec a) {
#ifdef __AVX512BF16__
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a.v));
#else
    const __m512i u = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    r = _mm512_srli_epi32(r, 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    r = _mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(r));
#endif
}
inline void store(fp16* p, Vec a) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
// acc + a · b per lane, over pairs of bf16; with two float instructions if the CPU has none for pairs.
#define PAIRS 1
inline __m512 add_pairs(__m512 acc, __m512i a, __m512i b) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#else
    const __m512i high = _mm512_set1_epi32(int(0xffff0000));
    const auto first = [](__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); };
    const auto second = [&](__m512i x) { return _mm512_castsi512_ps(_mm512_and_si512(x, high)); };
    return _mm512_fmadd_ps(second(a), second(b), _mm512_fmadd_ps(first(a), first(b), acc));
#endif
}
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float top(Vec a) { return _mm512_reduce_max_ps(a.v); }
// Integers, and bytes: four per lane.
struct Ints {
    __m512i v;
};
using Bytes = __m512i;
inline Ints ints(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Vec to_float(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Bytes low_halves(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline Bytes high_halves(Bytes x) { return low_halves(_mm512_srli_epi16(x, 4)); }
inline void store_signed(int8_t* p, Vec x) {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x.v)));
}
#ifdef __AVX512VNNI__
using Unsigned = Bytes;
using Signed = Bytes;
inline Unsigned as_unsigned(Bytes x) { return x; }
inline Signed as_signed(int32_t four) { return _mm512_set1_epi32(four); }
inline Ints dot(Ints acc, Unsigned a, Signed b) { return {_mm512_dpbusd_epi32(acc.v, a, b)}; }
#else
struct Unsigned {
    __m512i even, odd;
};
using Signed = Unsigned;
inline Unsigned as_unsigned(Bytes x) {
    return {_mm512_and_si512(x, _mm512_set1_epi16(255)), _mm512_srli_epi16(x, 8)};
}
inline Signed as_signed(int32_t four) {
    const __m512i x = _mm512_set1_epi32(four);
    return {_mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8), _mm512_srai_epi16(x, 8)};
}
inline Ints dot(Ints acc, Unsigned a, Signed b) {
    const __m512i even = _mm512_madd_epi16(a.even, b.even), odd = _mm512_madd_epi16(a.odd, b.odd);
    return {_mm512_add_epi32(acc.v, _mm512_add_epi32(even, odd))};
}
#endif
// 2^x; 0 below the smallest normal number.
inline Vec exp2(Vec x) {
    const __m512 n = _mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(x.v, n);
    __m512 p = _mm512_set1_ps(1.5403530e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3333558e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    const __mmask16 seen = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
    return {_mm512_maskz_scalef_ps(seen, p, n)};
}
// The sums of 16 vectors, as one vector.
inline Vec sum_each(const Vec* r) {
    __m512 four[4];
    for (int i = 0; i < 4; ++i) {
        __m512 two[2];
        for (int j = 0; j < 2; ++j) {
            const __m512 x = r[4 * i + 2 * j].v, y = r[4 * i + 2 * j + 1].v;
            two[j] = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
        }
        const __m512d x = _mm512_castps_pd(two[0]), y = _mm512_castps_pd(two[1]);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                                _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    auto fold = [](__m512 x, __m512 y) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
    };
    return {fold(fold(four[0], four[1]), fold(four[2], four[3]))};
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define ISA_NAME "avx2"
constexpr int LANES = 8;
constexpr int WIDE = 2;
struct Vec {
    __m256 v;
};
inline Vec set1(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const bf16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline Vec load(const fp16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(bf16* p, Vec a) {
    const __m256i u = _mm256_castps_si256(a.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
    const __m256i odd_nan = _mm256_set1_epi32(0x7fc00000);
    r = _mm256_srli_epi32(_mm256_blendv_epi8(r, odd_nan, _mm256_castps_si256(nan)), 16);
    const __m256i packed = _mm256_packus_epi32(r, r);
    const __m256i low = _mm256_permute4x64_epi64(packed, 0x08);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(low));
}
inline void store(fp16* p, Vec a) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a.v, 0)); }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
// Pairs of bf16 as floats: the first numbers of a vector of pairs; its second numbers; the first and
// the second number of one pair, in all lanes.
inline Vec wide_first(__m256i x) { return {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16))}; }
inline Vec wide_second(__m256i x) {
    const __m256i high = _mm256_set1_epi32(int(0xffff0000));
    return {_mm256_castsi256_ps(_mm256_and_si256(x, high))};
}
inline Vec firsts(const uint32_t* p) { return wide_first(_mm256_loadu_si256((const __m256i*)p)); }
inline Vec seconds(const uint32_t* p) { return wide_second(_mm256_loadu_si256((const __m256i*)p)); }
inline Vec first(uint32_t pair) { return wide_first(_mm256_set1_epi32(int(pair))); }
inline Vec second(uint32_t pair) { return wide_second(_mm256_set1_epi32(int(pair))); }
// Integers, and bytes: four per lane.
struct Ints {
    __m256i v;
};
using Bytes = __m256i;
struct Unsigned {
    __m256i even, odd;
};
using Signed = Unsigned;
inline Ints ints(int32_t x) { return {_mm256_set1_epi32(x)}; }
inline Vec to_float(Ints a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline Bytes load_bytes(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Bytes low_halves(Bytes x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline Bytes high_halves(Bytes x) { return low_halves(_mm256_srli_epi16(x, 4)); }
inline void store_signed(int8_t* p, Vec x) {
    const __m256i whole = _mm256_cvtps_epi32(x.v);
    const __m128i pairs = _mm_packs_epi32(_mm256_castsi256_si128(whole),
                                          _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(pairs, pairs));
}
inline Unsigned as_unsigned(Bytes x) {
    return {_mm256_and_si256(x, _mm256_set1_epi16(255)), _mm256_srli_epi16(x, 8)};
}
inline Signed as_signed(int32_t four) {
    const __m256i x = _mm256_set1_epi32(four);
    return {_mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), _mm256_srai_epi16(x, 8)};
}
inline Ints dot(Ints acc, Unsigned a, Signed b) {
    const __m256i even = _mm256_madd_epi16(a.even, b.even), odd = _mm256_madd_epi16(a.odd, b.odd);
    return {_mm256_add_epi32(acc.v, _mm256_add_epi32(even, odd))};
}
#else
#define ISA_NAME "portable"
constexpr int LANES = 8;
constexpr int WIDE = 2;
struct Vec {
    float v[LANES];
};
template <class F>
inline Vec each(F f) {
    Vec out;
    for (int i = 0; i < LANES; ++i) out.v[i] = f(i);
    return out;
}
inline Vec set1(float x) { return each([=](int) { return x; }); }
template <class T>
inline Vec load(const T* p) { return each([=](int i) { return to_float(p[i]); }); }
template <class T>
inline void store(T* p, Vec a) {
    for (int i = 0; i < LANES; ++i) from_float(a.v[i], p[i]);
}
inline Vec operator+(Vec a, Vec b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
inline Vec operator-(Vec a, Vec b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
inline Vec operator*(Vec a, Vec b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
inline Vec operator/(Vec a, Vec b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
inline Vec fma(Vec a, Vec b, Vec c) {
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
// Returns `b` if either is NaN, as x86's instruction does.
inline Vec max(Vec a, Vec b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
// Pairs of bf16 as floats: the first numbers of a vector of pairs; its second numbers; the first and
// the second number of one pair, in all lanes.
inline Vec firsts(const uint32_t* p) { return each([=](int i) { return of_bits(p[i] << 16); }); }
inline Vec seconds(const uint32_t* p) {
    return each([=](int i) { return of_bits(p[i] & 0xffff0000u); });
}
inline Vec first(uint32_t pair) { return set1(of_bits(pair << 16)); }
inline Vec second(uint32_t pair) { return set1(of_bits(pair & 0xffff0000u)); }
// Integers, and bytes: four per lane.
struct Ints {
    int32_t v[LANES];
};
struct Bytes {
    uint8_t v[4 * LANES];
};
using Unsigned = Bytes;
struct Signed {
    int8_t v[4];
};
inline Ints ints(int32_t x) {
    Ints out;
    for (int32_t& each : out.v) each = x;
    return out;
}
inline Vec to_float(Ints a) { return each([&](int i) { return float(a.v[i]); }); }
inline Bytes load_bytes(const uint8_t* p) {
    Bytes out;
    std::memcpy(out.v, p, sizeof out.v);
    return out;
}
inline Bytes low_halves(Bytes x) {
    for (uint8_t& each : x.v) each &= 15;
    return x;
}
inline Bytes high_halves(Bytes x) {
    for (uint8_t& each : x.v) each >>= 4;
    return x;
}
inline void store_signed(int8_t* p, Vec x) {
    for (int i = 0; i < LANES; ++i) p[i] = int8_t(std::nearbyintf(x.v[i]));
}
inline Unsigned as_unsigned(Bytes x) { return x; }
inline Signed as_signed(int32_t four) {
    Signed out;
    std::memcpy(out.v, &four, 4);
    return out;
}
inline Ints dot(Ints acc, Unsigned a, Signed b) {
    for (int i = 0; i < LANES; ++i)
        for (int j = 0; j < 4; ++j) acc.v[i] += int32_t(a.v[4 * i + j]) * b.v[j];
    return acc;
}
#endif

#if !defined(__AVX512F__) || !defined(__AVX512BW__)
inline float sum(Vec a) {
    float x[LANES], total = 0;
    store(x, a);
    for (float each : x) total += each;
    return total;
}
inline float top(Vec a) {
    float x[LANES];
    store(x, a);
    return *std::max_element(x, x + LANES);
}
inline Vec exp2(Vec a) {
    float x[LANES], n[LANES];
    store(x, a);
    for (int i = 0; i < LANES; ++i) {
        const float whole = std::nearbyintf(std::max(-126.f, x[i] == x[i] ? x[i] : 0.f));
        n[i] = x[i] < -126.f ? 0.f : of_bits(uint32_t(std::min(whole, 127.f) + 127.f) << 23);
        x[i] -= whole;
        if (n[i] == 0.f) x[i] = 0.f;
        if (x[i] != x[i]) n[i] = x[i];  // NaN stays NaN
    }
    const Vec r = load(x);
    Vec p = set1(1.5403530e-4f);
    for (float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.f})
        p = fma(p, r, set1(c));
    return p * load(n);
}
inline Vec sum_each(const Vec* r) {
    float x[LANES];
    for (int i = 0; i < LANES; ++i) x[i] = sum(r[i]);
    return load(x);
}
#endif

// The first n < LANES elements, followed by zeros.
template <class T>
inline Vec load_part(const T* p, int n) {
    T padded[LANES] = {};
    std::memcpy(padded, p, size_t(n) * sizeof(T));
    return load(padded);
}
template <class T>
inline void store_part(T* p, Vec a, int n) {
    T padded[LANES];
    store(padded, a);
    std::memcpy(p, padded, size_t(n) * sizeof(T));
}
// Elements at..at+LANES of a row of `size`; zeros after its end.
template <class T>
inline Vec load_at(const T* row, int at, int size) {
    return at + LANES <= size ? load(row + at) : load_part(row + at, size - at);
}
template <class T>
inline void store_at(T* row, Vec a, int at, int size) {
    if (at + LANES <= size) store(row + at, a);
    else store_part(row + at, a, size - at);
}

constexpr float LOG2E = 1.44269504088896340736f;
constexpr float LN2 = 0.69314718055994530942f;
constexpr float NEVER = -std::numeric_limits<float>::infinity();

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
