// What the recorder puts into the ring for captures.
#include <atomic>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "capture/fake_router.h"
#include "core/step_recorder_fixture.h"

namespace moe_native {
namespace {

using test::FakeRouter;
using test::FakeTensors;
using Runs = std::vector<moe_native::Run>;

struct StepRecorderCaptureTest : StepRecorderTest {
  bool execute(const std::vector<Binding*>& layers, const Runs& runs, bool announced = false) {
    return test::execute(recorder, layers, router, runs, {.announced = announced});
  }
  void want(const std::vector<Binding*>& layers, uint32_t fields) {
    recorder.capture(fields);
    for (Binding* b : layers) recorder.want(*b, true);
  }
  Begun begin(int64_t rows) {
    const RowSpan span{0, rows};
    return recorder.begin_step({&span, 1});
  }
  FakeRouter router;
};

TEST_F(StepRecorderCaptureTest, FlagsSayWhatTheTraceHasAndWhatCapturesWant) {
  const auto layers = test::bind_layers(recorder, 4, 60, 4);  // the trace has ids and weights of 0 and 1
  for (const int layer : {2, 3}) recorder.enable(*layers[layer], false);
  want({layers[0], layers[2]}, kFieldLogits | kFieldHidden);
  ASSERT_TRUE(execute(layers, {run(0, 0, 3)}));
  const Descriptor* both = next();
  EXPECT_EQ(both->layer, 0u);
  EXPECT_EQ(both->flags, kCaptured | kCapturedLogits | kCapturedHidden);
  EXPECT_EQ(both->weights_dtype, DType::kF32);
  EXPECT_EQ(both->logits_dtype, DType::kBF16);
  EXPECT_EQ(both->hidden_dtype, DType::kF16);
  const Descriptor* of_trace = next();
  EXPECT_EQ(of_trace->layer, 1u);
  EXPECT_EQ(of_trace->flags, 0u);
  EXPECT_EQ(of_trace->logits_dtype, DType::kNone);
  EXPECT_EQ(of_trace->hidden_dtype, DType::kNone);
  const Descriptor* of_captures = next();
  EXPECT_EQ(of_captures->layer, 2u);
  EXPECT_EQ(of_captures->flags, kCaptured | kCapturedOnly);
  EXPECT_EQ(of_captures->weights_dtype, DType::kNone);
  EXPECT_EQ(of_captures->hidden_dtype, DType::kF16);
  const Descriptor* step = next();
  EXPECT_EQ(step->kind, RecordKind::kStep) << "layer 3 is nobody's";
  EXPECT_EQ(step->flags, 0u);
  expect_adds_up();
}

TEST_F(StepRecorderCaptureTest, OnlyColumnsThatTheTraceLacksAreMarked) {
  const auto layers = test::bind_layers(recorder, 1, 60, 4);
  recorder.want(*layers[0], true);
  const auto flags = [&](uint32_t traced, uint32_t captured, bool counted = false) {
    recorder.configure(traced, counted);
    recorder.capture(captured);
    EXPECT_TRUE(execute(layers, {run(0, 0, 3)}));
    const uint32_t of_layer = next()->flags;
    EXPECT_EQ(next()->flags, 0u);
    return of_layer;
  };
  const uint32_t all = kFieldIds | kFieldWeights | kFieldLogits | kFieldHidden;
  EXPECT_EQ(flags(kFieldIds, kFieldIds), kCaptured);
  EXPECT_EQ(flags(kFieldIds, kFieldWeights), kCaptured | kCapturedWeights);
  EXPECT_EQ(flags(kFieldIds, all), kCaptured | kCapturedWeights | kCapturedLogits | kCapturedHidden);
  EXPECT_EQ(flags(all, all), kCaptured);
  EXPECT_EQ(flags(all, kFieldIds), kCaptured);
  EXPECT_EQ(flags(kFieldLogits, kFieldHidden, true), kCaptured | kCapturedHidden | kStepCounted);
  EXPECT_EQ(flags(kFieldIds, 0), 0u);
}

TEST_F(StepRecorderCaptureTest, TheFieldsAreThoseOfBoth) {
  EXPECT_EQ(recorder.fields(), kFieldIds | kFieldWeights);
  recorder.capture(kFieldHidden);
  EXPECT_EQ(recorder.fields(), kFieldIds | kFieldWeights | kFieldHidden);
  recorder.capture(0);
  EXPECT_EQ(recorder.fields(), kFieldIds | kFieldWeights);
}

TEST_F(StepRecorderCaptureTest, PausedStepsAreRecordedForCapturesAlone) {
  const auto layers = test::bind_layers(recorder, 2, 60, 4);
  want({layers[1]}, kFieldIds);
  recorder.pause(true);
  ASSERT_EQ(begin(3), Begun::kForCaptures);
  EXPECT_TRUE(recorder.step_open());
  recorder.abort_step();
  ASSERT_TRUE(execute(layers, {run(0, 0, 3)}));
  const Descriptor* aborted = next();
  EXPECT_EQ(aborted->flags, kStepAborted | kCapturedOnly);
  const Descriptor* layer = next();
  EXPECT_EQ(layer->layer, 1u);
  EXPECT_EQ(layer->step, 1u);
  EXPECT_EQ(layer->flags, kCaptured | kCapturedOnly);
  EXPECT_EQ(layer->weights_dtype, DType::kNone);
  const Descriptor* step = next();
  EXPECT_EQ(step->kind, RecordKind::kStep);
  EXPECT_EQ(step->flags, kCapturedOnly);
  EXPECT_EQ(step->runs, 1u);
  EXPECT_EQ(next(), nullptr);
}

TEST_F(StepRecorderCaptureTest, WhatIsCapturedWhilePausedCountsAsPausedAlone) {
  const auto layers = test::bind_layers(recorder, 2, 60, 4);
  want(layers, kFieldIds);
  recorder.pause(true);
  ASSERT_TRUE(execute({layers[0]}, {run(0, 0, 3)}));  // the other layer has no row
  begin(4);
  recorder.abort_step();
  begin(5);
  recorder.close();
  EXPECT_EQ(t.ring.losses(Loss::kPaused).steps, 3u);
  EXPECT_EQ(t.ring.losses(Loss::kPaused).rows, 12u);
  for (const Loss cause : {Loss::kRingFull, Loss::kTooLarge, Loss::kAborted, Loss::kIncomplete}) {
    EXPECT_EQ(t.ring.losses(cause).steps, 0u);
    EXPECT_EQ(t.ring.losses(cause).layers, 0u);
    EXPECT_EQ(t.ring.losses(cause).rows, 0u);
  }
  EXPECT_EQ(count(kStepsBegun), 0u);
  EXPECT_EQ(count(kStepsCommitted), 0u);
}

TEST_F(StepRecorderCaptureTest, ALayerThatOnlyCapturesWantIsNoLossOfTheTrace) {
  const auto layers = test::bind_layers(recorder, 2, 60, 4);
  recorder.enable(*layers[1], false);
  want(layers, kFieldIds);
  ASSERT_TRUE(execute({layers[0]}, {run(0, 0, 3)}));
  EXPECT_EQ(t.ring.losses(Loss::kIncomplete).layers, 0u);
  begin(3);
  recorder.abort_step();
  EXPECT_EQ(t.ring.losses(Loss::kAborted).layers, 1u);
  expect_adds_up();
}

TEST_F(StepRecorderCaptureTest, TensorsAndThreadsThatOnlyCapturesLackAreNoLossOfTheTrace) {
  const auto layers = test::bind_layers(recorder, 3, 60, 4);
  want(layers, kFieldIds);
  recorder.enable(*layers[1], false);
  const Routed routed(3, 4, 60);
  LayerInput unusable = routed.input();
  unusable.ids.dtype = DType::kF32;
  for (const bool paused : {false, true}) {
    recorder.pause(paused);
    begin(3);
    for (Binding* b : layers) recorder.record(*b, unusable);
    recorder.abort_step();
    begin(3);
    recorder.record(*layers[0], routed.input());  // has the only lane
    for (Binding* b : layers) std::thread([&] { recorder.record(*b, routed.input()); }).join();
    recorder.abort_step();
  }
  EXPECT_EQ(t.ring.losses(Loss::kBadInput).layers, 2u);
  EXPECT_EQ(t.ring.losses(Loss::kBadInput).rows, 6u);
  EXPECT_EQ(t.ring.losses(Loss::kNoLane).layers, 1u);
  EXPECT_EQ(t.ring.losses(Loss::kNoLane).rows, 3u);
  const std::string why = ": expert ids must be int32, int64, uint16 or uint32";
  const std::vector<std::string> said = {"layer 0 is neither recorded nor captured" + why,
                                         "layer 1 is not captured" + why,
                                         "layer 2 is neither recorded nor captured" + why};
  EXPECT_EQ(messages.take(), said) << "once a layer";
}

TEST_F(StepRecorderCaptureTest, WhatOneOfBothDoesNotAskForCostsItNothing) {
  const auto layers = test::bind_layers(recorder, 1, 60, 4);
  const Routed routed(3, 4, 60);
  LayerInput input = routed.input(true);
  const auto layer_of = [&](uint32_t traced, uint32_t captured) {
    recorder.configure(traced, false);
    want(layers, captured);
    begin(3);
    recorder.record(*layers[0], input);
    StepTable table;
    const Runs runs = {run(0, 0, 3)};
    table.runs = runs;
    EXPECT_TRUE(recorder.end_step(table));
    const Descriptor* d = next();
    if (d->kind == RecordKind::kLayer) next();
    return d;
  };
  input.logits.width = 0;  // the router has other logits than are known
  const Descriptor* of_trace = layer_of(kFieldIds, kFieldLogits);
  ASSERT_EQ(of_trace->kind, RecordKind::kLayer);
  EXPECT_EQ(of_trace->flags, 0u);
  EXPECT_EQ(t.ring.losses(Loss::kBadInput).layers, 0u);
  EXPECT_EQ(count(kLostForCaptures), 1u);
  const Descriptor* of_captures = layer_of(kFieldLogits, kFieldIds);
  ASSERT_EQ(of_captures->kind, RecordKind::kLayer);
  EXPECT_EQ(of_captures->flags, kCaptured | kCapturedOnly);
  EXPECT_EQ(t.ring.losses(Loss::kBadInput).layers, 1u);
  EXPECT_EQ(count(kLostForCaptures), 1u);
  EXPECT_EQ(layer_of(kFieldLogits, kFieldLogits)->kind, RecordKind::kStep);
  EXPECT_EQ(t.ring.losses(Loss::kBadInput).layers, 2u);
  EXPECT_EQ(count(kLostForCaptures), 2u);
  const std::string why = ": router logits must be a tensor of [rows, experts], with as many rows as the ids";
  const std::vector<std::string> said = {"layer 0 is not captured" + why, "layer 0 is not recorded" + why};
  EXPECT_EQ(messages.take(), said) << "each loss once";
  expect_adds_up();
}

TEST_F(StepRecorderCaptureTest, WhatCapturesLoseIsCountedForThem) {
  const auto layers = test::bind_layers(recorder, 2, 60, 4);
  begin(3);
  recorder.abort_step();
  EXPECT_EQ(count(kLostForCaptures), 0u) << "nothing is captured";
  want(layers, kFieldIds);
  for (const bool paused : {false, true}) {
    recorder.pause(paused);
    begin(3);
    recorder.abort_step();
  }
  EXPECT_EQ(count(kLostForCaptures), 2u);
  recorder.pause(false);
  ASSERT_TRUE(execute(layers, {run(0, 0, 3)}));
  EXPECT_EQ(count(kLostForCaptures), 2u);
}

TEST_F(StepRecorderCaptureTest, PausingIsForTheNextStep) {
  const auto layers = test::bind_layers(recorder, 1, 60, 4);
  want(layers, kFieldIds);
  const RowSpan span{0, 3};
  const Runs runs = {run(0, 0, 3)};
  StepTable table;
  table.runs = runs;
  for (const bool paused : {false, true}) {
    recorder.pause(paused);
    recorder.begin_step({&span, 1});
    recorder.pause(!paused);
    recorder.record(*layers[0], FakeTensors(router, 0, runs).input());
    ASSERT_TRUE(recorder.end_step(table));
    EXPECT_EQ(next()->flags, paused ? kCaptured | kCapturedOnly : kCaptured);
    EXPECT_EQ(next()->flags, paused ? kCapturedOnly : 0u);
  }
  EXPECT_EQ(count(kStepsCommitted), 1u);
  expect_adds_up();
}

TEST_F(StepRecorderCaptureTest, WithoutACapturePausedStepsAreNot) {
  const auto layers = test::bind_layers(recorder, 1, 60, 4);
  want(layers, kFieldIds);
  recorder.pause(true);
  ASSERT_TRUE(execute(layers, {run(0, 0, 3)}));
  recorder.capture(0);
  EXPECT_EQ(begin(3), Begun::kPaused);
  EXPECT_FALSE(recorder.step_open());
  EXPECT_EQ(recorder.step_number(), 1);
}

TEST_F(StepRecorderCaptureTest, LayersOfCapturesAreAdmittedLikeOthers) {
  const auto layers = test::bind_layers(recorder, 600, 60, 4);  // more than half of the descriptors
  for (Binding* b : layers) recorder.enable(*b, false);
  const auto flags = [&] {
    begin(1);
    recorder.record(*layers[0], FakeTensors(router, 0, Runs{run(0, 0, 1)}).input());
    recorder.abort_step();
    const uint32_t of_layer = next()->flags;
    EXPECT_EQ(next()->kind, RecordKind::kStep);
    return of_layer;
  };
  want({layers[0]}, kFieldIds);
  EXPECT_EQ(flags(), kCaptured | kCapturedOnly);
  want(layers, kFieldIds);
  EXPECT_EQ(flags(), kCaptured | kCapturedOnly | kStepStreamed);
}

TEST_F(StepRecorderCaptureTest, NoStepIsDroppedWhileSomethingIsCaptured) {
  const auto layers = test::bind_layers(recorder, 4, 60, 4);
  const Routed routed(1000, 4, 60);
  want(layers, kFieldIds);
  EXPECT_TRUE(recorder.blocks());
  std::atomic<bool> done{false};
  std::thread drain([&] {
    // Nothing is drained before the producer waits: a step has begun and does not get on.
    for (uint64_t begun = 0, now; (now = count(kStepsBegun)) == 0 || now != begun; begun = now) {
      std::this_thread::sleep_for(std::chrono::milliseconds(400));  // longer than `drop` would ever wait
    }
    LaneConsumer lane(t.ring.lane(0));
    while (!done.load() || lane.peek() != nullptr) {
      while (lane.peek() != nullptr) lane.take();
      lane.release(lane.position());
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  });
  for (int step = 0; step < 100; ++step) EXPECT_TRUE(test::record_step(recorder, layers, routed, {run(0, 0, 1000)}));
  done = true;
  drain.join();
  EXPECT_EQ(count(kStepsCommitted), 100u);
  EXPECT_EQ(t.ring.losses(Loss::kRingFull).steps, 0u);

  recorder.capture(0);
  EXPECT_FALSE(recorder.blocks());
  int refused = 0;
  for (int step = 0; step < 50; ++step)
    refused += test::record_step(recorder, layers, routed, {run(0, 0, 1000)}) ? 0 : 1;
  EXPECT_GT(refused, 0) << "and afterwards as before";
  expect_adds_up();
}

// The disk is stuck, and the trace may lose steps: then a capture must not stop the server for good.
TEST(StepRecorderPatienceTest, ACaptureWaitsItsTimeAndNotForEver) {
  for (const Overflow overflow : {Overflow::kDrop, Overflow::kBlock}) {
    test::TestRing t;
    Messages messages;
    StepRecorder recorder(t.ring, overflow, kFieldIds, messages, std::chrono::milliseconds(600));
    const auto layers = test::bind_layers(recorder, 4, 60, 4);
    recorder.capture(kFieldIds);
    for (Binding* b : layers) recorder.want(*b, true);
    const Routed routed(1000, 4, 60);
    std::atomic<bool> blocked{true};
    std::thread closer([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(1500));
      if (blocked) recorder.close();
    });
    int kept = 0;
    while (test::record_step(recorder, layers, routed, {run(0, 0, 1000)})) ++kept;
    blocked = false;
    closer.join();
    EXPECT_GT(kept, 3);
    EXPECT_EQ(t.ring.counter(kLostForCaptures).load(), 1u);
    EXPECT_GE(t.ring.counter(kBlockedNs).load(), overflow == Overflow::kDrop ? 600'000'000u : 1'000'000'000u);
    EXPECT_EQ(recorder.begin_step({}) == Begun::kPaused, overflow == Overflow::kBlock) << "is it closed";
  }
}

TEST_F(StepRecorderCaptureTest, AStepThatIsStreamedWaitsAsLongAsItTakes) {
  const auto layers = test::bind_layers(recorder, 40, 60, 4);
  want(layers, kFieldIds);
  std::atomic<bool> done{false};
  std::thread drain([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(500));
    LaneConsumer lane(t.ring.lane(0));
    while (!done.load()) {
      while (lane.peek() != nullptr) lane.take();
      lane.release(lane.position());
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  });
  EXPECT_TRUE(test::record_step(recorder, layers, Routed(4000, 4, 60), {run(0, 0, 4000)}));
  done = true;
  drain.join();
  EXPECT_EQ(t.ring.losses(Loss::kTooLarge).steps, 0u);
}

TEST_F(StepRecorderCaptureTest, AnAnnouncementIsARecordInFrontOfTheLayers) {
  const auto layers = test::bind_layers(recorder, 1, 60, 4);
  want(layers, kFieldIds);
  const Runs runs = {run(5, 10, 2, 69), run(6, 0, 1)};
  for (const bool paused : {false, true}) {
    recorder.pause(paused);
    ASSERT_TRUE(execute(layers, runs, true));
    const Descriptor* d = next();
    ASSERT_NE(d, nullptr);
    EXPECT_EQ(d->kind, RecordKind::kRows);
    EXPECT_EQ(d->flags, kCapturedOnly);
    EXPECT_EQ(d->step, paused ? 1u : 0u);
    EXPECT_EQ(d->rows, 3u);
    ASSERT_EQ(d->runs, 2u);
    EXPECT_EQ(d->bytes, 32u);
    EXPECT_EQ(d->ids_dtype, DType::kNone);
    EXPECT_EQ(std::memcmp(consumer.payload(*d), runs.data(), 32), 0);
    EXPECT_EQ(next()->kind, RecordKind::kLayer);
    EXPECT_EQ(next()->kind, RecordKind::kStep);
  }
  expect_adds_up();
}

TEST_F(StepRecorderCaptureTest, WhereNothingIsCapturedNothingIsAnnounced) {
  const Runs runs = {run(5, 0, 3)};
  recorder.announce(runs);
  begin(3);
  recorder.announce(runs);
  recorder.abort_step();
  recorder.capture(kFieldIds);
  recorder.announce(runs);
  EXPECT_EQ(next()->kind, RecordKind::kStep);
  EXPECT_EQ(next(), nullptr);
}

TEST_F(StepRecorderCaptureTest, AnAnnouncementThatFindsNoRoomIsLeftOut) {
  recorder.capture(kFieldIds);
  begin(3);
  recorder.announce(Runs(t.ring.lane(0).arena_bytes / 4 / sizeof(moe_native::Run) + 1, run(5, 0, 1)));
  EXPECT_EQ(next(), nullptr);
  const uint32_t descriptors = t.ring.lane(0).descriptor_count;
  for (uint32_t i = 0; i < descriptors + 10; ++i) recorder.announce(Runs{run(5, 0, 3)});
  uint32_t announced = 0;
  while (next() != nullptr) ++announced;
  EXPECT_EQ(announced, descriptors);
  EXPECT_EQ(count(kBlockedNs), 0u);
  recorder.close();
}

}  // namespace
}  // namespace moe_native
