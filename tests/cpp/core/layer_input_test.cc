#include "core/layer_input.h"

#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "support.h"

namespace moe_native {
namespace {

using test::Routed;
using Parts = std::vector<std::pair<int64_t, int64_t>>;

Parts parts(const std::vector<RowSpan>& spans, int64_t base, int64_t first, int64_t count) {
  Parts all;
  each_kept(spans, base, first, count, [&](int64_t row, int64_t rows) { all.emplace_back(row, rows); });
  return all;
}

TEST(LayerInput, KeptRowsAreFoundInTheTensor) {
  const std::vector<RowSpan> spans = {{1, 2}, {5, 3}};
  EXPECT_EQ(parts(spans, 0, 0, 5), (Parts{{1, 2}, {5, 3}}));
  EXPECT_EQ(parts(spans, 0, 1, 2), (Parts{{2, 1}, {5, 1}}));
  EXPECT_EQ(parts(spans, 4, 2, 3), (Parts{{1, 3}})) << "the tensor starts at the fifth row";
  EXPECT_EQ(parts(spans, 0, 5, 0), Parts{});
}

TEST(LayerInput, KeptRowsAreCopiedOneBehindTheOther) {
  const Routed routed(8, 2, 60);
  std::vector<float> out(6);
  const std::vector<RowSpan> spans = {{1, 1}, {5, 2}};
  copy_kept(routed.input().weights, spans, 0, 0, 3, reinterpret_cast<std::byte*>(out.data()));
  const auto& w = routed.weights;
  EXPECT_EQ(out, (std::vector<float>{w[2], w[3], w[10], w[11], w[12], w[13]}));
}

TEST(LayerInput, WhatIsNotAskedForNeedNotBeUsable) {
  LayerInput in = Routed(3, 4, 60).input(true);
  constexpr uint32_t kAll = kFieldIds | kFieldWeights | kFieldLogits | kFieldHidden;
  EXPECT_EQ(unusable(in, kAll), nullptr) << "hidden states are not there, which is no fault";
  in.logits.rows = 2;
  EXPECT_NE(std::string(unusable(in, kAll)).find("router logits"), std::string::npos);
  EXPECT_EQ(unusable(in, kFieldIds | kFieldWeights), nullptr);
  in.weights.width = 3;
  EXPECT_NE(std::string(unusable(in, kFieldWeights)).find("weights"), std::string::npos);
  EXPECT_EQ(unusable(in, kFieldIds), nullptr);
  in.ids.dtype = DType::kF32;
  EXPECT_NE(std::string(unusable(in, 0)).find("expert ids"), std::string::npos);
}

}  // namespace
}  // namespace moe_native
