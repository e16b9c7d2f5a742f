#include "host_library.h"
//
#include "total_correlation.cu"

extern "C" {

const char* total_correlation(int backward, int dtype, const void* z, const void* mean, const void* logvar,
                              const void* grad, void* information, void* correlation, void* divergence, void* log_joint,
                              void* log_marginals, void* dz, void* dmean, void* dlogvar, int64_t episodes,
                              int64_t batch, int64_t latents, int64_t dataset_size, int estimator,
                              int multiprocessors) {
  return guarded_call([&] {
    dispatch(dtype, [&](auto tag) {
      using namespace fastdis::total_correlation;
      using T = decltype(tag);
      using A = Accumulate<T>;
      const auto to = [](void* pointer) { return static_cast<A*>(pointer); };
      const Device device{multiprocessors, 0};
      const Inputs<T> in{static_cast<const T*>(z),
                         static_cast<const T*>(mean),
                         static_cast<const T*>(logvar),
                         episodes,
                         batch,
                         latents};
      const int64_t size = backward ? backward_scratch<A>(episodes, batch, latents, device)
                                    : forward_scratch<A>(episodes, batch, latents);
      with_scratch<A>(size, [&](A* scratch) {
        if (backward) {
          fastdis::total_correlation::backward<T>(in, static_cast<const A*>(grad), to(log_joint), to(log_marginals),
                                                  dataset_size, estimator, static_cast<T*>(dz), static_cast<T*>(dmean),
                                                  static_cast<T*>(dlogvar), scratch, device, nullptr);
        } else {
          const Outputs<T> out{{to(information), to(correlation), to(divergence)}, to(log_joint), to(log_marginals)};
          forward<T>(in, out, dataset_size, estimator, scratch, nullptr);
        }
      });
    });
  });
}

}  // extern "C"
