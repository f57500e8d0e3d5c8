#include "core/bindings.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include "support.h"

namespace moe_native {
namespace {

struct TwoRecorders : testing::Test {
  test::TestRing ring_a, ring_b;
  Messages messages;
  StepRecorder a{ring_a.ring, Overflow::kDrop, kFieldIds, messages};
  StepRecorder b{ring_b.ring, Overflow::kDrop, kFieldIds, messages};
};

TEST_F(TwoRecorders, LowestFreeIndexFirst) {
  const int first = a.bind(0, 8, 2, true);
  EXPECT_EQ(a.bind(1, 8, 2, true), first + 1);
  EXPECT_EQ(b.bind(0, 8, 2, true), first + 2);
  unbind_all(a);
  EXPECT_EQ(b.bind(1, 8, 2, true), first) << "what a closed recorder had is given again, in the same order";
  EXPECT_EQ(b.bind(2, 8, 2, true), first + 1);
}

TEST_F(TwoRecorders, OutsideTheTableIsNothing) {
  EXPECT_EQ(binding(-1), nullptr);
  EXPECT_EQ(binding(kMaxBindings), nullptr);
}

TEST_F(TwoRecorders, AForkedChildRecordsNothing) {
  const int index = a.bind(0, 8, 2, true);
  const pid_t child = ::fork();
  if (child == 0) ::_exit(binding(index)->recorder.load() == nullptr ? 0 : 1);
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(binding(index)->recorder.load(), &a) << "the parent records on";
}

}  // namespace
}  // namespace moe_native
