// What the caller of a capture does: opens its file through /proc, locks it, and reads it. Written from the comments of
// capture.h; it shares no code with the writer.
#pragma once

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <ostream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace moe_native::test {

// An open description of its own of a capture's file, with a shared lock on it.
class Reader {
 public:
  explicit Reader(int handle) : fd_(::open(("/proc/self/fd/" + std::to_string(handle)).c_str(), O_RDWR | O_CLOEXEC)) {
    if (fd_ < 0 || ::flock(fd_, LOCK_SH) != 0) throw std::runtime_error("no capture file");
  }
  ~Reader() { ::close(fd_); }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  std::string bytes(uint64_t count) const {
    std::string out(count, '\0');
    for (uint64_t at = 0; at < count;) {
      const ssize_t n = ::pread(fd_, out.data() + at, count - at, static_cast<off_t>(at));
      if (n <= 0) throw std::runtime_error("the file is shorter than it should be");
      at += static_cast<uint64_t>(n);
    }
    return out;
  }
  ino_t file() const { return status().st_ino; }
  uint64_t memory() const { return static_cast<uint64_t>(status().st_blocks) * 512; }

 private:
  struct stat status() const {
    struct stat s {};
    if (::fstat(fd_, &s) != 0) throw std::runtime_error("fstat");
    return s;
  }
  int fd_;
};

enum Column { kIds, kWeights, kLogits, kHidden, kColumns };

struct IndexedSpan {
  uint32_t first, end;
  bool operator==(const IndexedSpan&) const = default;
};
inline void PrintTo(const IndexedSpan& span, std::ostream* out) { *out << span.first << "–" << span.end; }

struct DecodedCapture {
  struct Layer {
    uint16_t layer;
    int dtypes[kColumns];
    uint32_t widths[kColumns];
    uint64_t row_bytes(int column) const {
      constexpr std::pair<int, uint64_t> kSizes[] = {{0, 0}, {1, 1}, {2, 2}, {3, 4}, {4, 2}, {5, 2}, {6, 4}};
      for (const auto& [dtype, bytes] : kSizes) {
        if (dtype == dtypes[column]) return bytes * widths[column];
      }
      throw std::runtime_error("an unknown dtype");
    }
  };
  struct Request {
    uint32_t sample, child, capacity;
    std::vector<IndexedSpan> spans;
    std::vector<uint64_t> plots;  // by the number of the layer in the index
  };
  static constexpr uint64_t kNoPlot = 0xFFFFFFFFFFFFFFFF;

  std::string file;
  std::vector<Layer> layers;
  std::vector<Request> requests;

  const Request& request(uint32_t sample, uint32_t child = 0) const {
    for (const Request& r : requests) {
      if (r.sample == sample && r.child == child) return r;
    }
    throw std::out_of_range("no such request in the index");
  }
  const std::vector<IndexedSpan>& spans(uint32_t sample, uint32_t child = 0) const {
    return request(sample, child).spans;
  }
  std::vector<uint16_t> layer_numbers() const {
    std::vector<uint16_t> all;
    for (const Layer& l : layers) all.push_back(l.layer);
    std::ranges::sort(all);
    return all;
  }
  size_t layer_index(uint16_t layer) const {
    for (size_t i = 0; i < layers.size(); ++i) {
      if (layers[i].layer == layer) return i;
    }
    throw std::out_of_range("no such layer in the index");
  }
  const Layer& layer(uint16_t number) const { return layers[layer_index(number)]; }
  bool has_plot(uint32_t sample, uint16_t layer) const { return request(sample).plots[layer_index(layer)] != kNoPlot; }
  // One row of a column; empty where the layer has no such column.
  std::string row(const Request& of, uint16_t number, int column, uint32_t position) const {
    const size_t index = layer_index(number);
    uint64_t at = of.plots[index];
    if (at == kNoPlot || at % 64 != 0) throw std::out_of_range("no such plot, or not where it may be");
    for (int c = 0; c < column; ++c) at += (of.capacity * layers[index].row_bytes(c) + 63) / 64 * 64;
    return file.substr(at + position * layers[index].row_bytes(column), layers[index].row_bytes(column));
  }
  std::string row(uint32_t sample, uint16_t number, int column, uint32_t position) const {
    return row(request(sample), number, column, position);
  }
};

class IndexCursor {
 public:
  IndexCursor(const std::string& bytes, uint64_t at) : bytes_(bytes), at_(at) {}
  uint64_t take(size_t width) {
    uint64_t value = 0;
    for (size_t b = 0; b < width; ++b) value |= uint64_t{static_cast<unsigned char>(bytes_.at(at_++))} << (8 * b);
    return value;
  }
  uint8_t u8() { return static_cast<uint8_t>(take(1)); }
  uint16_t u16() { return static_cast<uint16_t>(take(2)); }
  uint32_t u32() { return static_cast<uint32_t>(take(4)); }
  uint64_t at() const { return at_; }
  void zero(size_t width) {
    if (take(width) != 0) throw std::runtime_error("what should be zero is not");
  }

 private:
  const std::string& bytes_;
  uint64_t at_;
};

inline DecodedCapture decode_capture(std::string file, uint64_t index) {
  DecodedCapture out;
  if (index % 64 != 0 || file.compare(index, 8, "MOECAPT1") != 0) throw std::runtime_error("no index");
  IndexCursor in(file, index + 8);
  const uint32_t layers = in.u32(), requests = in.u32(), spans = in.u32();
  in.zero(4);
  for (uint32_t i = 0; i < layers; ++i) {
    DecodedCapture::Layer& layer = out.layers.emplace_back();
    layer.layer = in.u16();
    for (int& dtype : layer.dtypes) dtype = in.u8();
    in.zero(2);
    layer.widths[kIds] = layer.widths[kWeights] = in.u32();
    layer.widths[kLogits] = in.u32();
    layer.widths[kHidden] = in.u32();
    in.zero(4);
  }
  std::vector<uint32_t> span_counts;
  for (uint32_t i = 0; i < requests; ++i) {
    DecodedCapture::Request& request = out.requests.emplace_back();
    request.sample = in.u32();
    request.child = in.u32();
    request.capacity = in.u32();
    span_counts.push_back(in.u32());
  }
  for (auto& request : out.requests) {
    for (uint32_t i = 0; i < layers; ++i) request.plots.push_back(in.take(8));
  }
  uint32_t decoded = 0;
  for (size_t i = 0; i < out.requests.size(); ++i) {
    for (uint32_t s = 0; s < span_counts[i]; ++s, ++decoded) {
      const uint32_t first = in.u32();
      out.requests[i].spans.push_back({first, in.u32()});
    }
  }
  if (decoded != spans || (in.at() + 63) / 64 * 64 != file.size())
    throw std::runtime_error("the index's length is wrong");
  out.file = std::move(file);
  return out;
}

}  // namespace moe_native::test
