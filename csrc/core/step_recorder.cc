#include "core/step_recorder.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <utility>

#include "core/admission.h"
#include "core/owner.h"
#include "core/test_point.h"

namespace moe_native {

namespace {

// Under `drop` a step that is being streamed out may wait this long for the drain thread to make room; each success
// starts the time anew. It is the only wait that `drop` knows.
constexpr int64_t kStallLimitNs = 300'000'000;

struct LaneClaim {
  uint64_t ring_id = 0;
  uint64_t step = 0;
  int lane = -1;
};
thread_local LaneClaim claim;

struct ThreadPlaces {
  uint64_t ring_id = 0;
  uint64_t step = 0;
  size_t count = 0;
  Place items[kMostPlaces];
};
thread_local ThreadPlaces places_here;

}  // namespace

StepRecorder::StepRecorder(const Ring& ring, Overflow overflow, uint32_t fields, Messages& messages,
                           std::chrono::nanoseconds patience)
    : ring_(ring),
      overflow_(overflow),
      patience_ns_(patience.count()),
      messages_(messages),
      lanes_(ring.lanes()),
      fields_(fields) {
  for (uint32_t i = 0; i < ring.lanes(); ++i) lanes_[i].producer = LaneProducer(ring.lane(i));
}

StepRecorder::~StepRecorder() { unbind_all(*this); }

int StepRecorder::bind(uint16_t layer, uint32_t experts, uint32_t k, bool enabled, bool every_step,
                       uint32_t logits_width) {
  uint32_t row_bytes = k * static_cast<uint32_t>(size_of(id_dtype_for(experts)));
  if ((fields_ & kFieldWeights) != 0) row_bytes += k * 4;
  if ((fields_ & kFieldLogits) != 0) row_bytes += experts * 4;
  const int index = moe_native::bind(*this, layer, experts, row_bytes, enabled, every_step, logits_width);
  if (index < 0) throw std::length_error("this process has no free router binding left");
  bindings_.push_back(binding(index));
  return index;
}

void StepRecorder::configure(uint32_t fields, bool counted) noexcept {
  for (Binding* b : bindings_) {  // a guess until the first record, as in bind()
    if ((fields & ~fields_ & kFieldLogits) != 0) b->row_bytes += b->experts * 4;
  }
  fields_ = fields;
  counted_ = counted;
}

void StepRecorder::enable(Binding& b, bool enabled) noexcept { b.enabled.store(enabled, std::memory_order_relaxed); }

void StepRecorder::capture(uint32_t fields) noexcept { captured_fields_ = fields == 0 ? 0 : fields | kFieldIds; }

void StepRecorder::want(Binding& b, bool wanted) noexcept { b.captured.store(wanted, std::memory_order_relaxed); }

uint32_t StepRecorder::traced(const Binding& b) const noexcept {
  return traced_ && b.enabled.load(std::memory_order_relaxed) ? fields_ | kFieldIds : 0;
}

uint32_t StepRecorder::captured(const Binding& b) const noexcept {
  return b.captured.load(std::memory_order_relaxed) ? captured_fields_ : 0;
}

Begun StepRecorder::begin_step(std::span<const RowSpan> spans) noexcept {
  if (step_open()) return Begun::kNested;
  try {
    spans_.assign(spans.begin(), spans.end());
  } catch (...) {
    spans_.clear();
  }
  placed_ = false;
  int64_t rows = 0;
  for (const RowSpan& span : spans_) rows += span.count;
  return begin(rows);
}

Begun StepRecorder::begin_placed_step(int64_t rows) noexcept {
  if (step_open()) return Begun::kNested;
  spans_.clear();
  placed_ = true;
  return begin(rows);
}

// Steps are numbered whether they are recorded or not: ranks of one engine, which see the same steps, number them
// alike.
Begun StepRecorder::begin(int64_t rows) noexcept {
  if (closed_.load(std::memory_order_relaxed)) return Begun::kPaused;
  traced_ = !paused();
  const uint64_t step = next_step_++;
  if (traced_) {
    ring_.add(kStepsBegun, 1);
    MOE_TEST_POINT("begin, counted");
  } else {
    ring_.lose(Loss::kPaused, 1, 0, static_cast<uint64_t>(rows));
    if (captured_fields_ == 0) return Begun::kPaused;
  }
  step_rows_ = rows;
  step_time_ns_ = unix_time_ns();
  if (!admit()) {
    lose_step(Loss::kRingFull);
    return Begun::kRefused;
  }
  failed_.store(-1, std::memory_order_relaxed);
  claimed_lanes_.store(0, std::memory_order_relaxed);
  open_step_.store(step + 1, std::memory_order_seq_cst);
  MOE_TEST_POINT("begin, open");
  // close() may have run since the look above: then nobody would take what is recorded now.
  if (closed_.load(std::memory_order_seq_cst)) [[unlikely]] {
    if (open_step_.exchange(0, std::memory_order_acq_rel) != 0) lose_step(Loss::kAborted);
    return Begun::kRefused;
  }
  return traced_ ? Begun::kAdmitted : Begun::kForCaptures;
}

// Nothing is lost without it, so it does not wait.
void StepRecorder::announce(std::span<const Run> runs) noexcept {
  if (!step_open() || captured_fields_ == 0) return;
  LaneProducer& lane = lanes_[0].producer;
  if (runs.size_bytes() > lane.capacity() / 4) return;
  Descriptor* d = lane.reserve(runs.size_bytes());
  if (d == nullptr) return;
  d->step = open_step_.load(std::memory_order_relaxed) - 1;
  d->kind = RecordKind::kRows;
  d->ids_dtype = d->weights_dtype = d->logits_dtype = d->hidden_dtype = DType::kNone;
  d->layer = 0;
  d->tokens = 0;
  d->rows = d->step_rows = static_cast<uint32_t>(step_rows_);
  d->first_row = d->k = d->logits_width = d->hidden_width = d->invalid_ids = 0;
  d->runs = static_cast<uint32_t>(runs.size());
  d->notes = d->notes_bytes = 0;
  d->flags = kCapturedOnly;
  d->time_ns = step_time_ns_;
  if (!runs.empty()) std::memcpy(lane.payload(*d), runs.data(), runs.size_bytes());
  lane.commit(*d);
}

void StepRecorder::place(std::span<const Place> places) noexcept {
  places_here.ring_id = ring_.id();
  places_here.step = open_step_.load(std::memory_order_relaxed);
  places_here.count = std::min(places.size(), kMostPlaces);
  std::copy_n(places.begin(), places_here.count, places_here.items);
}

void StepRecorder::narrow(int64_t rows) noexcept {
  if (step_open()) step_rows_ = std::min(step_rows_, rows);
}

// nullptr: this thread was not told of tensors of this length.
const Place* StepRecorder::placed(uint64_t step, int64_t tensor_rows) const noexcept {
  if (places_here.step != step || places_here.ring_id != ring_.id()) return nullptr;
  for (size_t i = 0; i < places_here.count; ++i) {
    const Place& place = places_here.items[i];
    if (place.tensor_rows != tensor_rows && place.tensor_rows >= 0) continue;
    const bool fits = place.start + place.count <= tensor_rows && place.first + place.count <= step_rows_;
    return fits ? &place : nullptr;
  }
  return nullptr;
}

bool StepRecorder::admit() noexcept {
  StepNeed need(static_cast<uint64_t>(step_rows_));
  enabled_layers_ = 0;
  for (const Binding* b : bindings_) {
    if (traced(*b) != 0) ++enabled_layers_;
    if ((traced(*b) | captured(*b)) != 0) need.add_layer(b->row_bytes.load(std::memory_order_relaxed));
  }
  const bool large = need.is_large_for(lanes_[0].producer);
  streamed_.store(large, std::memory_order_relaxed);
  if (large) return true;  // it will be written out while it is still open

  const auto fits = [&] { return std::ranges::all_of(lanes_, [&](Lane& l) { return need.fits(l.producer); }); };
  if (fits()) return true;
  if (!blocks()) return false;
  Wait wait(patience(0));
  bool there = false;
  while (!there && !closed_.load(std::memory_order_relaxed) && wait.again()) there = fits();
  ring_.add(kBlockedNs, static_cast<uint64_t>(wait.ns()));
  return there;
}

// A stuck disk must not stop a server for good because somebody captures: `drop` is what its owner asked for.
int64_t StepRecorder::patience(int64_t without_captures_ns) const noexcept {
  if (overflow_ == Overflow::kBlock) return std::numeric_limits<int64_t>::max();
  return captured_fields_ != 0 ? patience_ns_ : without_captures_ns;
}

// The threads of a step take lanes in the order in which they come. The step's own record goes into lane 0 whoever ends
// it: by then the other threads' calls are over.
int StepRecorder::claim_lane(uint64_t step) noexcept {
  if (claim.step != step || claim.ring_id != ring_.id()) {
    claim = {ring_.id(), step, static_cast<int>(claimed_lanes_.fetch_add(1, std::memory_order_relaxed))};
  }
  return claim.lane;
}

void StepRecorder::complain(Binding& b, const char* problem, uint32_t fields, uint32_t wanted) noexcept {
  if (fields != 0) ring_.lose(Loss::kBadInput, 0, 1, static_cast<uint64_t>(step_rows_));
  if (wanted != 0) ring_.add(kLostForCaptures, 1);
  constexpr uint8_t kOfTrace = 1, kOfCaptures = 2;
  const auto lost = static_cast<uint8_t>((fields != 0 ? kOfTrace : 0) | (wanted != 0 ? kOfCaptures : 0));
  const int untold = lost & ~b.complained.fetch_or(lost, std::memory_order_relaxed);
  if (untold == 0) return;
  const char* what = untold == kOfTrace ? "is not recorded" : "is not captured";
  if (untold == (kOfTrace | kOfCaptures)) what = "is neither recorded nor captured";
  try {
    messages_.post("layer " + std::to_string(b.layer) + " " + what + ": " + problem);
  } catch (...) {
  }
}

void StepRecorder::record(Binding& b, LayerInput in) noexcept {
  const uint64_t step = open_step_.load(std::memory_order_acquire);
  if (step == 0) return;
  uint32_t kept = traced(b), wanted = captured(b);
  if ((kept | wanted) == 0) return;
  if (failed_.load(std::memory_order_relaxed) >= 0) return;
  if (b.logits_width != 0 && in.logits.width != 0 && in.logits.width != b.logits_width) in.logits.data = nullptr;
  if (const char* problem = unusable(in, kept | wanted)) [[unlikely]] {
    // What one of the two does not ask for costs it nothing.
    if (wanted != 0 && kept != 0 && unusable(in, kept) == nullptr) {
      complain(b, problem, 0, std::exchange(wanted, 0));
    } else if (wanted != 0 && kept != 0 && unusable(in, wanted) == nullptr) {
      complain(b, problem, std::exchange(kept, 0), 0);
    } else {
      b.step.store(step, std::memory_order_relaxed);
      // Where further chunks of this layer would lie is not known any more.
      if (!placed_) b.seen = std::numeric_limits<int64_t>::max() / 2;
      return complain(b, problem, kept, wanted);
    }
  }
  const uint32_t fields = kept | wanted;

  // Which of the step's rows does this tensor hold, and which of those are kept?
  const bool again = b.step.load(std::memory_order_relaxed) == step;
  b.step.store(step, std::memory_order_relaxed);
  std::span<const RowSpan> spans = spans_;
  RowSpan of_place;
  int64_t base = 0, first_row = 0, kept_first = -1, kept_count = 0;
  if (placed_) {
    const Place* place = placed(step, in.ids.rows);
    if (place == nullptr) {
      return complain(b, "in a layout of ranks that is not known, its tensors do not show whose their rows are", kept,
                      wanted);
    }
    of_place = {place->start, place->count};
    spans = {&of_place, 1};
    first_row = place->first;
    kept_first = 0;
    kept_count = place->count;
  } else {
    base = again ? b.seen : 0;
    b.seen = base + in.ids.rows;
    int64_t before = 0;
    for (const RowSpan& span : spans) {
      const int64_t from = std::max(span.start, base);
      const int64_t to = std::min(span.start + span.count, b.seen);
      if (from < to) {
        if (kept_first < 0) kept_first = before + (from - span.start);
        kept_count += to - from;
      }
      before += span.count;
    }
  }
  if (kept_count == 0) return;

  const int lane_index = claim_lane(step);
  if (lane_index >= static_cast<int>(lanes_.size())) {
    if (kept != 0) ring_.lose(Loss::kNoLane, 0, 1, static_cast<uint64_t>(kept_count));
    if (wanted != 0) ring_.add(kLostForCaptures, 1);
    return;
  }
  LaneProducer& lane = lanes_[static_cast<size_t>(lane_index)].producer;

  Descriptor shape{};
  shape.ids_dtype = id_dtype_for(b.experts);
  shape.k = static_cast<uint32_t>(in.ids.width);
  if ((fields & kFieldWeights) != 0) shape.weights_dtype = in.weights.dtype;
  if ((fields & kFieldLogits) != 0 && in.logits.data != nullptr) {
    shape.logits_dtype = in.logits.dtype;
    shape.logits_width = static_cast<uint32_t>(in.logits.width);
  }
  if ((fields & kFieldHidden) != 0 && in.hidden.data != nullptr) {
    shape.hidden_dtype = in.hidden.dtype;
    shape.hidden_width = static_cast<uint32_t>(in.hidden.width);
  }
  const auto row_bytes = static_cast<uint32_t>(shape.k * (size_of(shape.ids_dtype) + size_of(shape.weights_dtype)) +
                                               shape.logits_width * size_of(shape.logits_dtype) +
                                               shape.hidden_width * size_of(shape.hidden_dtype));
  b.row_bytes.store(row_bytes, std::memory_order_relaxed);
  uint32_t flags = counted_ ? kStepCounted : 0;
  if (wanted != 0) flags |= kCaptured;
  if (kept == 0) {
    flags |= kCapturedOnly;
  } else if (const uint32_t more = wanted & ~kept; more != 0) {
    flags |= (more & kFieldWeights ? kCapturedWeights : 0) | (more & kFieldLogits ? kCapturedLogits : 0) |
             (more & kFieldHidden ? kCapturedHidden : 0);
  }

  // One record, unless it would take more than a quarter of the arena.
  const int64_t most = std::max<int64_t>(1, static_cast<int64_t>((lane.capacity() / 4 - 4 * kAlign) / row_bytes));
  for (int64_t done = 0; done < kept_count;) {
    const int64_t count = std::min(kept_count - done, most);
    shape.rows = static_cast<uint32_t>(count);
    const LayerColumns at = layer_columns(shape);
    Descriptor* d = reserve(lane, at.bytes, true);
    if (d == nullptr) return fail(streamed() ? Loss::kTooLarge : Loss::kRingFull);
    d->step = step - 1;
    d->kind = RecordKind::kLayer;
    d->ids_dtype = shape.ids_dtype;
    d->weights_dtype = shape.weights_dtype;
    d->logits_dtype = shape.logits_dtype;
    d->hidden_dtype = shape.hidden_dtype;
    d->tokens = 0;
    d->layer = b.layer;
    d->rows = shape.rows;
    d->first_row = static_cast<uint32_t>(first_row + kept_first + done);
    d->step_rows = static_cast<uint32_t>(step_rows_);
    d->k = shape.k;
    d->logits_width = shape.logits_width;
    d->hidden_width = shape.hidden_width;
    d->runs = d->notes = d->notes_bytes = 0;
    d->flags = flags | (streamed() ? kStepStreamed : 0);
    d->time_ns = step_time_ns_;

    std::byte* out = lane.payload(*d);
    uint32_t invalid = 0;
    const int64_t id_bytes = static_cast<int64_t>(size_of(shape.ids_dtype)) * in.ids.width;
    std::byte* ids_out = out + at.ids;
    each_kept(spans, base, kept_first + done, count, [&](int64_t row, int64_t rows) {
      invalid += narrow_ids(in.ids, row, rows, b.experts, ids_out);
      ids_out += rows * id_bytes;
    });
    MOE_TEST_POINT("fill, ids are there");
    const auto copy = [&](const RowsView& view, uint64_t to) {
      copy_kept(view, spans, base, kept_first + done, count, out + to);
    };
    if (shape.weights_dtype != DType::kNone) copy(in.weights, at.weights);
    if (shape.logits_dtype != DType::kNone) copy(in.logits, at.logits);
    if (shape.hidden_dtype != DType::kNone) copy(in.hidden, at.hidden);
    d->invalid_ids = invalid;
    if (invalid != 0) ring_.add(kInvalidIds, invalid);
    lane.commit(*d);
    done += count;
  }
}

// Room for one record. An admitted step has it at once; a streamed one, or one that turned out wider than admission
// thought, waits for the drain thread.
Descriptor* StepRecorder::reserve(LaneProducer& lane, uint64_t bytes, bool of_layer) noexcept {
  if (align_up(bytes, kAlign) > lane.capacity() / 2) return nullptr;  // could not be placed, however long one waits
  if (Descriptor* d = lane.reserve(bytes)) [[likely]]
    return d;
  return wait_for_room(lane, bytes, of_layer);
}

Descriptor* StepRecorder::wait_for_room(LaneProducer& lane, uint64_t bytes, bool of_layer) noexcept {
  streamed_.store(true, std::memory_order_relaxed);
  lane.want(bytes);
  Wait wait(patience(kStallLimitNs));
  Descriptor* d = nullptr;
  while (d == nullptr && !closed_.load(std::memory_order_relaxed) && wait.again()) {
    d = lane.reserve(bytes);
    // Another thread may have lost the step meanwhile.
    if (of_layer && failed_.load(std::memory_order_relaxed) >= 0) break;
  }
  lane.want(0);
  ring_.add(kBlockedNs, static_cast<uint64_t>(wait.ns()));
  return d;
}

void StepRecorder::fail(Loss cause) noexcept { failed_.store(static_cast<int>(cause), std::memory_order_relaxed); }

bool StepRecorder::end_step(const StepTable& table) noexcept {
  const uint64_t open = open_step_.exchange(0, std::memory_order_acq_rel);
  if (open == 0) return false;
  close_step(open - 1, &table);
  return failed_.load(std::memory_order_relaxed) < 0;
}

void StepRecorder::abort_step() noexcept {
  const uint64_t open = open_step_.exchange(0, std::memory_order_acq_rel);
  if (open == 0) return;
  if (failed_.load(std::memory_order_relaxed) < 0) fail(Loss::kAborted);
  close_step(open - 1, nullptr);
}

// May be called by another thread than the model's, which may be anywhere in a step: so it touches no lane.
void StepRecorder::close() noexcept {
  unbind_all(*this);
  closed_.store(true, std::memory_order_seq_cst);
  if (open_step_.exchange(0, std::memory_order_seq_cst) != 0) lose_step(Loss::kAborted);
}

void StepRecorder::close_step(uint64_t step, const StepTable* table) noexcept {
  LaneProducer& lane = lanes_[0].producer;
  const bool whole = failed_.load(std::memory_order_relaxed) < 0;
  StepParts at;
  if (whole) {
    at = step_parts(table->runs.size(), !table->tokens.empty(), static_cast<uint64_t>(step_rows_), table->notes.size());
  }
  Descriptor* d = reserve(lane, at.bytes, false);
  if (d == nullptr) {
    // Not even the table fits. Without its step record the step does not exist: the drain thread drops its layers.
    if (whole) fail(Loss::kTooLarge);
    lose_step(static_cast<Loss>(failed_.load(std::memory_order_relaxed)));
    return;
  }
  d->step = step;
  d->kind = RecordKind::kStep;
  d->ids_dtype = d->weights_dtype = d->logits_dtype = d->hidden_dtype = DType::kNone;
  d->layer = 0;
  d->rows = d->step_rows = static_cast<uint32_t>(step_rows_);
  d->first_row = d->k = d->logits_width = d->hidden_width = d->invalid_ids = 0;
  d->time_ns = step_time_ns_;
  d->flags = (whole ? 0 : kStepAborted) | (traced_ ? 0 : kCapturedOnly);
  d->tokens = whole && !table->tokens.empty() ? 1 : 0;
  d->runs = whole ? static_cast<uint32_t>(table->runs.size()) : 0;
  d->notes = whole ? table->note_count : 0;
  d->notes_bytes = whole ? static_cast<uint32_t>(table->notes.size()) : 0;
  if (whole) {
    std::byte* out = lane.payload(*d);
    if (!table->runs.empty()) std::memcpy(out, table->runs.data(), table->runs.size_bytes());
    if (!table->tokens.empty()) std::memcpy(out + at.tokens, table->tokens.data(), table->tokens.size_bytes());
    if (!table->notes.empty()) std::memcpy(out + at.notes, table->notes.data(), table->notes.size());
  }
  lane.commit(*d);
  MOE_TEST_POINT("end, not counted");
  if (whole) {
    if (!traced_) return;
    ring_.add(kStepsCommitted, 1);
    count_silent_layers(step + 1);
  } else {
    lose_step(static_cast<Loss>(failed_.load(std::memory_order_relaxed)));
  }
}

// A router that was hooked and never called: a compiled graph without the op, say. The drain thread sees layers that
// lack some rows of a step, but not those that lack all.
void StepRecorder::count_silent_layers(uint64_t step) noexcept {
  if (step_rows_ == 0) return;
  for (const Binding* b : bindings_) {
    if (b->every_step && b->step.load(std::memory_order_relaxed) != step &&
        b->enabled.load(std::memory_order_relaxed)) {
      ring_.lose(Loss::kIncomplete, 0, 1, static_cast<uint64_t>(step_rows_));
    }
  }
}

void StepRecorder::lose_step(Loss cause) noexcept {
  if (captured_fields_ != 0) ring_.add(kLostForCaptures, 1);
  if (!traced_) return;  // counted as paused
  ring_.lose(cause, 1, enabled_layers_, static_cast<uint64_t>(step_rows_));
}

}  // namespace moe_native
