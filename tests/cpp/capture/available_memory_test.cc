#include "capture/available_memory.h"

#include <gtest/gtest.h>

#include <limits>

#include "support.h"

namespace moe_native {
namespace {

namespace fs = std::filesystem;
constexpr uint64_t kNoLimit = std::numeric_limits<uint64_t>::max();

struct AvailableMemoryTest : testing::Test {
  void write(const std::string& path, const std::string& text) const {
    const std::string file = root / path;
    fs::create_directories(fs::path(file).parent_path());
    std::ofstream(file) << text;
  }
  void write_group(const std::string& group, const std::string& most, uint64_t used, uint64_t files) const {
    const std::string at = "sys/fs/cgroup" + group;
    write(at + "/memory.max", most + "\n");
    write(at + "/memory.current", std::to_string(used) + "\n");
    write(at + "/memory.stat",
          "anon 5\nfile 9\ninactive_file " + std::to_string(files - 1) + "\nactive_file 1\nshmem 7\n");
  }
  test::TemporaryDirectory root;
};

TEST_F(AvailableMemoryTest, IsThatOfTheMachine) {
  write("proc/meminfo", "MemTotal:       9000 kB\nMemFree:        1000 kB\nMemAvailable:   4000 kB\n");
  EXPECT_EQ(available_memory(root.path()), 4000u * 1024);
}

TEST_F(AvailableMemoryTest, IsThatOfTheTightestGroup) {
  write("proc/meminfo", "MemAvailable:   4000 kB\n");
  write("proc/self/cgroup", "1:name=systemd:/elsewhere\n0::/kube/pod\n");
  write_group("/kube/pod", "max", 700'000, 300'000);
  EXPECT_EQ(available_memory(root.path()), 4000u * 1024) << "no limit";
  write_group("/kube", "2000000", 1'500'000, 500'000);
  EXPECT_EQ(available_memory(root.path()), 1'000'000u) << "that of the group around it, without pages of files";
  write_group("/kube/pod", "1000000", 900'000, 300'000);
  EXPECT_EQ(available_memory(root.path()), 400'000u);
  write_group("", "500000", 600'000, 50'000);
  EXPECT_EQ(available_memory(root.path()), 0u);
}

TEST_F(AvailableMemoryTest, WhatCannotBeReadIsNoLimit) {
  EXPECT_EQ(available_memory(root.path()), kNoLimit);
  write("proc/meminfo", "MemTotal: 9 kB\n");
  write("proc/self/cgroup", "nothing\n");
  write("sys/fs/cgroup/memory.max", "12");
  EXPECT_EQ(available_memory(root.path()), kNoLimit);
}

TEST_F(AvailableMemoryTest, IsKnownHere) {
  EXPECT_GT(available_memory(), 0u);
  EXPECT_LT(available_memory(), kNoLimit);
}

}  // namespace
}  // namespace moe_native
