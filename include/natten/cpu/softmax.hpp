// SPDX-License-Identifier: MIT
// What products of query and key are to the softmax, for passes that make weights of them.
#pragma once

#include "natten/cpu/bias.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

constexpr float kLog2e = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// The softmax knows a product by its level: something that grows with the logit. Levels are subtracted before they are scaled to
// base 2, so that the highest differs from itself by 0, however large it is; of a product that is scaled first, a subtraction that
// the compiler contracts with the scaling leaves the rounding error of the other side, and 2 to that may be 0 or infinite.
//
// The product itself is the level, unless that would be wrong: where there is a bias, or where the scale turns products round, or
// takes logits beyond the range of floats that products are in. There it is the logit.
class Levels {
 public:
  explicit Levels(Problem const& problem) : scale_(static_cast<float>(problem.scale)) {
    is_product_ = !problem.has_rpb && scale_ <= 1.0f && scale_ >= 0x1p-100f;
    logit_ = is_product_ ? scale_ : 1.0f;
    log2_ = logit_ * kLog2e;
  }

  // Of the streamed tokens (z, y, x) of all lanes; any level in lanes that do not take part, which `keep` does not hold. Levels are
  // the same to the bit in every pass.
  NATTEN_INLINE Vec of(Vec product, Bias const& bias, int z, int y, IntVec x, IntVec keep) const {
    if (is_product_) return product;
    Vec level = product * scale_;
    keep_in_register(level);  // not contracted with what follows, which differs from pass to pass
    return bias ? level + bias.at(z, y, x, keep) : level;
  }
  // Without a bias.
  NATTEN_INLINE Vec of(Vec product) const { return is_product_ ? product : product * scale_; }

  // What a difference of levels is in base 2: the factor.
  NATTEN_INLINE float log2() const { return log2_; }
  // What a level is as a logit: the factor.
  NATTEN_INLINE float logit() const { return logit_; }

 private:
  float scale_;
  bool is_product_;
  float logit_;
  float log2_;
};

}  // namespace natten::cpu::NATTEN_CPU_ISA
