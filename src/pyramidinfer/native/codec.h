// Keys and values in few bits: the same codes and scales as codec.py.
#pragma once
#include <cstdint>

#include "simd.h"

enum Codec { AS_IS = 0, INT8 = 1, INT4 = 2, FP8 = 3 };

constexpr int WIDEST_GROUP = 64;

// Channels that share a scale: the greatest common divisor of a head's size and 64.
inline int group_size(int64_t size) {
    return int(std::min<int64_t>(size & -size, WIDEST_GROUP));
}
inline int64_t code_bytes(int codec, int64_t size) { return codec == INT4 ? size / 2 : size; }
// What is subtracted from a code.
inline float middle_of(int codec) { return codec == INT8 ? 127.5f : codec == INT4 ? 7.5f : 0.f; }

// x [n] times the Hadamard matrix of n (a power of two, at most 64) over its root, in place.
inline void rotate_group(float* x, int n) {
    int half = 1;
#if defined(__AVX512F__) && defined(__AVX512BW__)
    if (n >= 16) {
        const int vectors = n / 16;
        __m512 v[WIDEST_GROUP / 16];
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (int i = 0; i < vectors; ++i) {
            v[i] = _mm512_loadu_ps(x + 16 * i);
            for (int h = 1; h < 16; h *= 2) {
                const __m512i bit = _mm512_set1_epi32(h);
                const __m512 other = _mm512_permutexvar_ps(_mm512_xor_si512(lane, bit), v[i]);
                v[i] = _mm512_mask_sub_ps(_mm512_add_ps(v[i], other),
                                          _mm512_test_epi32_mask(lane, bit), other, v[i]);
            }
        }
        for (int h = 1; h < vectors; h *= 2)
            for (int i = 0; i < vectors; ++i)
                if (!(i & h)) {
                    const __m512 a = v[i], b = v[i + h];
                    v[i] = _mm512_add_ps(a, b), v[i + h] = _mm512_sub_ps(a, b);
                }
        for (int i = 0; i < vectors; ++i) _mm512_storeu_ps(x + 16 * i, v[i]);
        half = n;
    }
#endif
    for (; half < n; half *= 2)
        for (int i = 0; i < n; i += 2 * half)
            for (int j = i; j < i + half; ++j) {
                const float a = x[j], b = x[j + half];
                x[j] = a + b, x[j + half] = a - b;
            }
    const float by = 1.f / std::sqrt(float(n));
    for (int i = 0; i < n; ++i) x[i] *= by;
}
inline void rotate_groups(float* x, int64_t size) {
    const int group = group_size(size);
    for (int64_t at = 0; at < size; at += group) rotate_group(x + at, group);
}

inline uint8_t to_fp8(float x) {  // e4m3, to nearest even; |x| is at most 448
    const uint32_t sign = bits_of(x) >> 24 & 0x80;
    const float size = std::min(std::fabs(x), 448.f);
    if (size < 0x1p-6f) return uint8_t(sign | uint32_t(std::nearbyintf(size * 512.f)));
    const uint32_t u = bits_of(size);
    return uint8_t(sign | (((u + 0x7ffff + (u >> 20 & 1)) >> 20) - (120 << 3)));
}
inline float of_fp8(uint8_t code) {  // as an fp16 with a larger exponent
    return 256.f * to_float(fp16{uint16_t((code & 0x80) << 8 | (code & 0x7f) << 7)});
}

// One key or value [size] as it is put down.
template <class T>
inline void encode(int codec, const T* x, int64_t size, uint8_t* codes, fp16* scales) {
    const int group = group_size(size);
    const float middle = middle_of(codec), most = codec == FP8 ? 448.f : middle;
    float y[WIDEST_GROUP];
    int32_t code[WIDEST_GROUP];
    for (int64_t at = 0; at < size; at += group, ++scales) {
        float top = 0.f, all = 0.f;
        for (int i = 0; i < group; ++i) y[i] = to_float(x[at + i]);
        rotate_group(y, group);
        for (int i = 0; i < group; ++i) top = std::max(top, std::fabs(y[i])), all += y[i] * 0.f;
        from_float(top / most + all, *scales);  // NaN where a number is no number
        const float step = to_float(*scales), by = step > 0.f ? 1.f / step : 0.f;
        uint8_t* to = codes + code_bytes(codec, at);
        if (codec == FP8) {
            for (int i = 0; i < group; ++i) to[i] = to_fp8(y[i] * by);
            continue;
        }
        for (int i = 0; i < group; ++i)
            code[i] = int32_t(std::min(std::max(std::nearbyintf(y[i] * by + middle), 0.f), 2 * middle));
        if (codec == INT8)
            for (int i = 0; i < group; ++i) to[i] = uint8_t(code[i]);
        else
            for (int i = 0; i < group / 2; ++i) to[i] = uint8_t(code[i] | code[i + group / 2] << 4);
    }
}

// One group's numbers without their scale.
inline void widen_codes(int codec, const uint8_t* codes, int group, float* out) {
    const float middle = middle_of(codec);
    if (codec == INT4)
        for (int i = 0; i < group / 2; ++i) {
            out[i] = float(codes[i] & 15) - middle;
            out[i + group / 2] = float(codes[i] >> 4) - middle;
        }
    else if (codec == INT8)
        for (int i = 0; i < group; ++i) out[i] = float(codes[i]) - middle;
    else
        for (int i = 0; i < group; ++i) out[i] = of_fp8(codes[i]);
}

// One key or value [size] as it is stored: rotated.
inline void decode_rotated(int codec, const uint8_t* codes, const fp16* scales, int64_t size,
                           float* out) {
    const int group = group_size(size);
    for (int64_t at = 0; at < size; at += group, ++scales) {
        widen_codes(codec, codes + code_bytes(codec, at), group, out + at);
        const float step = to_float(*scales);
        for (int i = 0; i < group; ++i) out[at + i] *= step;
    }
}

// One key or value [size] as it was, but for what its codes have lost.  room [size].
template <class T>
inline void decode_entry(int codec, const uint8_t* codes, const fp16* scales, int64_t size,
                         float* room, T* out) {
    decode_rotated(codec, codes, scales, size, room);
    rotate_groups(room, size);
    for (int64_t i = 0; i < size; ++i) from_float(room[i], out[i]);
}
