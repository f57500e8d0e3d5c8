// The drain thread when the disk fails: the model goes on, what is lost is counted, recording resumes.
#include <sys/resource.h>

#include <chrono>
#include <csignal>
#include <random>
#include <thread>

#include "segment/drain_fixture.h"

namespace moe_native {
namespace {

struct DiskTest : DrainTest {
  // Fails every write beyond this size of a file.
  struct Limit {
    explicit Limit(rlim_t bytes) {
      std::signal(SIGXFSZ, SIG_IGN);
      ::getrlimit(RLIMIT_FSIZE, &old);
      const rlimit limit{bytes, old.rlim_max};
      ::setrlimit(RLIMIT_FSIZE, &limit);
    }
    ~Limit() { ::setrlimit(RLIMIT_FSIZE, &old); }
    rlimit old{};
  };
  static void wait_for_the_next_try() { std::this_thread::sleep_for(std::chrono::milliseconds(1100)); }
  static void wait_for_the_drain_thread() { std::this_thread::sleep_for(std::chrono::milliseconds(100)); }
  static Routed random_rows(int64_t rows) {
    Routed routed(rows, 4, 60);
    std::mt19937 random(1);
    for (auto& id : routed.ids) id = static_cast<int32_t>(random() % 60);
    return routed;
  }
  // A step of 40 layers that leaves the ring early; `between` runs when 20 of them are recorded.
  template <typename Between>
  bool streamed_step(Recording& recording, Between between) {
    const Routed routed = random_rows(4000);
    const auto layers = test::bind_layers(recording.steps(), 40, 60, 4);
    const RowSpan span{0, 4000};
    if (recording.steps().begin_step({&span, 1}) != Begun::kAdmitted) return false;
    for (size_t l = 0; l < 20; ++l) recording.steps().record(*layers[l], routed.input());
    between();
    for (size_t l = 20; l < 40; ++l) recording.steps().record(*layers[l], routed.input());
    const std::vector<moe_native::Run> runs = {run(0, 0, 4000)};
    StepTable table;
    table.runs = runs;
    return recording.steps().end_step(table);
  }
};

TEST_F(DiskTest, AnUnwritableDirectoryCostsTheStepsOfOneBlockAndIsSaidOnce) {
  auto o = options();
  Recording recording(o);
  const auto layers = test::bind_layers(recording.steps(), 2, 60, 4);
  fs::rename(rank, rank + "-gone");
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(test::record_step(recording.steps(), layers, Routed(4, 4, 60), {run(0, 0, 4)}));
    EXPECT_FALSE(recording.drain().flush(10));
  }
  // The block that could not be written is lost; the steps behind it wait in the ring for the next try.
  EXPECT_EQ(recording.ring().losses(Loss::kIoError).steps, 1u);
  EXPECT_EQ(recording.ring().losses(Loss::kIoError).rows, 4u);
  const auto texts = recording.messages().take();
  ASSERT_EQ(texts.size(), 1u);
  EXPECT_NE(texts[0].find(rank), std::string::npos);
  // It comes back: recording resumes, and the loss is in the trace.
  fs::rename(rank + "-gone", rank);
  wait_for_the_next_try();
  ASSERT_TRUE(test::record_step(recording.steps(), layers, Routed(4, 4, 60), {run(0, 0, 4)}));
  ASSERT_TRUE(recording.drain().flush(10));
  const auto all = blocks();
  ASSERT_EQ(all.size(), 1u);
  EXPECT_EQ(steps_in(all), 3u);
  EXPECT_EQ(all[0].cell(EntryField::kLosses, 0, 2, 8), 1u);
}

TEST_F(DiskTest, StepsThatWaitForTheDiskAreLostOnceTheRingIsFull) {
  Recording recording(options());
  const auto layers = test::bind_layers(recording.steps(), 2, 60, 4);
  fs::rename(rank, rank + "-gone");
  ASSERT_TRUE(test::record_step(recording.steps(), layers, Routed(4, 4, 60), {run(0, 0, 4)}));
  EXPECT_FALSE(recording.drain().flush(10));
  uint32_t recorded = 1;
  for (int i = 0; i < 200; ++i, ++recorded) {  // several rings full, and none refused
    ASSERT_TRUE(test::record_step(recording.steps(), layers, random_rows(500), {run(0, 0, 500)})) << i;
    if (i % 10 == 9) recording.drain().flush(10);
  }
  const uint64_t lost = recording.ring().losses(Loss::kIoError).steps;
  EXPECT_GT(lost, 100u);
  fs::rename(rank + "-gone", rank);
  wait_for_the_next_try();
  ASSERT_TRUE(recording.drain().flush(10));
  EXPECT_EQ(steps_in(blocks()), recorded - recording.ring().losses(Loss::kIoError).steps);
}

TEST_F(DiskTest, RequestsOfLostStepsKeepTheirNames) {
  Recording recording(options());
  const auto layers = test::bind_layers(recording.steps(), 2, 60, 4);
  fs::rename(rank, rank + "-gone");
  ASSERT_TRUE(test::record_step(recording.steps(), layers, Routed(4, 4, 60), {run(7, 0, 4)},
                                test::note(1, 7, R"({"index":7})"), 1));
  EXPECT_FALSE(recording.drain().flush(10));
  fs::rename(rank + "-gone", rank);
  wait_for_the_next_try();
  ASSERT_TRUE(test::record_step(recording.steps(), layers, Routed(1, 4, 60), {run(7, 4, 1)}));
  ASSERT_TRUE(recording.drain().flush(10));
  const auto all = blocks();
  ASSERT_EQ(all.size(), 1u);
  EXPECT_EQ(all[0].at(EntryField::kNotes), "{\"index\":7}\n");
}

TEST_F(DiskTest, AStreamedStepWithoutADirectoryIsLostWhole) {
  auto o = options();
  o.overflow = Overflow::kBlock;
  Recording recording(o);
  fs::rename(rank, rank + "-gone");
  EXPECT_TRUE(streamed_step(recording, [&] {
    wait_for_the_drain_thread();
    fs::rename(rank + "-gone", rank);
    wait_for_the_next_try();
  }));
  ASSERT_TRUE(recording.drain().flush(10));
  EXPECT_EQ(steps_in(blocks()), 0u);
  EXPECT_EQ(recording.ring().losses(Loss::kIoError).steps, 1u);
  EXPECT_EQ(recording.ring().losses(Loss::kIoError).rows, 4000u);
}

TEST_F(DiskTest, AStreamedStepThatCannotBeWrittenIsTakenBack) {
  auto o = options();
  o.overflow = Overflow::kBlock;
  {
    Recording recording(o);
    EXPECT_TRUE(streamed_step(recording, [] {}));
    ASSERT_TRUE(recording.drain().flush(10));
    {
      const Limit limit(fs::file_size(segments()[0]) + 200'000);  // some fragments fit, others do not
      EXPECT_TRUE(streamed_step(recording, [] {}));
      EXPECT_FALSE(recording.drain().flush(10));
    }
    EXPECT_EQ(recording.ring().losses(Loss::kIoError).steps, 1u);
    wait_for_the_next_try();
    EXPECT_TRUE(streamed_step(recording, [] {}));
  }
  EXPECT_EQ(steps_in(blocks()), 2u);
  for (const std::string& path : segments()) {
    std::vector<uint64_t> fragments;  // the steps of those that stand right before
    for (const DecodedBlock& block : test::decode_segment(path)) {
      if (block.header.kind == BlockKind::kFragment) {
        fragments.push_back(block.header.first_step);
        continue;
      }
      ASSERT_LE(block.header.fragments, fragments.size());
      for (uint32_t i = 1; i <= block.header.fragments; ++i) {
        EXPECT_EQ(fragments[fragments.size() - i], block.header.first_step) << "of one step and in one file";
      }
      fragments.clear();
    }
  }
}

TEST_F(DiskTest, AFullDiskIsNotFilledFurther) {
  {
    Recording recording(options(4 << 20));
    const auto layers = test::bind_layers(recording.steps(), 4, 60, 4);
    const Routed routed = random_rows(4000);
    {
      const Limit limit(20'000);
      for (int i = 0; i < 2; ++i) {
        ASSERT_TRUE(test::record_step(recording.steps(), layers, routed, {run(0, 0, 4000)}));
        EXPECT_FALSE(recording.drain().flush(10));
        wait_for_the_next_try();
      }
      ASSERT_EQ(segments().size(), 1u);
      EXPECT_LT(fs::file_size(segments()[0]), 1000u) << "what did not fit whole is given back";
    }
    ASSERT_TRUE(test::record_step(recording.steps(), layers, routed, {run(0, 0, 4000)}));
    EXPECT_TRUE(recording.drain().flush(10));
  }
  ASSERT_EQ(segments().size(), 1u);
  EXPECT_TRUE(segments()[0].ends_with("000000.moe"));
  EXPECT_EQ(steps_in(blocks()), 1u);
}

}  // namespace
}  // namespace moe_native
