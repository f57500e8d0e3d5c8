#include "core/crc32.h"

#include <gtest/gtest.h>

#include <string>

namespace moe_native {
namespace {

TEST(Crc32, CheckValueOfTheStandard) { EXPECT_EQ(crc32("123456789", 9), 0xCBF43926u); }

TEST(Crc32, Empty) { EXPECT_EQ(crc32("", 0), 0u); }

TEST(Crc32, PiecesAreTheWhole) {
  std::string text;
  for (int i = 0; i < 1000; ++i) text.push_back(static_cast<char>(i * 31));
  const uint32_t whole = crc32(text.data(), text.size());
  for (size_t cut : {0u, 1u, 7u, 8u, 9u, 500u, 1000u}) {
    EXPECT_EQ(crc32(text.data() + cut, text.size() - cut, crc32(text.data(), cut)), whole) << cut;
  }
}

}  // namespace
}  // namespace moe_native
