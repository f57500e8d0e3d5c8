// The producer's side of a recorder: the step protocol.
//
//   begin_step   admits the whole step, or refuses it and counts it
//   announce     whose rows they will be, where captures are told early
//   place        where this thread's calls find the step's rows, where begin_step could not know
//   record       one layer's rows, called from the op; does nothing outside an open step
//   end_step     says whose rows they were and commits the step
//   abort_step   the program gave the step up
//
// begin, end and abort are called by one thread at a time. record may be called by as many threads as there are lanes,
// each layer by one of them, unless they have places; the program orders those calls between begin and end, as a
// forward pass does.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "core/bindings.h"
#include "core/lane.h"
#include "core/layer_input.h"
#include "core/messages.h"
#include "core/ring.h"

namespace moe_native {

enum class Overflow { kDrop, kBlock };

// In tensors of `tensor_rows` rows (any number, where it is negative), those from `start` on are the step's rows from
// `first` on, `count` of them.
struct Place {
  int64_t tensor_rows = -1;
  int64_t start = 0;
  int64_t first = 0;
  int64_t count = 0;
};
inline constexpr size_t kMostPlaces = 8;

struct StepTable {
  std::span<const Run> runs;
  std::span<const uint32_t> tokens;  // empty, or one a row
  std::span<const std::byte> notes;  // framed as RING.md says
  uint32_t note_count = 0;
};

// kForCaptures: admitted, and the trace does not have it, because it is paused.
enum class Begun { kAdmitted, kRefused, kPaused, kNested, kForCaptures };

class StepRecorder {
 public:
  // `patience`: how long a step waits for room because of captures alone, with a trace that would drop it.
  StepRecorder(const Ring& ring, Overflow overflow, uint32_t fields, Messages& messages,
               std::chrono::nanoseconds patience = std::chrono::seconds(30));
  ~StepRecorder();
  StepRecorder(const StepRecorder&) = delete;
  StepRecorder& operator=(const StepRecorder&) = delete;

  // Throws std::length_error when the process has no free binding.
  // `every_step`: a step in which this layer has no rows has lost them, and is counted so.
  // `logits_width`: a tensor of another width is not taken for the router's logits; 0 takes any.
  int bind(uint16_t layer, uint32_t experts, uint32_t k, bool enabled, bool every_step = true,
           uint32_t logits_width = 0);

  // `spans` ascend and do not overlap. With Overflow::kBlock this may wait.
  Begun begin_step(std::span<const RowSpan> spans) noexcept;
  // As above, for `rows` rows that each thread finds by its places. A call of a thread without a fitting one is counted
  // as bad input.
  Begun begin_placed_step(int64_t rows) noexcept;
  // Whose rows the open step will have: before its first layer, by the thread that began it. Then captures take each
  // layer as it comes, and not all of them when the step ends.
  void announce(std::span<const Run> runs) noexcept;
  // The places of this thread in the open step, at most kMostPlaces; what it has been told before is forgotten.
  void place(std::span<const Place> places) noexcept;
  // The open step has only so many rows, as is known before its first layer.
  void narrow(int64_t rows) noexcept;
  void record(Binding& binding, LayerInput input) noexcept;
  // False: nothing is open, or the step was lost (counted). The runs must cover the step's rows.
  bool end_step(const StepTable& table) noexcept;
  void abort_step() noexcept;
  // For good. By any thread, at any time; an open step is lost and counted.
  void close() noexcept;

  // These by the thread that begins steps, while none is open. `counted`: no row of the next steps will be stored.
  void configure(uint32_t fields, bool counted) noexcept;
  void enable(Binding& binding, bool enabled) noexcept;
  // What captures want of the next steps, whatever the trace has of them; 0: nothing. Meanwhile no step is dropped, but
  // for one that has waited too long. What captures lose is counted for them.
  void capture(uint32_t fields) noexcept;
  void want(Binding& binding, bool wanted) noexcept;

  bool step_open() const noexcept { return open_step_.load(std::memory_order_acquire) != 0; }
  int64_t step_rows() const noexcept { return step_rows_; }
  uint32_t fields() const noexcept { return fields_ | captured_fields_; }  // of the open step
  bool blocks() const noexcept { return overflow_ == Overflow::kBlock || captured_fields_ != 0; }
  // Whether a record of the open step may have to wait for room.
  bool may_wait() const noexcept { return streamed() || blocks(); }
  // Of the open step, or of the one begun last; -1 before the first.
  int64_t step_number() const noexcept { return static_cast<int64_t>(next_step_) - 1; }
  // By any thread; from the next step on. The steps that are not recorded are counted.
  void pause(bool paused) noexcept { paused_.store(paused, std::memory_order_relaxed); }
  bool paused() const noexcept { return paused_.load(std::memory_order_relaxed); }

 private:
  struct alignas(kAlign) Lane {
    LaneProducer producer;
  };

  Begun begin(int64_t rows) noexcept;
  bool streamed() const noexcept { return streamed_.load(std::memory_order_relaxed); }
  bool admit() noexcept;
  int claim_lane(uint64_t step) noexcept;
  // The fields of a layer that the trace has of the open step, and those that captures want; 0: not this layer.
  uint32_t traced(const Binding& binding) const noexcept;
  uint32_t captured(const Binding& binding) const noexcept;
  // `fields` of the trace and `wanted` by captures are lost. Each loss of a layer is said once.
  [[gnu::cold]] void complain(Binding& binding, const char* problem, uint32_t fields, uint32_t wanted) noexcept;
  const Place* placed(uint64_t step, int64_t tensor_rows) const noexcept;
  // `of_layer`: there is no use in waiting once the step is lost.
  Descriptor* reserve(LaneProducer& lane, uint64_t bytes, bool of_layer) noexcept;
  [[gnu::cold]] Descriptor* wait_for_room(LaneProducer& lane, uint64_t bytes, bool of_layer) noexcept;
  int64_t patience(int64_t without_captures_ns) const noexcept;
  [[gnu::cold]] void fail(Loss cause) noexcept;
  void close_step(uint64_t step, const StepTable* table) noexcept;
  void count_silent_layers(uint64_t step) noexcept;
  void lose_step(Loss cause) noexcept;

  const Ring& ring_;
  const Overflow overflow_;
  const int64_t patience_ns_;
  Messages& messages_;
  std::vector<Lane> lanes_;
  std::vector<Binding*> bindings_;
  uint32_t fields_;
  uint32_t captured_fields_ = 0;
  bool counted_ = false;
  std::atomic<bool> paused_{false};
  std::atomic<bool> closed_{false};

  // The open step. Everything below is written before open_step_ is stored (release) and read after it is loaded
  // (acquire).
  std::atomic<uint64_t> open_step_{0};  // its number plus one; 0: none
  std::atomic<uint32_t> claimed_lanes_{0};
  std::atomic<int> failed_{-1};  // a Loss: the step cannot be kept
  uint64_t next_step_ = 0;
  int64_t step_rows_ = 0;
  int64_t step_time_ns_ = 0;
  uint32_t enabled_layers_ = 0;        // of the trace
  std::atomic<bool> streamed_{false};  // any thread that has to wait finds it to be so
  bool traced_ = true;                 // else it is for captures alone
  std::vector<RowSpan> spans_;
  bool placed_ = false;  // the step's rows are where each thread's places say
};

}  // namespace moe_native
