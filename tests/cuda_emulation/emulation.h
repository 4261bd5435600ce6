// Runs a .cu file as host C++: every thread of a block is a fiber; barriers and warp collectives switch between them.
//
// Blocks run one after another, threads in rising or falling order between barriers: a barrier that is missing shows as
// two orders that disagree, one that not all threads reach as an error. Enough of CUDA for this repository's sources.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

using std::max;
using std::min;

namespace emulation {

struct Index3 { unsigned x = 0, y = 0, z = 0; };

enum class State { running, at_barrier, in_warp, done };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(128 << 10);
  State state = State::running;
  int operation = 0;
  unsigned collectives = 0;
  Index3 index;
};

struct Warp { uint64_t slots[2][32] = {}; };

inline Index3 grid, block, block_index;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Fiber* current;
inline ucontext_t scheduler;
inline void (*body)(const uint64_t*);
inline const uint64_t* arguments;

inline void wait(State state, int operation) {
  current->state = state;
  current->operation = operation;
  swapcontext(&current->context, &scheduler);
}

// Every lane's value of one collective. Two sets of slots: a lane can run ahead by one collective, never by two.
inline const uint64_t* exchange(unsigned mask, uint64_t value, int operation) {
  unsigned set = current->collectives++ % 2, lane = current->index.x % 32;
  if (mask != 0xffffffffu) wait(State::in_warp, -1 - static_cast<int>(lane));  // part of a warp: never released
  Warp& warp = warps[current->index.x / 32];
  warp.slots[set][lane] = value;
  wait(State::in_warp, operation);
  return warp.slots[set];
}

inline void enter() {
  body(arguments);
  current->state = State::done;
  swapcontext(&current->context, &scheduler);
}

// Lets fibers [first, last) go on if all of them wait at the same place.
inline bool release(size_t first, size_t last, State state, bool exits_allowed) {
  int waiting = 0, done = 0, operation = 0;
  for (size_t i = first; i < last; ++i) {
    if (fibers[i].state == State::done) {
      ++done;
    } else if (fibers[i].state == state && (!operation || operation == fibers[i].operation)) {
      ++waiting;
      operation = fibers[i].operation;
    } else {
      return false;
    }
  }
  if (!waiting || (done && !exits_allowed)) return false;
  for (size_t i = first; i < last; ++i)
    if (fibers[i].state == state) fibers[i].state = State::running;
  return true;
}

inline bool run_block(bool falling) {
  size_t count = fibers.size();
  for (size_t i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    fiber.state = State::running;
    fiber.collectives = 0;
    fiber.index.x = static_cast<unsigned>(i);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  while (true) {
    for (size_t i = 0; i < count; ++i) {
      current = &fibers[falling ? count - 1 - i : i];
      if (current->state == State::running) swapcontext(&scheduler, &current->context);
    }
    if (std::all_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.state == State::done; })) return true;
    bool moved = release(0, count, State::at_barrier, true);
    for (size_t i = 0; i < count; i += 32) moved |= release(i, std::min(i + 32, count), State::in_warp, false);
    if (!moved) return false;
  }
}

// 0, or 1 where threads wait for each other at different places.
inline int run(void (*kernel)(const uint64_t*), const uint64_t* values, const unsigned* grid_of, unsigned threads,
               bool falling) {
  body = kernel;
  arguments = values;
  grid = {grid_of[0], grid_of[1], grid_of[2]};
  block = {threads, 1, 1};
  fibers = std::vector<Fiber>(threads);
  warps.assign((threads + 31) / 32, {});
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = {x, y, z};
        if (!run_block(falling)) return 1;
      }
  return 0;
}

template <typename T> T argument(uint64_t value) {
  static_assert(sizeof(T) == 8, "kernels take pointers and long long");
  T x;
  std::memcpy(&x, &value, 8);
  return x;
}

template <typename... T, size_t... i>
void call(void (*kernel)(T...), const uint64_t* values, std::index_sequence<i...>) {
  kernel(argument<T>(values[i])...);
}

template <typename... T> void call(void (*kernel)(T...), const uint64_t* values) {
  call(kernel, values, std::index_sequence_for<T...>{});
}

template <typename T> uint64_t bits(T value) {
  uint64_t x = 0;
  std::memcpy(&x, &value, sizeof value);
  return x;
}

template <typename T> T unbits(uint64_t value) {
  T x;
  std::memcpy(&x, &value, sizeof x);
  return x;
}

}  // namespace emulation

#define threadIdx (emulation::current->index)
#define blockIdx emulation::block_index
#define blockDim emulation::block
#define gridDim emulation::grid

