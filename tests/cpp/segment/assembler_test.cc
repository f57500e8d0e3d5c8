#include "segment/assembler.h"

#include <gtest/gtest.h>

#include <cstring>
#include <thread>

#include "capture/fake_router.h"
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

// One capture of request 7, of all fields, and an open step whose records the test polls for as it likes.
struct CapturingAssembler : AssemblerTest {
  explicit CapturingAssembler(uint32_t lanes = 1)
      : AssemblerTest(lanes),
        layers(test::bind_layers(recorder, 2, 60, 4)),
        capture(captures.open({kAllFields, {}})),
        reader(capture.fd) {
    recorder.configure(kFieldIds, false);
    recorder.capture(kAllFields);
    for (Binding* b : layers) recorder.want(*b, true);
    captures.add(capture.number, 7, 0, 0, 100);
  }
  void begin(bool announced = false) {
    const RowSpan span{0, 5};
    recorder.begin_step({&span, 1});
    if (announced) recorder.announce(runs);
  }
  void record(int layer) {
    recorder.record(*layers[layer], test::FakeTensors(router, static_cast<uint16_t>(layer), runs).input());
  }
  bool end() {
    StepTable table;
    table.runs = runs;
    return recorder.end_step(table);
  }
  void give_the_ring_back_and_write_over_it() {
    assembler.release(assembler.positions());
    std::memset(t.ring.lane(0).arena, 0xEE, t.ring.lane(0).arena_bytes);
  }
  test::DecodedCapture closed() {
    const auto closed = captures.close(capture.number);
    return test::decode_capture(reader.bytes(closed.bytes), closed.index);
  }
  static constexpr uint32_t kAllFields = kFieldIds | kFieldWeights | kFieldLogits | kFieldHidden;
  const std::vector<Binding*> layers;
  const Captures::Opened capture;
  const test::Reader reader;
  const test::FakeRouter router;
  std::vector<moe_native::Run> runs = {run(8, 0, 2), run(7, 10, 3)};
};

TEST_F(CapturingAssembler, WhatOnlyCapturesWantIsNotInAStepOfTheTrace) {
  recorder.enable(*layers[1], false);
  for (const uint32_t fields : {uint32_t{0}, kAllFields}) {
    recorder.capture(fields);
    begin();
    for (const int layer : {0, 1}) record(layer);
    ASSERT_TRUE(end());
  }
  assembler.poll();
  ASSERT_EQ(assembler.ready().size(), 2u);
  const StepData& step = assembler.ready()[1];
  ASSERT_EQ(step.pieces.size(), 1u);
  EXPECT_EQ(step.pieces[0].shape.layer, 0u);
  EXPECT_EQ(step.pieces[0].weights, nullptr);
  EXPECT_EQ(step.pieces[0].logits, nullptr);
  EXPECT_EQ(step.pieces[0].hidden, nullptr);
  EXPECT_EQ(std::memcmp(step.pieces[0].ids, assembler.ready()[0].pieces[0].ids, 5 * 4), 0);
  EXPECT_EQ(step.shapes, assembler.ready()[0].shapes) << "they share a block";
  EXPECT_TRUE(step.captured.empty());
  EXPECT_EQ(t.ring.losses(Loss::kIncomplete).layers, 0u);
  expect_rows(closed(), router, 0, 7, {{10, 13}}, kAllFields);
}

TEST_F(CapturingAssembler, AStepThatIsForCapturesAloneIsNoStepOfTheTrace) {
  recorder.pause(true);
  begin();
  for (const int layer : {0, 1}) record(layer);
  ASSERT_TRUE(end());
  recorder.pause(false);
  runs = {run(7, 13, 5)};
  begin();
  record(0);
  ASSERT_TRUE(end());
  assembler.poll();
  ASSERT_EQ(assembler.ready().size(), 1u);
  EXPECT_EQ(assembler.ready()[0].number, 1u);
  EXPECT_EQ(assembler.ready()[0].pieces.size(), 1u);
  EXPECT_EQ(assembler.complete()[0].sequence, 5u) << "its records go with those of the next step";
  EXPECT_EQ(t.ring.losses(Loss::kIncomplete).layers, 1u) << "of the step of the trace";
  expect_rows(closed(), router, 0, 7, {{10, 13}}, kAllFields);
}

