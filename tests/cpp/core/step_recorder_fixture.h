// A recorder on a small ring, and what it puts there.
#pragma once

#include <gtest/gtest.h>

#include "core/step_recorder.h"
#include "support.h"

namespace moe_native {

using test::Routed;
using test::run;

struct StepRecorderTest : testing::Test {
  explicit StepRecorderTest(uint64_t bytes = 1 << 20, uint32_t lanes = 1, Overflow overflow = Overflow::kDrop,
                            uint32_t fields = kFieldIds | kFieldWeights)
      : t(bytes, lanes), recorder(t.ring, overflow, fields, messages), consumer(t.ring.lane(0)) {}
  uint64_t count(size_t counter) const { return t.ring.counter(counter).load(); }
  const Descriptor* next() {
    const Descriptor* d = consumer.peek();
    if (d != nullptr) consumer.take();
    return d;
  }
  // steps_begun = steps_committed + lost steps
  void expect_adds_up() const {
    uint64_t lost = 0;
    for (size_t c = 0; c < static_cast<size_t>(Loss::kPaused); ++c) lost += t.ring.losses(static_cast<Loss>(c)).steps;
    EXPECT_EQ(count(kStepsBegun), count(kStepsCommitted) + lost);
  }

  test::TestRing t;
  Messages messages;
  StepRecorder recorder;
  LaneConsumer consumer;
};

}  // namespace moe_native
