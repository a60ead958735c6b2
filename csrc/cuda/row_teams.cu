// Rows of any layout, several to a block: the sample of each, soft or hard, and the gradient of its relaxation.
//
// A team of threads has a row. Teams have a power of two of threads, at most a warp. Where a row's tokens are
// neighbours in memory, so are a team's threads. Where rows are neighbours, threads that lie side by side have one
// token in neighbouring rows, eight at least, which are a sector of memory. A thread has every so many groups of four
// tokens. If they fit its registers, a row is read once and its noise drawn once. Longer rows are read twice.
#include "common/estimators.h"
#include "cuda/launch.h"
#include "cuda/tile.h"

namespace gk::cuda {
namespace {

using Four = float[4];

// A team's shape: member m of row r of a warp is lane m * member_stride + r * row_stride.
struct Teams {
  int threads, member_stride, row_stride;
  int groups;         // of a row, whose tokens an int can count
  double reciprocal;  // 1 / beside

  explicit Teams(const PlacedRows& in) {
    reciprocal = 1.0 / double(in.beside);
    groups = int((in.vocab + (in.vocab_start & 3) + 3) / 4);
    const bool across = in.place.v != 1 && (in.place.b == 1 || (in.planes == 1 && in.place.a == 1));
    const int most = across ? kWarp / 8 : kWarp;
    threads = 1;
    while (threads < most && threads < groups) threads *= 2;
    member_stride = across ? kWarp / threads : 1;
    row_stride = across ? 1 : threads;
  }
  // Groups of a thread, at most.
  int share() const { return (groups + threads - 1) / threads; }
  int64_t blocks(int64_t rows) const { return (rows * threads + kThreads - 1) / kThreads; }
};

// What a thread has to do with its row.
struct Member {
  int64_t row, a, b;
  int index;
  bool exists;

  GK_KERNEL Member(const PlacedRows& in, const Teams& teams, int64_t block, int thread) {
    const int lane = thread % kWarp, in_warp = lane / teams.row_stride % (kWarp / teams.threads);
    index = lane / teams.member_stride % teams.threads;
    row = (block * (kThreads / kWarp) + thread / kWarp) * (kWarp / teams.threads) + in_warp;
    exists = row < in.rows;
    if (!exists) row = 0;
    // Division of 64 bits would be a call. The quotient by the reciprocal is off by one at most, below 2^52 rows.
    a = int64_t(double(row) * teams.reciprocal);
    b = row - a * in.beside;
    if (b < 0) {
      --a;
      b += in.beside;
    } else if (b >= in.beside) {
      ++a;
      b -= in.beside;
    }
  }
};

// One tensor's part of a row.
struct Line {
  char* base;
  int64_t stride;  // in bytes
  int vocab, shift;
  Dtype dtype;

  GK_KERNEL Line(const void* x, const Place& place, const PlacedRows& in, const Member& member)
      : base(const_cast<char*>(static_cast<const char*>(x)) +
             (member.a * place.a + member.b * place.b) * element_size(in.dtype)),
        stride(place.v * element_size(in.dtype)),
        vocab(member.exists ? int(in.vocab) : 0),
        shift(int(in.vocab_start & 3)),
        dtype(in.dtype) {}

