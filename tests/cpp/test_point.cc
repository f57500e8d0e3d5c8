// Kills the process at the n-th pass of a named test point. Whoever loads the core library of a test build says where,
// through the functions below.
#include "core/test_point.h"

#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cstring>

namespace moe_native {

namespace {

char wanted[64];
std::atomic<int> passes_left{0};

}  // namespace

void at_test_point(const char* name) noexcept {
  if (passes_left.load(std::memory_order_acquire) == 0 || std::strcmp(name, wanted) != 0) return;
  if (passes_left.fetch_sub(1, std::memory_order_acq_rel) == 1) ::kill(::getpid(), SIGKILL);
}

}  // namespace moe_native

extern "C" {

// From now on. `pass` counts from 1; 0: nowhere.
void moe_native_kill_at(const char* name, int pass) {
  moe_native::passes_left.store(0, std::memory_order_release);
  std::strncpy(moe_native::wanted, name, sizeof moe_native::wanted - 1);
  moe_native::passes_left.store(pass, std::memory_order_release);
}

// 0: no thread has come to the point often enough.
int moe_native_passes_left() { return moe_native::passes_left.load(std::memory_order_acquire); }
}
