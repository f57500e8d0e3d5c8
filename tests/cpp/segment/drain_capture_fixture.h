// A recording whose rows captures take, with and without a trace, and the callers of these captures.
#pragma once

#include <gtest/gtest.h>

#include <optional>
#include <string>
#include <vector>

#include "capture/fake_router.h"
#include "segment/drain_fixture.h"

namespace moe_native {

using test::DecodedCapture;
using test::execute;
using test::expect_rows;
using test::FakeRouter;
using test::IndexedSpan;
using Runs = std::vector<moe_native::Run>;
using Spans = std::vector<IndexedSpan>;
using Layers = std::vector<Binding*>;

inline constexpr uint32_t kAllFields = kFieldIds | kFieldWeights | kFieldLogits | kFieldHidden;

// Has a capture, and looks at its memory for as long as it lives.
class Caller {
 public:
  explicit Caller(Recording& recording, uint32_t fields = kAllFields, std::optional<std::vector<uint16_t>> layers = {})
      : drain_(recording.drain()), opened_(drain_.captures().open({fields, std::move(layers)})), reader_(opened_.fd) {}
  void add(uint32_t request, uint32_t sample, uint32_t capacity) {
    drain_.captures().add(opened_.number, request, sample, 0, capacity);
  }
  // What it has of the steps that have ended.
  DecodedCapture close() {
    EXPECT_TRUE(drain_.catch_up(60));
    return close_as_it_is();
  }
  DecodedCapture close_as_it_is() {
    closed_ = drain_.captures().close(opened_.number);
    EXPECT_EQ(closed_.problem, "");
    return read();
  }
  DecodedCapture read() const { return test::decode_capture(reader_.bytes(closed_.bytes), closed_.index); }
  const test::Reader& memory() const { return reader_; }

 private:
  Drain& drain_;
  const Captures::Opened opened_;
  const test::Reader reader_;
  Captures::Closed closed_{};
};

struct DrainCaptureTest : DrainTest {
  // For captures alone.
  static RecordingOptions without_trace(uint64_t ring_bytes = 1 << 20, uint32_t lanes = 1) {
    RecordingOptions o;
    o.ring = {"", "", ring_bytes, lanes};
    return o;
  }
  static Layers bind(Recording& recording, int layers) { return test::bind_layers(recording.steps(), layers, 60, 4); }
  static void want(Recording& recording, const Layers& layers, uint32_t fields = kAllFields) {
    recording.steps().capture(fields);
    for (Binding* b : layers) recording.steps().want(*b, true);
  }
  FakeRouter router;
};

}  // namespace moe_native
