// The CPU kernels behind a plain C interface; see library.py for the Python side.
#include "cache.h"
#include "coding.h"
#include "matmul.h"
#include "decode.h"
#include "evict.h"
#include "prefill.h"
#include "scores.h"
#include "select.h"
#include "step.h"
#include "weights.h"

// Call f(T{}) for dtype 0 (float32), 1 (bfloat16) or 2 (float16).
template <class F>
static void by_dtype(int dtype, F f) {
    if (dtype == 0) f(float{});
    else if (dtype == 1) f(bf16{});
    else f(fp16{});
}

// The same for the dtypes of Llama-style layers (has_layers).
template <class F>
static void by_linear(int dtype, F f) {
    if (dtype == 1) return f(bf16{});
    f(float{});
}

struct DecodeCall {
    const void *queries, *keys, *values, *positions, *key_scales, *value_scales, *table, *lengths, *at;
    void *out, *lse, *probs;
    int64_t requests, heads, kv_heads, key_dim, value_dim, page, width, codec, longest, window;
    float scale, softcap;
};

struct DenseCall {
    const void *queries, *keys, *values, *q_pos, *k_pos;
    int64_t query_row, key_head, key_row, value_head, value_row, k_row;
    int64_t queries_n, entries, heads, kv_heads, key_dim, value_dim, window;
    float scale, softcap;
};

template <class T>
static Dense<T> dense(const DenseCall& c) {
    return {(const T*)c.queries, (const T*)c.keys, (const T*)c.values, c.query_row, c.key_head,
            c.key_row, c.value_head, c.value_row, (const int64_t*)c.q_pos, (const int64_t*)c.k_pos,
            c.k_row, c.queries_n, c.entries, int(c.heads), int(c.kv_heads), int(c.key_dim),
            int(c.value_dim), c.window, c.scale, c.softcap};
}

