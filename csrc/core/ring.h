// The ring file of one recorder: its header, its lanes, its counters. Made once, owned by one process.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/lane.h"
#include "core/mapped_file.h"
#include "core/ring_layout.h"

namespace moe_native {

struct RingOptions {
  std::string directory;       // where to put it; empty: /dev/shm, else `rank_directory`
  std::string rank_directory;  // of the trace it belongs to; empty: of none, and then the ring has no file
  uint64_t bytes = 64u << 20;  // of the whole file
  uint32_t lanes = 1;
};

struct LossTotals {
  uint64_t steps = 0;
  uint64_t layers = 0;
  uint64_t rows = 0;
};

class Ring {
 public:
  explicit Ring(const RingOptions& options);  // throws std::system_error, std::invalid_argument

  uint64_t id() const { return header_->ring_id; }
  const std::string& path() const { return file_.path(); }  // empty without a file
  uint32_t lanes() const { return header_->lanes; }
  LaneMemory lane(uint32_t index) const;
  bool fell_back() const { return fell_back_; }  // tmpfs had no room: the ring lies on the trace's disk
  void unlink() noexcept { file_.unlink(); }

  std::atomic<uint64_t>& counter(size_t index) const noexcept { return header_->counters[index]; }
  void add(size_t index, uint64_t value) const noexcept { counter(index).fetch_add(value, std::memory_order_relaxed); }
  void lose(Loss cause, uint64_t steps, uint64_t layers, uint64_t rows) const noexcept;
  LossTotals losses(Loss cause) const noexcept;

 private:
  MappedFile file_;
  RingHeader* header_ = nullptr;
  bool fell_back_ = false;
};

}  // namespace moe_native