inline int __float_as_int(float x) { return emulation::unbits<int>(emulation::bits(x)); }
inline float __int_as_float(int x) { return emulation::unbits<float>(emulation::bits(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

inline float half_bits_to_float(unsigned short bits) {
  int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float x = exponent == 31  ? (fraction ? NAN : INFINITY)
            : exponent == 0 ? std::ldexp(fraction, -24)
                            : std::ldexp(fraction + 1024, exponent - 25);
  return bits >> 15 ? -x : x;
}

// Nearest and even among the numbers whose last bit is worth `unit`.
inline double round_to(double x, double unit) { return std::nearbyint(x / unit) * unit; }

// x as a float of `fraction` bits behind the exponent, from 2^`least` on and, below, as far apart as there.
inline unsigned narrow_bits(float x, int fraction, int least, unsigned sign, unsigned largest, bool saturates) {
  unsigned top = std::signbit(x) ? sign : 0;
  if (std::isnan(x)) return sign - 1;
  int exponent = std::isinf(x) ? 128 : x == 0.0f ? least : std::max(std::ilogb(x), least);
  double y = std::isinf(x) ? INFINITY : round_to(std::fabs(x), std::ldexp(1.0, exponent - fraction));
  exponent = std::isinf(y) ? 128 : y == 0.0 ? least : std::max(std::ilogb(y), least);
  double steps = y / std::ldexp(1.0, exponent - fraction);  // 2^fraction and more from 2^least on
  double code = std::isinf(y) ? INFINITY : std::ldexp(exponent - least, fraction) + steps;
  if (code > largest) code = saturates ? largest : largest + 1;
  return top | static_cast<unsigned>(code);
}
inline unsigned short float_to_half_bits(float x) { return narrow_bits(x, 10, -14, 0x8000, 0x7bff, false); }
inline unsigned short float_to_brain_bits(float x) { return narrow_bits(x, 7, -126, 0x8000, 0x7f7f, false); }
inline unsigned char float_to_e4m3_bits(float x) { return narrow_bits(x, 3, -6, 0x80, 0x7e, true); }

// Each use is its own barrier, as on the GPU: threads that meet at different ones are an error.
#define __syncthreads() emulation::wait(emulation::State::at_barrier, __LINE__)
#define __syncwarp() emulation::wait(emulation::State::in_warp, __LINE__)

template <typename T> T shuffle(unsigned mask, T value, int lane, int line) {
  return emulation::unbits<T>(emulation::exchange(mask, emulation::bits(value), line)[lane & 31]);
}
template <typename T> T shuffle_up(unsigned mask, T value, unsigned delta, int line) {
  unsigned lane = threadIdx.x % 32, source = lane < delta ? lane : lane - delta;
  return emulation::unbits<T>(emulation::exchange(mask, emulation::bits(value), line)[source]);
}
template <typename T> T shuffle_xor(unsigned mask, T value, int bits, int line) {
  return emulation::unbits<T>(emulation::exchange(mask, emulation::bits(value), line)[threadIdx.x % 32 ^ bits]);
}
inline unsigned ballot(unsigned mask, bool vote, int line) {
  const uint64_t* votes = emulation::exchange(mask, vote, line);
  unsigned x = 0;
  for (int i = 0; i < 32; ++i) x |= static_cast<unsigned>(votes[i]) << i;
  return x;
}
template <typename T> unsigned match_any(unsigned mask, T value, int line) {
  const uint64_t* values = emulation::exchange(mask, emulation::bits(value), line);
  unsigned x = 0;
  for (int i = 0; i < 32; ++i) x |= static_cast<unsigned>(values[i] == emulation::bits(value)) << i;
  return x;
}

#define __shfl_sync(mask, value, lane) shuffle(mask, value, lane, __LINE__)
#define __shfl_up_sync(mask, value, delta) shuffle_up(mask, value, delta, __LINE__)
#define __shfl_xor_sync(mask, value, bits) shuffle_xor(mask, value, bits, __LINE__)
#define __ballot_sync(mask, vote) ballot(mask, vote, __LINE__)
#define __match_any_sync(mask, value) match_any(mask, value, __LINE__)

template <typename F> int update(int* p, F f) {
  int old = *p;
  *p = f(old);
  return old;
}
inline int atomicAdd(int* p, int x) { return update(p, [=](int old) { return old + x; }); }
inline int atomicMin(int* p, int x) { return update(p, [=](int old) { return std::min(old, x); }); }
inline int atomicMax(int* p, int x) { return update(p, [=](int old) { return std::max(old, x); }); }

// int run_NAME(values, grid, threads, falling)
#define EMULATE(NAME)                                                                                       \
  extern "C" int run_##NAME(const uint64_t* values, const unsigned* grid, unsigned threads, bool falling) { \
    return emulation::run([](const uint64_t* v) { emulation::call(NAME, v); }, values, grid, threads, falling); \
  }
