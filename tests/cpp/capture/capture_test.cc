#include "capture/capture.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>

#include "capture/fake_router.h"
#include "support.h"

namespace moe_native {
namespace {

using test::DecodedCapture;
using test::expect_rows;
using test::FakeRouter;
using test::IndexedSpan;
using test::run;
using Runs = std::vector<moe_native::Run>;
using Spans = std::vector<IndexedSpan>;

constexpr uint32_t kAllFields = kFieldIds | kFieldWeights | kFieldLogits | kFieldHidden;
constexpr uint32_t kNowhere = 0xFFFFFFFF;

// Rows of a layer as the ring has them.
struct FakePiece {
  FakePiece(const FakeRouter& router, uint16_t layer, const Runs& runs, uint32_t again = 0) {
    uint32_t rows = 0;
    for (const auto& r : runs) {
      for (uint32_t i = 0; i < r.count; ++i, ++rows) {
        for (int c = 0; c < test::kColumns; ++c) data[c] += router.row(c, r.request, r.position + i, layer, again);
      }
    }
    piece.shape = {layer,          router.experts <= 255 ? DType::kU8 : DType::kU16,
                   DType::kF32,    DType::kBF16,
                   DType::kF16,    router.k,
                   router.experts, router.hidden};
    piece.rows = rows;
  }
  // Rows [first, first + rows) of it.
  Piece part(uint32_t first, uint32_t rows) const {
    Piece part = piece;
    part.first_row = first;
    part.rows = rows;
    const auto at = [&](int column) {
      return reinterpret_cast<const std::byte*>(data[column].data() + data[column].size() / piece.rows * first);
    };
    part.ids = at(test::kIds);
    part.weights = at(test::kWeights);
    part.logits = at(test::kLogits);
    part.hidden = at(test::kHidden);
    return part;
  }
  Piece whole() const { return part(0, piece.rows); }

