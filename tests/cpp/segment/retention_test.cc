#include "segment/retention.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "support.h"

namespace moe_native {
namespace {

namespace fs = std::filesystem;

struct RetentionTest : testing::Test {
  void file(const std::string& path, size_t bytes) {
    fs::create_directories(fs::path(trace / path).parent_path());
    std::ofstream(trace / path) << std::string(bytes, 'x');
  }
  bool exists(const std::string& path) const { return fs::exists(trace / path); }
  test::TemporaryDirectory trace;
};

TEST_F(RetentionTest, OldestFirstAcrossRuns) {
  file("run-1/rank-0/000000.moe", 100);
  file("run-1/rank-0/000001.moe", 100);
  file("run-2/rank-0/000000.moe", 100);
  file("run-2/rank-0/000001.moe.open", 100);
  keep_within(trace.path(), 250);
  EXPECT_FALSE(exists("run-1/rank-0/000000.moe"));
  EXPECT_FALSE(exists("run-1/rank-0/000001.moe"));
  EXPECT_TRUE(exists("run-1/rank-0")) << "it may be a living recorder's, between two segments";
  EXPECT_TRUE(exists("run-2/rank-0/000000.moe"));
  EXPECT_TRUE(exists("run-2/rank-0/000001.moe.open"));
}

TEST_F(RetentionTest, NothingGoesWhileThereIsRoom) {
  file("run-1/rank-0/000000.moe", 100);
  keep_within(trace.path(), 100);
  EXPECT_TRUE(exists("run-1/rank-0/000000.moe"));
}

TEST_F(RetentionTest, AnOpenSegmentStaysWhateverTheSize) {
  file("run-1/rank-0/000000.moe", 100);
  file("run-1/rank-0/000001.moe.open", 1000);
  file("run-1/rank-0/rank.json", 10);
  keep_within(trace.path(), 50);
  EXPECT_FALSE(exists("run-1/rank-0/000000.moe"));
  EXPECT_TRUE(exists("run-1/rank-0/000001.moe.open"));
  EXPECT_TRUE(exists("run-1/rank-0/rank.json"));
}

TEST_F(RetentionTest, NumbersBeyondSixDigitsAreLater) {
  file("run-1/rank-0/999999.moe", 100);
  file("run-1/rank-0/1000000.moe", 100);
  keep_within(trace.path(), 150);
  EXPECT_FALSE(exists("run-1/rank-0/999999.moe"));
  EXPECT_TRUE(exists("run-1/rank-0/1000000.moe"));
}

TEST_F(RetentionTest, AMissingTraceIsNoError) { keep_within(trace / "missing", 1); }

}  // namespace
}  // namespace moe_native
