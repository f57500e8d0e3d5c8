#include "capture/capture_file.h"

#include <gtest/gtest.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <system_error>
#include <utility>

#include "capture/decoder.h"

namespace moe_native {
namespace {

using test::Reader;

TEST(CaptureFile, PiecesFollowEachOtherAtCacheLines) {
  CaptureFile file;
  EXPECT_EQ(file.bytes(), 0u);
  EXPECT_EQ(file.allocate(1), 0u);
  EXPECT_EQ(file.allocate(64), 64u);
  EXPECT_EQ(file.allocate(65), 128u);
  EXPECT_EQ(file.allocate(0), 256u);
  EXPECT_EQ(file.bytes(), 256u);
}

TEST(CaptureFile, WhatIsWrittenIsInTheFileThatTheCallerOpens) {
  CaptureFile file;
  const Reader reader(file.fd());
  const std::string text = "rows";
  std::memcpy(file.data() + file.allocate(10), text.data(), text.size());
  const uint64_t far = file.allocate(200 << 20);
  std::memcpy(file.data() + file.bytes() - text.size(), text.data(), text.size());
  EXPECT_GT(far, 0u);
  EXPECT_EQ(reader.bytes(4), text);
  EXPECT_EQ(reader.bytes(file.bytes()).substr(file.bytes() - 4), text);
}

TEST(CaptureFile, WhatIsNotWrittenTakesNoMemory) {
  CaptureFile file;
  const Reader reader(file.fd());
  const uint64_t at = file.allocate(uint64_t{10} << 30);
  file.data()[at + (uint64_t{9} << 30)] = std::byte{1};
  EXPECT_LT(reader.memory(), uint64_t{8} << 20);
}

TEST(CaptureFile, WhatIsForgottenIsUsedAgainFromTheBeginning) {
  CaptureFile file;
  const Reader reader(file.fd());
  std::memset(file.data() + file.allocate(1 << 20), 1, 1 << 20);
  const uint64_t memory = reader.memory();
  EXPECT_GE(memory, uint64_t{1} << 20);
  file.forget();
  EXPECT_EQ(file.bytes(), 0u);
  EXPECT_EQ(file.allocate(64), 0u);
  EXPECT_EQ(reader.memory(), memory) << "its pages stay";
}

TEST(CaptureFile, ItIsReadWhileAnyCallerHasALock) {
  const CaptureFile file;
  EXPECT_FALSE(file.is_read());
  {
    const Reader one(file.fd());
    EXPECT_TRUE(file.is_read());
    {
      const Reader other(file.fd());
      EXPECT_TRUE(file.is_read());
    }
    EXPECT_TRUE(file.is_read());
  }
  EXPECT_FALSE(file.is_read());
  const Reader later(file.fd());
  EXPECT_TRUE(file.is_read()) << "looking has left no lock that keeps a caller away";
}

TEST(CaptureFile, AMovedFileIsTheSame) {
  CaptureFile from;
  const Reader reader(from.fd());
  from.data()[from.allocate(100)] = std::byte{'x'};
  CaptureFile to(std::move(from));
  EXPECT_EQ(to.bytes(), 128u);
  EXPECT_EQ(Reader(to.fd()).file(), reader.file());
  CaptureFile assigned;
  assigned = std::move(to);
  EXPECT_EQ(assigned.allocate(1), 128u);
  EXPECT_EQ(reader.bytes(1), "x");
}

TEST(CaptureFile, AForkedChildDoesNotHaveTheMemory) {
  CaptureFile file;
  file.data()[file.allocate(64)] = std::byte{1};
  ASSERT_EQ(::msync(file.data(), 4096, MS_ASYNC), 0);
  const pid_t child = ::fork();
  if (child == 0) ::_exit(::msync(file.data(), 4096, MS_ASYNC) != 0 && errno == ENOMEM ? 0 : 1);
  int status = -1;
  ::waitpid(child, &status, 0);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

// A process that may have only so many more addresses.
struct AddressLimit {
  explicit AddressLimit(uint64_t more) {
    uint64_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    ::getrlimit(RLIMIT_AS, &old);
    const rlimit limit{pages * static_cast<uint64_t>(::sysconf(_SC_PAGESIZE)) + more, old.rlim_max};
    ::setrlimit(RLIMIT_AS, &limit);
  }
  ~AddressLimit() { ::setrlimit(RLIMIT_AS, &old); }
  rlimit old{};
};

TEST(CaptureFile, WhereAddressesAreFewItHasFewerAndDoesNotGrowBeyondThem) {
  const AddressLimit limit(uint64_t{6} << 30);
  CaptureFile file;
  const uint64_t at = file.allocate(uint64_t{4} << 30);
  file.data()[at + (uint64_t{4} << 30) - 1] = std::byte{1};
  EXPECT_THROW(file.allocate(1), std::system_error);
  EXPECT_EQ(file.bytes(), uint64_t{4} << 30) << "what did not fit was not taken";
}

TEST(CaptureFile, WithoutAddressesThereIsNone) {
  const AddressLimit limit(uint64_t{512} << 20);
  EXPECT_THROW(CaptureFile(), std::system_error);
}

}  // namespace
}  // namespace moe_native
