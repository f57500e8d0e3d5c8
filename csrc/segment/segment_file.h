// One segment file being written: blocks appended, header last; on close a footer, a trailer and the final name.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "segment/block_builder.h"
#include "segment/format.h"
#include "segment/statistics.h"

namespace moe_native {

struct SegmentIdentity {
  uint8_t run_id[16];
  uint64_t ring_id;
  std::string directory;  // of the rank
};

// Whether closing waits until the disk has the segment, so that it survives a power cut from then on.
enum class Sync { kWait, kLeaveToCaller };

class SegmentFile {
 public:
  SegmentFile() = default;
  ~SegmentFile();
  SegmentFile(const SegmentFile&) = delete;
  SegmentFile& operator=(const SegmentFile&) = delete;

  // Each returns 0, or the errno of what failed. After a failure the file is abandoned as it is; its whole blocks stay
  // readable.
  int create(const SegmentIdentity& identity, uint64_t number, const std::string& metadata, Compressor& compressor);
  int append(const BlockBuilder& block);
  int close(BlockBuilder& builder, const BlockExtras& extras, Sync sync);
  void abandon() noexcept;

  bool is_open() const { return fd_ >= 0; }
  uint64_t bytes() const { return end_; }
  uint64_t number() const { return number_; }
  size_t blocks() const { return index_.size(); }

 private:
  struct IndexItem {
    uint64_t offset;
    BlockHeader header;
  };
  int write(const void* data, size_t bytes, uint64_t offset) const;
  Table index_table() const;

  int fd_ = -1;
  std::string path_;  // of the closed segment; `.open` is appended while it is written
  uint64_t number_ = 0;
  uint64_t end_ = 0;
  std::vector<IndexItem> index_;
  Statistics sum_;
};

}  // namespace moe_native
