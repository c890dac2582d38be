// How many threads this process can use at once.
#pragma once

#include <cstdint>
#include <istream>

namespace mblm::cpu {

// The cores that the text of a cgroup's cpu.max allows, "quota period" or "max period" in
// microseconds, rounded up; kNoLimit where it sets none. Version 1 has the same two numbers in two
// files, the quota negative without a limit.
constexpr int64_t kNoLimit = INT64_MAX;
int64_t cores_of_cpu_max(std::istream& text);

// The cores that the process's cgroup allows, read once: with more threads, those that wait use up
// the time of those that work.
int64_t allowed_cores();

// Whoever decodes says so: OpenMP may have threads from here on.
void note_threads();

// Whether this process was forked from one that may have had OpenMP's threads. They are not here,
// but OpenMP would wait for them.
bool is_forked();

}  // namespace mblm::cpu
