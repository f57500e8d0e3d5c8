#include "core/admission.h"

#include <time.h>

#include <algorithm>

namespace moe_native {

namespace {

constexpr int64_t kRetryNs = 50'000;
// Admission cannot know the step's own record. This covers a large batch; end_step may wait for more.
constexpr uint64_t kTableBytes = 16 << 10;
constexpr uint64_t kTableBytesPerRow = sizeof(Run) + 4;

int64_t monotonic_ns() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

void sleep_ns(int64_t ns) {
  const timespec time{0, static_cast<long>(ns)};
  ::nanosleep(&time, nullptr);
}

}  // namespace

StepNeed::StepNeed(uint64_t rows) noexcept
    : rows_(rows), bytes_(kTableBytes + rows * kTableBytesPerRow), largest_(bytes_) {}

void StepNeed::add_layer(uint64_t row_bytes) noexcept {
  const uint64_t record = rows_ * row_bytes + 4 * kAlign;
  ++records_;
  bytes_ += record;
  largest_ = std::max(largest_, record);
}

bool StepNeed::is_large_for(const LaneProducer& lane) const noexcept {
  return bytes_ + largest_ > lane.capacity() / 2 || records_ > lane.descriptor_count() / 2;
}

Wait::Wait(int64_t limit_ns) noexcept : limit_ns_(limit_ns), start_ns_(monotonic_ns()) {}

bool Wait::again() noexcept {
  if (ns() >= limit_ns_) return false;
  sleep_ns(kRetryNs);
  return true;
}

int64_t Wait::ns() const noexcept { return monotonic_ns() - start_ns_; }

}  // namespace moe_native
