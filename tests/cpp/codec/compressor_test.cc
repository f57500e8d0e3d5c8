#include "codec/compressor.h"

#include <gtest/gtest.h>
#include <zstd.h>

#include <random>
#include <string>
#include <vector>

namespace moe_native {
namespace {

TEST(Compressor, WhatItMakesAnyZstdReads) {
  std::string text;
  for (int i = 0; i < 10000; ++i) text.append("expert ").append(std::to_string(i % 60));
  std::vector<std::byte> out(text.size());
  Compressor compressor;
  for (int again = 0; again < 3; ++again) {  // one context, many frames
    const size_t n = compressor.compress(reinterpret_cast<const std::byte*>(text.data()), text.size(), out.data());
    ASSERT_GT(n, 0u);
    ASSERT_LT(n, text.size() / 10);
    EXPECT_EQ(ZSTD_getFrameContentSize(out.data(), n), text.size());
    std::string back(text.size(), '\0');
    EXPECT_EQ(ZSTD_decompress(back.data(), back.size(), out.data(), n), text.size());
    EXPECT_EQ(back, text);
  }
}

TEST(Compressor, NoiseIsLeftRaw) {
  std::mt19937 random(1);
  std::vector<std::byte> noise(10000), out(10000);
  for (auto& b : noise) b = static_cast<std::byte>(random() & 0xFF);
  Compressor compressor;
  EXPECT_EQ(compressor.compress(noise.data(), noise.size(), out.data()), 0u);
  EXPECT_EQ(compressor.compress(noise.data(), 0, out.data()), 0u);
  EXPECT_EQ(compressor.compress(noise.data(), 1, out.data()), 0u);
}

}  // namespace
}  // namespace moe_native
