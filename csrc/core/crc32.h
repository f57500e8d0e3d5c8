// The CRC-32 of zlib and PNG, so that a reader in any language has it in its standard library.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moe_native {

// `seed` is the checksum of what came before, for data in several pieces.
uint32_t crc32(const void* data, size_t bytes, uint32_t seed = 0) noexcept;

}  // namespace moe_native
