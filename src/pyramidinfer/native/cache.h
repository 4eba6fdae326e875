// Moving entries: compaction after an eviction, gathering pages, and a plain read to compare with.
#pragma once
#include <omp.h>

#include <cstdint>
#include <cstring>

#include "scratch.h"
#include "simd.h"

// One tensor of a group: [pages, heads, page, bytes of an entry].
struct Storage {
    char* data;
    int64_t entry;
};

// Keep the entries `indices` [heads or 1, kept] of `length` in the first slots of the pages:
// holes in front are filled from the tail, head by head.  Returns the entries moved, or -1 where
// an entry is named twice or is not there.
inline int64_t keep_entries(const Storage* tensors, int count, const int32_t* pages, int heads,
                            int page, const int64_t* indices, int64_t row, int64_t kept,
                            int64_t length) {
    static thread_local Scratch room;
    auto* stays = room.get<uint8_t>(size_t(heads) * length);
    std::memset(stays, 0, size_t(heads) * length);
    for (int head = 0; head < heads; ++head)
        for (int64_t i = 0; i < kept; ++i) {
            const int64_t entry = indices[head * row + i];
            if (entry < 0 || entry >= length || stays[head * length + entry]) return -1;
            stays[head * length + entry] = 1;
        }
    int64_t moved = 0;
#pragma omp parallel for schedule(static) reduction(+ : moved) if (heads * kept > 4096)
    for (int head = 0; head < heads; ++head) {
        const uint8_t* mine = stays + head * length;
        int64_t source = kept;
        for (int64_t target = 0; target < kept; ++target) {
            if (mine[target]) continue;
            while (!mine[source]) ++source;
            const size_t to = (size_t(pages[target / page]) * heads + head) * page + target % page;
            const size_t from = (size_t(pages[source / page]) * heads + head) * page + source % page;
            for (int i = 0; i < count; ++i)
                std::memcpy(tensors[i].data + to * tensors[i].entry,
                            tensors[i].data + from * tensors[i].entry, tensors[i].entry);
            ++source, ++moved;
        }
    }
    return moved;
}

// out [heads, kept, entry] of one tensor, page by page.
inline void gather(const Storage& tensor, const int32_t* pages, int heads, int page, int64_t kept,
                   char* out) {
    const int64_t whole = ceil_div(kept, page);
#pragma omp parallel for schedule(static) collapse(2) if (heads * kept * tensor.entry > 65536)
    for (int head = 0; head < heads; ++head)
        for (int64_t i = 0; i < whole; ++i) {
            const int64_t n = std::min<int64_t>(page, kept - i * page);
            std::memcpy(out + (head * kept + i * page) * tensor.entry,
                        tensor.data + (size_t(pages[i]) * heads + head) * page * tensor.entry,
                        n * tensor.entry);
        }
}

// New keys and values [n, K, ...], rows and heads so many numbers apart, with their positions, and
// the page and offset each goes to.
template <class T>
struct Rows {
    const T *keys, *values;
    int64_t key_row, value_row, key_head, value_head;
    const int64_t *at, *pages, *offsets;
    int64_t count;
};
template <class T>
struct Place {
    T *keys, *values;
    int32_t* positions;
    float* scores;  // null where the pool keeps none
    int64_t kv_heads, key_dim, value_dim, page;
};

// To be called by all threads of a parallel region; they go on with their own rows at once.
template <class T>
inline void write_rows(const Rows<T>& rows, const Place<T>& to) {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows.count; ++row)
        for (int64_t head = 0; head < to.kv_heads; ++head) {
            const size_t slot = (size_t(rows.pages[row]) * to.kv_heads + head) * to.page + rows.offsets[row];
            std::memcpy(to.keys + slot * to.key_dim,
                        rows.keys + row * rows.key_row + head * rows.key_head, to.key_dim * sizeof(T));
            std::memcpy(to.values + slot * to.value_dim,
                        rows.values + row * rows.value_row + head * rows.value_head,
                        to.value_dim * sizeof(T));
            to.positions[slot] = int32_t(rows.at[row]);
            if (to.scores) to.scores[slot] = 0.f;
        }
}

// The sum of a tensor's words, read once by all cores: what memory can deliver.
inline int64_t read_all(const int64_t* words, int64_t count) {
    int64_t total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total)
    for (int64_t i = 0; i < count; ++i) total += words[i];
    return total;
}
