// Attention of many queries of one request: prefill and extend, summing weights on the way.
#pragma once
#include "decode.h"
#include "matmul.h"

// Rows [n, H, D] `query_row` numbers apart; keys and values [K, m, ...] with strides (in numbers);
// places: position of every query [n] and entry [K, m] (k_row apart, 0 for the same in all heads).
template <class T>
struct Dense {
    const T *queries, *keys, *values;
    int64_t query_row, key_head, key_row, value_head, value_row;
    const int64_t *q_pos, *k_pos;
    int64_t k_row;
    int64_t queries_n, entries;
    int heads, kv_heads, key_dim, value_dim;
    int64_t window;
    float scale, softcap;

    int group() const { return heads / kv_heads; }
    const T* key(int head, int64_t entry) const { return keys + head * key_head + entry * key_row; }
    const T* value(int head, int64_t entry) const {
        return values + head * value_head + entry * value_row;
    }
    const T* query(int64_t row, int head) const {
        return queries + row * query_row + int64_t(head) * key_dim;
    }
};

constexpr int BLOCK_ROWS = 8 * ROWS;        // queries worked on together
constexpr int BLOCK_PANELS = 512 / COLUMNS / 4 < 1 ? 1 : 512 / COLUMNS / 4;
constexpr int BLOCK_COLUMNS = BLOCK_PANELS * COLUMNS;  // entries worked on together (128)

template <class T>
struct PackedKeys {
    using U = typename UnitOf<T>::type;
    int units;
    int64_t panels;
    explicit PackedKeys(const Dense<T>& a)
        : units(int(ceil_div(a.key_dim, U::DEPTH))), panels(ceil_div(a.entries, COLUMNS)) {}
    size_t size(int kv_heads) const { return size_t(kv_heads) * panels * units * COLUMNS; }
    uint32_t* panel(uint32_t* base, int kv_head, int64_t index) const {
        return base + (size_t(kv_head) * panels + index) * units * COLUMNS;
    }
};

template <class T>
inline void pack_all_keys(const Dense<T>& a, const PackedKeys<T>& shape, uint32_t* packed) {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < a.kv_heads * shape.panels; ++task) {
        const int head = int(task / shape.panels);
        const int64_t index = task % shape.panels;
        pack_keys<T>(shape.panel(packed, head, index), index * COLUMNS, a.entries, a.key_dim,
                     [&](int64_t entry) { return a.key(head, entry); });
    }
}

// Values as panels of COLUMNS dims, in blocks of BLOCK_COLUMNS entries.
template <class T>
struct PackedValues {
    using U = typename UnitOf<T>::type;
    static constexpr int units = BLOCK_COLUMNS / U::DEPTH;
    int panels;
    int64_t blocks;
    explicit PackedValues(const Dense<T>& a)
        : panels(int(ceil_div(a.value_dim, COLUMNS))), blocks(ceil_div(a.entries, BLOCK_COLUMNS)) {}
    size_t size(int kv_heads) const { return size_t(kv_heads) * blocks * panels * units * COLUMNS; }
    uint32_t* panel(uint32_t* base, int kv_head, int64_t block, int index) const {
        return base + ((size_t(kv_head) * blocks + block) * panels + index) * units * COLUMNS;
    }
};

template <class T>
inline void pack_all_values(const Dense<T>& a, const PackedValues<T>& shape, uint32_t* packed) {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < a.kv_heads * shape.blocks; ++task) {
        const int head = int(task / shape.blocks);
        const int64_t block = task % shape.blocks;
        for (int i = 0; i < shape.panels; ++i)
            pack_rows<T>(shape.panel(packed, head, block, i), block * BLOCK_COLUMNS, a.entries,
                         shape.units, i * COLUMNS, a.value_dim,
                         [&](int64_t entry) { return a.value(head, entry); });
    }
}

// Products of a block of queries and entries (capped logits where there is a soft cap), rows
// BLOCK_COLUMNS apart, unmasked.
template <class T>
inline void block_logits(const Dense<T>& a, const PackedKeys<T>& shape, uint32_t* packed_keys,
                         int kv_head, int64_t column, const uint32_t* left, int rows, float* out) {
    using U = typename UnitOf<T>::type;
    for (int p = 0; p < BLOCK_PANELS; ++p) {
        const int64_t index = column / COLUMNS + p;
        if (index >= shape.panels) break;
        panel_product<U>(out + p * COLUMNS, BLOCK_COLUMNS, false, left, shape.units, rows,
                         shape.panel(packed_keys, kv_head, index), shape.units);
    }
    if (a.softcap != 0.f)
        for (int i = 0; i < rows * BLOCK_COLUMNS; i += LANES)
            store(out + i, logits(load(out + i), a.scale, a.softcap));
}

// What block_logits gives, as powers of two.
template <class T>
inline Vec as_powers(const Dense<T>& a, Vec x) {
    return x * set1(a.softcap == 0.f ? a.scale * LOG2E : LOG2E);
}

