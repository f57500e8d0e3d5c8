// Captures of steps that are larger than the ring, of a disk that fails, and of everything mixed.
#include <atomic>
#include <chrono>
#include <random>
#include <set>
#include <thread>

#include "segment/drain_capture_fixture.h"

namespace moe_native {
namespace {

constexpr uint64_t kSmallRing = 64 << 10;

struct DrainCaptureStreamTest : DrainCaptureTest {
  // Twenty times what a small ring holds.
  static Runs large_step(uint32_t position = 0) {
    return {run(7, position, 150), run(1, 0, 100), run(8, position + 40, 200), run(7, position + 150, 50)};
  }
  static constexpr uint32_t kRows = 500;
  static constexpr int kLayers = 10;
  // A caller with the requests of a large step.
  struct LargeCaller : Caller {
    explicit LargeCaller(Recording& recording, uint32_t fields = kAllFields) : Caller(recording, fields) {
      add(7, 0, 1000);
      add(8, 1, 1000);
    }
  };
  void expect_large_step(const DecodedCapture& got, uint32_t position = 0, uint32_t fields = kAllFields) const {
    EXPECT_EQ(got.layers.size(), static_cast<size_t>(kLayers));
    expect_rows(got, router, 0, 7, {{position, position + 200}}, fields);
    expect_rows(got, router, 1, 8, {{position + 40, position + 240}}, fields);
  }
};

struct Way {
  bool traced, paused, announced;
};
struct EachWay : DrainCaptureStreamTest, testing::WithParamInterface<Way> {};
INSTANTIATE_TEST_SUITE_P(OfALargeStep, EachWay,
                         testing::Values(Way{true, false, true}, Way{true, false, false}, Way{true, true, true},
                                         Way{true, true, false}, Way{false, true, true}, Way{false, true, false}),
                         [](const auto& way) {
                           return std::string(way.param.traced ? "Traced" : "WithoutTrace") +
                                  (way.param.traced && way.param.paused ? "Paused" : "") +
                                  (way.param.announced ? "Announced" : "NotAnnounced");
                         });

TEST_P(EachWay, EveryCapturedRowOfAStepLargerThanTheRingIsExact) {
  const Way way = GetParam();
  {
    Recording recording(way.traced ? options(kSmallRing) : without_trace(kSmallRing));
    recording.pause(way.paused);
    const Layers layers = bind(recording, kLayers);
    want(recording, layers);
    for (uint32_t round = 0; round < 3; ++round) {
      LargeCaller caller(recording);
      ASSERT_TRUE(execute(recording.steps(), layers, router, large_step(round), {.announced = way.announced}));
      expect_large_step(caller.close(), round);
    }
    EXPECT_EQ(recording.ring().losses(Loss::kTooLarge).steps, 0u);
  }
  if (!way.traced) return;
  const auto all = blocks();
  EXPECT_EQ(steps_in(all), way.paused ? 0u : 3u);
  uint64_t ids = 0, next_record = 1;
  for (const DecodedBlock& block : all) {
    EXPECT_TRUE(!way.paused || block.header.kind == BlockKind::kRows) << "nothing of the step, not even a fragment";
    for (const DirectoryEntry& e : block.entries) {
      EXPECT_NE(e.field, EntryField::kLogits);
      EXPECT_NE(e.field, EntryField::kHidden);
      if (e.field == EntryField::kIds) ids += e.rows;
      if (e.field != EntryField::kLanes || e.rows == 0) continue;
      EXPECT_EQ(block.cell(EntryField::kLanes, 0, 2, 8), next_record) << "a block has each record";
      next_record = block.cell(EntryField::kLanes, 0, 10, 8) + 1;
    }
  }
  EXPECT_EQ(ids, way.paused ? 0u : 3u * kRows * kLayers);
}

TEST_P(EachWay, AStepWhoseLayersThatCapturesWantAreOnlyTheirsIsExact) {
  const Way way = GetParam();
  {
    Recording recording(way.traced ? options(kSmallRing) : without_trace(kSmallRing));
    recording.pause(way.paused);
    const Layers layers = bind(recording, kLayers);
    want(recording, layers);
    for (size_t l = 0; l < layers.size(); l += 3) recording.steps().enable(*layers[l], false);  // the first among them
    LargeCaller caller(recording);
    ASSERT_TRUE(execute(recording.steps(), layers, router, large_step(), {.announced = way.announced}));
    expect_large_step(caller.close());
  }
  if (!way.traced || way.paused) return;
  std::set<int> traced;
  for (const DecodedBlock& block : blocks()) {
    for (const DirectoryEntry& e : block.entries) {
      if (e.field == EntryField::kIds) traced.insert(e.layer);
    }
  }
  EXPECT_EQ(traced, (std::set<int>{1, 2, 4, 5, 7, 8}));
}

TEST_P(EachWay, AnAbortedStepLargerThanTheRingLeavesRowsOnlyIfItWasAnnounced) {
  const Way way = GetParam();
  Recording recording(way.traced ? options(kSmallRing) : without_trace(kSmallRing));
  recording.pause(way.paused);
  const Layers layers = bind(recording, kLayers);
  want(recording, layers);
  LargeCaller caller(recording);
  const RowSpan span{0, kRows};
  recording.steps().begin_step({&span, 1});
  for (Binding* b : layers) {
    recording.steps().record(*b, test::FakeTensors(router, b->layer, large_step(), 1).input());
  }
  recording.steps().abort_step();
  if (!way.announced) {
    ASSERT_TRUE(execute(recording.steps(), layers, router, {run(7, 300, 4)}));
    const DecodedCapture got = caller.close();
    expect_rows(got, router, 0, 7, {{300, 304}}, kAllFields);
    expect_rows(got, router, 1, 8, {}, kAllFields);
    return;
  }
  ASSERT_TRUE(execute(recording.steps(), layers, router, large_step(), {.announced = true}));
  expect_large_step(caller.close());
}

TEST_F(DrainCaptureStreamTest, TwoThreadsFillSmallLanes) {
  for (const bool traced : {false, true}) {
    for (const bool announced : {false, true}) {
      Recording recording(traced ? options(2 * kSmallRing, 2) : without_trace(2 * kSmallRing, 2));
      const Layers layers = bind(recording, kLayers);
      want(recording, layers);
      LargeCaller caller(recording);
      const Runs runs = large_step();
      const RowSpan span{0, kRows};
      recording.steps().begin_step({&span, 1});
      if (announced) recording.steps().announce(runs);
      std::vector<std::thread> threads;
      for (size_t half = 0; half < 2; ++half) {
        threads.emplace_back([&, half] {
          for (size_t l = half; l < layers.size(); l += 2) {
            const auto layer = static_cast<uint16_t>(l);
            recording.steps().record(*layers[l], test::FakeTensors(router, layer, runs).input());
          }
        });
      }
      for (std::thread& thread : threads) thread.join();
      StepTable table;
      table.runs = runs;
      ASSERT_TRUE(recording.steps().end_step(table));
      expect_large_step(caller.close());
    }
  }
}

// As where two threads take turns: the one whose lane is full must get room although the other records nothing.
TEST_F(DrainCaptureStreamTest, ALaneThatIsFullIsEmptiedWhileTheOthersAreSilent) {
  for (const bool traced : {false, true}) {
    Recording recording(traced ? options(1 << 20, 2) : without_trace(1 << 20, 2));
    const Layers layers = bind(recording, 8);
    want(recording, layers);
    router.hidden = 400;  // nobody knows before the first record
    Caller caller(recording);
    caller.add(7, 0, 200);
    const Runs halves[] = {{run(7, 0, 20)}, {run(7, 20, 160)}};
    const auto record = [&](size_t half, std::span<Binding* const> of) {
      const Place place{-1, 0, half == 0 ? 0 : 20, halves[half][0].count};
      recording.steps().place({&place, 1});
      for (Binding* b : of) recording.steps().record(*b, test::FakeTensors(router, b->layer, halves[half]).input());
    };
    recording.steps().begin_placed_step(180);
    record(0, std::span(layers).first(1));
    std::atomic<bool> done{false};
    std::thread other([&] {
      record(1, layers);
      done = true;
    });
    for (int i = 0; i < 1000 && !done; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    EXPECT_TRUE(done);
    record(0, std::span(layers).subspan(1));  // lets it go on where it hangs
    other.join();
    StepTable table;
    const Runs runs = {run(7, 0, 180)};
    table.runs = runs;
    ASSERT_TRUE(recording.steps().end_step(table));
    expect_rows(caller.close(), router, 0, 7, {{0, 180}}, kAllFields);
  }
}

// A layer that the trace has is written down as a fragment, and given up where the disk takes none.
TEST_F(DrainCaptureStreamTest, ADeadDiskCostsNoCapturedRow) {
  for (const bool announced : {false, true}) {
    Recording recording(options(kSmallRing));
    const Layers layers = bind(recording, kLayers);
    want(recording, layers);
    LargeCaller caller(recording);
    fs::rename(rank, rank + "-gone");
    ASSERT_TRUE(execute(recording.steps(), layers, router, large_step(), {.announced = announced}));
    for (uint32_t p = 200; p < 700; ++p) {
      const Runs runs = {run(7, p, 1), run(8, p + 40, 1)};
      ASSERT_TRUE(execute(recording.steps(), layers, router, runs, {.announced = announced}));
    }
    const DecodedCapture got = caller.close();
    expect_rows(got, router, 0, 7, {{0, 700}}, kAllFields);
    expect_rows(got, router, 1, 8, {{40, 740}}, kAllFields);
    EXPECT_GT(recording.ring().losses(Loss::kIoError).steps, 400u);
    EXPECT_EQ(recording.messages().take().size(), 1u);
    fs::rename(rank + "-gone", rank);
  }
}

TEST_F(DrainCaptureStreamTest, ADiskThatDiesInTheMiddleOfAStepCostsNoCapturedRow) {
  Recording recording(options(kSmallRing));
  const Layers layers = bind(recording, kLayers);
  want(recording, layers);
  LargeCaller caller(recording);
  const Runs runs = large_step();
  const RowSpan span{0, kRows};
  recording.steps().begin_step({&span, 1});
  for (size_t l = 0; l < layers.size(); ++l) {
    if (l == 4) fs::rename(rank, rank + "-gone");
    recording.steps().record(*layers[l], test::FakeTensors(router, static_cast<uint16_t>(l), runs).input());
  }
  StepTable table;
  table.runs = runs;
  ASSERT_TRUE(recording.steps().end_step(table));
  expect_large_step(caller.close());
}

// Steps of every kind in any order, and captures that come and go.
TEST_F(DrainCaptureStreamTest, WhateverHappensEachCaptureHasTheLastRowOfEachPosition) {
  std::mt19937 random(1);
  const auto below = [&](uint32_t n) { return static_cast<uint32_t>(random() % n); };
  for (int round = 0; round < 12; ++round) {
    const bool traced = round % 3 != 0;
    const uint64_t bytes = round % 2 == 0 ? kSmallRing : 4 * kSmallRing;
    Recording recording(traced ? options(bytes) : without_trace(bytes));
    const Layers layers = bind(recording, 3);
    want(recording, layers);
    for (int capture = 0; capture < 6; ++capture) {
      const uint32_t fields = kFieldIds | below(16);
      Caller caller(recording, fields);
      std::map<uint32_t, std::map<uint32_t, uint32_t>> last;  // request, position: when it was executed
      for (uint32_t request = 0; request < 3; ++request) caller.add(request, request, 300);
      for (uint32_t again = 0; again < 20; ++again) {
        Runs runs;
        const uint32_t longest = below(6) == 0 ? 250 : 4;
        for (uint32_t request = 0; request < 4; ++request) {
          if (below(3) != 0) runs.push_back(run(request, below(310), 1 + below(longest)));
        }
        if (runs.empty()) runs.push_back(run(3, 0, 1));
        recording.pause(below(3) == 0);
        if (below(8) == 0) {
          RowSpan span;
          for (const auto& r : runs) span.count += r.count;
          recording.steps().begin_step({&span, 1});
          for (Binding* b : layers) recording.steps().record(*b, test::FakeTensors(router, b->layer, runs).input());
          recording.steps().abort_step();
          continue;
        }
        ASSERT_TRUE(execute(recording.steps(), layers, router, runs, {.announced = below(2) == 0, .again = again}));
        for (const auto& r : runs) {
          for (uint32_t p = r.position; p < std::min(r.position + r.count, 300u); ++p) last[r.request][p] = again;
        }
      }
      const DecodedCapture got = caller.close();
      for (uint32_t request = 0; request < 3; ++request) {
        std::set<uint32_t> there;
        for (const IndexedSpan& span : got.spans(request)) {
          for (uint32_t p = span.first; p < span.end; ++p) there.insert(p);
        }
        ASSERT_EQ(there.size(), last[request].size());
        for (const auto& [position, again] : last[request]) {
          ASSERT_TRUE(there.contains(position));
          for (int column = 0; column < test::kColumns; ++column) {
            if (column != test::kIds && (fields & 1u << column) == 0) continue;
            for (uint16_t layer = 0; layer < 3; ++layer) {
              ASSERT_EQ(got.row(request, layer, column, position), router.row(column, request, position, layer, again));
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace moe_native
