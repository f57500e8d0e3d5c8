// Routers whose every value says whose row it is: of which request, position and layer, and of which time that it was
// executed. Steps of such, and whether a capture has their rows.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "capture/decoder.h"
#include "core/step_recorder.h"

namespace moe_native::test {

struct FakeRouter {
  uint32_t experts = 60;
  uint32_t k = 4;
  uint32_t hidden = 24;

  // The bits of an element. Those of weights, logits and hidden states are finite numbers.
  uint32_t element(int column, uint32_t request, uint32_t position, uint16_t layer, uint32_t again, uint32_t i) const {
    uint64_t x = 0x9E3779B97F4A7C15;
    for (const uint64_t part :
         {uint64_t(column), uint64_t(request), uint64_t(position), uint64_t(layer), uint64_t(again), uint64_t(i)}) {
      x = (x ^ part) * 0xBF58476D1CE4E5B9;
      x ^= x >> 29;
    }
    if (column == kIds) return static_cast<uint32_t>(x % experts);
    return static_cast<uint32_t>(x) & (column == kWeights ? 0x3F7FFFFF : 0x3FFF);
  }
  uint32_t width(int column) const { return column <= kWeights ? k : column == kLogits ? experts : hidden; }
  // A row as a capture has it: ids are narrowed, weights f32, logits bf16, hidden f16.
  std::string row(int column, uint32_t request, uint32_t position, uint16_t layer, uint32_t again = 0) const {
    const size_t bytes = column == kIds ? (experts <= 255 ? 1 : 2) : column == kWeights ? 4 : 2;
    std::string out;
    for (uint32_t i = 0; i < width(column); ++i) {
      const uint32_t value = element(column, request, position, layer, again, i);
      out.append(reinterpret_cast<const char*>(&value), bytes);
    }
    return out;
  }
};

// The tensors of one layer in one step.
class FakeTensors {
 public:
  FakeTensors(const FakeRouter& router, uint16_t layer, std::span<const Run> runs, uint32_t again = 0)
      : router_(router) {
    for (const Run& run : runs) {
      for (uint32_t i = 0; i < run.count; ++i, ++rows_) {
        for (uint32_t j = 0; j < router.k; ++j) {
          const uint32_t id = router.element(kIds, run.request, run.position + i, layer, again, j);
          ids_.push_back(static_cast<int32_t>(id));
        }
        for (int column = kWeights; column < kColumns; ++column) {
          columns_[column] += router.row(column, run.request, run.position + i, layer, again);
        }
      }
    }
  }
  LayerInput input() const {
    const auto view = [&](const void* data, DType dtype, int column) {
      const int64_t width = router_.width(column);
      return RowsView{static_cast<const std::byte*>(data), dtype, rows_, width, width, 1};
    };
    return {view(ids_.data(), DType::kI32, kIds), view(columns_[kWeights].data(), DType::kF32, kWeights),
            view(columns_[kLogits].data(), DType::kBF16, kLogits),
            view(columns_[kHidden].data(), DType::kF16, kHidden)};
  }

 private:
  FakeRouter router_;
  int64_t rows_ = 0;
  std::vector<int32_t> ids_;
  std::string columns_[kColumns];
};

struct Execution {
  bool announced = false;
  uint32_t again = 0;
};

// A step of these layers. False: it was not begun, or is lost.
inline bool execute(StepRecorder& recorder, const std::vector<Binding*>& layers, const FakeRouter& router,
                    const std::vector<Run>& runs, Execution how = {}) {
  RowSpan span;
  for (const Run& run : runs) span.count += run.count;
  const Begun begun = recorder.begin_step({&span, 1});
  if (begun != Begun::kAdmitted && begun != Begun::kForCaptures) return false;
  if (how.announced) recorder.announce(runs);
  for (Binding* b : layers) recorder.record(*b, FakeTensors(router, b->layer, runs, how.again).input());
  StepTable table;
  table.runs = runs;
  return recorder.end_step(table);
}

// The sample is this request, has rows at just these positions, and each is the router's, bit for bit.
inline void expect_rows(const DecodedCapture& capture, const FakeRouter& router, uint32_t sample, uint32_t request,
                        const std::vector<IndexedSpan>& spans, uint32_t fields, uint32_t again = 0) {
  EXPECT_EQ(capture.spans(sample), spans);
  const DecodedCapture::Request& of = capture.request(sample);
  for (const auto& layer : capture.layers) {
    for (int column = 0; column < kColumns; ++column) {
      if (column != kIds && (fields & 1u << column) == 0) {
        EXPECT_EQ(layer.dtypes[column], 0) << "column " << column << " was not wanted";
        continue;
      }
      for (const IndexedSpan& span : capture.spans(sample)) {
        for (uint32_t position = span.first; position < span.end; ++position) {
          ASSERT_EQ(capture.row(of, layer.layer, column, position),
                    router.row(column, request, position, layer.layer, again))
              << "request " << request << ", layer " << layer.layer << ", column " << column << ", position "
              << position;
        }
      }
    }
  }
}

}  // namespace moe_native::test
