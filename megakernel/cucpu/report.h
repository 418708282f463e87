// Words for where the threads of a launch wait.
#pragma once
#include <algorithm>
#include <cstdarg>
#include <string>
#include <utility>
#include <vector>

#include "state.h"

namespace cucpu {

inline std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));
inline std::string format(const char* pattern, ...) {
  char text[1024];
  va_list values;
  va_start(values, pattern);
  vsnprintf(text, sizeof text, pattern, values);
  va_end(values);
  return text;
}

inline std::string who(const Runner& runner) { return format("block %u thread %u", runner.block.x, runner.thread.x); }

inline std::string describe(const Place& place) {
  if (!place.what) return "not started";
  if (place.what == kReturned) return "returned";
  if (place.what == kSpinning) return format("%s:%d (spinning)", place.file, place.line);
  return format("%s:%d %s", place.file, place.line, place.what);
}

// One line per group of threads that wait at one place: "block 2 threads 0, 32-63: kernel.cu:120 (spinning)".
inline std::string where_threads_wait(const Block& block) {
  std::vector<std::pair<Place, std::string>> groups;
  for (unsigned first = 0; first < block.runners.size();) {
    const Place& place = block.runners[first].place;
    unsigned last = first;
    while (last + 1 < block.runners.size() && block.runners[last + 1].place == place) last++;
    std::string range = first == last ? format("%u", first) : format("%u-%u", first, last);
    auto group = std::find_if(groups.begin(), groups.end(), [&](auto& known) { return known.first == place; });
    if (group == groups.end()) {
      groups.emplace_back(place, range);
    } else {
      group->second += ", " + range;
    }
    first = last + 1;
  }
  std::string lines;
  for (auto& [place, threads] : groups) {
    lines += format("  block %u threads ", block.index) + threads + ": " + describe(place) + "\n";
  }
  return lines;
}

inline std::string where_everyone_waits() {
  std::string lines;
  for (auto& block : launch->blocks_started) lines += where_threads_wait(*block);
  for (unsigned index = launch->started; index < launch->blocks; index++) {
    lines += format("  block %u: NOT RESIDENT (never started)\n", index);
  }
  return lines;
}

}  // namespace cucpu
