// SPDX-License-Identifier: MIT
// What the machine can do at most: arithmetic on registers, nothing else, on the threads that the kernels get. Compiled for
// this very machine by bench/peak.py.
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <numeric>
#include <thread>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
using Vector __attribute__((vector_size(kVectorBytes))) = float;
constexpr int kLanes = kVectorBytes / sizeof(float);

// Two units with a latency of four cycles need 8 independent chains; 12 leave some slack and fit the 16 registers of AVX2.
constexpr int kChains = 12;
constexpr int kSteps = 4096;

struct Fp32 {
  static constexpr double kFlops = 2.0 * kLanes;
  Vector factor, term;
  explicit Fp32(float seed) : factor(Vector{} + seed), term(Vector{} + seed) {}
  Vector step(Vector x) const { return x * factor + term; }  // contracted to one instruction
};

#if defined(__AVX512BF16__)
struct Bf16 {
  static constexpr double kFlops = 4.0 * kLanes;  // two products a lane
  __m512bh factor;
  explicit Bf16(float seed) : factor(_mm512_cvtne2ps_pbh(_mm512_set1_ps(seed), _mm512_set1_ps(seed))) {}
  Vector step(Vector x) const { return (Vector)_mm512_dpbf16_ps((__m512)x, factor, factor); }
};
#else
using Bf16 = Fp32;  // no dot product of bf16: its numbers are converted and multiplied as fp32
#endif

template <class Unit>
__attribute__((noinline)) float run_chains(float seed) {
  Unit const unit(seed);
  Vector chains[kChains];
  for (int i = 0; i < kChains; ++i) chains[i] = Vector{} + seed * i;
  for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) chains[i] = unit.step(chains[i]);
  }
  float sum = 0;
  for (Vector const& chain : chains) sum += chain[0];
  return sum;
}

// What a core does most of while nobody else uses it: unlike multiply-adds, additions of integers slow down as soon as another
// hardware thread of the same core works, which a virtual machine does not see (by hand, on a Zen 4: 11.8 a ns alone, 4 to 11
// beside others).
double additions_per_second() {
  constexpr int kCounters = 8;
  constexpr int kAdditionSteps = 1 << 16;  // some 40 us
  std::uint64_t counters[kCounters] = {};
  auto const begin = Clock::now();
  for (int step = 0; step < kAdditionSteps; ++step) {
    for (std::uint64_t& counter : counters) {
      counter += step;
      asm volatile("" : "+r"(counter));  // else they would become one sum
    }
  }
  return kCounters * double{kAdditionSteps} / seconds_since(begin);
}

// Exported by the OpenMP that torch brings along.
using GompParallel = void (*)(void (*function)(void*), void* data, unsigned num_threads, unsigned flags);

// What `measure` returns on each of the threads that kernels get: those of torch's pool, which would else spin on the cores
// of others for a while after each call.
template <class Measure>
std::vector<double> on_each_thread(int num_threads, Measure const& measure) {
  struct Region {
    Measure const& measure;
    std::atomic<int> entered;
    std::vector<double> rates;
    static void enter(void* data) {
      Region& region = *static_cast<Region*>(data);
      int const thread = region.entered++;
      region.rates[thread] = region.measure();
    }
  } region{measure, {0}, std::vector<double>(num_threads)};
  if (auto const parallel = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"))) {
    parallel(Region::enter, &region, num_threads, 0);
  } else {
    std::vector<std::thread> threads;
    for (int i = 0; i < num_threads; ++i) threads.emplace_back(Region::enter, &region);
    for (std::thread& thread : threads) thread.join();
  }
  region.rates.resize(region.entered);  // a pool may lend fewer threads
  return region.rates;
}

template <class Unit>
double flops_of_thread(double seconds) {
  static float volatile seed = 0.5f;  // unknown to the compiler, which would fold products with constants
  float volatile sink = run_chains<Unit>(seed);
  auto const begin = Clock::now();
  double elapsed = 0;
  long runs = 0;
  while (elapsed < seconds) {
    for (int i = 0; i < 4; ++i) sink = run_chains<Unit>(seed);
    runs += 4;
    elapsed = seconds_since(begin);
  }
  static_cast<void>(sink);
  return runs * (Unit::kFlops * kChains * kSteps) / elapsed;
}

template <class Unit>
double flops_per_second(int num_threads, double seconds) {
  auto const rates = on_each_thread(num_threads, [=] { return flops_of_thread<Unit>(seconds); });
  return std::accumulate(rates.begin(), rates.end(), 0.0);
}

}  // namespace

extern "C" double peak_fp32(int num_threads, double seconds) { return flops_per_second<Fp32>(num_threads, seconds); }
extern "C" double peak_bf16(int num_threads, double seconds) { return flops_per_second<Bf16>(num_threads, seconds); }
// Of the slowest thread.
extern "C" double integer_additions(int num_threads) {
  auto const rates = on_each_thread(num_threads, additions_per_second);
  return *std::min_element(rates.begin(), rates.end());
}
