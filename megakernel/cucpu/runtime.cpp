// Runs the blocks of one launch: every CUDA thread is a fiber, all fibers share one OS thread, and a fiber runs until it
// waits. What waits and can never go on is found out exactly and reported. Built without sanitizers in every flavour, so
// that the only order TSan sees between fibers is the one that CUDA promises.
#include <mutex>

#include "cucpu.h"
#include "fiber.h"
#include "product.h"
#include "report.h"
#include "state.h"

namespace cucpu {

Thread* current = nullptr;

namespace {

constexpr uint64_t kPollNanoseconds = 10'000;
constexpr unsigned kEventsPerTurn = 4;  // a seeded schedule changes blocks at every fourth barrier or atomic, on average

// ---- ending a launch -------------------------------------------------------------------------------------------------

void stop(int code, std::string message) {
  launch->code = code;
  launch->message = std::move(message);
}

// Ends the launch from inside a kernel: the fibers are given up where they are.
[[noreturn]] void stop_here(int code, std::string message) {
  stop(code, std::move(message));
  Fiber::switch_to(running().fiber, launch->scheduler);
  abort();
}

[[noreturn]] void diverged(const std::string& why) {
  stop_here(kDivergence, why + "\n" + where_threads_wait(*running().home));
}

// ---- waiting ---------------------------------------------------------------------------------------------------------

void resume(Fiber& from, Runner& next) {
  current = &next;
  Fiber::switch_to(from, next.fiber);
}

// The running lane waits. Its warp goes on first: 32 stacks stay in the L1 cache, 512 do not.
void leave(Runner& me) {
  Warp& warp = *me.warp;
  if (warp.ready && !launch->turn_over) {
    resume(me.fiber, warp.lanes[__builtin_ctz(warp.ready)]);
  } else {
    Fiber::switch_to(me.fiber, launch->scheduler);
  }
}

// All lanes of the warp meet; the last to come does `work` for all of them and runs on. Returns the half of the warp's
// exchange that belongs to this meeting.
template <class Work>
__attribute__((always_inline)) inline unsigned meet(unsigned mask, const char* what, const char* file, int line,
                                                    Work work) {
  Runner& me = running();
  Warp& warp = *me.warp;
  const Place& place = me.now_at(what, file, line);
  if (mask != kAllLanes) {
    stop_here(kRefused, format("%s:%d: %s with mask 0x%08x; only 0xffffffff is supported, by %s", file, line, what,
                               mask, who(me).c_str()));
  }
  if (warp.arrived == 0) {
    warp.meeting = place;
  } else if (!(warp.meeting == place)) {
    diverged("lanes of one warp are in different collectives: " + describe(warp.meeting) + " and " + describe(place));
  }
  const unsigned half = warp.meetings & 1;
  if (++warp.arrived < kWarp) {
    warp.ready &= ~(1u << me.lane);
    leave(me);
  } else {
    warp.arrived = 0;
    warp.meetings++;
    warp.ready = kAllLanes;
    work(warp, half);
  }
  return half;
}

// The running lane could go on; a seeded schedule now and then lets another block run first.
void give_way_sometimes() {
  if (!launch->seeded || launch->random() % kEventsPerTurn != 0) return;
  launch->turn_over = true;
  Fiber::switch_to(running().fiber, launch->scheduler);
}

// ---- blocks ----------------------------------------------------------------------------------------------------------

void run_thread() {
  Fiber::entered(launch->scheduler);
  Runner& me = running();
  launch->kernel->run(launch->args);
  launch->end.release();
  me.now_at(kReturned, "", 0);
  launch->polls = 0;
  me.home->returned++;
  me.warp->ready &= ~(1u << me.lane);
  leave(me);
  abort();  // never ready again
}

void start_block(unsigned index, size_t first_stack) {
  auto block = std::make_unique<Block>();
  block->index = index;
  block->first_stack = first_stack;
  const size_t bytes = std::max<size_t>(launch->shared_bytes, 1);  // exactly: ASan watches the end
  if (posix_memalign(&block->shared, 128, bytes) != 0) abort();
  memset(block->shared, 0xff, bytes);
  block->warps.resize(launch->threads / kWarp);
  block->runners.resize(launch->threads);
  for (unsigned t = 0; t < launch->threads; t++) {
    Runner& runner = block->runners[t];
    runner.warp = &block->warps[t / kWarp];
    runner.home = block.get();
    runner.thread = {t, 0, 0};
    runner.block = {index, 0, 0};
    runner.block_size = dim3(launch->threads);
    runner.grid_size = dim3(launch->blocks);
    runner.lane = t % kWarp;
    runner.operands = &runner.warp->operands;
    runner.fiber.prepare(first_stack + t, run_thread, who(runner).c_str());
  }
  for (size_t w = 0; w < block->warps.size(); w++) {
    block->warps[w].lanes = &block->runners[w * kWarp];
    block->warps[w].ready = kAllLanes;
  }
  launch->active.push_back(block.get());
  launch->blocks_started.push_back(std::move(block));
  launch->started++;
}

bool can_run(const Block& block) {
  return std::any_of(block.warps.begin(), block.warps.end(), [](auto& warp) { return warp.ready != 0; });
}

bool wake_polling(Block& block) {
  bool any = false;
  for (auto& warp : block.warps) {
    any |= warp.polling != 0;
    warp.ready |= warp.polling;
    warp.polling = 0;
  }
  return any;
}

// The next ready warp: in turn, or from a random one on.
Runner& next_runner(Block& block) {
  const size_t warps = block.warps.size();
  const size_t from = launch->seeded ? launch->random() % warps : block.last_warp + 1;
  for (size_t i = 0; i < warps; i++) {
    const size_t at = (from + i) % warps;
    if (unsigned ready = block.warps[at].ready) {
      block.last_warp = at;
      return block.warps[at].lanes[__builtin_ctz(ready)];
    }
  }
  abort();  // the caller made sure
}

void run_blocks() {
  while (launch->started < launch->resident) start_block(launch->started, launch->started * launch->threads);
  size_t turn = launch->seeded ? launch->random() % launch->active.size() : 0;
  while (!launch->active.empty()) {
    Block& block = *launch->active[turn];
    // Who polls is asked again only when the block has nothing else to do, or at random.
    if ((launch->seeded && launch->random() % 2) || !can_run(block)) {
      if (!wake_polling(block) && !can_run(block)) {
        return stop(kDivergence, format("block %u can never go on: not all of its threads reach the same barrier\n",
                                        block.index) + where_threads_wait(block));
      }
    }
    launch->turn_over = false;
    launch->clock++;
    resume(launch->scheduler, next_runner(block));
    if (launch->code != kOk) return;
    if (block.returned == launch->threads) {
      launch->active.erase(launch->active.begin() + turn);
      if (launch->started < launch->blocks) {
        start_block(launch->started, Stacks::kReusable ? block.first_stack : launch->started * launch->threads);
      }
    } else if (!launch->turn_over && can_run(block)) {
      continue;
    } else {
      turn++;
    }
    if (launch->active.empty()) return;
    turn = launch->seeded ? launch->random() % launch->active.size() : turn % launch->active.size();
  }
}

#ifdef CUCPU_ASAN
// AddressSanitizer knows one thread; this line ends its report.
void say_who() {
  if (current) fprintf(stderr, "cucpu: by %s\n", who(running()).c_str());
}
#endif

const Kernel*& kernels() {
  static const Kernel* first = nullptr;
  return first;
}

const Kernel* find_kernel(const char* name) {
  const Kernel* kernel = kernels();
  while (kernel && strcmp(kernel->name, name) != 0) kernel = kernel->next;
  return kernel;
}

}  // namespace

// ---- what cucpu.h declares -------------------------------------------------------------------------------------------

Kernel::Kernel(const char* name, size_t args_size, void (*run)(const void* args))
    : name(name), args_size(args_size), run(run), next(kernels()) {
  kernels() = this;
}

void* shared_memory() { return running().home->shared; }

unsigned long long nanoseconds() { return ++launch->clock; }

void spin(const char* file, int line) {
  Runner& me = running();
  me.now_at(kSpinning, file, line);
  me.loads = 0;
  launch->clock += kPollNanoseconds;
  if (++launch->polls * kPollNanoseconds > launch->deadlock_seconds * 1e9) {
    stop_here(kDeadlock, format("deadlock: for %g s of polls nothing has changed that a thread could wait for\n",
                                launch->deadlock_seconds) + where_everyone_waits());
  }
  me.warp->ready &= ~(1u << me.lane);
  me.warp->polling |= 1u << me.lane;
  launch->turn_over = launch->seeded;
  leave(me);
}

void changed_memory() {
  launch->polls = 0;
  give_way_sometimes();
}

void trap(const char* message) {
  Runner& me = running();
  stop_here(kTrapped, format("%s (trap by %s)", message, who(me).c_str()));
}

void too_many_loads(const char* file, int line) {
  stop_here(kDeadlock, format("%s:%d: load_acquire in a loop that never calls cucpu::spin(), by %s", file, line,
                              who(running()).c_str()));
}

uint64_t shuffle(unsigned mask, uint64_t value, unsigned source, const char* what, const char* file, int line) {
  Runner& me = running();
  Warp& warp = *me.warp;
  warp.values[warp.meetings & 1][me.lane] = value;
  const unsigned half = meet(mask, what, file, line, [](Warp&, unsigned) {});
  return warp.values[half][source];
}

unsigned ballot(unsigned mask, bool predicate, const char* what, const char* file, int line) {
  Runner& me = running();
  Warp& warp = *me.warp;
  warp.values[warp.meetings & 1][me.lane] = predicate;
  const unsigned half = meet(mask, what, file, line, [](Warp& warp, unsigned half) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < kWarp; lane++) votes |= unsigned(warp.values[half][lane]) << lane;
    warp.votes[half] = votes;
  });
  return warp.votes[half];
}

