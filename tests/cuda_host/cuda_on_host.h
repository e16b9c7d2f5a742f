// Enough of CUDA to run the kernels of csrc/cuda on the CPU: a block's threads are fibres that take turns at barriers.
//
// What it catches besides wrong numbers: accesses outside the arrays of guarded_allocate (they end at inaccessible
// pages), indices outside static arrays and misaligned accesses (sanitizers, whose handlers are in host_library.h),
// reads of dynamic shared memory nobody wrote (it starts as NaN), barriers that not all threads reach, and, by running
// the threads in either order, most missing barriers. What it cannot show: speed, races inside a warp, and rounding of
// the device's own exp, log and division.

#pragma once

#include <cxxabi.h>
#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cmath>
#include <functional>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
using cudaStream_t = void*;

// ------------------------------------------------------------------------------------------------ elements

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (x != x) return {0x7fff};
  bits += 0x7fff + (bits >> 16 & 1);  // to nearest, ties to even
  return {static_cast<uint16_t>(bits >> 16)};
}

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float value = exponent == 31  ? (fraction ? NAN : INFINITY)
                : exponent == 0 ? std::ldexp(float(fraction), -24)
                                : std::ldexp(float(fraction + 1024), exponent - 25);
  return x.bits >> 15 ? -value : value;
}

inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (x != x) return {0x7fff};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = magnitude == 0 ? -14 : std::ilogb(magnitude);
  if (exponent < -14) exponent = -14;
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));  // ties to even
  return {static_cast<uint16_t>(sign | (units + ((exponent + 14) << 10)))};
}

inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }

inline void sincospi(double x, double* sine, double* cosine) {
  *sine = std::sin(M_PI * x);
  *cosine = std::cos(M_PI * x);
}

inline void sincospif(float x, float* sine, float* cosine) {
  double exact_sine, exact_cosine;
  sincospi(x, &exact_sine, &exact_cosine);
  *sine = static_cast<float>(exact_sine);
  *cosine = static_cast<float>(exact_cosine);
}

// -------------------------------------------------------------------------------------------------- memory

namespace fastdis::host {

constexpr size_t kGuard = 1 << 20;  // inaccessible bytes on either side

// `bytes` bytes of NaN that start `shift` bytes after an inaccessible page or, at_end, stop right before one, aligned
// to `alignment`. free() says whether the bytes around them are still as they were. Sparse ones are zeros instead, and
// take memory only where something was written: they may be larger than the machine's.
struct Guarded {
  unsigned char* map = nullptr;
  size_t inner = 0, offset = 0, bytes = 0;
  unsigned char fill;

  Guarded(size_t bytes, bool at_end, size_t alignment, size_t shift = 0, bool sparse = false)
      : bytes(bytes), fill(sparse ? 0 : 0xff) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    inner = (bytes + shift + page) / page * page;
    map = static_cast<unsigned char*>(
        mmap(nullptr, inner + 2 * kGuard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (map == MAP_FAILED || mprotect(map + kGuard, inner, PROT_READ | PROT_WRITE) != 0) {
      throw std::runtime_error("cannot map guarded memory");
    }
    if (!sparse) memset(map + kGuard, fill, inner);
    offset = at_end ? (inner - bytes) / alignment * alignment : shift;
  }

  unsigned char* data() const { return map + kGuard + offset; }

  bool free() {
    bool clean = true;
    for (size_t i = 0; i < offset; ++i) clean = clean && map[kGuard + i] == fill;
    for (size_t i = offset + bytes; i < inner; ++i) clean = clean && map[kGuard + i] == fill;
    munmap(map, inner + 2 * kGuard);
    return clean;
  }
};

// ------------------------------------------------------------------------------------------------- machine

// Runs one block at a time. Threads run until they reach a barrier or the end; a barrier opens when all have come.
class Machine {
 public:
  bool reversed = false;           // run blocks and threads from the last to the first
  int64_t window = 0;              // unless 0: of each launch run only so many blocks at either end
  std::set<std::string> launched;  // names of the kernels, as namespace::kernel

  void run(const char* name, int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& body) {
    if (threads < 1 || threads > kMaxThreads || threads % kWarp != 0) throw std::runtime_error("bad block size");
    body_ = &body;
    gridDim.x = static_cast<unsigned>(blocks);
    blockDim.x = static_cast<unsigned>(threads);
    if (stacks_.empty()) stacks_.resize(size_t{kMaxThreads} * kStack);
    struct sigaction action = {}, before_segv = {}, before_bus = {};
    action.sa_handler = [](int) { instance().fail("access outside an array"); };
    action.sa_flags = SA_NODEFER;
    sigaction(SIGSEGV, &action, &before_segv);
    sigaction(SIGBUS, &action, &before_bus);
    std::string failure;
    Guarded shared(static_cast<size_t>(shared_bytes), true, 16);
    if (sigsetjmp(escape_, 1) == 0) {
      for (int64_t i = 0; i < blocks; ++i) {
        if (window > 0 && i == window && blocks > 2 * window) i = blocks - window;
        memset(shared.data(), 0xff, static_cast<size_t>(shared_bytes));
        shared_ = shared.data();
        blockIdx.x = static_cast<unsigned>(reversed ? blocks - 1 - i : i);
        run_block(threads);
      }
    } else {
      failure = failure_ + ", block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x);
    }
    sigaction(SIGSEGV, &before_segv, nullptr);
    sigaction(SIGBUS, &before_bus, nullptr);
    if (!shared.free() && failure.empty()) failure = "write outside dynamic shared memory";
    if (!failure.empty()) throw std::runtime_error(std::string(name) + ": " + failure);
  }

