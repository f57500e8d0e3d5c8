#include "core/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "core/test_point.h"

namespace moe_native {

namespace {

[[noreturn]] void fail(int error, const std::string& what) {
  throw std::system_error(error, std::generic_category(), what);
}

// Every page is there and writable before the model's first store: a first touch costs 7 µs, and MAP_POPULATE prepares
// shared mappings for reading only.
void populate(std::byte* data, size_t bytes) {
#ifdef MADV_POPULATE_WRITE
  if (::madvise(data, bytes, MADV_POPULATE_WRITE) == 0) return;
#endif
  const size_t page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  for (size_t at = 0; at < bytes; at += page) *reinterpret_cast<volatile char*>(data + at) = 0;
}

}  // namespace

MappedFile MappedFile::create(const std::string& path, size_t bytes) {
  MappedFile file;
  file.fd_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
  if (file.fd_ < 0) fail(errno, "cannot create " + path);
  MOE_TEST_POINT("ring, empty");
  file.path_ = path;
  const auto give_up = [&](int error, const char* what) {
    ::unlink(path.c_str());
    fail(error, std::string(what) + " " + path);
  };
  // A POSIX lock belongs to the process: a forked child does not have it, and the kernel drops it at death. That makes
  // it the one sign of life that also works across containers, where process ids mean nothing.
  struct flock lock {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  if (::fcntl(file.fd_, F_SETLK, &lock) != 0) give_up(errno, "cannot lock");
  // Allocated now, so that a full disk is an error here and not a SIGBUS in the model's thread later.
  int error = 0;
  do {
    error = ::posix_fallocate(file.fd_, 0, static_cast<off_t>(bytes));
  } while (error == EINTR);
  if (error != 0) give_up(error, "no room for the ring in");
  try {
    file.map(bytes);
  } catch (const std::system_error&) {
    ::unlink(path.c_str());
    throw;
  }
  return file;
}

MappedFile MappedFile::nameless(size_t bytes) {
  MappedFile file;
  file.map(bytes);
  return file;
}

void MappedFile::map(size_t bytes) {
  const int anonymous = fd_ < 0 ? MAP_ANONYMOUS : 0;
  void* mapped = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | anonymous, fd_, 0);
  if (mapped == MAP_FAILED) fail(errno, path_.empty() ? "cannot map memory for the ring" : "cannot map " + path_);
  data_ = static_cast<std::byte*>(mapped);
  size_ = bytes;
  populate(data_, bytes);
  // A forked child must not be able to write into its parent's ring.
  ::madvise(mapped, bytes, MADV_DONTFORK);
}

MappedFile::MappedFile(MappedFile&& other) noexcept { *this = std::move(other); }

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  if (this != &other) {
    reset();
    path_ = std::move(other.path_);
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
    fd_ = std::exchange(other.fd_, -1);
  }
  return *this;
}

MappedFile::~MappedFile() { reset(); }

void MappedFile::unlink() noexcept {
  if (!path_.empty()) ::unlink(path_.c_str());
}

void MappedFile::reset() noexcept {
  if (data_ != nullptr) ::munmap(data_, size_);
  if (fd_ >= 0) ::close(fd_);
  data_ = nullptr;
  fd_ = -1;
}

}  // namespace moe_native
