// Choosing entries by score: the best ones, and scores pooled over neighbours in the text.
#pragma once
#include <omp.h>

#include <algorithm>
#include <numeric>

#include "scratch.h"
#include "simd.h"

// A float as an integer of the same order; NaN is above every number, and -0 is 0.
inline uint32_t ordered(float x) {
    const uint32_t u = bits_of(x + 0.f);
    if (x != x) return 0xfffffffeu;
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

// The `count`-th largest of keys [n], no two of which are the same; `work` [n].
inline uint64_t least_kept(const uint64_t* keys, int64_t n, int64_t count, uint64_t* work) {
    constexpr int64_t FEW = 32;
    const int64_t less = n - count;  // so many go
    if (less > FEW) {
        std::copy(keys, keys + n, work);
        std::nth_element(work, work + less, work + n);
        return work[less];
    }
    // The smallest keys and the next one, ascending: few of all others come before the last of them.
    const int64_t held = less + 1;
    std::copy(keys, keys + held, work);
    std::sort(work, work + held);
    for (int64_t i = held; i < n; ++i) {
        if (keys[i] >= work[less]) continue;
        int64_t at = less;
        for (; at > 0 && work[at - 1] > keys[i]; --at) work[at] = work[at - 1];
        work[at] = keys[i];
    }
    return work[less];
}

// Entries with the highest scores [heads, n] of each head's first lengths [heads], ascending.
// counts [heads] in: how many are wanted; out: how many there are.  Forced ones [heads, n] win, and
// each head gets as many as the head with most of them has and `room` others; one that loses
// nothing does not count, and is not looked at.  Equal scores go to the earlier place (places [heads, n], or the
// entry's number).  out: [heads, k] with k, the largest count, returned.
inline int64_t best_of(const float* scores, const uint8_t* forced, const int64_t* places,
                       const int64_t* lengths, int64_t heads, int64_t n, int64_t* counts,
                       int64_t room, int64_t* out) {
    int64_t must = 0, row = 0;
    for (int64_t h = 0; h < heads; ++h)
        if (counts[h] < lengths[h])
            must = std::max<int64_t>(must, std::count(forced + h * n, forced + h * n + lengths[h], 1) + room);
    for (int64_t h = 0; h < heads; ++h) {
        counts[h] = std::min(std::max(counts[h], must), lengths[h]);
        row = std::max(row, counts[h]);
    }
#pragma omp parallel for schedule(static) if (heads * n > 16384 && heads > 1)
    for (int64_t h = 0; h < heads; ++h) {
        static thread_local Scratch work;
        const int64_t length = lengths[h], count = counts[h];
        int64_t* mine = out + h * row;
        std::fill(mine + count, mine + row, 0);
        if (count == length) {
            for (int64_t i = 0; i < count; ++i) mine[i] = i;
            continue;
        }
        if (!count) continue;
        auto* keys = work.get<uint64_t>(2 * length);  // score, then the earlier place
        for (int64_t i = 0; i < length; ++i) {
            const uint32_t score = forced[h * n + i] ? 0xffffffffu : ordered(scores[h * n + i]);
            const int64_t place = places ? places[h * n + i] : i;
            keys[i] = uint64_t(score) << 32 | uint32_t(~uint32_t(place));
        }
        const uint64_t least = least_kept(keys, length, count, keys + length);
        for (int64_t i = 0, found = 0; found < count; ++i) {
            mine[found] = i;
            found += keys[i] >= least;
        }
    }
    return row;
}

// order [n]: entries by their place in the text; no two share one.
inline void by_place(const int64_t* place, int64_t n, int32_t* order) {
    static thread_local Scratch at_room;
    for (int64_t i = 0; i < n; ++i) order[i] = int32_t(i);
    if (std::is_sorted(place, place + n)) return;
    const auto [low, high] = std::minmax_element(place, place + n);
    const int64_t first = *low, span = *high - first + 1;
    if (span > 32 * n) {
        std::sort(order, order + n, [&](int32_t a, int32_t b) { return place[a] < place[b]; });
        return;
    }
    auto* at = at_room.get<int32_t>(span);  // which entry is at each place, -1 for none
    std::fill(at, at + span, -1);
    for (int64_t i = 0; i < n; ++i) at[place[i] - first] = int32_t(i);
    for (int64_t p = 0, i = 0; p < span; ++p)
        if (at[p] >= 0) order[i++] = at[p];
}

// out [n]: the largest of each value and its `half` neighbours on either side (the earliest of equal
// ones, NaN above all).  work [2][n + 2 half].
inline void window_max(const float* value, int64_t n, int half, float* out, float* work) {
    const auto larger = [](float a, float b) { return b > a || b != b ? b : a; };
    int64_t size = n + 2 * half, span = 1;  // `one` has the largest of `span` values
    float *one = work, *two = work + size;
    std::fill(one, one + half, NEVER);
    std::copy(value, value + n, one + half);
    std::fill(one + half + n, one + size, NEVER);
    for (; 2 * span <= 2 * half + 1; span *= 2, std::swap(one, two)) {
        size -= span;
        const float* __restrict from = one;
        float* __restrict to = two;
        for (int64_t i = 0; i < size; ++i) to[i] = larger(from[i], from[i + span]);
    }
    const int64_t rest = 2 * half + 1 - span;
    for (int64_t i = 0; i < n; ++i) out[i] = larger(one[i], one[i + rest]);
}

// Each score [heads, n] replaced by the maximum (or mean, zeros beyond the ends) of it and its
// neighbours in the text; places [heads, n] (row apart: 0 for one row for all heads), any order.
inline void pool_scores(const float* scores, const int64_t* places, int64_t row, int64_t heads,
                        int64_t n, int kernel, bool is_max, float* out) {
#pragma omp parallel for schedule(static) if (heads * n > 16384 && heads > 1)
    for (int64_t h = 0; h < heads; ++h) {
        static thread_local Scratch order_room, value_room, work_room;
        const int64_t* place = places + h * row;
        const int half = kernel / 2;
        auto* order = order_room.get<int32_t>(n);
        auto* value = value_room.get<float>(2 * n);
        float* found = value + n;
        by_place(place, n, order);
        for (int64_t i = 0; i < n; ++i) value[i] = scores[h * n + order[i]];
        if (is_max) window_max(value, n, half, found, work_room.get<float>(2 * (n + 2 * half)));
        else
            for (int64_t i = 0; i < n; ++i) {
                const int64_t from = std::max<int64_t>(0, i - half), to = std::min(n, i + half + 1);
                found[i] = std::accumulate(value + from, value + to, 0.f) / float(kernel);
            }
        for (int64_t i = 0; i < n; ++i) out[h * n + order[i]] = found[i];
    }
}
