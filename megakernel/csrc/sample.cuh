// One column's logits in, one code out, by one block: the rule of megakernel/sampler.py, operation by operation.
//
// Repetition penalty, EOS ban and suppression (code 0 only); temperature; top-k by a radix search for the k-th largest
// logit; top-p by a search for the smallest kept one; then the inverse of the cumulative distribution in index order.
#pragma once
#include "sizes.h"

namespace mk {

constexpr int RULE_BLOCK = 32;  // partial sums run inside blocks of so many codes, then over the blocks
constexpr int MOST_LOGITS = (VOCAB > CODES ? VOCAB : CODES) + RULE_BLOCK;
constexpr int BINS = 256;

struct SampleWork {
    float logits[MOST_LOGITS];
    float totals[MOST_LOGITS / RULE_BLOCK + 1];
    float warp_values[WARPS];
    int warp_indices[WARPS];
    u32 bins[BINS];
    u32 prefix, wanted;
    int answer;
};

// Random number `draw` of a frame: megakernel.sampler.uniforms, Philox4x32-10 (Salmon et al., SC 2011).
MK_DEV float philox(u32 frame, u32 draw, u32 key0, u32 key1) {
    u32 c0 = frame, c1 = draw, c2 = 0, c3 = 0;
    for (int round = 0; round < 10; round++) {
        u32 high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        u32 high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ key0, c1 = low1, c2 = high0 ^ c3 ^ key1, c3 = low0;
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    return float(c0 >> 8) * 5.9604644775390625e-8f;
}

MK_DEV u32 ordered(float x) {  // a larger float has a larger key
    u32 bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
MK_DEV float from_ordered(u32 key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// Largest value and the first index that has it, over the block; every thread gets both.
struct Best {
    float value;
    int index;
};
MK_DEV Best better(Best a, Best b) {
    return a.value > b.value || (a.value == b.value && a.index < b.index) ? a : b;
}
MK_DEV Best block_best(SampleWork& w, Best mine) {
    for (int bit = 1; bit < LANES; bit *= 2)
        mine = better(mine, Best{__shfl_xor_sync(0xffffffffu, mine.value, bit),
                                 __shfl_xor_sync(0xffffffffu, mine.index, bit)});
    if (threadIdx.x % LANES == 0) {
        w.warp_values[threadIdx.x / LANES] = mine.value;
        w.warp_indices[threadIdx.x / LANES] = mine.index;
    }
    __syncthreads();
    for (int i = 0; i < WARPS; i++) mine = better(mine, Best{w.warp_values[i], w.warp_indices[i]});
    __syncthreads();
    return mine;
}
MK_DEV float block_sum(SampleWork& w, float mine) {
    mine = add_over(mine, 1, LANES);
    if (threadIdx.x % LANES == 0) w.warp_values[threadIdx.x / LANES] = mine;
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < WARPS; i++) sum += w.warp_values[i];
    __syncthreads();
    return sum;
}

// The k-th largest of `count` logits: eight bits of its key at a time.
MK_DEV float kth_largest(SampleWork& w, int count, int k) {
    if (threadIdx.x == 0) w.prefix = 0, w.wanted = u32(k);
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < BINS; i += THREADS) w.bins[i] = 0;
        __syncthreads();
        u32 prefix = w.prefix, wanted = w.wanted;
        for (int i = threadIdx.x; i < count; i += THREADS) {
            u32 key = ordered(w.logits[i]);
            if (shift == 24 || key >> (shift + 8) == prefix) atomicAdd(&w.bins[key >> shift & 255u], 1u);
        }
        __syncthreads();
        if (threadIdx.x < LANES) {  // lane l sums bins 255 - 8 l downwards; a scan finds where the count reaches k
            u32 lane = threadIdx.x, own = 0;
            for (u32 b = 0; b < 8; b++) own += w.bins[255 - 8 * lane - b];
            u32 before = own;
            for (u32 step = 1; step < LANES; step *= 2) {
                u32 other = __shfl_up_sync(0xffffffffu, before, step);
                if (lane >= step) before += other;
            }
            before -= own;
            if (before < wanted && wanted <= before + own) {
                u32 bin = 255 - 8 * lane;
                while (before + w.bins[bin] < wanted) before += w.bins[bin--];
                w.prefix = prefix << 8 | bin;
                w.wanted = wanted - before;
            }
        }
        __syncthreads();
    }
    return from_ordered(w.prefix);
}

// Drop the smallest logits whose cumulative probability is <= tail; of equal ones the first, by index; never the last.
MK_DEV void keep_top_p(SampleWork& w, int count, float tail) {
    float top = NEGATIVE_INFINITY;
    for (int i = threadIdx.x; i < count; i += THREADS) top = fmaxf(top, w.logits[i]);
    top = block_best(w, Best{top, 0}).value;
    float mine = 0;
    for (int i = threadIdx.x; i < count; i += THREADS) mine += expf(w.logits[i] - top);
    float limit = tail * block_sum(w, mine);
    u32 key = 0;  // the largest key such that everything below it together weighs no more than the limit
    for (int bit = 31; bit >= 0; bit--) {
        u32 tried = key | 1u << bit;
        mine = 0;
        for (int i = threadIdx.x; i < count; i += THREADS)
            if (ordered(w.logits[i]) < tried) mine += expf(w.logits[i] - top);
        if (block_sum(w, mine) <= limit) key = tried;
    }
    if (key > ordered(top)) key = ordered(top);
    if (threadIdx.x == 0) w.prefix = 0xffffffffu, w.answer = 0;
    float below = 0, equals = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += THREADS)
        if (ordered(w.logits[i]) >= key) atomicMin(&w.prefix, ordered(w.logits[i]));
    __syncthreads();
    u32 least = w.prefix;  // key of the smallest logit that stays; of its equals the first ones may go
    for (int i = threadIdx.x; i < count; i += THREADS) {
        if (ordered(w.logits[i]) < least) below += expf(w.logits[i] - top);
        if (ordered(w.logits[i]) == least) equals += 1;
    }
    below = block_sum(w, below);
    equals = block_sum(w, equals);
    if (equals > 1 && threadIdx.x == 0) {
        for (int i = 0; i < count; i++) {
            if (ordered(w.logits[i]) != least) continue;
            w.answer = i;  // the last stays, whatever the limit
            if ((below += expf(w.logits[i] - top)) > limit) break;
        }
    }
    __syncthreads();
    int first = w.answer;
    for (int i = threadIdx.x; i < count; i += THREADS) {
        u32 own = ordered(w.logits[i]);
        if (own < least || (own == least && i < first)) w.logits[i] = NEGATIVE_INFINITY;
    }
    __syncthreads();
}

