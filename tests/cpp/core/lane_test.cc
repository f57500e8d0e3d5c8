#include "core/lane.h"

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <thread>
#include <vector>

namespace moe_native {
namespace {

struct Memory {
  explicit Memory(uint32_t descriptors, uint64_t arena) : d(new Descriptor[descriptors]()), a(arena) {
    memory.header = &header;
    memory.descriptors = d.get();
    memory.arena = a.data();
    memory.descriptor_count = descriptors;
    memory.arena_bytes = arena;
  }
  LaneHeader header{};
  std::unique_ptr<Descriptor[]> d;
  std::vector<std::byte> a;
  LaneMemory memory;
};

TEST(Lane, NothingBeforeCommit) {
  Memory m(8, 4096);
  LaneProducer producer(m.memory);
  LaneConsumer consumer(m.memory);
  EXPECT_EQ(consumer.peek(), nullptr);
  Descriptor* d = producer.reserve(100);
  ASSERT_NE(d, nullptr);
  EXPECT_EQ(consumer.peek(), nullptr) << "reserved is not committed";
  producer.commit(*d);
  EXPECT_EQ(consumer.peek(), d);
}

TEST(Lane, ARecordThatWasGivenUpIsSeenAsSuch) {
  Memory m(8, 4096);
  LaneProducer producer(m.memory);
  LaneConsumer consumer(m.memory);
  producer.give_up(*producer.reserve(64));
  ASSERT_NE(consumer.peek(), nullptr);
  EXPECT_FALSE(LaneConsumer::committed(*consumer.peek()));
}

TEST(Lane, FullByBytesUntilReleased) {
  Memory m(64, 1024);
  LaneProducer producer(m.memory);
  LaneConsumer consumer(m.memory);
  for (int i = 0; i < 16; ++i) producer.commit(*producer.reserve(64));
  EXPECT_EQ(producer.reserve(1), nullptr);
  while (consumer.peek() != nullptr) consumer.take();
  EXPECT_EQ(producer.reserve(1), nullptr) << "taken is not released";
  EXPECT_EQ(consumer.held_bytes(), 1024u);
  consumer.release(consumer.position());
  EXPECT_NE(producer.reserve(64), nullptr);
}

TEST(Lane, FullByDescriptors) {
  Memory m(4, 4096);
  LaneProducer producer(m.memory);
  for (int i = 0; i < 4; ++i) producer.commit(*producer.reserve(0));
  EXPECT_EQ(producer.reserve(0), nullptr);
}

TEST(Lane, PayloadsNeverCrossTheEnd) {
  Memory m(64, 1024);
  LaneProducer producer(m.memory);
  LaneConsumer consumer(m.memory);
  for (int i = 0; i < 200; ++i) {
    Descriptor* d = producer.reserve(320);
    ASSERT_NE(d, nullptr);
    EXPECT_LE(d->offset + 320, 1024u);
    EXPECT_EQ(d->offset % 64, 0u);
    producer.commit(*d);
    ASSERT_EQ(consumer.peek(), d);
    consumer.take();
    consumer.release(consumer.position());
  }
}

TEST(Lane, AdmissionCountsDescriptorsAndBytes) {
  Memory m(8, 1024);
  LaneProducer producer(m.memory);
  EXPECT_TRUE(producer.admits(8, 1024));
  EXPECT_FALSE(producer.admits(9, 0));
  EXPECT_FALSE(producer.admits(1, 1025));
}

// Through thousands of laps, with a consumer on another thread: each record once, in order, with its own bytes.
TEST(Lane, ConsumerSeesEveryRecordOnceInOrder) {
  Memory m(16, 2048);
  constexpr uint64_t kRecords = 200'000;
  std::thread thread([&] {
    LaneProducer producer(m.memory);
    for (uint64_t i = 0; i < kRecords;) {
      const uint64_t bytes = 8 + i % 500;
      Descriptor* d = producer.reserve(bytes);
      if (d == nullptr) {
        std::this_thread::yield();
        continue;
      }
      d->step = i;
      std::memset(producer.payload(*d), static_cast<int>(i & 0xFF), bytes);
      producer.commit(*d);
      ++i;
    }
  });
  LaneConsumer consumer(m.memory);
  for (uint64_t i = 0; i < kRecords;) {
    const Descriptor* d = consumer.peek();
    if (d == nullptr) {
      std::this_thread::yield();
      continue;
    }
    ASSERT_EQ(d->step, i);
    ASSERT_EQ(d->bytes, 8 + i % 500);
    const std::byte* payload = consumer.payload(*d);
    for (uint64_t b = 0; b < d->bytes; ++b) ASSERT_EQ(payload[b], static_cast<std::byte>(i & 0xFF));
    consumer.take();
    if (i % 3 == 0) consumer.release(consumer.position());
    ++i;
  }
  thread.join();
}

}  // namespace
}  // namespace moe_native
