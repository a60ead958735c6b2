// The estimators' backward rules for one token, and what they ask of a row (the table in ops/gumbel_ste_embedding.py).
// Host and device.
#pragma once

#include "common/philox.h"

namespace gk {

enum class Estimator { kNoisy, kPlain, kReinmax };  // ste and soft; st; reinmax

// A zero weight sends nothing, whatever it is multiplied with.
template <typename Real>
GK_HOST_DEVICE inline Real product(Real weight, Real x) {
  return weight != Real(0) ? weight * x : Real(0);
}

// Means of dy over a row: under the relaxation p, and for reinmax under its middle distribution (one_hot + p) / 2
// instead, and under softmax(l).
template <typename Real>
struct Means {
  Real relaxed, plain;
};

template <Estimator kRule, typename Real>
GK_HOST_DEVICE inline Means<Real> means_of(Real relaxed, Real plain, Real chosen_dy) {
  if constexpr (kRule == Estimator::kReinmax) return {Real(0.5) * (relaxed + chosen_dy), plain};
  else return {relaxed, Real(0)};
}

// The gradient of a logit through the relaxation. `weight` is p / tau, for reinmax p; `plain` is softmax(l), read by
// reinmax only; `hit` says that the token is the sampled one. 2 J((D + p) / 2) dy is p (dy - mean) away from the
// sampled token, which adds dy - mean for its own half.
template <Estimator kRule, typename Real>
GK_HOST_DEVICE inline Real relaxation_gradient(Real weight, Real plain, Real dy, bool hit, Means<Real> mean) {
  Real dl = product(weight, dy - mean.relaxed);
  if constexpr (kRule == Estimator::kReinmax) {
    dl -= Real(0.5) * product(plain, dy - mean.plain);
    if (hit) dl += dy - mean.relaxed;
  }
  return dl;
}

// The gradient of a logit through log softmax(l) of the sampled token.
template <typename Real>
GK_HOST_DEVICE inline Real logprob_gradient(Real plain, bool hit, Real dlogprob) {
  return product(Real(hit) - plain, dlogprob);
}

}  // namespace gk
