#include "capture/captures.h"

#include <gtest/gtest.h>

#include <atomic>
#include <deque>
#include <optional>
#include <set>
#include <stdexcept>
#include <thread>

#include "capture/fake_router.h"
#include "support.h"

namespace moe_native {
namespace {

using test::DecodedCapture;
using test::expect_rows;
using test::FakeRouter;
using test::IndexedSpan;
using test::Reader;
using test::run;
using Runs = std::vector<moe_native::Run>;

struct CapturesTest : testing::Test {
  // Rows of layer 0; of ids and hidden states.
  void take(const Runs& runs, uint32_t again = 0) {
    std::string ids, hidden;
    Piece piece;
    for (const auto& r : runs) {
      for (uint32_t p = r.position; p < r.position + r.count; ++p, ++piece.rows) {
        ids += router.row(test::kIds, r.request, p, 0, again);
        hidden += router.row(test::kHidden, r.request, p, 0, again);
      }
    }
    piece.shape.ids_dtype = DType::kU8;
    piece.shape.hidden_dtype = DType::kF16;
    piece.shape.k = router.k;
    piece.shape.hidden_width = router.hidden;
    piece.ids = reinterpret_cast<const std::byte*>(ids.data());
    piece.hidden = reinterpret_cast<const std::byte*>(hidden.data());
    captures.take(runs, {&piece, 1});
  }
  // Which memory a capture got that is open for this moment only.
  ino_t file_of_another() {
    const auto opened = captures.open({kFieldIds, {}});
    const ino_t file = Reader(opened.fd).file();
    captures.close(opened.number);
    return file;
  }
  static DecodedCapture decode(const Reader& reader, const Captures::Closed& closed) {
    return test::decode_capture(reader.bytes(closed.bytes), closed.index);
  }
  static constexpr uint32_t kFields = kFieldIds | kFieldHidden;
  Captures captures;
  FakeRouter router;
};

TEST_F(CapturesTest, EachHasItsNumberUntilItIsClosed) {
  const auto a = captures.open({}), b = captures.open({});
  EXPECT_NE(a.number, b.number);
  EXPECT_NE(a.fd, b.fd);
  EXPECT_EQ(captures.numbers(), (std::vector<uint64_t>{a.number, b.number}));
  captures.close(a.number);
  EXPECT_EQ(captures.numbers(), std::vector<uint64_t>{b.number});
  EXPECT_NE(captures.open({}).number, a.number) << "a number is not given twice";
}

TEST_F(CapturesTest, OneThatIsNotOpenIsAnError) {
  const auto opened = captures.open({});
  EXPECT_THROW(captures.add(opened.number + 1, 0, 0, 0, 1), std::out_of_range);
  EXPECT_THROW(captures.close(opened.number + 1), std::out_of_range);
  captures.close(opened.number);
  EXPECT_THROW(captures.close(opened.number), std::out_of_range);
  EXPECT_THROW(captures.add(opened.number, 0, 0, 0, 1), std::out_of_range);
}

TEST_F(CapturesTest, EachGetsTheRowsThatItWants) {
  const auto ids = captures.open({kFieldIds, {}}), both = captures.open({kFields, {}});
  const auto other_layer = captures.open({kFields, std::vector<uint16_t>{1}});
  const Reader ids_reader(ids.fd), both_reader(both.fd), other_reader(other_layer.fd);
  captures.add(ids.number, 7, 3, 0, 10);
  captures.add(both.number, 7, 0, 0, 20);
  captures.add(both.number, 8, 1, 0, 20);
  captures.add(other_layer.number, 7, 0, 0, 10);
  take({run(7, 0, 4), run(8, 0, 2)});
  const auto a = captures.close(ids.number);
  take({run(8, 2, 1), run(7, 4, 1)});
  const auto b = captures.close(both.number), c = captures.close(other_layer.number);
  expect_rows(decode(ids_reader, a), router, 3, 7, {{0, 4}}, kFieldIds);
  expect_rows(decode(both_reader, b), router, 0, 7, {{0, 5}}, kFields);
  expect_rows(decode(both_reader, b), router, 1, 8, {{0, 3}}, kFields);
  EXPECT_TRUE(decode(other_reader, c).layers.empty());
  for (const auto& closed : {a, b, c}) EXPECT_EQ(closed.problem, "");
}

TEST_F(CapturesTest, MemoryIsNotUsedAgainWhileACallerLooksAtIt) {
  const auto opened = captures.open({kFields, {}});
  std::optional<Reader> reader(opened.fd);
  const ino_t file = reader->file();
  captures.add(opened.number, 7, 0, 0, 10);
  take({run(7, 0, 4)});
  const auto closed = captures.close(opened.number);
  EXPECT_NE(file_of_another(), file);
  const auto next = captures.open({kFields, {}});
  captures.add(next.number, 7, 0, 0, 10);
  take({run(7, 0, 10)}, 1);
  expect_rows(decode(*reader, closed), router, 0, 7, {{0, 4}}, kFields);
  captures.close(next.number);

  reader.reset();
  std::set<ino_t> files;
  for (int i = 0; i < 2; ++i) files.insert(Reader(captures.open({kFields, {}}).fd).file());
  EXPECT_TRUE(files.contains(file)) << "once nobody looks, it is used again";
}

TEST_F(CapturesTest, MemoryThatIsUsedAgainShowsNothingOfBefore) {
  const auto first = captures.open({kFields, {}});
  captures.add(first.number, 7, 0, 0, 1000);
  captures.add(first.number, 8, 1, 0, 1000);
  take({run(7, 0, 1000), run(8, 0, 1000)});
  const ino_t file = Reader(first.fd).file();
  captures.close(first.number);
  const auto second = captures.open({kFields, {}});
  const Reader reader(second.fd);
  ASSERT_EQ(reader.file(), file);
  captures.add(second.number, 8, 0, 0, 10);
  take({run(8, 2, 4)}, 1);
  const auto closed = captures.close(second.number);
  EXPECT_LT(closed.bytes, 2000u);
  expect_rows(decode(reader, closed), router, 0, 8, {{2, 6}}, kFields, 1);
}

TEST_F(CapturesTest, ALittleMemoryIsSparedAndNotMore) {
  std::vector<Captures::Opened> opened;
  std::set<ino_t> files, again;
  for (int i = 0; i < 5; ++i) {
    opened.push_back(captures.open({kFields, {}}));
    files.insert(Reader(opened.back().fd).file());
  }
  EXPECT_EQ(files.size(), 5u);
  for (const auto& each : opened) captures.close(each.number);
  for (int i = 0; i < 5; ++i) {
    const ino_t file = Reader(captures.open({kFields, {}}).fd).file();
    if (files.contains(file)) again.insert(file);
  }
  EXPECT_GE(again.size(), 1u);
  EXPECT_LE(again.size(), 2u);
}

TEST_F(CapturesTest, OneThatIsGivenUpForMemoryIsStillThereForItsReader) {
  std::deque<Reader> readers;
  std::vector<Captures::Closed> closed;
  for (uint32_t i = 0; i < 4; ++i) {
    const auto opened = captures.open({kFields, {}});
    readers.emplace_back(opened.fd);
    captures.add(opened.number, 7, i, 0, 10);
    take({run(7, 0, 4)}, i);
    closed.push_back(captures.close(opened.number));
  }
  for (uint32_t i = 0; i < 4; ++i) {
    expect_rows(decode(readers[i], closed[i]), router, i, 7, {{0, 4}}, kFields, i);
  }
}

TEST_F(CapturesTest, WhereMemoryLacksRowsAreMissingAndItIsSaid) {
  const auto much = captures.open({kFields, {}}), little = captures.open({kFields, {}});
  const Reader much_reader(much.fd), little_reader(little.fd);
  router.hidden = 60'000;
  captures.add(much.number, 7, 0, 0, 0xFFFFFFFF);  // 480 TiB
  captures.add(much.number, 8, 1, 0, 10);
  captures.add(little.number, 7, 0, 0, 10);
  take({run(8, 0, 1), run(7, 0, 2)});
  take({run(8, 1, 1)});
  const auto of_much = captures.close(much.number), of_little = captures.close(little.number);
  EXPECT_NE(of_much.problem, "");
  const DecodedCapture got = decode(much_reader, of_much);
  expect_rows(got, router, 0, 7, {}, kFields);
  expect_rows(got, router, 1, 8, {{0, 1}}, kFields);  // what has failed takes no more
  EXPECT_EQ(of_little.problem, "");
  expect_rows(decode(little_reader, of_little), router, 0, 7, {{0, 2}}, kFields);
}

TEST_F(CapturesTest, SomeMemoryIsLeftToOthers) {
  constexpr uint64_t kMib = 1 << 20;
  uint64_t available = 400 * kMib;
  router.hidden = 1 << 20;  // 2 MiB a row
  int looks = 0;
  CaptureOptions options{kFields, {}};
  options.available = [&] { return ++looks, available; };
  const auto opened = captures.open(options), other = captures.open({kFields, {}});
  const Reader reader(opened.fd), other_reader(other.fd);
  captures.add(opened.number, 7, 0, 0, 1000);
  captures.add(other.number, 7, 0, 0, 1000);
  for (uint32_t p = 0; p < 40; ++p) take({run(7, p, 1)});
  EXPECT_EQ(looks, 1) << "after 64 MiB";
  for (uint32_t p = 0; p < 40; ++p) take({run(7, p, 1)}, 1);
  EXPECT_EQ(looks, 1) << "rows that replace others take no memory";
  available = 300 * kMib;
  for (uint32_t p = 40; p < 80; ++p) take({run(7, p, 1)});
  EXPECT_EQ(looks, 2);
  const auto closed = captures.close(opened.number), whole = captures.close(other.number);
  EXPECT_NE(closed.problem.find("no memory is left"), std::string::npos) << closed.problem;
  const auto rows = decode(reader, closed).requests.at(0);
  EXPECT_EQ(whole.problem, "");
  EXPECT_LT(reader.bytes(closed.bytes).size(), 4096 * kMib);
}

TEST_F(CapturesTest, WhatALargeCaptureHasLeftIsNotKeptForSmallOnes) {
  const auto one = [&](uint32_t rows) {
    const auto opened = captures.open({kFields, {}});
    captures.add(opened.number, 7, 0, 0, rows);
    for (uint32_t p = 0; p < rows; ++p) take({run(7, p, 1)});
    const Reader reader(opened.fd);
    struct stat status;
    EXPECT_EQ(::fstat(opened.fd, &status), 0);
    captures.close(opened.number);
    return std::pair(status.st_ino, static_cast<uint64_t>(status.st_blocks) * 512);
  };
  router.hidden = 1 << 20;  // 2 MiB a row
  const auto [file, large] = one(60);
  EXPECT_GT(large, uint64_t{110} << 20);
  EXPECT_EQ(one(1), std::pair(file, large)) << "it may be as large again";
  EXPECT_EQ(one(1).first, file);
  EXPECT_LT(one(1).second, uint64_t{20} << 20);
}

TEST_F(CapturesTest, FreeingWhatIsUnusedLeavesWhatIsOpen) {
  const auto opened = captures.open({kFields, {}});
  const Reader reader(opened.fd);
  captures.add(opened.number, 7, 0, 0, 10);
  take({run(7, 0, 2)});
  captures.free_unused();
  take({run(7, 2, 2)});
  expect_rows(decode(reader, captures.close(opened.number)), router, 0, 7, {{0, 4}}, kFields);
}

TEST_F(CapturesTest, CallersAndTheDrainThreadDoNotMind) {
  std::atomic<bool> done{false};
  std::thread drain([&] {
    for (uint32_t p = 0; !done; p = (p + 1) % 100) {
      take({run(7, p, 1), run(8, p, 1)});
      captures.free_unused();
    }
  });
  std::vector<std::thread> callers;
  for (uint32_t request : {7u, 8u}) {
    callers.emplace_back([&, request] {
      for (int i = 0; i < 50; ++i) {
        const auto opened = captures.open({kFields, {}});
        const Reader reader(opened.fd);
        captures.add(opened.number, request, 0, 0, 100);
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        captures.numbers();
        const DecodedCapture got = decode(reader, captures.close(opened.number));
        expect_rows(got, router, 0, request, got.spans(0), kFields);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  done = true;
  drain.join();
  EXPECT_TRUE(captures.numbers().empty());
}

}  // namespace
}  // namespace moe_native
