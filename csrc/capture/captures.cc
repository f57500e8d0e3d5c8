#include "capture/captures.h"

#include <algorithm>
#include <exception>
#include <stdexcept>
#include <utility>

namespace moe_native {

namespace {

constexpr size_t kMostSpare = 2;
constexpr auto kSpareFor = std::chrono::seconds(60);
// A caller takes its lock right after it has opened a capture; one without a lock that is older has no caller any more.
constexpr auto kAbandonedAfter = std::chrono::seconds(60);

}  // namespace

Captures::Opened Captures::open(CaptureOptions options) {
  const std::lock_guard lock(mutex_);
  drop_abandoned();
  auto capture = std::make_unique<Capture>(file(), std::move(options));
  const int fd = capture->file().fd();
  open_[next_] = {std::move(capture), Clock::now()};
  return {next_++, fd};
}

CaptureFile Captures::file() {
  const auto unused = std::ranges::find_if(spare_, [](const Spare& spare) { return !spare.file.is_read(); });
  if (unused == spare_.end()) return {};
  CaptureFile file = std::move(unused->file);
  spare_.erase(unused);
  file.forget();
  return file;
}

void Captures::drop_abandoned() {
  const auto now = Clock::now();
  std::erase_if(open_, [&](auto& item) {
    return now - item.second.since > kAbandonedAfter && !item.second.capture->file().is_read();
  });
}

Capture& Captures::find(uint64_t number) {
  const auto found = open_.find(number);
  if (found == open_.end()) throw std::out_of_range("capture " + std::to_string(number) + " is not open");
  return *found->second.capture;
}

void Captures::add(uint64_t number, uint32_t request, uint32_t sample, uint32_t child, uint32_t capacity) {
  const std::lock_guard lock(mutex_);
  find(number).add(request, sample, child, capacity);
}

Captures::Closed Captures::close(uint64_t number) {
  const std::lock_guard lock(mutex_);
  Capture& capture = find(number);
  Closed closed{capture.finish(), capture.file().bytes(), capture.problem()};
  spare_.push_back({std::move(capture.file()), Clock::now()});
  open_.erase(number);
  if (spare_.size() > kMostSpare) spare_.erase(spare_.begin());
  return closed;
}

std::vector<uint64_t> Captures::numbers() {
  const std::lock_guard lock(mutex_);
  std::vector<uint64_t> all;
  for (const auto& [number, _] : open_) all.push_back(number);
  return all;
}

void Captures::take(std::span<const Run> runs, std::span<const Piece> pieces) noexcept {
  const std::lock_guard lock(mutex_);
  for (auto& [_, open] : open_) {
    try {
      open.capture->take(runs, pieces);
    } catch (const std::exception& error) {
      try {
        open.capture->failed(error.what());
      } catch (...) {  // the index says which rows are missing
      }
    }
  }
}

void Captures::free_unused() noexcept {
  const std::lock_guard lock(mutex_);
  const auto now = Clock::now();
  std::erase_if(spare_, [&](const Spare& spare) { return now - spare.since > kSpareFor; });
}

}  // namespace moe_native
