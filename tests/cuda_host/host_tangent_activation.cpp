#include "host_library.h"
//
#include "tangent_activation.cu"

extern "C" {

const char* tangent_activation(int backward, int dtype, const void* grad_primal, const void* grad_tangents,
                               const void* primal, const void* tangents, const void* bias, void* out, void* dprimal,
                               void* dtangents, void* ddirections, void* dbias, int64_t batch, int64_t channels,
                               int64_t spatial, int64_t count, int shared, int activation, double parameter,
                               int multiprocessors) {
  return guarded_call([&] {
    dispatch(dtype, [&](auto tag) {
      using namespace fastdis::tangent_activation;
      using T = decltype(tag);
      using A = Accumulate<T>;
      const auto in = [](const void* pointer) { return static_cast<const T*>(pointer); };
      const auto to = [](void* pointer) { return static_cast<T*>(pointer); };
      const Device device{multiprocessors, 0};
      const Shape shape{batch, channels, spatial, count, shared != 0};
      if (backward) {
        const Backward<T> f{in(grad_primal), in(grad_tangents), in(primal), in(tangents), in(bias),    to(dprimal),
                            to(dtangents),   to(ddirections),   to(dbias),  activation,   A(parameter)};
        const BackwardPlan<T> plan(shape, dbias != nullptr, grad_tangents != nullptr, device);
        with_scratch<A>(plan.scratch(), [&](A* scratch) {
          fastdis::tangent_activation::backward<T>(f, shape, plan, scratch, nullptr);
        });
      } else {
        forward<T>({in(primal), in(tangents), in(bias), to(out), activation, A(parameter)}, shape, device, nullptr);
      }
    });
  });
}

}  // extern "C"
