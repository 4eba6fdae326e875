// The parts of a Llama-style layer around attention, and a whole decode step of such layers.
#pragma once
#include "cache.h"
#include "decode.h"
#include "weights.h"

// Normalized numbers from d on; `by` is 1 / rms.  They are rounded and then multiplied by a weight of
// the layer's dtype, or (Gemma) multiplied by a float weight without rounding in between.
template <class T>
inline Vec normed_at(const T* x, int d, int size, Vec by, const void* weight, bool has_floats) {
    const Vec v = load_at(x, d, size) * by;
    if (has_floats) return v * load_at((const float*)weight, d, size);
    return rounded<T>(v) * load_at((const T*)weight, d, size);
}

template <class T>
inline Vec one_over_rms(const T* x, int size, float epsilon) {
    Vec squares = set1(0.f);
    for (int d = 0; d < size; d += LANES) {
        const Vec v = load_at(x, d, size);
        squares = fma(v, v, squares);
    }
    return set1(1.f / std::sqrt(sum(squares) / float(size) + epsilon));
}

// out [rows, size] = norm of x, plus the residual if there is one (which may be out).
template <class T>
inline void rms_norm(const T* x, int64_t rows, int64_t size, const void* weight, bool has_floats,
                     float epsilon, T* out, const T* residual = nullptr) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const T* from = x + row * size;
        const Vec by = one_over_rms(from, int(size), epsilon);
        for (int d = 0; d < size; d += LANES) {
            Vec v = normed_at(from, d, int(size), by, weight, has_floats);
            if (residual) v = rounded<T>(v) + load_at(residual + row * size, d, int(size));
            store_at(out + row * size, v, d, int(size));
        }
    }
}

// The same for one head x [size], in place.
template <class T>
inline void norm_head(T* x, int size, const void* weight, bool has_floats, float epsilon) {
    const Vec by = one_over_rms(x, size, epsilon);
    for (int d = 0; d < size; d += LANES)
        store_at(x, normed_at(x, d, size, by, weight, has_floats), d, size);
}

// How a row [H + 2K, D] of queries, keys and values is prepared for attention.
struct Heads {
    int64_t heads, kv_heads, size, rotated;  // rotated: rotated numbers per head
    const void *query_norm, *key_norm;      // [D] or null
    float epsilon;
    int64_t floats;  // whether the weights of norms are floats
};

// Rotate queries and keys by the angles cos, sin [rows, rotated], in place (in two halves as in Llama;
// the rest of a head is unchanged).  Threads continue with their own rows without waiting.
template <class T>
inline void rotate(T* qkv, int64_t rows, const Heads& h, const float* cos, const float* sin) {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; ++row) {
        const int half = int(h.rotated / 2);
        const float *c = cos + row * h.rotated, *s = sin + row * h.rotated;
        for (int64_t head = 0; head < h.heads + h.kv_heads; ++head) {
            T* x = qkv + (row * (h.heads + 2 * h.kv_heads) + head) * h.size;
            const void* norm = head < h.heads ? h.query_norm : h.key_norm;
            if (norm) norm_head(x, int(h.size), norm, h.floats, h.epsilon);
            for (int d = 0; d < half; d += LANES) {
                const Vec a = load_at(x, d, half), b = load_at(x + half, d, half);
                const Vec minus = set1(0.f) - load_at(s, d, half);
                store_at(x, fma(b, minus, a * load_at(c, d, half)), d, half);
                const Vec later = b * load_at(c + half, d, half);
                store_at(x + half, fma(a, load_at(s + half, d, half), later), d, half);
            }
        }
    }
}

// One layer's weights and cache.
struct Layer {
    const void *norm1, *norm2;    // [hidden]
    const void *after1, *after2;  // [hidden] or null: norms before the residual is added
    Linear qkv, out, gate_up, down;
    void *keys, *values;
    int32_t* positions;
    float* scores;
    fp16 *key_scales, *value_scales;  // null if entries are not quantized
    const void *query_norm, *key_norm;
    float scale, epsilon;
    int64_t window, angles;  // angles: index of its table of angles in the step, -1 for none
    int64_t gating, floats;  // GATED or GELU; whether the weights of norms are floats
};

struct Step {
    const Layer* layers;
    int64_t depth, hidden, inner, heads, kv_heads, size, page, rows, width, rotated, codec;
    const float *cos, *sin;                  // [tables, rows, rotated]
    const int64_t *pages, *offsets;          // [depth, rows, kv_heads], of the new entries
    const int32_t* tables;                   // [depth, rows, kv_heads, width]
    const int64_t *lengths, *at, *longest;   // [depth, rows, kv_heads], [rows], [depth]
    void* queries;                           // [depth, rows, heads, size] or null: kept for rings
    float* lse;                              // [depth, rows, heads]
    float* const* probs;                     // [depth] of [rows, kv_heads, longest], or null
    const Adapted* adapted;                  // null if no row has an adapter
    double* seconds;                         // [Part], to which each part's time is added, or null
};

enum Part { NORMS, QKV, CACHE, ATTENTION, OUT, GATE_UP, DOWN };

