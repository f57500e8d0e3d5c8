// From records to steps: takes what the producers have committed, in order, and joins layer records with the record of
// their step. What captures want goes to them as soon as it is known whose it is.
#pragma once

#include <deque>
#include <vector>

#include "capture/captures.h"
#include "core/lane.h"
#include "core/ring.h"
#include "segment/step_data.h"

namespace moe_native {

class Assembler {
 public:
  Assembler(const Ring& ring, Captures& captures);

  // Takes everything that is committed now; complete steps are appended to ready(). False when there was nothing.
  bool poll();

  std::deque<StepData>& ready() { return ready_; }
  // The step whose record has not come yet; its layers may be written early when the step is streamed.
  StepData& open() { return open_; }
  bool open_is_streamed() const { return has_open_ && open_streamed_; }
  // Whether, at the last look, somebody waited for room. All that can be given back is, then.
  bool room_is_wanted() const { return room_wanted_; }
  std::vector<LaneConsumer::Position> positions() const;
  // Behind the last step whose record came.
  const std::vector<LaneConsumer::Position>& complete() const { return complete_; }
  // Copies out of the ring what captures want of the open step.
  void keep_captured();

  // Gives the records up to `end` back to the producers: they are in the segment file, or given up.
  void release(const std::vector<LaneConsumer::Position>& end);
  void lose_open() noexcept;  // a part of the open step could not be written
  void give_up() noexcept;    // everything taken is lost, and counted; the open step when it ends
  void end_open();            // nothing more will come: fragments of the open step are to be taken back
  const std::vector<LaneConsumer::Position>& released() const { return released_; }
  uint64_t held_bytes() const;  // of the fullest lane, taken and not released
  uint64_t held_records() const;

 private:
  bool poll_side_lanes(uint64_t last_step);
  void take_layer(LaneConsumer& lane, const Descriptor& d);
  void finish(const Descriptor& d, const std::byte* payload);
  void hand_over(std::span<const Run> runs);
  void drop_incomplete_layers();
  void start(uint64_t step);

  const Ring& ring_;
  Captures& captures_;
  std::vector<LaneConsumer> lanes_;
  std::vector<LaneConsumer::Position> released_;
  std::vector<LaneConsumer::Position> complete_;
  std::deque<StepData> ready_;
  StepData open_;
  bool has_open_ = false;
  bool open_streamed_ = false;
  bool room_wanted_ = false;
};

}  // namespace moe_native
