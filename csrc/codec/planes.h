// Byte planes: a column of multi-byte elements, taken apart so that each plane holds bytes of one significance. The
// upper bytes of weights and logits repeat and compress well; the lowest hardly do and are stored raw.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moe_native {

// out receives `item` planes of n bytes each, the least significant first.
void split_planes(const std::byte* in, size_t n, size_t item, std::byte* out) noexcept;

// float32 or bfloat16 to float16, round to nearest even, as IEEE 754 and numpy do it.
void f32_to_f16(const float* in, size_t n, uint16_t* out) noexcept;
void bf16_to_f16(const uint16_t* in, size_t n, uint16_t* out) noexcept;
void f16_to_f32(const uint16_t* in, size_t n, float* out) noexcept;
float bf16_to_f32(uint16_t value) noexcept;

}  // namespace moe_native
