// Scores that policies ask for: attention weights of a window of queries, reduced entry by entry.
#pragma once
#include "prefill.h"

enum Over { SUM = 0, MAX = 1, BELOW = 2 };

// How weights become one score an entry; see Reduce in types.py.  ramp [W]: weight of each query.
struct Reduction {
    bool per_kv_head, max_heads;
    Over rows;
    float factor;  // of the result (1 / rows for a mean)
    const float* ramp;
};

// Log-sum-exps of all queries over the entries they see, lse [W, H].
template <class T>
inline void window_lse(const Dense<T>& a, const PackedKeys<T>& keys, uint32_t* packed, float* lse,
                       uint32_t* room) {
    const int64_t blocks = ceil_div(a.queries_n, BLOCK_ROWS);
    float* block = (float*)(room + size_t(BLOCK_ROWS) * keys.units);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < blocks * a.heads; ++task) {
        const int head = int(task % a.heads), kv_head = head / a.group();
        const int64_t first = task / a.heads * BLOCK_ROWS;
        const int rows = int(std::min<int64_t>(BLOCK_ROWS, a.queries_n - first));
        const int64_t* k_pos = a.k_pos + kv_head * a.k_row;
        float best[BLOCK_ROWS], total[BLOCK_ROWS];
        for (int r = 0; r < rows; ++r) {
            pack_left(room + size_t(r) * keys.units, a.query(first + r, head), a.key_dim);
            best[r] = NEVER, total[r] = 0.f;
        }
        for (int64_t column = 0; column < a.entries; column += BLOCK_COLUMNS) {
            const int n = int(std::min<int64_t>(BLOCK_COLUMNS, a.entries - column));
            const auto [low, high] = std::minmax_element(k_pos + column, k_pos + column + n);
            const int64_t last = *std::max_element(a.q_pos + first, a.q_pos + first + rows);
            if (*low > last) continue;
            block_logits(a, keys, packed, kv_head, column, room, rows, block);
            for (int r = 0; r < rows; ++r) {
                float* row = block + r * BLOCK_COLUMNS;
                const int64_t at = a.q_pos[first + r], oldest = a.window ? at - a.window : -1;
                for (int c = n; c < BLOCK_COLUMNS; ++c) row[c] = NEVER;
                if (*high > at || *low <= oldest)
                    for (int c = 0; c < n; ++c)
                        if (k_pos[column + c] > at || k_pos[column + c] <= oldest) row[c] = NEVER;
                Vec most = set1(NEVER);
                for (int c = 0; c < BLOCK_COLUMNS; c += LANES) {
                    const Vec x = as_powers(a, load(row + c));
                    store(row + c, x);
                    most = max(most, x);
                }
                const float highest = top(most);
                if (highest == NEVER) continue;
                if (!(highest <= best[r])) {
                    total[r] *= best[r] == NEVER ? 0.f : std::exp2(best[r] - highest);
                    best[r] = highest;
                }
                Vec sums = set1(0.f);
                for (int c = 0; c < BLOCK_COLUMNS; c += LANES)
                    sums = sums + exp2(load(row + c) - set1(best[r]));
                total[r] += sum(sums);
            }
        }
        for (int r = 0; r < rows; ++r)
            lse[(first + r) * a.heads + head] = best[r] * LN2 + std::log(total[r]);
    }
}

