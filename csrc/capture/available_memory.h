// How much memory this process can still take.
#pragma once

#include <cstdint>
#include <string>

namespace moe_native {

// Bytes that the kernel can give without swapping: of the machine (MemAvailable), and of each control group (version 2)
// that this process is in, where file pages count as free. What cannot be read is no limit. `root` stands before /proc
// and /sys.
uint64_t available_memory(const std::string& root = "");

}  // namespace moe_native
