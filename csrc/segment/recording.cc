#include "segment/recording.h"

#include <pthread.h>

#include <atomic>
#include <system_error>

#include "core/test_point.h"

namespace moe_native {

namespace {

// How many forks lie between the process that loaded this library and this one. Asking for the process id would be a
// system call at every step.
std::atomic<uint32_t> forks{0};
const int forks_are_counted = ::pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1, std::memory_order_relaxed); });

DrainOptions with_ring(DrainOptions options, const Ring& ring) {
  options.identity.ring_id = ring.id();
  return options;
}

}  // namespace

Recording::Recording(const RecordingOptions& options)
    : forks_(forks.load(std::memory_order_relaxed)),
      has_trace_(!options.drain.identity.directory.empty()),
      ring_(new Ring(options.ring)) {
  if (forks_are_counted != 0) throw std::system_error(forks_are_counted, std::generic_category(), "pthread_atfork");
  steps_ = std::make_unique<StepRecorder>(*ring_, options.overflow, options.fields, messages_);
  pause(false);
  drain_ = std::make_unique<Drain>(*ring_, with_ring(options.drain, *ring_), messages_);
  if (ring_->fell_back()) {
    messages_.post(
        "no room on /dev/shm for the ring: it lies in the trace's directory, where a busy disk can stall the model. " +
        std::string("Free some of /dev/shm, lower ring_bytes, or name another place in MOE_NATIVE_RING_DIR"));
  }
}

Recording::~Recording() {
  if (here()) {
    close();
    remove_ring();
    return;
  }
  // A child's copies of a thread and of a condition variable that a thread waits on cannot be destroyed.
  static_cast<void>(drain_.release());
  static_cast<void>(steps_.release());
  static_cast<void>(ring_.release());
}

bool Recording::here() const { return forks.load(std::memory_order_relaxed) == forks_; }

void Recording::pause(bool paused) { steps_->pause(paused || !has_trace_); }

void Recording::close() {
  if (!here() || closed_.exchange(true, std::memory_order_acq_rel)) return;
  steps_->close();
  MOE_TEST_POINT("end of recording, no more steps");
  drain_->close();
  MOE_TEST_POINT("end of recording, drained");
}

void Recording::remove_ring() {
  if (!here() || !closed()) return;
  MOE_TEST_POINT("end of recording, the ring is left");
  ring_->unlink();
  MOE_TEST_POINT("end of recording, the ring is gone");
}

}  // namespace moe_native
