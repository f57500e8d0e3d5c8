// The bytes of a ring file. RING.md is the specification; this header is its C++ spelling and must match it byte for
// byte.
//
// Who may touch what:
//   RingHeader, up to `crc`       written once, before the file has its name; read by everybody.
//   RingHeader::counters          single words; each has one writer at a time, anybody may read.
//   LaneHeader, first cache line  the lane's producer writes, anybody may read. Recovery does not.
//   LaneHeader, second line       the consumer writes, the producer reads.
//   Descriptor, payload           the state in Descriptor::word says (see RING.md, "States").
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace moe_native {

inline constexpr char kRingMagic[8] = {'M', 'O', 'E', 'R', 'I', 'N', 'G', '1'};
inline constexpr uint16_t kRingMajor = 1;
inline constexpr uint16_t kRingMinor = 0;
inline constexpr size_t kPage = 4096;
inline constexpr size_t kAlign = 64;  // of every payload, and of every column in it

constexpr uint64_t align_up(uint64_t value, uint64_t to) { return (value + to - 1) / to * to; }

// Why rows are not in the trace. FORMAT.md, table "losses".
enum class Loss : uint16_t { kRingFull, kTooLarge, kAborted, kBadInput, kNoLane, kIncomplete, kIoError, kPaused };
inline constexpr size_t kLossCauses = 8;

enum Counter : size_t {
  kStepsBegun = 0,
  kStepsCommitted = 1,
  kBlockedNs = 2,
  kInvalidIds = 3,
  kRecords = 4,
  kLostForCaptures = 5,
  kLosses = 8,  // three words a cause: steps, layers, rows
};

struct RingHeader {
  char magic[8];
  uint32_t header_size;
  uint16_t major;
  uint16_t minor;
  uint64_t ring_id;
  uint64_t file_bytes;
  uint32_t lanes;
  uint32_t descriptors;
  uint64_t arena_bytes;
  uint64_t lanes_offset;
  uint64_t descriptors_offset;
  uint64_t arena_offset;
  uint32_t owner_pid;
  uint32_t reserved;
  uint64_t owner_start_ticks;
  char owner_boot_id[40];
  int64_t created_ns;
  uint8_t zero[116];
  uint32_t crc;
  std::atomic<uint64_t> counters[64];
  uint8_t pad[1280];
  char rank_directory[2048];
};
static_assert(sizeof(RingHeader) == kPage);
static_assert(kLosses + 3 * kLossCauses <= 64);
static_assert(offsetof(RingHeader, created_ns) == 128);
static_assert(offsetof(RingHeader, crc) == 252);
static_assert(offsetof(RingHeader, counters) == 256);
static_assert(offsetof(RingHeader, rank_directory) == 2048);
static_assert(std::atomic<uint64_t>::is_always_lock_free);

struct LaneHeader {
  std::atomic<uint64_t> reserved;
  std::atomic<uint64_t> arena_head;
  std::atomic<uint64_t> wanted;
  uint8_t pad0[40];
  std::atomic<uint64_t> freed;
  std::atomic<uint64_t> arena_tail;
  uint8_t pad1[4016];
};
static_assert(sizeof(LaneHeader) == kPage);
static_assert(offsetof(LaneHeader, freed) == 64);

enum class RecordState : uint64_t { kFree = 0, kReserved = 1, kCommitted = 2, kAborted = 3 };

constexpr uint64_t make_word(uint64_t sequence, RecordState state) {
  return sequence << 2 | static_cast<uint64_t>(state);
}

// kRows: whose rows the open step will have, for captures.
enum class RecordKind : uint8_t { kLayer = 1, kStep = 2, kRows = 3 };

// Descriptor::flags.
inline constexpr uint32_t kStepAborted = 1;       // of a step record
inline constexpr uint32_t kStepStreamed = 2;      // of a layer record: its step is larger than the ring holds at once
inline constexpr uint32_t kStepCounted = 4;       // of a layer record: no row of its step is stored, all are counted
inline constexpr uint32_t kCaptured = 8;          // of a layer record: its rows are for captures as well
inline constexpr uint32_t kCapturedOnly = 16;     // of either: the trace does not have it
inline constexpr uint32_t kCapturedWeights = 32;  // of a layer record: the trace does not have this column
inline constexpr uint32_t kCapturedLogits = 64;
inline constexpr uint32_t kCapturedHidden = 128;

struct Descriptor {
  std::atomic<uint64_t> word;
  uint64_t step;
  uint64_t offset;
  uint64_t bytes;
  RecordKind kind;
  DType ids_dtype;
  DType weights_dtype;
  DType logits_dtype;
  DType hidden_dtype;
  uint8_t tokens;
  uint16_t layer;
  uint32_t rows;
  uint32_t first_row;
  uint32_t step_rows;
  uint32_t k;
  uint32_t logits_width;
  uint32_t hidden_width;
  uint32_t invalid_ids;
  uint32_t runs;
  uint32_t notes_bytes;
  uint32_t flags;
  int64_t time_ns;
  uint32_t notes;
  uint8_t zero[36];
};
static_assert(sizeof(Descriptor) == 128);
static_assert(offsetof(Descriptor, kind) == 32);
static_assert(offsetof(Descriptor, layer) == 38);
static_assert(offsetof(Descriptor, invalid_ids) == 64);
static_assert(offsetof(Descriptor, time_ns) == 80);

// One run of a step record (FORMAT.md, table "runs").
struct Run {
  uint32_t request;
  uint32_t position;
  uint32_t count;
  uint16_t row_class;
  uint16_t flags;
};
static_assert(sizeof(Run) == 16);

inline constexpr uint16_t kRunCounted = 0x8000;  // Run::flags, in the ring only: its rows are counted and not stored

// Where the columns of a layer record lie in its payload.
struct LayerColumns {
  uint64_t ids = 0;
  uint64_t weights = 0;
  uint64_t logits = 0;
  uint64_t hidden = 0;
  uint64_t bytes = 0;
};

template <typename Record>  // Descriptor or LayerRecord: whatever has the column fields
LayerColumns layer_columns(const Record& r) {
  LayerColumns at;
  const auto place = [&at](DType dtype, uint64_t rows, uint64_t width) {
    const uint64_t start = at.bytes;
    at.bytes = align_up(start + rows * width * size_of(dtype), kAlign);
    return start;
  };
  at.ids = place(r.ids_dtype, r.rows, r.k);
  at.weights = place(r.weights_dtype, r.rows, r.k);
  at.logits = place(r.logits_dtype, r.rows, r.logits_width);
  at.hidden = place(r.hidden_dtype, r.rows, r.hidden_width);
  return at;
}

// Where the parts of a step record lie in its payload.
struct StepParts {
  uint64_t runs = 0;
  uint64_t tokens = 0;
  uint64_t notes = 0;
  uint64_t bytes = 0;
};

constexpr StepParts step_parts(uint64_t runs, bool tokens, uint64_t rows, uint64_t notes_bytes) {
  StepParts at;
  at.tokens = align_up(runs * sizeof(Run), kAlign);
  at.notes = at.tokens + (tokens ? align_up(rows * 4, kAlign) : 0);
  at.bytes = at.notes + align_up(notes_bytes, kAlign);
  return at;
}

}  // namespace moe_native
