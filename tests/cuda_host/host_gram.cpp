#include "host_library.h"

#include "isometry_penalty.cu"
#include "jacobian_gram.cu"

namespace {

using fastdis::gram::Layout;

// [batch, rows, depth], contiguous or the transpose of a contiguous [rows, batch, depth].
Layout layout_of(int64_t batch, int64_t rows, int64_t depth, int transposed) {
  if (transposed) return {batch, rows, depth, depth, batch * depth};
  return {batch, rows, depth, rows * depth, depth};
}

}  // namespace

extern "C" {

// Also tells how many pieces the depth was cut into.
const char* jacobian_gram_forward(int dtype, const void* jacobian, void* gram, int64_t batch, int64_t rows,
                                  int64_t depth, int transposed, int multiprocessors, int64_t* splits) {
  return guarded_call([&] {
    dispatch(dtype, [&](auto tag) {
      using namespace fastdis::gram;
      using T = decltype(tag);
      using A = Accumulate<T>;
      const Layout layout = layout_of(batch, rows, depth, transposed);
      const T* data = static_cast<const T*>(jacobian);
      const Plan plan = plan_gram(data, layout, Device{multiprocessors, 0});
      *splits = plan.splits;
      with_scratch<A>(plan.scratch,
                      [&](A* scratch) { launch_gram(data, layout, plan, static_cast<A*>(gram), scratch, nullptr); });
    });
  });
}

const char* jacobian_gram_backward(int dtype, const void* grad, const void* jacobian, void* out, int64_t batch,
                                   int64_t rows, int64_t depth, int transposed) {
  return guarded_call([&] {
    dispatch(dtype, [&](auto tag) {
      using namespace fastdis::jacobian_gram;
      using T = decltype(tag);
      using A = Accumulate<T>;
      launch_pull_back(static_cast<const T*>(jacobian), layout_of(batch, rows, depth, transposed),
                       GradientMatrix<A>{static_cast<const A*>(grad), rows}, static_cast<T*>(out), nullptr);
    });
  });
}

const char* isometry_penalty(int dtype, int kind, const void* grad, const void* jacobian, void* loss, void* gram,
                             void* out, int64_t batch, int64_t rows, int64_t depth, int transposed,
                             int multiprocessors) {
  return guarded_call([&] {
    dispatch(dtype, [&](auto tag) {
      using namespace fastdis::isometry_penalty;
      using T = decltype(tag);
      using A = Accumulate<T>;
      const Layout layout = layout_of(batch, rows, depth, transposed);
      const T* data = static_cast<const T*>(jacobian);
      const Plan plan = plan_gram(data, layout, Device{multiprocessors, 0});
      with_scratch<A>(forward_scratch(layout, plan), [&](A* scratch) {
        forward(data, layout, plan, kind, static_cast<A*>(loss), static_cast<A*>(gram), scratch, nullptr);
      });
      with_scratch<A>(backward_scratch(layout), [&](A* scratch) {
        fastdis::isometry_penalty::backward(static_cast<const A*>(grad), data, layout, static_cast<const A*>(gram),
                                            kind, static_cast<T*>(out), scratch, nullptr);
      });
    });
  });
}

}  // extern "C"
