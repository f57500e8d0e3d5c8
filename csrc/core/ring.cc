#include "core/ring.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include "core/crc32.h"
#include "core/owner.h"
#include "core/test_point.h"

namespace moe_native {

namespace {

constexpr uint64_t kMinimumBytes = 64 << 10;  // a lane
// A block holds what the ring held at most, and FORMAT.md limits blocks to this.
constexpr uint64_t kMaximumBytes = 1 << 30;
constexpr const char* kSharedMemory = "/dev/shm";

std::string ring_path(const std::string& directory) {
  char name[64];
  std::snprintf(name, sizeof name, "/moe-native-%016llx.ring", static_cast<unsigned long long>(random_u64()));
  return directory + name;
}

}  // namespace

Ring::Ring(const RingOptions& options) {
  if (options.lanes < 1 || options.lanes > 64) throw std::invalid_argument("lanes must be between 1 and 64");
  if (options.bytes < kMinimumBytes * options.lanes || options.bytes > kMaximumBytes) {
    throw std::invalid_argument("ring_bytes must be between 64 KiB a lane and 1 GiB");
  }
  if (options.rank_directory.size() >= sizeof RingHeader::rank_directory) {
    throw std::invalid_argument("the trace's path is longer than 2047 bytes");
  }
  // One descriptor a KiB: small decode steps of a wide model are a few hundred bytes a layer.
  const uint64_t per_lane = options.bytes / options.lanes;
  const uint32_t descriptors =
      static_cast<uint32_t>(std::clamp<uint64_t>(std::bit_floor(per_lane / 1024), 64, uint64_t{1} << 22));
  const uint64_t fixed =
      kPage * (1 + uint64_t{options.lanes}) + uint64_t{descriptors} * sizeof(Descriptor) * options.lanes;
  const uint64_t arena = (options.bytes - fixed) / options.lanes / kPage * kPage;
  const uint64_t bytes = fixed + arena * options.lanes;

  if (options.rank_directory.empty()) {
    file_ = MappedFile::nameless(bytes);  // nothing in it is anybody's after this process
  } else if (!options.directory.empty()) {
    file_ = MappedFile::create(ring_path(options.directory), bytes);
  } else {
    try {
      file_ = MappedFile::create(ring_path(kSharedMemory), bytes);
    } catch (const std::system_error&) {
      file_ = MappedFile::create(ring_path(options.rank_directory), bytes);
      fell_back_ = true;
    }
  }

  header_ = reinterpret_cast<RingHeader*>(file_.data());
  header_->header_size = sizeof(RingHeader);
  header_->major = kRingMajor;
  header_->minor = kRingMinor;
  header_->ring_id = random_u64();
  header_->file_bytes = bytes;
  header_->lanes = options.lanes;
  header_->descriptors = descriptors;
  header_->arena_bytes = arena;
  header_->lanes_offset = kPage;
  header_->descriptors_offset = kPage * (1 + uint64_t{options.lanes});
  header_->arena_offset = fixed;
  const Owner owner = Owner::self();
  header_->owner_pid = owner.pid;
  header_->owner_start_ticks = owner.start_ticks;
  std::memcpy(header_->owner_boot_id, owner.boot_id.data(),
              std::min(owner.boot_id.size(), sizeof header_->owner_boot_id));
  header_->created_ns = unix_time_ns();
  std::memcpy(header_->rank_directory, options.rank_directory.data(), options.rank_directory.size());
  MOE_TEST_POINT("ring, without magic");
  std::memcpy(header_->magic, kRingMagic, sizeof kRingMagic);
  MOE_TEST_POINT("ring, without checksum");
  header_->crc = crc32(header_, offsetof(RingHeader, crc));
}

LaneMemory Ring::lane(uint32_t index) const {
  LaneMemory memory;
  std::byte* base = file_.data();
  memory.header = reinterpret_cast<LaneHeader*>(base + header_->lanes_offset) + index;
  memory.descriptors =
      reinterpret_cast<Descriptor*>(base + header_->descriptors_offset) + uint64_t{index} * header_->descriptors;
  memory.arena = base + header_->arena_offset + index * header_->arena_bytes;
  memory.descriptor_count = header_->descriptors;
  memory.arena_bytes = header_->arena_bytes;
  return memory;
}

void Ring::lose(Loss cause, uint64_t steps, uint64_t layers, uint64_t rows) const noexcept {
  const size_t at = kLosses + 3 * static_cast<size_t>(cause);
  add(at, steps);
  add(at + 1, layers);
  add(at + 2, rows);
}

LossTotals Ring::losses(Loss cause) const noexcept {
  const size_t at = kLosses + 3 * static_cast<size_t>(cause);
  const auto read = [this](size_t index) { return counter(index).load(std::memory_order_relaxed); };
  return {read(at), read(at + 1), read(at + 2)};
}

}  // namespace moe_native
