// Packs steps into the bytes of one block. Buffers are kept from block to block.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>
#include <string>
#include <vector>

#include "codec/compressor.h"
#include "core/ring.h"
#include "segment/format.h"
#include "segment/statistics.h"
#include "segment/step_data.h"

namespace moe_native {

struct LaneRange {
  uint16_t lane;
  uint64_t first, last;
};

// What a block carries beside rows.
struct BlockExtras {
  uint64_t number = 0;
  std::vector<LaneRange> lanes;
  std::vector<std::string> notes;  // lines of JSON, without their ends
  std::vector<LossTotals> losses;  // by cause
};

// Consecutive rows of a block's steps, counted over all that were executed.
struct RowRange {
  uint64_t first;
  uint64_t rows;
};

class BlockBuilder {
 public:
  explicit BlockBuilder(bool exact_weights) : exact_weights_(exact_weights) {}

  // A rows block of whole steps, all of the same shapes; also of one step whose first part is in fragments, or of none.
  // Its statistics have all rows, its planes those that are kept.
  void build_rows(std::span<const StepData* const> steps, const BlockExtras& extras);
  // A fragment block of the pieces that an unfinished step has so far. They become `written` pieces of the step.
  void build_fragment(StepData& step, const BlockExtras& extras);
  void build_footer(const Statistics& sum, const Table& index, const BlockExtras& extras, uint64_t first_step,
                    uint64_t last_step, uint64_t executed);

  std::span<const std::byte> bytes() const { return bytes_; }
  const BlockHeader& header() const { return header_; }
  const Statistics& statistics() const { return statistics_; }  // of the block built last

 private:
  // The runs that a block stores, and of each step how many they are and how many rows they have.
  struct StoredRuns {
    std::vector<Run> runs;
    std::vector<uint32_t> of_step;
    std::vector<uint32_t> rows;
  };
  void start(BlockKind kind, const BlockExtras& extras);
  void finish(const BlockExtras& extras);
  StoredRuns keep(std::span<const StepData* const> steps);
  const std::byte* kept_rows(const std::vector<std::byte>& column, size_t row_bytes);
  void add_layers(std::span<const Piece* const> pieces, bool fragment, const std::vector<ClassSpan>& spans,
                  std::vector<WrittenPiece>* written);
  void add_column(EntryField field, DType dtype, uint16_t layer, uint32_t width, uint32_t first_row, uint32_t rows,
                  const std::byte* data);
  void add_table(EntryField field, const Table& table);
  void add_statistics(const Statistics& statistics);
  void add_entry(DirectoryEntry entry, const std::byte* data, size_t bytes);
  DType convert_weights(DType from);

  const bool exact_weights_;
  Compressor compressor_;
  BlockHeader header_{};
  Statistics statistics_;
  std::vector<DirectoryEntry> directory_;
  std::vector<std::byte> body_;    // the entries' stored bytes
  std::vector<std::byte> bytes_;   // the finished block
  bool all_kept_ = true;           // each executed row is stored
  uint64_t kept_count_ = 0;        // else: how many are,
  std::vector<RowRange> kept_;     // and which
  std::vector<std::byte> column_;  // one field of one layer, gathered from the ring
  std::vector<std::byte> kept_column_;
  std::vector<std::byte> stored_weights_;
  std::vector<float> weights_;  // as recorded, for the statistics
  std::vector<std::byte> planes_;
  std::vector<std::byte> frame_;
};

}  // namespace moe_native
