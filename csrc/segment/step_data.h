// A step as the drain thread sees it: pointers into the ring, valid until the step's records are released.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/lane.h"
#include "core/ring_layout.h"

namespace moe_native {

// What must be alike for two steps to share a block.
struct LayerShape {
  uint16_t layer = 0;
  DType ids_dtype = DType::kNone;
  DType weights_dtype = DType::kNone;
  DType logits_dtype = DType::kNone;
  DType hidden_dtype = DType::kNone;
  uint32_t k = 0;
  uint32_t logits_width = 0;
  uint32_t hidden_width = 0;
  bool operator==(const LayerShape&) const = default;
};

// Rows [first_row, first_row + rows) of one layer of the step: one layer record.
struct Piece {
  LayerShape shape;
  uint32_t first_row = 0;
  uint32_t rows = 0;
  const std::byte* ids = nullptr;
  const std::byte* weights = nullptr;
  const std::byte* logits = nullptr;
  const std::byte* hidden = nullptr;
};

// Rows that left the ring with a fragment block. Their ids and weights are kept for the statistics, which need the
// step's table.
struct WrittenPiece {
  LayerShape shape;
  uint32_t first_row = 0;
  uint32_t rows = 0;
  std::vector<std::byte> ids;
  std::vector<float> weights;  // as recorded; empty without that field
};

struct StepData {
  uint64_t number = 0;
  int64_t time_ns = 0;
  uint32_t rows = 0;
  std::span<const Run> runs;
  const std::byte* tokens = nullptr;  // u32 a row, or null
  std::span<const std::byte> notes;
  std::vector<Piece> pieces;    // by layer, then row, once the step is complete
  std::vector<Piece> captured;  // what captures have not taken yet: in the ring, or else in `kept`
  size_t captured_in_kept = 0;  // so many of the first ones
  std::vector<std::vector<std::byte>> kept;
  void drop_captured() noexcept {
    captured.clear();
    kept.clear();
    captured_in_kept = 0;
  }
  std::vector<Run> announced;      // whose rows it will have, where that is known before it is complete
  std::vector<LayerShape> shapes;  // of its layers, ascending, once it is complete
  std::vector<WrittenPiece> written;
  uint32_t fragments = 0;
  bool aborted = false;
  bool counted = false;  // no row of it is stored, not even in fragments
  bool lost = false;     // a part could not be written: the step is given up, and counted when it ends
  uint64_t bytes = 0;    // held in the ring
  std::vector<LaneConsumer::Position> end;  // of each lane, behind this step
};

}  // namespace moe_native
