// Memory mapped shared and writable, fully allocated and populated: a file that is locked for as long as this process
// lives, or one without a name.
#pragma once

#include <cstddef>
#include <string>

namespace moe_native {

class MappedFile {
 public:
  MappedFile() = default;
  // Makes the file (it must not exist), mode 0600. Throws std::system_error.
  static MappedFile create(const std::string& path, size_t bytes);
  // Nobody else finds it, and the kernel takes it back when the process ends. Throws std::system_error.
  static MappedFile nameless(size_t bytes);

  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();  // unmaps and closes; the file stays

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  const std::string& path() const { return path_; }
  void unlink() noexcept;

 private:
  void map(size_t bytes);
  void reset() noexcept;

  std::string path_;
  std::byte* data_ = nullptr;
  size_t size_ = 0;
  int fd_ = -1;
};

}  // namespace moe_native