// Adds the time since the last part ended, measured by the first thread.
struct Clock {
    double* seconds;
    double last = seconds ? omp_get_wtime() : 0.;
    void end(Part part) {
        if (!seconds || omp_get_thread_num()) return;
        const double now = omp_get_wtime();
        seconds[part] += now - last, last = now;
    }
};

// Run x [rows, hidden] through all layers, in place.
template <class T>
inline void decode_step(const Step& s, T* x) {
    static thread_local Scratch kept, spans_room, logits_room, codes_room, low_space;
    const int64_t wide = (s.heads + 2 * s.kv_heads) * s.size, mixed = s.heads * s.size;
    const int64_t streams = s.rows * s.kv_heads;
    T* normed = kept.get<T>(size_t(s.rows) * (s.hidden + wide + 2 * mixed + s.inner + 4 * LANES));
    T *qkv = normed + s.rows * s.hidden, *queries = qkv + s.rows * wide;
    T *attended = queries + s.rows * mixed, *inner = attended + s.rows * mixed;
    Decode<T> d{};
    d.heads = int(s.heads), d.kv_heads = int(s.kv_heads), d.key_dim = d.value_dim = int(s.size);
    d.page = int(s.page), d.width = int(s.width), d.requests = int(s.rows), d.at = s.at;
    d.out = attended, d.codec = int(s.codec);
    size_t room = 0, logits = 0, codes = 0;
    for (int64_t i = 0; i < s.depth; ++i) {
        const Layer& layer = s.layers[i];
        for (const Linear* each : {&layer.qkv, &layer.out, &layer.gate_up, &layer.down})
            codes = std::max(codes, linear_room(s.rows, *each));
        d.longest = s.longest[i];
        room = std::max(room, decode_room(d, decode_cut(d)));
        if (s.probs) logits = std::max(logits, size_t(s.rows * s.heads * d.longest));
    }
    float *partial = spans_room.get<float>(room), *kept_logits = nullptr;
    if (s.probs) kept_logits = logits_room.get<float>(logits);
    char* coded = codes_room.get<char>(codes);
    float* products = low_space.get<float>(low_room(s.rows, s.adapted));
    Clock clock{s.seconds};
#pragma omp parallel firstprivate(d, clock)
    for (int64_t i = 0; i < s.depth; ++i) {
        const Layer& layer = s.layers[i];
        const auto low = [&](int64_t of_layer) { return Low{s.adapted, 4 * i + of_layer, products}; };
        T* mine = s.queries ? (T*)s.queries + i * s.rows * mixed : queries;
        const auto add = [&](const T* from, const Linear& w, const void* after, const Low& adapted) {
            if (!after) return linear<T>(from, s.rows, w, ADD, x, x, coded, adapted);
            linear<T>(from, s.rows, w, PLAIN, nullptr, normed, coded, adapted);
            rms_norm(normed, s.rows, s.hidden, after, layer.floats, layer.epsilon, x, x);
        };
        rms_norm(x, s.rows, s.hidden, layer.norm1, layer.floats, layer.epsilon, normed);
        clock.end(NORMS);
        linear<T>(normed, s.rows, layer.qkv, PLAIN, nullptr, qkv, coded, low(0));
        clock.end(QKV);
        const int64_t table = std::max<int64_t>(0, layer.angles) * s.rows * s.rotated;
        const Heads h{s.heads, s.kv_heads, s.size, layer.angles < 0 ? 0 : s.rotated, layer.query_norm,
                      layer.key_norm, layer.epsilon, layer.floats};
        rotate(qkv, s.rows, h, s.cos + table, s.sin + table);
        const T* keys = qkv + mixed;
        const Rows<T> new_rows{keys, keys + s.kv_heads * s.size, wide, wide, s.size, s.size, s.at,
                               s.pages + i * streams, s.offsets + i * streams, s.rows};
        write_rows(new_rows, Place<T>{layer.keys, layer.values, layer.positions, layer.scores,
                                      layer.key_scales, layer.value_scales, s.kv_heads, s.size,
                                      s.size, s.page, s.codec});
#pragma omp for schedule(static)
        for (int64_t row = 0; row < s.rows; ++row)
            std::memcpy(mine + row * mixed, qkv + row * wide, mixed * sizeof(T));
        clock.end(CACHE);
        d.queries = mine, d.keys = layer.keys, d.values = layer.values;
        d.key_scales = layer.key_scales, d.value_scales = layer.value_scales;
        d.positions = layer.positions, d.table = s.tables + i * streams * s.width;
        d.lengths = s.lengths + i * streams, d.longest = s.longest[i];
        d.window = layer.window, d.scale = layer.scale;
        d.lse = s.lse + i * s.rows * s.heads, d.probs = s.probs ? s.probs[i] : nullptr;
        decode(d, decode_cut(d), partial, kept_logits);
        clock.end(ATTENTION);
        add(attended, layer.out, layer.after1, low(1));
        clock.end(OUT);
        rms_norm(x, s.rows, s.hidden, layer.norm2, layer.floats, layer.epsilon, normed);
        clock.end(NORMS);
        linear<T>(normed, s.rows, layer.gate_up, Epilogue(layer.gating), nullptr, inner, coded, low(2));
        clock.end(GATE_UP);
        add(inner, layer.down, layer.after2, low(3));
        clock.end(DOWN);
    }
}
