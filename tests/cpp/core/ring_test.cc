#include "core/ring.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstring>
#include <fstream>
#include <stdexcept>

#include "core/owner.h"
#include "support.h"

namespace moe_native {
namespace {

using test::TemporaryDirectory;
using test::TestRing;

TEST(Ring, HeaderIsWhatTheDocumentSays) {
  TestRing t(1 << 20, 2);
  const std::string bytes = test::read_file(t.ring.path());
  const auto u32 = [&](size_t at) {
    uint32_t v;
    std::memcpy(&v, bytes.data() + at, 4);
    return v;
  };
  const auto u64 = [&](size_t at) {
    uint64_t v;
    std::memcpy(&v, bytes.data() + at, 8);
    return v;
  };
  EXPECT_EQ(bytes.substr(0, 8), "MOERING1");
  EXPECT_EQ(u32(8), 4096u);
  EXPECT_EQ(u64(16), t.ring.id());
  EXPECT_EQ(u64(24), bytes.size());
  EXPECT_EQ(u32(32), 2u);
  const uint64_t descriptors = u32(36), arena = u64(40);
  EXPECT_EQ(descriptors & (descriptors - 1), 0u);
  EXPECT_EQ(arena % 4096, 0u);
  EXPECT_EQ(u64(48), 4096u);
  EXPECT_EQ(u64(56), 3 * 4096u);
  EXPECT_EQ(u64(64), u64(56) + 2 * descriptors * 128);
  EXPECT_EQ(bytes.size(), u64(64) + 2 * arena);
  EXPECT_LE(bytes.size(), size_t{1} << 20);
  EXPECT_EQ(u32(72), static_cast<uint32_t>(::getpid()));
  EXPECT_EQ(std::string(bytes.data() + 88), Owner::self().boot_id);
  EXPECT_EQ(u32(252), crc32(bytes.data(), 252));
  EXPECT_EQ(std::string(bytes.data() + 2048), t.directory.path());
}

TEST(Ring, IsPrivateAndFullyAllocated) {
  TestRing t;
  struct stat s {};
  ASSERT_EQ(::stat(t.ring.path().c_str(), &s), 0);
  EXPECT_EQ(s.st_mode & 0777, 0600u);
  EXPECT_GE(s.st_blocks * 512, s.st_size);
}

TEST(Ring, OwnerIsThisProcess) {
  const Owner owner = Owner::self();
  EXPECT_EQ(owner.pid, static_cast<uint32_t>(::getpid()));
  EXPECT_EQ(owner.boot_id.size(), 36u);
  EXPECT_GT(owner.start_ticks, 0u);
}

TEST(Ring, LossesAddUp) {
  TestRing t;
  t.ring.lose(Loss::kBadInput, 0, 1, 7);
  t.ring.lose(Loss::kBadInput, 0, 2, 3);
  const LossTotals totals = t.ring.losses(Loss::kBadInput);
  EXPECT_EQ(totals.steps, 0u);
  EXPECT_EQ(totals.layers, 3u);
  EXPECT_EQ(totals.rows, 10u);
  EXPECT_EQ(t.ring.losses(Loss::kRingFull).rows, 0u);
}

TEST(Ring, RefusesUnusableSizes) {
  const TemporaryDirectory directory;
  EXPECT_THROW(Ring({directory.path(), directory.path(), 1000, 1}), std::invalid_argument);
  EXPECT_THROW(Ring({directory.path(), directory.path(), 1 << 20, 0}), std::invalid_argument);
  EXPECT_THROW(Ring({directory / "missing", directory.path(), 1 << 20, 1}), std::system_error);
}

TEST(Ring, EveryLaneGetsAUsableArena) {
  const TemporaryDirectory directory;
  EXPECT_THROW(Ring({directory.path(), directory.path(), 1 << 20, 64}), std::invalid_argument);
  EXPECT_THROW(Ring({directory.path(), directory.path(), uint64_t{2} << 30, 1}), std::invalid_argument);
  const Ring ring({directory.path(), directory.path(), 4 << 20, 64});
  EXPECT_GE(ring.lane(63).arena_bytes, 32u << 10);
}

}  // namespace
}  // namespace moe_native
