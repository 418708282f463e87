// Raw q, k, v of the new positions in, attention over a voice's own positions out: per-head norms, RoPE, KV append, softmax.
//
// A work item is a row, one of its key heads and a piece of its cached positions; the last piece also takes the new
// positions, which it appends. Sixteen lanes share a position (HEAD_DIM 128), so a warp looks at two at a time. How the
// positions are cut depends on the row's own length alone.
#pragma once
#include "sizes.h"

namespace mk {

constexpr int ROPE_HALF = HEAD_DIM / 2;
constexpr int SHARE = HEAD_DIM / 8;        // lanes that share a position, each with 4 dimensions of either half
constexpr int AT_ONCE = LANES / SHARE;     // positions that a warp looks at
constexpr int NEW_POSITIONS = 16;          // of one row in a launch at most (prefill)
static_assert(HEAD_DIM % 32 == 0 && SHARE <= LANES && LANES % SHARE == 0, "a head's lanes fit into a warp");

MK_DEV int pieces(int start) {
    int n = (start + ATTENTION_CHUNK - 1) / ATTENTION_CHUNK;
    return n < 1 ? 1 : n > ATTENTION_PARTS ? ATTENTION_PARTS : n;
}

// Eight dimensions of a head: 4 j .. 4 j + 3 and the same of the other half, which RoPE pairs with them.
struct Dims {
    float low[4], high[4];
    MK_DEV void load(const float* head, int j) {
        float4 a = *(const float4*)(head + 4 * j), b = *(const float4*)(head + ROPE_HALF + 4 * j);
        low[0] = a.x, low[1] = a.y, low[2] = a.z, low[3] = a.w;
        high[0] = b.x, high[1] = b.y, high[2] = b.z, high[3] = b.w;
    }
    MK_DEV void load(const Element* head, int j) {
        Quad a = *(const Quad*)(head + 4 * j), b = *(const Quad*)(head + ROPE_HALF + 4 * j);
        MK_UNROLL
        for (int e = 0; e < 4; e++) low[e] = widen(a.e[e]), high[e] = widen(b.e[e]);
    }
    MK_DEV void store(Element* head, int j) const {
        *(Quad*)(head + 4 * j) = narrow4(make_float4(low[0], low[1], low[2], low[3]));
        *(Quad*)(head + ROPE_HALF + 4 * j) = narrow4(make_float4(high[0], high[1], high[2], high[3]));
    }
    MK_DEV void store(float* head, int j) const {
        *(float4*)(head + 4 * j) = make_float4(low[0], low[1], low[2], low[3]);
        *(float4*)(head + ROPE_HALF + 4 * j) = make_float4(high[0], high[1], high[2], high[3]);
    }
    MK_DEV float dot(const Dims& y) const {
        float s = 0;
        MK_UNROLL
        for (int e = 0; e < 4; e++) s += low[e] * y.low[e] + high[e] * y.high[e];
        return s;
    }
    // y = y * factor + this * weight
    MK_DEV void add_to(Dims& y, float factor, float weight) const {
        MK_UNROLL
        for (int e = 0; e < 4; e++) {
            y.low[e] = y.low[e] * factor + low[e] * weight;
            y.high[e] = y.high[e] * factor + high[e] * weight;
        }
    }
    MK_DEV void as_stored() {
        MK_UNROLL
        for (int e = 0; e < 4; e++) low[e] = widen(narrow(low[e])), high[e] = widen(narrow(high[e]));
    }
    // RMS norm over the head, then the rotation of the pairs (i, i + D/2); all lanes of the head together
    MK_DEV void norm_and_rotate(const float* norm, const float* rope, int rope_positions, int position, int j) {
        float r = 1.0f / sqrtf(add_over(dot(*this), 1, SHARE) / HEAD_DIM + NORM_EPS);
        Dims g, cosine, sine;
        g.load(norm, j);
        cosine.load(rope + size_t(position) * HEAD_DIM, j);
        sine.load(rope + size_t(rope_positions + position) * HEAD_DIM, j);
        MK_UNROLL
        for (int e = 0; e < 4; e++) {
            float a = low[e] * r * g.low[e], b = high[e] * r * g.high[e];
            low[e] = a * cosine.low[e] + b * sine.low[e];
            high[e] = b * cosine.high[e] + a * sine.high[e];
        }
    }
};

// Where a row's or column's keys and values of one layer lie, and how its new positions lie in the scratch.
struct Cache {
    Element *keys, *values;  // [kv_heads, positions, D] of one row
    int positions;           // that it can hold
    int start, fresh;        // cached positions, and new ones
    int slot, slot_step;     // scratch columns slot, slot + slot_step, ... hold the new positions
};

// Shared memory of one item.
template <class S>
struct AttentionWork {
    float fresh[2][NEW_POSITIONS][HEAD_DIM];
    float acc[WARPS][S::group][HEAD_DIM];
    float sums[WARPS][S::group][2];
};

template <class S>
MK_DEV void attend(const Args& a, AttentionWork<S>& w, const Cache& c, const float* norms, const float* rope,
                   int head, int piece) {
    int tid = thread(), warp = tid / LANES, lane = tid % LANES, j = lane % SHARE, mine = lane / SHARE;
    int n = pieces(c.start), size = (c.start + n - 1) / n;
    int from = piece * size, to = from + size < c.start ? from + size : c.start;
    bool last = piece == n - 1;
    const Element* keys = c.keys + size_t(head) * c.positions * HEAD_DIM;
    const Element* values = c.values + size_t(head) * c.positions * HEAD_DIM;
    if (last) {
        for (int i = warp; i < c.fresh; i += WARPS) {
            const float* raw = a.raw + size_t(c.slot + i * c.slot_step) * S::qkv;
            Dims k, v;
            k.load(raw + S::q + head * HEAD_DIM, j);
            v.load(raw + S::q + S::kv + head * HEAD_DIM, j);
            k.norm_and_rotate(norms + S::k_norm_at, rope, c.positions, c.start + i, j);
            k.as_stored();
            v.as_stored();
            if (mine == 0) {
                size_t at = (size_t(head) * c.positions + c.start + i) * HEAD_DIM;
                k.store(c.keys + at, j), v.store(c.values + at, j);
                k.store(w.fresh[0][i], j), v.store(w.fresh[1][i], j);
            }
        }
        __syncthreads();
    }
    for (int i = 0; i < c.fresh; i++) {
        int slot = c.slot + i * c.slot_step;
        int visible = last ? i + 1 : 0;  // new positions that this one sees
        Dims q[S::group], acc[S::group];
        float top[S::group], sum[S::group];
        MK_UNROLL
        for (int g = 0; g < S::group; g++) {
            q[g].load(a.raw + size_t(slot) * S::qkv + (head * S::group + g) * HEAD_DIM, j);
            q[g].norm_and_rotate(norms + S::q_norm_at, rope, c.positions, c.start + i, j);
            q[g].as_stored();
            top[g] = NEGATIVE_INFINITY, sum[g] = 0;
            MK_UNROLL
            for (int e = 0; e < 4; e++) acc[g].low[e] = acc[g].high[e] = 0;
        }
        int count = to - from + visible;
        for (int base = warp * AT_ONCE; base < count; base += WARPS * AT_ONCE) {
            int p = base + mine;
            bool real = p < count;
            Dims k, v;
            if (real && p < to - from) {
                k.load(keys + size_t(from + p) * HEAD_DIM, j), v.load(values + size_t(from + p) * HEAD_DIM, j);
            } else {
                int f = real ? p - (to - from) : 0;
                k.load(w.fresh[0][f], j), v.load(w.fresh[1][f], j);
            }
            MK_UNROLL
            for (int g = 0; g < S::group; g++) {
                float score = add_over(q[g].dot(k), 1, SHARE) * ATTENTION_SCALE;
                if (!real) continue;
                float higher = fmaxf(top[g], score);
                float factor = expf(top[g] - higher), weight = expf(score - higher);
                v.add_to(acc[g], factor, weight);
                sum[g] = sum[g] * factor + weight;
                top[g] = higher;
            }
        }
        MK_UNROLL
        for (int g = 0; g < S::group; g++) {  // the positions of a warp together, then the warps
            float highest = max_over(top[g], SHARE, LANES);
            float factor = top[g] == NEGATIVE_INFINITY ? 0.0f : expf(top[g] - highest);
            sum[g] = add_over(sum[g] * factor, SHARE, LANES);
            MK_UNROLL
            for (int e = 0; e < 4; e++) {
                acc[g].low[e] = add_over(acc[g].low[e] * factor, SHARE, LANES);
                acc[g].high[e] = add_over(acc[g].high[e] * factor, SHARE, LANES);
            }
            if (mine == 0) acc[g].store(w.acc[warp][g], j);
            if (lane == 0) w.sums[warp][g][0] = highest, w.sums[warp][g][1] = sum[g];
        }
        __syncthreads();
        for (int o = threadIdx.x; o < S::group * HEAD_DIM; o += THREADS) {
            int g = o / HEAD_DIM, d = o % HEAD_DIM;
            float highest = NEGATIVE_INFINITY, total = 0, x = 0;
            for (int other = 0; other < WARPS; other++) highest = fmaxf(highest, w.sums[other][g][0]);
            for (int other = 0; other < WARPS; other++) {
                if (w.sums[other][g][1] == 0) continue;
                float factor = expf(w.sums[other][g][0] - highest);
                total += w.sums[other][g][1] * factor;
                x += w.acc[other][g][d] * factor;
            }
            int query_head = head * S::group + g;
            size_t at = (size_t(piece) * SLOTS + slot) * S::heads + query_head;
            a.attended[at * HEAD_DIM + d] = n == 1 ? x / total : x;
            if (n > 1 && d == 0) a.attended_sums[2 * at] = highest, a.attended_sums[2 * at + 1] = total;
        }
        __syncthreads();
    }
}

// Four neighbours of the attention's output for one scratch column, its pieces put together.
template <class S>
MK_DEV float4 attended(const Args& a, int slot, int n, int k) {
    float4 x = *(const float4*)(a.attended + size_t(slot) * S::q + k);
    if (n == 1) return x;
    float highest = NEGATIVE_INFINITY, total = 0;
    for (int p = 0; p < n; p++)
        highest = fmaxf(highest, a.attended_sums[((size_t(p) * SLOTS + slot) * S::heads + k / HEAD_DIM) * 2]);
    float4 y = make_float4(0, 0, 0, 0);
    for (int p = 0; p < n; p++) {
        const float* sums = a.attended_sums + ((size_t(p) * SLOTS + slot) * S::heads + k / HEAD_DIM) * 2;
        float weight = expf(sums[0] - highest);
        total += weight * sums[1];
        x = *(const float4*)(a.attended + (size_t(p) * SLOTS + slot) * S::q + k);
        y.x += weight * x.x, y.y += weight * x.y, y.z += weight * x.z, y.w += weight * x.w;
    }
    return make_float4(y.x / total, y.y / total, y.z / total, y.w / total);
}

}  // namespace mk
