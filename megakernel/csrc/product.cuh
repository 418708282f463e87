// Activations of up to 8 * NT columns times one packed matrix, spread over all blocks; deterministic for any company.
//
// A work item is a tile of 16 output rows and a part of the sum over k; block b owns the items b, b + BLOCKS, ... In an
// item the warps share k: warp w multiplies the k-tiles w, w + WARPS, ..., and the warps' sums are added in the order of
// their numbers. Nothing in the order of additions depends on the number of columns, of blocks or of NT.
//
// The first READ_AHEAD weight fragments of a phase are in registers before the phase before it has ended.
#pragma once
#include "sizes.h"

namespace mk {

// Fragments that a lane keeps in flight, across the grid barrier too: 64 KB a block; half of it beside 32 columns' sums,
// and before sm_90, where a multiprocessor's share of the memory is slower and the compiler would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int READ_AHEAD = 2048 / THREADS;
#else
constexpr int READ_AHEAD = (COLUMNS > 16 ? 2048 : 4096) / THREADS;
#endif
constexpr int REDUCED_TILES = 4;            // tiles x 8 columns whose warp sums fit into Work::sums at once

struct Ahead {
    Fragment f[READ_AHEAD];
};

MK_SIZE int ceil_div(int a, int b) { return (a + b - 1) / b; }
MK_SIZE int at_most(int a, int b) { return a < b ? a : b; }

// The cut of one matrix [ROWS, K] whose sum over k has SPLIT parts.
template <int ROWS, int K, int SPLIT = 1>
struct Matrix {
    static constexpr int rows = ROWS, k = K, split = SPLIT;
    static constexpr int tiles = ROWS / 16, k_tiles = K / 16, part = k_tiles / SPLIT;
    static constexpr int items = tiles * SPLIT;
    static constexpr int items_a_block = ceil_div(items, BLOCKS);
    static constexpr int steps = ceil_div(part, WARPS);            // k-tiles of one warp in one item
    static constexpr int chunk = at_most(steps, READ_AHEAD);       // of them in flight at once
    static constexpr int chunks = ceil_div(steps, chunk);
    template <int NT>
    static MK_SIZE int batch() {  // items whose sums are held at once
        int fit = at_most(READ_AHEAD / chunk, REDUCED_TILES / NT > 0 ? REDUCED_TILES / NT : 1);
        return chunks > 1 ? 1 : at_most(fit, items_a_block);
    }
};

// Where fragment `v` of a batch lies: item and k-tile, or nowhere.
template <class M>
struct Place {
    int item, tile, k_tile;
    bool real;
    MK_DEV Place(int first_item, int chunk, int v, int warp) {
        int index = first_item + v / M::chunk, step = chunk * M::chunk + v % M::chunk;
        item = blockIdx.x + index * BLOCKS;
        int part = item / M::tiles;
        tile = item % M::tiles;
        int within = warp + WARPS * step;
        k_tile = part * M::part + within;
        real = index < M::items_a_block && item < M::items && within < M::part;
    }
};

template <class M>
MK_DEV Fragment fetch(const Fragment* weights, const Place<M>& at, int lane) {
    return load_weights(weights + (size_t(at.tile) * M::k_tiles + at.k_tile) * LANES + lane);
}

constexpr int PARTS = 4;  // that a tile is cut into at most

// What must be known of a matrix to load the first fragments that product() will want.
struct Shelf {
    const Fragment* weights;  // null: nothing to load
    int tiles, k_tiles, part, items, chunk, loads;
};

template <class M, int NT>
MK_DEV Shelf shelf(const Fragment* weights) {
    static_assert(M::items <= PARTS * M::tiles, "a tile is cut into too many parts");
    return Shelf{weights, M::tiles, M::k_tiles, M::part, M::items, M::chunk, M::template batch<NT>() * M::chunk};
}

// Start loading them; the same order as Place.
MK_DEV void read_ahead(Ahead& ahead, const Shelf& s) {
    int tid = thread(), warp = tid / LANES, lane = tid % LANES;
    int item = blockIdx.x, step = 0, within = warp;
    auto first = [&] {  // fragment of the item; no division, as there are at most PARTS
        int tile = item, k_tile = warp;
        MK_UNROLL
        for (int i = 1; i < PARTS; i++)
            if (tile >= s.tiles) tile -= s.tiles, k_tile += s.part;
        return s.weights + (size_t(tile) * s.k_tiles + k_tile) * LANES + lane;
    };
    const Fragment* from = first();
    MK_UNROLL
    for (int v = 0; v < READ_AHEAD; v++) {
        // always written, so that no register is held for what lay there
        ahead.f[v] = load_weights(from, v < s.loads && item < s.items && within < s.part);
        within += WARPS, from += WARPS * LANES;
        if (++step == s.chunk) step = 0, within = warp, item += BLOCKS, from = first();
    }
}

// All items of this block.
//
//   source(k_tile, nt) -> Quad    what column 8 nt + lane / 4 holds at k = 16 k_tile + 4 (lane % 4) + 0..3
//   TOGETHER      the source's loads are requested together, also for what is not real, before their products
//   finish(tile, part, row, column, low, high)    takes the sums of rows `row` and `row + 8` of the tile
//   between()      runs after the last product, before its sums are added: the place to read ahead for the next phase
//
// The weights' k are permuted alike (megakernel/pack.py), which lets a lane load four neighbours.
template <class M, int NT, bool TOGETHER = false, class Source, class Between, class Finish>
MK_DEV void product(Ahead& ahead, const Fragment* weights, float* sums, Source source, Between between, Finish finish) {
    constexpr int BATCH = M::template batch<NT>(), BATCHES = ceil_div(M::items_a_block, BATCH);
    constexpr int LOADS = BATCH * M::chunk;
    int tid = thread(), warp = tid / LANES, lane = tid % LANES;
    for (int batch = 0; batch < BATCHES; batch++) {
        float acc[BATCH][NT][4];
        MK_UNROLL
        for (int i = 0; i < BATCH * NT * 4; i++) acc[i / (NT * 4)][i / 4 % NT][i % 4] = 0;
        for (int chunk = 0; chunk < M::chunks; chunk++) {
            bool last = chunk == M::chunks - 1;
            MK_UNROLL
            for (int v = 0; v < LOADS; v++) {
                Place<M> at(batch * BATCH, chunk, v, warp);
                if (TOGETHER) {
                    Quad b[NT];
                    MK_UNROLL
                    for (int nt = 0; nt < NT; nt++) b[nt] = source(at.real ? at.k_tile : 0, nt);
                    MK_UNROLL
                    for (int nt = 0; nt < NT; nt++)
                        if (at.real) mma(acc[v / M::chunk][nt], ahead.f[v], b[nt]);
                } else if (at.real) {
                    MK_UNROLL
                    for (int nt = 0; nt < NT; nt++) mma(acc[v / M::chunk][nt], ahead.f[v], source(at.k_tile, nt));
                }
                if (!last || batch < BATCHES - 1) {
                    Place<M> next(last ? (batch + 1) * BATCH : batch * BATCH, last ? 0 : chunk + 1, v, warp);
                    if (next.real) ahead.f[v] = fetch<M>(weights, next, lane);
                }
            }
        }
        if (batch > 0) __syncthreads();  // the sums of the batch before have been read
        MK_UNROLL
        for (int i = 0; i < BATCH * NT; i++) {
            float* d = acc[i / NT][i % NT];
            ((float4*)sums)[(warp * BATCH * NT + i) * LANES + lane] = make_float4(d[0], d[1], d[2], d[3]);
        }
        if (batch == BATCHES - 1) between();
        __syncthreads();
        for (int o = threadIdx.x; o < BATCH * NT * LANES * 2; o += THREADS) {
            int i = o / (LANES * 2), from = o / 2 % LANES, j = o % 2;
            int item = blockIdx.x + (batch * BATCH + i / NT) * BLOCKS;
            if (batch * BATCH + i / NT >= M::items_a_block || item >= M::items) continue;
            float low = 0, high = 0;
            for (int w = 0; w < WARPS; w++) {
                const float* d = sums + ((w * BATCH * NT + i) * LANES + from) * 4;
                low += d[j];
                high += d[j + 2];
            }
            finish(item % M::tiles, item / M::tiles, from / 4, i % NT * 8 + from % 4 * 2 + j, low, high);
        }
    }
}

}  // namespace mk
