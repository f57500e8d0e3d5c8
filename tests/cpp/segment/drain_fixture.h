// A recording in a temporary trace, and what it wrote.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>

#include "segment/recording.h"
#include "support.h"

namespace moe_native {

namespace fs = std::filesystem;
using test::DecodedBlock;
using test::Routed;
using test::run;

struct DrainTest : testing::Test {
  RecordingOptions options(uint64_t ring_bytes = 1 << 20, uint32_t lanes = 1) {
    RecordingOptions o;
    rank = trace / "run/rank-0";
    fs::create_directories(rank);
    o.ring = {trace.path(), rank, ring_bytes, lanes};
    o.drain.trace = trace.path();
    o.drain.identity.directory = rank;
    o.drain.flush_seconds = 3600;  // only what a test asks for
    return o;
  }
  std::vector<std::string> segments() const {
    std::vector<std::string> paths;
    for (const auto& file : fs::directory_iterator(rank)) paths.push_back(file.path().string());
    std::ranges::sort(paths);
    return paths;
  }
  std::vector<DecodedBlock> blocks() const {
    std::vector<DecodedBlock> all;
    for (const std::string& path : segments()) {
      for (DecodedBlock& block : test::decode_segment(path)) {
        if (block.header.kind != BlockKind::kFooter) all.push_back(std::move(block));
      }
    }
    return all;
  }
  // A step up to its end: each router called `calls` times.
  static bool begin_and_record(Recording& recording, const std::vector<Binding*>& layers, const Routed& part,
                               int calls = 1) {
    const RowSpan span{0, part.rows * calls};
    if (recording.steps().begin_step({&span, 1}) != Begun::kAdmitted) return false;
    for (Binding* layer : layers) {
      for (int call = 0; call < calls; ++call) recording.steps().record(*layer, part.input());
    }
    return true;
  }
  static bool record_step(Recording& recording, const std::vector<Binding*>& layers, const Routed& part,
                          int calls = 1) {
    if (!begin_and_record(recording, layers, part, calls)) return false;
    const std::vector<moe_native::Run> runs = {run(0, 0, static_cast<uint32_t>(part.rows * calls))};
    StepTable table;
    table.runs = runs;
    return recording.steps().end_step(table);
  }
  static uint64_t steps_in(const std::vector<DecodedBlock>& blocks) {
    uint64_t steps = 0;
    for (const auto& block : blocks) steps += block.header.kind == BlockKind::kRows ? block.header.steps : 0;
    return steps;
  }
  test::TemporaryDirectory trace;
  std::string rank;
};

}  // namespace moe_native
