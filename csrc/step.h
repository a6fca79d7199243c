// The update of a step on one vector of elements: the same operations on every instruction set.
#pragma once

#include "numerics.h"

namespace ddpm_fast {
namespace {

struct StepRow : Coefficients {
  int32_t noise_step;
  bool learned;

  DDPM_FAST_INLINE bool noisy() const { return learned || sigma != 0.0f; }
  DDPM_FAST_INLINE bool plain() const {
    return a != 0.0f && b != 0.0f && c0 != 0.0f && c1 != 0.0f && c2 == 0.0f && c3 == 0.0f;
  }
};

DDPM_FAST_INLINE StepRow step_row(const StepArgs& args, int64_t row) {
  const RowIndex& index = args.index[row];
  return {args.coefficients[row], index.noise_step, (index.flags & kLearnedVariance) != 0};
}

// Multiply rounded, then add rounded; a term whose coefficient is 0 is skipped. `kPlain`, here and
// below, is for a row that is known to be `plain`, which spares the loop the questions.
template <class V, bool kPlain = false>
DDPM_FAST_INLINE typename V::F add_term(typename V::F sum, float coefficient, typename V::F x) {
  return kPlain || coefficient != 0.0f ? V::add(sum, V::mul(V::set(coefficient), x)) : sum;
}

template <class V>
DDPM_FAST_INLINE typename V::F guide(typename V::F conditional, typename V::F unconditional,
                                     float scale) {
  return V::add(unconditional, V::mul(V::set(scale), V::sub(conditional, unconditional)));
}

template <class V, bool kPlain = false>
DDPM_FAST_INLINE typename V::F predict_xstart(const StepRow& row, typename V::F x_t,
                                              typename V::F model_output) {
  // A plain row spares the sum's leading 0, which decides the sign of a zero, no more; `combine`
  // begins with one again. So this pred_xstart may be used there only.
  typename V::F sum = kPlain ? V::mul(V::set(row.a), x_t) : add_term<V>(V::set(0.0f), row.a, x_t);
  sum = add_term<V, kPlain>(sum, row.b, model_output);
  return V::min(V::set(row.clip_hi), V::max(V::set(row.clip_lo), sum));
}

// The standard deviation that the model's extra channel v asks for, between the row's log bounds.
template <class V>
DDPM_FAST_INLINE typename V::F learned_sigma(const StepRow& row, typename V::F v) {
  typename V::F fraction = V::mul(V::add(v, V::set(1.0f)), V::set(0.5f));
  typename V::F rest = V::sub(V::set(1.0f), fraction);
  typename V::F log_variance =
      V::add(V::mul(fraction, V::set(row.max_log)), V::mul(rest, V::set(row.min_log)));
  return exponential<V>(V::mul(V::set(0.5f), log_variance));
}

template <class V, bool kPlain = false>
DDPM_FAST_INLINE typename V::F combine(const StepRow& row, typename V::F pred_xstart,
                                       typename V::F x_t, typename V::F previous,
                                       typename V::F model_output) {
  typename V::F sum = add_term<V, kPlain>(V::set(0.0f), row.c0, pred_xstart);
  sum = add_term<V, kPlain>(sum, row.c1, x_t);
  if constexpr (kPlain) return sum;
  sum = add_term<V>(sum, row.c2, previous);
  return add_term<V>(sum, row.c3, model_output);
}

}  // namespace
}  // namespace ddpm_fast
