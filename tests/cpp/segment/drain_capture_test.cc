// Captures, the whole way: from the router's tensors to the memory that a caller maps, beside a trace or without one.
#include "segment/drain_capture_fixture.h"

namespace moe_native {
namespace {

TEST_F(DrainCaptureTest, TheTraceIsTheSameWhateverIsCaptured) {
  std::vector<std::map<std::tuple<int, int, uint32_t, int>, std::string>> traces;
  for (const bool captured : {false, true}) {
    auto o = options();
    o.fields = kFieldIds | kFieldWeights;
    {
      Recording recording(o);
      const Layers layers = bind(recording, 3);
      recording.steps().enable(*layers[2], false);
      std::optional<Caller> caller;
      if (captured) {
        want(recording, layers);
        caller.emplace(recording).add(7, 0, 100);
      }
      for (uint32_t step = 0; step < 13; ++step) {
        recording.pause(step % 3 == 2);
        const Runs runs = {run(7, 3 * step, 3, 69), run(8, step, 1, 70)};
        EXPECT_EQ(execute(recording.steps(), layers, router, runs), captured || step % 3 != 2);
      }
      if (caller) expect_rows(caller->close(), router, 0, 7, {{0, 39}}, kAllFields);
    }
    const auto all = blocks();
    ASSERT_EQ(all.size(), 1u);
    EXPECT_EQ(steps_in(all), 9u);
    traces.push_back(all[0].data);
    for (const EntryField own : {EntryField::kSteps, EntryField::kLanes}) {  // times, and numbers of records
      traces.back().erase({static_cast<int>(own), kNoLayer, 0, 0});
    }
    for (const std::string& path : segments()) fs::remove(path);
  }
  EXPECT_EQ(traces[0], traces[1]);
}

TEST_F(DrainCaptureTest, AStepThatIsCapturedWhilePausedIsNotInTheTrace) {
  {
    Recording recording(options());
    const Layers layers = bind(recording, 2);
    want(recording, layers, kFieldIds | kFieldHidden);
    Caller caller(recording, kFieldIds | kFieldHidden);
    caller.add(7, 0, 20);
    recording.pause(true);
    for (uint32_t step = 0; step < 3; ++step) {
      ASSERT_TRUE(execute(recording.steps(), layers, router, {run(7, 4 * step, 4)}));
    }
    expect_rows(caller.close(), router, 0, 7, {{0, 12}}, kFieldIds | kFieldHidden);
    EXPECT_EQ(recording.drain().totals().rows.load(), 0u);
  }
  for (const DecodedBlock& block : blocks()) EXPECT_EQ(block.header.steps + block.header.fragments, 0u);
}

TEST_F(DrainCaptureTest, WithoutATraceThereIsNoFileAndNoStepButCapturedOnes) {
  Recording recording(without_trace());
  EXPECT_EQ(recording.ring().path(), "");
  const Layers layers = bind(recording, 2);
  recording.pause(false);
  EXPECT_FALSE(execute(recording.steps(), layers, router, {run(7, 0, 4)})) << "nobody wants it";
  want(recording, layers);
  Caller caller(recording);
  caller.add(7, 0, 20);
  const RowSpan span{0, 4};
  EXPECT_EQ(recording.steps().begin_step({&span, 1}), Begun::kForCaptures);
  recording.steps().abort_step();
  ASSERT_TRUE(execute(recording.steps(), layers, router, {run(7, 4, 4)}));
  EXPECT_TRUE(recording.drain().flush(10));
  expect_rows(caller.close(), router, 0, 7, {{4, 8}}, kAllFields);
  EXPECT_EQ(recording.drain().totals().blocks.load(), 0u);
  EXPECT_EQ(recording.ring().losses(Loss::kPaused).steps, 3u);
}

TEST_F(DrainCaptureTest, WithoutATraceTheRingIsGivenBack) {
  constexpr uint32_t kSteps = 4000;
  for (const uint64_t ring_bytes : {64 << 10, 256 << 10}) {
    Recording recording(without_trace(ring_bytes));
    const Layers layers = bind(recording, 4);
    want(recording, layers);
    Caller caller(recording);
    for (const uint32_t request : {7, 8}) caller.add(request, request, kSteps);
    for (uint32_t step = 0; step < kSteps; ++step) {
      const Runs runs = {run(7, step, 1), run(9, step, 1), run(8, step, 1)};
      ASSERT_TRUE(execute(recording.steps(), layers, router, runs, {.announced = step % 2 == 0})) << step;
    }
    const DecodedCapture got = caller.close();
    for (const uint32_t request : {7, 8}) expect_rows(got, router, request, request, {{0, kSteps}}, kAllFields);
  }
}

TEST_F(DrainCaptureTest, StepsThatNobodyAddedARequestForFillNoRing) {
  Recording recording(without_trace(64 << 10));
  const Layers layers = bind(recording, 4);
  want(recording, layers);
  for (uint32_t step = 0; step < 500; ++step) {
    ASSERT_TRUE(execute(recording.steps(), layers, router, {run(7, step, 5)}));
    const RowSpan span{0, 5};
    ASSERT_EQ(recording.steps().begin_step({&span, 1}), Begun::kForCaptures);
    recording.steps().record(*layers[0], test::FakeTensors(router, 0, Runs{run(7, step, 5)}).input());
    recording.steps().abort_step();
  }
}

// The same with a trace, which has none of these steps: no block gives the ring back.
TEST_F(DrainCaptureTest, StepsForCapturesAloneDoNotFillTheRingOfATrace) {
  Recording recording(options(64 << 10));
  const Layers layers = bind(recording, 4);
  want(recording, layers);
  recording.pause(true);
  Caller caller(recording);
  caller.add(7, 0, 2000);
  for (uint32_t step = 0; step < 1000; ++step) {
    ASSERT_TRUE(execute(recording.steps(), layers, router, {run(7, 2 * step, 2), run(8, 0, 1)}));
  }
  expect_rows(caller.close(), router, 0, 7, {{0, 2000}}, kAllFields);
}

TEST_F(DrainCaptureTest, CapturesOfDifferentFieldsLayersAndTimesGoTogether) {
  Recording recording(options());
  const Layers layers = bind(recording, 4);
  want(recording, layers);
  std::optional<Caller> ids(std::in_place, recording, kFieldIds);
  Caller hidden(recording, kFieldIds | kFieldHidden, std::vector<uint16_t>{1, 2});
  ids->add(7, 0, 100);
  hidden.add(7, 5, 50);
  hidden.add(8, 6, 50);
  for (uint32_t step = 0; step < 10; ++step) {
    ASSERT_TRUE(execute(recording.steps(), layers, router, {run(7, step, 1), run(8, 2 * step, 2)}));
    if (step == 4) {
      const DecodedCapture got = ids->close();
      EXPECT_EQ(got.layers.size(), 4u);
      expect_rows(got, router, 0, 7, {{0, 5}}, kFieldIds);
      ids.reset();
    }
  }
  ASSERT_TRUE(recording.drain().catch_up(10));
  Caller late(recording, kAllFields, std::vector<uint16_t>{3});
  late.add(8, 0, 100);
  ASSERT_TRUE(execute(recording.steps(), layers, router, {run(8, 20, 3), run(7, 10, 1)}));
  const DecodedCapture of_hidden = hidden.close(), of_late = late.close();
  EXPECT_EQ(of_hidden.layer_numbers(), (std::vector<uint16_t>{1, 2}));
  expect_rows(of_hidden, router, 5, 7, {{0, 11}}, kFieldIds | kFieldHidden);
  expect_rows(of_hidden, router, 6, 8, {{0, 23}}, kFieldIds | kFieldHidden);
  EXPECT_EQ(of_late.layer_numbers(), std::vector<uint16_t>{3});
  expect_rows(of_late, router, 0, 8, {{20, 23}}, kAllFields);
}

TEST_F(DrainCaptureTest, WhatIsExecutedAgainReplacesWhatWasThere) {
  Recording recording(options());
  const Layers layers = bind(recording, 2);
  want(recording, layers);
  Caller caller(recording);
  caller.add(7, 0, 20);
  ASSERT_TRUE(execute(recording.steps(), layers, router, {run(7, 0, 10)}, {.again = 1}));
  ASSERT_TRUE(execute(recording.steps(), layers, router, {run(7, 0, 12)}, {.again = 2}));
  expect_rows(caller.close(), router, 0, 7, {{0, 12}}, kAllFields, 2);
}

TEST_F(DrainCaptureTest, DisorderHolesAndUnknownPositionsShowAsSpans) {
  Recording recording(options());
  const Layers layers = bind(recording, 2);
  want(recording, layers);
  Caller caller(recording);
  caller.add(7, 0, 15);
  ASSERT_TRUE(execute(recording.steps(), layers, router, {run(7, 8, 2), run(9, 0, 1), run(7, 2, 3)}));
  ASSERT_TRUE(execute(recording.steps(), layers, router, {run(7, 0xFFFFFFFF, 1), run(7, 0, 1)}));
  ASSERT_TRUE(execute(recording.steps(), layers, router, {run(7, 13, 9)}));  // room for two of them
  expect_rows(caller.close(), router, 0, 7, {{0, 1}, {2, 5}, {8, 10}, {13, 15}}, kAllFields);
}

TEST_F(DrainCaptureTest, ALayerThatChangesItsShapeLacksRows) {
  Recording recording(options());
  const Layers layers = bind(recording, 2);
  want(recording, layers);
  Caller caller(recording);
  caller.add(7, 0, 20);
  ASSERT_TRUE(execute(recording.steps(), layers, router, {run(7, 0, 4)}));
  FakeRouter wider = router;
  wider.hidden = 40;
  ASSERT_TRUE(execute(recording.steps(), layers, wider, {run(7, 2, 4)}));
  ASSERT_TRUE(execute(recording.steps(), layers, router, {run(7, 6, 4)}));
  expect_rows(caller.close(), router, 0, 7, {{0, 4}, {6, 10}}, kAllFields);
}

TEST_F(DrainCaptureTest, AnAbortedStepLeavesNoRow) {
  for (const bool traced : {false, true}) {
    Recording recording(traced ? options() : without_trace());
    const Layers layers = bind(recording, 2);
    want(recording, layers);
    Caller caller(recording);
    caller.add(7, 0, 20);
    const Runs runs = {run(7, 0, 4)};
    const RowSpan span{0, 4};
    recording.steps().begin_step({&span, 1});
    for (Binding* b : layers) recording.steps().record(*b, test::FakeTensors(router, b->layer, runs).input());
    ASSERT_TRUE(recording.drain().catch_up(10));
    recording.steps().abort_step();
    ASSERT_TRUE(execute(recording.steps(), layers, router, {run(7, 4, 4)}));
    expect_rows(caller.close(), router, 0, 7, {{4, 8}}, kAllFields);
  }
}

TEST_F(DrainCaptureTest, AnnouncedRowsAreThereBeforeTheStepEnds) {
  for (const bool traced : {false, true}) {
    Recording recording(traced ? options() : without_trace());
    const Layers layers = bind(recording, 2);
    want(recording, layers);
    Caller caller(recording);
    caller.add(7, 0, 20);
    const Runs runs = {run(7, 0, 4)};
    const RowSpan span{0, 4};
    recording.steps().begin_step({&span, 1});
    recording.steps().announce(runs);
    recording.steps().record(*layers[0], test::FakeTensors(router, 0, runs).input());
    const DecodedCapture got = caller.close();
    EXPECT_EQ(got.layer_numbers(), std::vector<uint16_t>{0});
    expect_rows(got, router, 0, 7, {{0, 4}}, kAllFields);
    recording.steps().abort_step();
  }
}

TEST_F(DrainCaptureTest, CatchingUpWritesNothing) {
  Recording recording(options());
  const Layers layers = bind(recording, 2);
  EXPECT_TRUE(recording.drain().catch_up(10)) << "there is nothing";
  ASSERT_TRUE(execute(recording.steps(), layers, router, {run(7, 0, 4)}));
  EXPECT_TRUE(recording.drain().catch_up(std::numeric_limits<double>::infinity()));
  EXPECT_EQ(recording.ring().counter(kRecords).load(), 2u) << "but it has seen it";
  EXPECT_TRUE(segments().empty());
  recording.close();
  EXPECT_FALSE(recording.drain().catch_up(10));
}

TEST_F(DrainCaptureTest, AClosedRecorderHasHandedOverWhatWasCommitted) {
  for (const bool traced : {false, true}) {
    Recording recording(traced ? options() : without_trace());
    const Layers layers = bind(recording, 2);
    want(recording, layers);
    Caller caller(recording);
    caller.add(7, 0, 20);
    ASSERT_TRUE(execute(recording.steps(), layers, router, {run(7, 0, 4)}));
    recording.close();
    expect_rows(caller.close_as_it_is(), router, 0, 7, {{0, 4}}, kAllFields);
  }
}

TEST_F(DrainCaptureTest, MemoryStaysAsItIsWhileItsCallerLooksAtIt) {
  Recording recording(without_trace());
  const Layers layers = bind(recording, 2);
  want(recording, layers);
  const auto one = [&](Caller& caller, uint32_t again) {
    caller.add(7, 0, 20);
    EXPECT_TRUE(execute(recording.steps(), layers, router, {run(7, 0, 20)}, {.again = again}));
    expect_rows(caller.close(), router, 0, 7, {{0, 20}}, kAllFields, again);
  };
  ino_t file = 0;
  {
    Caller first(recording);
    file = first.memory().file();
    one(first, 1);
    Caller second(recording);
    EXPECT_NE(second.memory().file(), file);
    one(second, 2);
    expect_rows(first.read(), router, 0, 7, {{0, 20}}, kAllFields, 1);
  }
  Caller third(recording);
  EXPECT_EQ(third.memory().file(), file);
  one(third, 3);
}

}  // namespace
}  // namespace moe_native
