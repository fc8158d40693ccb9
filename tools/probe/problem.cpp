#include "problem.h"

#include <limits>

namespace rnn::probe {

namespace {

constexpr double kNothing = std::numeric_limits<double>::quiet_NaN();

}  // namespace

double Problem::random() {  // splitmix64
  uint64_t z = state_ += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return double(int64_t(z ^ z >> 31) >> 11) * 0x1p-52;
}

void Problem::round(std::vector<double>& values) const {
  for (double& x : values) {
    if (precision_ == cuda::Precision::kBFloat16) {
      BFloat16 stored;
      narrow(x, stored);
      x = widen(stored);
    } else {
      x = float(x);
    }
  }
}

int64_t Problem::size(int layer, Field field) const {
  const int64_t steps = n.T * n.B * n.D, states = n.D * n.B, unit = n.H;
  const bool two = cell.S > 1;
  switch (field) {
    case kWeights:
      return n.D * cell.G * n.H * n.H;
    case kInputWeights:
      return layer > 0 ? cell.G * n.H * n.H : 0;
    case kInputBias:
    case kHiddenBias:
      return n.D * cell.G * n.H;
    case kGx:
      return layer == 0 ? steps * cell.G * unit : 0;
    case kH0:
    case kDhn:
    case kHn:
    case kDh0:
      return states * unit;
    case kC0:
    case kDcn:
    case kCn:
    case kDc0:
      return two ? states * unit : 0;
    case kDy:
    case kY:
      return steps * unit;
    case kC:
      return two ? steps * unit : 0;
    case kSaved:
      return steps * cell.K * unit;
    case kDgates:
      return steps * (cell.G + cell.A) * unit;
    case kFields:
      break;
  }
  return 0;
}

Problem::Problem(const Cell& cell, const Sizes& n, bool options, Clip clip, cuda::Precision precision)
    : cell(cell), n(n), clip(clip), layers(size_t(n.layers)), precision_(precision) {
  const double weight = std::sqrt(1.0 / double(n.H));
  for (int l = 0; l < n.layers; ++l)
    for (int f = 0; f < kY; ++f) {
      std::vector<double>& values = layers[size_t(l)][size_t(f)];
      values.resize(size_t(size(l, Field(f))));
      for (double& x : values) x = random() * (f == kWeights || f == kInputWeights ? weight : 1);
      round(values);
    }
  if (!options) return;
  for (int64_t b = 0; b < n.B; ++b) lengths.push_back(b == n.B / 2 ? n.T : b * 2 % (n.T + 1));
  for (int64_t i = 0; i < n.T * n.B; ++i) reset.push_back(random() < -0.4);
}

Sequence Problem::on_host(bool backward) const {
  return sequence(lengths.empty() ? nullptr : lengths.data(),
                  reset.empty() ? nullptr : reinterpret_cast<const bool*>(reset.data()), backward);
}

Fields<double*> Problem::pointers(int layer) {
  Fields<double*> at{};
  for (int f = 0; f < kFields; ++f) {
    std::vector<double>& values = layers[size_t(layer)][size_t(f)];
    at[size_t(f)] = values.empty() ? nullptr : values.data();
  }
  return at;
}

void Problem::run_forward() {
  const Sequence q = on_host(false);
  for (int l = 0; l < n.layers; ++l) {
    auto& own = layers[size_t(l)];
    for (const Field f : {kY, kHn, kCn, kC, kSaved}) own[f].assign(size_t(size(l, f)), kNothing);
    Fields<double*> at = pointers(l);
    std::vector<double> gx;
    if (l > 0) {
      const std::vector<double>& below = layers[size_t(l - 1)][kY];
      gx.resize(size_t(n.T * n.B * cell.G * n.H));
      multiply(gx.data(), below.data(), at[kInputWeights], n.T * n.B, cell.G * n.H, n.H, false);
      at[kGx] = gx.data();
    }
    std::vector<double> gh(size_t(n.D * n.B * cell.G * n.H));
    own[kHn] = own[kH0];  // the loop takes them along
    own[kCn] = own[kC0];
    at[kHn] = own[kHn].data();
    if (at[kCn]) at[kCn] = own[kCn].data();
    forward_loop<double>(forward_call(q, cell, at), cell.G, {gh.data(), at[kHn], at[kCn]}, OnHost{cell.number});
  }
}

void Problem::run_backward() {
  const Sequence q = on_host(true);
  for (auto& layer : layers)
    for (const Field f : {kY, kC, kSaved}) round(layer[f]);
  for (int l = n.layers; l-- > 0;) {
    auto& own = layers[size_t(l)];
    for (const Field f : {kDgates, kDh0, kDc0}) own[f].assign(size_t(size(l, f)), kNothing);
    Fields<double*> at = pointers(l);
    const int64_t steps = n.T * n.B * n.D, width = cell.G + cell.A, rows = n.D * q.rows();
    std::vector<double> dy = own[kDy];
    if (l + 1 < n.layers) {
      const auto& above = layers[size_t(l + 1)];
      std::vector<double> dgx(size_t(steps * cell.G * n.H)), dx(dy.size());
      for (int64_t i = 0; i < steps; ++i)
        for (int64_t j = 0; j < cell.G * n.H; ++j)
          dgx[size_t(i * cell.G * n.H + j)] = above[kDgates][size_t(i * width * n.H + j)];
      multiply(dx.data(), dgx.data(), above[kInputWeights].data(), steps, n.H, cell.G * n.H, true);
      for (size_t i = 0; i < dy.size(); ++i) dy[i] += dx[i];
    }
    at[kDy] = dy.data();
    const bool norm = clip.kind == Clip::kNorm, two = cell.S > 1;
    std::vector<double> dh(size_t(rows * n.H)), dc(two ? size_t(rows * n.H) : 0), dgh(size_t(rows * cell.G * n.H));
    std::vector<double> through(size_t(rows * n.H)), unbounded(norm ? size_t(rows * width * n.H) : 0);
    std::vector<double> norms(norm ? size_t(rows) : 0);
    const cuda::Carried<double> carried{
        dh.data(), two ? dc.data() : nullptr,         dgh.data(),   through.data(), nullptr,
        nullptr,   norm ? unbounded.data() : nullptr, norms.data(), nullptr};
    backward_loop<double>(backward_call(q, cell, clip, at), cell.G, cell.A, carried, OnHost{cell.number});
  }
}

}  // namespace rnn::probe
