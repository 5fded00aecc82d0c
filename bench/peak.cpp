// SPDX-License-Identifier: MIT
// What the machine can do at most: multiply-adds on registers, nothing else, as many threads as the kernels get.
// Compiled for this very machine by bench/peak.py.
#include <chrono>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

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

// Binds the calling thread to the n-th CPU of those it may use: a scheduler may leave new threads on one CPU for as long as a
// measurement takes (seen: 272 instead of 460 GFLOP/s of two).
void bind_to_cpu(int n) {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  n %= CPU_COUNT(&allowed);
  int cpu = 0;
  while (!CPU_ISSET(cpu, &allowed) || n-- > 0) ++cpu;
  CPU_ZERO(&allowed);
  CPU_SET(cpu, &allowed);
  pthread_setaffinity_np(pthread_self(), sizeof allowed, &allowed);
#else
  (void)n;
#endif
}

template <class Unit>
double flops_per_second(int num_threads, double seconds) {
  static float volatile seed = 0.5f;  // unknown to the compiler, which would fold products with constants
  using Clock = std::chrono::steady_clock;
  std::vector<double> rates(num_threads);
  auto body = [&](int thread) {
    bind_to_cpu(thread);
    float volatile sink = run_chains<Unit>(seed);
    auto begin = Clock::now();
    double elapsed = 0;
    long runs = 0;
    while (elapsed < seconds) {
      for (int i = 0; i < 16; ++i) sink = run_chains<Unit>(seed);
      runs += 16;
      elapsed = std::chrono::duration<double>(Clock::now() - begin).count();
    }
    rates[thread] = runs * (Unit::kFlops * kChains * kSteps) / elapsed;
  };
  std::vector<std::thread> threads;
  for (int thread = 0; thread < num_threads; ++thread) threads.emplace_back(body, thread);
  for (std::thread& thread : threads) thread.join();
  double total = 0;
  for (double rate : rates) total += rate;
  return total;
}

}  // namespace

extern "C" double peak_fp32(int num_threads, double seconds) { return flops_per_second<Fp32>(num_threads, seconds); }
extern "C" double peak_bf16(int num_threads, double seconds) { return flops_per_second<Bf16>(num_threads, seconds); }
