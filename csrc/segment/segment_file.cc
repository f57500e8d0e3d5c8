#include "segment/segment_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "core/crc32.h"
#include "core/owner.h"
#include "core/test_point.h"

namespace moe_native {

SegmentFile::~SegmentFile() { abandon(); }

void SegmentFile::abandon() noexcept {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
  index_.clear();
  sum_.clear();
}

int SegmentFile::write(const void* data, size_t bytes, uint64_t offset) const {
  const auto* from = static_cast<const std::byte*>(data);
  while (bytes > 0) {
    const ssize_t n = ::pwrite(fd_, from, bytes, static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return n < 0 ? errno : EIO;
    from += n;
    offset += static_cast<uint64_t>(n);
    bytes -= static_cast<size_t>(n);
  }
  return 0;
}

int SegmentFile::create(const SegmentIdentity& identity, uint64_t number, const std::string& metadata,
                        Compressor& compressor) {
  char name[32];
  std::snprintf(name, sizeof name, "/%06llu.moe", static_cast<unsigned long long>(number));
  path_ = identity.directory + name;
  number_ = number;
  fd_ = ::open((path_ + ".open").c_str(), O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
  if (fd_ < 0) return errno;
  MOE_TEST_POINT("segment, empty");

  std::vector<std::byte> frame(metadata.size());
  const auto* raw = reinterpret_cast<const std::byte*>(metadata.data());
  const size_t stored = compressor.compress(raw, metadata.size(), frame.data());
  if (stored == 0) std::memcpy(frame.data(), raw, metadata.size());
  frame.resize(stored == 0 ? metadata.size() : stored);

  Superblock super{};
  std::memcpy(super.magic, kSegmentMagic, sizeof kSegmentMagic);
  super.header_size = sizeof(Superblock);
  super.major = kFormatMajor;
  super.minor = kFormatMinor;
  std::memcpy(super.run_id, identity.run_id, sizeof super.run_id);
  super.ring_id = identity.ring_id;
  super.number = number;
  super.created_ns = unix_time_ns();
  super.metadata_offset = sizeof(Superblock);
  super.metadata_stored = static_cast<uint32_t>(frame.size());
  super.metadata_raw = static_cast<uint32_t>(metadata.size());
  super.metadata_crc = crc32(frame.data(), frame.size());
  super.metadata_codec = stored == 0 ? Codec::kRaw : Codec::kZstd;
  super.crc = crc32(&super, offsetof(Superblock, crc));
  end_ = align_up(sizeof(Superblock) + frame.size(), kAlign);
  int error = write(frame.data(), frame.size(), sizeof(Superblock));
  MOE_TEST_POINT("segment, metadata");
  if (error == 0) error = write(&super, sizeof super, 0);
  if (error != 0) {
    ::unlink((path_ + ".open").c_str());  // nothing is in it; the next try wants the name
    abandon();
  }
  MOE_TEST_POINT("segment, begun");
  return error;
}

int SegmentFile::append(const BlockBuilder& block) {
  const auto bytes = block.bytes();
  constexpr size_t kHeader = sizeof(BlockHeader);
  // The body first: a valid header is the promise that everything behind it is there.
  int error = write(bytes.data() + kHeader, bytes.size() - kHeader, end_ + kHeader);
  MOE_TEST_POINT("block, without header");
  if (error == 0) error = write(bytes.data(), kHeader, end_);
  if (error != 0) {
    const bool full = error == ENOSPC || error == EDQUOT || error == EFBIG;
    // What fitted is given back, and the next block is tried in the same place.
    if (!full || ::ftruncate(fd_, static_cast<off_t>(end_)) != 0) abandon();
    return error;
  }
  index_.push_back({end_, block.header()});
  sum_.merge(block.statistics());
  end_ += bytes.size();
  return 0;
}

Table SegmentFile::index_table() const {
  Table table(index_.size());
  table.column([&](size_t i) { return index_[i].offset; })
      .column([&](size_t i) { return index_[i].header.block_bytes; })
      .column([&](size_t i) { return static_cast<uint16_t>(index_[i].header.kind); })
      .column([&](size_t i) { return index_[i].header.steps; })
      .column([&](size_t i) { return index_[i].header.rows; })
      .column([&](size_t i) { return index_[i].header.first_step; })
      .column([&](size_t i) { return index_[i].header.last_step; })
      .column([&](size_t i) { return index_[i].header.first_time_ns; })
      .column([&](size_t i) { return index_[i].header.last_time_ns; });
  return table;
}

int SegmentFile::close(BlockBuilder& builder, const BlockExtras& extras, Sync sync) {
  const uint64_t first = index_.empty() ? 0 : index_.front().header.first_step;
  const uint64_t last = index_.empty() ? 0 : index_.back().header.last_step;
  uint64_t rows = 0, executed = 0;
  for (const IndexItem& item : index_) {
    if (item.header.kind != BlockKind::kRows) continue;
    rows += item.header.rows;
    executed += item.header.executed == 0 ? item.header.rows : item.header.executed;
  }
  builder.build_footer(sum_, index_table(), extras, first, last, executed == rows ? 0 : executed);
  Trailer trailer{};
  trailer.footer_offset = end_;
  int error = write(builder.bytes().data(), builder.bytes().size(), end_);
  MOE_TEST_POINT("close, footer");
  trailer.file_bytes = end_ + builder.bytes().size() + sizeof trailer;
  trailer.crc = crc32(&trailer, offsetof(Trailer, crc));
  std::memcpy(trailer.magic, kTrailerMagic, sizeof kTrailerMagic);
  if (error == 0) error = write(&trailer, sizeof trailer, trailer.file_bytes - sizeof trailer);
  MOE_TEST_POINT("close, trailer");
  if (error == 0 && sync == Sync::kWait && ::fdatasync(fd_) != 0) error = errno;
  MOE_TEST_POINT("close, before the rename");
  if (error == 0 && ::rename((path_ + ".open").c_str(), path_.c_str()) != 0) error = errno;
  MOE_TEST_POINT("close, renamed");
  abandon();
  return error;
}

}  // namespace moe_native
