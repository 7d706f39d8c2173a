// The next token of a row of logits: penalties, cuts and a draw. One text for CPUs and GPUs.
//
// A score is compared as an integer that is in the same order (`Key`), and the weight of a token,
// 2^30 exp((score - largest) / temperature), is an integer that integer operations compute. Sums of
// integers do not depend on their order: CPUs and GPUs, any vectors and any number of threads have
// the same cuts and draw the same token. Nothing is sorted: a cut is a key, found by bisection over
// how many tokens, or how much weight, are at or above it, and a number of tokens that equal it,
// those of the smallest indices. A weight is exact to 2^-31 of that of the likeliest token.
//
// A Team has the threads that work on a row: `lane` of `lanes`; as `parts` that take ranges of the
// vocabulary, `part` is the first of a thread's, `part_lane` of `part_lanes` its threads. A CPU's has
// one thread. `sum` and `max` are those of a team, and barriers; `part_sum` and `prefix` (inclusive) of a
// part. `few_keys` and `few_weights` keep FEW tokens; `next` counts from 0 since `begin`, a barrier.
#ifdef __CUDACC__
#define SAMPLE_FN __device__ __forceinline__
#else
#define SAMPLE_FN inline __attribute__((always_inline))
#endif

namespace sample {

#ifdef __CUDACC__
SAMPLE_FN int32_t float_bits(float x) { return __float_as_int(x); }
SAMPLE_FN float bits_float(int32_t x) { return __int_as_float(x); }
SAMPLE_FN double log(double x) { return ::log(x); }
SAMPLE_FN uint64_t high_product(uint64_t a, uint64_t b) { return __umul64hi(a, b); }
using Fraction = uint32_t;  // of 2^32; in vectors of a CPU wider, which saves conversions
SAMPLE_FN Fraction times(Fraction a, Fraction b) { return __umulhi(a, b); }
#else
SAMPLE_FN int32_t float_bits(float x) { return __builtin_bit_cast(int32_t, x); }
SAMPLE_FN float bits_float(int32_t x) { return __builtin_bit_cast(float, x); }
SAMPLE_FN double log(double x) { return __builtin_log(x); }
SAMPLE_FN uint64_t high_product(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}
using Fraction = uint64_t;
SAMPLE_FN Fraction times(Fraction a, Fraction b) { return a * b >> 32; }
#endif

using Key = int32_t;
constexpr Key NAN_KEY = 0x7fffffff, INFINITE = 0x7f800000;  // of NaN, of +inf
constexpr Key EXCLUDED = ~INFINITE, NO_KEY = ~NAN_KEY;  // of -inf, below all
constexpr uint32_t ONE = 1u << 30;  // the weight of the likeliest token
constexpr float SCALE = 0x1.715476p24f;  // log2(e) * 2^24
constexpr double COLDEST = 1e-6;  // a lower temperature samples as this one does
constexpr int PARTS = 256, FEW = 4096;

SAMPLE_FN Key key_of(float x) {  // NaN is above all others, the zeros are equal
  const int32_t bits = float_bits(x + 0.0f);
  return x != x ? NAN_KEY : bits ^ ((bits >> 31) & NAN_KEY);
}
SAMPLE_FN float score_of(Key key) { return bits_float(key ^ ((key >> 31) & NAN_KEY)); }

// 2^30 * 2^y with y = (score - largest) * scale / 2^24; `scale` is SCALE / temperature.
SAMPLE_FN uint32_t weight_of(float difference, float scale) {
  float y = difference * scale;
  y = y > -0x1p29f ? y : -0x1p29f;
  const int32_t fixed = static_cast<int32_t>(y);
  const Fraction f = static_cast<uint32_t>(fixed) << 8;  // the fraction of y, / 2^32
  // 2^f = 1 + f g(f); g is a polynomial fitted at Chebyshev's points, relative error 6e-9.
  Fraction g = 0xda68f;
  g = 0x532934 + times(g, f);
  g = 0x2789515 + times(g, f);
  g = 0xe34fb4f + times(g, f);
  g = 0x3d7f87e0 + times(g, f);
  g = 0xb17217cd + times(g, f);
  const uint32_t power = (1u << 31) + static_cast<uint32_t>(times(g, f) >> 1);
  return y > -0x1.fp28f ? ((power >> (-(fixed >> 24) & 31)) + 1) >> 1 : 0;
}

// 64 random bits for a seed and a position: Philox4x32-10 (Salmon et al., Parallel random numbers: as
// easy as 1, 2, 3, SC 2011).
SAMPLE_FN uint64_t philox(uint64_t seed, uint64_t position) {
  uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c0 | uint64_t{c1} << 32;
}

// -- the scores of a row ---------------------------------------------------------------------------

// The tokens with a key from `least` on: their number and weight, which is below 2^50.
struct Measure {
  Key least;
  uint32_t count;
  uint64_t weight;
};

// A row, or some of its tokens: `keys` and `weights` of `size` tokens.
struct Scores {
  Key* keys;
  uint32_t* weights;
  int32_t size;
};

// Logits in float32, or (2 `bytes`) bfloat16.
struct Logits {
  const float* floats;
  int32_t bytes;
  SAMPLE_FN float operator[](int32_t i) const {
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(floats);
    return bytes == 2 ? bits_float(static_cast<int32_t>(uint32_t{halves[i]} << 16)) : floats[i];
  }
};

// store(i, load(i)) of all tokens; a GPU's thread has several loads under way.
template <class Team, class Load, class Store>
SAMPLE_FN void each(const Team& team, int32_t size, const Load& load, const Store& store) {
  constexpr int AT_ONCE = Team::lanes > 1 ? 8 : 1;
  for (int32_t begin = team.lane; begin < size; begin += AT_ONCE * team.lanes) {
    decltype(load(0)) values[AT_ONCE];
    for (int n = 0, i = begin; n < AT_ONCE; ++n, i += team.lanes) values[n] = load(i < size ? i : begin);
    for (int n = 0, i = begin; n < AT_ONCE && i < size; ++n, i += team.lanes) store(i, values[n]);
  }
}

// Computes the keys; the largest.
template <class Team>
SAMPLE_FN Key load(const Team& team, const Scores& s, const Logits& logits) {
  Key most = NO_KEY;
  each(team, s.size, [&](int32_t i) { return key_of(logits[i]); }, [&](int32_t i, Key key) {
    s.keys[i] = key;
    most = key > most ? key : most;
  });
  return team.max(most);
}

template <class Team>
SAMPLE_FN Key largest(const Team& team, const Scores& s) {
  Key most = NO_KEY;
  for (int32_t i = team.lane; i < s.size; i += team.lanes) most = s.keys[i] > most ? s.keys[i] : most;
  return team.max(most);
}

// Computes the weights; their sum.
template <class Team>
SAMPLE_FN uint64_t weigh(const Team& team, const Scores& s, Key most, float scale) {
  const float top = score_of(most);
  uint64_t total = 0;
  each(team, s.size, [&](int32_t i) { return s.keys[i]; }, [&](int32_t i, Key key) {
    total += s.weights[i] = weight_of(score_of(key) - top, scale);
  });
  return team.sum({NO_KEY, 0, total}).weight;
}

// Penalties and biases of the tokens that have any, each named once; tokens that `mask` excludes.
template <class Team>
SAMPLE_FN void penalize(const Team& team, const Scores& s, const SampleRow& row) {
  for (int32_t e = team.lane; e < row.edits; e += team.lanes) {
    const SampleEdit edit = row.edit[e];
    // Numbers of float32, whose products are exact in float64: a fused sum is no other one.
    const double repetition = static_cast<float>(row.repetition_penalty), count = edit.count;
    const double presence = static_cast<float>(row.presence_penalty);
    double x = score_of(s.keys[edit.token]);
    if (edit.is_seen) x = x > 0 ? x / repetition : x * repetition;
    if (edit.count) x -= presence + static_cast<float>(row.frequency_penalty) * count;
    s.keys[edit.token] = key_of(static_cast<float>(x + edit.bias));
  }
  team.sync();
  if (row.mask)
    for (int32_t i = team.lane; i < s.size; i += team.lanes)
      if (!(row.mask[i >> 3] >> (i & 7) & 1)) s.keys[i] = EXCLUDED;
  team.sync();
}

// -- cuts ------------------------------------------------------------------------------------------

template <class Team>
SAMPLE_FN Measure from(const Team& team, const Scores& s, Key least) {
  uint32_t count = 0;
  uint64_t weight = 0;
  for (int32_t i = team.lane; i < s.size; i += team.lanes) {
    const bool is_in = s.keys[i] >= least;
    count += is_in;
    weight += is_in ? s.weights[i] : 0;
  }
  return team.sum({least, count, weight});
}

// The tokens at and above a bound, and those above. Those between are ties, or a single token.
struct Bound {
  Measure at, above;
  SAMPLE_FN uint64_t each() const { return (at.weight - above.weight) / (at.count - above.count); }
};

// A key between those of a bound: three times by the score, which narrows scores that are spread evenly,
// then by the key, which narrows any. What is below all scores counts as far below the largest.
SAMPLE_FN Key between(const Bound& b, Key most, int step) {
  const Key low = b.at.least, high = b.above.least;
  const float least = low > EXCLUDED ? score_of(low) : score_of(most) - static_cast<float>(4u << (2 * step & 30));
  const Key mean = key_of(0.5f * least + 0.5f * score_of(high));
  return step % 4 && low < mean && mean < high ? mean : static_cast<Key>((int64_t{low} + high) >> 1);
}

// The highest bound of keys from `at` on with `wanted` tokens, or their weight, at it and above. Once
// few tokens are left between the two, they are copied, and only they are counted.
template <class Team>
SAMPLE_FN Bound search(const Team& team, const Scores& s, Measure at, Key most, bool by_weight, uint64_t wanted) {
  Bound b = {at, {most + 1, 0, 0}};
  Scores near = s;
  Measure above = b.above;  // the tokens above those of `near`
  for (int step = 1; int64_t{b.above.least} - b.at.least > 1 && b.at.count > b.above.count + 1; ++step) {
    if (near.size == s.size && b.at.count - b.above.count <= FEW && s.size > FEW) {
      above = b.above;
      near = {team.few_keys, team.few_weights, static_cast<int32_t>(b.at.count - b.above.count)};
      team.begin();
      for (int32_t i = team.lane; i < s.size; i += team.lanes) {
        if (s.keys[i] < b.at.least || s.keys[i] >= above.least) continue;
        const int32_t next = team.next();
        near.keys[next] = s.keys[i];
        near.weights[next] = s.weights[i];
      }
      team.sync();
    }
    Measure m = from(team, near, between(b, most, step));
    m.count += above.count;
    m.weight += above.weight;
    if ((by_weight ? m.weight : m.count) >= wanted) b.at = m;
    else b.above = m;
  }
  return b;
}

// The tokens that are left: those with a key from `above` on, and the first `ties` of those from `at`
// on, of the weight `each`. Lighter ones than `lightest` are left out.
struct Cut {
  Key at, above;
  uint64_t ties, each;
  uint32_t lightest;
};

// What top_k, then top_p, then min_p leave. `total`: the sum of all weights.
template <class Team>
SAMPLE_FN Cut cut(const Team& team, const Scores& s, Key most, uint64_t total, const SampleRow& row) {
  Cut c = {NO_KEY, NO_KEY, 0, 0, static_cast<uint32_t>(row.min_p * ONE + 0.5)};
  Measure at = {NO_KEY, static_cast<uint32_t>(s.size), total};
  if (row.top_k > 0 && row.top_k < s.size) {
    const uint64_t wanted = static_cast<uint64_t>(row.top_k);
    const Bound b = search(team, s, at, most, false, wanted);
    at = b.at;
    c = {b.at.least, b.above.least, wanted - b.above.count, b.each(), c.lightest};
    total = b.above.weight + c.ties * c.each;
  }
  if (row.top_p < 1) {
    const double share = row.top_p * static_cast<double>(total);
    uint64_t wanted = static_cast<uint64_t>(share);
    wanted += wanted == 0 || static_cast<double>(wanted) < share;
    const Bound b = search(team, s, at, most, true, wanted);
    const uint64_t needed = (wanted - b.above.weight + b.each() - 1) / b.each();
    const bool is_same = b.at.least == c.at && c.ties;  // the ties that top_k has cut
    c = {b.at.least, b.above.least, is_same && c.ties < needed ? c.ties : needed, b.each(), c.lightest};
  }
  if (c.each < c.lightest) c.each = 0;
  return c;
}

// -- the draw --------------------------------------------------------------------------------------

SAMPLE_FN uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

// What is left in front of a token, or of a part: its weight, and the ties that are still to be taken.
struct Front {
  uint64_t weight, ties;
};

// The first element from `begin` on with which the weight passes `goal`, and what is in front of it. of(i):
// the weight of what is above the cut, and the number of ties.
template <class Team, class Of>
SAMPLE_FN int32_t find(const Team& team, int32_t begin, uint64_t goal, uint64_t each, Front& front, const Of& of) {
  for (int32_t base = begin;; base += team.part_lanes) {
    const Measure m = of(base + team.part_lane);
    const uint64_t count = team.prefix(uint64_t{m.count});
    const uint64_t taken = least(count, front.ties), own = taken - least(count - m.count, front.ties);
    const uint64_t weight = m.weight + own * each, upto = front.weight + team.prefix(weight);
    const int found = team.first(upto > goal);
    const int at = found < 0 ? team.part_lanes - 1 : found;
    front.weight = team.of(found < 0 ? upto : upto - weight, at);
    front.ties -= team.of(found < 0 ? taken : taken - own, at);
    if (found >= 0) return base + found;
  }
}

// The token at a number of [0, 2^64) by the inverse of the cumulative distribution over what is left.
template <class Team>
SAMPLE_FN int32_t draw(const Team& team, const Scores& s, const Cut& c, uint64_t uniform) {
  const int32_t length = (s.size + PARTS - 1) / PARTS;
  const auto token = [&](int32_t i) {
    const bool is_above = s.keys[i] >= c.above, is_tie = !is_above && s.keys[i] >= c.at;
    return Measure{NO_KEY, is_tie, is_above && s.weights[i] >= c.lightest ? s.weights[i] : 0};
  };
  for (int p = team.part; p < PARTS; p += team.parts) {
    uint32_t ties = 0;
    uint64_t weight = 0;
    const int32_t end = (p + 1) * length < s.size ? (p + 1) * length : s.size;
    for (int32_t i = p * length + team.part_lane; i < end; i += team.part_lanes) {
      ties += token(i).count;
      weight += token(i).weight;
    }
    team.of_parts[p] = team.part_sum({NO_KEY, ties, weight});
  }
  team.sync();
  Measure all = {NO_KEY, 0, 0};
  for (int p = team.part_lane; p < PARTS; p += team.part_lanes) {
    all.count += team.of_parts[p].count;
    all.weight += team.of_parts[p].weight;
  }
  all = team.part_sum(all);
  const uint64_t goal = high_product(uniform, all.weight + least(all.count, c.ties) * c.each);
  Front front = {0, c.ties};
  const int32_t part = find(team, 0, goal, c.each, front, [&](int32_t p) { return team.of_parts[p]; });
  return find(team, part * length, goal, c.each, front, [&](int32_t i) {
    return i < s.size ? token(i) : Measure{NO_KEY, 0, 0};
  });
}

// The `count` tokens of the largest keys, the largest first; of equal ones the smaller index.
template <class Team>
SAMPLE_FN void likeliest(const Team& team, const Scores& s, Key most, int32_t count, int32_t* tokens) {
  const Measure all = {NO_KEY, static_cast<uint32_t>(s.size), 0};  // weights do not matter
  const Bound b = search(team, s, all, most, false, static_cast<uint64_t>(count));
  uint64_t stored = 0, ties = static_cast<uint64_t>(count) - b.above.count;
  for (int32_t base = 0; stored < static_cast<uint64_t>(count); base += team.part_lanes) {
    const int32_t i = base + team.part_lane;
    const bool is_above = i < s.size && s.keys[i] >= b.above.least;
    const bool is_tied = i < s.size && !is_above && s.keys[i] >= b.at.least;
    const uint64_t rank = team.prefix(uint64_t{is_tied});
    const bool is_one = is_above || (is_tied && rank <= ties);
    const uint64_t at = stored + team.prefix(uint64_t{is_one});
    if (is_one) tokens[at - 1] = i;
    stored = team.of(at, team.part_lanes - 1);
    ties -= least(team.of(rank, team.part_lanes - 1), ties);
  }
  team.sync();
  for (int32_t i = 1; team.lane == 0 && i < count; ++i)
    for (int32_t j = i; j > 0 && s.keys[tokens[j]] > s.keys[tokens[j - 1]]; --j) {
      const int32_t token = tokens[j];
      tokens[j] = tokens[j - 1];
      tokens[j - 1] = token;
    }
  team.sync();
}

// Samples a row, whose keys and weights are written to `s`. Reads of it `logits`, float32 or bfloat16 by
// `logit_bytes`; `edit`, of `edits` tokens; `mask`, a bit a token (null: all are allowed); `seed` and `position`; the numbers of a
// Sampling; `top`, how many likeliest tokens are wanted, -1: no log-probabilities at all. Writes
// `token`, -1 where a logit is NaN or the largest is infinite, and by the logits without edits its
// `logprob`, and the `likeliest` tokens with their `logprobs`.
template <class Team>
SAMPLE_FN void sample(const Team& team, const Scores& s, SampleRow& row) {
  const Logits logits = {row.logits, row.logit_bytes};
  Key most = load(team, s, logits);
  double shift = 0;  // a log-probability is the logit minus this
  const bool is_finite = EXCLUDED < most && most < INFINITE;
  if (is_finite && row.top >= 0) {
    const double sum = static_cast<double>(weigh(team, s, most, SCALE)) / ONE;
    shift = score_of(most) + log(sum);
    team.sync();
    if (row.top) likeliest(team, s, most, row.top, row.likeliest);
    for (int32_t i = 0; i < row.top; ++i) row.logprobs[i] = logits[row.likeliest[i]] - shift;
  }
  if (is_finite && (row.edits || row.mask)) {
    penalize(team, s, row);
    most = largest(team, s);
  }
  int32_t token = -1;
  if (is_finite && most < INFINITE && (row.temperature == 0 || most == EXCLUDED)) {
    int32_t first = s.size;
    for (int32_t i = team.lane; i < s.size; i += team.lanes)
      first = s.keys[i] == most && i < first ? i : first;
    token = -team.max(-first);  // the first of the largest
  } else if (is_finite && most < INFINITE) {
    const double temperature = row.temperature > COLDEST ? row.temperature : COLDEST;
    const uint64_t total = weigh(team, s, most, static_cast<float>(SCALE / temperature));
    team.sync();
    token = draw(team, s, cut(team, s, most, total, row), philox(row.seed, row.position));
  }
  row.token = token;
  if (token >= 0 && row.top >= 0) row.logprob = logits[token] - shift;
}

// Makes a row that stays in memory ready for the token behind the one that was drawn: its position, and
// how often its tokens have occurred, if a penalty asks for that. `edit` has room for one more.
template <class Team>
SAMPLE_FN void advance(const Team& team, SampleRow& row) {
  const bool counts = row.presence_penalty != 0 || row.frequency_penalty != 0 || row.repetition_penalty != 1;
  int32_t at = row.edits;
  for (int32_t e = team.lane; counts && e < row.edits; e += team.lanes)
    if (row.edit[e].token == row.token) at = e;
  at = -team.max(-at);
  if (team.lane != 0) return;
  row.position += 1;
  if (!counts || row.token < 0) return;
  if (at == row.edits) row.edit[row.edits++] = {row.token, 0, 0, 0};
  row.edit[at].count += 1;
  row.edit[at].is_seen = 1;
}

}  // namespace sample
