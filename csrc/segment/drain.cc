#include "segment/drain.h"

#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <system_error>
#include <utility>

#include "core/test_point.h"
#include "segment/retention.h"

namespace moe_native {

namespace {

constexpr uint64_t kBlockBytes = 4 << 20;  // of the ring, before compression
constexpr uint64_t kFragmentBytes = 64 << 20;
// Each look takes the model's core for a moment where there is none to spare, so they are as rare as the ring allows:
// the half of it that a step may need is not filled before the next look by a model that writes as fast as this.
constexpr uint64_t kFastestBytesPerMs = 320'000;
constexpr uint64_t kFastestRecordsPerMs = 300;
constexpr uint64_t kRarestMs = 100;
constexpr uint64_t kUsualMs = 20;  // of a small ring
constexpr uint64_t kBusyMs = 2;
constexpr auto kBusySpell = std::chrono::milliseconds(200);  // since a look that took much
constexpr auto kRetry = std::chrono::seconds(1);

void leave_the_model_alone() noexcept {
  // vLLM pins its model thread and threads inherit that: this one would then run on the model's core, in the model's
  // time.
  cpu_set_t all;
  std::memset(&all, 0xFF, sizeof all);
  ::sched_setaffinity(0, sizeof all, &all);
  ::setpriority(PRIO_PROCESS, static_cast<id_t>(::syscall(SYS_gettid)), 10);
  ::pthread_setname_np(::pthread_self(), "moe-native");
}

uint64_t thread_cpu_ns() noexcept {
  timespec now{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000u + static_cast<uint64_t>(now.tv_nsec);
}

bool share_a_block(const StepData& a, const StepData& b) {
  return !a.aborted && !b.aborted && a.fragments == 0 && b.fragments == 0 &&
         (a.tokens != nullptr) == (b.tokens != nullptr) && a.shapes == b.shapes;
}

}  // namespace

Drain::Drain(const Ring& ring, DrainOptions options, Messages& messages)
    : ring_(ring),
      options_(std::move(options)),
      messages_(messages),
      assembler_(ring, captures_),
      builder_(options_.exact_weights),
      thread_([this] { run(); }) {}

Drain::~Drain() { close(); }

void Drain::set_metadata(std::string json) {
  const std::lock_guard lock(mutex_);
  metadata_ = std::move(json);
}

bool Drain::flush(double seconds) {
  std::unique_lock lock(mutex_);
  if (stop_) return false;
  const uint64_t wanted = ++flush_wanted_;
  wake_.notify_one();
  const std::chrono::duration<double> limit(std::min(seconds, 1e9));  // more would overflow the clock
  return done_.wait_for(lock, limit, [&] { return flush_done_ >= wanted; }) && flush_whole_;
}

bool Drain::catch_up(double seconds) {
  std::unique_lock lock(mutex_);
  if (stop_) return false;
  const uint64_t wanted = ++look_wanted_;
  wake_.notify_one();
  const std::chrono::duration<double> limit(std::min(seconds, 1e9));
  return done_.wait_for(lock, limit, [&] { return look_done_ >= wanted; });
}

void Drain::close() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    wake_.notify_one();
  }
  if (thread_.joinable()) thread_.join();
}

// How long to wait before the next look at the ring, after one that took so many bytes.
std::chrono::milliseconds Drain::until_next_look(uint64_t took_bytes) {
  const LaneMemory lane = ring_.lane(0);
  const auto now = Clock::now();
  if (assembler_.open_is_streamed() || assembler_.room_is_wanted() || took_bytes > lane.arena_bytes / 16)
    busy_until_ = now + kBusySpell;
  if (now < busy_until_) return std::chrono::milliseconds(kBusyMs);
  const auto time_to_fill = [](uint64_t capacity, uint64_t held, uint64_t fastest) {
    return (capacity / 2 - std::min(held, capacity / 2)) / fastest;
  };
  const uint64_t room = std::min(time_to_fill(lane.arena_bytes, assembler_.held_bytes(), kFastestBytesPerMs),
                                 time_to_fill(lane.descriptor_count, assembler_.held_records(), kFastestRecordsPerMs));
  const double flush_ms = std::min(options_.flush_seconds * 1e3, double{kRarestMs});
  return std::chrono::milliseconds(std::clamp(std::min(room, static_cast<uint64_t>(flush_ms)), kUsualMs, kRarestMs));
}

