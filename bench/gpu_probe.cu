// What a GPU can do with the parts that a frame is made of: barriers of all blocks, weights streamed with barriers in
// between, kernels as nodes of a graph. Each block reads its own part of every tile; a tile is one Fragment a thread.
#include "platform.h"

namespace probe {

using namespace mk;

constexpr u32 GROUP = 12;                   // blocks that meet first, in TREE
constexpr u32 LINE = 32, FLAGS_AT = 1024;   // words between counters that must not share a cache line; where flags lie
constexpr u64 PATIENCE = 2000000000;        // nanoseconds

enum Barrier { NONE, COUNTER, FLAGS, TREE };

struct Args {
    const Fragment* weights;
    u32* counters;   // zeros
    u32* seen;       // [blocks], what a block has told the others
    u32* result;     // sum of all words read, or disagreements found
    int barrier, rounds, tiles;
    int early;       // stream: loads for the next round leave before the barrier; node: the next node may start at once
};

MK_DEV void until(const u32* counter, u32 target) {
    u64 since = 0;
    for (u32 polls = 0; int(load_acquire(counter) - target) < 0;) {
        pause(++polls);
        if (polls % 1024) continue;
        if (since == 0) since = nanoseconds();
        if (nanoseconds() - since > PATIENCE) stop();
    }
}

// The `epoch`th meeting of all blocks, from 1 on.
MK_DEV void meet(const Args& a, u32 epoch) {
    u32 own = blockIdx.x, all = gridDim.x;
    __syncthreads();
    if (a.barrier == COUNTER) {  // as in frame.cu: all add to one counter and wait for it
        if (threadIdx.x == 0) {
            add_release(a.counters, 1);
            until(a.counters, epoch * all);
        }
    } else if (a.barrier == FLAGS) {  // everybody raises a flag of its own and looks at all others
        if (threadIdx.x == 0) add_release(a.counters + FLAGS_AT + own, 1);
        if (threadIdx.x < LANES)
            for (u32 other = threadIdx.x; other < all; other += LANES) until(a.counters + FLAGS_AT + other, epoch);
    } else if (a.barrier == TREE) {  // groups count for themselves, their first blocks among each other
        u32 group = own / GROUP, first = group * GROUP, groups = (all + GROUP - 1) / GROUP;
        u32 size = all - first < GROUP ? all - first : GROUP;
        u32* mine = a.counters + LINE * (1 + group);
        if (threadIdx.x == 0) {
            add_release(mine, 1);
            if (own == first) {
                until(mine, epoch * size);
                add_release(a.counters, 1);
            }
            until(a.counters, epoch * groups);
        }
    }
    __syncthreads();
}

MK_DEV u32 words(const Fragment& f) {
    const u32* x = (const u32*)f.e;
    return x[0] + x[1] + x[2] + x[3];
}

MK_DEV void add_up(const Args& a, u32 sum) {
    for (int bit = 1; bit < LANES; bit *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
    if (threadIdx.x % LANES == 0) atomicAdd(a.result, sum);
}

}  // namespace probe

MK_KERNEL(barriers, probe::Args) {
    for (int i = 1; i <= args.rounds; i++) probe::meet(args, i);
}

// Does a barrier do what it should? Every block tells a number and looks what the others have told.
MK_KERNEL(checked, probe::Args) {
    for (mk::u32 i = 1; i <= mk::u32(args.rounds); i++) {
        if (threadIdx.x == 0) args.seen[blockIdx.x] = i;
        probe::meet(args, 2 * i - 1);
        for (mk::u32 other = threadIdx.x; other < gridDim.x; other += THREADS)
            if (args.seen[other] != i) atomicAdd(args.result, 1u);
        probe::meet(args, 2 * i);
    }
}

MK_KERNEL(stream, probe::Args) {
    using namespace mk;
    const Fragment* from = args.weights + blockIdx.x * THREADS + threadIdx.x;
    size_t tile = size_t(gridDim.x) * THREADS;
    Fragment held[AHEAD];
    u32 sum = 0;
    MK_UNROLL
    for (int i = 0; i < AHEAD; i++) held[i] = load_weights(from + i * tile);
    for (int round = 0; round < args.rounds; round++) {
        bool more = round + 1 < args.rounds;
        for (int at = 0; at < args.tiles; at += AHEAD) {
            bool last = at + AHEAD == args.tiles;
            from += AHEAD * tile;
            MK_UNROLL
            for (int i = 0; i < AHEAD; i++) {
                sum += probe::words(held[i]);
                if (last ? more && args.early : true) held[i] = load_weights(from + i * tile);
            }
        }
        if (args.barrier) probe::meet(args, round + 1);
        if (more && !args.early) {
            MK_UNROLL
            for (int i = 0; i < AHEAD; i++) held[i] = load_weights(from + i * tile);
        }
    }
    probe::add_up(args, sum);
}

// A node of a graph: with tiles it asks for its first weights before the node before it has ended.
MK_KERNEL(node, probe::Args) {
    using namespace mk;
    if (args.early) let_next_kernel_start();
    const Fragment* from = args.weights + blockIdx.x * THREADS + threadIdx.x;
    size_t tile = size_t(gridDim.x) * THREADS;
    Fragment held[AHEAD];
    u32 sum = 0;
    if (args.tiles) {
        MK_UNROLL
        for (int i = 0; i < AHEAD; i++) held[i] = load_weights(from + i * tile);
    }
    wait_for_previous_kernel();
    for (int at = 0; at < args.tiles; at += AHEAD) {
        from += AHEAD * tile;
        MK_UNROLL
        for (int i = 0; i < AHEAD; i++) {
            sum += probe::words(held[i]);
            if (at + AHEAD < args.tiles) held[i] = load_weights(from + i * tile);
        }
    }
    if (args.tiles) probe::add_up(args, sum);
    if (!args.early) let_next_kernel_start();
}
