#include "segment/retention.h"

#include <algorithm>
#include <filesystem>
#include <vector>

#include "core/test_point.h"

namespace moe_native {

namespace fs = std::filesystem;

namespace {

struct Segment {
  std::string run;
  std::string name;  // numbers have at least six digits, so longer names are later
  fs::path path;
  uint64_t bytes;
};

}  // namespace

void keep_within(const std::string& trace, uint64_t max_bytes) noexcept {
  try {
    std::error_code ignored;
    std::vector<Segment> closed;
    uint64_t total = 0;
    for (const auto& run : fs::directory_iterator(trace, ignored)) {
      if (!run.is_directory(ignored)) continue;
      for (const auto& rank : fs::directory_iterator(run.path(), ignored)) {
        for (const auto& file : fs::directory_iterator(rank.path(), ignored)) {
          const uint64_t bytes = file.is_regular_file(ignored) ? file.file_size(ignored) : 0;
          if (bytes == static_cast<uint64_t>(-1)) continue;
          const fs::path& path = file.path();
          // A ring that fell back to this directory is a fixed cost of its own, not trace.
          if (path.extension() == ".ring") continue;
          total += bytes;
          if (path.extension() != ".moe") continue;
          closed.push_back({run.path().filename().string(), path.filename().string(), path, bytes});
        }
      }
    }
    std::ranges::sort(closed, [](const Segment& a, const Segment& b) {
      if (a.run != b.run) return a.run < b.run;
      if (a.name.size() != b.name.size()) return a.name.size() < b.name.size();
      return a.name < b.name;
    });
    for (const Segment& segment : closed) {
      if (total <= max_bytes) return;
      MOE_TEST_POINT("retention");
      if (fs::remove(segment.path, ignored)) total -= segment.bytes;
      MOE_TEST_POINT("retention, one is gone");
    }
  } catch (...) {
  }
}

}  // namespace moe_native