// --- prefill ------------------------------------------------------------------------------------

// The newest queries, whose weights are summed entry by entry while they attend: row `first` of
// the chunk on, row r times ramp[r - first].  Each head's rows are cut into `parts`, worked on one
// after the other into sums [parts, H, m]; lse [rows, H].
struct Watch {
    int64_t first;
    const float* ramp;
    float *sums, *lse;
    int parts;
};

// What one block of watched rows gave: weights of all its columns, and the top they stand against.
template <class T>
struct Seen {
    using Number = typename UnitOf<T>::type::Number;
    Number* weights;  // [columns / BLOCK_COLUMNS][rows][BLOCK_COLUMNS]
    float* tops;      // [columns / BLOCK_COLUMNS][rows]
};

// sums[0..entries) += each row's weights, made final now that its top and total are known.
template <class T>
inline void add_seen(const Seen<T>& seen, int64_t blocks, int rows, int from, const float* best,
                     const float* total, const float* ramp, float* sums) {
    for (int64_t b = 0; b < blocks; ++b) {
        float factor[BLOCK_ROWS];
        bool seen_any = false;
        for (int r = from; r < rows; ++r) {
            const float top = seen.tops[b * BLOCK_ROWS + r];
            factor[r] = top == NEVER ? 0.f : ramp[r] * std::exp2(top - best[r]) / total[r];
            seen_any |= top != NEVER;  // weights of a block that no row sees were never written
        }
        if (!seen_any) continue;
        const auto* weights = seen.weights + size_t(b) * BLOCK_ROWS * BLOCK_COLUMNS;
        for (int c = 0; c < BLOCK_COLUMNS; c += LANES) {
            Vec acc = load(sums + b * BLOCK_COLUMNS + c);
            for (int r = from; r < rows; ++r)
                acc = fma(load(weights + r * BLOCK_COLUMNS + c), set1(factor[r]), acc);
            store(sums + b * BLOCK_COLUMNS + c, acc);
        }
    }
}

// One block of rows of one head; the last queries_n entries are the queries' own, in order.
template <class T>
inline void attend_rows(const Dense<T>& a, const PackedKeys<T>& keys, uint32_t* packed_keys,
                        const PackedValues<T>& values, uint32_t* packed_values, int head,
                        int64_t first, T* out, uint32_t* room, const Watch* watch,
                        const Seen<T>* seen, float* sums) {
    using U = typename UnitOf<T>::type;
    using Number = typename U::Number;
    const int kv_head = head / a.group(), rows = int(std::min<int64_t>(BLOCK_ROWS, a.queries_n - first));
    const int padded = values.panels * COLUMNS;
    uint32_t* left = room;  // [rows][key units]
    float* block = (float*)(left + size_t(BLOCK_ROWS) * keys.units);
    uint32_t* weights = (uint32_t*)(block + BLOCK_ROWS * BLOCK_COLUMNS);
    float* acc = (float*)(weights + BLOCK_ROWS * values.units);  // [rows][padded]
    float best[BLOCK_ROWS], total[BLOCK_ROWS];
    for (int r = 0; r < rows; ++r) {
        pack_left(left + size_t(r) * keys.units, a.query(first + r, head), a.key_dim);
        best[r] = NEVER, total[r] = 0.f;
    }
    std::fill(acc, acc + size_t(rows) * padded, 0.f);
    const int64_t old = a.entries - a.queries_n, end = old + first + rows;
    const int64_t* k_pos = a.k_pos + kv_head * a.k_row;
    for (int64_t column = 0; column < end; column += BLOCK_COLUMNS) {
        if (a.window && column + BLOCK_COLUMNS <= end) {  // nothing in it that any row sees?
            const int64_t* most = std::max_element(k_pos + column, k_pos + column + BLOCK_COLUMNS);
            if (*most <= a.q_pos[first] - a.window) {
                if (watch)
                    std::fill_n(seen->tops + column / BLOCK_COLUMNS * BLOCK_ROWS, rows, NEVER);
                continue;
            }
        }
        block_logits(a, keys, packed_keys, kv_head, column, left, rows, block);
        for (int r = 0; r < rows; ++r) {
            float* row = block + r * BLOCK_COLUMNS;
            const int64_t limit = old + first + r + 1 - column;  // entries the row sees here
            const int valid = int(std::min<int64_t>(BLOCK_COLUMNS, limit));
            auto* weight = (Number*)(weights + size_t(r) * values.units);
            Vec most = set1(NEVER);
            for (int c = std::max(0, valid); c < BLOCK_COLUMNS; ++c) row[c] = NEVER;
            if (a.window)
                for (int c = 0; c < valid; ++c)
                    if (k_pos[column + c] <= a.q_pos[first + r] - a.window) row[c] = NEVER;
            if (valid > 0)
                for (int c = 0; c < BLOCK_COLUMNS; c += LANES) {
                    const Vec x = as_powers(a, load(row + c));
                    store(row + c, x);
                    most = max(most, x);
                }
            const float highest = valid > 0 ? top(most) : NEVER;
            if (highest == NEVER) {
                std::memset(weight, 0, BLOCK_COLUMNS * sizeof(Number));
                continue;
            }
            if (!(highest <= best[r])) {
                const float less = best[r] == NEVER ? 0.f : std::exp2(best[r] - highest);
                for (int d = 0; d < padded; d += LANES)
                    store(acc + size_t(r) * padded + d, load(acc + size_t(r) * padded + d) * set1(less));
                total[r] *= less;
                best[r] = highest;
            }
            Vec sums = set1(0.f);
            for (int c = 0; c < BLOCK_COLUMNS; c += LANES) {
                const Vec w = exp2(load(row + c) - set1(best[r]));
                sums = sums + w;
                store(weight + c, w);
            }
            total[r] += sum(sums);
        }
        if (watch) {
            const int64_t at = column / BLOCK_COLUMNS * BLOCK_ROWS;
            std::memcpy(seen->weights + at * BLOCK_COLUMNS, weights,
                        size_t(rows) * BLOCK_COLUMNS * sizeof(Number));
            for (int r = 0; r < rows; ++r) {
                const bool none = old + first + r + 1 <= column;
                seen->tops[at + r] = none ? NEVER : best[r];
            }
        }
        for (int i = 0; i < values.panels; ++i)
            panel_product<U>(acc + i * COLUMNS, padded, true, weights, values.units, rows,
                             values.panel(packed_values, kv_head, column / BLOCK_COLUMNS, i),
                             values.units);
    }
    for (int r = 0; r < rows; ++r) {
        T* to = out + (size_t(first + r) * a.heads + head) * a.value_dim;
        for (int d = 0; d < a.value_dim; d += LANES)
            store_at(to, load(acc + size_t(r) * padded + d) / set1(total[r]), d, a.value_dim);
    }
    if (!watch) return;
    const int from = int(std::max<int64_t>(0, watch->first - first));
    const float* ramp = watch->ramp + (first - watch->first);
    add_seen(*seen, ceil_div(end, BLOCK_COLUMNS), rows, from, best, total, ramp, sums);
    for (int r = from; r < rows; ++r)
        watch->lse[(first + r - watch->first) * a.heads + head] = best[r] * LN2 + std::log(total[r]);
}