void Drain::run() {
  leave_the_model_alone();
  std::chrono::milliseconds wait(kUsualMs);
  for (;;) {
    uint64_t wanted, looks;
    bool stop;
    {
      std::unique_lock lock(mutex_);
      wake_.wait_for(lock, wait, [&] { return stop_ || flush_wanted_ > flush_done_ || look_wanted_ > look_done_; });
      wanted = flush_wanted_;
      looks = look_wanted_;
      stop = stop_;
    }
    const bool all = stop || wanted > flush_done_;
    if (stop) retry_at_ = {};  // the disk may be well again, and this is the last time to write
    try {
      const bool was_empty = assembler_.ready().empty();
      const uint64_t held = assembler_.held_bytes();
      assembler_.poll();
      MOE_TEST_POINT("drain, taken");
      wait = until_next_look(assembler_.held_bytes() - held);
      captures_.free_unused();
      if (was_empty) oldest_ready_ = Clock::now();
      if (has_trace()) {
        write(all, stop);
      } else {
        give_back();
      }
    } catch (const std::exception& error) {  // out of memory: these steps are lost, the next ones may fit
      assembler_.give_up();
      batch_ = batch_bytes_ = 0;
      try {
        messages_.post(std::string("steps were lost while packing them: ") + error.what());
      } catch (...) {
      }
    }
    totals_.cpu_ns.store(thread_cpu_ns(), std::memory_order_relaxed);
    if (wanted > flush_done_ || looks > look_done_) {
      const std::lock_guard lock(mutex_);
      flush_done_ = wanted;
      flush_whole_ = !failing_;
      look_done_ = looks;
      done_.notify_all();
    }
    if (stop) return;
  }
}

void Drain::write(bool all, bool stop) {
  if (stop) assembler_.end_open();
  write_ready(all);
  write_fragment();
  if (all) write_bookkeeping();
  if (stop) close_segment(Sync::kLeaveToCaller);
}

// Without a trace, what captures have taken is not needed any more.
void Drain::give_back() {
  if (!assembler_.open().captured.empty() && !open_is_large()) return assembler_.release(assembler_.complete());
  assembler_.keep_captured();
  assembler_.release(assembler_.positions());
}

// While the disk takes nothing, room could be had only by losing what waits for it.
bool Drain::room_is_wanted() const { return assembler_.room_is_wanted() && !(failing_ && Clock::now() < retry_at_); }

// A step that was admitted needs half of the ring at most; one that turned out larger is streamed like any other.
bool Drain::open_is_large() const {
  if (room_is_wanted()) return true;
  const uint64_t share = assembler_.open_is_streamed() ? 4 : 2;
  return assembler_.held_bytes() >= std::min(kFragmentBytes, ring_.lane(0).arena_bytes / share) ||
         assembler_.held_records() >= ring_.lane(0).descriptor_count / share;
}

// A quarter of the arena is packed while the rest takes new steps.
uint64_t Drain::pressure_bytes() const { return std::min(kBlockBytes, ring_.lane(0).arena_bytes / 4); }

bool Drain::is_full() const {
  return room_is_wanted() || assembler_.held_bytes() >= 2 * pressure_bytes() ||
         assembler_.held_records() >= ring_.lane(0).descriptor_count / 4;
}

void Drain::write_ready(bool all) {
  auto& ready = assembler_.ready();
  for (;;) {
    // The batch grows step by step, until it is large enough or a step of other shapes cuts it.
    bool full = is_full();
    while (batch_ < ready.size() && batch_bytes_ < pressure_bytes()) {
      if (batch_ > 0 && !share_a_block(ready[batch_ - 1], ready[batch_])) {
        full = true;
        break;
      }
      batch_bytes_ += ready[batch_++].bytes;
    }
    if (batch_ == 0) break;
    full = full || batch_bytes_ >= pressure_bytes() || ready.front().fragments > 0 || assembler_.open_is_streamed();
    const auto now = Clock::now();
    const bool due = now - oldest_ready_ >= std::chrono::duration<double>(options_.flush_seconds);
    // A disk that takes nothing just now costs no step that the ring can hold until it is tried again.
    const bool in_vain = failing_ && now < retry_at_;
    if (!full && (in_vain || !(all || due))) return;
    std::vector<const StepData*> steps;
    for (size_t i = 0; i < batch_; ++i) steps.push_back(&ready[i]);
    const auto end = steps.back()->end;
    totals_.raw_bytes.fetch_add(batch_bytes_, std::memory_order_relaxed);
    write_block(steps, end);
    ready.erase(ready.begin(), ready.begin() + static_cast<std::ptrdiff_t>(batch_));
    batch_ = batch_bytes_ = 0;
  }
  // Records of aborted steps alone can fill the ring as well.
  const StepData& open = assembler_.open();
  if (is_full() && open.pieces.empty() && open.captured.empty() && open.fragments == 0) {
    write_block({}, assembler_.positions());
  }
}

void Drain::write_fragment() {
  StepData& open = assembler_.open();
  if (open.bytes == 0 || !open_is_large()) return;
  const auto end = assembler_.positions();
  assembler_.keep_captured();
  if (open.pieces.empty() && open.fragments == 0) {  // all of it is for captures
    open.bytes = 0;
    write_block({}, end);  // records that no block has would be looked for after a crash
    return;
  }
  if (!ensure_segment()) {
    assembler_.lose_open();
    assembler_.release(end);
    return;
  }
  builder_.build_fragment(open, extras_for(end));
  totals_.raw_bytes.fetch_add(open.bytes, std::memory_order_relaxed);
  if (!store(end)) return assembler_.lose_open();
  ++open.fragments;
  open.pieces.clear();
  open.bytes = 0;
}

