#include "core/bindings.h"

#include <pthread.h>

#include <mutex>

namespace moe_native {

namespace {

Binding table[kMaxBindings];
std::mutex table_mutex;

void lock_table() { table_mutex.lock(); }
void unlock_table() { table_mutex.unlock(); }

// A forked child has its parent's bindings but not the mapping of its parent's ring (MADV_DONTFORK): a call would crash
// it.
void disable_in_child() {
  for (Binding& b : table) b.recorder.store(nullptr, std::memory_order_relaxed);
  table_mutex.unlock();
}

[[maybe_unused]] const int registered = ::pthread_atfork(lock_table, unlock_table, disable_in_child);

}  // namespace

int bind(StepRecorder& recorder, uint16_t layer, uint32_t experts, uint32_t row_bytes, bool enabled, bool every_step,
         uint32_t logits_width) noexcept {
  const std::lock_guard lock(table_mutex);
  for (int index = 0; index < kMaxBindings; ++index) {
    Binding& b = table[index];
    if (b.recorder.load(std::memory_order_relaxed) != nullptr) continue;
    b.layer = layer;
    b.experts = experts;
    b.enabled.store(enabled, std::memory_order_relaxed);
    b.captured.store(false, std::memory_order_relaxed);
    b.every_step = every_step;
    b.logits_width = logits_width;
    b.step.store(0, std::memory_order_relaxed);
    b.seen = 0;
    b.row_bytes.store(row_bytes, std::memory_order_relaxed);
    b.complained.store(0, std::memory_order_relaxed);
    b.plain.store(0, std::memory_order_relaxed);
    b.recorder.store(&recorder, std::memory_order_release);
    return index;
  }
  return -1;
}

void unbind_all(const StepRecorder& recorder) noexcept {
  const std::lock_guard lock(table_mutex);
  for (Binding& b : table) {
    if (b.recorder.load(std::memory_order_relaxed) == &recorder) b.recorder.store(nullptr, std::memory_order_relaxed);
  }
}

Binding* binding(int64_t index) noexcept { return index >= 0 && index < kMaxBindings ? &table[index] : nullptr; }

}  // namespace moe_native
