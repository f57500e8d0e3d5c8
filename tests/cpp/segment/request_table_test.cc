#include "segment/request_table.h"

#include <gtest/gtest.h>

#include "support.h"

namespace moe_native {
namespace {

using Lines = std::vector<std::string>;

struct RequestTableTest : testing::Test {
  Lines lines(const std::string& notes, const std::vector<moe_native::Run>& runs) {
    StepData step;
    step.notes = {reinterpret_cast<const std::byte*>(notes.data()), notes.size()};
    step.runs = runs;
    const StepData* one = &step;
    return table.lines_for({&one, 1});
  }
  RequestTable table;
};

TEST_F(RequestTableTest, ADefinitionIsWrittenOnceASegment) {
  const std::vector<moe_native::Run> runs = {test::run(4, 0, 1)};
  EXPECT_EQ(lines(test::note(1, 4, "four"), runs), Lines{"four"});
  table.written();
  EXPECT_EQ(lines("", runs), Lines{});
  table.written();
  table.new_segment();
  EXPECT_EQ(lines("", runs), Lines{"four"});
}

TEST_F(RequestTableTest, ALaterDefinitionReplaces) {
  lines(test::note(1, 4, "four"), {});
  table.written();
  EXPECT_EQ(lines(test::note(1, 4, "FOUR"), {}), Lines{"FOUR"});
  table.written();
  table.new_segment();
  EXPECT_EQ(lines("", {test::run(4, 0, 1)}), Lines{"FOUR"});
}

TEST_F(RequestTableTest, EndedRequestsAreForgottenBehindTheirBlock) {
  EXPECT_EQ(lines(test::note(1, 4, "four") + test::note(2, 4, ""), {test::run(4, 0, 1)}), Lines{"four"});
  table.new_segment();
  EXPECT_EQ(lines("", {test::run(4, 0, 1)}), Lines{});
}

TEST_F(RequestTableTest, ARequestOfWhichNoRowIsStoredIsNotDefinedAgain) {
  lines(test::note(1, 4, "four"), {});
  table.written();
  table.new_segment();
  moe_native::Run counted = test::run(4, 0, 1);
  counted.flags = kRunCounted;
  EXPECT_EQ(lines("", {counted}), Lines{});
  EXPECT_EQ(lines("", {counted, test::run(4, 1, 1)}), Lines{"four"});
}

TEST_F(RequestTableTest, OtherLinesAreSaidUntilTheyAreWritten) {
  EXPECT_EQ(lines(test::note(3, 0, "amend"), {}), Lines{"amend"});
  EXPECT_EQ(lines("", {}), Lines{"amend"});
  table.written();
  EXPECT_EQ(lines("", {}), Lines{});
}

TEST_F(RequestTableTest, TornNotesEndTheReading) {
  const std::string whole = test::note(3, 0, "whole");
  EXPECT_EQ(lines(whole + test::note(3, 0, "torn").substr(0, 14), {}), Lines{"whole"});
}

}  // namespace
}  // namespace moe_native