  GK_KERNEL int column(int group, int i) const { return 4 * group - shift + i; }
  GK_KERNEL bool has(int column) const { return column >= 0 && column < vocab; }
  // Whether a group's tokens are one aligned word.
  GK_KERNEL bool is_word(int group) const {
    const int64_t size = element_size(dtype);
    return stride == size && has(column(group, 0)) && has(column(group, 3)) &&
           reinterpret_cast<uintptr_t>(base + int64_t(column(group, 0)) * size) % uintptr_t(4 * size) == 0;
  }
};

template <typename Block, typename T>
GK_KERNEL void load_four_as(const Line& line, int group, float fill, Four& x) {
  using Bits = typename Bits<T>::type;
  const char* first = line.base + int64_t(line.column(group, 0)) * line.stride;
  if (line.is_word(group)) {
    if constexpr (sizeof(T) == 4) {
      const Quad quad = Block::template load<Quad>(first);
      GK_UNROLL
      for (int i = 0; i < 4; ++i) x[i] = widened<T>(quad.word[i]);
    } else {
      const uint64_t word = Block::template load<uint64_t>(first);
      GK_UNROLL
      for (int i = 0; i < 4; ++i) x[i] = widened<T>(uint16_t(word >> (16 * i)));
    }
    return;
  }
  GK_UNROLL
  for (int i = 0; i < 4; ++i) {
    x[i] = fill;
    if (line.has(line.column(group, i))) x[i] = widened<T>(Block::template load<Bits>(first + i * line.stride));
  }
}

template <typename Block, typename T>
GK_KERNEL void store_four_as(const Line& line, int group, const Four& x) {
  char* first = line.base + int64_t(line.column(group, 0)) * line.stride;
  if (line.is_word(group)) {
    if constexpr (sizeof(T) == 4) {
      Quad quad;
      GK_UNROLL
      for (int i = 0; i < 4; ++i) quad.word[i] = narrowed<T>(x[i]);
      Block::store(first, quad);
    } else {
      uint64_t word = 0;
      GK_UNROLL
      for (int i = 0; i < 4; ++i) word |= uint64_t(narrowed<T>(x[i])) << (16 * i);
      Block::store(first, word);
    }
    return;
  }
  GK_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (line.has(line.column(group, i))) Block::store(first + i * line.stride, narrowed<T>(x[i]));
  }
}

template <typename Block>
GK_KERNEL void load_four(const Line& line, int group, float fill, Four& x) {
  if (line.dtype == Dtype::kFloat) load_four_as<Block, float>(line, group, fill, x);
  else if (line.dtype == Dtype::kBFloat16) load_four_as<Block, c10::BFloat16>(line, group, fill, x);
  else load_four_as<Block, c10::Half>(line, group, fill, x);
}

template <typename Block>
GK_KERNEL void store_four(const Line& line, int group, const Four& x) {
  if (line.dtype == Dtype::kFloat) store_four_as<Block, float>(line, group, x);
  else if (line.dtype == Dtype::kBFloat16) store_four_as<Block, c10::BFloat16>(line, group, x);
  else store_four_as<Block, c10::Half>(line, group, x);
}

// Turns a group's logits into scores l + g, but for the shift that all noise shares.
GK_KERNEL void add_noise_to_four(const RowNoise& noise, int64_t vocab_start, int group, Four& x) {
  const uint32_t counter = uint32_t((uint64_t(vocab_start) >> 2) + uint64_t(uint32_t(group)));
  const Words4 words = noise.words(counter, kDomainGumbel);
  uint32_t least = 0xFFFFFFFFu;
  Four y;
  GK_UNROLL
  for (int i = 0; i < 4; ++i) {
    least = words.w[i] < least ? words.w[i] : least;
    y[i] = noise_argument(words.w[i]);
  }
  if (least < kRefineBelow) {  // one group in four million
    const Words4 fine = noise.words(counter, kDomainRefine);
    GK_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (needs_refinement(y[i])) y[i] = refined_argument(y[i], fine.w[i]);
    }
  }
  GK_UNROLL
  for (int i = 0; i < 4; ++i) x[i] = std::fma(scaled_noise(y[i]), -kLn2, x[i]);
}

// The values of a team's threads merged, for each of them; the same order on every run.
template <typename Block, typename Values, typename Merge>
GK_KERNEL Values merged_by_team(Block& block, const Teams& teams, Values x, Merge merge) {
  GK_NO_UNROLL
  for (int mask = teams.member_stride; mask < teams.member_stride * teams.threads; mask *= 2) {
    x = block.each([&](int, const auto& mine, const auto& other) { return merge(mine, other); }, x,
                   block.shuffle_xor(x, mask));
  }
  return x;
}

// A thread's groups as f(k, group), k counting them. If kKept is not 0, there are at most so many.
template <int kKept, typename F>
GK_KERNEL void for_groups(const Teams& teams, const Member& member, F&& f) {
  if constexpr (kKept > 0) {
    GK_UNROLL
    for (int k = 0; k < kKept; ++k) {
      const int group = member.index + k * teams.threads;
      if (group < teams.groups) f(k, group);
    }
  } else {
    GK_NO_UNROLL
    for (int group = member.index; group < teams.groups; group += teams.threads) f(0, group);
  }
}

constexpr int kNoToken = INT32_MAX;

template <int kKept>
struct Scores {
  Four x[kKept ? kKept : 1];
  float best, sum;
  int token;  // the first that has the best score
};

template <int kKept, bool kHard>
struct RelaxTeams {
  RelaxArgs args;
  Teams teams;

  using State = Scores<kKept>;

