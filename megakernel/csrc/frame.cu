// Two launchers over one phase table: `persistent` walks all of it in one launch, `phase` is one entry as a kernel.
#include "phases.cuh"

namespace mk {

// Blocks meet at a counter that only grows: nothing is ever reset, so nothing can be reset too early. A launch is told
// where the counter stands when it starts. Release on arrival and acquire on departure order everything the blocks
// wrote; waiting has an end, with a report in host memory.
struct GridBarrier {
    const Args& a;
    u32 target;

    MK_DEV void arrive() {
        __syncthreads();
        if (threadIdx.x == 0) add_release(a.barrier, 1);
        target += BLOCKS;
    }
    MK_DEV void wait(int phase) {
        if (threadIdx.x == 0) {
            u64 since = 0;
            u32 seen, polls = 0;
            while (int((seen = load_acquire(a.barrier)) - target) < 0) {
                pause(++polls);
                if (polls % 1024) continue;
                if (since == 0) since = nanoseconds();
                if (nanoseconds() - since > a.patience) {
                    a.report[0] = 1 + blockIdx.x, a.report[1] = phase, a.report[2] = seen, a.report[3] = target;
                    stop();
                }
            }
        }
        __syncthreads();
    }
};

MK_DEV Work& begin(const Args& a) {
    Work& w = *(Work*)shared_memory();
    for (int i = threadIdx.x; i < COLUMNS * int(sizeof(Column) / 4); i += THREADS)
        ((u32*)w.columns)[i] = ((const u32*)a.columns)[i];
    __syncthreads();
    return w;
}

struct PhaseArgs {
    Args args;
    int index;
};

}  // namespace mk

// ENTRY 1 or 2 compiles one of them alone.
#if !defined(ENTRY) || ENTRY == 1
MK_KERNEL(persistent, mk::Args) {
    using namespace mk;
    GridBarrier barrier{args, args.arrived};
    Block block{args, begin(args), Ahead{}, args.table[0]};
    block.read_ahead_for_next();
    for (int p = 0; p < args.phases; p++) {
        Phase now = block.next;
        block.next = p + 1 < args.phases ? args.table[p + 1] : Phase{0xffffffffu};
        if (p > 0) barrier.wait(p);
        run(block, now);
        if (p + 1 < args.phases) barrier.arrive();
    }
}
#endif

#if !defined(ENTRY) || ENTRY == 2
MK_KERNEL(phase, mk::PhaseArgs) {
    using namespace mk;
    const Args& a = args.args;
    Phase now = a.table[args.index];
    Block block{a, *(Work*)shared_memory(), Ahead{}, now};
    block.read_ahead_for_next();  // weights alone: the kernel before this one may still be running
    block.next = Phase{0xffffffffu};
    wait_for_previous_kernel();
    let_next_kernel_start();  // to read ahead; it waits in turn until this one has ended
    begin(a);
    run(block, now);
}
#endif
