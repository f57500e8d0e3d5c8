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

}  // namespace
}  // namespace moe_native
