// Who owns a ring: enough to tell, after a crash or a reboot, whether that process still lives.
#pragma once

#include <cstdint>
#include <string>

namespace moe_native {

struct Owner {
  uint32_t pid = 0;
  uint64_t start_ticks = 0;  // field 22 of /proc/PID/stat: a reused pid has another start
  std::string boot_id;       // 36 characters; empty where /proc is not mounted

  static Owner self();
};

int64_t unix_time_ns();
uint64_t random_u64();

}  // namespace moe_native
