#include "core/step_recorder.h"

#include <gtest/gtest.h>

#include <thread>

#include "core/step_recorder_fixture.h"
#include "segment/assembler.h"

namespace moe_native {
namespace {

TEST_F(StepRecorderTest, AStepIsItsLayersAndThenItsRecord) {
  const auto layers = test::bind_layers(recorder, 2, 60, 4);
  const Routed routed(3, 4, 60);
  ASSERT_TRUE(test::record_step(recorder, layers, routed, {run(5, 10, 3, 69)}, test::note(1, 5, "{}"), 1));
  for (uint16_t layer = 0; layer < 2; ++layer) {
    const Descriptor* d = next();
    ASSERT_NE(d, nullptr);
    EXPECT_EQ(d->kind, RecordKind::kLayer);
    EXPECT_EQ(d->layer, layer);
    EXPECT_EQ(d->rows, 3u);
    EXPECT_EQ(d->ids_dtype, DType::kU8);
    EXPECT_EQ(d->weights_dtype, DType::kF32);
    const LayerColumns at = layer_columns(*d);
    EXPECT_EQ(at.bytes, d->bytes);
    const auto* ids = reinterpret_cast<const uint8_t*>(consumer.payload(*d) + at.ids);
    for (size_t i = 0; i < routed.ids.size(); ++i) EXPECT_EQ(ids[i], routed.ids[i]);
    EXPECT_EQ(std::memcmp(consumer.payload(*d) + at.weights, routed.weights.data(), routed.weights.size() * 4), 0);
  }
  const Descriptor* d = next();
  ASSERT_NE(d, nullptr);
  EXPECT_EQ(d->kind, RecordKind::kStep);
  EXPECT_EQ(d->rows, 3u);
  EXPECT_EQ(d->runs, 1u);
  EXPECT_EQ(d->notes, 1u);
  EXPECT_EQ(reinterpret_cast<const moe_native::Run*>(consumer.payload(*d))->request, 5u);
  EXPECT_EQ(next(), nullptr);
  EXPECT_EQ(count(kStepsCommitted), 1u);
}

TEST_F(StepRecorderTest, NothingIsRecordedOutsideAStep) {
  const auto layers = test::bind_layers(recorder, 1, 60, 4);
  recorder.record(*layers[0], Routed(3, 4, 60).input());
  EXPECT_EQ(next(), nullptr);
  EXPECT_FALSE(recorder.end_step({}));
  EXPECT_EQ(count(kStepsBegun), 0u);
}

TEST_F(StepRecorderTest, PaddingIsLeftOut) {
  const auto layers = test::bind_layers(recorder, 1, 60, 2);
  const Routed routed(8, 2, 60);
  const std::vector<RowSpan> spans = {{1, 2}, {5, 1}};
  ASSERT_EQ(recorder.begin_step(spans), Begun::kAdmitted);
  recorder.record(*layers[0], routed.input());
  const std::vector<moe_native::Run> runs = {run(0, 0, 3)};
  StepTable table;
  table.runs = runs;
  ASSERT_TRUE(recorder.end_step(table));
  const Descriptor* d = next();
  ASSERT_EQ(d->rows, 3u);
  const auto* ids = reinterpret_cast<const uint8_t*>(consumer.payload(*d));
  size_t at = 0;
  for (size_t row : {1u, 2u, 5u}) {
    for (size_t j = 0; j < 2; ++j) EXPECT_EQ(ids[at++], routed.ids[row * 2 + j]);
  }
}

TEST_F(StepRecorderTest, ARouterCalledInChunksIsOneLayer) {
  const auto layers = test::bind_layers(recorder, 1, 60, 2);
  const Routed first(4, 2, 60, 0), second(3, 2, 60, 11);
  const RowSpan span{2, 4};  // rows 2, 3 of the first call and 4, 5, the first two of the second
  ASSERT_EQ(recorder.begin_step({&span, 1}), Begun::kAdmitted);
  recorder.record(*layers[0], first.input());
  recorder.record(*layers[0], second.input());
  const std::vector<moe_native::Run> runs = {run(0, 0, 4)};
  StepTable table;
  table.runs = runs;
  ASSERT_TRUE(recorder.end_step(table));
  const Descriptor* a = next();
  const Descriptor* b = next();
  EXPECT_EQ(a->first_row, 0u);
  EXPECT_EQ(a->rows, 2u);
  EXPECT_EQ(b->first_row, 2u);
  EXPECT_EQ(b->rows, 2u);
  EXPECT_EQ(reinterpret_cast<const uint8_t*>(consumer.payload(*a))[0], first.ids[4]);
  EXPECT_EQ(reinterpret_cast<const uint8_t*>(consumer.payload(*b))[0], second.ids[0]);
}

TEST_F(StepRecorderTest, APlaceSaysWhichRowsOfATensorAreWhichOfTheStep) {
  const auto layers = test::bind_layers(recorder, 2, 60, 2);
  ASSERT_EQ(recorder.begin_placed_step(5), Begun::kAdmitted);
  recorder.narrow(3);
  const Place places[] = {{7, 4, 1, 2}, {9, 6, 1, 2}};
  recorder.place(places);
  const Routed seven(7, 2, 60), nine(9, 2, 60, 5);
  recorder.record(*layers[0], seven.input());
  recorder.record(*layers[1], nine.input());
  for (const auto& [routed, start] : {std::pair{&seven, 4}, std::pair{&nine, 6}}) {
    const Descriptor* d = next();
    ASSERT_NE(d, nullptr);
    EXPECT_EQ(d->first_row, 1u);
    EXPECT_EQ(d->rows, 2u);
    EXPECT_EQ(d->step_rows, 3u);
    const auto* ids = reinterpret_cast<const uint8_t*>(consumer.payload(*d));
    for (size_t i = 0; i < 4; ++i) EXPECT_EQ(ids[i], routed->ids[static_cast<size_t>(start) * 2 + i]);
  }
  const std::vector<moe_native::Run> runs = {run(0, 0, 3)};
  StepTable table;
  table.runs = runs;
  EXPECT_TRUE(recorder.end_step(table));
}

TEST_F(StepRecorderTest, WithoutAFittingPlaceALayerIsLostAndSaid) {
  const auto layers = test::bind_layers(recorder, 1, 60, 2);
  const auto lost = [&] { return t.ring.losses(Loss::kBadInput).layers; };
  const std::vector<std::vector<Place>> unfitting = {
      {},                            // nothing was said
      {{6, 0, 0, 3}, {8, 0, 0, 3}},  // of tensors of 7 rows
      {{7, 5, 0, 3}},                // beyond the tensor
      {{7, 0, 1, 3}},                // beyond the step
  };
  for (size_t i = 0; i < unfitting.size(); ++i) {
    ASSERT_EQ(recorder.begin_placed_step(3), Begun::kAdmitted);
    recorder.place(unfitting[i]);
    recorder.record(*layers[0], Routed(7, 2, 60).input());
    EXPECT_EQ(lost(), i + 1);
    const std::vector<moe_native::Run> runs = {run(0, 0, 3)};
    StepTable table;
    table.runs = runs;
    EXPECT_TRUE(recorder.end_step(table));
    EXPECT_EQ(next()->kind, RecordKind::kStep);
  }
  // What was said in an earlier step, or of another recorder, does not hold.
  recorder.begin_placed_step(3);
  const Place any[] = {{-1, 0, 0, 3}};
  recorder.place(any);
  recorder.abort_step();
  recorder.begin_placed_step(3);
  recorder.record(*layers[0], Routed(7, 2, 60).input());
  EXPECT_EQ(lost(), unfitting.size() + 1);
  EXPECT_EQ(t.ring.losses(Loss::kIncomplete).layers, 0u);
  EXPECT_EQ(messages.take().size(), 1u);
}

TEST_F(StepRecorderTest, AbortedStepsAreCountedAndMarked) {
  const auto layers = test::bind_layers(recorder, 2, 60, 4);
  const RowSpan span{0, 3};
  ASSERT_EQ(recorder.begin_step({&span, 1}), Begun::kAdmitted);
  recorder.record(*layers[0], Routed(3, 4, 60).input());
  recorder.abort_step();
  EXPECT_EQ(next()->kind, RecordKind::kLayer);
  const Descriptor* d = next();
  EXPECT_EQ(d->kind, RecordKind::kStep);
  EXPECT_EQ(d->flags, kStepAborted);
  EXPECT_EQ(t.ring.losses(Loss::kAborted).steps, 1u);
  EXPECT_EQ(t.ring.losses(Loss::kAborted).rows, 3u);
  expect_adds_up();
}

TEST_F(StepRecorderTest, OnlyOneStepAtATime) {
  const RowSpan span{0, 1};
  EXPECT_EQ(recorder.begin_step({&span, 1}), Begun::kAdmitted);
  EXPECT_EQ(recorder.begin_step({&span, 1}), Begun::kNested);
  recorder.abort_step();
}

TEST_F(StepRecorderTest, PausedStepsAreCountedApartAndHaveNumbersAllTheSame) {
  const RowSpan span{0, 1};
  const RowSpan paused[] = {{0, 3}, {5, 4}};
  recorder.pause(true);
  EXPECT_TRUE(recorder.paused());
  EXPECT_EQ(recorder.begin_step(paused), Begun::kPaused);
  EXPECT_EQ(recorder.begin_step({&span, 1}), Begun::kPaused);
  recorder.pause(false);
  EXPECT_EQ(recorder.step_number(), 1);
  EXPECT_EQ(t.ring.losses(Loss::kPaused).steps, 2u);
  EXPECT_EQ(t.ring.losses(Loss::kPaused).rows, 8u);
  EXPECT_EQ(recorder.begin_step({&span, 1}), Begun::kAdmitted);
  recorder.abort_step();
  EXPECT_EQ(count(kStepsBegun), 1u);
  EXPECT_EQ(recorder.step_number(), 2);
  expect_adds_up();
}

TEST_F(StepRecorderTest, FieldsAndLayersChangeBetweenSteps) {
  const auto layers = test::bind_layers(recorder, 2, 60, 4);
  const Routed routed(3, 4, 60);
  ASSERT_TRUE(test::record_step(recorder, layers, routed, {run(0, 0, 3)}, "", 0, true));
  recorder.configure(kFieldIds | kFieldLogits, true);
  recorder.enable(*layers[0], false);
  ASSERT_TRUE(test::record_step(recorder, layers, routed, {run(0, 3, 3)}, "", 0, true));
  for (int layer = 0; layer < 2; ++layer) {
    const Descriptor* d = next();
    EXPECT_EQ(d->layer, layer);
    EXPECT_NE(d->weights_dtype, DType::kNone);
    EXPECT_EQ(d->flags, 0u);
  }
  EXPECT_EQ(next()->kind, RecordKind::kStep);
  const Descriptor* d = next();
  EXPECT_EQ(d->layer, 1);
  EXPECT_EQ(d->weights_dtype, DType::kNone);
  EXPECT_EQ(d->logits_dtype, DType::kF32);
  EXPECT_EQ(d->flags, kStepCounted);
  EXPECT_EQ(next()->kind, RecordKind::kStep);
  EXPECT_EQ(t.ring.losses(Loss::kIncomplete).layers, 0u);  // the layer was not asked for
  expect_adds_up();
}

TEST_F(StepRecorderTest, ATensorOfAnotherWidthIsNotTakenForLogits) {
  const Routed routed(3, 4, 60);
  recorder.configure(kFieldIds | kFieldLogits, false);
  std::vector<Binding*> layers;
  for (const uint32_t expected : {0u, 60u, 61u}) {
    layers.push_back(binding(recorder.bind(static_cast<uint16_t>(layers.size()), 60, 4, true, true, expected)));
  }
  ASSERT_TRUE(test::record_step(recorder, layers, routed, {run(0, 0, 3)}, "", 0, true));
  for (const DType dtype : {DType::kF32, DType::kF32, DType::kNone}) EXPECT_EQ(next()->logits_dtype, dtype);
  EXPECT_EQ(next()->kind, RecordKind::kStep);
  expect_adds_up();
}

TEST_F(StepRecorderTest, BadInputIsCountedSaidOnceAndHarmless) {
  const auto layers = test::bind_layers(recorder, 2, 60, 4);
  Routed routed(3, 4, 60);
  for (int step = 0; step < 3; ++step) {
    const RowSpan span{0, 3};
    ASSERT_EQ(recorder.begin_step({&span, 1}), Begun::kAdmitted);
    LayerInput bad = routed.input();
    bad.weights.dtype = DType::kNone;
    recorder.record(*layers[0], bad);
    recorder.record(*layers[1], routed.input());
    const std::vector<moe_native::Run> runs = {run(0, 0, 3)};
    StepTable table;
    table.runs = runs;
    EXPECT_TRUE(recorder.end_step(table)) << "the other layer is recorded";
  }
  EXPECT_EQ(t.ring.losses(Loss::kBadInput).layers, 3u);
  EXPECT_EQ(t.ring.losses(Loss::kBadInput).rows, 9u);
  ASSERT_TRUE(messages.pending());
  const auto texts = messages.take();
  ASSERT_EQ(texts.size(), 1u);
  EXPECT_NE(texts[0].find("layer 0"), std::string::npos);
  EXPECT_NE(texts[0].find("float32"), std::string::npos);
  expect_adds_up();
}

TEST_F(StepRecorderTest, EveryUnusableTensorIsFound) {
  const auto layers = test::bind_layers(recorder, 1, 60, 4);
  const Routed routed(3, 4, 60);
  const auto attempt = [&](auto&& spoil) {
    const uint64_t before = t.ring.losses(Loss::kBadInput).layers;
    const RowSpan span{0, 3};
    EXPECT_EQ(recorder.begin_step({&span, 1}), Begun::kAdmitted);
    LayerInput in = routed.input(true);
    spoil(in);
    recorder.record(*layers[0], in);
    recorder.abort_step();
    return t.ring.losses(Loss::kBadInput).layers - before;
  };
  EXPECT_EQ(attempt([](LayerInput&) {}), 0u);
  EXPECT_EQ(attempt([](LayerInput& in) { in.ids = {}; }), 1u);
  EXPECT_EQ(attempt([](LayerInput& in) { in.ids.dtype = DType::kF32; }), 1u);
  EXPECT_EQ(attempt([](LayerInput& in) { in.weights.rows = 2; }), 1u);
  EXPECT_EQ(attempt([](LayerInput& in) { in.weights.width = 3; }), 1u);
  EXPECT_EQ(attempt([](LayerInput& in) { in.weights.dtype = DType::kI32; }), 1u);
}

TEST_F(StepRecorderTest, DisabledLayersAreSkipped) {
  Binding* b = binding(recorder.bind(7, 60, 4, false));
  const RowSpan span{0, 3};
  ASSERT_EQ(recorder.begin_step({&span, 1}), Begun::kAdmitted);
  recorder.record(*b, Routed(3, 4, 60).input());
  recorder.abort_step();
  EXPECT_EQ(next()->kind, RecordKind::kStep);
}

TEST_F(StepRecorderTest, DropRefusesWholeStepsWhenFull) {
  const auto layers = test::bind_layers(recorder, 4, 60, 4);
  const Routed routed(1000, 4, 60);
  int refused = 0;
  for (int step = 0; step < 50; ++step)
    refused += test::record_step(recorder, layers, routed, {run(0, 0, 1000)}) ? 0 : 1;
  EXPECT_GT(refused, 0);
  EXPECT_LT(refused, 50);
  EXPECT_EQ(t.ring.losses(Loss::kRingFull).steps, static_cast<uint64_t>(refused));
  EXPECT_EQ(t.ring.losses(Loss::kRingFull).layers, static_cast<uint64_t>(refused) * 4);
  // What is in the ring are whole steps.
  uint64_t layer_records = 0, step_records = 0;
  while (const Descriptor* d = next()) (d->kind == RecordKind::kLayer ? layer_records : step_records) += 1;
  EXPECT_EQ(step_records, count(kStepsCommitted));
  EXPECT_EQ(layer_records, 4 * step_records);
  expect_adds_up();
}

TEST_F(StepRecorderTest, AStepThatNobodyDrainsIsGivenUpAsAWhole) {
  const auto layers = test::bind_layers(recorder, 40, 60, 4);
  const Routed routed(4000, 4, 60);  // 40 layers of 80 KB: three times the ring
  EXPECT_FALSE(test::record_step(recorder, layers, routed, {run(0, 0, 4000)}));
  EXPECT_EQ(t.ring.losses(Loss::kTooLarge).steps, 1u);
  EXPECT_GT(count(kBlockedNs), 0u);
  expect_adds_up();
}

struct TwoLanes : StepRecorderTest {
  TwoLanes() : StepRecorderTest(1 << 20, 2) {}
};

TEST_F(TwoLanes, EachThreadHasItsOwn) {
  const auto layers = test::bind_layers(recorder, 2, 60, 4);
  const Routed routed(3, 4, 60);
  LaneConsumer second(t.ring.lane(1));
  for (int step = 0; step < 5; ++step) {  // a new thread each time: lanes belong to a thread for one step
    const RowSpan span{0, 3};
    ASSERT_EQ(recorder.begin_step({&span, 1}), Begun::kAdmitted);
    recorder.record(*layers[0], routed.input());
    std::thread([&] { recorder.record(*layers[1], routed.input()); }).join();
    const std::vector<moe_native::Run> runs = {run(0, 0, 3)};
    StepTable table;
    table.runs = runs;
    ASSERT_TRUE(recorder.end_step(table));
    EXPECT_EQ(next()->layer, 0u);
    EXPECT_EQ(next()->kind, RecordKind::kStep);
    ASSERT_NE(second.peek(), nullptr);
    EXPECT_EQ(second.peek()->layer, 1u);
    second.take();
  }
}

TEST_F(TwoLanes, AThirdThreadIsCounted) {
  const auto layers = test::bind_layers(recorder, 3, 60, 4);
  const Routed routed(3, 4, 60);
  const RowSpan span{0, 3};
  ASSERT_EQ(recorder.begin_step({&span, 1}), Begun::kAdmitted);
  for (Binding* layer : layers) std::thread([&] { recorder.record(*layer, routed.input()); }).join();
  recorder.abort_step();
  EXPECT_EQ(t.ring.losses(Loss::kNoLane).layers, 1u);
  EXPECT_EQ(t.ring.losses(Loss::kNoLane).rows, 3u);
}

// As under dual-batch overlap: each thread has a half of every layer's rows.
TEST_F(TwoLanes, TwoThreadsWithPlacesCallOneRouter) {
  const auto layers = test::bind_layers(recorder, 8, 60, 2);
  const Routed halves[] = {Routed(4, 2, 60, 1), Routed(4, 2, 60, 30)};
  ASSERT_EQ(recorder.begin_placed_step(6), Begun::kAdmitted);
  std::vector<std::thread> threads;
  for (int64_t half = 0; half < 2; ++half) {
    threads.emplace_back([&, half] {
      const Place place{4, 0, half * 4, half == 0 ? 4 : 2};  // the last two rows are padding
      recorder.place({&place, 1});
      for (Binding* layer : layers) recorder.record(*layer, halves[half].input());
    });
  }
  for (std::thread& thread : threads) thread.join();
  const std::vector<moe_native::Run> runs = {run(0, 0, 6)};
  StepTable table;
  table.runs = runs;
  ASSERT_TRUE(recorder.end_step(table));
  Captures captures;
  Assembler assembler(t.ring, captures);
  while (assembler.poll()) {
  }
  ASSERT_EQ(assembler.ready().size(), 1u);
  const StepData& step = assembler.ready().front();
  EXPECT_EQ(step.shapes.size(), layers.size());
  for (const Piece& piece : step.pieces) {
    const Routed& half = halves[piece.first_row / 4];
    EXPECT_EQ(piece.rows, piece.first_row == 0 ? 4u : 2u);
    for (size_t i = 0; i < piece.rows * 2; ++i) {
      EXPECT_EQ(reinterpret_cast<const uint8_t*>(piece.ids)[i], half.ids[i]);
    }
  }
  EXPECT_EQ(t.ring.losses(Loss::kIncomplete).layers, 0u);
}

struct Blocking : StepRecorderTest {
  Blocking() : StepRecorderTest(1 << 20, 1, Overflow::kBlock) {}
};

TEST_F(Blocking, NothingIsLostAndTheWaitIsCounted) {
  const auto layers = test::bind_layers(recorder, 4, 60, 4);
  const Routed routed(1000, 4, 60);
  std::atomic<bool> done{false};
  uint64_t steps = 0;
  std::thread drain([&] {
    // Nothing is drained before the producer has come to wait: a step has begun and does not get on.
    for (uint64_t begun = 0, now; (now = count(kStepsBegun)) == 0 || now != begun; begun = now) {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
    LaneConsumer lane(t.ring.lane(0));
    while (!done.load() || lane.peek() != nullptr) {
      while (const Descriptor* d = lane.peek()) {
        steps += d->kind == RecordKind::kStep ? 1 : 0;
        lane.take();
      }
      lane.release(lane.position());
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  });
  for (int step = 0; step < 100; ++step) ASSERT_TRUE(test::record_step(recorder, layers, routed, {run(0, 0, 1000)}));
  done = true;
  drain.join();
  EXPECT_EQ(steps, 100u);
  EXPECT_EQ(count(kStepsCommitted), 100u);
  EXPECT_GT(count(kBlockedNs), 0u);
}

TEST_F(StepRecorderTest, ALayerWithoutARowIsCounted) {
  auto layers = test::bind_layers(recorder, 2, 60, 4);
  layers.push_back(binding(recorder.bind(2, 60, 4, true, false)));  // one that a step may leave out
  const auto silent = [&] { return t.ring.losses(Loss::kIncomplete); };
  ASSERT_TRUE(test::record_step(recorder, layers, Routed(3, 4, 60), {run(0, 0, 3)}));
  EXPECT_EQ(silent().layers, 0u);
  ASSERT_TRUE(test::record_step(recorder, {layers[0]}, Routed(3, 4, 60), {run(0, 3, 3)}));
  EXPECT_EQ(silent().layers, 1u);
  EXPECT_EQ(silent().rows, 3u);
  EXPECT_EQ(silent().steps, 0u);
  ASSERT_TRUE(test::record_step(recorder, {}, Routed(0, 4, 60), {}));
  EXPECT_EQ(silent().layers, 1u) << "a step without rows has none to lose";
  expect_adds_up();
}

TEST_F(StepRecorderTest, RowsBehindAnUnusableChunkAreNotTakenForItsRows) {
  const auto layers = test::bind_layers(recorder, 1, 60, 4);
  const Routed routed(10, 4, 60);
  LayerInput unusable = routed.input();
  unusable.weights.dtype = DType::kNone;
  const RowSpan span{0, 20};
  recorder.begin_step({&span, 1});
  recorder.record(*layers[0], routed.input());
  recorder.record(*layers[0], unusable);
  recorder.record(*layers[0], routed.input());
  const std::vector<moe_native::Run> runs = {run(0, 0, 20)};
  StepTable table;
  table.runs = runs;
  recorder.end_step(table);
  ASSERT_EQ(next()->first_row, 0u);
  EXPECT_EQ(next()->kind, RecordKind::kStep);
  EXPECT_EQ(t.ring.losses(Loss::kBadInput).layers, 1u);
  EXPECT_EQ(t.ring.losses(Loss::kIncomplete).layers, 0u) << "counted once";
}

TEST_F(StepRecorderTest, AClosedRecorderTakesNothing) {
  const auto layers = test::bind_layers(recorder, 1, 60, 4);
  const Routed routed(3, 4, 60);
  const RowSpan span{0, 3};
  recorder.begin_step({&span, 1});
  recorder.record(*layers[0], routed.input());
  recorder.close();
  EXPECT_EQ(t.ring.losses(Loss::kAborted).steps, 1u);
  EXPECT_FALSE(recorder.end_step({}));
  recorder.abort_step();
  EXPECT_EQ(recorder.begin_step({&span, 1}), Begun::kPaused);
  expect_adds_up();
}

}  // namespace
}  // namespace moe_native
