// One fiber: a stack, a saved stack pointer, and what ASan and TSan must be told when it runs. Needs x86-64.
#pragma once
#ifndef __x86_64__
#error "cucpu needs x86-64: its context switch is written for that alone"
#endif
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#ifdef CUCPU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef CUCPU_TSAN
#include <sanitizer/tsan_interface.h>
#endif

// Pushes the registers that a function must preserve, stores the stack pointer, and does the reverse on the other stack.
// The floating-point control words are left alone: no kernel changes them.
asm(R"(
.text
.type cucpu_switch_stack, @function
cucpu_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cucpu_switch_stack, . - cucpu_switch_stack
)");
extern "C" void cucpu_switch_stack(void** save, void* load) __attribute__((visibility("hidden")));

namespace cucpu {

// Stacks are kept for the next launch: 4096 fresh ones cost more page faults than a small kernel takes.
class Stacks {
 public:
  static constexpr size_t kPage = 4096;
#ifdef CUCPU_ASAN
  static constexpr size_t kSize = 128 << 10;  // with red zones around every array
#else
  static constexpr size_t kSize = 64 << 10;
#endif
#ifdef CUCPU_TSAN
  static constexpr bool kReusable = false;  // to TSan the new owner races with the old one
#else
  static constexpr bool kReusable = true;
#endif

  // The low end of stack `index`; below it lies a page without access, so that an overflow faults.
  static char* get(size_t index) {
    static std::vector<char*> stacks;
    while (stacks.size() <= index) {
      void* memory = mmap(nullptr, kPage + kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) {
        fprintf(stderr, "cucpu: no memory for the stack of thread %zu\n", index);
        abort();
      }
      stacks.push_back(static_cast<char*>(memory) + kPage);
    }
    return stacks[index];
  }
};

struct Fiber {
  void* stack_pointer = nullptr;
#ifdef CUCPU_ASAN
  const void* stack_low = nullptr;
  size_t stack_size = 0;
#endif
#ifdef CUCPU_TSAN
  void* tsan = nullptr;
#endif

  // Lets entry() run on stack `index` at the first switch. It must call entered() first and may never return.
  void prepare(size_t index, void (*entry)(), const char* name) {
    char* low = Stacks::get(index);
    // Shifted by lane, or the hot lines of a warp's 32 stacks would share a few sets of the L1 cache.
    void** top = reinterpret_cast<void**>(low + Stacks::kSize - 128 * (index % 32));
    *--top = nullptr;  // where entry() would return to: ends backtraces
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; saved++) *--top = nullptr;
    stack_pointer = top;
#ifdef CUCPU_ASAN
    stack_low = low;
    stack_size = Stacks::kSize;
    __asan_unpoison_memory_region(low, Stacks::kSize);  // a fiber that was given up left its frames poisoned
#endif
#ifdef CUCPU_TSAN
    // Ordered after all that its maker did. Never destroyed: its past would be missing in reports.
    tsan = __tsan_create_fiber(0);
    __tsan_set_fiber_name(tsan, name);
#else
    (void)name;
#endif
  }

  // This fiber is the one that runs: the thread that calls cucpu_launch.
  void adopt() {
#ifdef CUCPU_TSAN
    tsan = __tsan_get_current_fiber();
#endif
  }

  // First thing on a new stack. `from` is adopted and runs on a stack that only ASan knows the bounds of.
  static void entered(Fiber& from) {
#ifdef CUCPU_ASAN
    const void* low;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &low, &size);
    if (!from.stack_low) {
      from.stack_low = low;
      from.stack_size = size;
    }
#else
    (void)from;
#endif
  }

  // Runs `to` until something switches back to `from`. Orders no memory in TSan's eyes.
  static void switch_to(Fiber& from, Fiber& to) {
#ifdef CUCPU_TSAN
    __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef CUCPU_ASAN
    void* fake_stack;
    __sanitizer_start_switch_fiber(&fake_stack, to.stack_low, to.stack_size);
#endif
    cucpu_switch_stack(&from.stack_pointer, to.stack_pointer);
#ifdef CUCPU_ASAN
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }
};

// A place through which one thread hands its writes to others, in TSan's eyes.
struct Edge {
#ifdef CUCPU_TSAN
  void release() { __tsan_release(this); }
  void acquire() { __tsan_acquire(this); }
  char unused[8];
#else
  void release() {}
  void acquire() {}
#endif
};

}  // namespace cucpu
