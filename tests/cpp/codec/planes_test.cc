#include "codec/planes.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace moe_native {
namespace {

TEST(Planes, LeastSignificantFirst) {
  const std::vector<uint32_t> values = {0x04030201, 0x14131211, 0x24232221};
  std::vector<uint8_t> out(12);
  split_planes(reinterpret_cast<const std::byte*>(values.data()), 3, 4, reinterpret_cast<std::byte*>(out.data()));
  EXPECT_EQ(out, (std::vector<uint8_t>{0x01, 0x11, 0x21, 0x02, 0x12, 0x22, 0x03, 0x13, 0x23, 0x04, 0x14, 0x24}));
}

TEST(Planes, TwoBytes) {
  const std::vector<uint16_t> values = {0x0201, 0x1211};
  std::vector<uint8_t> out(4);
  split_planes(reinterpret_cast<const std::byte*>(values.data()), 2, 2, reinterpret_cast<std::byte*>(out.data()));
  EXPECT_EQ(out, (std::vector<uint8_t>{0x01, 0x11, 0x02, 0x12}));
}

// The definition of a float16, in doubles: independent of both implementations.
double meaning(uint16_t half) {
  const int exponent = half >> 10 & 31;
  const int mantissa = half & 1023;
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return (half & 0x8000) != 0 ? -magnitude : magnitude;
}

TEST(Float16, EveryValueRoundTrips) {
  // Alone and in eights: the scalar code and, where the CPU has it, the vector code.
  for (size_t n : {size_t{1}, size_t{16}}) {
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
      const std::vector<uint16_t> half(n, static_cast<uint16_t>(bits));
      std::vector<float> wide(n);
      f16_to_f32(half.data(), n, wide.data());
      if ((bits & 0x7C00) == 0x7C00) {
        EXPECT_EQ(std::isnan(wide[0]), (bits & 0x3FF) != 0);
        if (std::isnan(wide[0])) continue;
        EXPECT_TRUE(std::isinf(wide[0]));
      } else {
        ASSERT_EQ(static_cast<double>(wide[0]), meaning(static_cast<uint16_t>(bits))) << bits;
      }
      std::vector<uint16_t> back(n);
      f32_to_f16(wide.data(), n, back.data());
      ASSERT_EQ(back[0], bits);
      ASSERT_EQ(back[n - 1], bits);
    }
  }
}

TEST(Float16, RoundsToNearestAndTiesToEven) {
  // Halfway between each pair of neighbours, and a hair to each side of it.
  for (uint32_t bits = 0; bits < 0x7BFF; ++bits) {
    const double low = meaning(static_cast<uint16_t>(bits)), high = meaning(static_cast<uint16_t>(bits + 1));
    const float middle = static_cast<float>((low + high) / 2);
    const float probes[3] = {std::nextafter(middle, 0.0f), middle, std::nextafter(middle, 1e9f)};
    const uint16_t expected[3] = {static_cast<uint16_t>(bits), static_cast<uint16_t>(bits + (bits & 1)),
                                  static_cast<uint16_t>(bits + 1)};
    for (int i = 0; i < 3; ++i) {
      std::vector<uint16_t> out(9);
      const std::vector<float> in(9, probes[i]);
      f32_to_f16(in.data(), 9, out.data());  // eight by the vector code, the ninth alone
      ASSERT_EQ(out[0], expected[i]) << bits << " " << i;
      ASSERT_EQ(out[8], expected[i]) << bits << " " << i;
    }
  }
}

TEST(Float16, Extremes) {
  const float in[4] = {65504.0f, 65519.9f, 65520.0f, std::numeric_limits<float>::infinity()};
  uint16_t out[4];
  f32_to_f16(in, 4, out);
  EXPECT_EQ(out[0], 0x7BFF);
  EXPECT_EQ(out[1], 0x7BFF);
  EXPECT_EQ(out[2], 0x7C00);
  EXPECT_EQ(out[3], 0x7C00);
}

TEST(BFloat16, IsTheUpperHalfOfAFloat) {
  EXPECT_EQ(bf16_to_f32(0x3F80), 1.0f);
  EXPECT_EQ(bf16_to_f32(0xC000), -2.0f);
  const std::vector<uint16_t> in(300, 0x3F00);
  std::vector<uint16_t> out(300);
  bf16_to_f16(in.data(), 300, out.data());
  EXPECT_EQ(out, std::vector<uint16_t>(300, 0x3800));  // one half
}

}  // namespace
}  // namespace moe_native
