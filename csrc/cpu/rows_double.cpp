// The row kernels for float64 logits: plain scalar code, since float64 is here to check with, not to train in.
#include <cmath>
#include <limits>

#include "common/gumbel.h"
#include "cpu/rows.h"

namespace gk {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// One row of a view.
template <typename T>
struct Row {
  T* data;
  int64_t stride;
  Row(const View& x, int64_t row) : data(x.row<T>(row)), stride(x.token_stride) {}
  T& operator[](int64_t v) const { return data[v * stride]; }
};

double score(const Rows& in, int64_t row, int64_t v, double l) {
  return l + token_gumbel<double>(in.noise.seed, in.noise.row(row), in.noise.vocab_start + v);
}

SamplePart<double> sample(const Rows& in, int64_t row, int64_t begin, int64_t end, bool logsumexp) {
  const Row<const double> l(in.logits, row);
  SamplePart<double> best{-kInfinity, -kInfinity, 0.0, -1, false};
  for (int64_t v = begin; v < end; ++v) {
    const double s = score(in, row, v, l[v]);
    if (s <= best.score_max) continue;
    if (!(s < kInfinity)) {
      best.bad = true;
      continue;
    }
    best.score_max = s;
    best.id = v;
  }
  if (logsumexp) {
    for (int64_t v = begin; v < end; ++v) best.logit_max = l[v] > best.logit_max ? l[v] : best.logit_max;
    for (int64_t v = begin; v < end; ++v) best.logit_sum += l[v] > -kInfinity ? std::exp(l[v] - best.logit_max) : 0.0;
  }
  return best;
}

// Weights exp((l + g - pivot) / tau) of a row, to out; returns their sum.
double weigh(const Rows& in, int64_t row, double tau, double pivot, const View& to) {
  const Row<const double> l(in.logits, row);
  const Row<double> out(to, row);
  double total = 0.0;
  for (int64_t v = 0; v < in.vocab; ++v) total += out[v] = std::exp((score(in, row, v, l[v]) - pivot) / tau);
  return total;
}
void divide(const View& x, int64_t row, int64_t vocab, double total) {
  const Row<double> out(x, row);
  for (int64_t v = 0; v < vocab; ++v) out[v] /= total;
}

void softmax(const SoftmaxArgs<double>& args, int64_t row, double*) {
  args.total[row] = weigh(args.in, row, args.tau[row], args.score_max[row], args.out);
  if (args.normalize) divide(args.out, row, args.in.vocab, args.total[row]);
}

void relax(const RelaxArgs<double>& args, int64_t row, double*) {
  const SamplePart<double> best = sample(args.in, row, 0, args.in.vocab, false);
  args.score_max[row] = best.bad || best.id < 0 ? std::numeric_limits<double>::quiet_NaN() : best.score_max;
  divide(args.out, row, args.in.vocab, weigh(args.in, row, args.tau[row], args.score_max[row], args.out));
}

template <Estimator kRule>
void backward_row(const BackwardArgs<double>& args, int64_t row, double* weights) {
  const Row<const double> l(args.in.logits, row);
  const Row<const double> dy(args.dy, row);
  const Row<double> out(args.out, row);
  constexpr bool kNoisy = kRule == Estimator::kNoisy, kReinmax = kRule == Estimator::kReinmax;
  const bool needs_untempered = kReinmax || args.dlogprobs;
  const double tau = args.tau[row], pivot = kNoisy ? args.score_max[row] : args.logit_max[row];
  const double dlogprob = args.dlogprobs ? args.dlogprobs[row] : 0.0;
  const int64_t id = needs_untempered ? args.ids[row] : -1;
  const auto untempered = [&](int64_t v) { return std::exp(l[v] - args.logit_max[row]) / args.logit_sum[row]; };
  const auto distance = [&](int64_t v) { return (kNoisy ? score(args.in, row, v, l[v]) : l[v]) - pivot; };
  double total = 0.0, mean = 0.0, untempered_mean = 0.0;
  for (int64_t v = 0; v < args.in.vocab; ++v) {
    weights[v] = std::exp(distance(v) / tau);
    total += weights[v];
    mean += product(weights[v], dy[v]);
    if (kReinmax) untempered_mean += product(untempered(v), dy[v]);
  }
  const Means<double> means = means_of<kRule>(mean / total, untempered_mean, kReinmax ? dy[id] : 0.0);
  const double factor = kReinmax ? 1.0 / total : 1.0 / (total * tau);
  double moment = 0.0;
  for (int64_t v = 0; v < args.in.vocab; ++v) {
    const bool hit = v == id && l[v] > -kInfinity;
    const double p = needs_untempered ? untempered(v) : 0.0;
    double dl = relaxation_gradient<kRule>(weights[v] * factor, p, dy[v], hit, means);
    if (!kReinmax && args.dtau && weights[v] != 0.0) moment += dl * distance(v) / tau;
    if (args.dlogprobs) dl += logprob_gradient(p, hit, dlogprob);
    out[v] = dl;
  }
  if (args.dtau) args.dtau[row] = -moment;
}

void softmax_backward(const BackwardArgs<double>& args, int64_t row, double* weights) {
  with_estimator(args.estimator, [&]<Estimator kRule>() { backward_row<kRule>(args, row, weights); });
}

}  // namespace

const RowKernels<double> kRowsDouble = {"double", sample, softmax, softmax_backward, relax};

}  // namespace gk
