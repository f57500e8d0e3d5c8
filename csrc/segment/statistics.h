// What a summary needs, kept by layer and class: rows, assignments per expert, sums of weights. Merges by addition.
#pragma once

#include <compare>
#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "core/dtype.h"
#include "core/ring_layout.h"
#include "segment/table.h"

namespace moe_native {

// Consecutive rows of one class.
struct ClassSpan {
  uint64_t first_row;
  uint64_t rows;
  uint16_t row_class;
};

// The class spans of some runs, appended; `first_row` is where the first run starts.
void append_class_spans(std::span<const Run> runs, uint64_t first_row, std::vector<ClassSpan>& spans);

class Statistics {
 public:
  // Rows [first_row, first_row + rows) of one layer. `ids` are narrowed ids; `weights` may be null, else as recorded.
  void add(uint16_t layer, uint32_t k, DType ids_dtype, const std::byte* ids, const float* weights, uint64_t first_row,
           uint64_t rows, std::span<const ClassSpan> spans);
  void merge(const Statistics& other);
  void clear() { groups_.clear(); }
  bool empty() const { return groups_.empty(); }

  Table groups_table() const;
  Table counts_table() const;

 private:
  struct Key {
    uint16_t layer, row_class, k;
    auto operator<=>(const Key&) const = default;
  };
  struct Group {
    uint64_t rows = 0;
    uint64_t invalid = 0;
    std::vector<uint64_t> counts;
    std::vector<double> weights;
  };
  template <typename Id>
  static void count(Group& group, const Id* ids, const float* weights, size_t n);

  std::map<Key, Group> groups_;
};

}  // namespace moe_native
