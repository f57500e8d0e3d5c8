// What the native side wants said once in the program's log. Posting is for cold paths: a problem is posted the first
// time.
#pragma once

#include <atomic>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace moe_native {

class Messages {
 public:
  void post(std::string text) noexcept {
    try {
      const std::lock_guard lock(mutex_);
      texts_.push_back(std::move(text));
      pending_.store(true, std::memory_order_release);
    } catch (...) {  // out of memory: the counters still tell
    }
  }
  bool pending() const noexcept { return pending_.load(std::memory_order_acquire); }
  std::vector<std::string> take() {
    const std::lock_guard lock(mutex_);
    pending_.store(false, std::memory_order_relaxed);
    return std::exchange(texts_, {});
  }

 private:
  std::mutex mutex_;
  std::vector<std::string> texts_;
  std::atomic<bool> pending_{false};
};

}  // namespace moe_native
