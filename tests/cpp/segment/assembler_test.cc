#include "segment/assembler.h"

#include <gtest/gtest.h>

#include <thread>

#include "support.h"

namespace moe_native {
namespace {

using test::Routed;
using test::run;

struct AssemblerTest : testing::Test {
  explicit AssemblerTest(uint32_t lanes = 1)
      : t(1 << 20, lanes),
        recorder(t.ring, Overflow::kDrop, kFieldIds | kFieldWeights, messages),
        assembler(t.ring, captures) {}
  test::TestRing t;
  Messages messages;
  StepRecorder recorder;
  Captures captures;
  Assembler assembler;
};

TEST_F(AssemblerTest, StepsComeWholeAndInOrder) {
  const auto layers = test::bind_layers(recorder, 3, 60, 4);
  EXPECT_FALSE(assembler.poll());
  for (uint32_t s = 0; s < 4; ++s) test::record_step(recorder, layers, Routed(2 + s, 4, 60), {run(s, 0, 2 + s)});
  EXPECT_TRUE(assembler.poll());
  ASSERT_EQ(assembler.ready().size(), 4u);
  for (uint32_t s = 0; s < 4; ++s) {
    const StepData& step = assembler.ready()[s];
    EXPECT_EQ(step.number, s);
    EXPECT_EQ(step.rows, 2 + s);
    EXPECT_EQ(step.runs[0].request, s);
    ASSERT_EQ(step.shapes.size(), 3u);
    EXPECT_EQ(step.shapes[2].layer, 2u);
    EXPECT_EQ(step.end[0].sequence, 4 * (s + 1));
  }
}

TEST_F(AssemblerTest, AnUnfinishedStepWaits) {
  const auto layers = test::bind_layers(recorder, 1, 60, 4);
  const RowSpan span{0, 2};
  ASSERT_EQ(recorder.begin_step({&span, 1}), Begun::kAdmitted);
  recorder.record(*layers[0], Routed(2, 4, 60).input());
  EXPECT_TRUE(assembler.poll());
  EXPECT_TRUE(assembler.ready().empty());
  EXPECT_EQ(assembler.open().pieces.size(), 1u);
}

TEST_F(AssemblerTest, AbortedStepsVanish) {
  const auto layers = test::bind_layers(recorder, 1, 60, 4);
  const RowSpan span{0, 2};
  recorder.begin_step({&span, 1});
  recorder.record(*layers[0], Routed(2, 4, 60).input());
  recorder.abort_step();
  test::record_step(recorder, layers, Routed(2, 4, 60), {run(0, 0, 2)});
  assembler.poll();
  ASSERT_EQ(assembler.ready().size(), 1u);
  EXPECT_EQ(assembler.ready()[0].number, 1u);
  EXPECT_EQ(assembler.ready()[0].pieces.size(), 1u);
  EXPECT_EQ(assembler.ready()[0].end[0].sequence, 4u) << "the aborted step's records are freed with it";
}

TEST_F(AssemblerTest, ALayerThatLacksRowsIsLeftOutAndCounted) {
  const auto layers = test::bind_layers(recorder, 2, 60, 4);
  const RowSpan span{0, 5};
  recorder.begin_step({&span, 1});
  recorder.record(*layers[0], Routed(5, 4, 60).input());
  recorder.record(*layers[1], Routed(3, 4, 60).input());
  const std::vector<moe_native::Run> runs = {run(0, 0, 5)};
  StepTable table;
  table.runs = runs;
  recorder.end_step(table);
  assembler.poll();
  ASSERT_EQ(assembler.ready().size(), 1u);
  ASSERT_EQ(assembler.ready()[0].shapes.size(), 1u);
  EXPECT_EQ(assembler.ready()[0].shapes[0].layer, 0u);
  EXPECT_EQ(t.ring.losses(Loss::kIncomplete).layers, 1u);
  EXPECT_EQ(t.ring.losses(Loss::kIncomplete).rows, 5u);
}

struct TwoLaneAssembler : AssemblerTest {
  TwoLaneAssembler() : AssemblerTest(2) {}
};

TEST_F(TwoLaneAssembler, LanesAreJoinedByStep) {
  const auto layers = test::bind_layers(recorder, 2, 60, 4);
  const Routed routed(3, 4, 60);
  for (int s = 0; s < 3; ++s) {
    const RowSpan span{0, 3};
    recorder.begin_step({&span, 1});
    recorder.record(*layers[1], routed.input());
    std::thread([&] { recorder.record(*layers[0], routed.input()); }).join();
    const std::vector<moe_native::Run> runs = {run(0, 0, 3)};
    StepTable table;
    table.runs = runs;
    recorder.end_step(table);
  }
  assembler.poll();
  ASSERT_EQ(assembler.ready().size(), 3u);
  for (const StepData& step : assembler.ready()) {
    ASSERT_EQ(step.pieces.size(), 2u);
    EXPECT_EQ(step.pieces[0].shape.layer, 0u);
    EXPECT_EQ(step.pieces[1].shape.layer, 1u);
  }
  EXPECT_EQ(assembler.ready()[1].end[1].sequence, 2u);
}

TEST_F(TwoLaneAssembler, LeftoversOfAStepWithoutARecordDoNotHarmTheNext) {
  const auto layers = test::bind_layers(recorder, 2, 60, 4);
  const Routed routed(3, 4, 60);
  const std::vector<moe_native::Run> runs = {run(0, 0, 3)};
  const std::string too_much(t.ring.lane(0).arena_bytes, ' ');
  for (const bool kept : {false, true}) {
    const RowSpan span{0, 3};
    ASSERT_EQ(recorder.begin_step({&span, 1}), Begun::kAdmitted);
    recorder.record(*layers[0], routed.input());
    std::thread([&] { recorder.record(*layers[1], routed.input()); }).join();
    StepTable table;
    table.runs = runs;
    if (!kept) table.notes = {reinterpret_cast<const std::byte*>(too_much.data()), too_much.size()};
    ASSERT_EQ(recorder.end_step(table), kept);
  }
  assembler.poll();
  ASSERT_EQ(assembler.ready().size(), 1u);
  EXPECT_EQ(assembler.ready()[0].pieces.size(), 2u);
  EXPECT_EQ(t.ring.losses(Loss::kIncomplete).layers, 0u);
}

TEST_F(AssemblerTest, GivingUpLosesTheOpenStepToo) {
  const auto layers = test::bind_layers(recorder, 2, 60, 4);
  const Routed routed(2, 4, 60);
  test::record_step(recorder, layers, routed, {run(0, 0, 2)});
  const RowSpan span{0, 2};
  recorder.begin_step({&span, 1});
  recorder.record(*layers[0], routed.input());
  assembler.poll();
  assembler.give_up();
  EXPECT_EQ(t.ring.losses(Loss::kIoError).steps, 1u);
  EXPECT_EQ(t.ring.losses(Loss::kIoError).rows, 2u);
  recorder.record(*layers[1], routed.input());
  const std::vector<moe_native::Run> runs = {run(0, 0, 2)};
  StepTable table;
  table.runs = runs;
  recorder.end_step(table);
  assembler.poll();
  EXPECT_TRUE(assembler.ready().empty());
  EXPECT_EQ(t.ring.losses(Loss::kIoError).steps, 2u);
}

}  // namespace
}  // namespace moe_native