extern "C" {

const char* isa() { return ISA_NAME; }

// Whether layers of this dtype run in these kernels; torch runs the others.
int has_layers(int dtype) { return dtype == 0 || dtype == 1; }

int64_t panel_columns() { return COLUMNS; }

int64_t lanes() { return LANES; }

// Numbers of a row that an adapter multiplies at a time.
int64_t deep(int dtype) { return dtype == 1 ? DEEP<bf16> : DEEP<float>; }

int64_t group_inputs() { return GROUP; }

// Several layers of the same shape, one after the other.
void decode_attention(int dtype, const DecodeCall* calls, int64_t count) {
    static thread_local Scratch room, logits;
    by_dtype(dtype, [&](auto kind) {
        using T = decltype(kind);
        const auto layer = [&](int64_t i) {
            const DecodeCall& c = calls[i];
            return Decode<T>{(const T*)c.queries, c.keys, c.values, (const int32_t*)c.positions,
                             (const fp16*)c.key_scales, (const fp16*)c.value_scales,
                             (const int32_t*)c.table,
                             (const int64_t*)c.lengths, (const int64_t*)c.at, (T*)c.out,
                             (float*)c.lse, (float*)c.probs, int(c.requests), int(c.heads),
                             int(c.kv_heads), int(c.key_dim), int(c.value_dim), int(c.page),
                             int(c.width), int(c.codec), c.longest, c.window, c.scale, c.softcap};
        };
        size_t partials = 0, products = 0;
        for (int64_t i = 0; i < count; ++i) {
            const Decode<T> a = layer(i);
            partials = std::max(partials, decode_room(a, decode_cut(a)));
            if (a.probs) products = std::max(products, size_t(a.requests) * a.heads * a.longest);
        }
        float *partial = room.get<float>(partials), *kept = nullptr;
        if (products) kept = logits.get<float>(products);
#pragma omp parallel
        for (int64_t i = 0; i < count; ++i) {
            const Decode<T> a = layer(i);
            decode(a, decode_cut(a), partial, a.probs ? kept : nullptr);
        }
    });
}

// watch: null, or the queries whose weights are also summed.
void prefill_attention(int dtype, const DenseCall* c, void* out, const Watch* watch) {
    by_dtype(dtype, [&](auto kind) {
        using T = decltype(kind);
        prefill(dense<T>(*c), (T*)out, watch);
    });
}

// rows: 0 sum, 1 max, 2 below; lse [W, H] is read if has_lse, else written.
void score_window(int dtype, const DenseCall* c, int per_kv_head, int max_heads, int rows,
                  float factor, const float* ramp, int has_lse, float* lse, float* scores) {
    const Reduction how{bool(per_kv_head), bool(max_heads), Over(rows), factor, ramp};
    by_dtype(dtype, [&](auto kind) {
        window_scores(dense<decltype(kind)>(*c), how, bool(has_lse), lse, scores);
    });
}

int64_t keep(const Keeping* many, int64_t count) { return keep_all(many, count); }

void gather_pages(const Storage* tensor, const int32_t* pages, int64_t row, int heads, int page,
                  int64_t kept, void* out) {
    gather(*tensor, pages, row, heads, page, kept, (char*)out);
}

// Keys or values stored by a codec: codes and their scales.
void gather_decoded(int dtype, int codec, const uint8_t* codes, const fp16* scales, int64_t size,
                    const int32_t* pages, int64_t row, int heads, int page, int64_t kept, void* out) {
    by_dtype(dtype, [&](auto kind) {
        gather_coded(codec, codes, scales, size, pages, row, heads, page, kept, (decltype(kind)*)out);
    });
}

struct WriteCall {
    const void *keys, *values, *at, *pages, *offsets;
    void *to_keys, *to_values, *to_positions, *to_scores, *to_key_scales, *to_value_scales;
    int64_t key_row, value_row, key_head, value_head, count, kv_heads, key_dim, value_dim, page, codec;
};

// Sizes of the structs that library.py declares too, in the order of its STRUCTS.
int64_t struct_bytes(int which) {
    static const size_t bytes[] = {
        sizeof(DecodeCall), sizeof(DenseCall), sizeof(Storage), sizeof(Keeping), sizeof(Adding),
        sizeof(Eviction), sizeof(WriteCall), sizeof(Linear), sizeof(Watch), sizeof(Heads),
        sizeof(Layer), sizeof(Step), sizeof(LowRank), sizeof(Adapted),
    };
    return which < int(sizeof bytes / sizeof *bytes) ? int64_t(bytes[which]) : -1;
}

void write_entries(int dtype, const WriteCall* c) {
    by_dtype(dtype, [&](auto kind) {
        using T = decltype(kind);
        const Rows<T> rows{(const T*)c->keys, (const T*)c->values, c->key_row, c->value_row,
                           c->key_head, c->value_head, (const int64_t*)c->at,
                           (const int64_t*)c->pages, (const int64_t*)c->offsets, c->count};
        const Place<T> place{c->to_keys, c->to_values, (int32_t*)c->to_positions,
                             (float*)c->to_scores, (fp16*)c->to_key_scales,
                             (fp16*)c->to_value_scales, c->kv_heads, c->key_dim, c->value_dim,
                             c->page, c->codec};
#pragma omp parallel
        write_rows(rows, place);
    });
}

void add_scores(const Adding* c) { add_weights(*c); }

void evict_entries(int dtype, const Eviction* many, int64_t count) {
    by_dtype(dtype, [&](auto kind) { evict_all<decltype(kind)>(many, count); });
}

int64_t best_entries(const float* scores, const uint8_t* forced, const int64_t* places,
                     const int64_t* lengths, int64_t heads, int64_t n, int64_t* counts,
                     int64_t room, int64_t* out) {
    return best_of(scores, forced, places, lengths, heads, n, counts, room, out);
}

void pool_neighbours(const float* scores, const int64_t* places, int64_t row, int64_t heads,
                     int64_t n, int kernel, int is_max, float* out) {
    pool_scores(scores, places, row, heads, n, kernel, bool(is_max), out);
}

int64_t read_words(const int64_t* words, int64_t count) { return read_all(words, count); }

// --- Llama-style layers; dtype 0 or 1 ---------------------------------------------------------

// weights [columns, depth] → panels.
void pack_linear(int dtype, const void* weights, int64_t columns, int64_t depth, void* out) {
    by_linear(dtype, [&](auto kind) {
        using T = decltype(kind);
        const int64_t panels = ceil_div(columns, COLUMNS);
        const int64_t units = ceil_div(depth, LinearUnit<T>::DEPTH);
#pragma omp parallel for schedule(static)
        for (int64_t p = 0; p < panels; ++p)
            pack_weights<T>((uint32_t*)out + p * units * COLUMNS, p * COLUMNS, columns, int(depth),
                            [&](int64_t column) { return (const T*)weights + column * depth; });
    });
}

// adapted: null, or the adapters of the rows; index: of the linear in the adapters.
void run_linear(int dtype, const void* a, int64_t rows, const Linear* w, int how,
                const void* residual, void* out, const Adapted* adapted, int64_t index) {
    static thread_local Scratch room, low_space;
    char* codes = room.get<char>(linear_room(rows, *w));
    const Low low{adapted, index, low_space.get<float>(low_room(rows, adapted))};
    by_linear(dtype, [&](auto kind) {
        using T = decltype(kind);
#pragma omp parallel
        linear<T>((const T*)a, rows, *w, Epilogue(how), (const T*)residual, (T*)out, codes, low);
    });
}

int64_t packed_bytes(int format, int64_t columns, int64_t depth) {
    return ceil_div(columns, COLUMNS) * int64_t(panel_bytes(format, depth));
}

// Weights of the outputs at the addresses rows [columns], numbers or GGUF blocks (coding.h) → panels.
void pack_coded(int format, const void* const* rows, const int32_t* sources, int64_t columns,
                int64_t depth, void* out) {
    pack_codes(format, rows, sources, columns, depth, (uint8_t*)out);
}

// Rows of an embedding that is packed as a linear: out [count, depth].
void read_rows(int dtype, const Linear* w, const int64_t* rows, int64_t count, void* out) {
    by_linear(dtype, [&](auto kind) { read_columns(*w, rows, count, (decltype(kind)*)out); });
}

// floats: whether the weight is in floats, whatever the dtype.
void run_norm(int dtype, const void* x, int64_t rows, int64_t size, const void* weight, int floats,
              float epsilon, void* out) {
    by_linear(dtype, [&](auto kind) {
        using T = decltype(kind);
#pragma omp parallel
        rms_norm((const T*)x, rows, size, weight, bool(floats), epsilon, (T*)out);
    });
}

void run_rotate(int dtype, void* qkv, int64_t rows, const Heads* heads, const float* cos,
                const float* sin) {
    by_linear(dtype, [&](auto kind) {
#pragma omp parallel
        rotate((decltype(kind)*)qkv, rows, *heads, cos, sin);
    });
}

void run_step(int dtype, const Step* step, void* x) {
    by_linear(dtype, [&](auto kind) { decode_step(*step, (decltype(kind)*)x); });
}
}
