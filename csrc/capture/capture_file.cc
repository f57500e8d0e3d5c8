#include "capture/capture_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "core/ring_layout.h"

namespace moe_native {

namespace {

// Addresses, not memory: they are mapped once, so that pages which are there stay there.
constexpr uint64_t kMostBytes = uint64_t{1} << 45;
constexpr uint64_t kFewestBytes = uint64_t{1} << 30;
// The file grows in such pieces; what is not written to takes no memory.
constexpr uint64_t kGrowth = uint64_t{64} << 20;
constexpr uint64_t kKeptFactor = 4;

[[noreturn]] void fail(int error, const char* what) { throw std::system_error(error, std::generic_category(), what); }

}  // namespace

CaptureFile::CaptureFile() {
  fd_ = ::memfd_create("moe-native-capture", MFD_CLOEXEC);
  if (fd_ < 0) fail(errno, "no memory for a capture");
  for (uint64_t bytes = kMostBytes;; bytes /= 2) {
    void* mapped = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd_, 0);
    if (mapped != MAP_FAILED) {
      data_ = static_cast<std::byte*>(mapped);
      mapped_ = bytes;
      break;
    }
    if (bytes > kFewestBytes) continue;
    const int error = errno;
    ::close(fd_);
    fail(error, "no addresses for a capture");
  }
  ::madvise(data_, mapped_, MADV_DONTFORK);
  ::madvise(data_, mapped_, MADV_DONTDUMP);  // a core dump would look at each page
  // A plot has room for more positions than come, and each of its columns would touch a huge page.
  ::madvise(data_, mapped_, MADV_NOHUGEPAGE);
}

CaptureFile::~CaptureFile() {
  if (data_ != nullptr) ::munmap(data_, mapped_);
  if (fd_ >= 0) ::close(fd_);
}

CaptureFile& CaptureFile::operator=(CaptureFile&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(data_, other.data_);
  std::swap(mapped_, other.mapped_);
  std::swap(size_, other.size_);
  std::swap(end_, other.end_);
  std::swap(kept_, other.kept_);
  return *this;
}

uint64_t CaptureFile::allocate(uint64_t bytes) {
  const uint64_t start = end_, end = align_up(start + bytes, kAlign);
  if (end > mapped_) fail(ENOMEM, "a capture has grown beyond the addresses that it may have");
  if (end > size_) {
    const uint64_t size = std::min(align_up(end, kGrowth), mapped_);
    if (::ftruncate(fd_, static_cast<off_t>(size)) != 0) fail(errno, "no memory for a capture");
    size_ = size;
  }
  end_ = end;
  return start;
}

void CaptureFile::forget() {
  // Much more than was used now is of a larger capture before.
  if (pages() > kKeptFactor * end_ + kGrowth) {
    const uint64_t from = align_up(end_, kPage);
    ::fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(from),
                static_cast<off_t>(size_ - std::min(from, size_)));
  }
  kept_ = pages();
  end_ = 0;
}

uint64_t CaptureFile::pages() const noexcept {
  struct stat status;
  return ::fstat(fd_, &status) == 0 ? static_cast<uint64_t>(status.st_blocks) * 512 : 0;
}

bool CaptureFile::is_read() const noexcept {
  if (::flock(fd_, LOCK_EX | LOCK_NB) != 0) return true;
  ::flock(fd_, LOCK_UN);
  return false;
}

}  // namespace moe_native
