#include "codec/planes.h"

#include <bit>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moe_native {

namespace {

template <typename Item>
void split(const std::byte* in, size_t n, std::byte* out) noexcept {
  for (size_t b = 0; b < sizeof(Item); ++b) {
    std::byte* plane = out + b * n;
    for (size_t i = 0; i < n; ++i) {
      Item value;
      std::memcpy(&value, in + i * sizeof(Item), sizeof(Item));
      plane[i] = static_cast<std::byte>(value >> (8 * b) & 0xFF);
    }
  }
}

uint16_t f16_from_f32(float value) noexcept {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude >= 0x7F800000) {  // infinity, or a NaN that stays one
    return static_cast<uint16_t>(sign | 0x7C00 | (magnitude > 0x7F800000 ? 0x200 | (magnitude >> 13 & 0x3FF) : 0));
  }
  if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // rounds past 65504
  const auto nearest_even = [](uint32_t mantissa, uint32_t shift) {
    const uint32_t half = uint32_t{1} << (shift - 1);
    const uint32_t rest = mantissa & ((uint32_t{1} << shift) - 1);
    const uint32_t kept = mantissa >> shift;
    return kept + (rest > half || (rest == half && (kept & 1) != 0) ? 1 : 0);
  };
  if (magnitude < 0x38800000) {  // subnormal in float16
    const uint32_t exponent = magnitude >> 23;
    if (exponent < 102) return static_cast<uint16_t>(sign);
    const uint32_t mantissa = (magnitude & 0x7FFFFF) | 0x800000;
    return static_cast<uint16_t>(sign | nearest_even(mantissa, 126 - exponent));
  }
  // A carry out of the mantissa runs into the exponent, which is what rounding up means.
  return static_cast<uint16_t>(sign | (nearest_even(magnitude, 13) - (uint32_t{112} << 10)));
}

float f32_from_f16(uint16_t half) noexcept {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = half >> 10 & 0x1F;
  const uint32_t mantissa = half & 0x3FF;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return (sign != 0) ? -magnitude : magnitude;
  }
  const uint32_t wide = exponent == 31 ? 0x7F800000 : (exponent + 112) << 23;
  return std::bit_cast<float>(sign | wide | mantissa << 13);
}

#if defined(__x86_64__)
// A baseline x86-64 build has no conversion instruction; asking the CPU at run time makes this a hundred times faster.
bool has_f16c() noexcept {
  static const bool yes = __builtin_cpu_supports("f16c") != 0 && __builtin_cpu_supports("avx") != 0;
  return yes;
}

__attribute__((target("avx,f16c"))) size_t f32_to_f16_fast(const float* in, size_t n, uint16_t* out) noexcept {
  size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), half);
  }
  return i;
}

__attribute__((target("avx,f16c"))) size_t f16_to_f32_fast(const uint16_t* in, size_t n, float* out) noexcept {
  size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  }
  return i;
}
#else
bool has_f16c() noexcept { return false; }
size_t f32_to_f16_fast(const float*, size_t, uint16_t*) noexcept { return 0; }
size_t f16_to_f32_fast(const uint16_t*, size_t, float*) noexcept { return 0; }
#endif

}  // namespace

void split_planes(const std::byte* in, size_t n, size_t item, std::byte* out) noexcept {
  switch (item) {
    case 1:
      std::memcpy(out, in, n);
      return;
    case 2:
      return split<uint16_t>(in, n, out);
    case 4:
      return split<uint32_t>(in, n, out);
    default:
      return split<uint64_t>(in, n, out);
  }
}

void f32_to_f16(const float* in, size_t n, uint16_t* out) noexcept {
  size_t i = has_f16c() ? f32_to_f16_fast(in, n, out) : 0;
  for (; i < n; ++i) out[i] = f16_from_f32(in[i]);
}

void f16_to_f32(const uint16_t* in, size_t n, float* out) noexcept {
  size_t i = has_f16c() ? f16_to_f32_fast(in, n, out) : 0;
  for (; i < n; ++i) out[i] = f32_from_f16(in[i]);
}

float bf16_to_f32(uint16_t value) noexcept { return std::bit_cast<float>(static_cast<uint32_t>(value) << 16); }

void bf16_to_f16(const uint16_t* in, size_t n, uint16_t* out) noexcept {
  float chunk[256];
  for (size_t done = 0; done < n;) {
    const size_t count = n - done < 256 ? n - done : 256;
    for (size_t i = 0; i < count; ++i) chunk[i] = bf16_to_f32(in[done + i]);
    f32_to_f16(chunk, count, out + done);
    done += count;
  }
}

}  // namespace moe_native
