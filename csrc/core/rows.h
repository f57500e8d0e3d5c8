// Copying rows of a router's tensors into a record: ids narrowed, everything else byte for byte. Part of the hot path.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace moe_native {

// A two-dimensional tensor as the op sees it. Strides are in elements and may be anything.
struct RowsView {
  const std::byte* data = nullptr;
  DType dtype = DType::kNone;  // kNone: the tensor was not given
  int64_t rows = 0;
  int64_t width = 0;
  int64_t row_stride = 0;
  int64_t column_stride = 0;
};

// Writes rows [first, first + count) as u8 (experts ≤ 255) or u16. An id outside [0, experts) becomes 255 or 65535;
// returns how many there were.
uint32_t narrow_ids(const RowsView& ids, int64_t first, int64_t count, uint32_t experts, std::byte* out) noexcept;

// Writes rows [first, first + count) as they are.
void copy_rows(const RowsView& view, int64_t first, int64_t count, std::byte* out) noexcept;

}  // namespace moe_native
