// Threads for the NumPy-facing host numerics, which know nothing of torch and so cannot use its pool.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace fastdis {

// Calls body(begin, end) until [0, n) is covered, in pieces of `grain`, on at most `threads` threads; pieces go to
// whoever is free, so a result must not depend on which thread computed it. The first exception is thrown again here.
template <class Body>
void parallel_ranges(int64_t n, int64_t grain, int threads, const Body& body) {
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t pieces = (n + grain - 1) / grain;
  const int64_t workers = std::min<int64_t>(std::max(threads, 1), pieces);
  if (workers == 1) {
    body(int64_t{0}, n);
    return;
  }
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex guard;
  const auto work = [&] {
    try {
      for (int64_t piece = next++; piece < pieces; piece = next++)
        body(piece * grain, std::min(n, (piece + 1) * grain));
    } catch (...) {
      next = pieces;
      const std::lock_guard<std::mutex> lock(guard);
      if (!failure) failure = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < workers; ++i) others.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads are to be had; those that started, and this one, do it all.
  }
  work();
  for (auto& thread : others) thread.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace fastdis