void mma(float* d, const char* file, int line) {
  Runner& me = running();
  me.warp->products[me.lane] = d;
  meet(kAllLanes, "mma_m16n8k16", file, line, [](Warp& warp, unsigned) { multiply_for_warp(warp); });
}

}  // namespace cucpu

void __syncwarp(unsigned mask, const char* file, int line) {
  using namespace cucpu;
  Warp& warp = *running().warp;
  Edge& edge = warp.edge[warp.meetings & 1];
  edge.release();
  meet(mask, "__syncwarp", file, line, [](Warp&, unsigned) {});
  edge.acquire();
}

void __syncthreads(const char* file, int line) {
  using namespace cucpu;
  Runner& me = running();
  Block& block = *me.home;
  me.now_at("__syncthreads", file, line);
  me.loads = 0;
  if (block.arrived == 0) {
    block.meeting = me.place;
  } else if (!(block.meeting == me.place)) {
    diverged("threads of one block are at different barriers: " + describe(block.meeting) + " and " + describe(me.place));
  }
  Edge& edge = block.edge[block.barriers & 1];
  edge.release();
  if (++block.arrived < launch->threads) {
    me.warp->ready &= ~(1u << me.lane);
    leave(me);
  } else {
    block.arrived = 0;
    block.barriers++;
    for (auto& warp : block.warps) warp.ready = kAllLanes;
    give_way_sometimes();
  }
  edge.acquire();
}

