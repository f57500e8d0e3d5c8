// zstd with one reused context. A frame that would not be smaller is not made: the caller stores the bytes as they are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

struct ZSTD_CCtx_s;

namespace moe_native {

enum class Codec : uint8_t { kRaw = 0, kZstd = 1 };

class Compressor {
 public:
  explicit Compressor(int level = 1);  // throws std::bad_alloc

  // Compresses into `out`, which has room for `bytes`. Returns the frame's length, or 0 when it would not be shorter
  // than that.
  size_t compress(const std::byte* in, size_t bytes, std::byte* out) noexcept;

 private:
  struct Free {
    void operator()(ZSTD_CCtx_s* context) const noexcept;
  };
  std::unique_ptr<ZSTD_CCtx_s, Free> context_;
};

}  // namespace moe_native
