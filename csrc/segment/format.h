// The bytes of a segment file. FORMAT.md is the specification; this header is its C++ spelling.
#pragma once

#include <cstddef>
#include <cstdint>

#include "codec/compressor.h"
#include "core/dtype.h"

namespace moe_native {

inline constexpr char kSegmentMagic[8] = {'M', 'O', 'E', 'T', 'R', 'A', 'C', 'E'};
inline constexpr char kBlockMagic[4] = {'M', 'O', 'E', 'B'};
inline constexpr char kTrailerMagic[8] = {'M', 'O', 'E', 'F', 'O', 'O', 'T', '1'};
inline constexpr uint16_t kFormatMajor = 1;
inline constexpr uint16_t kFormatMinor = 0;
inline constexpr uint16_t kNoLayer = 0xFFFF;
inline constexpr uint32_t kNoRequest = 0xFFFFFFFF;

struct Superblock {
  char magic[8];
  uint32_t header_size;
  uint16_t major;
  uint16_t minor;
  uint64_t incompatible;
  uint64_t compatible;
  uint8_t run_id[16];
  uint64_t ring_id;
  uint64_t number;
  int64_t created_ns;
  uint64_t metadata_offset;
  uint32_t metadata_stored;
  uint32_t metadata_raw;
  uint32_t metadata_crc;
  Codec metadata_codec;
  uint8_t zero[31];
  uint32_t crc;
};
static_assert(sizeof(Superblock) == 128);
static_assert(offsetof(Superblock, metadata_offset) == 72);
static_assert(offsetof(Superblock, crc) == 124);

enum class BlockKind : uint8_t { kRows = 1, kFragment = 2, kFooter = 3 };

struct BlockHeader {
  char magic[4];
  uint32_t header_size;
  BlockKind kind;
  Codec directory_codec;
  uint16_t reserved;
  uint32_t entries;
  uint64_t block_bytes;
  uint64_t number;
  uint64_t first_step;
  uint64_t last_step;
  uint32_t steps;
  uint32_t rows;
  int64_t first_time_ns;
  int64_t last_time_ns;
  uint32_t directory_stored;
  uint32_t directory_raw;
  uint32_t directory_crc;
  uint32_t fragments;
  uint64_t executed;
  uint8_t zero[28];
  uint32_t crc;
};
static_assert(sizeof(BlockHeader) == 128);
static_assert(offsetof(BlockHeader, first_step) == 32);
static_assert(offsetof(BlockHeader, directory_stored) == 72);
static_assert(offsetof(BlockHeader, executed) == 88);
static_assert(offsetof(BlockHeader, crc) == 124);

enum class EntryField : uint8_t {
  kIds = 1,
  kWeights = 2,
  kLogits = 3,
  kHidden = 4,
  kTokens = 5,
  kSteps = 16,
  kRuns = 17,
  kNotes = 18,
  kStatGroups = 19,
  kStatCounts = 20,
  kLanes = 21,
  kLosses = 22,
  kIndex = 23,
};

struct DirectoryEntry {
  EntryField field;
  DType dtype;
  uint8_t byte;
  Codec codec;
  uint16_t layer;
  uint16_t reserved;
  uint32_t width;
  uint32_t first_row;
  uint32_t rows;
  uint32_t crc;
  uint64_t offset;
  uint64_t stored;
  uint64_t raw;
};
static_assert(sizeof(DirectoryEntry) == 48);

struct Trailer {
  uint64_t footer_offset;
  uint64_t file_bytes;
  uint32_t reserved;
  uint32_t crc;
  char magic[8];
};
static_assert(sizeof(Trailer) == 32);

}  // namespace moe_native
