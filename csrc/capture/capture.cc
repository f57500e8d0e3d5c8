#include "capture/capture.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <numeric>
#include <system_error>
#include <utility>

#include "core/step_recorder.h"

namespace moe_native {

namespace {

constexpr uint32_t kNowhere = 0xFFFFFFFF;  // the position of a row of which it is not known
constexpr size_t kColumns = 4;
// What is left to others, and how much is written between two looks at it.
constexpr uint64_t kLeft = uint64_t{256} << 20;
constexpr uint64_t kBetweenLooks = uint64_t{64} << 20;

std::array<uint64_t, kColumns> row_bytes(const LayerShape& s) {
  return {s.k * size_of(s.ids_dtype), s.k * size_of(s.weights_dtype), s.logits_width * size_of(s.logits_dtype),
          s.hidden_width * size_of(s.hidden_dtype)};
}

}  // namespace

Capture::Capture(CaptureFile file, CaptureOptions options)
    : file_(std::move(file)), options_(std::move(options)), look_at_(file_.kept() + kBetweenLooks) {}

void Capture::add(uint32_t request, uint32_t sample, uint32_t child, uint32_t capacity) {
  requests_.insert_or_assign(request, Request{.entry = {sample, child, capacity, 0}, .plots = {}});
}

bool Capture::wants(uint16_t layer) const {
  return !options_.layers || std::ranges::find(*options_.layers, layer) != options_.layers->end();
}

// What is wanted of a layer's columns.
LayerShape Capture::wanted(LayerShape shape) const {
  if ((options_.fields & kFieldWeights) == 0) shape.weights_dtype = DType::kNone;
  if ((options_.fields & kFieldLogits) == 0) shape.logits_dtype = DType::kNone;
  if ((options_.fields & kFieldHidden) == 0) shape.hidden_dtype = DType::kNone;
  if (shape.logits_dtype == DType::kNone) shape.logits_width = 0;
  if (shape.hidden_dtype == DType::kNone) shape.hidden_width = 0;
  return shape;
}

void Capture::take(std::span<const Run> runs, std::span<const Piece> pieces) {
  if (!problem_.empty()) return;
  hits_.clear();
  uint32_t row = 0;
  for (const Run& run : runs) {
    const auto found = run.position == kNowhere ? requests_.end() : requests_.find(run.request);
    if (found != requests_.end() && run.position < found->second.entry.capacity) {
      const uint32_t room = found->second.entry.capacity - run.position;
      hits_.push_back({&found->second, row, run.position, std::min(run.count, room)});
    }
    row += run.count;
  }
  if (hits_.empty()) return;
  for (const Piece& piece : pieces) {
    if (!wants(piece.shape.layer)) continue;
    const LayerShape shape = wanted(piece.shape);
    layers_.reserve(layers_.size() + 1);  // so that what follows is done whole or not at all
    const auto [found, is_new] = layer_index_.try_emplace(shape.layer, layers_.size());
    if (is_new) layers_.push_back(shape);
    if (shape != layers_[found->second]) continue;  // a layer has one shape; of others it has no rows
    for (const Hit& hit : hits_) copy(piece, found->second, hit);
  }
}

void Capture::copy(const Piece& piece, size_t layer, const Hit& hit) {
  const uint32_t first = std::max(piece.first_row, hit.row);
  const uint32_t end = std::min(piece.first_row + piece.rows, hit.row + hit.count);
  if (first >= end) return;
  const auto bytes = row_bytes(layers_[layer]);
  const std::byte* columns[kColumns] = {piece.ids, piece.weights, piece.logits, piece.hidden};
  Plot& to = plot(*hit.request, layer);
  const uint32_t position = hit.position + (first - hit.row);
  const uint64_t row = std::accumulate(bytes.begin(), bytes.end(), uint64_t{0});
  charge((end - first) * row);
  std::byte* out = file_.data() + to.offset;
  for (size_t c = 0; c < kColumns; ++c) {
    if (bytes[c] == 0) continue;
    std::memcpy(out + position * bytes[c], columns[c] + (first - piece.first_row) * bytes[c], (end - first) * bytes[c]);
    out += align_up(hit.request->entry.capacity * bytes[c], kAlign);
  }
  written_ += join(to.rows, position, position + (end - first)) * row;
}

// Before so many bytes are written.
void Capture::charge(uint64_t bytes) {
  if (written_ + bytes <= look_at_) return;
  if (const uint64_t available = options_.available(); available < kLeft + kBetweenLooks + bytes) {
    throw std::system_error(
        ENOMEM, std::generic_category(),
        "no memory is left for the rest: capture fewer prompts at a time, or fewer fields or layers");
  }
  look_at_ = written_ + bytes + kBetweenLooks;
}

Capture::Plot& Capture::plot(Request& request, size_t layer) {
  if (layer >= request.plots.size()) request.plots.resize(layer + 1);
  Plot& plot = request.plots[layer];
  if (plot.offset == kNoPlot) {
    uint64_t bytes = 0;
    for (const uint64_t row : row_bytes(layers_[layer])) bytes += align_up(row * request.entry.capacity, kAlign);
    plot.offset = file_.allocate(bytes);
  }
  return plot;
}

uint32_t Capture::join(Spans& spans, uint32_t first, uint32_t end) {
  if (!spans.empty() && spans.back().first <= first && first <= spans.back().end) {  // as it is most often
    const uint32_t before = spans.back().end;
    spans.back().end = std::max(before, end);
    return spans.back().end - before;
  }
  // Those that touch it become one with it.
  const auto from = std::ranges::lower_bound(spans, first, {}, &IndexSpan::end);
  auto to = from;
  uint32_t there = 0;
  for (; to != spans.end() && to->first <= end; ++to) {
    there += to->end - to->first;
    first = std::min(first, to->first);
    end = std::max(end, to->end);
  }
  spans.insert(spans.erase(from, to), {first, end});
  return end - first - there;
}

Capture::Spans Capture::of_all_layers(const Request& request) const {
  if (request.plots.empty() || request.plots.size() < layers_.size()) return {};
  Spans common = request.plots.front().rows;
  for (const Plot& plot : request.plots) {
    Spans both;
    for (const IndexSpan& a : common) {
      for (const IndexSpan& b : plot.rows) {
        const uint32_t first = std::max(a.first, b.first), end = std::min(a.end, b.end);
        if (first < end) both.push_back({first, end});
      }
    }
    common = std::move(both);
  }
  return common;
}

uint64_t Capture::finish() {
  std::vector<IndexLayer> layers;
  for (const LayerShape& s : layers_) {
    layers.push_back({s.layer, s.ids_dtype, s.weights_dtype, s.logits_dtype, s.hidden_dtype, 0, s.k, s.logits_width,
                      s.hidden_width, 0});
  }
  std::vector<IndexRequest> requests;
  std::vector<uint64_t> plots;
  Spans spans;
  for (auto& [_, request] : requests_) {
    const Spans rows = of_all_layers(request);
    request.entry.spans = static_cast<uint32_t>(rows.size());
    requests.push_back(request.entry);
    spans.insert(spans.end(), rows.begin(), rows.end());
    request.plots.resize(layers_.size());
    for (const Plot& plot : request.plots) plots.push_back(plot.offset);
  }
  IndexHead head{};
  std::memcpy(head.magic, kIndexMagic, sizeof kIndexMagic);
  head.layers = static_cast<uint32_t>(layers.size());
  head.requests = static_cast<uint32_t>(requests.size());
  head.spans = static_cast<uint32_t>(spans.size());
  const std::span<const std::byte> parts[] = {std::as_bytes(std::span(&head, 1)), std::as_bytes(std::span(layers)),
                                              std::as_bytes(std::span(requests)), std::as_bytes(std::span(plots)),
                                              std::as_bytes(std::span(spans))};
  uint64_t bytes = 0;
  for (const auto& part : parts) bytes += part.size();
  const uint64_t start = file_.allocate(bytes);
  std::byte* out = file_.data() + start;
  for (const auto& part : parts) {
    if (!part.empty()) std::memcpy(out, part.data(), part.size());
    out += part.size();
  }
  return start;
}

}  // namespace moe_native
