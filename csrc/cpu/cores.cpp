// Limits of processor time, and forked processes: see cores.h.
#include "cpu/cores.h"

#include <algorithm>
#include <atomic>
#include <fstream>
#include <initializer_list>
#include <sstream>
#include <string>

#if __has_include(<pthread.h>)
#include <pthread.h>
#endif

namespace mblm::cpu {
namespace {

std::atomic<bool> may_have_threads{false}, forked{false};

#if __has_include(<pthread.h>)
[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { forked = may_have_threads.load(); });
#endif

// The least limit that these files tell, of a cgroup and of those that it is in.
int64_t limit_of(const std::string& mount, std::string path,
                 std::initializer_list<const char*> files) {
  for (int64_t limit = kNoLimit;;) {
    std::stringstream text;
    for (const char* file : files) {
      std::ifstream in(mount + path + '/' + file);
      std::string line;
      if (std::getline(in, line)) text << line << ' ';
    }
    limit = std::min(limit, cores_of_cpu_max(text));
    if (path.empty()) return limit;
    path.resize(std::min(path.rfind('/'), path.size() - 1));
  }
}

}  // namespace

int64_t cores_of_cpu_max(std::istream& text) {
  int64_t quota = 0, period = 0;
  if (!(text >> quota >> period) || quota <= 0 || period <= 0) return kNoLimit;
  return quota / period + (quota % period > 0);
}

int64_t allowed_cores() {
  static const int64_t cores = [] {
    int64_t limit = kNoLimit;
    std::ifstream groups("/proc/self/cgroup");
    // Each line is "number:controllers:path"; version 2 has no controllers.
    for (std::string line; std::getline(groups, line);) {
      const size_t first = line.find(':'), second = line.find(':', first + 1);
      if (second == std::string::npos) continue;
      const std::string controllers = ',' + line.substr(first + 1, second - first - 1) + ',';
      const std::string path = line.substr(second + 1);
      if (controllers == ",,") {
        limit = std::min(limit, limit_of("/sys/fs/cgroup", path, {"cpu.max"}));
      } else if (controllers.find(",cpu,") != std::string::npos) {
        limit = std::min(
            limit, limit_of("/sys/fs/cgroup/cpu", path, {"cpu.cfs_quota_us", "cpu.cfs_period_us"}));
      }
    }
    return limit;
  }();
  return cores;
}

void note_threads() {
  may_have_threads.store(true, std::memory_order_relaxed);
}

bool is_forked() {
  return forked.load(std::memory_order_relaxed);
}

}  // namespace mblm::cpu
