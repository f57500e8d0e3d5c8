// One request under way: whose rows its next ones are, and of which class. FORMAT.md, table "runs".
#pragma once

#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "core/ring_layout.h"

namespace moe_native {

// A row's class, beside its modality.
inline constexpr uint16_t kPrefill = 1;
inline constexpr uint16_t kDecode = 2;
inline constexpr uint16_t kText = 1;
inline constexpr int kModalityShift = 2;
inline constexpr uint16_t kAttributed = 1 << 6;
inline constexpr uint16_t kRecomputed = 1 << 7;
inline constexpr uint16_t kDraft = 1 << 8;
inline constexpr uint16_t kRunRecomputed = 1;  // Run::flags

// Positions [first, end) of a prompt that are not text.
struct MediaSpan {
  int64_t first;
  int64_t end;
  uint16_t modality;  // its code
};

class RequestRows {
 public:
  // `index`: the recorder's. `prompt`: length of the prompt, negative where it is not known.
  RequestRows(uint32_t index, int64_t prompt) : index_(index), prompt_(prompt) {}

  // Appends the runs of `count` rows from position `first` on, of which the last `drafts` are draft tokens. A run ends
  // where the phase, the modality, or whether it was executed before changes.
  void execute(int64_t first, int64_t count, int64_t drafts, std::vector<Run>& runs);

  void set_prompt(int64_t prompt) { prompt_ = prompt; }
  void set_media(std::vector<MediaSpan> ascending) { media_ = std::move(ascending); }

  uint32_t index() const { return index_; }
  int64_t prompt() const { return prompt_; }
  int64_t executed() const { return executed_; }  // one past the last position that was

 private:
  uint32_t index_;
  int64_t prompt_;
  int64_t lowest_ = std::numeric_limits<int64_t>::max();  // the first position that was executed: others were cached
  int64_t executed_ = 0;
  std::vector<MediaSpan> media_;
};

}  // namespace moe_native
