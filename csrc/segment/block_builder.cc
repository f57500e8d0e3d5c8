#include "segment/block_builder.h"

#include <algorithm>
#include <cstring>

#include "codec/planes.h"
#include "core/crc32.h"

namespace moe_native {

namespace {

void append(std::vector<std::byte>& to, const void* data, size_t bytes) {
  const auto* from = static_cast<const std::byte*>(data);
  to.insert(to.end(), from, from + bytes);
}

void pad(std::vector<std::byte>& to) { to.resize(align_up(to.size(), kAlign)); }

void seal(BlockHeader& header) { header.crc = crc32(&header, offsetof(BlockHeader, crc)); }

}  // namespace

void BlockBuilder::start(BlockKind kind, const BlockExtras& extras) {
  header_ = BlockHeader{};
  std::memcpy(header_.magic, kBlockMagic, sizeof kBlockMagic);
  header_.header_size = sizeof(BlockHeader);
  header_.kind = kind;
  header_.number = extras.number;
  statistics_.clear();
  all_kept_ = true;
  kept_count_ = 0;
  kept_.clear();
  directory_.clear();
  body_.clear();
}

void BlockBuilder::build_rows(std::span<const StepData* const> steps, const BlockExtras& extras) {
  start(BlockKind::kRows, extras);
  // An aborted step whose fragments are in the file: a block of no steps takes them back.
  if (steps.size() == 1 && steps[0]->aborted) {
    header_.fragments = steps[0]->fragments;
    header_.first_step = header_.last_step = steps[0]->number;
    steps = {};
  }

  std::vector<ClassSpan> spans;
  std::vector<const Piece*> pieces;
  uint64_t executed = 0;
  bool tokens = false;
  for (const StepData* step : steps) {
    append_class_spans(step->runs, executed, spans);
    for (const Piece& piece : step->pieces) pieces.push_back(&piece);
    executed += step->rows;
    tokens = step->tokens != nullptr;
  }
  const StoredRuns stored = keep(steps);
  if (!steps.empty()) {
    header_.steps = static_cast<uint32_t>(steps.size());
    header_.rows = static_cast<uint32_t>(all_kept_ ? executed : kept_count_);
    header_.executed = all_kept_ ? 0 : executed;
    header_.first_step = steps.front()->number;
    header_.last_step = steps.back()->number;
    // The clock may have been set back in between.
    const auto [earliest, latest] = std::ranges::minmax_element(steps, {}, &StepData::time_ns);
    header_.first_time_ns = (*earliest)->time_ns;
    header_.last_time_ns = (*latest)->time_ns;
    header_.fragments = steps.front()->fragments;
  }
  // Layer by layer; within a layer the pieces stay in the order of the steps.
  std::ranges::stable_sort(pieces, {}, [](const Piece* p) { return p->shape.layer; });
  add_layers(pieces, header_.fragments > 0, spans, nullptr);
  for (const StepData* step : steps) {
    for (const WrittenPiece& w : step->written) {
      statistics_.add(w.shape.layer, w.shape.k, w.shape.ids_dtype, w.ids.data(),
                      w.weights.empty() ? nullptr : w.weights.data(), w.first_row, w.rows, spans);
    }
  }

  if (tokens && header_.rows > 0) {
    column_.clear();
    for (const StepData* step : steps) append(column_, step->tokens, size_t{step->rows} * 4);
    add_column(EntryField::kTokens, DType::kU32, kNoLayer, 1, 0, header_.rows, kept_rows(column_, 4));
  }
  add_table(EntryField::kSteps, Table(steps.size())
                                    .column([&](size_t i) { return steps[i]->number; })
                                    .column([&](size_t i) { return steps[i]->time_ns; })
                                    .column([&](size_t i) { return stored.rows[i]; })
                                    .column([&](size_t i) { return stored.of_step[i]; })
                                    .column([](size_t) { return uint32_t{0}; }));
  const std::vector<Run>& runs = stored.runs;
  add_table(EntryField::kRuns, Table(runs.size())
                                   .column([&](size_t i) { return runs[i].request; })
                                   .column([&](size_t i) { return runs[i].position; })
                                   .column([&](size_t i) { return runs[i].count; })
                                   .column([&](size_t i) { return runs[i].row_class; })
                                   .column([&](size_t i) { return runs[i].flags; }));
  add_statistics(statistics_);
  finish(extras);
}

// What is stored of the steps: all but the runs that are only counted. Fragments in the file have the rows of all runs,
// before it is known whose they are: there such a run stays, as nobody's.
BlockBuilder::StoredRuns BlockBuilder::keep(std::span<const StepData* const> steps) {
  StoredRuns stored;
  uint64_t at = 0;
  for (const StepData* step : steps) {
    const bool in_fragments = step->fragments > 0 && !step->counted;
    const size_t runs_before = stored.runs.size();
    const uint64_t rows_before = kept_count_;
    for (Run run : step->runs) {
      const uint64_t first = at;
      at += run.count;
      if ((run.flags & kRunCounted) != 0) {
        if (!in_fragments) {
          all_kept_ = false;
          continue;
        }
        run.request = run.position = kNoRequest;
        run.flags &= static_cast<uint16_t>(~kRunCounted);
      }
      stored.runs.push_back(run);
      kept_count_ += run.count;
      if (!kept_.empty() && kept_.back().first + kept_.back().rows == first) {
        kept_.back().rows += run.count;
      } else {
        kept_.push_back({first, run.count});
      }
    }
    stored.of_step.push_back(static_cast<uint32_t>(stored.runs.size() - runs_before));
    stored.rows.push_back(static_cast<uint32_t>(kept_count_ - rows_before));
  }
  return stored;
}

// Of a column that has all executed rows of the block, those that are stored.
const std::byte* BlockBuilder::kept_rows(const std::vector<std::byte>& column, size_t row_bytes) {
  if (all_kept_) return column.data();
  kept_column_.clear();
  for (const RowRange& range : kept_)
    append(kept_column_, column.data() + range.first * row_bytes, range.rows * row_bytes);
  return kept_column_.data();
}

void BlockBuilder::build_fragment(StepData& step, const BlockExtras& extras) {
  start(BlockKind::kFragment, extras);
  header_.steps = 1;
  header_.rows = step.rows;
  header_.first_step = header_.last_step = step.number;
  header_.first_time_ns = header_.last_time_ns = step.time_ns;
  all_kept_ = !step.counted;  // then it says which records left the ring, and has no plane
  std::vector<const Piece*> pieces;
  for (const Piece& piece : step.pieces) pieces.push_back(&piece);
  std::ranges::stable_sort(pieces, {}, [](const Piece* p) { return std::pair(p->shape.layer, p->first_row); });
  add_layers(pieces, true, {}, &step.written);
  finish(extras);
}

void BlockBuilder::build_footer(const Statistics& sum, const Table& index, const BlockExtras& extras,
                                uint64_t first_step, uint64_t last_step, uint64_t executed) {
  start(BlockKind::kFooter, extras);
  header_.executed = executed;
  header_.first_step = first_step;
  header_.last_step = last_step;
  add_statistics(sum);
  add_table(EntryField::kIndex, index);
  finish(extras);
}

// `pieces` ascend by layer. In a block of whole steps a layer's pieces are one column; in fragments, and in the block
// that completes them, pieces that follow each other are joined, and others stand alone with their first row.
void BlockBuilder::add_layers(std::span<const Piece* const> pieces, bool fragment, const std::vector<ClassSpan>& spans,
                              std::vector<WrittenPiece>* written) {
  for (size_t begin = 0; begin < pieces.size();) {
    const LayerShape& shape = pieces[begin]->shape;
    uint32_t rows = 0;
    size_t end = begin;
    const uint32_t first_row = fragment ? pieces[begin]->first_row : 0;
    while (end < pieces.size() && pieces[end]->shape == shape &&
           (!fragment || pieces[end]->first_row == first_row + rows)) {
      rows += pieces[end++]->rows;
    }
    const auto group = pieces.subspan(begin, end - begin);
    begin = end;

    const auto gather = [&](const std::byte* Piece::*data, size_t row_bytes) {
      column_.clear();
      for (const Piece* piece : group) append(column_, piece->*data, piece->rows * row_bytes);
    };
    const auto stored = static_cast<uint32_t>(all_kept_ ? rows : kept_count_);
    const auto store = [&](EntryField field, DType dtype, uint32_t width, const std::vector<std::byte>& column) {
      if (stored == 0) return;
      add_column(field, dtype, shape.layer, width, first_row, stored, kept_rows(column, width * size_of(dtype)));
    };
    weights_.clear();
    if (shape.weights_dtype != DType::kNone) {
      gather(&Piece::weights, shape.k * size_of(shape.weights_dtype));
      const DType dtype = convert_weights(shape.weights_dtype);
      store(EntryField::kWeights, dtype, shape.k, stored_weights_);
    }
    if (shape.logits_dtype != DType::kNone && stored > 0) {
      gather(&Piece::logits, shape.logits_width * size_of(shape.logits_dtype));
      store(EntryField::kLogits, shape.logits_dtype, shape.logits_width, column_);
    }
    if (shape.hidden_dtype != DType::kNone && stored > 0) {
      gather(&Piece::hidden, shape.hidden_width * size_of(shape.hidden_dtype));
      store(EntryField::kHidden, shape.hidden_dtype, shape.hidden_width, column_);
    }
    gather(&Piece::ids, shape.k * size_of(shape.ids_dtype));
    store(EntryField::kIds, shape.ids_dtype, shape.k, column_);
    if (written != nullptr) {
      written->push_back({shape, first_row, rows, column_, weights_});
    } else {
      statistics_.add(shape.layer, shape.k, shape.ids_dtype, column_.data(),
                      weights_.empty() ? nullptr : weights_.data(), first_row, rows, spans);
    }
  }
}

// From column_ (weights as the router gave them) to stored_weights_ (as they are stored) and weights_ (the same as
// float32).
DType BlockBuilder::convert_weights(DType from) {
  const size_t n = column_.size() / size_of(from);
  weights_.resize(n);
  const auto* in16 = reinterpret_cast<const uint16_t*>(column_.data());
  if (exact_weights_ || from == DType::kF16) {
    stored_weights_ = column_;
    switch (from) {
      case DType::kF16:
        f16_to_f32(in16, n, weights_.data());
        break;
      case DType::kBF16:
        std::transform(in16, in16 + n, weights_.begin(), bf16_to_f32);
        break;
      default:
        std::memcpy(weights_.data(), column_.data(), n * 4);
    }
    return from;
  }
  stored_weights_.resize(n * 2);
  auto* out = reinterpret_cast<uint16_t*>(stored_weights_.data());
  if (from == DType::kF32) {
    f32_to_f16(reinterpret_cast<const float*>(column_.data()), n, out);
  } else {
    bf16_to_f16(in16, n, out);
  }
  f16_to_f32(out, n, weights_.data());
  return DType::kF16;
}

void BlockBuilder::add_column(EntryField field, DType dtype, uint16_t layer, uint32_t width, uint32_t first_row,
                              uint32_t rows, const std::byte* data) {
  const size_t n = size_t{rows} * width;
  const size_t item = size_of(dtype);
  if (item > 1) {
    planes_.resize(n * item);
    split_planes(data, n, item, planes_.data());
    data = planes_.data();
  }
  for (size_t b = 0; b < item; ++b) {
    DirectoryEntry entry{};
    entry.field = field;
    entry.dtype = dtype;
    entry.byte = static_cast<uint8_t>(b);
    entry.layer = layer;
    entry.width = width;
    entry.first_row = first_row;
    entry.rows = rows;
    add_entry(entry, data + b * n, n);
  }
}

void BlockBuilder::add_table(EntryField field, const Table& table) {
  DirectoryEntry entry{};
  entry.field = field;
  entry.layer = kNoLayer;
  entry.rows = static_cast<uint32_t>(table.items());
  add_entry(entry, table.bytes().data(), table.bytes().size());
}

void BlockBuilder::add_statistics(const Statistics& statistics) {
  add_table(EntryField::kStatGroups, statistics.groups_table());
  add_table(EntryField::kStatCounts, statistics.counts_table());
}

void BlockBuilder::add_entry(DirectoryEntry entry, const std::byte* data, size_t bytes) {
  const size_t at = body_.size();
  body_.resize(at + bytes);
  const size_t length = compressor_.compress(data, bytes, body_.data() + at);
  entry.codec = length == 0 ? Codec::kRaw : Codec::kZstd;
  entry.stored = length == 0 ? bytes : length;
  if (length == 0 && bytes > 0) std::memcpy(body_.data() + at, data, bytes);
  body_.resize(at + entry.stored);
  entry.raw = bytes;
  entry.crc = crc32(body_.data() + at, entry.stored);
  entry.offset = at;
  directory_.push_back(entry);
}

void BlockBuilder::finish(const BlockExtras& extras) {
  if (!extras.notes.empty()) {
    std::string text;
    for (const std::string& line : extras.notes) text.append(line).push_back('\n');
    DirectoryEntry entry{};
    entry.field = EntryField::kNotes;
    entry.layer = kNoLayer;
    entry.rows = static_cast<uint32_t>(extras.notes.size());
    add_entry(entry, reinterpret_cast<const std::byte*>(text.data()), text.size());
  }
  const auto& lanes = extras.lanes;
  add_table(EntryField::kLanes, Table(lanes.size())
                                    .column([&](size_t i) { return lanes[i].lane; })
                                    .column([&](size_t i) { return lanes[i].first; })
                                    .column([&](size_t i) { return lanes[i].last; }));
  std::vector<uint16_t> causes;
  for (size_t c = 0; c < extras.losses.size(); ++c) {
    const LossTotals& t = extras.losses[c];
    if (t.steps + t.layers + t.rows > 0) causes.push_back(static_cast<uint16_t>(c));
  }
  add_table(EntryField::kLosses, Table(causes.size())
                                     .column([&](size_t i) { return causes[i]; })
                                     .column([&](size_t i) { return extras.losses[causes[i]].steps; })
                                     .column([&](size_t i) { return extras.losses[causes[i]].layers; })
                                     .column([&](size_t i) { return extras.losses[causes[i]].rows; }));

  // The entries' offsets depend on the directory's stored length, which depends on the offsets. So compress once to
  // learn about how long it gets, leave a little room, and compress again with the offsets in.
  const size_t raw = directory_.size() * sizeof(DirectoryEntry);
  const auto* entries = reinterpret_cast<const std::byte*>(directory_.data());
  frame_.resize(raw);
  const size_t guess = compressor_.compress(entries, raw, frame_.data());
  const size_t room = guess == 0 ? raw : std::min(raw, guess + guess / 8 + 64);
  const size_t body_at = align_up(sizeof(BlockHeader) + room, kAlign);
  for (DirectoryEntry& entry : directory_) entry.offset += body_at;
  size_t stored = room < raw ? compressor_.compress(entries, raw, frame_.data()) : 0;
  if (stored > body_at - sizeof(BlockHeader)) stored = 0;
  if (stored == 0) {  // raw: move the body behind the whole directory
    const size_t raw_body_at = align_up(sizeof(BlockHeader) + raw, kAlign);
    for (DirectoryEntry& entry : directory_) entry.offset += raw_body_at - body_at;
    std::memcpy(frame_.data(), entries, raw);
  }
  const size_t body_start = stored == 0 ? align_up(sizeof(BlockHeader) + raw, kAlign) : body_at;

  header_.directory_codec = stored == 0 ? Codec::kRaw : Codec::kZstd;
  header_.directory_stored = static_cast<uint32_t>(stored == 0 ? raw : stored);
  header_.directory_raw = static_cast<uint32_t>(raw);
  header_.directory_crc = crc32(frame_.data(), header_.directory_stored);
  header_.entries = static_cast<uint32_t>(directory_.size());
  header_.block_bytes = align_up(body_start + body_.size(), kAlign);
  seal(header_);

  bytes_.clear();
  bytes_.reserve(header_.block_bytes);
  append(bytes_, &header_, sizeof header_);
  append(bytes_, frame_.data(), header_.directory_stored);
  bytes_.resize(body_start);
  append(bytes_, body_.data(), body_.size());
  pad(bytes_);
}

}  // namespace moe_native
