// One capture: the rows of chosen requests, scattered to [request][layer][position] in a file that its caller maps.
//
// The file (CaptureFile) holds a plot for each layer of each request, and behind them, once the capture is closed, an
// index that says where they are. A plot is the layer's columns one after the other: ids, weights, logits, hidden,
// those that are there, each with room for the request's `capacity` rows by position and aligned to 64 bytes. The rows
// are as the router gave them, ids narrowed to u8 or u16. One that was executed again replaces the one before.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "capture/available_memory.h"
#include "capture/capture_file.h"
#include "segment/step_data.h"

namespace moe_native {

// The index: its head, then `layers` IndexLayers, `requests` IndexRequests, `requests` × `layers` offsets of plots as
// u64 (kNoPlot: none), and `spans` IndexSpans. Where it begins is a multiple of 64. moe_native/captures/regions.py
// reads it.
struct IndexHead {
  char magic[8];
  uint32_t layers;
  uint32_t requests;
  uint32_t spans;
  uint32_t zero;
};
struct IndexLayer {
  uint16_t layer;
  DType ids_dtype, weights_dtype, logits_dtype, hidden_dtype;  // kNone: not captured, or not seen
  uint16_t zero;
  uint32_t k, logits_width, hidden_width, zero2;
};
struct IndexRequest {
  uint32_t sample;  // the caller's number of it,
  uint32_t child;   // and which of the sample's `n`
  uint32_t capacity;
  uint32_t spans;  // of the positions that all layers have; those of the requests follow each other
};
struct IndexSpan {
  uint32_t first, end;
};
inline constexpr uint64_t kNoPlot = ~uint64_t{0};
static_assert(sizeof(IndexHead) == 24 && sizeof(IndexLayer) == 24);
static_assert(sizeof(IndexRequest) == 16 && sizeof(IndexSpan) == 8);
inline constexpr char kIndexMagic[8] = {'M', 'O', 'E', 'C', 'A', 'P', 'T', '1'};

struct CaptureOptions {
  uint32_t fields = 0;
  std::optional<std::vector<uint16_t>> layers;  // none: all
  std::function<uint64_t()> available = [] { return available_memory(); };
};

class Capture {
 public:
  Capture(CaptureFile file, CaptureOptions options);

  void add(uint32_t request, uint32_t sample, uint32_t child, uint32_t capacity);
  // The rows of a step that are this capture's; its runs say whose they are. Throws std::system_error, std::bad_alloc:
  // then the capture has failed(), and takes no more. It leaves the machine some memory: what serves must not be killed
  // for want of it.
  void take(std::span<const Run> runs, std::span<const Piece> pieces);
  // Writes the index; where it begins. Throws std::system_error.
  uint64_t finish();

  CaptureFile& file() { return file_; }
  const std::string& problem() const { return problem_; }  // why rows are missing, where it is not the engine
  void failed(std::string problem) { problem_ = std::move(problem); }

 private:
  using Spans = std::vector<IndexSpan>;  // ascending and apart
  struct Plot {
    uint64_t offset = kNoPlot;
    Spans rows;
  };
  struct Request {
    IndexRequest entry{};
    std::vector<Plot> plots;  // by the number of the layer in the index
  };
  struct Hit {  // rows [row, row + count) of a step are positions [position, …) of a request
    Request* request;
    uint32_t row, position, count;
  };

  bool wants(uint16_t layer) const;
  LayerShape wanted(LayerShape shape) const;
  void copy(const Piece& piece, size_t layer, const Hit& hit);
  Plot& plot(Request& request, size_t layer);
  void charge(uint64_t bytes);
  // How many of the positions are new.
  static uint32_t join(Spans& spans, uint32_t first, uint32_t end);
  Spans of_all_layers(const Request& request) const;

  CaptureFile file_;
  CaptureOptions options_;
  std::string problem_;
  std::vector<LayerShape> layers_;
  std::unordered_map<uint16_t, size_t> layer_index_;
  std::unordered_map<uint32_t, Request> requests_;
  std::vector<Hit> hits_;
  uint64_t written_ = 0;  // bytes of rows
  uint64_t look_at_ = 0;  // when that many are written, the memory is looked at again
};

}  // namespace moe_native