// All queries of a chunk; `watch` is null where nothing is to be summed.
template <class T>
inline void prefill(const Dense<T>& a, T* out, const Watch* watch) {
    static thread_local Scratch kept;
    const PackedKeys<T> keys(a);
    const PackedValues<T> values(a);
    const size_t key_size = keys.size(a.kv_heads), value_size = values.size(a.kv_heads);
    const int64_t wide = values.blocks * BLOCK_ROWS;  // rows of weights a watched block leaves
    const size_t seen_size = watch ? wide * (values.units + 1) : 0;
    const size_t room = seen_size + size_t(BLOCK_ROWS) * (keys.units + BLOCK_COLUMNS + values.units +
                                                          values.panels * COLUMNS);
    const int threads = omp_get_max_threads();
    const int64_t padded = values.blocks * BLOCK_COLUMNS;
    const size_t sums_size = watch ? size_t(watch->parts) * a.heads * padded : 0;
    uint32_t* packed = kept.get<uint32_t>(key_size + value_size + room * threads + sums_size);
    float* sums = (float*)(packed + key_size + value_size + room * threads);
    const int64_t blocks = ceil_div(a.queries_n, BLOCK_ROWS);
    const int64_t plain = watch ? watch->first / BLOCK_ROWS : blocks, watched = blocks - plain;
    const int parts = watch ? watch->parts : 0;
    std::fill(sums, sums + sums_size, 0.f);
#pragma omp parallel
    {
        pack_all_keys(a, keys, packed);
        pack_all_values(a, values, packed + key_size);
        uint32_t* mine = packed + key_size + value_size + room * omp_get_thread_num();
        uint32_t* rest = mine + seen_size;
        const Seen<T> seen{(typename Seen<T>::Number*)mine, (float*)(mine + wide * values.units)};
        // Watched rows first, then the longest, so that no core is left with one at the end.
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < (parts + plain) * a.heads; ++task) {
            const int head = int(task % a.heads);
            const int64_t index = task / a.heads;
            if (index >= parts) {
                attend_rows<T>(a, keys, packed, values, packed + key_size, head,
                               (parts + plain - 1 - index) * BLOCK_ROWS, out, rest, nullptr, nullptr,
                               nullptr);
                continue;
            }
            float* to = sums + (index * a.heads + head) * padded;
            for (int64_t b = watched * index / parts; b < watched * (index + 1) / parts; ++b)
                attend_rows<T>(a, keys, packed, values, packed + key_size, head,
                               (plain + b) * BLOCK_ROWS, out, rest, watch, &seen, to);
        }
        if (watch) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < parts * a.heads; ++i)
                std::memcpy(watch->sums + i * a.entries, sums + i * padded, a.entries * sizeof(float));
        }
    }
}
