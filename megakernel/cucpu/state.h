// What one launch consists of: threads in warps in blocks, where each waits, and whose turn it is.
#pragma once
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cucpu.h"
#include "fiber.h"

namespace cucpu {

enum Code { kOk = 0, kRefused = 1, kDeadlock = 2, kDivergence = 3, kTrapped = 4 };

constexpr unsigned kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

constexpr const char* kSpinning = "spin";
constexpr const char* kReturned = "returned";

struct Place {
  const char* what;  // a call of CUDA, or one of the two above
  const char* file;
  int line;

  bool operator==(const Place& other) const {
    return line == other.line && same(what, other.what) && same(file, other.file);
  }
  static bool same(const char* a, const char* b) { return a == b || (a && b && strcmp(a, b) == 0); }
};

struct Warp;
struct Block;

struct Runner : Thread {
  Fiber fiber;
  Warp* warp;
  Block* home;
  Place place;  // where it waits, or waited last

  // Field by field: a Place that is built on the stack and copied as a whole stalls every switch.
  const Place& now_at(const char* what, const char* file, int line) {
    place.what = what;
    place.file = file;
    place.line = line;
    return place;
  }
};

struct Warp {
  Runner* lanes;
  unsigned ready;    // lanes that can run
  unsigned polling;  // lanes in spin(); ready again when the block gets its next turn
  unsigned arrived;  // at the collective `meeting`
  Place meeting;
  unsigned meetings;  // so far; what is exchanged lies in two halves, as a lane may be one meeting ahead of another
  uint64_t values[2][kWarp];
  unsigned votes[2];
  float* products[kWarp];
  MmaOperands operands;
  Edge edge[2];
};

struct Block {
  unsigned index;
  size_t first_stack;
  std::vector<Runner> runners;
  std::vector<Warp> warps;
  unsigned arrived = 0;  // at the barrier `meeting`
  Place meeting;
  unsigned barriers = 0;  // so far
  unsigned returned = 0;  // threads
  unsigned last_warp = 0;
  void* shared = nullptr;
  Edge edge[2];

  ~Block() { free(shared); }
};

struct Launch {
  const Kernel* kernel;
  const void* args;
  unsigned blocks, threads, resident;
  size_t shared_bytes;
  double deadlock_seconds;
  bool seeded;

  std::mt19937_64 random;
  Fiber scheduler;
  std::vector<std::unique_ptr<Block>> blocks_started;  // kept to the end: only then has every access happened before
  std::vector<Block*> active;                          // not finished, in the order in which they take turns
  unsigned started = 0;
  bool turn_over = false;   // the running block is to give way to another
  uint64_t clock = 0;       // ns
  uint64_t polls = 0;       // since an atomic changed memory or a thread returned
  Edge end;
  int code = kOk;
  std::string message;
};

inline Launch* launch = nullptr;

inline Runner& running() { return *static_cast<Runner*>(current); }

}  // namespace cucpu
