// One lane of the ring: a single producer, a single consumer, no lock.
//
// Producer:  reserve → fill the descriptor and the payload → commit (or give_up).
// Consumer:  peek → take … → release, once the block with the taken records is in the segment file.
//
// Sequence numbers start at 1 and are 62 bits wide; at a record every nanosecond they last 146 years, so nothing here
// wraps.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "core/ring_layout.h"
#include "core/test_point.h"

namespace moe_native {

struct LaneMemory {
  LaneHeader* header = nullptr;
  Descriptor* descriptors = nullptr;
  std::byte* arena = nullptr;
  uint32_t descriptor_count = 0;  // a power of two
  uint64_t arena_bytes = 0;

  Descriptor& descriptor(uint64_t sequence) const { return descriptors[(sequence - 1) & (descriptor_count - 1)]; }
};

class LaneProducer {
 public:
  LaneProducer() = default;
  explicit LaneProducer(const LaneMemory& memory) : memory_(memory) {}

  // Room for `bytes` in one piece: the descriptor to fill, with `offset` and `bytes` set, or nullptr when there is none
  // now.
  Descriptor* reserve(uint64_t bytes) noexcept {
    const uint64_t need = align_up(bytes, kAlign);
    const uint64_t at = arena_head_ % memory_.arena_bytes;
    // Payloads are contiguous: one that would cross the end starts over at the beginning.
    const uint64_t skip = at + need > memory_.arena_bytes ? memory_.arena_bytes - at : 0;
    if (!has_room(1, skip + need)) return nullptr;
    const uint64_t sequence = ++reserved_;
    Descriptor& d = memory_.descriptor(sequence);
    MOE_TEST_POINT("reserve");
    d.word.store(make_word(sequence, RecordState::kReserved), std::memory_order_relaxed);
    MOE_TEST_POINT("reserve, the word is there");
    // Keeps the word ahead of the bytes that follow, so that a descriptor never shows an older record's word over new
    // bytes.
    std::atomic_thread_fence(std::memory_order_release);
    d.offset = skip == 0 ? at : 0;
    d.bytes = bytes;
    MOE_TEST_POINT("reserve, the place is there");
    arena_head_ += skip + need;
    memory_.header->reserved.store(sequence, std::memory_order_relaxed);
    memory_.header->arena_head.store(arena_head_, std::memory_order_relaxed);
    return &d;
  }

  std::byte* payload(const Descriptor& d) const noexcept { return memory_.arena + d.offset; }

  void commit(Descriptor& d) noexcept { finish(d, RecordState::kCommitted); }
  void give_up(Descriptor& d) noexcept { finish(d, RecordState::kAborted); }

  // Whether `records` records of `bytes` bytes in all would surely fit now, wherever the arena wraps.
  bool admits(uint64_t records, uint64_t bytes) noexcept { return has_room(records, bytes); }

  // What the producer waits to reserve; 0: it does not. The consumer gives back then whatever it can: a payload is
  // contiguous, so that one of a quarter of the arena or more may need it nearly empty.
  void want(uint64_t bytes) noexcept { memory_.header->wanted.store(bytes, std::memory_order_relaxed); }

  uint64_t capacity() const noexcept { return memory_.arena_bytes; }
  uint32_t descriptor_count() const noexcept { return memory_.descriptor_count; }

 private:
  bool has_room(uint64_t records, uint64_t bytes) noexcept {
    if (fits(records, bytes)) return true;
    freed_ = memory_.header->freed.load(std::memory_order_acquire);
    arena_tail_ = memory_.header->arena_tail.load(std::memory_order_acquire);
    return fits(records, bytes);
  }
  bool fits(uint64_t records, uint64_t bytes) const noexcept {
    return reserved_ + records - freed_ <= memory_.descriptor_count &&
           arena_head_ + bytes - arena_tail_ <= memory_.arena_bytes;
  }
  void finish(Descriptor& d, RecordState state) noexcept {
    const uint64_t sequence = d.word.load(std::memory_order_relaxed) >> 2;
    MOE_TEST_POINT("commit");
    d.word.store(make_word(sequence, state), std::memory_order_release);
    MOE_TEST_POINT("commit, done");
  }

  LaneMemory memory_;
  uint64_t reserved_ = 0;
  uint64_t arena_head_ = 0;
  uint64_t freed_ = 0;  // the consumer's, as last seen: refreshed only when room seems to be missing
  uint64_t arena_tail_ = 0;
};

class LaneConsumer {
 public:
  LaneConsumer() = default;
  explicit LaneConsumer(const LaneMemory& memory) : memory_(memory) {}

  // The next record that is committed or aborted, or nullptr when there is none yet.
  const Descriptor* peek() const noexcept {
    const uint64_t sequence = taken_ + 1;
    const Descriptor& d = memory_.descriptor(sequence);
    const uint64_t word = d.word.load(std::memory_order_acquire);
    const bool ready =
        word == make_word(sequence, RecordState::kCommitted) || word == make_word(sequence, RecordState::kAborted);
    return ready ? &d : nullptr;
  }

  static bool committed(const Descriptor& d) noexcept {
    return (d.word.load(std::memory_order_relaxed) & 3) == static_cast<uint64_t>(RecordState::kCommitted);
  }

  // Moves past the record that peek() returned. Its bytes stay valid until release().
  void take() noexcept {
    const Descriptor& d = memory_.descriptor(++taken_);
    const uint64_t need = align_up(d.bytes, kAlign);
    const uint64_t at = arena_taken_ % memory_.arena_bytes;
    arena_taken_ += (at + need > memory_.arena_bytes ? memory_.arena_bytes - at : 0) + need;
  }

  const std::byte* payload(const Descriptor& d) const noexcept { return memory_.arena + d.offset; }

  struct Position {
    uint64_t sequence = 0;
    uint64_t arena = 0;
  };
  Position position() const noexcept { return {taken_, arena_taken_}; }

  // Gives everything up to `position` back to the producer.
  void release(const Position& position) noexcept {
    MOE_TEST_POINT("free");
    memory_.header->freed.store(position.sequence, std::memory_order_release);
    MOE_TEST_POINT("free, the records are free");
    memory_.header->arena_tail.store(position.arena, std::memory_order_release);
    released_ = position;
  }
  bool is_waited_for() const noexcept { return memory_.header->wanted.load(std::memory_order_relaxed) != 0; }

  // What is taken and not yet released.
  uint64_t held_bytes() const noexcept { return arena_taken_ - released_.arena; }
  uint64_t held_records() const noexcept { return taken_ - released_.sequence; }

 private:
  LaneMemory memory_;
  uint64_t taken_ = 0;
  uint64_t arena_taken_ = 0;
  Position released_;
};

}  // namespace moe_native
