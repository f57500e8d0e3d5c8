#include "core/request_rows.h"

#include <gtest/gtest.h>

#include <random>

namespace moe_native {

bool operator==(const Run& a, const Run& b) {
  return a.request == b.request && a.position == b.position && a.count == b.count && a.row_class == b.row_class &&
         a.flags == b.flags;
}
void PrintTo(const Run& r, std::ostream* out) {
  *out << "(" << r.request << " at " << r.position << ", " << r.count << " of class " << r.row_class << ", flags "
       << r.flags << ")";
}

namespace {

using Runs = std::vector<Run>;

constexpr uint16_t kImage = 2;
constexpr uint16_t of(uint16_t phase, uint16_t modality = kText) {
  return static_cast<uint16_t>(phase | modality << kModalityShift | kAttributed);
}
constexpr uint16_t kPrompt = of(kPrefill), kGenerated = of(kDecode);

Runs execute(RequestRows& request, int64_t first, int64_t count, int64_t drafts = 0) {
  Runs runs;
  request.execute(first, count, drafts, runs);
  return runs;
}

TEST(RequestRows, APromptThenTokenByToken) {
  RequestRows request(7, 5);
  EXPECT_EQ(execute(request, 0, 5), (Runs{{7, 0, 5, kPrompt, 0}}));
  EXPECT_EQ(execute(request, 5, 1), (Runs{{7, 5, 1, kGenerated, 0}}));
  EXPECT_EQ(execute(request, 6, 1), (Runs{{7, 6, 1, kGenerated, 0}}));
  EXPECT_EQ(request.executed(), 7);
}

TEST(RequestRows, ARunEndsWhereThePhaseChangesAndWhereDraftsBegin) {
  RequestRows request(0, 5);
  EXPECT_EQ(execute(request, 3, 5, 2),
            (Runs{{0, 3, 2, kPrompt, 0}, {0, 5, 1, kGenerated, 0}, {0, 6, 2, kGenerated | kDraft, 0}}));
}

TEST(RequestRows, AnUnknownPromptHasNoPhase) {
  RequestRows request(0, -1);
  EXPECT_EQ(execute(request, 7, 2), (Runs{{0, 7, 2, of(0), 0}}));
}

TEST(RequestRows, WhatWasExecutedBeforeIsMarkedAndWhatWasCachedIsNot) {
  RequestRows request(0, 8);
  execute(request, 4, 2);
  const uint16_t again = kPrompt | kRecomputed;
  EXPECT_EQ(execute(request, 0, 8),
            (Runs{{0, 0, 4, kPrompt, 0}, {0, 4, 2, again, kRunRecomputed}, {0, 6, 2, kPrompt, 0}}));
}

TEST(RequestRows, ImagesLieBetweenText) {
  RequestRows request(0, 10);
  request.set_media({{2, 4, kImage}, {4, 5, kImage + 1}, {7, 12, kImage}});
  const auto image = of(kPrefill, kImage);
  EXPECT_EQ(
      execute(request, 1, 5),
      (Runs{
          {0, 1, 1, kPrompt, 0}, {0, 2, 2, image, 0}, {0, 4, 1, of(kPrefill, kImage + 1), 0}, {0, 5, 1, kPrompt, 0}}));
  EXPECT_EQ(execute(request, 6, 3), (Runs{{0, 6, 1, kPrompt, 0}, {0, 7, 2, image, 0}}));
  request.set_media({});
  EXPECT_EQ(execute(request, 9, 1), (Runs{{0, 9, 1, kPrompt, 0}}));
}

// Against the definition, position by position.
TEST(RequestRows, EveryRowOfRandomStepsHasItsClass) {
  std::mt19937 random(1);
  const auto up_to = [&](int64_t most) { return std::uniform_int_distribution<int64_t>(0, most)(random); };
  for (int round = 0; round < 300; ++round) {
    const int64_t prompt = up_to(20) - 1;
    RequestRows request(3, prompt);
    std::vector<MediaSpan> media;
    for (int64_t at = up_to(6); at < 24; at += up_to(6)) {
      const int64_t end = at + 1 + up_to(4);
      media.push_back({at, end, static_cast<uint16_t>(kImage + up_to(2))});
      at = end;
    }
    request.set_media(media);
    int64_t lowest = 1000, executed = 0;
    for (int step = 0; step < 6; ++step) {
      const int64_t first = up_to(24), count = 1 + up_to(12), drafts = up_to(count);
      int64_t at = first;
      const Runs runs = execute(request, first, count, drafts);
      for (size_t i = 0; i < runs.size(); ++i) {
        ASSERT_EQ(runs[i].request, 3u);
        ASSERT_EQ(runs[i].position, at);
        ASSERT_GT(runs[i].count, 0u);
        for (uint32_t row = 0; row < runs[i].count; ++row, ++at) {
          uint16_t modality = kText;
          for (const MediaSpan& span : media) {
            if (span.first <= at && at < span.end) modality = span.modality;
          }
          const bool again = lowest <= at && at < executed;
          uint16_t expected = of(prompt < 0 ? 0 : at < prompt ? kPrefill : kDecode, modality);
          if (again) expected |= kRecomputed;
          if (at >= first + count - drafts) expected |= kDraft;
          ASSERT_EQ(runs[i].row_class, expected) << "position " << at;
          ASSERT_EQ(runs[i].flags, again ? kRunRecomputed : 0);
        }
      }
      ASSERT_EQ(at, first + count);
      lowest = std::min(lowest, first);
      executed = std::max(executed, first + count);
      ASSERT_EQ(request.executed(), executed);
    }
  }
}

}  // namespace
}  // namespace moe_native
