// Admission of steps: what one may need of the ring, and a wait for that.
#pragma once

#include <cstdint>

#include "core/lane.h"

namespace moe_native {

// Room for a step in a lane, as an upper bound where its layers have the rows that they had before.
class StepNeed {
 public:
  explicit StepNeed(uint64_t rows) noexcept;

  void add_layer(uint64_t row_bytes) noexcept;
  // Such a step could have to wait for room that it holds itself.
  bool is_large_for(const LaneProducer& lane) const noexcept;
  bool fits(LaneProducer& lane) const noexcept { return lane.admits(records_, bytes_ + largest_); }

 private:
  const uint64_t rows_;
  uint64_t records_ = 1;  // the step's own
  uint64_t bytes_;
  uint64_t largest_;  // what a wrap of the arena may leave unused
};

// A wait for the drain thread, in short sleeps.
class Wait {
 public:
  explicit Wait(int64_t limit_ns) noexcept;

  bool again() noexcept;  // False: it has been long enough.
  int64_t ns() const noexcept;

 private:
  const int64_t limit_ns_;
  const int64_t start_ns_;
};

}  // namespace moe_native
