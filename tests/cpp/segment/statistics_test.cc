#include "segment/statistics.h"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "support.h"

namespace moe_native {
namespace {

uint64_t cell(const Table& table, size_t item, size_t before, size_t width) {
  uint64_t value = 0;
  for (size_t b = 0; b < width; ++b) {
    value |= static_cast<uint64_t>(table.bytes()[before * table.items() + b * table.items() + item]) << (8 * b);
  }
  return value;
}

double real_cell(const Table& table, size_t item, size_t before) {
  const uint64_t bits = cell(table, item, before, 8);
  double value;
  std::memcpy(&value, &bits, 8);
  return value;
}

TEST(ClassSpans, NeighboursOfOneClassAreJoined) {
  std::vector<ClassSpan> spans;
  const std::vector<moe_native::Run> a = {test::run(0, 0, 3, 1), test::run(1, 0, 2, 1), test::run(2, 9, 1, 2)};
  append_class_spans(a, 0, spans);
  const std::vector<moe_native::Run> b = {test::run(3, 4, 5, 2)};
  append_class_spans(b, 6, spans);
  ASSERT_EQ(spans.size(), 2u);
  EXPECT_EQ(spans[0].rows, 5u);
  EXPECT_EQ(spans[1].first_row, 5u);
  EXPECT_EQ(spans[1].rows, 6u);
}

TEST(Statistics, CountsByClass) {
  // Five rows of top-2; rows 0 and 1 are class 1, the rest class 2. 255 is an invalid id.
  const std::vector<uint8_t> ids = {0, 1, 0, 2, 3, 0, 255, 3, 3, 1};
  const std::vector<float> weights = {.5f, .5f, .75f, .25f, .5f, .5f, 0.f, 1.f, .25f, .75f};
  const std::vector<ClassSpan> spans = {{0, 2, 1}, {2, 3, 2}};
  Statistics s;
  s.add(7, 2, DType::kU8, reinterpret_cast<const std::byte*>(ids.data()), weights.data(), 0, 5, spans);
  const Table groups = s.groups_table();
  ASSERT_EQ(groups.items(), 2u);
  // layer u16, class u16, k u16, items u32, rows u64, invalid u64
  EXPECT_EQ(cell(groups, 0, 0, 2), 7u);
  EXPECT_EQ(cell(groups, 0, 2, 2), 1u);
  EXPECT_EQ(cell(groups, 0, 4, 2), 2u);
  EXPECT_EQ(cell(groups, 0, 6, 4), 3u);
  EXPECT_EQ(cell(groups, 0, 10, 8), 2u);
  EXPECT_EQ(cell(groups, 0, 18, 8), 0u);
  EXPECT_EQ(cell(groups, 1, 10, 8), 3u);
  EXPECT_EQ(cell(groups, 1, 18, 8), 1u);
  const Table counts = s.counts_table();
  ASSERT_EQ(counts.items(), 6u);  // experts 0, 1, 2 and then 0, 1, 3
  const std::vector<uint64_t> experts = {0, 1, 2, 0, 1, 3}, expected = {2, 1, 1, 1, 1, 3};
  const std::vector<double> sums = {1.25, .5, .25, .5, .75, 1.75};
  for (size_t i = 0; i < 6; ++i) {
    EXPECT_EQ(cell(counts, i, 0, 2), experts[i]);
    EXPECT_EQ(cell(counts, i, 2, 8), expected[i]);
    EXPECT_EQ(real_cell(counts, i, 10), sums[i]);
  }
}

TEST(Statistics, PartsAreTheWholeInAnyOrder) {
  std::vector<uint16_t> ids;
  for (int i = 0; i < 600; ++i) ids.push_back(static_cast<uint16_t>(i * i % 300));
  const auto* bytes = reinterpret_cast<const std::byte*>(ids.data());
  const std::vector<ClassSpan> spans = {{0, 10, 1}, {10, 100, 2}, {110, 40, 1}};
  Statistics whole, head, tail;
  whole.add(0, 4, DType::kU16, bytes, nullptr, 0, 150, spans);
  tail.add(0, 4, DType::kU16, bytes + 2 * 4 * 60, nullptr, 60, 90, spans);
  head.add(0, 4, DType::kU16, bytes, nullptr, 0, 60, spans);
  tail.merge(head);
  EXPECT_EQ(tail.groups_table().bytes(), whole.groups_table().bytes());
  EXPECT_EQ(tail.counts_table().bytes(), whole.counts_table().bytes());
}

TEST(Statistics, OtherWidthsAreOtherGroups) {
  const std::vector<uint8_t> ids = {0, 1, 2, 3, 4, 5};
  const std::vector<ClassSpan> spans = {{0, 3, 1}};
  Statistics s;
  s.add(0, 2, DType::kU8, reinterpret_cast<const std::byte*>(ids.data()), nullptr, 0, 3, spans);
  s.add(0, 1, DType::kU8, reinterpret_cast<const std::byte*>(ids.data()), nullptr, 0, 3, spans);
  const Table groups = s.groups_table();
  ASSERT_EQ(groups.items(), 2u);
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(cell(groups, i, 4, 2), i + 1);
    EXPECT_EQ(cell(groups, i, 10, 8), 3u);
  }
}

}  // namespace
}  // namespace moe_native
