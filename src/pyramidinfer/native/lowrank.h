// Adapters (LoRA): what a row's adapter adds to a linear's outputs, the row's products with `rank`
// vectors spread over the outputs by as many others.  A row's bits do not depend on other rows.
#pragma once
#include "simd.h"

// One adapter's part of one linear; rank 0 where it has none.
struct LowRank {
    const void* down;       // [rank / LANES][ceil(depth / DEEP)][LANES ranks][DEEP], the layer's dtype
    const float* scales;    // [rank]: what products are multiplied with
    const void* up;         // what is added for each product, of every half panel on its own
    const int64_t* halves;  // [2 * panels][3]: first product, how many, where in `up` theirs begin
    int64_t rank;           // a multiple of LANES; what fills it up is zero
};

// Numbers of a row that are multiplied at once: a vector of floats, or of pairs.
template <class T>
constexpr int DEEP = LANES;
template <class T>
inline void mul_deep(Vec& acc, const T* down, const T* x) {
    acc = fma(load(down), load(x), acc);
}
#ifdef PAIRS
template <>
constexpr int DEEP<bf16> = 2 * LANES;
template <>
inline void mul_deep(Vec& acc, const bf16* down, const bf16* x) {
    acc.v = add_pairs(acc.v, _mm512_loadu_si512(down), _mm512_loadu_si512(x));
}
#endif

// Which rows have which adapter.
struct Adapted {
    const LowRank* const* adapters;   // [groups], each [linears of the model]
    const int64_t *starts, *members;  // [groups + 1] in members, the rows of each group
    const int32_t* group;             // [rows], -1: none
    int64_t groups, most;             // most: the highest rank
};

// The same of one linear, its number among the model's; `products` [rows, most] is shared by all
// threads.  Nobody has an adapter where `who` is null.
struct Low {
    const Adapted* who = nullptr;
    int64_t index = 0;
    float* products = nullptr;

    const LowRank* of(int64_t row) const {
        const int32_t group = who->group[row];
        if (group < 0 || !who->adapters[group][index].rank) return nullptr;
        return who->adapters[group] + index;
    }
};

inline size_t low_room(int64_t rows, const Adapted* who) {
    return who ? size_t(rows * who->most) : 0;
}

// The products of every row of `a` [rows, depth] that has an adapter.  To be called by all threads of
// a parallel region (or by one alone).
template <class T>
inline void low_products(const T* a, int64_t depth, const Low& low) {
    constexpr int64_t BLOCK = 16;  // rows of a task
    const Adapted& who = *low.who;
    const int64_t steps = ceil_div(depth, DEEP<T>);
    const auto tasks_of = [&](int64_t group) {
        const int64_t rows = who.starts[group + 1] - who.starts[group];
        return ceil_div(rows, BLOCK) * (who.adapters[group][low.index].rank / LANES);
    };
    int64_t tasks = 0;
    for (int64_t g = 0; g < who.groups; ++g) tasks += tasks_of(g);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
        int64_t g = 0, mine = task;
        while (mine >= tasks_of(g)) mine -= tasks_of(g++);
        const LowRank& part = who.adapters[g][low.index];
        const int64_t ranks = part.rank / LANES, at = mine % ranks;
        const int64_t first = who.starts[g] + mine / ranks * BLOCK;
        const int64_t end = std::min(who.starts[g + 1], first + BLOCK);
        const T* down = (const T*)part.down + at * steps * LANES * DEEP<T>;
        const Vec scales = load(part.scales + at * LANES);
        for (int64_t i = first; i < end; ++i) {
            const int64_t row = who.members[i];
            Vec acc[LANES];
            for (int k = 0; k < LANES; ++k) acc[k] = set1(0.f);
            T last[DEEP<T>] = {};
            for (int64_t d = 0; d < steps; ++d) {
                const T *from = down + d * LANES * DEEP<T>, *x = a + row * depth + d * DEEP<T>;
                if (const int64_t left = depth - d * DEEP<T>; left < DEEP<T>) {
                    std::memcpy(last, x, size_t(left) * sizeof(T));
                    x = last;
                }
#pragma GCC unroll 16
                for (int k = 0; k < LANES; ++k) mul_deep(acc[k], from + k * DEEP<T>, x);
            }
            store(low.products + row * who.most + at * LANES, sum_each(acc) * scales);
        }
    }
}

// acc[rows][W] += what adapters add to a panel's columns.
template <class T, int R, int W>
inline void add_low(Vec (&acc)[R][W], const Low& low, int64_t row, int64_t panel) {
    constexpr int HALF = W / 2;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        const LowRank* part = low.of(row + r);
        if (!part) continue;
        const float* products = low.products + (row + r) * low.who->most;
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
            const int64_t* half = part->halves + (2 * panel + h) * 3;
            const T* up = (const T*)part->up + half[2];
            for (int64_t k = 0; k < half[1]; ++k, up += HALF * LANES) {
                const Vec by = set1(products[half[0] + k]);
#pragma GCC unroll 4
                for (int i = 0; i < HALF; ++i)
                    acc[r][h * HALF + i] = fma(load(up + i * LANES), by, acc[r][h * HALF + i]);
            }
        }
    }
}