  template <typename Block>
  GK_KERNEL void operator()(Block& block, int64_t index) const {
    const PlacedRows& in = args.in;
    const auto at = [&](int thread) { return Member(in, teams, index, thread); };
    const auto scored = block.each([&](int thread) { return scores<Block>(at(thread)); });
    const auto best =
        merged_by_team(block, teams, block.each([](int, const State& s) { return s.best; }, scored), LargestOrNaN{});
    if constexpr (kHard) {
      const auto mine =
          block.each([](int, const State& s, float top) { return s.best == top ? s.token : kNoToken; }, scored, best);
      const auto token = merged_by_team(block, teams, mine, Least{});
      block.each([&](int thread, float top, int hit) { write_hard<Block>(at(thread), top, hit); }, best, token);
    } else {
      const auto weighed =
          block.each([&](int thread, const State& s, float top) { return weights(at(thread), s, top); }, scored, best);
      const auto total =
          merged_by_team(block, teams, block.each([](int, const State& s) { return s.sum; }, weighed), Plus{});
      block.each([&](int thread, const State& s, float top, float all) { write_soft<Block>(at(thread), s, top, all); },
                 weighed, best, total);
    }
  }

 private:
  template <typename Block>
  GK_KERNEL State scores(const Member& member) const {
    const PlacedRows& in = args.in;
    const Line logits(in.logits, in.place, in, member);
    const float rate = kHard ? 0.0f : kLog2E / args.tau[member.row];
    State state;
    state.best = -kInfinity;
    state.sum = 0.0f;
    state.token = kNoToken;
    for_groups<kKept>(teams, member, [&](int k, int group) {
      Four& x = state.x[k];
      load_four<Block>(logits, group, -kInfinity, x);
      add_noise_to_four(RowNoise(in, member.row), in.vocab_start, group, x);
      float top = state.best;
      GK_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (kHard && x[i] > top) state.token = logits.column(group, i);
        top = max_or_nan(top, x[i]);
      }
      if constexpr (!kHard && kKept == 0) {
        // A thread that has seen only -inf must not compute inf - inf.
        const float pivot = max_or_nan(top, kLowest);
        state.sum *= fast_exp2((state.best - pivot) * rate);
        GK_UNROLL
        for (int i = 0; i < 4; ++i) state.sum += fast_exp2((x[i] - pivot) * rate);
      }
      state.best = top;
    });
    return state;
  }

  // Kept scores turned into weights, and their sum from the row's best score.
  GK_KERNEL State weights(const Member& member, State state, float best) const {
    const float rate = kLog2E / args.tau[member.row];
    if constexpr (kKept == 0) {
      state.sum *= fast_exp2((max_or_nan(state.best, kLowest) - max_or_nan(best, kLowest)) * rate);
    } else {
      for_groups<kKept>(teams, member, [&](int k, int64_t) {
        GK_UNROLL
        for (int i = 0; i < 4; ++i) {
          state.x[k][i] =
              fast_exp2((state.x[k][i] - best) * rate);  // the difference first: scaled scores could overflow
          state.sum += state.x[k][i];
        }
      });
    }
    return state;
  }

  template <typename Block>
  GK_KERNEL void write_soft(const Member& member, State state, float best, float total) const {
    const PlacedRows& in = args.in;
    const bool bad = total != total || best == -kInfinity;
    const float rate = kLog2E / args.tau[member.row], factor = bad ? kInfinity - kInfinity : 1.0f / total;
    const Line logits(in.logits, in.place, in, member), out(args.out, args.out_place, in, member);
    for_groups<kKept>(teams, member, [&](int k, int group) {
      Four& x = state.x[k];
      if constexpr (kKept == 0) {
        load_four<Block>(logits, group, -kInfinity, x);
        add_noise_to_four(RowNoise(in, member.row), in.vocab_start, group, x);
        GK_UNROLL
        for (int i = 0; i < 4; ++i) x[i] = fast_exp2((x[i] - best) * rate);
      }
      GK_UNROLL
      for (int i = 0; i < 4; ++i) x[i] *= factor;
      store_four<Block>(out, group, x);
    });
    put_best(member, best, bad);
  }

  template <typename Block>
  GK_KERNEL void write_hard(const Member& member, float best, int token) const {
    const bool bad = !(best > -kInfinity && best < kInfinity);
    const float nan = kInfinity - kInfinity;
    const Line out(args.out, args.out_place, args.in, member);
    for_groups<0>(teams, member, [&](int, int group) {
      Four y;
      GK_UNROLL
      for (int i = 0; i < 4; ++i) y[i] = bad ? nan : out.column(group, i) == token ? 1.0f : 0.0f;
      store_four<Block>(out, group, y);
    });
    put_best(member, best, bad);
  }

  GK_KERNEL void put_best(const Member& member, float best, bool bad) const {
    if (member.exists && member.index == 0) {
      args.score_max[member.row] = bad ? kInfinity - kInfinity : best + kNoiseShift;
    }
  }
};

template <int kKept>
struct BackwardTeams {
  RelaxBackwardArgs args;
  Teams teams;

