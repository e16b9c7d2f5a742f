// The CUDA kernels as a shared library of C functions on host memory. Each returns null, or what went wrong.

#define FASTDIS_HOST_EMULATION
#include "prototype_distances.cu"
#include "prototypical_loss.cu"
#include "style_modulation.cu"

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

// Runs function(scratch) on guarded scratch memory of `elements` elements.
template <typename A, typename Function>
void with_scratch(int64_t elements, Function function) {
  Guarded memory(static_cast<size_t>(elements) * sizeof(A), true, 16);
  try {
    function(reinterpret_cast<A*>(memory.data()));
  } catch (...) {
    memory.free();
    throw;
  }
  if (!memory.free()) throw std::runtime_error("write outside the scratch memory");
}

}  // namespace

// What -fsanitize=bounds calls: an index outside a static array.
extern "C" [[noreturn]] void __ubsan_handle_out_of_bounds(void*, void*) {
  Machine::instance().fail("index outside a static array");
}

extern "C" {

void* guarded_allocate(size_t bytes, int at_end) { return new Guarded(bytes, at_end != 0, 1); }
void* guarded_data(void* memory) { return static_cast<Guarded*>(memory)->data(); }
int guarded_free(void* memory) {
  Guarded* guarded = static_cast<Guarded*>(memory);
  const bool clean = guarded->free();
  delete guarded;
  return clean;
}

void set_reversed(int reversed) { Machine::instance().reversed = reversed != 0; }

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

const char* prototype_distances(int backward, int dtype, const void* queries, const void* prototypes, const void* grad,
                                void* distances, void* dqueries, void* dprototypes, int64_t episodes,
                                int64_t num_queries, int64_t num_prototypes, int64_t depth, int multiprocessors) {
  return guarded_call([&] {
    dispatch(dtype, [&](auto tag) {
      using namespace fastdis::prototype_distances;
      using T = decltype(tag);
      using A = Accumulate<T>;
      const Device device{multiprocessors, 0};
      const Episodes<T> e{static_cast<const T*>(queries),
                          static_cast<const T*>(prototypes),
                          nullptr,
                          episodes,
                          num_queries,
                          num_prototypes,
                          depth,
                          false};
      with_scratch<A>(backward ? backward_scratch(e, false, device) : centre_size(e), [&](A* scratch) {
        if (backward) {
          launch_gradients<T>(e, GradientWeights<T>{static_cast<const T*>(grad), num_prototypes},
                              static_cast<T*>(dqueries), static_cast<T*>(dprototypes), scratch, device, nullptr);
        } else {
          forward<T>(e, static_cast<T*>(distances), scratch, device, nullptr);
        }
      });
    });
  });
}

const char* prototypical_loss(int backward, int dtype, const void* queries, const void* prototypes,
                              const int64_t* labels, const void* grad, void* loss, void* logsumexp, void* dqueries,
                              void* dprototypes, int reduction, int64_t episodes, int64_t num_queries,
                              int64_t num_prototypes, int64_t depth, int multiprocessors) {
  return guarded_call([&] {
    dispatch(dtype, [&](auto tag) {
      using namespace fastdis::prototypical_loss;
      using T = decltype(tag);
      using A = Accumulate<T>;
      const Device device{multiprocessors, 0};
      const Episodes<T> e{static_cast<const T*>(queries),
                          static_cast<const T*>(prototypes),
                          nullptr,
                          episodes,
                          num_queries,
                          num_prototypes,
                          depth,
                          false};
      with_scratch<A>(backward ? backward_scratch(e, true, device) : forward_scratch(e), [&](A* scratch) {
        if (backward) {
          fastdis::prototypical_loss::backward<T>(
              e, static_cast<const T*>(grad), labels, static_cast<const A*>(logsumexp), reduction,
              static_cast<T*>(dqueries), static_cast<T*>(dprototypes), scratch, device, nullptr);
        } else {
          forward<T>(e, {labels, static_cast<T*>(loss), static_cast<A*>(logsumexp), reduction}, scratch, nullptr);
        }
      });
    });
  });
}

}  // extern "C"