// ---- the C interface -------------------------------------------------------------------------------------------------

#define CUCPU_EXPORT extern "C" __attribute__((visibility("default")))

// sizeof(Args) of a kernel, or 0 if there is none of that name.
CUCPU_EXPORT size_t cucpu_args_size(const char* kernel) {
  const cucpu::Kernel* found = cucpu::find_kernel(kernel);
  return found ? found->args_size : 0;
}

// Runs one launch to its end and returns a Code; `message` gets the report of any other than kOk.
//   resident_blocks   how many run at once, 0 for all; each further one starts when one has finished
//   seed              0: blocks take turns in order; else every choice is drawn from it
//   deadlock_seconds  of the launch's own clock, in which only polls take time: so many without any atomic in between
CUCPU_EXPORT int cucpu_launch(const char* kernel, const void* args, unsigned blocks, unsigned threads, size_t shared_bytes,
                              unsigned resident_blocks, uint64_t seed, double deadlock_seconds, char* message,
                              size_t message_size) {
  using namespace cucpu;
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  Launch state;
  state.kernel = find_kernel(kernel);
  state.args = args;
  state.blocks = blocks;
  state.threads = threads;
  state.resident = resident_blocks ? std::min(resident_blocks, blocks) : blocks;
  state.shared_bytes = shared_bytes;
  state.deadlock_seconds = deadlock_seconds;
  state.seeded = seed != 0;
  state.random.seed(seed);
  state.scheduler.adopt();
#ifdef CUCPU_ASAN
  __sanitizer_set_death_callback(say_who);
#endif
  launch = &state;
  if (!state.kernel) {
    stop(kRefused, format("no kernel named %s; was CUCPU_KERNEL(%s, ...) written after it?", kernel, kernel));
  } else if (blocks == 0 || threads == 0 || threads > 1024 || threads % kWarp != 0) {
    stop(kRefused, format("wanted at least 1 block of 32, 64, ... 1024 threads, got %u of %u", blocks, threads));
#ifdef CUCPU_TSAN
  } else if (uint64_t(blocks) * threads > 8000) {
    stop(kRefused, format("the tsan flavour runs at most 8000 threads, got %u blocks of %u", blocks, threads));
#endif
  } else {
    run_blocks();
    state.end.acquire();
  }
#ifdef CUCPU_TSAN
  // Threads that were given up never handed over their memory: to free it would be a race of its own.
  for (auto& block : state.blocks_started) {
    if (state.code != kOk) block.release();
  }
#endif
  if (message && message_size) snprintf(message, message_size, "%s", state.message.c_str());
  launch = nullptr;
  current = nullptr;
  return state.code;
}
