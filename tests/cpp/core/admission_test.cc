#include "core/admission.h"

#include <gtest/gtest.h>

#include "support.h"

namespace moe_native {
namespace {

struct StepNeedTest : testing::Test {
  test::TestRing t;
  LaneProducer lane{t.ring.lane(0)};
};

TEST_F(StepNeedTest, AStepIsLargeFromHalfOfTheArenaOnAWrapIncluded) {
  const auto is_large = [&](uint64_t row_bytes) {
    StepNeed need(1);
    need.add_layer(row_bytes);
    return need.is_large_for(lane);
  };
  const uint64_t table = (16 << 10) + sizeof(moe_native::Run) + 4, of_layer = 4 * kAlign;
  const uint64_t most = (lane.capacity() / 2 - table) / 2 - of_layer;  // a wrap takes as much as the layer
  EXPECT_FALSE(is_large(most));
  EXPECT_TRUE(is_large(most + 1));
}

TEST_F(StepNeedTest, AStepIsLargeFromHalfOfTheDescriptorsOn) {
  StepNeed need(0);
  for (uint32_t records = 1; records < lane.descriptor_count() / 2; ++records) need.add_layer(0);
  EXPECT_FALSE(need.is_large_for(lane));
  need.add_layer(0);
  EXPECT_TRUE(need.is_large_for(lane));
}

TEST_F(StepNeedTest, ItFitsAsLongAsAllOfItDoes) {
  StepNeed need(10);
  need.add_layer(1000);
  ASSERT_TRUE(need.fits(lane));
  const uint64_t whole =
      2 * ((16 << 10) + 10 * (sizeof(moe_native::Run) + 4)) + 10 * 1000 + 4 * kAlign;  // the table wraps
  const uint64_t room = (lane.capacity() - whole) / kAlign * kAlign;
  ASSERT_NE(lane.reserve(room), nullptr);
  EXPECT_TRUE(need.fits(lane));
  ASSERT_NE(lane.reserve(kAlign), nullptr);
  EXPECT_FALSE(need.fits(lane));
}

TEST(Wait, ItSleepsUntilItHasBeenLongEnough) {
  constexpr int64_t kLimitNs = 5'000'000;
  Wait wait(kLimitNs);
  int64_t before = 0;
  int sleeps = 0;
  while (wait.again()) {
    ++sleeps;
    EXPECT_GE(wait.ns(), before + 50'000);
    before = wait.ns();
  }
  EXPECT_GE(wait.ns(), kLimitNs);
  EXPECT_GE(sleeps, 1);
  EXPECT_FALSE(Wait(0).again());
}

}  // namespace
}  // namespace moe_native
