#include "segment/segment_file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>

#include "segment/assembler.h"
#include "support.h"

namespace moe_native {
namespace {

namespace fs = std::filesystem;

struct SegmentFileTest : testing::Test {
  SegmentFileTest() : recorder(t.ring, Overflow::kDrop, kFieldIds, messages), assembler(t.ring, captures) {
    identity.directory = directory.path();
    identity.ring_id = 0xABCDEF;
    for (uint8_t i = 0; i < 16; ++i) identity.run_id[i] = i;
    extras.losses.resize(kLossCauses);
  }
  void append_steps(SegmentFile& file, uint32_t steps) {
    if (layers.empty()) layers = test::bind_layers(recorder, 2, 60, 4);
    for (uint32_t s = 0; s < steps; ++s) {
      test::record_step(recorder, layers, test::Routed(10, 4, 60), {test::run(0, s * 10, 10, 69)});
    }
    assembler.poll();
    std::vector<const StepData*> data;
    for (const StepData& step : assembler.ready()) data.push_back(&step);
    builder.build_rows(data, extras);
    assembler.ready().clear();
    assembler.release(assembler.positions());
    ASSERT_EQ(file.append(builder), 0);
    ++extras.number;
  }
  test::TemporaryDirectory directory;
  test::TestRing t;
  Messages messages;
  StepRecorder recorder;
  Captures captures;
  Assembler assembler;
  std::vector<Binding*> layers;
  SegmentIdentity identity{};
  BlockBuilder builder{false};
  BlockExtras extras;
  Compressor compressor;
};

TEST_F(SegmentFileTest, ClosedHasFooterTrailerAndItsFinalName) {
  SegmentFile file;
  ASSERT_EQ(file.create(identity, 3, R"({"model":"m"})", compressor), 0);
  EXPECT_TRUE(fs::exists(directory / "000003.moe.open"));
  append_steps(file, 2);
  append_steps(file, 3);
  ASSERT_EQ(file.close(builder, extras, Sync::kWait), 0);
  EXPECT_FALSE(fs::exists(directory / "000003.moe.open"));
  const std::string path = directory / "000003.moe";
  struct stat s {};
  ASSERT_EQ(::stat(path.c_str(), &s), 0);
  EXPECT_EQ(s.st_mode & 0777, 0600u);

  const std::string bytes = test::read_file(path);
  Superblock super;
  std::memcpy(&super, bytes.data(), sizeof super);
  EXPECT_EQ(super.number, 3u);
  EXPECT_EQ(super.ring_id, 0xABCDEFu);
  EXPECT_EQ(super.run_id[15], 15);
  EXPECT_EQ(bytes.substr(super.metadata_offset, super.metadata_stored), R"({"model":"m"})");
  Trailer trailer;
  std::memcpy(&trailer, bytes.data() + bytes.size() - 32, 32);
  EXPECT_EQ(std::memcmp(trailer.magic, "MOEFOOT1", 8), 0);
  EXPECT_EQ(trailer.file_bytes, bytes.size());
  EXPECT_EQ(trailer.crc, crc32(&trailer, 20));

  const auto blocks = test::decode_segment(path);
  ASSERT_EQ(blocks.size(), 3u);
  EXPECT_EQ(blocks[2].header.kind, BlockKind::kFooter);
  // index: offset u64, bytes u64, kind u16, steps u32, rows u32, …
  EXPECT_EQ(blocks[2].cell(EntryField::kIndex, 0, 18, 4), 2u);
  EXPECT_EQ(blocks[2].cell(EntryField::kIndex, 1, 22, 4), 30u);
  EXPECT_EQ(blocks[2].cell(EntryField::kIndex, 1, 0, 8),
            blocks[2].cell(EntryField::kIndex, 0, 0, 8) + blocks[2].cell(EntryField::kIndex, 0, 8, 8));
  EXPECT_EQ(test::decode_block(bytes, trailer.footer_offset).header.number, 2u);
  // The footer's statistics are the sum: 50 rows in each of two layers.
  EXPECT_EQ(blocks[2].cell(EntryField::kStatGroups, 0, 10, 8), 50u);
  EXPECT_EQ(blocks[2].cell(EntryField::kStatGroups, 1, 10, 8), 50u);
}

TEST_F(SegmentFileTest, WholeBlocksOfAnAbandonedFileStayReadable) {
  {
    SegmentFile file;
    ASSERT_EQ(file.create(identity, 0, "{}", compressor), 0);
    append_steps(file, 2);
  }
  EXPECT_EQ(test::decode_segment(directory / "000000.moe.open").size(), 1u);
}

TEST_F(SegmentFileTest, ErrorsAreReturned) {
  SegmentFile file;
  identity.directory = directory / "missing";
  EXPECT_EQ(file.create(identity, 0, "{}", compressor), ENOENT);
  EXPECT_FALSE(file.is_open());
  identity.directory = directory.path();
  ASSERT_EQ(file.create(identity, 0, "{}", compressor), 0);
  SegmentFile again;
  EXPECT_EQ(again.create(identity, 0, "{}", compressor), EEXIST);
}

}  // namespace
}  // namespace moe_native
