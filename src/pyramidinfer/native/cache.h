// Moving entries: compaction after an eviction, gathering pages, and a plain read to compare with.
#pragma once
#include <omp.h>

#include <cstdint>
#include <cstring>

#include "codec.h"
#include "scratch.h"
#include "simd.h"

// One tensor of a group: [pages, page, bytes of an entry]; a page is one KV head's.
struct Storage {
    char* data;
    int64_t entry;
};

// One head's entries that stay: `indices` [kept] of `length`; `count` tensors.
struct Keeping {
    const Storage* tensors;
    const int32_t* pages;
    const int64_t* indices;
    int64_t count, page, kept, length;
};

#ifdef __AVX512F__
// Whole lines past the caches, so that what is written over is not read first; `to` begins a line.
inline void stream_lines(char* to, const char* from, int64_t bytes) {
    for (int64_t b = 0; b < bytes; b += 64)
        _mm512_stream_si512((__m512i*)(to + b), _mm512_loadu_si512(from + b));
}
#endif

inline void copy_entry(char* to, const char* from, int64_t bytes) {
    if (bytes == 128) std::memcpy(to, from, 128);  // the usual sizes, without a call
    else if (bytes == 256) std::memcpy(to, from, 256);
    else if (bytes == 4) std::memcpy(to, from, 4);
    else if (bytes == 64) std::memcpy(to, from, 64);
    else if (bytes == 32) std::memcpy(to, from, 32);
    else if (bytes == 2) std::memcpy(to, from, 2);
    else std::memcpy(to, from, bytes);
}

// Holes among the first `kept` slots are filled from the tail.  Returns the entries moved, or -1
// where an entry is named twice or is not there.
inline int64_t keep_head(const Keeping& k) {
    static thread_local Scratch mark_room, move_room;
    auto* stays = mark_room.get<uint8_t>(k.length);
    std::memset(stays, 0, k.length);
    const int64_t* mine = k.indices;
    for (int64_t i = 0; i < k.kept; ++i) {
        if (mine[i] < 0 || mine[i] >= k.length || stays[mine[i]]) return -1;
        stays[mine[i]] = 1;
    }
    auto* moves = move_room.get<size_t>(2 * (k.length + 1));  // from, to
    int64_t moved = 0, found = 0;  // without branches: which entries stay is anyone's guess
    for (int64_t i = 0; i < k.kept; ++i) moves[2 * moved + 1] = i, moved += !stays[i];
    for (int64_t i = k.kept; i < k.length; ++i) moves[2 * found] = i, found += stays[i];
    const int shift = k.page & (k.page - 1) ? -1 : __builtin_ctzll(k.page);
    for (int64_t i = 0; i < 2 * moved; ++i) {
        const int64_t entry = moves[i], page = shift < 0 ? entry / k.page : entry >> shift;
        moves[i] = size_t(k.pages[page]) * k.page + (entry - page * k.page);
    }
    for (int64_t i = 0; i < k.count; ++i) {
        char* data = k.tensors[i].data;
        const int64_t bytes = k.tensors[i].entry;
#ifdef __AVX512F__
        if (bytes % 64 == 0 && size_t(data) % 64 == 0) {
            for (int64_t m = 0; m < moved; ++m) {
                if (m + 8 < moved)
                    for (int64_t b = 0; b < bytes; b += 64)
                        __builtin_prefetch(data + moves[2 * m + 16] * bytes + b, 0, 3);
                stream_lines(data + moves[2 * m + 1] * bytes, data + moves[2 * m] * bytes, bytes);
            }
            _mm_sfence();
            continue;
        }
#endif
        for (int64_t m = 0; m < moved; ++m) {
            if (m + 8 < moved)
                for (int64_t b = 0; b < bytes; b += 64) {
                    __builtin_prefetch(data + moves[2 * m + 16] * bytes + b, 0, 3);
                    __builtin_prefetch(data + moves[2 * m + 17] * bytes + b, 1, 3);
                }
            copy_entry(data + moves[2 * m + 1] * bytes, data + moves[2 * m] * bytes, bytes);
        }
    }
    return moved;
}

// Several heads at once.  Returns the entries moved, or -1 (see keep_head).
inline int64_t keep_all(const Keeping* many, int64_t count) {
    int64_t moved = 0, wrong = 0;
#pragma omp parallel for schedule(static) reduction(+ : moved, wrong) \
    if (count * (count ? many[0].kept : 0) > 4096)
    for (int64_t i = 0; i < count; ++i) {
        const int64_t found = keep_head(many[i]);
        moved += found;
        wrong += found < 0;
    }
    return wrong ? -1 : moved;
}

