#include "segment/drain.h"

#include <gtest/gtest.h>

#include <atomic>
#include <limits>
#include <map>
#include <random>
#include <thread>

#include "segment/drain_fixture.h"

namespace moe_native {
namespace {

TEST_F(DrainTest, FlushMakesEverythingVisible) {
  Recording recording(options());
  const auto layers = test::bind_layers(recording.steps(), 2, 60, 4);
  for (int i = 0; i < 10; ++i)
    ASSERT_TRUE(test::record_step(recording.steps(), layers, Routed(4, 4, 60), {run(0, 0, 4)}));
  ASSERT_TRUE(recording.drain().flush(10));
  ASSERT_EQ(segments().size(), 1u);
  EXPECT_TRUE(segments()[0].ends_with("000000.moe.open"));
  EXPECT_EQ(steps_in(blocks()), 10u);
}

TEST_F(DrainTest, CloseLeavesAClosedSegmentAndNoRing) {
  std::string ring;
  {
    Recording recording(options());
    ring = recording.ring().path();
    const auto layers = test::bind_layers(recording.steps(), 2, 60, 4);
    test::record_step(recording.steps(), layers, Routed(4, 4, 60), {run(0, 0, 4)});
    EXPECT_TRUE(fs::exists(ring));
  }
  EXPECT_FALSE(fs::exists(ring));
  ASSERT_EQ(segments().size(), 1u);
  EXPECT_TRUE(segments()[0].ends_with("000000.moe"));
}

TEST_F(DrainTest, NothingRecordedMakesNoSegment) {
  { Recording recording(options()); }
  EXPECT_TRUE(segments().empty());
}

TEST_F(DrainTest, LossesAloneAreWrittenDown) {
  {
    Recording recording(options());
    const auto layers = test::bind_layers(recording.steps(), 1, 60, 4);
    const RowSpan span{0, 4};
    recording.steps().begin_step({&span, 1});
    recording.steps().abort_step();
  }
  const auto all = blocks();
  ASSERT_EQ(all.size(), 1u);
  EXPECT_EQ(all[0].header.steps, 0u);
  EXPECT_EQ(all[0].cell(EntryField::kLosses, 0, 0, 2), static_cast<uint64_t>(Loss::kAborted));
}

TEST_F(DrainTest, AbortedStepsAloneDoNotFillTheRing) {
  Recording recording(options());
  const auto layers = test::bind_layers(recording.steps(), 4, 60, 4);
  const Routed routed(500, 4, 60);
  for (int i = 0; i < 200; ++i) {  // ten times what the ring holds
    ASSERT_TRUE(begin_and_record(recording, layers, routed)) << i;
    recording.steps().abort_step();
    ASSERT_TRUE(recording.drain().flush(10));
  }
  EXPECT_EQ(recording.ring().losses(Loss::kAborted).steps, 200u);
}

TEST_F(DrainTest, SmallAbortedStepsDoNotFillTheDescriptors) {
  auto o = options(64 << 20);
  o.overflow = Overflow::kBlock;  // it waits for the drain thread, which must see that it has to free them
  Recording recording(o);
  const auto layers = test::bind_layers(recording.steps(), 64, 128, 8);
  const Routed routed(1, 8, 128);
  for (int i = 0; i < 3000; ++i) {  // three times as many records as there are descriptors
    ASSERT_TRUE(begin_and_record(recording, layers, routed)) << i;
    recording.steps().abort_step();
  }
  EXPECT_EQ(recording.ring().losses(Loss::kAborted).steps, 3000u);
}

// Admission guesses a layer's bytes before its first record. A step that turns out wider than the ring is streamed.
TEST_F(DrainTest, AFirstStepThatIsWiderThanGuessedIsKept) {
  for (const Overflow overflow : {Overflow::kDrop, Overflow::kBlock}) {
    auto o = options(1 << 20);
    o.overflow = overflow;
    o.fields = kFieldIds | kFieldWeights | kFieldHidden;
    Recording recording(o);
    const auto layers = test::bind_layers(recording.steps(), 16, 60, 4);
    const Routed routed(256, 4, 60);
    const std::vector<float> hidden(256 * 256, 1.0f);  // 256 KiB a layer
    const RowSpan span{0, 256};
    ASSERT_EQ(recording.steps().begin_step({&span, 1}), Begun::kAdmitted);
    for (Binding* layer : layers) {
      LayerInput in = routed.input();
      in.hidden = {reinterpret_cast<const std::byte*>(hidden.data()), DType::kF32, 256, 256, 256, 1};
      recording.steps().record(*layer, in);
    }
    const std::vector<moe_native::Run> runs = {run(0, 0, 256)};
    StepTable table;
    table.runs = runs;
    EXPECT_TRUE(recording.steps().end_step(table));
  }
}

TEST_F(DrainTest, ARouterThatIsCalledRowByRowIsKept) {
  Recording recording(options(4 << 20));  // 32,000 records of 64 bytes, and 4,096 descriptors
  EXPECT_TRUE(record_step(recording, test::bind_layers(recording.steps(), 16, 60, 4), Routed(1, 4, 60), 2000));
}

TEST_F(DrainTest, AbortedStepsDoNotStarveAStreamedOne) {
  Recording recording(options(1 << 20));
  const auto layers = test::bind_layers(recording.steps(), 1, 60, 4);
  const auto rows_of = [&](double share) {
    return static_cast<int64_t>(share * static_cast<double>(recording.ring().lane(0).arena_bytes) / 20);
  };
  ASSERT_TRUE(record_step(recording, layers, Routed(rows_of(0.2), 4, 60)));
  ASSERT_TRUE(recording.drain().flush(10));
  for (const double share : {0.2, 0.24}) {
    const Routed routed(rows_of(share), 4, 60);
    ASSERT_TRUE(begin_and_record(recording, layers, routed));
    recording.steps().abort_step();
  }
  EXPECT_TRUE(record_step(recording, layers, Routed(rows_of(0.99), 4, 60)));
  EXPECT_EQ(recording.ring().losses(Loss::kTooLarge).steps, 0u);
}

TEST_F(DrainTest, AnAbortedStreamedStepHasNoRowsWritten) {
  auto o = options();
  o.overflow = Overflow::kBlock;
  Recording recording(o);
  const auto layers = test::bind_layers(recording.steps(), 40, 60, 4);
  const Routed routed(4000, 4, 60);
  ASSERT_TRUE(begin_and_record(recording, layers, routed));
  recording.steps().abort_step();
  ASSERT_TRUE(recording.drain().flush(10));
  EXPECT_EQ(recording.drain().totals().rows.load(), 0u);
}

TEST_F(DrainTest, ClosingInTheMiddleOfAStreamedStepTakesItBack) {
  {
    auto o = options();
    o.overflow = Overflow::kBlock;
    Recording recording(o);
    const auto layers = test::bind_layers(recording.steps(), 40, 60, 4);
    const Routed routed(4000, 4, 60);
    ASSERT_TRUE(begin_and_record(recording, layers, routed));
    recording.close();
    EXPECT_EQ(recording.ring().losses(Loss::kAborted).steps, 1u);
  }
  const auto all = blocks();
  uint32_t fragments = 0;
  for (const DecodedBlock& block : all) fragments += block.header.kind == BlockKind::kFragment ? 1 : 0;
  EXPECT_GT(fragments, 0u);
  EXPECT_EQ(all.back().header.kind, BlockKind::kRows);
  EXPECT_EQ(all.back().header.steps, 0u);
  EXPECT_EQ(all.back().header.fragments, fragments);
}

// At exit another thread closes the recorder while the model may be anywhere in a step.
TEST_F(DrainTest, ClosingBesideAModelThatRuns) {
  for (int round = 0; round < 100; ++round) {
    Recording recording(options());
    const auto layers = test::bind_layers(recording.steps(), 1, 60, 4);
    std::atomic<bool> begun{false}, closed{false};
    std::thread model([&] {
      const Routed routed(1, 4, 60);
      while (!closed) {
        record_step(recording, layers, routed, 50);
        begun = true;
      }
    });
    while (!begun) std::this_thread::yield();
    recording.close();
    closed = true;
    model.join();
    const Ring& ring = recording.ring();
    const auto counted = [&](size_t counter) { return ring.counter(counter).load(); };
    EXPECT_EQ(counted(kStepsBegun),
              counted(kStepsCommitted) + ring.losses(Loss::kAborted).steps + ring.losses(Loss::kRingFull).steps);
    static_cast<void>(blocks());  // throws at a torn one
    for (const std::string& path : segments()) fs::remove(path);
  }
}

TEST_F(DrainTest, AnyTimeLimitIsALimit) {
  Recording recording(options());
  EXPECT_TRUE(recording.drain().flush(std::numeric_limits<double>::infinity()));
}

TEST_F(DrainTest, AStepOfOtherShapesBeginsANewBlock) {
  {
    Recording recording(options());
    auto layers = test::bind_layers(recording.steps(), 2, 60, 4);
    test::record_step(recording.steps(), layers, Routed(4, 4, 60), {run(0, 0, 4)});
    test::record_step(recording.steps(), {layers[0]}, Routed(4, 4, 60), {run(0, 0, 4)});
    test::record_step(recording.steps(), layers, Routed(4, 4, 60), {run(0, 0, 4)});
    test::record_step(recording.steps(), layers, Routed(4, 4, 60), {run(0, 0, 4)});
  }
  const auto all = blocks();
  ASSERT_EQ(all.size(), 3u);
  EXPECT_EQ(all[0].header.steps, 1u);
  EXPECT_EQ(all[1].header.steps, 1u);
  EXPECT_EQ(all[2].header.steps, 2u);
  EXPECT_FALSE(all[1].has(EntryField::kIds, 1));
}

TEST_F(DrainTest, LaneRangesFollowEachOtherWithoutAGap) {
  {
    Recording recording(options());
    const auto layers = test::bind_layers(recording.steps(), 3, 60, 4);
    for (int i = 0; i < 300; ++i) {
      const RowSpan span{0, 50};
      if (i % 10 == 3) {  // aborted in the middle
        recording.steps().begin_step({&span, 1});
        recording.steps().record(*layers[0], Routed(50, 4, 60).input());
        recording.steps().abort_step();
      } else {
        test::record_step(recording.steps(), layers, Routed(50, 4, 60), {run(0, 0, 50)});
      }
      if (i % 50 == 49) {
        ASSERT_TRUE(recording.drain().flush(10));
      }
    }
  }
  uint64_t expected = 1, number = 0;
  for (const DecodedBlock& block : blocks()) {
    EXPECT_EQ(block.header.number, number++);
    EXPECT_EQ(block.cell(EntryField::kLanes, 0, 2, 8), expected);
    expected = block.cell(EntryField::kLanes, 0, 10, 8) + 1;
  }
  EXPECT_EQ(expected, 270 * 4 + 30 * 2 + 1u);
}

TEST_F(DrainTest, AStepLargerThanTheRingIsStreamedOut) {
  auto o = options(1 << 20);
  o.overflow = Overflow::kBlock;
  const Routed routed(4000, 4, 60);
  {
    Recording recording(o);
    const auto layers = test::bind_layers(recording.steps(), 40, 60, 4);  // 40 layers of 80 KB in a ring of 1 MiB
    test::record_step(recording.steps(), layers, Routed(4, 4, 60), {run(0, 0, 4)});
    ASSERT_TRUE(test::record_step(recording.steps(), layers, routed, {run(1, 0, 1000, 69), run(2, 0, 3000, 70)}));
    test::record_step(recording.steps(), layers, Routed(4, 4, 60), {run(0, 4, 4)});
  }
  const auto all = blocks();
  EXPECT_EQ(steps_in(all), 3u);
  // The step's planes, from its fragments and the block that completes them.
  std::map<int, std::map<uint32_t, std::string>> ids;
  uint32_t fragments = 0;
  for (const DecodedBlock& block : all) {
    if (block.header.last_step != 1 || block.header.first_step != 1) continue;
    if (block.header.kind == BlockKind::kFragment)
      ++fragments;
    else
      EXPECT_EQ(block.header.fragments, fragments);
    for (const auto& e : block.entries) {
      if (e.field == EntryField::kIds) ids[e.layer][e.first_row] = block.at(EntryField::kIds, e.layer, e.first_row);
    }
  }
  EXPECT_GT(fragments, 1u);
  ASSERT_EQ(ids.size(), 40u);
  for (const auto& [layer, parts] : ids) {
    std::string whole;
    for (const auto& [first_row, part] : parts) {
      EXPECT_EQ(first_row * 4, whole.size());
      whole += part;
    }
    ASSERT_EQ(whole.size(), routed.ids.size());
    for (size_t i = 0; i < whole.size(); ++i) ASSERT_EQ(whole[i], routed.ids[i]);
  }
}

TEST_F(DrainTest, WhatIsOnlyCountedIsNotStreamedOut) {
  auto o = options(1 << 20);
  o.overflow = Overflow::kBlock;
  {
    Recording recording(o);
    recording.steps().configure(kFieldIds | kFieldWeights, true);
    const auto layers = test::bind_layers(recording.steps(), 40, 60, 4);
    moe_native::Run run_of_all = run(1, 0, 4000, 69);
    run_of_all.flags = kRunCounted;
    ASSERT_TRUE(test::record_step(recording.steps(), layers, Routed(4000, 4, 60), {run_of_all}));
    ASSERT_TRUE(recording.drain().flush(10));
    EXPECT_EQ(recording.drain().totals().rows.load(), 4000u);
    EXPECT_EQ(recording.drain().totals().stored_rows.load(), 0u);
  }
  uint64_t next_record = 1;
  uint32_t fragments = 0;
  for (const DecodedBlock& block : blocks()) {
    for (const DirectoryEntry& entry : block.entries) EXPECT_GE(entry.field, EntryField::kSteps);
    EXPECT_EQ(block.cell(EntryField::kLanes, 0, 2, 8), next_record);  // but a recovery knows what was taken
    next_record = block.cell(EntryField::kLanes, 0, 10, 8) + 1;
    if (block.header.kind == BlockKind::kFragment) {
      ++fragments;
      continue;
    }
    EXPECT_EQ(block.header.fragments, fragments);
    EXPECT_EQ(block.header.executed, 4000u);
    for (size_t layer = 0; layer < 40; ++layer) EXPECT_EQ(block.cell(EntryField::kStatGroups, layer, 10, 8), 4000u);
  }
  EXPECT_GT(fragments, 1u);
}

TEST_F(DrainTest, AStreamedStepKeepsTheRowsOfAllAsNobodysWhereOnlySomeWereWanted) {
  auto o = options(1 << 20);
  o.overflow = Overflow::kBlock;
  {
    Recording recording(o);
    const auto layers = test::bind_layers(recording.steps(), 40, 60, 4);
    moe_native::Run other = run(1, 5, 1000, 69);
    other.flags = kRunCounted | 1;
    ASSERT_TRUE(test::record_step(recording.steps(), layers, Routed(4000, 4, 60), {other, run(2, 0, 3000, 70)}));
  }
  const DecodedBlock last = blocks().back();
  EXPECT_GT(last.header.fragments, 0u);
  EXPECT_EQ(last.header.rows, 4000u);
  EXPECT_EQ(last.header.executed, 0u);
  EXPECT_EQ(last.cell(EntryField::kRuns, 0, 0, 4), kNoRequest);
  EXPECT_EQ(last.cell(EntryField::kRuns, 0, 4, 4), kNoRequest);
  EXPECT_EQ(last.cell(EntryField::kRuns, 0, 12, 2), 69u);
  EXPECT_EQ(last.cell(EntryField::kRuns, 0, 14, 2), 1u);
  EXPECT_EQ(last.cell(EntryField::kRuns, 1, 0, 4), 2u);
}

TEST_F(DrainTest, SegmentsAreBoundedAndOldOnesGo) {
  auto o = options();
  o.overflow = Overflow::kBlock;
  o.drain.segment_bytes = 50'000;
  o.drain.max_bytes = 200'000;
  {
    Recording recording(o);
    const auto layers = test::bind_layers(recording.steps(), 4, 60, 4);
    std::mt19937 random(1);
    Routed routed(500, 4, 60);
    for (int i = 0; i < 300; ++i) {
      for (auto& id : routed.ids) id = static_cast<int32_t>(random() % 60);
      test::record_step(recording.steps(), layers, routed, {run(0, 0, 500)});
    }
  }
  uint64_t total = 0;
  for (const std::string& path : segments()) total += fs::file_size(path);
  EXPECT_LE(total, 250'000u);  // the bound, to one segment
  EXPECT_GT(segments().size(), 1u);
  EXPECT_FALSE(segments()[0].ends_with("000000.moe"));
}

TEST_F(DrainTest, RequestsAreDefinedAgainInEachSegment) {
  auto o = options();
  o.overflow = Overflow::kBlock;
  o.drain.segment_bytes = 20'000;
  {
    Recording recording(o);
    const auto layers = test::bind_layers(recording.steps(), 4, 60, 4);
    std::mt19937 random(1);
    for (int i = 0; i < 100; ++i) {
      Routed routed(100, 4, 60);
      for (auto& id : routed.ids) id = static_cast<int32_t>(random() % 60);
      test::record_step(recording.steps(), layers, routed, {run(7, 0, 100)},
                        i == 0 ? test::note(1, 7, R"({"index":7})") : "", i == 0 ? 1 : 0);
      if (i % 20 == 19) recording.drain().flush(10);
    }
  }
  ASSERT_GT(segments().size(), 2u);
  for (const std::string& path : segments()) {
    const auto all = test::decode_segment(path);
    EXPECT_EQ(all[0].at(EntryField::kNotes), "{\"index\":7}\n") << path;
    for (size_t i = 1; i < all.size(); ++i) EXPECT_FALSE(all[i].has(EntryField::kNotes)) << path;
  }
}

}  // namespace
}  // namespace moe_native
