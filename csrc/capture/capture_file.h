// The memory that a capture's rows are written to: a file without a name, which its caller maps as well. The kernel
// takes it back when nobody has it any more, however the processes end.
//
// Its first bytes are the first to be used; behind what was written it is sparse. Whoever reads it holds a shared lock
// (flock) on it, also over its own mapping's life, so that the memory is not used again meanwhile.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace moe_native {

class CaptureFile {
 public:
  CaptureFile();  // throws std::system_error
  ~CaptureFile();
  CaptureFile(CaptureFile&& other) noexcept { *this = std::move(other); }
  CaptureFile& operator=(CaptureFile&& other) noexcept;
  CaptureFile(const CaptureFile&) = delete;
  CaptureFile& operator=(const CaptureFile&) = delete;

  int fd() const { return fd_; }
  std::byte* data() const { return data_; }
  // Room for `bytes` at the end, aligned to a cache line: where it begins. Throws std::system_error.
  uint64_t allocate(uint64_t bytes);
  uint64_t bytes() const { return end_; }
  // What is in it is not needed any more. Its pages stay, but for what a much larger capture before has left.
  void forget();
  // Bytes of memory that it takes, and how many of them it had when it was used again.
  uint64_t pages() const noexcept;
  uint64_t kept() const { return kept_; }
  bool is_read() const noexcept;

 private:
  int fd_ = -1;
  std::byte* data_ = nullptr;
  uint64_t mapped_ = 0;
  uint64_t size_ = 0;  // of the file
  uint64_t end_ = 0;
  uint64_t kept_ = 0;
};

}  // namespace moe_native