  Piece piece;
  std::string data[test::kColumns];
};

struct CaptureTest : testing::Test {
  static Capture make(uint32_t fields = kAllFields, std::optional<std::vector<uint16_t>> layers = {}) {
    return Capture(CaptureFile(), {fields, std::move(layers)});
  }
  void take(Capture& capture, const Runs& runs, const std::vector<uint16_t>& layers = {0, 1},
            uint32_t again = 0) const {
    std::vector<FakePiece> data;
    std::vector<Piece> pieces;
    for (const uint16_t layer : layers) data.emplace_back(router, layer, runs, again);
    for (const FakePiece& piece : data) pieces.push_back(piece.whole());
    capture.take(runs, pieces);
  }
  static DecodedCapture finish(Capture& capture) {
    const uint64_t index = capture.finish();
    const auto* data = reinterpret_cast<const char*>(capture.file().data());
    return test::decode_capture(std::string(data, capture.file().bytes()), index);
  }
  FakeRouter router;
};

TEST_F(CaptureTest, WithoutRequestsThereIsAnEmptyIndex) {
  Capture capture = make();
  take(capture, {run(1, 0, 5)});
  const DecodedCapture got = finish(capture);
  EXPECT_TRUE(got.layers.empty());
  EXPECT_TRUE(got.requests.empty());
}

TEST_F(CaptureTest, RowsOfItsRequestsLieByPosition) {
  Capture capture = make();
  capture.add(7, 0, 0, 10);
  capture.add(9, 1, 0, 20);
  take(capture, {run(7, 0, 4), run(8, 0, 3), run(9, 0, 6)});
  take(capture, {run(9, 6, 1), run(8, 3, 1), run(7, 4, 1)});
  const DecodedCapture got = finish(capture);
  ASSERT_EQ(got.requests.size(), 2u) << "the third is nobody's";
  EXPECT_EQ(got.layer_numbers(), (std::vector<uint16_t>{0, 1}));
  EXPECT_EQ(got.request(0).capacity, 10u);
  EXPECT_EQ(got.request(1).capacity, 20u);
  expect_rows(got, router, 0, 7, {{0, 5}}, kAllFields);
  expect_rows(got, router, 1, 9, {{0, 7}}, kAllFields);
}

TEST_F(CaptureTest, TheIndexSaysHowTheLayersLook) {
  router.experts = 300;
  Capture capture = make();
  capture.add(7, 0, 0, 8);
  take(capture, {run(7, 0, 2)}, {12});
  const DecodedCapture got = finish(capture);
  const DecodedCapture::Layer& layer = got.layer(12);
  const int dtypes[] = {static_cast<int>(DType::kU16), static_cast<int>(DType::kF32), static_cast<int>(DType::kBF16),
                        static_cast<int>(DType::kF16)};
  for (int c = 0; c < test::kColumns; ++c) EXPECT_EQ(layer.dtypes[c], dtypes[c]);
  EXPECT_EQ(layer.widths[test::kIds], 4u);
  EXPECT_EQ(layer.widths[test::kLogits], 300u);
  EXPECT_EQ(layer.widths[test::kHidden], 24u);
  expect_rows(got, router, 0, 7, {{0, 2}}, kAllFields);
}

TEST_F(CaptureTest, OnlyTheFieldsThatItWantsTakeRoom) {
  uint64_t largest = 0;
  for (const uint32_t more : {uint32_t{0}, uint32_t{kFieldWeights}, uint32_t{kFieldLogits}, uint32_t{kFieldHidden}}) {
    Capture capture = make(kFieldIds | more);
    capture.add(7, 0, 0, 1000);
    take(capture, {run(7, 0, 4)});
    largest = std::max(largest, capture.file().bytes());
    expect_rows(finish(capture), router, 0, 7, {{0, 4}}, kFieldIds | more);
  }
  EXPECT_LE(largest, 2u * 1000 * (4 + 120) + 4 * 64) << "ids and logits of two layers";
}

TEST_F(CaptureTest, OnlyTheLayersThatItWantsAreThere) {
  Capture capture = make(kAllFields, std::vector<uint16_t>{1, 3, 50});
  capture.add(7, 0, 0, 10);
  take(capture, {run(7, 0, 4)}, {0, 1, 2, 3});
  const DecodedCapture got = finish(capture);
  EXPECT_EQ(got.layer_numbers(), (std::vector<uint16_t>{1, 3}));
  expect_rows(got, router, 0, 7, {{0, 4}}, kAllFields);
}

TEST_F(CaptureTest, SamplesAndChildrenAreTheCallers) {
  Capture capture = make();
  capture.add(7, 5, 0, 10);
  capture.add(8, 5, 1, 10);
  take(capture, {run(8, 0, 3)});
  const DecodedCapture got = finish(capture);
  EXPECT_EQ(got.spans(5, 0), Spans{});
  EXPECT_EQ(got.spans(5, 1), (Spans{{0, 3}}));
  EXPECT_FALSE(got.has_plot(5, 0)) << "without a row there is no room for it";
}

TEST_F(CaptureTest, HolesAndDisorderShowAsSpans) {
  const auto spans_of = [&](const Runs& steps) {
    Capture capture = make();
    capture.add(7, 0, 0, 100);
    for (const auto& step : steps) take(capture, {step});
    const DecodedCapture got = finish(capture);
    expect_rows(got, router, 0, 7, got.spans(0), kAllFields);
    return got.spans(0);
  };
  EXPECT_EQ(spans_of({run(7, 4, 2), run(7, 0, 2)}), (Spans{{0, 2}, {4, 6}}));
  EXPECT_EQ(spans_of({run(7, 4, 2), run(7, 0, 2), run(7, 2, 2)}), (Spans{{0, 6}}));
  EXPECT_EQ(spans_of({run(7, 0, 3), run(7, 10, 3), run(7, 20, 3), run(7, 2, 19)}), (Spans{{0, 23}}));
  EXPECT_EQ(spans_of({run(7, 0, 3), run(7, 10, 3), run(7, 5, 1)}), (Spans{{0, 3}, {5, 6}, {10, 13}}));
  EXPECT_EQ(spans_of({run(7, 10, 3), run(7, 9, 9)}), (Spans{{9, 18}}));
  EXPECT_EQ(spans_of({run(7, 10, 9), run(7, 11, 2), run(7, 0, 1)}), (Spans{{0, 1}, {10, 19}}));
}

TEST_F(CaptureTest, SpansAreOfThePositionsThatAllLayersHave) {
  Capture capture = make();
  capture.add(7, 0, 0, 20);
  capture.add(8, 1, 0, 20);
  take(capture, {run(7, 0, 8), run(8, 0, 8)}, {0});
  take(capture, {run(7, 2, 2)}, {1});
  take(capture, {run(7, 6, 9)}, {1});
  const DecodedCapture got = finish(capture);
  expect_rows(got, router, 0, 7, {{2, 4}, {6, 8}}, kAllFields);
  EXPECT_EQ(got.spans(1), Spans{}) << "of layer 1 it has no row at all";
  EXPECT_TRUE(got.has_plot(1, 0));
  EXPECT_FALSE(got.has_plot(1, 1));
}

TEST_F(CaptureTest, ARowThatIsExecutedAgainReplacesTheOneBefore) {
  Capture capture = make();
  capture.add(7, 0, 0, 20);
  take(capture, {run(7, 0, 8)}, {0, 1}, 0);
  take(capture, {run(7, 4, 8)}, {0, 1}, 1);
  const DecodedCapture got = finish(capture);
  EXPECT_EQ(got.spans(0), (Spans{{0, 12}}));
  for (const uint16_t layer : {uint16_t{0}, uint16_t{1}}) {
    for (uint32_t p = 0; p < 12; ++p) {
      EXPECT_EQ(got.row(0, layer, test::kHidden, p), router.row(test::kHidden, 7, p, layer, p < 4 ? 0 : 1));
    }
  }
}

TEST_F(CaptureTest, RowsWhosePositionIsNotKnownAreLeftOut) {
  Capture capture = make();
  capture.add(7, 0, 0, 20);
  take(capture, {run(7, kNowhere, 3), run(7, 5, 2), run(kNoRequest, kNowhere, 2), run(7, 9, 1)});
  expect_rows(finish(capture), router, 0, 7, {{5, 7}, {9, 10}}, kAllFields);
}

TEST_F(CaptureTest, RowsBeyondTheCapacityAreLeftOutAndHarmNoOthers) {
  Capture capture = make();
  capture.add(7, 0, 0, 5);
  capture.add(8, 1, 0, 5);
  take(capture, {run(8, 0, 5), run(7, 0, 1)});
  take(capture, {run(7, 3, 10), run(8, 5, 1)});
  take(capture, {run(7, 5, 10), run(7, 4'000'000'000, 5)});
  const DecodedCapture got = finish(capture);
  expect_rows(got, router, 0, 7, {{0, 1}, {3, 5}}, kAllFields);
  expect_rows(got, router, 1, 8, {{0, 5}}, kAllFields);
}

TEST_F(CaptureTest, WithoutRoomForAnyPositionARequestHasNoRow) {
  Capture capture = make();
  capture.add(7, 0, 0, 0);
  take(capture, {run(7, 0, 5)});
  EXPECT_EQ(finish(capture).spans(0), Spans{});
}

TEST_F(CaptureTest, OfALayerThatChangesItsShapeRowsAreMissingAndNotWrong) {
  Capture capture = make();
  capture.add(7, 0, 0, 20);
  take(capture, {run(7, 0, 4)});
  const FakeRouter before = router;
  for (const FakeRouter& other : {FakeRouter{60, 3, 24}, FakeRouter{300, 4, 24}, FakeRouter{60, 4, 25}}) {
    router = other;
    take(capture, {run(7, 2, 6)});
  }
  router = before;
  take(capture, {run(7, 10, 4)});
  expect_rows(finish(capture), router, 0, 7, {{0, 4}, {10, 14}}, kAllFields);
}

TEST_F(CaptureTest, AColumnThatComesAndGoesIsAnotherShapeOnlyForWhoWantsIt) {
  Capture all = make(), without = make(kFieldIds | kFieldWeights);
  for (Capture* capture : {&all, &without}) {
    capture->add(7, 0, 0, 20);
    take(*capture, {run(7, 0, 4)}, {0});
    const Runs runs = {run(7, 4, 4)};
    const FakePiece data(router, 0, runs);
    Piece piece = data.whole();
    piece.shape.logits_dtype = DType::kNone;
    piece.shape.logits_width = 0;
    piece.logits = nullptr;
    capture->take(runs, {&piece, 1});
  }
  expect_rows(finish(all), router, 0, 7, {{0, 4}}, kAllFields);
  expect_rows(finish(without), router, 0, 7, {{0, 8}}, kFieldIds | kFieldWeights);
}

TEST_F(CaptureTest, PiecesOfAStepAndRunsOfItAreCutWhereverTheyAre) {
  const Runs runs = {run(7, 10, 5), run(1, 0, 4), run(8, 3, 7), run(7, 0, 4)};
  const FakePiece data(router, 0, runs);
  for (uint32_t size = 1; size <= data.piece.rows; ++size) {
    Capture capture = make();
    capture.add(7, 0, 0, 20);
    capture.add(8, 1, 0, 20);
    std::vector<Piece> pieces;
    for (uint32_t first = 0; first < data.piece.rows; first += size) {
      pieces.push_back(data.part(first, std::min(size, data.piece.rows - first)));
    }
    std::ranges::reverse(pieces);
    capture.take(runs, pieces);
    const DecodedCapture got = finish(capture);
    expect_rows(got, router, 0, 7, {{0, 4}, {10, 15}}, kAllFields);
    expect_rows(got, router, 1, 8, {{3, 10}}, kAllFields);
  }
}

TEST_F(CaptureTest, ARequestThatIsAddedAgainStartsAgain) {
  Capture capture = make();
  capture.add(7, 0, 0, 4);
  capture.add(8, 1, 0, 8);
  take(capture, {run(7, 0, 4), run(8, 0, 8)});
  capture.add(7, 2, 0, 1000);
  take(capture, {run(7, 2, 200)});
  const DecodedCapture got = finish(capture);
  ASSERT_EQ(got.requests.size(), 2u);
  expect_rows(got, router, 2, 7, {{2, 202}}, kAllFields);
  expect_rows(got, router, 1, 8, {{0, 8}}, kAllFields);
}

TEST_F(CaptureTest, RowsFromBeforeARequestIsAddedAreNotItsOwn) {
  Capture capture = make();
  take(capture, {run(7, 0, 4)});
  capture.add(7, 0, 0, 20);
  take(capture, {run(7, 4, 1)});
  expect_rows(finish(capture), router, 0, 7, {{4, 5}}, kAllFields);
}

TEST_F(CaptureTest, WhateverOrderRowsComeInTheLastOfEachPositionIsThere) {
  std::mt19937 random(1);
  const auto below = [&](uint32_t n) { return static_cast<uint32_t>(random() % n); };
  for (int round = 0; round < 20; ++round) {
    Capture capture = make();
    std::map<uint32_t, std::map<uint16_t, std::map<uint32_t, uint32_t>>> last;  // request, layer, position
    for (uint32_t request = 0; request < 3; ++request) capture.add(request, request, 0, 50);
    for (uint32_t again = 0; again < 60; ++again) {
      Runs runs;
      std::vector<uint16_t> layers;
      for (uint32_t request = 0; request < 4; ++request) {
        if (request == again % 4 || below(2) == 0) runs.push_back(run(request, below(60), 1 + below(8)));
      }
      for (uint16_t layer = 0; layer < 3; ++layer) {
        if (below(4) != 0) layers.push_back(layer);
      }
      take(capture, runs, layers, again);
      for (const auto& r : runs) {
        for (const uint16_t layer : layers) {
          for (uint32_t p = r.position; p < std::min(r.position + r.count, 50u); ++p) last[r.request][layer][p] = again;
        }
      }
    }
    const DecodedCapture got = finish(capture);
    for (uint32_t request = 0; request < 3; ++request) {
      std::set<uint32_t> there;
      for (const IndexedSpan& span : got.spans(request)) {
        for (uint32_t p = span.first; p < span.end; ++p) there.insert(p);
      }
      for (uint32_t p = 0; p < 50; ++p) {
        bool of_all = true;
        for (uint16_t layer = 0; layer < 3; ++layer) {
          const auto found = last[request][layer].find(p);
          of_all = of_all && found != last[request][layer].end();
          if (found == last[request][layer].end()) continue;
          for (int c = 0; c < test::kColumns; ++c) {
            ASSERT_EQ(got.row(request, layer, c, p), router.row(c, request, p, layer, found->second));
          }
        }
        ASSERT_EQ(there.contains(p), of_all) << p;
      }
    }
  }
}

}  // namespace
}  // namespace moe_native