// out [heads, kept, entry] of one tensor, page by page; pages [heads, ..] are `row` apart.
inline void gather(const Storage& tensor, const int32_t* pages, int64_t row, int heads, int page,
                   int64_t kept, char* out) {
    const int64_t whole = ceil_div(kept, page);
#pragma omp parallel for schedule(static) collapse(2) if (heads * kept * tensor.entry > 65536)
    for (int head = 0; head < heads; ++head)
        for (int64_t i = 0; i < whole; ++i) {
            const int64_t n = std::min<int64_t>(page, kept - i * page);
            std::memcpy(out + (head * kept + i * page) * tensor.entry,
                        tensor.data + size_t(pages[head * row + i]) * page * tensor.entry,
                        n * tensor.entry);
        }
}

// The same of keys or values that a codec has stored, decoded: out [heads, kept, size].
template <class T>
inline void gather_coded(int codec, const uint8_t* codes, const fp16* scales, int64_t size,
                         const int32_t* pages, int64_t row, int heads, int page, int64_t kept, T* out) {
    const int64_t whole = ceil_div(kept, page), bytes = code_bytes(codec, size);
    const int64_t groups = size / group_size(size);
#pragma omp parallel for schedule(static) collapse(2) if (heads * kept * size > 16384)
    for (int head = 0; head < heads; ++head)
        for (int64_t i = 0; i < whole; ++i) {
            static thread_local Scratch room;
            const int64_t n = std::min<int64_t>(page, kept - i * page);
            const size_t slot = size_t(pages[head * row + i]) * page;
            for (int64_t e = 0; e < n; ++e)
                decode_entry(codec, codes + (slot + e) * bytes, scales + (slot + e) * groups, size,
                             room.get<float>(size), out + (head * kept + i * page + e) * size);
        }
}

// New keys and values [n, K, ...], rows and heads so many numbers apart, with their positions, and
// the page and offset each goes to, [n, K].
template <class T>
struct Rows {
    const T *keys, *values;
    int64_t key_row, value_row, key_head, value_head;
    const int64_t *at, *pages, *offsets;
    int64_t count;
};
template <class T>
struct Place {
    void *keys, *values;  // of T, or codes
    int32_t* positions;
    float* scores;  // null where the pool keeps none
    fp16 *key_scales, *value_scales;
    int64_t kv_heads, key_dim, value_dim, page, codec;

    static void put(int codec, const T* from, int64_t size, size_t slot, void* to, fp16* scales) {
        if (codec == AS_IS) std::memcpy((T*)to + slot * size, from, size * sizeof(T));
        else
            encode(codec, from, size, (uint8_t*)to + slot * code_bytes(codec, size),
                   scales + slot * (size / group_size(size)));
    }
};

// To be called by all threads of a parallel region; they go on with their own rows at once.
template <class T>
inline void write_rows(const Rows<T>& rows, const Place<T>& to) {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows.count; ++row)
        for (int64_t head = 0; head < to.kv_heads; ++head) {
            const int64_t at = row * to.kv_heads + head;
            const size_t slot = size_t(rows.pages[at]) * to.page + rows.offsets[at];
            to.put(int(to.codec), rows.keys + row * rows.key_row + head * rows.key_head, to.key_dim,
                   slot, to.keys, to.key_scales);
            to.put(int(to.codec), rows.values + row * rows.value_row + head * rows.value_head,
                   to.value_dim, slot, to.values, to.value_scales);
            to.positions[slot] = int32_t(rows.at[row]);
            if (to.scores) to.scores[slot] = 0.f;
        }
}

// What a decode step adds to the running scores of one of its rows.  layers [count][4]: a layer's
// number, the addresses of its group's scores and of its weights [rows, K, longest], and `longest`;
// pages [depth, K, width]; lengths [depth, heads], whose first K are these.
struct Adding {
    const int64_t* layers;
    const int32_t* pages;
    const int64_t* lengths;
    int64_t count, row, kv_heads, width, heads, page;
};

inline void add_weights(const Adding& a) {
#pragma omp parallel for schedule(static) collapse(2)
    for (int64_t i = 0; i < a.count; ++i)
        for (int64_t head = 0; head < a.kv_heads; ++head) {
            const int64_t *at = a.layers + 4 * i, longest = at[3];
            auto* scores = (float*)at[1];
            const float* weights = (const float*)at[2] + (a.row * a.kv_heads + head) * longest;
            const int32_t* pages = a.pages + (at[0] * a.kv_heads + head) * a.width;
            const int64_t length = a.lengths[at[0] * a.heads + head];
            for (int64_t t = 0; t < length; t += a.page) {
                const int64_t n = std::min(a.page, length - t);
                float* to = scores + size_t(pages[t / a.page]) * a.page;
                for (int64_t e = 0; e < n; ++e) to[e] += weights[t + e];
            }
        }
}

// The sum of a tensor's words, read once by all cores: what memory can deliver.
inline int64_t read_all(const int64_t* words, int64_t count) {
    int64_t total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total)
    for (int64_t i = 0; i < count; ++i) total += words[i];
    return total;
}
