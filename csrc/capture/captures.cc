#include "capture/captures.h"

#include <algorithm>
#include <exception>
#include <iterator>
#include <new>
#include <stdexcept>
#include <utility>

namespace moe_native {

namespace {

constexpr size_t kMostSpare = 2;
constexpr auto kSpareFor = std::chrono::seconds(60);
// A caller takes its lock right after it has opened a capture; one without a lock that is older has no caller any more.
constexpr auto kAbandonedAfter = std::chrono::seconds(60);
constexpr auto kBetweenLooks = std::chrono::seconds(5);

}  // namespace

Captures::Opened Captures::open(CaptureOptions options) {
  std::vector<Open> abandoned;  // freed behind the lock, as it was declared before
  const std::lock_guard lock(mutex_);
  abandoned = take_abandoned();
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

std::vector<Captures::Open> Captures::take_abandoned() {
  looked_ = Clock::now();
  std::vector<Open> abandoned;
  for (auto item = open_.begin(); item != open_.end();) {
    Open& open = item->second;
    if (looked_ - open.since > kAbandonedAfter && !open.capture->file().is_read()) {
      abandoned.push_back(std::move(open));
      item = open_.erase(item);
    } else {
      ++item;
    }
  }
  return abandoned;
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
  Open open;
  std::vector<Spare> freed;
  const std::lock_guard lock(mutex_);
  find(number);
  open = std::move(open_.extract(number).mapped());
  Capture& capture = *open.capture;
  Closed closed{capture.finish(), capture.file().bytes(), capture.problem()};
  spare_.push_back({std::move(capture.file()), Clock::now()});
  if (spare_.size() > kMostSpare) {
    freed.push_back(std::move(spare_.front()));
    spare_.erase(spare_.begin());
  }
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
  std::vector<Spare> freed;
  std::vector<Open> abandoned;
  const std::lock_guard lock(mutex_);
  if (spare_.empty() && open_.empty()) return;
  const auto now = Clock::now();
  try {
    const auto old = std::ranges::partition(spare_, [&](const Spare& spare) { return now - spare.since <= kSpareFor; });
    std::ranges::move(old, std::back_inserter(freed));
    spare_.erase(old.begin(), old.end());
    if (now - looked_ > kBetweenLooks) abandoned = take_abandoned();
  } catch (const std::bad_alloc&) {  // at the next look
  }
}

}  // namespace moe_native
