// The process-wide table of hooked routers. A compiled graph holds a binding's index as a constant, so the index must
// mean the same router every time: indices are given lowest-free-first, in the order of the model's modules.
#pragma once

#include <atomic>
#include <cstdint>

namespace moe_native {

class StepRecorder;

struct Binding {
  std::atomic<StepRecorder*> recorder{nullptr};  // null: free, or its recorder is closed
  uint16_t layer = 0;
  uint32_t experts = 0;               // number of legal ids, fused shared experts included
  std::atomic<bool> enabled{true};    // the trace has this layer
  std::atomic<bool> captured{false};  // captures want it
  bool every_step = true;             // a step without rows of this layer has lost them
  uint32_t logits_width = 0;          // what has another width is not taken for logits; 0: any has

  // The last step of which this router has seen rows, and how many of it. A model may call its router several times a
  // step: in chunks by one thread, or by threads that have a place each, for which `seen` is not used.
  std::atomic<uint64_t> step{0};
  int64_t seen = 0;
  // Bytes of one recorded row, for admission: a guess until the first record, then what it was.
  std::atomic<uint32_t> row_bytes{0};
  std::atomic<uint8_t> complained{0};  // what was said to be lost of it: 1 for the trace, 2 for captures
  // Fields of which a tensor has been seen whose memory holds its values. Torch also has tensors that are negated only
  // when they are read; a router gives the same kind every time.
  std::atomic<uint32_t> plain{0};
};

inline constexpr int kMaxBindings = 16384;

// The lowest free index, or -1 when the table is full.
int bind(StepRecorder& recorder, uint16_t layer, uint32_t experts, uint32_t row_bytes, bool enabled, bool every_step,
         uint32_t logits_width = 0) noexcept;
void unbind_all(const StepRecorder& recorder) noexcept;
// nullptr for an index that was never given. The recorder in it may be null.
Binding* binding(int64_t index) noexcept;

}  // namespace moe_native
