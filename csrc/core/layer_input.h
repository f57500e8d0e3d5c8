// What a router hands over of one layer: its tensors, and which of their rows are kept.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "core/dtype.h"
#include "core/rows.h"

namespace moe_native {

enum Field : uint32_t {
  kFieldIds = 1,
  kFieldWeights = 2,
  kFieldLogits = 4,
  kFieldHidden = 8,
  kFieldTokens = 16,
};

// Rows of a router's tensors that are real tokens; the rest is padding.
struct RowSpan {
  int64_t start = 0;
  int64_t count = 0;
};

struct LayerInput {
  RowsView ids;
  RowsView weights;
  RowsView logits;
  RowsView hidden;
};

// Why a record of these fields cannot be made of it, or nullptr.
inline const char* unusable(const LayerInput& in, uint32_t fields) noexcept {
  if (!is_id(in.ids.dtype)) return "expert ids must be int32, int64, uint16 or uint32";
  if (in.ids.width < 1 || in.ids.width > 0xFFFF) return "expert ids must be a tensor of [rows, k]";
  const auto bad_rows = [&](const RowsView& view) { return view.rows != in.ids.rows || view.width < 1; };
  if ((fields & kFieldWeights) != 0) {
    if (!is_floating(in.weights.dtype)) return "weights must be float32, float16 or bfloat16";
    if (bad_rows(in.weights) || in.weights.width != in.ids.width) return "weights must have the shape of the ids";
  }
  if ((fields & kFieldLogits) != 0 && in.logits.data != nullptr) {
    if (!is_floating(in.logits.dtype)) return "router logits must be float32, float16 or bfloat16";
    if (bad_rows(in.logits)) return "router logits must be a tensor of [rows, experts], with as many rows as the ids";
  }
  if ((fields & kFieldHidden) != 0 && in.hidden.data != nullptr) {
    if (!is_floating(in.hidden.dtype)) return "hidden states must be float32, float16 or bfloat16";
    if (bad_rows(in.hidden)) return "hidden states must be a tensor of [rows, width], with as many rows as the ids";
  }
  return nullptr;
}

// Rows are addressed by their place among the kept rows of the step; the tensor holds rows [base, …) of what the spans
// count. Calls `take(row of the tensor, count)` for kept rows [first, first + count).
template <typename Take>
void each_kept(std::span<const RowSpan> spans, int64_t base, int64_t first, int64_t count, Take&& take) {
  int64_t kept = 0;
  for (const RowSpan& span : spans) {
    const int64_t from = std::max(kept, first);
    const int64_t to = std::min(kept + span.count, first + count);
    if (from < to) take(span.start + (from - kept) - base, to - from);
    kept += span.count;
  }
}

inline void copy_kept(const RowsView& view, std::span<const RowSpan> spans, int64_t base, int64_t first, int64_t count,
                      std::byte* out) {
  const int64_t row_bytes = view.width * static_cast<int64_t>(size_of(view.dtype));
  each_kept(spans, base, first, count, [&](int64_t row, int64_t rows) {
    copy_rows(view, row, rows, out);
    out += rows * row_bytes;
  });
}

}  // namespace moe_native