// The first code whose cumulative weight exceeds uniform * total; a code without weight never wins.
MK_DEV int draw(SampleWork& w, int count, float uniform) {
    float top = NEGATIVE_INFINITY;
    for (int i = threadIdx.x; i < count; i += THREADS) top = fmaxf(top, w.logits[i]);
    top = block_best(w, Best{top, 0}).value;
    int blocks = (count + RULE_BLOCK - 1) / RULE_BLOCK, lane = threadIdx.x % LANES;
    for (int b = threadIdx.x / LANES; b < blocks; b += WARPS) {
        int i = b * RULE_BLOCK + lane;
        float weight = i < count ? expf(w.logits[i] - top) : 0.0f, sum = weight;
        for (int step = 1; step < LANES; step *= 2) {
            float other = __shfl_up_sync(0xffffffffu, sum, step);
            if (lane >= step) sum += other;
        }
        w.logits[i] = weight == 0 ? NEGATIVE_INFINITY : sum;
        if (lane == LANES - 1) w.totals[b] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        float before = 0;
        for (int b = 0; b < blocks; b++) {
            float own = w.totals[b];
            w.totals[b] = before;
            before += own;
        }
    }
    __syncthreads();
    float mine = 0;
    for (int i = threadIdx.x; i < count; i += THREADS)
        if (w.logits[i] != NEGATIVE_INFINITY) mine = fmaxf(mine, w.totals[i / RULE_BLOCK] + w.logits[i]);
    float total = block_best(w, Best{mine, 0}).value;
    float target = fminf(uniform * total, __uint_as_float(__float_as_uint(total) - 1u));
    int first = count;
    for (int i = threadIdx.x; i < count; i += THREADS)
        if (w.logits[i] != NEGATIVE_INFINITY && w.totals[i / RULE_BLOCK] + w.logits[i] > target) {
            first = i;
            break;
        }
    return block_best(w, Best{-float(first), 0}).value * -1.0f;
}

// Code `g` of a column from its logits; every thread gets it.
MK_DEV int pick(const Args& a, SampleWork& w, const Column& c, int column, int g) {
    bool first = g == 0, sampling = c.sample >> (first ? 0 : 1) & 1;
    int count = first ? VOCAB : CODES;
    float temperature = first ? c.temperature : c.other_temperature;
    for (int i = threadIdx.x; i < count; i += THREADS) {
        float x = a.logits[size_t(column) * VOCAB + i];
        if (first) {
            if (a.history[size_t(c.row) * VOCAB_WORDS + i / 32] >> (i % 32) & 1u) x = x > 0 ? x / c.penalty : x * c.penalty;
            if (i == EOS ? c.frame < 2 : i >= SUPPRESS_FROM) x = NEGATIVE_INFINITY;
        }
        w.logits[i] = sampling ? x / temperature : x;
    }
    __syncthreads();
    if (!sampling) {
        Best mine = Best{NEGATIVE_INFINITY, count};
        for (int i = threadIdx.x; i < count; i += THREADS) mine = better(mine, Best{w.logits[i], i});
        return block_best(w, mine).index;
    }
    int k = first ? c.top_k : c.other_top_k;
    if (k < count) {
        float kth = kth_largest(w, count, k);
        for (int i = threadIdx.x; i < count; i += THREADS)
            if (w.logits[i] < kth) w.logits[i] = NEGATIVE_INFINITY;
        __syncthreads();
    }
    float tail = first ? c.tail : c.other_tail;
    if (tail > 0) keep_top_p(w, count, tail);
    float uniform = a.uniforms ? a.uniforms[column * CODEBOOKS + g] : philox(c.frame, g, c.seed_low, c.seed_high);
    return draw(w, count, uniform);
}

}  // namespace mk
