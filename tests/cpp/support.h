// What several tests need: a temporary directory, a small ring, steps put into it, and a decoder of blocks that is
// written from FORMAT.md and shares no code with the writer.
#pragma once

#include <unistd.h>
#include <zstd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "core/crc32.h"
#include "core/ring.h"
#include "core/step_recorder.h"
#include "segment/format.h"

namespace moe_native::test {

class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string pattern = (std::filesystem::temp_directory_path() / "moe-native-test-XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("mkdtemp");
    path_ = pattern;
  }
  ~TemporaryDirectory() { std::filesystem::remove_all(path_); }
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }
  std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_;
};

struct TestRing {
  explicit TestRing(uint64_t bytes = 1 << 20, uint32_t lanes = 1)
      : ring({directory.path(), directory.path(), bytes, lanes}) {}
  TemporaryDirectory directory;
  Ring ring;
};

// Router output with ids that say where they come from.
struct Routed {
  std::vector<int32_t> ids;
  std::vector<float> weights;
  std::vector<float> logits;
  int64_t rows, k, experts;

  Routed(int64_t rows_, int64_t k_, int64_t experts_, int seed = 0) : rows(rows_), k(k_), experts(experts_) {
    for (int64_t i = 0; i < rows * k; ++i) {
      ids.push_back(static_cast<int32_t>((i * 7 + seed) % experts));
      weights.push_back(static_cast<float>((i + seed) % 64) / 64.0f);
    }
    for (int64_t i = 0; i < rows * experts; ++i) logits.push_back(static_cast<float>(i) * 0.25f);
  }
  LayerInput input(bool with_logits = false) const {
    LayerInput in;
    in.ids = {reinterpret_cast<const std::byte*>(ids.data()), DType::kI32, rows, k, k, 1};
    in.weights = {reinterpret_cast<const std::byte*>(weights.data()), DType::kF32, rows, k, k, 1};
    if (with_logits) {
      in.logits = {reinterpret_cast<const std::byte*>(logits.data()), DType::kF32, rows, experts, experts, 1};
    }
    return in;
  }
};

inline Run run(uint32_t request, uint32_t position, uint32_t count, uint16_t row_class = 0) {
  return {request, position, count, row_class, 0};
}

inline std::string note(uint32_t kind, uint32_t key, const std::string& text) {
  const uint32_t head[3] = {kind, key, static_cast<uint32_t>(text.size())};
  return std::string(reinterpret_cast<const char*>(head), sizeof head) + text;
}

// One step of `layers` bindings, all rows alike attributed.
inline bool record_step(StepRecorder& recorder, const std::vector<Binding*>& layers, const Routed& routed,
                        const std::vector<Run>& runs, const std::string& notes = "", uint32_t note_count = 0,
                        bool with_logits = false) {
  const RowSpan span{0, routed.rows};
  if (recorder.begin_step({&span, 1}) != Begun::kAdmitted) return false;
  for (Binding* b : layers) recorder.record(*b, routed.input(with_logits));
  StepTable table;
  table.runs = runs;
  table.notes = {reinterpret_cast<const std::byte*>(notes.data()), notes.size()};
  table.note_count = note_count;
  return recorder.end_step(table);
}

inline std::vector<Binding*> bind_layers(StepRecorder& recorder, int layers, uint32_t experts, uint32_t k) {
  std::vector<Binding*> bound;
  for (int layer = 0; layer < layers; ++layer) {
    bound.push_back(binding(recorder.bind(static_cast<uint16_t>(layer), experts, k, true)));
  }
  return bound;
}

// A decoded block: every entry's bytes by (field, layer, first_row, byte).
struct DecodedBlock {
  BlockHeader header{};
  std::vector<DirectoryEntry> entries;
  std::map<std::tuple<int, int, uint32_t, int>, std::string> data;

  const std::string& at(EntryField field, int layer = kNoLayer, uint32_t first_row = 0, int byte = 0) const {
    return data.at({static_cast<int>(field), layer, first_row, byte});
  }
  bool has(EntryField field, int layer = kNoLayer) const {
    return data.contains({static_cast<int>(field), layer, 0, 0});
  }
  // Column `width` bytes wide that starts after `before` bytes per item.
  uint64_t cell(EntryField field, size_t item, size_t before, size_t width) const {
    const std::string& bytes = at(field);
    size_t items = 0;
    for (const auto& e : entries) {
      if (e.field == field) items = e.rows;
    }
    uint64_t value = 0;
    for (size_t b = 0; b < width; ++b) {
      value |= uint64_t{static_cast<unsigned char>(bytes.at(before * items + b * items + item))} << (8 * b);
    }
    return value;
  }
};

inline std::string decode(const std::string& stored, Codec codec, uint64_t raw) {
  if (codec == Codec::kRaw) return stored;
  std::string out(raw, '\0');
  const size_t n = ZSTD_decompress(out.data(), out.size(), stored.data(), stored.size());
  if (ZSTD_isError(n) || n != raw) throw std::runtime_error("bad frame");
  return out;
}

inline DecodedBlock decode_block(const std::string& bytes, size_t at = 0) {
  DecodedBlock block;
  std::memcpy(&block.header, bytes.data() + at, sizeof(BlockHeader));
  const BlockHeader& h = block.header;
  if (std::memcmp(h.magic, "MOEB", 4) != 0 || h.crc != crc32(&h, 124)) throw std::runtime_error("bad header");
  if (h.block_bytes % 64 != 0 || at + h.block_bytes > bytes.size()) throw std::runtime_error("bad length");
  const std::string stored = bytes.substr(at + h.header_size, h.directory_stored);
  if (crc32(stored.data(), stored.size()) != h.directory_crc) throw std::runtime_error("bad directory");
  const std::string directory = decode(stored, h.directory_codec, h.directory_raw);
  if (directory.size() != 48 * h.entries) throw std::runtime_error("bad directory length");
  block.entries.resize(h.entries);
  std::memcpy(block.entries.data(), directory.data(), directory.size());
  for (const DirectoryEntry& e : block.entries) {
    if (e.offset + e.stored > h.block_bytes) throw std::runtime_error("entry outside its block");
    const std::string plane = bytes.substr(at + e.offset, e.stored);
    if (crc32(plane.data(), plane.size()) != e.crc) throw std::runtime_error("bad entry");
    block.data[{static_cast<int>(e.field), e.layer, e.first_row, e.byte}] = decode(plane, e.codec, e.raw);
  }
  return block;
}

inline std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("no file " + path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// The blocks of a segment, footer included, by walking from the first one.
inline std::vector<DecodedBlock> decode_segment(const std::string& path) {
  const std::string bytes = read_file(path);
  Superblock super;
  std::memcpy(&super, bytes.data(), sizeof super);
  if (std::memcmp(super.magic, "MOETRACE", 8) != 0 || super.crc != crc32(&super, 124))
    throw std::runtime_error("bad file");
  std::vector<DecodedBlock> blocks;
  size_t at = align_up(super.metadata_offset + super.metadata_stored, 64);
  while (at + sizeof(BlockHeader) <= bytes.size() && std::memcmp(bytes.data() + at, "MOEB", 4) == 0) {
    blocks.push_back(decode_block(bytes, at));
    at += blocks.back().header.block_bytes;
  }
  return blocks;
}

}  // namespace moe_native::test