TEST_F(CapturingAssembler, AnnouncedRowsAreHandedOverWhileTheStepIsOpen) {
  begin(true);
  record(0);
  assembler.poll();
  EXPECT_TRUE(assembler.open().captured.empty());
  EXPECT_EQ(assembler.open().pieces.size(), 1u) << "the trace still has them";
  expect_rows(closed(), router, 0, 7, {{10, 13}}, kAllFields);
}

TEST_F(CapturingAssembler, OtherRowsWaitUntilTheStepEnds) {
  begin(true);
  record(0);
  ASSERT_TRUE(end());
  runs = {run(7, 13, 5)};
  begin();  // what was announced of the step before does not hold
  record(0);
  assembler.poll();
  EXPECT_EQ(assembler.open().captured.size(), 1u);
  ASSERT_TRUE(end());
  assembler.poll();
  expect_rows(closed(), router, 0, 7, {{10, 18}}, kAllFields);
}

TEST_F(CapturingAssembler, WhatIsKeptOutlivesTheRing) {
  begin();
  for (const int layer : {0, 1}) {
    record(layer);
    assembler.poll();
    assembler.keep_captured();
    give_the_ring_back_and_write_over_it();
  }
  assembler.keep_captured();
  ASSERT_TRUE(end());
  assembler.poll();
  expect_rows(closed(), router, 0, 7, {{10, 13}}, kAllFields);
}

TEST_F(CapturingAssembler, AnAbortedStepLeavesNoRow) {
  begin();
  for (const int layer : {0, 1}) record(layer);
  assembler.poll();
  assembler.keep_captured();
  recorder.abort_step();
  runs = {run(7, 20, 5)};
  begin();
  for (const int layer : {0, 1}) record(layer);
  ASSERT_TRUE(end());
  assembler.poll();
  expect_rows(closed(), router, 0, 7, {{20, 25}}, kAllFields);
}

TEST_F(CapturingAssembler, AStepWithoutARecordLeavesNoRow) {
  const std::string too_much(t.ring.lane(0).arena_bytes, ' ');
  begin();
  record(0);
  StepTable table;
  table.runs = runs;
  table.notes = {reinterpret_cast<const std::byte*>(too_much.data()), too_much.size()};
  ASSERT_FALSE(recorder.end_step(table));
  runs = {run(7, 20, 5)};
  begin();
  record(0);
  ASSERT_TRUE(end());
  assembler.poll();
  expect_rows(closed(), router, 0, 7, {{20, 25}}, kAllFields);
}

TEST_F(CapturingAssembler, WhatIsGivenUpIsMissingAndNotWrong) {
  begin();
  record(0);
  assembler.poll();
  assembler.give_up();
  give_the_ring_back_and_write_over_it();
  record(1);
  ASSERT_TRUE(end());
  assembler.poll();
  const test::DecodedCapture got = closed();
  EXPECT_EQ(got.layer_numbers(), std::vector<uint16_t>{1});
  expect_rows(got, router, 0, 7, {{10, 13}}, kAllFields);
}

struct CapturingTwoLanes : CapturingAssembler {
  CapturingTwoLanes() : CapturingAssembler(2) {}
};

TEST_F(CapturingTwoLanes, RowsOfSideLanesAreCapturedAsWell) {
  for (const bool announced : {false, true}) {
    for (const bool paused : {false, true}) {
      recorder.pause(paused);
      begin(announced);
      record(0);
      std::thread([&] { record(1); }).join();
      assembler.poll();
      ASSERT_TRUE(end());
      assembler.poll();
      runs[1].position += runs[1].count;
    }
  }
  EXPECT_EQ(assembler.ready().size(), 2u);
  EXPECT_EQ(assembler.complete()[1].sequence, 4u);
  expect_rows(closed(), router, 0, 7, {{10, 22}}, kAllFields);
}

}  // namespace
}  // namespace moe_native
