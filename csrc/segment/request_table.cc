#include "segment/request_table.h"

#include <cstring>

#include "segment/format.h"

namespace moe_native {

namespace {

enum NoteKind : uint32_t { kRequest = 1, kEnded = 2, kLine = 3 };

// A disk that is gone for good must not fill the memory.
constexpr size_t kMostFacts = 1 << 16;

}  // namespace

std::vector<std::string> RequestTable::lines_for(std::span<const StepData* const> steps) {
  std::vector<std::string> lines;
  std::vector<uint32_t> ended;
  const auto emit = [&](uint32_t key) {
    const auto found = requests_.find(key);
    if (found == requests_.end() || found->second.in_segment) return;
    found->second.in_segment = true;
    lines.push_back(found->second.line);
  };
  for (const StepData* step : steps) {
    for (size_t at = 0; at + 12 <= step->notes.size();) {
      uint32_t head[3];  // kind, key, bytes
      std::memcpy(head, step->notes.data() + at, sizeof head);
      at += sizeof head;
      if (head[2] > step->notes.size() - at) break;
      const std::string line(reinterpret_cast<const char*>(step->notes.data()) + at, head[2]);
      at += head[2];
      switch (head[0]) {
        case kRequest:
          requests_[head[1]] = {line, false};
          emit(head[1]);
          break;
        case kEnded:
          ended.push_back(head[1]);
          break;
        case kLine:
          if (facts_.size() < kMostFacts) facts_.push_back(line);
          break;
        default:
          break;
      }
    }
    uint32_t previous = kNoRequest;
    for (const Run& run : step->runs) {
      if ((run.flags & kRunCounted) != 0) continue;  // none of its rows is stored, and neither is its name
      if (run.request != previous) emit(run.request);
      previous = run.request;
    }
  }
  for (const uint32_t key : ended) requests_.erase(key);
  lines.insert(lines.end(), facts_.begin(), facts_.end());
  return lines;
}

void RequestTable::written() { facts_.clear(); }

void RequestTable::new_segment() {
  for (auto& [key, request] : requests_) request.in_segment = false;
}

}  // namespace moe_native
