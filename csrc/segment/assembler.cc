#include "segment/assembler.h"

#include <algorithm>
#include <tuple>
#include <utility>

namespace moe_native {

namespace {

// What the trace has of it.
Piece of_trace(Piece piece, uint32_t flags) {
  const auto leave_out = [&](uint32_t flag, DType& dtype, const std::byte*& column, uint32_t* width) {
    if ((flags & flag) == 0) return;
    dtype = DType::kNone;
    column = nullptr;
    if (width != nullptr) *width = 0;
  };
  leave_out(kCapturedWeights, piece.shape.weights_dtype, piece.weights, nullptr);
  leave_out(kCapturedLogits, piece.shape.logits_dtype, piece.logits, &piece.shape.logits_width);
  leave_out(kCapturedHidden, piece.shape.hidden_dtype, piece.hidden, &piece.shape.hidden_width);
  return piece;
}

}  // namespace

Assembler::Assembler(const Ring& ring, Captures& captures) : ring_(ring), captures_(captures) {
  for (uint32_t i = 0; i < ring.lanes(); ++i) lanes_.emplace_back(ring.lane(i));
  released_.resize(lanes_.size());
  complete_.resize(lanes_.size());
}

bool Assembler::poll() {
  bool took = false;
  room_wanted_ = std::ranges::any_of(lanes_, &LaneConsumer::is_waited_for);
  LaneConsumer& first = lanes_[0];
  while (const Descriptor* d = first.peek()) {
    took = true;
    if (!LaneConsumer::committed(*d)) {
      first.take();
      continue;
    }
    if (d->kind == RecordKind::kLayer) {
      take_layer(first, *d);
      continue;
    }
    if (d->kind == RecordKind::kRows) {
      if (!has_open_ || open_.number != d->step) start(d->step);
      const auto* runs = reinterpret_cast<const Run*>(first.payload(*d));
      open_.announced.assign(runs, runs + d->runs);
      first.take();
      continue;
    }
    // The other lanes' records of this step were committed before its step record, so they are there.
    poll_side_lanes(d->step);
    if (!has_open_ || open_.number != d->step) start(d->step);  // before take(): an older step ends in front of it
    first.take();
    finish(*d, first.payload(*d));
    complete_ = positions();
  }
  // A step that is larger than the ring needs its room back while it is open, in every lane. Where it was not known to
  // be so large, a lane may be full before lane 0 says it.
  if (has_open_) took |= poll_side_lanes(open_.number);
  if (has_open_ && !open_.announced.empty()) hand_over(open_.announced);
  return took;
}

bool Assembler::poll_side_lanes(uint64_t last_step) {
  bool took = false;
  for (size_t i = 1; i < lanes_.size(); ++i) {
    while (const Descriptor* d = lanes_[i].peek()) {
      const bool committed = LaneConsumer::committed(*d);
      if (committed && d->step > last_step) break;
      if (committed && d->step == last_step) {
        take_layer(lanes_[i], *d);
      } else {
        lanes_[i].take();  // of an earlier step, which never got its own record
      }
      took = true;
    }
  }
  return took;
}

void Assembler::start(uint64_t step) {
  // A step that never got its record was counted by the producer when that failed.
  if (has_open_ && open_.fragments > 0 && open_.number != step) {
    open_.aborted = true;
    open_.pieces.clear();
    open_.end = positions();
    ready_.push_back(std::move(open_));
  }
  open_ = StepData{};
  open_.number = step;
  has_open_ = true;
  open_streamed_ = false;
}

void Assembler::take_layer(LaneConsumer& lane, const Descriptor& d) {
  if (!has_open_ || open_.number != d.step) start(d.step);
  const LayerColumns at = layer_columns(d);
  const std::byte* payload = lane.payload(d);
  Piece piece;
  piece.shape = {d.layer,        d.ids_dtype, d.weights_dtype, d.logits_dtype,
                 d.hidden_dtype, d.k,         d.logits_width,  d.hidden_width};
  piece.first_row = d.first_row;
  piece.rows = d.rows;
  piece.ids = payload + at.ids;
  if (d.weights_dtype != DType::kNone) piece.weights = payload + at.weights;
  if (d.logits_dtype != DType::kNone) piece.logits = payload + at.logits;
  if (d.hidden_dtype != DType::kNone) piece.hidden = payload + at.hidden;
  if ((d.flags & kCaptured) != 0) open_.captured.push_back(piece);
  if ((d.flags & kCapturedOnly) == 0) open_.pieces.push_back(of_trace(piece, d.flags));
  open_.rows = d.step_rows;
  open_.time_ns = d.time_ns;
  open_.bytes += at.bytes + sizeof(Descriptor);
  open_streamed_ = open_streamed_ || (d.flags & kStepStreamed) != 0;
  open_.counted = open_.counted || (d.flags & kStepCounted) != 0;
  ring_.add(kRecords, 1);
  lane.take();
}

void Assembler::finish(const Descriptor& d, const std::byte* payload) {
  has_open_ = false;
  const StepParts at = step_parts(d.runs, d.tokens != 0, d.rows, d.notes_bytes);
  const std::span<const Run> runs(reinterpret_cast<const Run*>(payload), d.runs);
  if ((d.flags & kStepAborted) == 0) hand_over(runs);
  open_.drop_captured();
  if ((d.flags & kCapturedOnly) != 0) {  // for the trace it does not exist
    open_ = StepData{};
    return;
  }
  if (open_.lost && (d.flags & kStepAborted) == 0) ring_.lose(Loss::kIoError, 1, 0, d.rows);
  if (open_.lost || (d.flags & kStepAborted) != 0) {
    // Counted by the producer. Only fragments that are in the file already have to be taken back.
    if (open_.fragments == 0) {
      open_ = StepData{};
      return;
    }
    open_.aborted = true;
    open_.pieces.clear();
  } else {
    open_.rows = d.rows;
    open_.time_ns = d.time_ns;
    open_.runs = runs;
    if (d.tokens != 0) open_.tokens = payload + at.tokens;
    open_.notes = {payload + at.notes, d.notes_bytes};
    open_.bytes += at.bytes + sizeof(Descriptor);
    drop_incomplete_layers();
  }
  open_.end = positions();
  ready_.push_back(std::exchange(open_, StepData{}));
}

void Assembler::hand_over(std::span<const Run> runs) {
  if (open_.captured.empty()) return;
  captures_.take(runs, open_.captured);
  open_.drop_captured();
}

void Assembler::keep_captured() {
  for (size_t i = open_.captured_in_kept; i < open_.captured.size(); ++i) {
    Piece& piece = open_.captured[i];
    const auto copy = [&](const std::byte*& column, DType dtype, uint64_t width) {
      if (column == nullptr) return;
      open_.kept.emplace_back(column, column + piece.rows * width * size_of(dtype));
      column = open_.kept.back().data();
    };
    copy(piece.ids, piece.shape.ids_dtype, piece.shape.k);
    copy(piece.weights, piece.shape.weights_dtype, piece.shape.k);
    copy(piece.logits, piece.shape.logits_dtype, piece.shape.logits_width);
    copy(piece.hidden, piece.shape.hidden_dtype, piece.shape.hidden_width);
    open_.captured_in_kept = i + 1;
  }
}

// All layers of a block have the same rows, so a layer that lacks some of the step's rows, or changes its shape within
// the step, is left out and counted.
void Assembler::drop_incomplete_layers() {
  struct Extent {
    LayerShape shape;
    uint32_t first_row, rows;
  };
  std::vector<Extent> extents;
  for (const WrittenPiece& w : open_.written) extents.push_back({w.shape, w.first_row, w.rows});
  for (const Piece& p : open_.pieces) extents.push_back({p.shape, p.first_row, p.rows});
  const auto by_place = [](const auto& a, const auto& b) {
    return std::tie(a.shape.layer, a.first_row) < std::tie(b.shape.layer, b.first_row);
  };
  std::ranges::sort(extents, by_place);
  std::ranges::stable_sort(open_.pieces, by_place);

  for (size_t i = 0; i < extents.size();) {
    const LayerShape shape = extents[i].shape;
    uint64_t next_row = 0;
    bool whole = true;
    for (; i < extents.size() && extents[i].shape.layer == shape.layer; ++i) {
      whole = whole && extents[i].shape == shape && extents[i].first_row == next_row;
      next_row += extents[i].rows;
    }
    if (whole && next_row == open_.rows) continue;
    ring_.lose(Loss::kIncomplete, 0, 1, open_.rows);
    std::erase_if(open_.pieces, [&](const Piece& p) { return p.shape.layer == shape.layer; });
    std::erase_if(open_.written, [&](const WrittenPiece& w) { return w.shape.layer == shape.layer; });
  }
  for (const Piece& piece : open_.pieces) {
    if (open_.shapes.empty() || open_.shapes.back() != piece.shape) open_.shapes.push_back(piece.shape);
  }
}

std::vector<LaneConsumer::Position> Assembler::positions() const {
  std::vector<LaneConsumer::Position> all;
  all.reserve(lanes_.size());
  for (const LaneConsumer& lane : lanes_) all.push_back(lane.position());
  return all;
}

void Assembler::lose_open() noexcept {
  open_.lost = true;
  open_.pieces.clear();
  open_.written.clear();
  open_.bytes = 0;
}

void Assembler::give_up() noexcept {
  for (const StepData& step : ready_) {
    if (!step.aborted) ring_.lose(Loss::kIoError, 1, 0, step.rows);
  }
  ready_.clear();
  lose_open();
  if (!open_.captured.empty()) ring_.add(kLostForCaptures, 1);
  open_.drop_captured();
  for (size_t i = 0; i < lanes_.size(); ++i) {
    released_[i] = complete_[i] = lanes_[i].position();
    lanes_[i].release(released_[i]);
  }
}

void Assembler::release(const std::vector<LaneConsumer::Position>& end) {
  for (size_t i = 0; i < lanes_.size(); ++i) {
    lanes_[i].release(end[i]);
    if (complete_[i].sequence < end[i].sequence) complete_[i] = end[i];
  }
  released_ = end;
}

void Assembler::end_open() {
  if (!has_open_ || open_.fragments == 0) return;
  has_open_ = false;
  lose_open();
  open_.aborted = true;
  open_.end = positions();
  ready_.push_back(std::exchange(open_, StepData{}));
}

uint64_t Assembler::held_bytes() const {
  uint64_t most = 0;
  for (const LaneConsumer& lane : lanes_) most = std::max(most, lane.held_bytes());
  return most;
}

uint64_t Assembler::held_records() const {
  uint64_t most = 0;
  for (const LaneConsumer& lane : lanes_) most = std::max(most, lane.held_records());
  return most;
}

}  // namespace moe_native
