#include "codec/compressor.h"

#include <zstd.h>

#include <new>

namespace moe_native {

Compressor::Compressor(int level) : context_(ZSTD_createCCtx()) {
  if (!context_) throw std::bad_alloc();
  ZSTD_CCtx_setParameter(context_.get(), ZSTD_c_compressionLevel, level);
  // The frame's length is in the directory and the checksum covers the stored bytes, so neither is needed again.
  ZSTD_CCtx_setParameter(context_.get(), ZSTD_c_checksumFlag, 0);
}

size_t Compressor::compress(const std::byte* in, size_t bytes, std::byte* out) noexcept {
  if (bytes == 0) return 0;
  // A frame that does not fit below the input's length is an error to zstd, and the sign to store raw to us.
  const size_t length = ZSTD_compress2(context_.get(), out, bytes - 1, in, bytes);
  return ZSTD_isError(length) != 0 ? 0 : length;
}

void Compressor::Free::operator()(ZSTD_CCtx_s* context) const noexcept { ZSTD_freeCCtx(context); }

}  // namespace moe_native
