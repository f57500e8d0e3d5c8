// Records that are large for their ring: who waits for room gets it, wherever in the arena the next one lies.
#include <atomic>
#include <thread>
#include <utility>

#include "segment/drain_fixture.h"

namespace moe_native {
namespace {

using DrainRoomTest = DrainTest;

// A step record of `runs` runs, behind layers of so many rows: the arena's end comes at another place each time.
TEST_F(DrainRoomTest, ARecordOfUpToHalfOfTheArenaIsNeverWaitedForInVain) {
  RecordingOptions o = options(64 << 10);
  o.overflow = Overflow::kBlock;
  Recording recording(o);
  const uint64_t arena = recording.ring().lane(0).arena_bytes;
  const std::vector<Binding*> layers = test::bind_layers(recording.steps(), 1, 60, 4);
  std::atomic<int> done{0};
  constexpr int kSteps = 60;
  std::thread model([&] {
    for (int step = 0; step < kSteps; ++step) {
      const auto rows = static_cast<int64_t>(arena * (26 + step % 23) / 100 / sizeof(moe_native::Run));
      const Routed routed(rows, 4, 60);
      std::vector<moe_native::Run> runs;
      for (int64_t r = 0; r < rows; ++r) runs.push_back(run(static_cast<uint32_t>(r), 0, 1));
      if (!begin_and_record(recording, layers, routed)) break;
      StepTable table;
      table.runs = runs;
      if (!recording.steps().end_step(table)) break;
      ++done;
    }
  });
  for (int before = -1, i = 0; done < kSteps && i < 400; ++i) {  // a step takes milliseconds, and 20 s are for ever
    if (std::exchange(before, done.load()) != done) i = 0;
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  EXPECT_EQ(done, kSteps);
  recording.steps().close();  // lets it go on where it hangs
  model.join();
  recording.close();
  EXPECT_EQ(steps_in(blocks()), static_cast<uint64_t>(kSteps));
}

// To write what holds the room would be in vain until the disk is tried again, and would lose it.
TEST_F(DrainRoomTest, WhileTheDiskTakesNothingNoStepIsLostForRoom) {
  RecordingOptions o = options(256 << 10);
  o.overflow = Overflow::kBlock;
  o.drain.segment_bytes = 1;  // a segment a block
  Recording recording(o);
  const auto arena = static_cast<int64_t>(recording.ring().lane(0).arena_bytes);
  const std::vector<Binding*> layers = test::bind_layers(recording.steps(), 1, 60, 1);
  ASSERT_TRUE(record_step(recording, layers, Routed(arena * 42 / 100 / 5, 1, 60)));
  ASSERT_TRUE(recording.drain().flush(60));
  const auto start = std::chrono::steady_clock::now();
  fs::rename(rank, rank + "-gone");
  ASSERT_TRUE(record_step(recording, layers, Routed(4, 1, 60)));
  ASSERT_FALSE(recording.drain().flush(60));  // this one is lost, and it is tried again in a second
  ASSERT_TRUE(record_step(recording, layers, Routed(arena * 15 / 100 / 5, 1, 60)));
  const RowSpan span{0, 4};
  ASSERT_EQ(recording.steps().begin_step({&span, 1}), Begun::kAdmitted);
  std::thread model([&] {
    const std::vector<moe_native::Run> runs(static_cast<size_t>(arena * 48 / 100) / sizeof(moe_native::Run));
    StepTable table;
    table.runs = runs;
    EXPECT_TRUE(recording.steps().end_step(table));
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  fs::rename(rank + "-gone", rank);
  const bool in_time = std::chrono::steady_clock::now() - start < std::chrono::milliseconds(900);
  model.join();
  if (!in_time) GTEST_SKIP() << "the machine is too busy: the disk was tried again too early";
  EXPECT_EQ(recording.ring().losses(Loss::kIoError).steps, 1u);
}

// What keeps the room that is waited for.
enum class Held { kByOpenStep, kByStepsThatWaitToBeWritten, kByAbortedSteps };

struct DrainHeldRoomTest : DrainTest, testing::WithParamInterface<Held> {};

// Too little is held for the drain thread to write it by itself, and still the next record has no room in one piece: it
// is nearly half of the arena, and would cross its end.
TEST_P(DrainHeldRoomTest, WhatIsHeldIsGivenBackToWhoWaits) {
  RecordingOptions o = options(256 << 10);
  o.overflow = Overflow::kBlock;
  Recording recording(o);
  StepRecorder& steps = recording.steps();
  const auto arena = static_cast<int64_t>(recording.ring().lane(0).arena_bytes);
  const std::vector<Binding*> layers = test::bind_layers(steps, 1, 60, 1);  // an id and a weight, 5 bytes a row
  const Routed before(arena * 42 / 100 / 5, 1, 60), held(arena * 15 / 100 / 5, 1, 60);
  ASSERT_TRUE(record_step(recording, layers, before));
  ASSERT_TRUE(recording.drain().flush(60));
  const RowSpan span{0, held.rows};
  ASSERT_TRUE(begin_and_record(recording, layers, held));
  if (GetParam() == Held::kByAbortedSteps) {
    steps.abort_step();
  } else if (GetParam() == Held::kByStepsThatWaitToBeWritten) {
    const std::vector<moe_native::Run> runs = {run(0, 0, static_cast<uint32_t>(held.rows))};
    StepTable table;
    table.runs = runs;
    ASSERT_TRUE(steps.end_step(table));
  }
  ASSERT_TRUE(recording.drain().catch_up(60));
  if (GetParam() != Held::kByOpenStep) ASSERT_EQ(steps.begin_step({&span, 1}), Begun::kAdmitted);

  std::atomic<bool> done{false};
  std::thread model([&] {
    const std::vector<moe_native::Run> runs(static_cast<size_t>(arena * 48 / 100) / sizeof(moe_native::Run));
    StepTable table;
    table.runs = runs;
    done = steps.end_step(table);
  });
  for (int i = 0; i < 200 && !done; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(50));  // 10 s
  EXPECT_TRUE(done);
  steps.close();  // lets it go on where it hangs
  model.join();
}

INSTANTIATE_TEST_SUITE_P(All, DrainHeldRoomTest,
                         testing::Values(Held::kByOpenStep, Held::kByStepsThatWaitToBeWritten, Held::kByAbortedSteps));

}  // namespace
}  // namespace moe_native
