// The captures that are open on one recorder. Callers open and close them and say which requests are theirs; the drain
// thread brings the rows.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "capture/capture.h"

namespace moe_native {

class Captures {
 public:
  struct Opened {
    uint64_t number;
    int fd;  // of the file, to be mapped by the caller
  };
  struct Closed {
    uint64_t index;       // where the index is in the file
    uint64_t bytes;       // of the file, up to the index's end
    std::string problem;  // why rows are missing; empty where this side knows of none
  };

  // Throws std::system_error where there is no memory.
  Opened open(CaptureOptions options);
  // Throws std::out_of_range where the capture is not open, as all that follow.
  void add(uint64_t number, uint32_t request, uint32_t sample, uint32_t child, uint32_t capacity);
  // Of rows that were taken before. The memory stays as it is while the caller holds its lock. Throws std::system_error
  // where there is no memory for the index; the capture is closed all the same.
  Closed close(uint64_t number);
  std::vector<uint64_t> numbers();

  // By the drain thread. Rows of a step, once it is known whose they are.
  void take(std::span<const Run> runs, std::span<const Piece> pieces) noexcept;
  void free_unused() noexcept;  // and what a caller that died has left open

 private:
  using Clock = std::chrono::steady_clock;
  struct Open {
    std::unique_ptr<Capture> capture;
    Clock::time_point since;
  };
  struct Spare {
    CaptureFile file;
    Clock::time_point since;
  };

  CaptureFile file();
  Capture& find(uint64_t number);
  // Freeing gigabytes takes a second, so it is done by whoever has let go of the lock.
  std::vector<Open> take_abandoned();

  std::mutex mutex_;
  Clock::time_point looked_{};  // at the locks of callers
  uint64_t next_ = 1;
  std::map<uint64_t, Open> open_;
  // New pages cost several times the copy into them, so memory is used again, once no caller looks at it.
  std::vector<Spare> spare_;
};

}  // namespace moe_native