  struct State {
    Four distance[kKept ? kKept : 1], dy[kKept ? kKept : 1];  // of scores from the best
    float total, dot;
  };

  template <typename Block>
  GK_KERNEL void operator()(Block& block, int64_t index) const {
    const auto at = [&](int thread) { return Member(args.in, teams, index, thread); };
    const auto sums = block.each([&](int thread) { return summed<Block>(at(thread)); });
    const auto total =
        merged_by_team(block, teams, block.each([](int, const State& s) { return s.total; }, sums), Plus{});
    const auto dot = merged_by_team(block, teams, block.each([](int, const State& s) { return s.dot; }, sums), Plus{});
    const auto moments = block.each(
        [&](int thread, const State& s, float all, float sum) { return apply<Block>(at(thread), s, all, sum / all); },
        sums, total, dot);
    if (args.dtau) {
      const auto moment = merged_by_team(block, teams, moments, Plus{});
      block.each(
          [&](int thread, float sum) {
            const Member member = at(thread);
            // d/dtau of exp(s / tau) is -s / tau^2, and the pivot drops out, since dl sums to zero.
            if (member.exists && member.index == 0) args.dtau[member.row] = -sum / args.tau[member.row];
          },
          moment);
    }
  }

 private:
  template <typename Block>
  GK_KERNEL void load(const Member& member, int group, Four& distance, Four& dy) const {
    const PlacedRows& in = args.in;
    const float pivot = args.score_max[member.row] - kNoiseShift;
    load_four<Block>(Line(in.logits, in.place, in, member), group, -kInfinity, distance);
    load_four<Block>(Line(args.dy, args.dy_place, in, member), group, 0.0f, dy);
    add_noise_to_four(RowNoise(in, member.row), in.vocab_start, group, distance);
    GK_UNROLL
    for (int i = 0; i < 4; ++i) distance[i] -= pivot;
  }

  template <typename Block>
  GK_KERNEL State summed(const Member& member) const {
    const float rate = kLog2E / args.tau[member.row];
    State state;
    state.total = state.dot = 0.0f;
    for_groups<kKept>(teams, member, [&](int k, int group) {
      load<Block>(member, group, state.distance[k], state.dy[k]);
      GK_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float weight = fast_exp2(state.distance[k][i] * rate);
        state.total += weight;
        state.dot += product(weight, state.dy[k][i]);
      }
    });
    return state;
  }

  template <typename Block>
  GK_KERNEL float apply(const Member& member, State state, float total, float mean) const {
    const float tau = args.tau[member.row], rate = kLog2E / tau, factor = 1.0f / total / tau;
    const Line out(args.out, args.out_place, args.in, member);
    const Means<float> means = means_of<Estimator::kNoisy>(mean, 0.0f, 0.0f);
    float moment = 0.0f;
    for_groups<kKept>(teams, member, [&](int k, int group) {
      Four &distance = state.distance[k], &dy = state.dy[k];
      if constexpr (kKept == 0) load<Block>(member, group, distance, dy);
      GK_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float weight = fast_exp2(distance[i] * rate);
        const float dl = relaxation_gradient<Estimator::kNoisy>(weight * factor, 0.0f, dy[i], false, means);
        if (weight != 0.0f) moment += dl * distance[i];
        dy[i] = dl;
      }
      store_four<Block>(out, group, dy);
    });
    return moment;
  }
};

constexpr int kMostKept = 4;  // groups in a thread's registers

template <bool kHard>
void run(const RelaxArgs& args, const Teams& teams, void* stream) {
  const int64_t blocks = teams.blocks(args.in.rows);
  if (teams.share() == 1) launch(RelaxTeams<1, kHard>{args, teams}, blocks, stream);
  else if (teams.share() <= kMostKept) launch(RelaxTeams<kMostKept, kHard>{args, teams}, blocks, stream);
  else launch(RelaxTeams<0, kHard>{args, teams}, blocks, stream);
}

}  // namespace

void relax(const RelaxArgs& args, void* stream) {
  const Teams teams(args.in);
  if (args.hard) run<true>(args, teams, stream);
  else run<false>(args, teams, stream);
}

void relax_backward(const RelaxBackwardArgs& args, void* stream) {
  const Teams teams(args.in);
  const int64_t blocks = teams.blocks(args.in.rows);
  if (teams.share() == 1) launch(BackwardTeams<1>{args, teams}, blocks, stream);
  else if (teams.share() <= kMostKept) launch(BackwardTeams<kMostKept>{args, teams}, blocks, stream);
  else launch(BackwardTeams<0>{args, teams}, blocks, stream);
}

}  // namespace gk::cuda
