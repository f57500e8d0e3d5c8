#include "segment/block_builder.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>

#include "codec/planes.h"
#include "segment/assembler.h"
#include "support.h"

namespace moe_native {
namespace {

using test::DecodedBlock;
using test::Routed;
using test::run;

std::string as_text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

struct BlockBuilderTest : testing::Test {
  explicit BlockBuilderTest(uint32_t fields = kFieldIds | kFieldWeights | kFieldLogits)
      : recorder(t.ring, Overflow::kDrop, fields, messages), assembler(t.ring, captures) {
    extras.number = 9;
    extras.losses.resize(kLossCauses);
  }
  DecodedBlock build(bool exact = false) {
    assembler.poll();
    steps.clear();
    for (const StepData& step : assembler.ready()) steps.push_back(&step);
    BlockBuilder builder(exact);
    builder.build_rows(steps, extras);
    return test::decode_block(as_text(builder.bytes()));
  }
  test::TestRing t;
  Messages messages;
  StepRecorder recorder;
  Captures captures;
  Assembler assembler;
  BlockExtras extras;
  std::vector<const StepData*> steps;
};

TEST_F(BlockBuilderTest, ColumnsAreWhatTheRouterGave) {
  const auto layers = test::bind_layers(recorder, 2, 60, 4);
  const Routed a(3, 4, 60, 0), b(5, 4, 60, 3);
  ASSERT_TRUE(test::record_step(recorder, layers, a, {run(1, 0, 3, 69)}, "", 0, true));
  ASSERT_TRUE(test::record_step(recorder, layers, b, {run(1, 3, 1, 70), run(2, 0, 4, 69)}, "", 0, true));
  const DecodedBlock block = build();
  EXPECT_EQ(block.header.kind, BlockKind::kRows);
  EXPECT_EQ(block.header.number, 9u);
  EXPECT_EQ(block.header.steps, 2u);
  EXPECT_EQ(block.header.rows, 8u);
  EXPECT_EQ(block.header.first_step, 0u);
  EXPECT_EQ(block.header.last_step, 1u);
  for (int layer = 0; layer < 2; ++layer) {
    const std::string& ids = block.at(EntryField::kIds, layer);
    ASSERT_EQ(ids.size(), 32u);
    for (size_t i = 0; i < 12; ++i) EXPECT_EQ(ids[i], a.ids[i]);
    for (size_t i = 0; i < 20; ++i) EXPECT_EQ(ids[12 + i], b.ids[i]);
    // Weights: two planes of float16, exact here because they are multiples of 1/64.
    const std::string &low = block.at(EntryField::kWeights, layer, 0, 0),
                      &high = block.at(EntryField::kWeights, layer, 0, 1);
    for (size_t i = 0; i < 32; ++i) {
      const auto half =
          static_cast<uint16_t>(static_cast<unsigned char>(low[i]) | static_cast<unsigned char>(high[i]) << 8);
      float value;
      f16_to_f32(&half, 1, &value);
      EXPECT_EQ(value, i < 12 ? a.weights[i] : b.weights[i - 12]);
    }
    // Logits: four planes of the float32 they were.
    for (size_t i = 0; i < 8 * 60; ++i) {
      uint32_t bits = 0;
      for (int byte = 0; byte < 4; ++byte) {
        bits |= static_cast<uint32_t>(static_cast<unsigned char>(block.at(EntryField::kLogits, layer, 0, byte)[i]))
                << (8 * byte);
      }
      EXPECT_EQ(std::bit_cast<float>(bits), i < 180 ? a.logits[i] : b.logits[i - 180]);
    }
  }
}

Run counted(Run run) {
  run.flags |= kRunCounted;
  return run;
}

TEST_F(BlockBuilderTest, RunsThatAreOnlyCountedLeaveNoRow) {
  const auto layers = test::bind_layers(recorder, 2, 60, 4);
  const Routed a(6, 4, 60, 0), b(2, 4, 60, 3), c(3, 4, 60, 9);
  ASSERT_TRUE(test::record_step(
      recorder, layers, a, {counted(run(1, 0, 1, 69)), run(2, 7, 2, 70), counted(run(3, 0, 2, 69)), run(4, 0, 1, 69)},
      "", 0, true));
  ASSERT_TRUE(test::record_step(recorder, layers, b, {counted(run(1, 1, 2, 70))}, "", 0, true));
  ASSERT_TRUE(test::record_step(recorder, layers, c, {run(2, 9, 3, 70)}, "", 0, true));
  const DecodedBlock block = build();
  EXPECT_EQ(block.header.steps, 3u);
  EXPECT_EQ(block.header.rows, 6u);
  EXPECT_EQ(block.header.executed, 11u);
  for (int layer = 0; layer < 2; ++layer) {
    std::vector<int32_t> ids;
    for (size_t row : {1, 2, 5}) ids.insert(ids.end(), a.ids.begin() + row * 4, a.ids.begin() + row * 4 + 4);
    ids.insert(ids.end(), c.ids.begin(), c.ids.end());
    const std::string& stored = block.at(EntryField::kIds, layer);
    ASSERT_EQ(stored.size(), ids.size());
    for (size_t i = 0; i < ids.size(); ++i) EXPECT_EQ(stored[i], ids[i]);
    EXPECT_EQ(block.at(EntryField::kWeights, layer).size(), 24u);
    const std::string& low = block.at(EntryField::kLogits, layer, 0, 2);  // a byte of bf16's precision is enough
    ASSERT_EQ(low.size(), 6 * 60u);
    const auto byte = [](float value) { return static_cast<char>(std::bit_cast<uint32_t>(value) >> 16); };
    for (size_t i = 0; i < 60; ++i) EXPECT_EQ(low[120 + i], byte(a.logits[300 + i]));
    for (size_t i = 0; i < 180; ++i) EXPECT_EQ(low[180 + i], byte(c.logits[i]));
  }
  // The steps stay, with the rows that are stored; of the runs, those of stored rows.
  for (size_t step = 0; step < 3; ++step) {
    EXPECT_EQ(block.cell(EntryField::kSteps, step, 0, 8), step);
    EXPECT_EQ(block.cell(EntryField::kSteps, step, 16, 4), (std::array{3u, 0u, 3u})[step]);
    EXPECT_EQ(block.cell(EntryField::kSteps, step, 20, 4), (std::array{2u, 0u, 1u})[step]);
  }
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(block.cell(EntryField::kRuns, i, 0, 4), (std::array{2u, 4u, 2u})[i]);
    EXPECT_EQ(block.cell(EntryField::kRuns, i, 14, 2), 0u);
  }
  // stat_groups: layer, class, k u16, items u32, rows u64. All rows, each in its own class.
  EXPECT_EQ(block.cell(EntryField::kStatGroups, 0, 2, 2), 69u);
  EXPECT_EQ(block.cell(EntryField::kStatGroups, 0, 10, 8), 4u);
  EXPECT_EQ(block.cell(EntryField::kStatGroups, 1, 2, 2), 70u);
  EXPECT_EQ(block.cell(EntryField::kStatGroups, 1, 10, 8), 7u);
}

TEST_F(BlockBuilderTest, ABlockOfWhichNothingIsStoredHasNoPlane) {
  const auto layers = test::bind_layers(recorder, 2, 60, 4);
  ASSERT_TRUE(test::record_step(recorder, layers, Routed(6, 4, 60), {counted(run(1, 0, 6, 69))}, "", 0, true));
  const DecodedBlock block = build();
  EXPECT_EQ(block.header.rows, 0u);
  EXPECT_EQ(block.header.executed, 6u);
  for (const DirectoryEntry& entry : block.entries) EXPECT_GE(entry.field, EntryField::kSteps);
  EXPECT_EQ(block.cell(EntryField::kStatGroups, 1, 10, 8), 6u);
}

TEST_F(BlockBuilderTest, TablesSayWhoseRowsTheyAre) {
  const auto layers = test::bind_layers(recorder, 1, 60, 4);
  test::record_step(recorder, layers, Routed(3, 4, 60), {run(1, 0, 3, 69)});
  test::record_step(recorder, layers, Routed(2, 4, 60), {run(1, 3, 1, 70), run(2, 0, 1, 69)});
  extras.lanes = {{0, 1, 4}};
  extras.notes = {R"({"type":"request","index":1})", R"({"type":"request","index":2})"};
  extras.losses[2] = {1, 24, 7};
  const DecodedBlock block = build();
  // steps: step u64, time i64, rows u32, runs u32, flags u32
  EXPECT_EQ(block.cell(EntryField::kSteps, 1, 0, 8), 1u);
  EXPECT_EQ(block.cell(EntryField::kSteps, 0, 16, 4), 3u);
  EXPECT_EQ(block.cell(EntryField::kSteps, 1, 16, 4), 2u);
  EXPECT_EQ(block.cell(EntryField::kSteps, 1, 20, 4), 2u);
  EXPECT_GT(block.cell(EntryField::kSteps, 0, 8, 8), 1'600'000'000'000'000'000u);
  // runs: request, position, count u32, class, flags u16
  EXPECT_EQ(block.cell(EntryField::kRuns, 1, 0, 4), 1u);
  EXPECT_EQ(block.cell(EntryField::kRuns, 1, 4, 4), 3u);
  EXPECT_EQ(block.cell(EntryField::kRuns, 1, 8, 4), 1u);
  EXPECT_EQ(block.cell(EntryField::kRuns, 1, 12, 2), 70u);
  EXPECT_EQ(block.cell(EntryField::kRuns, 2, 0, 4), 2u);
  EXPECT_EQ(block.at(EntryField::kNotes), "{\"type\":\"request\",\"index\":1}\n{\"type\":\"request\",\"index\":2}\n");
  EXPECT_EQ(block.cell(EntryField::kLanes, 0, 10, 8), 4u);
  EXPECT_EQ(block.cell(EntryField::kLosses, 0, 0, 2), 2u);
  EXPECT_EQ(block.cell(EntryField::kLosses, 0, 2, 8), 1u);
  EXPECT_EQ(block.cell(EntryField::kLosses, 0, 10, 8), 24u);
  EXPECT_EQ(block.cell(EntryField::kLosses, 0, 18, 8), 7u);
}

TEST_F(BlockBuilderTest, StatisticsAreThoseOfThePlanes) {
  const auto layers = test::bind_layers(recorder, 2, 60, 4);
  const Routed routed(100, 4, 60);
  test::record_step(recorder, layers, routed, {run(1, 0, 40, 69), run(2, 7, 60, 70)});
  const DecodedBlock block = build();
  std::map<std::pair<int, int>, uint64_t> expected;  // (class, expert), the same for both layers
  for (size_t i = 0; i < routed.ids.size(); ++i) ++expected[{i < 160 ? 69 : 70, routed.ids[i]}];
  size_t item = 0, groups = 0;
  for (const auto& e : block.entries) groups = e.field == EntryField::kStatGroups ? e.rows : groups;
  ASSERT_EQ(groups, 4u);  // two layers, two classes
  for (size_t g = 0; g < groups; ++g) {
    const int row_class = static_cast<int>(block.cell(EntryField::kStatGroups, g, 2, 2));
    uint64_t sum = 0;
    for (uint64_t n = block.cell(EntryField::kStatGroups, g, 6, 4); n > 0; --n, ++item) {
      const int expert = static_cast<int>(block.cell(EntryField::kStatCounts, item, 0, 2));
      const uint64_t count = block.cell(EntryField::kStatCounts, item, 2, 8);
      EXPECT_EQ(count, (expected[{row_class, expert}]));
      sum += count;
    }
    EXPECT_EQ(sum, 4 * block.cell(EntryField::kStatGroups, g, 10, 8));
  }
}

TEST_F(BlockBuilderTest, ExactWeightsKeepTheirBits) {
  const auto layers = test::bind_layers(recorder, 1, 60, 2);
  Routed routed(2, 2, 60);
  routed.weights = {0.1f, 1.0f / 3, 2e-8f, 3.14159f};
  test::record_step(recorder, layers, routed, {run(0, 0, 2)});
  const DecodedBlock block = build(true);
  for (size_t i = 0; i < 4; ++i) {
    uint32_t bits = 0;
    for (int byte = 0; byte < 4; ++byte) {
      bits |= static_cast<uint32_t>(static_cast<unsigned char>(block.at(EntryField::kWeights, 0, 0, byte)[i]))
              << (8 * byte);
    }
    EXPECT_EQ(std::bit_cast<float>(bits), routed.weights[i]);
  }
}

TEST_F(BlockBuilderTest, AManyLayeredBlockHasItsDirectoryCompressed) {
  const auto layers = test::bind_layers(recorder, 48, 60, 4);
  test::record_step(recorder, layers, Routed(10, 4, 60), {run(0, 0, 10)});
  const DecodedBlock block = build();
  EXPECT_EQ(block.header.directory_codec, Codec::kZstd);
  EXPECT_LT(block.header.directory_stored, block.header.directory_raw / 2);
  EXPECT_EQ(block.at(EntryField::kIds, 47).size(), 40u);
}

TEST_F(BlockBuilderTest, NoStepsIsABlockToo) {
  extras.losses[0] = {3, 6, 9};
  const DecodedBlock block = build();
  EXPECT_EQ(block.header.steps, 0u);
  EXPECT_EQ(block.cell(EntryField::kLosses, 0, 2, 8), 3u);
}

TEST_F(BlockBuilderTest, FragmentsAndTheBlockThatCompletesThemAreTheStep) {
  const auto layers = test::bind_layers(recorder, 2, 60, 4);
  const Routed routed(6, 4, 60), first_half(4, 4, 60), second_half(2, 4, 60, 16 * 7);
  const RowSpan span{0, 6};
  recorder.begin_step({&span, 1});
  recorder.record(*layers[0], routed.input());
  recorder.record(*layers[1], first_half.input());
  assembler.poll();
  BlockBuilder builder(false);
  builder.build_fragment(assembler.open(), extras);
  const DecodedBlock fragment = test::decode_block(as_text(builder.bytes()));
  assembler.open().pieces.clear();
  ++assembler.open().fragments;
  recorder.record(*layers[1], second_half.input());
  const std::vector<moe_native::Run> runs = {run(3, 0, 6, 69)};
  StepTable table;
  table.runs = runs;
  recorder.end_step(table);
  const DecodedBlock rest = build();

  EXPECT_EQ(fragment.header.kind, BlockKind::kFragment);
  EXPECT_EQ(fragment.header.rows, 6u);
  EXPECT_EQ(fragment.at(EntryField::kIds, 0).size(), 24u);
  EXPECT_EQ(fragment.at(EntryField::kIds, 1).size(), 16u);
  EXPECT_EQ(rest.header.fragments, 1u);
  EXPECT_EQ(rest.at(EntryField::kIds, 1, 4).size(), 8u);
  EXPECT_EQ(rest.at(EntryField::kIds, 1, 4)[0], second_half.ids[0]);
  // The statistics are those of the whole step.
  EXPECT_EQ(rest.cell(EntryField::kStatGroups, 0, 10, 8), 6u);
  EXPECT_EQ(rest.cell(EntryField::kStatGroups, 1, 10, 8), 6u);
}

struct TokensBlock : BlockBuilderTest {
  TokensBlock() : BlockBuilderTest(kFieldIds | kFieldTokens) {}
};

TEST_F(TokensBlock, TokenIdsAreOneColumn) {
  const auto layers = test::bind_layers(recorder, 1, 60, 4);
  const RowSpan span{0, 3};
  recorder.begin_step({&span, 1});
  recorder.record(*layers[0], Routed(3, 4, 60).input());
  const std::vector<moe_native::Run> runs = {run(0, 0, 3)};
  const std::vector<uint32_t> tokens = {7, 151643, 0x01020304};
  StepTable table;
  table.runs = runs;
  table.tokens = tokens;
  ASSERT_TRUE(recorder.end_step(table));
  const DecodedBlock block = build();
  for (size_t i = 0; i < 3; ++i) {
    uint32_t value = 0;
    for (int byte = 0; byte < 4; ++byte) {
      value |= static_cast<uint32_t>(static_cast<unsigned char>(block.at(EntryField::kTokens, kNoLayer, 0, byte)[i]))
               << (8 * byte);
    }
    EXPECT_EQ(value, tokens[i]);
  }
  EXPECT_FALSE(block.has(EntryField::kWeights, 0));
}

}  // namespace
}  // namespace moe_native
