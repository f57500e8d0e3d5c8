// Builds a table as FORMAT.md section 5 stores it: column by column, each column as byte planes.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace moe_native {

class Table {
 public:
  explicit Table(size_t items) : items_(items) {}

  // `value(i)` is the column's value of item i, an integer or a double.
  template <typename Value>
  Table& column(Value&& value) {
    using T = std::decay_t<decltype(value(size_t{0}))>;
    const size_t at = bytes_.size();
    bytes_.resize(at + items_ * sizeof(T));
    for (size_t i = 0; i < items_; ++i) {
      const uint64_t bits = to_bits(value(i));
      for (size_t b = 0; b < sizeof(T); ++b)
        bytes_[at + b * items_ + i] = static_cast<std::byte>(bits >> (8 * b) & 0xFF);
    }
    return *this;
  }

  size_t items() const { return items_; }
  const std::vector<std::byte>& bytes() const { return bytes_; }

 private:
  static uint64_t to_bits(double value) { return std::bit_cast<uint64_t>(value); }
  template <typename Integer>
  static uint64_t to_bits(Integer value) {
    return static_cast<uint64_t>(static_cast<std::make_unsigned_t<Integer>>(value));
  }

  size_t items_;
  std::vector<std::byte> bytes_;
};

}  // namespace moe_native