  [[noreturn]] void fail(const char* what) {
    failure_ = what;
    siglongjmp(escape_, 1);
  }

  // Remembers a kernel by its name, without its template's arguments and its function's parameters.
  void remember(void* kernel) {
    Dl_info info = {};
    int status = 0;
    if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr) throw std::runtime_error("a kernel without a name");
    char* whole = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
    std::string name = whole != nullptr ? whole : info.dli_sname;
    ::free(whole);
    name = name.substr(0, name.find_first_of("<("));
    launched.insert(name.substr(name.rfind(' ') + 1));
  }

  void block_barrier() { wait(kAtBlock, 0, static_cast<int>(blockDim.x)); }

  // The value that thread `source` of the warp gave to the same call.
  template <typename T>
  T exchange(T value, int source) {
    const int self = current_, warp = self / kWarp * kWarp;
    const int slot = exchanges_[self]++ % 2;  // two, so that nobody overwrites what another has yet to read
    memcpy(slots_[slot][self], &value, sizeof value);
    wait(kAtWarp, warp, warp + kWarp);
    memcpy(&value, slots_[slot][warp + source], sizeof value);
    return value;
  }

  void* shared() const { return shared_; }

  static Machine& instance() {
    static Machine machine;
    return machine;
  }

  static constexpr int kWarp = 32;

 private:
  enum State { kReady, kAtBlock, kAtWarp, kDone };
  static constexpr int kMaxThreads = 1024;
  static constexpr size_t kStack = 64 * 1024;

  void run_block(int threads) {
    for (int t = 0; t < threads; ++t) {
      state_[t] = kReady;
      exchanges_[t] = 0;
      started_[t] = false;
    }
    for (int done = 0; done < threads;) {
      bool progress = false;
      for (int i = 0; i < threads; ++i) {
        current_ = reversed ? threads - 1 - i : i;
        if (state_[current_] != kReady) continue;
        progress = true;
        threadIdx.x = static_cast<unsigned>(current_);
        resume(current_);
        done += state_[current_] == kDone;
      }
      if (!progress) fail("not all threads reach the same barrier");
    }
  }

  // The first switch to a fibre sets up its stack; later ones are plain jumps, which need no system call.
  void resume(int t) {
    if (_setjmp(scheduler_) != 0) return;
    if (started_[t]) _longjmp(fibre_[t], 1);
    started_[t] = true;
    getcontext(&context_);
    context_.uc_stack.ss_sp = stacks_.data() + static_cast<size_t>(t) * kStack;
    context_.uc_stack.ss_size = kStack;
    context_.uc_link = nullptr;
    makecontext(&context_, &Machine::enter, 0);
    setcontext(&context_);
  }

  static void enter() {
    Machine& machine = instance();
    (*machine.body_)();
    machine.state_[machine.current_] = kDone;
    _longjmp(machine.scheduler_, 1);
  }

  void wait(State state, int first, int last) {
    const int self = current_;
    state_[self] = state;
    bool complete = true;
    for (int t = first; t < last; ++t) complete = complete && state_[t] == state;
    if (complete) {
      for (int t = first; t < last; ++t) state_[t] = kReady;
      return;
    }
    if (_setjmp(fibre_[self]) == 0) _longjmp(scheduler_, 1);
  }

  const std::function<void()>* body_ = nullptr;
  std::vector<unsigned char> stacks_;
  ucontext_t context_;
  jmp_buf scheduler_, fibre_[kMaxThreads];
  sigjmp_buf escape_;
  State state_[kMaxThreads];
  bool started_[kMaxThreads];
  unsigned exchanges_[kMaxThreads];
  unsigned char slots_[2][kMaxThreads][8];
  std::string failure_;
  void* shared_ = nullptr;
  int current_ = 0;
};

}  // namespace fastdis::host

inline void __syncthreads() { fastdis::host::Machine::instance().block_barrier(); }

template <typename T>
T __shfl_down_sync(unsigned, T value, int offset) {
  const int lane = static_cast<int>(threadIdx.x) % 32, source = lane + offset;
  return fastdis::host::Machine::instance().exchange(value, source < 32 ? source : lane);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int offset) {
  return fastdis::host::Machine::instance().exchange(value, static_cast<int>(threadIdx.x) % 32 ^ offset);
}

namespace fastdis {

template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(host::Machine::instance().shared());
}

template <typename T>
T* opaque(T* pointer) {
  return pointer;
}

template <typename... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared, cudaStream_t,
            std::type_identity_t<Parameters>... arguments) {
  if (blocks == 0) return;
  host::Machine::instance().remember(reinterpret_cast<void*>(kernel));
  host::Machine::instance().run(name, blocks, threads, shared, [&] { kernel(arguments...); });
}

}  // namespace fastdis
