// The drain thread: takes whole steps from the ring, packs blocks, writes segments, frees the ring. It never touches
// the model: an I/O error costs steps, which are counted, and is said once. Without a trace it serves captures alone.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "capture/captures.h"
#include "core/messages.h"
#include "core/ring.h"
#include "segment/assembler.h"
#include "segment/block_builder.h"
#include "segment/request_table.h"
#include "segment/segment_file.h"

namespace moe_native {

struct DrainOptions {
  std::string trace;         // the trace's directory, for retention
  SegmentIdentity identity;  // without a directory there is no trace
  uint64_t segment_bytes = 64u << 20;
  uint64_t max_bytes = 0;  // of the whole trace; 0: no limit
  double flush_seconds = 10;
  bool exact_weights = false;
};

struct DrainTotals {
  std::atomic<uint64_t> blocks{0};
  std::atomic<uint64_t> rows{0};          // of steps written, once a step
  std::atomic<uint64_t> stored_rows{0};   // of these, the ones that are not only counted
  std::atomic<uint64_t> raw_bytes{0};     // taken from the ring
  std::atomic<uint64_t> stored_bytes{0};  // written
  std::atomic<uint64_t> cpu_ns{0};        // of the drain thread
};

class Drain {
 public:
  Drain(const Ring& ring, DrainOptions options, Messages& messages);
  ~Drain();  // as close(), without a word about errors

  // True: everything committed before the call is in the file. False: not within `seconds`, or the disk does not take
  // it.
  bool flush(double seconds);
  // True: captures have what was committed before the call. False: not within `seconds`.
  bool catch_up(double seconds);
  Captures& captures() { return captures_; }
  // Writes what is there, closes the segment, ends the thread. It does not wait for the disk: who ends a process may
  // kill it soon (vLLM does after 5 s).
  void close();
  void set_metadata(std::string json);  // for the segments that begin from now on
  const DrainTotals& totals() const { return totals_; }

 private:
  using Clock = std::chrono::steady_clock;

  void run();
  bool has_trace() const { return !options_.identity.directory.empty(); }
  void write(bool all, bool stop);
  void give_back();
  bool open_is_large() const;
  std::chrono::milliseconds until_next_look(uint64_t took_bytes);
  void write_ready(bool all);
  void write_fragment();
  void write_bookkeeping();
  bool write_block(std::span<const StepData* const> steps, const std::vector<LaneConsumer::Position>& end);
  bool store(const std::vector<LaneConsumer::Position>& end);
  bool ensure_segment();
  void close_segment(Sync sync);
  void io_failed(const char* what, int error);
  BlockExtras extras_for(const std::vector<LaneConsumer::Position>& end) const;
  std::vector<LossTotals> losses() const;
  uint64_t pressure_bytes() const;
  bool is_full() const;
  bool room_is_wanted() const;

  const Ring& ring_;
  const DrainOptions options_;
  Messages& messages_;
  DrainTotals totals_;

  Captures captures_;

  // Of the drain thread alone.
  Assembler assembler_;
  BlockBuilder builder_;
  Compressor compressor_;
  RequestTable requests_;
  SegmentFile segment_;
  uint64_t next_segment_ = 0;
  uint64_t next_block_ = 0;
  size_t batch_ = 0;  // steps of ready() that the next block will hold, so far
  uint64_t batch_bytes_ = 0;
  uint64_t losses_written_ = 0;  // sum of all loss counters in the last block
  Clock::time_point oldest_ready_{};
  Clock::time_point retry_at_{};
  Clock::time_point busy_until_{};
  bool failing_ = false;

  // Shared with the callers.
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::string metadata_ = "{}";
  uint64_t flush_wanted_ = 0;
  uint64_t flush_done_ = 0;
  uint64_t look_wanted_ = 0;
  uint64_t look_done_ = 0;
  bool flush_whole_ = true;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace moe_native
