// Between torch's tensors and raw pointers: dtype dispatch, checks, allocation, threads.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <vector>

#include "scalar.h"

namespace fastdis {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Below this many elements a kernel stays on the calling thread: waking another costs more than it brings.
constexpr int64_t serial_elements = 32768;

template <class T>
constexpr ScalarType scalar_type_of() {
  if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<T, float16>) return ScalarType::Half;
  if constexpr (std::is_same_v<T, bfloat16>) return ScalarType::BFloat16;
  return ScalarType::Long;
}

inline size_t element_size(ScalarType dtype) {
  if (dtype == ScalarType::Double || dtype == ScalarType::Long) return 8;
  return dtype == ScalarType::Float ? 4 : 2;
}

// Calls body.template operator()<T>() with the storage type of `tensor`.
template <class Body>
auto dispatch_floating(const Tensor& tensor, const char* name, const Body& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return body.template operator()<float>();
    case ScalarType::Double:
      return body.template operator()<double>();
    case ScalarType::Half:
      return body.template operator()<float16>();
    case ScalarType::BFloat16:
      return body.template operator()<bfloat16>();
    default:
      STD_TORCH_CHECK(false, name, " has dtype ", torch::headeronly::toString(tensor.scalar_type()),
                      "; allowed are float32, float64, float16 and bfloat16");
  }
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Under FASTDIS_POISON=1, which the tests set, fresh CPU memory is filled with bytes that are NaN in every floating
// dtype, so that an element that no kernel writes shows.
inline bool poison() {
  static const char* wanted = std::getenv("FASTDIS_POISON");
  return wanted != nullptr && *wanted == '1';
}

// The first write to fresh memory costs a page fault a page, which for a large output takes longer than the kernel's
// own work: with huge pages there are 512 times fewer. Where the system offers none, nothing changes.
inline void ask_for_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t huge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + huge - 1) / huge * huge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / huge * huge;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// An uninitialised tensor of these sizes and strides on the device of `like`.
inline Tensor empty_strided(const Tensor& like, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                            ScalarType dtype) {
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  static_cast<int32_t>(dtype), device_type, device_index, &handle));
  Tensor tensor(handle);
  if (tensor.is_cpu()) ask_for_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * element_size(dtype));
  if (poison() && tensor.is_cpu() && tensor.numel() > 0) {
    std::memset(tensor.mutable_data_ptr(), 0xff, tensor.numel() * element_size(dtype));
  }
  return tensor;
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * (sizes[i] > 0 ? sizes[i] : 1);
  return empty_strided(like, sizes, strides, dtype);
}

inline Tensor make_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline void check_same_dtype(const Tensor& tensor, const char* name, ScalarType wanted) {
  STD_TORCH_CHECK(tensor.scalar_type() == wanted, name, " has dtype ",
                  torch::headeronly::toString(tensor.scalar_type()), "; ", torch::headeronly::toString(wanted),
                  " is needed here");
}

}  // namespace fastdis
