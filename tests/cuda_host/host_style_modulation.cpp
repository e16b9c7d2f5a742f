#include "host_library.h"

#include "style_modulation.cu"

extern "C" {

const char* style_modulation(int backward, int dtype, const void* dy, const void* x, void* out, void* mean, void* rstd,
                             const void* scale, const void* shift, const void* weight, const void* bias, void* dscale,
                             void* dshift, void* dweight, void* dbias, int64_t batch, int64_t channels, int64_t spatial,
                             int64_t groups, int channels_last, double eps, int activation, double negative_slope,
                             int multiprocessors, int64_t shared, int* resident) {
  return guarded_call([&] {
    dispatch(dtype, [&](auto tag) {
      using namespace fastdis::style_modulation;
      using T = decltype(tag);
      using A = Accumulate<T>;
      const auto in = [](const void* pointer) { return static_cast<const A*>(pointer); };
      const auto to = [](void* pointer) { return static_cast<A*>(pointer); };
      const Shape shape{batch, channels, spatial, groups, channels_last != 0};
      const Modulation<A> modulation{in(scale), in(shift), in(weight), in(bias),   in(mean),
                                     in(rstd),  channels,  groups,     activation, A(negative_slope)};
      const T *dy_data = static_cast<const T*>(dy), *x_data = static_cast<const T*>(x);
      T* out_data = static_cast<T*>(out);
      const bool aligned =
          backward ? fastdis::aligned_to_packs(x_data, dy_data, out_data) : fastdis::aligned_to_packs(x_data, out_data);
      const Plan plan = make_plan<T>(shape, backward != 0, aligned, Device{multiprocessors, shared});
      *resident = plan.resident;
      with_scratch<A>(plan.scratch, [&](A* scratch) {
        if (backward) {
          fastdis::style_modulation::backward<T>(
              {dy_data, x_data, out_data, to(dscale), to(dshift), to(dweight), to(dbias), modulation}, shape, plan,
              scratch, nullptr);
        } else {
          forward<T>({x_data, out_data, to(mean), to(rstd), modulation, A(eps)}, shape, plan, scratch, nullptr);
        }
      });
    });
  });
}

}  // extern "C"
