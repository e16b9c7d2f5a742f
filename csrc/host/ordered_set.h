// A set of whole numbers from 0 that is read in rising order and used again.

#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

namespace fastdis::host {

// One bit for each number. What adding and reading cost goes with what is in the set, not with its range.
class OrderedSet {
 public:
  explicit OrderedSet(int64_t range) : words_(range / 64 + 1) {}

  void add(int64_t number) {
    uint64_t& word = words_[number / 64];
    if (word == 0) touched_.push_back(number / 64);
    word |= uint64_t{1} << (number % 64);
  }

  // Calls body(number) for each, in rising order, and leaves the set empty.
  template <class Body>
  void drain(const Body& body) {
    std::sort(touched_.begin(), touched_.end());
    for (const int64_t place : touched_) {
      for (uint64_t left = words_[place]; left != 0; left &= left - 1) body(place * 64 + std::countr_zero(left));
      words_[place] = 0;
    }
    touched_.clear();
  }

 private:
  std::vector<uint64_t> words_;
  std::vector<int64_t> touched_;
};

}  // namespace fastdis::host
