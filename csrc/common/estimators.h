// The estimators' backward rules for one token, and what they ask of a row (the table in ops/gumbel_ste_embedding.py).
// Host and device.
#pragma once

#include "common/philox.h"

namespace gk {

// Which softmax is the relaxation: softmax((l + g) / tau) (ste and soft), softmax(l / tau) (st), or reinmax's two.
// `untempered` below is softmax(l): tau = 1, no noise.
enum class Estimator { kNoisy, kNoiseless, kReinmax };

// call.template operator()<kRule>() with the estimator as a constant.
template <typename Call>
inline void with_estimator(Estimator estimator, const Call& call) {
  switch (estimator) {
    case Estimator::kNoisy: return call.template operator()<Estimator::kNoisy>();
    case Estimator::kNoiseless: return call.template operator()<Estimator::kNoiseless>();
    case Estimator::kReinmax: return call.template operator()<Estimator::kReinmax>();
  }
}

// A zero weight sends nothing, whatever it is multiplied with.
template <typename Real>
GK_HOST_DEVICE inline Real product(Real weight, Real x) {
  return weight != Real(0) ? weight * x : Real(0);
}

// Means of dy over a row: under the relaxation p, and for reinmax under its middle distribution (one_hot + p) / 2
// instead, and under softmax(l).
template <typename Real>
struct Means {
  Real relaxed, untempered;
};

template <Estimator kRule, typename Real>
GK_HOST_DEVICE inline Means<Real> means_of(Real relaxed, Real untempered, Real chosen_dy) {
  if constexpr (kRule == Estimator::kReinmax) return {Real(0.5) * (relaxed + chosen_dy), untempered};
  else return {relaxed, Real(0)};
}

// The gradient of a logit through the relaxation. `weight` is p / tau, for reinmax p; `untempered` is softmax(l), read
// by reinmax only; `hit` says that the token is the sampled one. 2 J((O + p) / 2) dy is p (dy - mean) away from the
// sampled token, which adds dy - mean for its own half.
template <Estimator kRule, typename Real>
GK_HOST_DEVICE inline Real relaxation_gradient(Real weight, Real untempered, Real dy, bool hit, Means<Real> mean) {
  Real dl = product(weight, dy - mean.relaxed);
  if constexpr (kRule == Estimator::kReinmax) {
    dl -= Real(0.5) * product(untempered, dy - mean.untempered);
    if (hit) dl += dy - mean.relaxed;
  }
  return dl;
}

// The gradient of a logit through log softmax(l) of the sampled token.
template <typename Real>
GK_HOST_DEVICE inline Real logprob_gradient(Real untempered, bool hit, Real dlogprob) {
  return product(Real(hit) - untempered, dlogprob);
}

}  // namespace gk