// scores[0..n) of one block of entries, over the heads `from` to `to`.
template <class T>
inline void score_block(const Dense<T>& a, const PackedKeys<T>& keys, uint32_t* packed,
                        const float* lse, const Reduction& how, int from, int to, int64_t column,
                        float* scores, uint32_t* room) {
    const int n = int(std::min<int64_t>(BLOCK_COLUMNS, a.entries - column));
    float* block = (float*)(room + size_t(BLOCK_ROWS) * keys.units);
    float* heads = block + BLOCK_ROWS * BLOCK_COLUMNS;
    float total[BLOCK_COLUMNS];
    std::fill(total, total + BLOCK_COLUMNS, 0.f);
    const float share = how.max_heads ? 1.f : 1.f / float(to - from);
    for (int64_t first = 0; first < a.queries_n; first += BLOCK_ROWS) {
        const int rows = int(std::min<int64_t>(BLOCK_ROWS, a.queries_n - first));
        const int64_t last = *std::max_element(a.q_pos + first, a.q_pos + first + rows);
        std::fill(heads, heads + rows * BLOCK_COLUMNS, 0.f);
        for (int head = from; head < to; ++head) {
            const int kv_head = head / a.group();
            const int64_t* k_pos = a.k_pos + kv_head * a.k_row + column;
            const auto [low, high] = std::minmax_element(k_pos, k_pos + n);
            if (*low > last) continue;
            for (int r = 0; r < rows; ++r)
                pack_left(room + size_t(r) * keys.units, a.query(first + r, head), a.key_dim);
            block_logits(a, keys, packed, kv_head, column, room, rows, block);
            for (int r = 0; r < rows; ++r) {
                float *row = block + r * BLOCK_COLUMNS, *sum_to = heads + r * BLOCK_COLUMNS;
                const int64_t at = a.q_pos[first + r], oldest = a.window ? at - a.window : -1;
                if (*high > at || *low <= oldest)
                    for (int c = 0; c < n; ++c)
                        if (k_pos[c] > at || k_pos[c] <= oldest) row[c] = NEVER;
                const Vec norm = set1(lse[(first + r) * a.heads + head] * LOG2E);
                for (int c = 0; c < BLOCK_COLUMNS; c += LANES) {
                    const Vec w = exp2(as_powers(a, load(row + c)) - norm), held = load(sum_to + c);
                    store(sum_to + c, how.max_heads ? max(held, w) : held + w);
                }
            }
        }
        for (int r = 0; r < rows; ++r) {
            const float* row = heads + r * BLOCK_COLUMNS;
            if (how.rows == BELOW) {
                const int64_t* k_pos = a.k_pos + from / a.group() * a.k_row + column;
                const float even = (1.f - 1e-5f) / float(a.q_pos[first + r] + 1);
                for (int c = 0; c < n; ++c)
                    total[c] += k_pos[c] <= a.q_pos[first + r] && row[c] * share < even;
                continue;
            }
            const Vec weight = set1(how.ramp[first + r] * share);
            for (int c = 0; c < BLOCK_COLUMNS; c += LANES) {
                const Vec w = load(row + c) * weight, held = load(total + c);
                store(total + c, how.rows == MAX ? max(held, w) : held + w);
            }
        }
    }
    for (int c = 0; c < n; ++c) scores[c] = total[c] * how.factor;
}

// scores [1 or K, m]; lse [W, H] is given, or worked out first.
template <class T>
inline void window_scores(const Dense<T>& a, const Reduction& how, bool has_lse, float* lse,
                          float* scores) {
    static thread_local Scratch kept;
    const PackedKeys<T> keys(a);
    const size_t size = keys.size(a.kv_heads);
    const size_t room = size_t(BLOCK_ROWS) * (keys.units + 2 * BLOCK_COLUMNS);
    uint32_t* packed = kept.get<uint32_t>(size + room * omp_get_max_threads());
    const int64_t blocks = ceil_div(a.entries, BLOCK_COLUMNS);
    const int wide = how.per_kv_head ? a.kv_heads : 1, span = a.heads / wide;
#pragma omp parallel
    {
        pack_all_keys(a, keys, packed);
        uint32_t* mine = packed + size + room * omp_get_thread_num();
        if (!has_lse) window_lse(a, keys, packed, lse, mine);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < blocks * wide; ++task) {
            const int row = int(task / blocks);
            const int64_t column = task % blocks * BLOCK_COLUMNS;
            score_block(a, keys, packed, lse, how, row * span, (row + 1) * span, column,
                        scores + row * a.entries + column, mine);
        }
    }
}
