#include "segment/statistics.h"

#include <algorithm>
#include <limits>

namespace moe_native {

void append_class_spans(std::span<const Run> runs, uint64_t first_row, std::vector<ClassSpan>& spans) {
  for (const Run& run : runs) {
    if (!spans.empty() && spans.back().row_class == run.row_class &&
        spans.back().first_row + spans.back().rows == first_row) {
      spans.back().rows += run.count;
    } else {
      spans.push_back({first_row, run.count, run.row_class});
    }
    first_row += run.count;
  }
}

template <typename Id>
void Statistics::count(Group& group, const Id* ids, const float* weights, size_t n) {
  constexpr Id kInvalid = std::numeric_limits<Id>::max();
  Id largest = 0;
  for (size_t i = 0; i < n; ++i) largest = std::max<Id>(largest, ids[i] == kInvalid ? Id{0} : ids[i]);
  if (group.counts.size() <= largest) {
    group.counts.resize(size_t{largest} + 1);
    group.weights.resize(size_t{largest} + 1);
  }
  uint64_t* counts = group.counts.data();
  double* sums = group.weights.data();
  for (size_t i = 0; i < n; ++i) {
    if (ids[i] == kInvalid) {
      ++group.invalid;
      continue;
    }
    ++counts[ids[i]];
    if (weights != nullptr) sums[ids[i]] += static_cast<double>(weights[i]);
  }
}

void Statistics::add(uint16_t layer, uint32_t k, DType ids_dtype, const std::byte* ids, const float* weights,
                     uint64_t first_row, uint64_t rows, std::span<const ClassSpan> spans) {
  const uint64_t end = first_row + rows;
  // Spans ascend: start at the last one that begins at or before the first row.
  auto span = std::upper_bound(spans.begin(), spans.end(), first_row,
                               [](uint64_t row, const ClassSpan& s) { return row < s.first_row; });
  if (span != spans.begin()) --span;
  for (; span != spans.end() && span->first_row < end; ++span) {
    const uint64_t from = std::max(first_row, span->first_row);
    const uint64_t to = std::min(end, span->first_row + span->rows);
    if (from >= to) continue;
    Group& group = groups_[{layer, span->row_class, static_cast<uint16_t>(k)}];
    group.rows += to - from;
    const size_t skip = (from - first_row) * k;
    const size_t n = (to - from) * k;
    const float* w = weights == nullptr ? nullptr : weights + skip;
    if (ids_dtype == DType::kU8) {
      count(group, reinterpret_cast<const uint8_t*>(ids) + skip, w, n);
    } else {
      count(group, reinterpret_cast<const uint16_t*>(ids) + skip, w, n);
    }
  }
}

void Statistics::merge(const Statistics& other) {
  for (const auto& [key, from] : other.groups_) {
    Group& to = groups_[key];
    to.rows += from.rows;
    to.invalid += from.invalid;
    if (to.counts.size() < from.counts.size()) {
      to.counts.resize(from.counts.size());
      to.weights.resize(from.weights.size());
    }
    for (size_t e = 0; e < from.counts.size(); ++e) {
      to.counts[e] += from.counts[e];
      to.weights[e] += from.weights[e];
    }
  }
}

Table Statistics::groups_table() const {
  struct Row {
    uint16_t layer, row_class, k;
    uint32_t items;
    uint64_t rows, invalid;
  };
  std::vector<Row> rows;
  rows.reserve(groups_.size());
  for (const auto& [key, group] : groups_) {
    const auto items = std::ranges::count_if(group.counts, [](uint64_t n) { return n != 0; });
    rows.push_back({key.layer, key.row_class, key.k, static_cast<uint32_t>(items), group.rows, group.invalid});
  }
  Table table(rows.size());
  table.column([&](size_t i) { return rows[i].layer; })
      .column([&](size_t i) { return rows[i].row_class; })
      .column([&](size_t i) { return rows[i].k; })
      .column([&](size_t i) { return rows[i].items; })
      .column([&](size_t i) { return rows[i].rows; })
      .column([&](size_t i) { return rows[i].invalid; });
  return table;
}

Table Statistics::counts_table() const {
  struct Row {
    uint16_t expert;
    uint64_t count;
    double weight;
  };
  std::vector<Row> rows;
  for (const auto& [key, group] : groups_) {
    for (size_t e = 0; e < group.counts.size(); ++e) {
      if (group.counts[e] != 0) rows.push_back({static_cast<uint16_t>(e), group.counts[e], group.weights[e]});
    }
  }
  Table table(rows.size());
  table.column([&](size_t i) { return rows[i].expert; })
      .column([&](size_t i) { return rows[i].count; })
      .column([&](size_t i) { return rows[i].weight; });
  return table;
}

}  // namespace moe_native
