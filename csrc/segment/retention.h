// Keeps a trace within its size: whole closed segments go, the oldest first, across all runs.
#pragma once

#include <cstdint>
#include <string>

namespace moe_native {

// Deletes closed segments below `trace` until everything in it takes at most `max_bytes`. Nothing else: a directory
// without segments may be that of a living recorder, or of a dead one whose ring is still to be read. Errors are
// ignored: another process may be deleting too, and what cannot be deleted now can be next time.
void keep_within(const std::string& trace, uint64_t max_bytes) noexcept;

}  // namespace moe_native
