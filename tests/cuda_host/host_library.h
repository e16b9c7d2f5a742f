// What every host_<family>.cpp starts with: kernels as a shared library of C functions on host memory. Each returns
// null, or what went wrong.

#pragma once

#define FASTDIS_HOST_EMULATION
#include "common.cuh"

using fastdis::Accumulate;
using fastdis::Device;
using fastdis::host::Guarded;
using fastdis::host::Machine;

namespace {

thread_local std::string failure;

template <typename Function>
const char* guarded_call(Function function) {
  try {
    function();
    return nullptr;
  } catch (const std::exception& error) {
    failure = error.what();
    return failure.c_str();
  }
}

template <typename Function>
void dispatch(int dtype, Function function) {
  switch (dtype) {
    case 0:
      return function(float{});
    case 1:
      return function(double{});
    case 2:
      return function(__half{});
    default:
      return function(__nv_bfloat16{});
  }
}

bool sparse() { return Machine::instance().window > 0; }

// Runs function(scratch) on guarded scratch memory of `elements` elements.
template <typename A, typename Function>
void with_scratch(int64_t elements, Function function) {
  Guarded memory(static_cast<size_t>(elements) * sizeof(A), true, 16, 0, sparse());
  try {
    function(reinterpret_cast<A*>(memory.data()));
  } catch (...) {
    memory.free();
    throw;
  }
  if (!memory.free()) throw std::runtime_error("write outside the scratch memory");
}

}  // namespace

extern "C" {

// What -fsanitize=bounds,alignment calls.
[[noreturn]] void __ubsan_handle_out_of_bounds(void*, void*) {
  Machine::instance().fail("index outside a static array");
}
[[noreturn]] void __ubsan_handle_type_mismatch_v1(void*, void*) { Machine::instance().fail("misaligned access"); }

void* guarded_allocate(size_t bytes, int at_end, int shift) {
  return new Guarded(bytes, at_end != 0, 1, static_cast<size_t>(shift), sparse());
}
void* guarded_data(void* memory) { return static_cast<Guarded*>(memory)->data(); }
int guarded_free(void* memory) {
  Guarded* guarded = static_cast<Guarded*>(memory);
  const bool clean = guarded->free();
  delete guarded;
  return clean;
}

void set_reversed(int reversed) { Machine::instance().reversed = reversed != 0; }
void set_window(int64_t window) { Machine::instance().window = window; }

// The kernels launched since the last call, one a line.
const char* launched_kernels() {
  static std::string names;
  names.clear();
  for (const std::string& name : Machine::instance().launched) names += name + '\n';
  Machine::instance().launched.clear();
  return names.c_str();
}

}  // extern "C"
