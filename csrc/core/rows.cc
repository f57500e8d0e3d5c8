#include "core/rows.h"

#include <cstring>
#include <limits>
#include <type_traits>

namespace moe_native {

namespace {

template <typename From, typename To>
uint32_t narrow(const RowsView& ids, int64_t first, int64_t count, uint32_t experts, To* out) noexcept {
  constexpr To kInvalid = std::numeric_limits<To>::max();
  using Unsigned = std::make_unsigned_t<From>;  // a negative id is a huge one: one comparison finds both
  const auto* data = reinterpret_cast<const From*>(ids.data);
  uint32_t invalid = 0;
  const auto one = [&](From id) -> To {
    const bool legal = static_cast<Unsigned>(id) < experts;
    invalid += legal ? 0 : 1;
    return legal ? static_cast<To>(id) : kInvalid;
  };
  if (ids.column_stride == 1 && ids.row_stride == ids.width) {
    const From* from = data + first * ids.width;
    const int64_t total = count * ids.width;
    // Legal ids are the rule: one pass that a compiler turns into vector code, and a count only where it found one that
    // is not.
    const Unsigned last = static_cast<Unsigned>(experts - 1);
    Unsigned bad = 0;
    for (int64_t i = 0; i < total; ++i) {
      const Unsigned id = static_cast<Unsigned>(from[i]);
      bad |= static_cast<Unsigned>(id > last);
      out[i] = static_cast<To>(id > last ? kInvalid : id);
    }
    if (bad != 0) {
      for (int64_t i = 0; i < total; ++i) invalid += static_cast<Unsigned>(from[i]) > last ? 1 : 0;
    }
    return invalid;
  }
  for (int64_t row = first; row < first + count; ++row) {
    const From* from = data + row * ids.row_stride;
    for (int64_t column = 0; column < ids.width; ++column) *out++ = one(from[column * ids.column_stride]);
  }
  return invalid;
}

template <typename To>
uint32_t narrow_to(const RowsView& ids, int64_t first, int64_t count, uint32_t experts, To* out) noexcept {
  switch (ids.dtype) {
    case DType::kI32:
      return narrow<int32_t>(ids, first, count, experts, out);
    case DType::kI64:
      return narrow<int64_t>(ids, first, count, experts, out);
    case DType::kU16:
      return narrow<uint16_t>(ids, first, count, experts, out);
    default:
      return narrow<uint32_t>(ids, first, count, experts, out);
  }
}

}  // namespace

uint32_t narrow_ids(const RowsView& ids, int64_t first, int64_t count, uint32_t experts, std::byte* out) noexcept {
  return id_dtype_for(experts) == DType::kU8 ? narrow_to(ids, first, count, experts, reinterpret_cast<uint8_t*>(out))
                                             : narrow_to(ids, first, count, experts, reinterpret_cast<uint16_t*>(out));
}

void copy_rows(const RowsView& view, int64_t first, int64_t count, std::byte* out) noexcept {
  const int64_t item = static_cast<int64_t>(size_of(view.dtype));
  const int64_t row_bytes = view.width * item;
  const std::byte* from = view.data + first * view.row_stride * item;
  if (view.column_stride == 1 && view.row_stride == view.width) {
    std::memcpy(out, from, static_cast<size_t>(count * row_bytes));
    return;
  }
  for (int64_t row = 0; row < count; ++row, from += view.row_stride * item, out += row_bytes) {
    if (view.column_stride == 1) {
      std::memcpy(out, from, static_cast<size_t>(row_bytes));
      continue;
    }
    for (int64_t column = 0; column < view.width; ++column) {
      std::memcpy(out + column * item, from + column * view.column_stride * item, static_cast<size_t>(item));
    }
  }
}

}  // namespace moe_native
