#include "host_library.h"
//
#include "gaussian_kl.cu"
#include "reparameterize.cu"

extern "C" {

const char* reparameterize(int backward, int dtype, const void* operand, const void* logvar, const int64_t* seed,
                           void* out, int64_t size, int64_t seeds) {
  return guarded_call([&] {
    dispatch(dtype, [&](auto tag) {
      using namespace fastdis::reparameterize;
      using T = decltype(tag);
      const T *operand_data = static_cast<const T*>(operand), *logvar_data = static_cast<const T*>(logvar);
      if (backward) {
        run<T, true>(operand_data, logvar_data, seed, static_cast<T*>(out), size, seeds, nullptr);
      } else {
        run<T, false>(operand_data, logvar_data, seed, static_cast<T*>(out), size, seeds, nullptr);
      }
    });
  });
}

// log((word + 1/2) / 2^32) in float32, as the kernels compute it.
float log_uniform(uint32_t word) { return fastdis::reparameterize::log_uniform(word, float{}); }

const char* gaussian_kl(int backward, int dtype, const void* grad, const void* mean, const void* logvar,
                        const void* weights, void* out, void* dmean, void* dlogvar, void* dweights, int reduction,
                        int64_t batch, int64_t latents, int multiprocessors) {
  return guarded_call([&] {
    dispatch(dtype, [&](auto tag) {
      using namespace fastdis::gaussian_kl;
      using T = decltype(tag);
      using A = Accumulate<T>;
      const Device device{multiprocessors, 0};
      const Posterior<T> p{static_cast<const T*>(mean), static_cast<const T*>(logvar), static_cast<const A*>(weights),
                           batch, latents};
      const int64_t size =
          backward ? backward_scratch(batch, latents, weights != nullptr) : forward_scratch(latents, reduction, device);
      with_scratch<A>(size, [&](A* scratch) {
        if (backward) {
          const Gradients<T> g{static_cast<T*>(dmean), static_cast<T*>(dlogvar), static_cast<A*>(dweights)};
          fastdis::gaussian_kl::backward<T>(p, static_cast<const T*>(grad), reduction, g, scratch, device, nullptr);
        } else {
          forward<T>(p, static_cast<T*>(out), reduction, scratch, device, nullptr);
        }
      });
    });
  });
}

}  // extern "C"
