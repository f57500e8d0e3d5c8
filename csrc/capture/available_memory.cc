#include "capture/available_memory.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <optional>

namespace moe_native {

namespace {

constexpr uint64_t kNoLimit = std::numeric_limits<uint64_t>::max();

// The number behind `name` in a file of lines "name number …".
std::optional<uint64_t> field(const std::string& path, const std::string& name) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with(name)) continue;
    const size_t digit = line.find_first_of("0123456789", name.size());
    if (digit != std::string::npos) return std::stoull(line.substr(digit));
  }
  return std::nullopt;
}

std::optional<uint64_t> number(const std::string& path) {
  uint64_t value = 0;
  if (std::ifstream file(path); file >> value) return value;  // "max" is none
  return std::nullopt;
}

uint64_t available_in(const std::string& group) {
  const auto most = number(group + "/memory.max"), used = number(group + "/memory.current");
  if (!most || !used) return kNoLimit;
  const uint64_t files = field(group + "/memory.stat", "inactive_file ").value_or(0) +
                         field(group + "/memory.stat", "active_file ").value_or(0);
  const uint64_t taken = *used - std::min(files, *used);
  return *most - std::min(taken, *most);
}

}  // namespace

uint64_t available_memory(const std::string& root) {
  const auto of_machine = field(root + "/proc/meminfo", "MemAvailable:");
  uint64_t available = of_machine ? *of_machine * 1024 : kNoLimit;
  std::string group;
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    if (line.starts_with("0::")) group = line.substr(3);
  }
  const std::string mounted = root + "/sys/fs/cgroup";
  for (;;) {  // a limit may be that of a group further up
    available = std::min(available, available_in(mounted + group));
    const size_t slash = group.rfind('/');
    if (slash == std::string::npos) return available;
    group.resize(slash);
  }
}

}  // namespace moe_native
