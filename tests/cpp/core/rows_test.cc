#include "core/rows.h"

#include <gtest/gtest.h>

#include <cstring>
#include <vector>

namespace moe_native {
namespace {

template <typename T>
RowsView view_of(const std::vector<T>& data, DType dtype, int64_t rows, int64_t width, int64_t row_stride,
                 int64_t column_stride) {
  return {reinterpret_cast<const std::byte*>(data.data()), dtype, rows, width, row_stride, column_stride};
}

template <typename T>
class NarrowIds : public testing::Test {
 public:
  static constexpr DType dtype() {
    if constexpr (std::is_same_v<T, int32_t>) return DType::kI32;
    if constexpr (std::is_same_v<T, int64_t>) return DType::kI64;
    if constexpr (std::is_same_v<T, uint16_t>) return DType::kU16;
    return DType::kU32;
  }
};
using IdTypes = testing::Types<int32_t, int64_t, uint16_t, uint32_t>;
TYPED_TEST_SUITE(NarrowIds, IdTypes);

TYPED_TEST(NarrowIds, ToBytes) {
  const std::vector<TypeParam> ids = {0, 1, 59, 254, 17, 3};
  std::vector<uint8_t> out(6);
  EXPECT_EQ(narrow_ids(view_of(ids, this->dtype(), 3, 2, 2, 1), 0, 3, 255, reinterpret_cast<std::byte*>(out.data())),
            0u);
  EXPECT_EQ(out, (std::vector<uint8_t>{0, 1, 59, 254, 17, 3}));
}

TYPED_TEST(NarrowIds, IllegalIdsBecomeTheMarkerAndAreCounted) {
  const std::vector<TypeParam> ids = {60, static_cast<TypeParam>(-1), 59, 1000};
  std::vector<uint8_t> out(4);
  EXPECT_EQ(narrow_ids(view_of(ids, this->dtype(), 2, 2, 2, 1), 0, 2, 60, reinterpret_cast<std::byte*>(out.data())),
            3u);
  EXPECT_EQ(out, (std::vector<uint8_t>{255, 255, 59, 255}));
}

TYPED_TEST(NarrowIds, WiderModelsTakeTwoBytes) {
  const std::vector<TypeParam> ids = {255, 256, 511, 512};
  std::vector<uint16_t> out(4);
  EXPECT_EQ(narrow_ids(view_of(ids, this->dtype(), 2, 2, 2, 1), 0, 2, 512, reinterpret_cast<std::byte*>(out.data())),
            1u);
  EXPECT_EQ(out, (std::vector<uint16_t>{255, 256, 511, 65535}));
}

TYPED_TEST(NarrowIds, AnyStrides) {
  // Columns lie apart, rows too, as in a transposed slice.
  const std::vector<TypeParam> ids = {0, 9, 1, 9, 2, 9, 3, 9, 4, 9, 5, 9};
  std::vector<uint8_t> out(6);
  EXPECT_EQ(narrow_ids(view_of(ids, this->dtype(), 2, 3, 2, 4), 0, 2, 10, reinterpret_cast<std::byte*>(out.data())),
            0u);
  EXPECT_EQ(out, (std::vector<uint8_t>{0, 2, 4, 1, 3, 5}));
}

TYPED_TEST(NarrowIds, PartOfTheRows) {
  const std::vector<TypeParam> ids = {0, 1, 2, 3, 4, 5};
  std::vector<uint8_t> out(2);
  narrow_ids(view_of(ids, this->dtype(), 3, 2, 2, 1), 1, 1, 10, reinterpret_cast<std::byte*>(out.data()));
  EXPECT_EQ(out, (std::vector<uint8_t>{2, 3}));
}

TEST(IdDtype, LastLegalIdMustStayBelowTheMarker) {
  EXPECT_EQ(id_dtype_for(255), DType::kU8);   // ids up to 254
  EXPECT_EQ(id_dtype_for(256), DType::kU16);  // 255 is legal here
}

TEST(CopyRows, ContiguousStridedAndTransposed) {
  std::vector<float> data(12);
  for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<float>(i);
  std::vector<float> out(4);
  auto* to = reinterpret_cast<std::byte*>(out.data());
  copy_rows(view_of(data, DType::kF32, 6, 2, 2, 1), 1, 2, to);
  EXPECT_EQ(out, (std::vector<float>{2, 3, 4, 5}));
  copy_rows(view_of(data, DType::kF32, 3, 2, 4, 1), 1, 2, to);
  EXPECT_EQ(out, (std::vector<float>{4, 5, 8, 9}));
  copy_rows(view_of(data, DType::kF32, 4, 2, 1, 4), 1, 2, to);
  EXPECT_EQ(out, (std::vector<float>{1, 5, 2, 6}));
}

}  // namespace
}  // namespace moe_native
