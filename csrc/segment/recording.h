// One recorder, whole: its ring, the producer's side, the drain thread. What the Python bindings hold.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "core/messages.h"
#include "core/ring.h"
#include "core/step_recorder.h"
#include "segment/drain.h"

namespace moe_native {

struct RecordingOptions {
  RingOptions ring;
  DrainOptions drain;
  Overflow overflow = Overflow::kDrop;
  uint32_t fields = kFieldIds | kFieldWeights;
};

class Recording {
 public:
  explicit Recording(const RecordingOptions& options);
  ~Recording();

  StepRecorder& steps() { return *steps_; }
  Drain& drain() { return *drain_; }
  const Ring& ring() const { return *ring_; }
  Messages& messages() { return messages_; }

  // Of the trace; without one it is always paused.
  void pause(bool paused);
  // Everything committed goes to the trace. Safe to call twice, as is remove_ring(), which comes after it: in between,
  // whoever keeps the trace's books can say that the ring is not needed any more.
  void close();
  void remove_ring();
  bool closed() const { return closed_.load(std::memory_order_acquire); }
  // False in a forked child, where there is neither ring nor drain thread and nothing must be called.
  bool here() const;

 private:
  const uint32_t forks_;  // before it was made
  const bool has_trace_;
  Messages messages_;
  std::unique_ptr<Ring> ring_;
  std::unique_ptr<StepRecorder> steps_;
  std::unique_ptr<Drain> drain_;
  std::atomic<bool> closed_{false};
};

}  // namespace moe_native
