#include "core/owner.h"

#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include <fstream>
#include <sstream>

namespace moe_native {

Owner Owner::self() {
  Owner owner;
  owner.pid = static_cast<uint32_t>(::getpid());
  std::ifstream("/proc/sys/kernel/random/boot_id") >> owner.boot_id;
  std::ifstream stat("/proc/self/stat");
  const std::string text((std::istreambuf_iterator<char>(stat)), std::istreambuf_iterator<char>());
  // The second field is the program's name in brackets and may hold spaces, so count from the last bracket.
  const size_t bracket = text.rfind(')');
  if (bracket != std::string::npos) {
    std::istringstream fields(text.substr(bracket + 1));
    std::string skipped;
    for (int field = 3; field < 22; ++field) fields >> skipped;
    fields >> owner.start_ticks;
  }
  return owner;
}

int64_t unix_time_ns() {
  timespec now{};
  ::clock_gettime(CLOCK_REALTIME, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

uint64_t random_u64() {
  uint64_t value = 0;
  // A short read cannot happen for 8 bytes; a kernel without getrandom leaves the time and the pid.
  if (::getrandom(&value, sizeof value, 0) != sizeof value) {
    value = static_cast<uint64_t>(unix_time_ns()) * 0x9E3779B97F4A7C15u ^ static_cast<uint64_t>(::getpid());
  }
  return value == 0 ? 1 : value;
}

}  // namespace moe_native
