// SPDX-License-Identifier: MIT
// The emulation itself: every atom against the fragment formulas of the PTX ISA (not against CuTe's layouts, of which it
// is made), asynchronous copies, and the errors that it must find.
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm70.hpp>
#include <cute/atom/mma_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>

namespace natten::emulation {
namespace {

int failures = 0;

void check(bool condition, std::string const& what) {
  if (condition) return;
  std::printf("failed: %s\n", what.c_str());
  ++failures;
}

using Body = std::function<void(char* shared)>;

void run(int threads, int shared_bytes, Body const& body, int blocks = 1) {
  launch(
      {blocks, threads, shared_bytes},
      [](void const* state, char* shared) { (*static_cast<Body const*>(state))(shared); }, &body);
}

// Whether running this fails with a message that contains `part`.
void must_fail(int threads, char const* part, Body const& body) {
  try {
    run(threads, 1024, body);
    check(false, std::string("no error: ") + part);
  } catch (Error const& error) {
    check(std::string(error.what()).find(part) != std::string::npos, std::string(part) + " in: " + error.what());
  }
}

// Row and column of value i of a lane's fragment: (m, k) of A, (k, n) of B, (m, n) of C and D.
struct Place {
  int row, column;
};

// "Matrix Fragments for mma.m8n8k4" of .f16. Lanes 4q to 4q + 3 and 16 + 4q to 16 + 4q + 3 are one product.
Place a_m8n8k4_row(int lane, int i) { return {lane % 4 + (lane < 16 ? 0 : 4), i}; }
Place b_m8n8k4_column(int lane, int i) { return {i, lane % 4 + (lane < 16 ? 0 : 4)}; }
Place b_m8n8k4_row(int lane, int i) { return {lane % 4, i + (lane < 16 ? 0 : 4)}; }
Place c_m8n8k4(int lane, int i) { return {(lane & 1) + (i & 2) + (lane < 16 ? 0 : 4), (i & 4) + (lane & 2) + (i & 1)}; }
// Of mma.m16n8k8 and mma.m16n8k16 with 16-bit types.
Place a_16bit(int lane, int i) { return {lane / 4 + (i & 2 ? 8 : 0), lane % 4 * 2 + (i & 1) + (i & 4 ? 8 : 0)}; }
Place b_16bit(int lane, int i) { return {lane % 4 * 2 + (i & 1) + (i & 2 ? 8 : 0), lane / 4}; }
Place c_m16n8(int lane, int i) { return {lane / 4 + (i & 2 ? 8 : 0), lane % 4 * 2 + (i & 1)}; }
// Of mma.m16n8k8 with .tf32.
Place a_tf32(int lane, int i) { return {lane / 4 + (i & 1 ? 8 : 0), lane % 4 + (i & 2 ? 4 : 0)}; }
Place b_tf32(int lane, int i) { return {lane % 4 + (i & 1 ? 4 : 0), lane / 4}; }

using Formula = Place (*)(int lane, int i);

template <class Op>
void check_mma(char const* name, Formula a_place, Formula b_place, Formula c_place) {
  using Traits = cute::MMA_Traits<Op>;
  using Shape = typename Traits::Shape_MNK;
  constexpr int kM = decltype(cute::size<0>(Shape{}))::value;
  constexpr int kN = decltype(cute::size<1>(Shape{}))::value;
  constexpr int kK = decltype(cute::size<2>(Shape{}))::value;
  constexpr int kThreads = decltype(cute::size(typename Traits::ThrID{}))::value;
  constexpr int kGroups = kLanes / kThreads;
  float a[kGroups][kM][kK], b[kGroups][kK][kN], c[kGroups][kM][kN];
  auto const fill = [](auto& matrices) {
    auto* const numbers = reinterpret_cast<float*>(&matrices);
    for (std::size_t i = 0; i < sizeof(matrices) / sizeof(float); ++i) numbers[i] = float(std::rand() % 17 - 8);
  };
  fill(a);
  fill(b);
  fill(c);
  run(kLanes, 0, [&](char*) {
    int const lane = threadIdx.x;
    int const group = kGroups == 1 ? 0 : lane % 16 / 4;
    auto a_fragment = cute::make_tensor<typename Traits::ValTypeA>(cute::Int<kM * kK / kThreads>{});
    auto b_fragment = cute::make_tensor<typename Traits::ValTypeB>(cute::Int<kN * kK / kThreads>{});
    auto c_fragment = cute::make_tensor<float>(cute::Int<kM * kN / kThreads>{});
    for (int i = 0; i < cute::size(a_fragment); ++i) {
      Place const p = a_place(lane, i);
      a_fragment(i) = typename Traits::ValTypeA(a[group][p.row][p.column]);
    }
    for (int i = 0; i < cute::size(b_fragment); ++i) {
      Place const p = b_place(lane, i);
      b_fragment(i) = typename Traits::ValTypeB(b[group][p.row][p.column]);
    }
    for (int i = 0; i < cute::size(c_fragment); ++i) {
      Place const p = c_place(lane, i);
      c_fragment(i) = c[group][p.row][p.column];
    }
    auto d_fragment = cute::make_tensor_like(c_fragment);
    cute::MMA_Atom<Op>{}.call(d_fragment, a_fragment, b_fragment, c_fragment);
    for (int i = 0; i < cute::size(d_fragment); ++i) {
      Place const p = c_place(lane, i);
      float expected = c[group][p.row][p.column];
      for (int k = 0; k < kK; ++k) expected += a[group][p.row][k] * b[group][k][p.column];
      check(d_fragment(i) == expected, std::string(name) + ", lane " + std::to_string(lane));
    }
  });
}

// ldmatrix: lane 8 j + r names row r of matrix j; register j of a lane holds elements 2 (lane % 4) and the next one of row
// lane / 4, of the transposed matrix where that is asked for.
template <class Op>
void check_ldmatrix(char const* name, int matrices, bool is_transposed) {
  run(kLanes, matrices * 128, [&](char* shared) {
    int const lane = threadIdx.x;
    auto* const elements = reinterpret_cast<std::uint16_t*>(shared);
    for (int i = lane; i < matrices * 64; i += kLanes) elements[i] = static_cast<std::uint16_t>(i);
    __syncwarp();
    int const row = lane % (matrices * 8);
    auto const source = cute::make_tensor(cute::make_smem_ptr(elements + row * 8), cute::Int<8>{});
    constexpr int kMost = 8;
    std::uint16_t values[kMost];
    auto const copy = [&](auto count) {
      auto destination = cute::make_tensor(&values[0], count);
      cute::Copy_Atom<Op, std::uint16_t>{}.call(source, destination);
    };
    if (matrices == 1) copy(cute::Int<2>{});
    if (matrices == 2) copy(cute::Int<4>{});
    if (matrices == 4) copy(cute::Int<8>{});
    for (int i = 0; i < 2 * matrices; ++i) {
      int const major = lane / 4, minor = lane % 4 * 2 + i % 2;
      int const expected = i / 2 * 64 + (is_transposed ? minor * 8 + major : major * 8 + minor);
      check(values[i] == expected, std::string(name) + ", lane " + std::to_string(lane));
    }
  });
}

void check_tf32_ignores_low_bits() {
  run(kLanes, 0, [](char*) {
    auto a = cute::make_tensor<cute::tfloat32_t>(cute::Int<4>{});
    auto b = cute::make_tensor<cute::tfloat32_t>(cute::Int<2>{});
    auto c = cute::make_tensor<float>(cute::Int<4>{});
    for (int i = 0; i < 4; ++i) a(i) = cute::tfloat32_t::bitcast(0x3f801fffu);  // 1 + 2^-10 - 2^-23
    for (int i = 0; i < 2; ++i) b(i) = cute::tfloat32_t(1.0f);
    cute::clear(c);
    cute::MMA_Atom<cute::SM80_16x8x8_F32TF32TF32F32_TN>{}.call(c, a, b, c);
    for (int i = 0; i < 4; ++i) check(c(i) == 8.0f, "tf32 reads 10 bits of mantissa");
  });
}

void check_copies(bool are_late) {
  setenv("NATTEN_EMULATION_COPIES", are_late ? "late" : "early", true);
  alignas(16) float source[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  run(1, 64, [&](char* shared) {
    auto* const s = reinterpret_cast<cute::uint128_t*>(shared);
    auto const* const g = reinterpret_cast<cute::uint128_t const*>(source);
    auto const* const floats = reinterpret_cast<float const*>(shared);
    check(std::isnan(floats[0]), "shared memory starts as NaN");
    cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(g[0], s[0]);
    cute::cp_async_fence();
    cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(g[1], s[1], false);
    cute::SM80_CP_ASYNC_CACHEALWAYS<float>::copy(source[7], reinterpret_cast<float*>(shared)[8]);
    cute::cp_async_fence();
    check(are_late ? std::isnan(floats[0]) : floats[0] == 1, "a copy not waited for");
    cute::cp_async_wait<1>();
    check(floats[0] == 1 && floats[3] == 4, "the first group is there");
    check(are_late ? std::isnan(floats[4]) : floats[4] == 0, "the second group is not waited for");
    cute::cp_async_wait<0>();
    check(floats[4] == 0 && floats[7] == 0 && floats[8] == 8, "the second group is there");
  });
  must_fail(1, "under way", [&](char* shared) {
    cute::SM80_CP_ASYNC_CACHEALWAYS<float>::copy(source[0], *reinterpret_cast<float*>(shared));
  });
  must_fail(2, "a write to where", [&](char* shared) {
    auto* const floats = reinterpret_cast<float*>(shared);
    if (threadIdx.x == 0) cute::SM80_CP_ASYNC_CACHEALWAYS<float>::copy(source[0], floats[0]);
    __syncthreads();
    if (threadIdx.x == 1) floats[0] = 7;
    __syncthreads();
    cute::cp_async_wait<0>();
  });
  must_fail(2, "cp.async: an address that", [&](char* shared) {
    auto const copy = [&] {
      cute::SM80_CP_ASYNC_CACHEALWAYS<float>::copy(source[0], *reinterpret_cast<float*>(shared));
    };
    if (threadIdx.x == 0) copy();
    __syncthreads();
    if (threadIdx.x == 1) copy();
  });
  must_fail(kLanes, "ldmatrix: an address that", [&](char* shared) {
    auto* const elements = reinterpret_cast<std::uint16_t*>(shared);
    cute::SM80_CP_ASYNC_CACHEALWAYS<float>::copy(source[0], reinterpret_cast<float*>(shared)[threadIdx.x]);
    __syncwarp();
    auto const from = cute::make_tensor(cute::make_smem_ptr(elements + threadIdx.x % 8 * 8), cute::Int<8>{});
    auto to = cute::make_tensor<std::uint16_t>(cute::Int<2>{});
    cute::Copy_Atom<cute::SM75_U32x1_LDSM_N, std::uint16_t>{}.call(from, to);
  });
  must_fail(1, "no multiple of 16", [&](char* shared) {
    auto const* const g = reinterpret_cast<cute::uint128_t const*>(source);
    cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(*g, *reinterpret_cast<cute::uint128_t*>(shared + 4));
  });
  must_fail(1, "outside of shared memory", [&](char* shared) {
    auto const* const g = reinterpret_cast<cute::uint128_t const*>(source);
    cute::SM80_CP_ASYNC_CACHEGLOBAL<cute::uint128_t>::copy(*g, *reinterpret_cast<cute::uint128_t*>(shared + 1024));
  });
  unsetenv("NATTEN_EMULATION_COPIES");
}

void check_collectives() {
  run(64, 0, [](char*) {
    int const thread = threadIdx.x, lane = thread % 32;
    check(__shfl_xor_sync(~0u, thread, 5) == (thread ^ 5), "__shfl_xor_sync");
    check(__shfl_sync(~0u, double(thread), 7) == thread / 32 * 32 + 7, "__shfl_sync");
    check(__shfl_down_sync(~0u, thread, 4) == (lane + 4 < 32 ? thread + 4 : thread), "__shfl_down_sync");
    check(__shfl_xor_sync(~0u, thread, 8, 8) == (thread & ~8), "__shfl_xor_sync reads no later part of the warp");
    check(__ballot_sync(~0u, lane % 3 == 0) == 0x49249249u, "__ballot_sync");
    if (lane < 16) check(__shfl_xor_sync(0xffffu, thread, 1) == (thread ^ 1), "half a warp");
  });
  run(96, 4, [](char* shared) {
    auto& counter = *reinterpret_cast<int*>(shared);
    for (int round = 0; round < 20; ++round) {
      if (int(threadIdx.x) == round) counter = round;
      __syncthreads();
      check(counter == round, "__syncthreads");
      __syncthreads();
    }
  });
  must_fail(64, "deadlock", [](char*) {
    if (threadIdx.x != 5) __syncthreads();
  });
  must_fail(32, "deadlock", [](char*) {
    if (threadIdx.x < 16) __syncwarp();
  });
  must_fail(32, "not in the mask", [](char*) { __shfl_sync(0xffu, 0, 0); });
  must_fail(32, "lane that is read", [](char*) {
    if (threadIdx.x < 8) __shfl_sync(0xffu, 0, 9);
  });
  must_fail(32, "at once", [](char*) {
    if (threadIdx.x < 16) __syncwarp();
    else __ballot_sync(~0u, 1);
  });
  must_fail(32, "outside of shared memory", [](char* shared) {
    auto const source =
        cute::make_tensor(cute::make_smem_ptr(reinterpret_cast<cute::half_t*>(shared + 1024)), cute::Int<8>{});
    auto destination = cute::make_tensor<cute::half_t>(cute::Int<2>{});
    cute::Copy_Atom<cute::SM75_U32x1_LDSM_N, cute::half_t>{}.call(source, destination);
  });
}

// A barrier that is missing must show in some order of the threads.
void check_orders_differ() {
  int seen = 0;
  constexpr int kSeeds = 8;
  for (int seed = 0; seed < kSeeds; ++seed) {
    setenv("NATTEN_EMULATION_SEED", std::to_string(seed).c_str(), true);
    bool differs = false;
    run(64, 256, [&](char* shared) {
      auto* const numbers = reinterpret_cast<int*>(shared);
      numbers[threadIdx.x] = int(threadIdx.x);
      __syncwarp();
      differs = differs || numbers[63 - threadIdx.x] != int(63 - threadIdx.x);
    });
    seen += differs;
  }
  check(seen >= kSeeds / 2, "another warp's number, read without a barrier");
  unsetenv("NATTEN_EMULATION_SEED");
}

}  // namespace
}  // namespace natten::emulation

int main() {
  using namespace natten::emulation;
  using namespace cute;
  check_mma<SM70_8x8x4_F32F16F16F32_TN>("m8n8k4 row.col", a_m8n8k4_row, b_m8n8k4_column, c_m8n8k4);
  check_mma<SM70_8x8x4_F32F16F16F32_TT>("m8n8k4 row.row", a_m8n8k4_row, b_m8n8k4_row, c_m8n8k4);
  check_mma<SM75_16x8x8_F32F16F16F32_TN>("m16n8k8 f16", a_16bit, b_16bit, c_m16n8);
  check_mma<SM80_16x8x16_F32F16F16F32_TN>("m16n8k16 f16", a_16bit, b_16bit, c_m16n8);
  check_mma<SM80_16x8x16_F32BF16BF16F32_TN>("m16n8k16 bf16", a_16bit, b_16bit, c_m16n8);
  check_mma<SM80_16x8x8_F32TF32TF32F32_TN>("m16n8k8 tf32", a_tf32, b_tf32, c_m16n8);
  check_tf32_ignores_low_bits();
  check_ldmatrix<SM75_U32x1_LDSM_N>("ldmatrix.x1", 1, false);
  check_ldmatrix<SM75_U32x2_LDSM_N>("ldmatrix.x2", 2, false);
  check_ldmatrix<SM75_U32x4_LDSM_N>("ldmatrix.x4", 4, false);
  check_ldmatrix<SM75_U16x2_LDSM_T>("ldmatrix.x1.trans", 1, true);
  check_ldmatrix<SM75_U16x4_LDSM_T>("ldmatrix.x2.trans", 2, true);
  check_ldmatrix<SM75_U16x8_LDSM_T>("ldmatrix.x4.trans", 4, true);
  check_copies(true);
  check_copies(false);
  check_collectives();
  check_orders_differ();
  if (failures == 0) std::puts("the emulation agrees with the PTX ISA");
  return failures == 0 ? 0 : 1;
}
