// Element types as FORMAT.md numbers them. The same codes are used in the ring, in blocks and in tensor views.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moe_native {

enum class DType : uint8_t {
  kNone = 0,
  kU8 = 1,
  kU16 = 2,
  kU32 = 3,
  kF16 = 4,
  kBF16 = 5,
  kF32 = 6,
  // Accepted from a router, never stored: ids are narrowed to u8 or u16 on the way in.
  kI32 = 64,
  kI64 = 65,
};

constexpr size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kU8:
      return 1;
    case DType::kU16:
    case DType::kF16:
    case DType::kBF16:
      return 2;
    case DType::kU32:
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kI64:
      return 8;
    case DType::kNone:
      return 0;
  }
  return 0;
}

constexpr bool is_floating(DType dtype) {
  return dtype == DType::kF16 || dtype == DType::kBF16 || dtype == DType::kF32;
}

constexpr bool is_id(DType dtype) {
  return dtype == DType::kI32 || dtype == DType::kI64 || dtype == DType::kU16 || dtype == DType::kU32;
}

// Ids fit in a byte when every legal one is below the marker 255.
constexpr DType id_dtype_for(uint32_t experts) { return experts <= 255 ? DType::kU8 : DType::kU16; }

}  // namespace moe_native