// Losses that came after the last block, and records of aborted steps that no block took.
void Drain::write_bookkeeping() {
  // Steps that wait for the disk are still in the ring, and so is what the bookkeeping would give back.
  if (assembler_.open().fragments > 0 || !assembler_.ready().empty()) return;
  uint64_t sum = 0;
  for (const LossTotals& t : losses()) sum += t.steps + t.layers + t.rows;
  const bool nothing_open = assembler_.open().bytes == 0;
  if (sum == losses_written_ && !(nothing_open && assembler_.held_records() > 0)) return;
  write_block({}, nothing_open ? assembler_.positions() : assembler_.released());
}

bool Drain::write_block(std::span<const StepData* const> steps, const std::vector<LaneConsumer::Position>& end) {
  uint64_t rows = 0;
  uint64_t count = 0;
  for (const StepData* step : steps) {
    if (step->aborted) continue;  // counted when that happened
    rows += step->rows;
    ++count;
  }
  if (!ensure_segment()) {
    // The steps are lost, but not what they say of requests: the next segment defines those again.
    static_cast<void>(requests_.lines_for(steps));
    ring_.lose(Loss::kIoError, count, 0, rows);
    assembler_.release(end);
    return false;
  }
  BlockExtras extras = extras_for(end);
  extras.notes = requests_.lines_for(steps);
  builder_.build_rows(steps, extras);
  if (!store(end)) {
    requests_.new_segment();  // what this block defined is not in the file
    ring_.lose(Loss::kIoError, count, 0, rows);
    return false;
  }
  requests_.written();
  totals_.rows.fetch_add(rows, std::memory_order_relaxed);
  totals_.stored_rows.fetch_add(builder_.header().rows, std::memory_order_relaxed);
  if (segment_.bytes() >= options_.segment_bytes) close_segment(Sync::kWait);
  return true;
}

// Writes the built block, then frees its records: in this order, or a crash in between would lose them.
bool Drain::store(const std::vector<LaneConsumer::Position>& end) {
  MOE_TEST_POINT("drain, packed");
  const int error = segment_.append(builder_);
  MOE_TEST_POINT("drain, written");
  assembler_.release(end);
  MOE_TEST_POINT("drain, freed");
  if (error != 0) {
    io_failed("cannot write a segment", error);
    return false;
  }
  failing_ = false;
  ++next_block_;
  losses_written_ = 0;
  for (const LossTotals& t : losses()) losses_written_ += t.steps + t.layers + t.rows;
  totals_.blocks.fetch_add(1, std::memory_order_relaxed);
  totals_.stored_bytes.fetch_add(builder_.bytes().size(), std::memory_order_relaxed);
  return true;
}

bool Drain::ensure_segment() {
  if (failing_ && Clock::now() < retry_at_) return false;
  if (segment_.is_open()) return true;
  if (options_.max_bytes > 0) {
    keep_within(options_.trace, options_.max_bytes - std::min(options_.max_bytes, options_.segment_bytes));
  }
  std::string metadata;
  {
    const std::lock_guard lock(mutex_);
    metadata = metadata_;
  }
  const int error = segment_.create(options_.identity, next_segment_, metadata, compressor_);
  if (error != 0) {
    io_failed("cannot create a segment", error);
    return false;
  }
  ++next_segment_;
  requests_.new_segment();
  return true;
}

void Drain::close_segment(Sync sync) {
  if (!segment_.is_open()) return;
  BlockExtras extras;
  extras.number = next_block_;
  extras.losses = losses();
  const int error = segment_.close(builder_, extras, sync);
  if (error != 0) {  // its blocks are there
    messages_.post("a segment in " + options_.identity.directory +
                   " could not be closed, and will be read as torn: " + std::generic_category().message(error));
  }
}

void Drain::io_failed(const char* what, int error) {
  retry_at_ = Clock::now() + kRetry;
  if (std::exchange(failing_, true)) return;
  messages_.post(std::string(what) + " in " + options_.identity.directory + ": " +
                 std::generic_category().message(error) + ". Steps are lost until it can be written again");
}

BlockExtras Drain::extras_for(const std::vector<LaneConsumer::Position>& end) const {
  BlockExtras extras;
  extras.number = next_block_;
  for (size_t i = 0; i < end.size(); ++i) {
    const uint64_t first = assembler_.released()[i].sequence + 1;
    if (end[i].sequence >= first) extras.lanes.push_back({static_cast<uint16_t>(i), first, end[i].sequence});
  }
  extras.losses = losses();
  return extras;
}

std::vector<LossTotals> Drain::losses() const {
  std::vector<LossTotals> all;
  for (size_t c = 0; c < kLossCauses; ++c) all.push_back(ring_.losses(static_cast<Loss>(c)));
  return all;
}

}  // namespace moe_native
