// Monotone rational-quadratic splines of many numbers: both directions, and their gradients.
//
// Numbers are processed in blocks. Within a block every quantity is a row of WIDTH numbers, so that each inner loop
// becomes vector instructions. The formulas, and their names, are those of spline.py.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "elementary.h"
#include "parts.h"

namespace {

constexpr int WIDTH = 64;

// soft: where not 0, numbers are clipped softly, to ±soft, and the exponential of a slope's number is the slope (zuko)
struct Settings {
  double bins, bound, least[2], share[2], shift, min_derivative, max_derivative, soft;
};

inline int64_t parameters_of(const Settings& s) { return 3 * int64_t(s.bins) - 1; }

// Where θ of some numbers lies: number i of row r has its parameter p at r·row + i·element + p·parameter. Rows that share
// θ (row = 0) add up their gradients, which start at 0.
struct Source {
  const void* theta;
  void* grad;
  int64_t row, element, parameter;
};

// The number in a column is number ``place`` of the first source, or −1 − place of the second where that is negative;
// without places it is that of the column.
struct Layout {
  int64_t columns;
  const int64_t* places;
  Source sources[2];
};

// One block: the bin of each number, and what backward needs of the softmaxes.
template <class T>
struct Block {
  std::vector<T> theta;    // (3·bins − 1, WIDTH); the logits become the shares of the softmaxes
  std::vector<T> damping;  // (2·bins, WIDTH): the derivatives of softly clipped logits
  const T* from[WIDTH];
  T* to[WIDTH];
  int64_t stride[WIDTH];
  bool adds[WIDTH];
  T index[WIDTH], own[2][WIDTH], number[2][WIDTH], slope[2][WIDTH];
  T start[2][WIDTH], size[2][WIDTH], t[WIDTH], value[WIDTH];
  double before[2][WIDTH];  // sums of shares: rounded to float32 each time, they would be the largest error

  explicit Block(const Settings& s) : theta(parameters_of(s) * WIDTH), damping(s.soft ? theta.size() : 0) {}

  void load(int64_t first, int count, int64_t parameters, const Layout& at) {
    int64_t row = first / at.columns, column = first % at.columns;
    bool packed = true;
    for (int i = 0; i < WIDTH; i++) {
      const int64_t place = at.places ? at.places[column] : column;
      const Source& source = at.sources[place < 0];
      const int64_t offset = row * source.row + (place < 0 ? -1 - place : place) * source.element;
      from[i] = static_cast<const T*>(source.theta) + offset;
      to[i] = static_cast<T*>(source.grad) + offset;
      stride[i] = source.parameter, adds[i] = source.row == 0;
      packed = packed && source.parameter == 1;
      if (i + 1 < count && ++column == at.columns) column = 0, row++;
    }
    if (packed) {
      for (int i = 0; i < WIDTH; i++)
        for (int64_t p = 0; p < parameters; p++) theta[p * WIDTH + i] = from[i][p];
    } else {
      for (int64_t p = 0; p < parameters; p++)
        for (int i = 0; i < WIDTH; i++) theta[p * WIDTH + i] = from[i][p * stride[i]];
    }
  }

  void store(const std::vector<T>& grad, int count, int64_t parameters) {
    for (int i = 0; i < count; i++)
      if (adds[i]) {
        for (int64_t p = 0; p < parameters; p++) to[i][p * stride[i]] += grad[p * WIDTH + i];
      } else if (stride[i] == 1) {
        for (int64_t p = 0; p < parameters; p++) to[i][p] = grad[p * WIDTH + i];
      }
    for (int64_t p = 0; p < parameters; p++)
      for (int i = 0; i < count; i++)
        if (!adds[i] && stride[i] != 1) to[i][p * stride[i]] = grad[p * WIDTH + i];
  }

  void find(const Settings& s, const T* values, int count, int axis) {
    const int64_t bins = int64_t(s.bins);
    const T bound = T(s.bound);
    for (int i = 0; i < WIDTH; i++) {
      T v = values[i < count ? i : 0];
      value[i] = v < -bound ? -bound : v > bound ? bound : v;
    }
    if (s.soft) {
      const T slope = T(2 / s.soft);
      for (int64_t i = 0; i < 2 * bins * WIDTH; i++) {
        const T factor = T(1) / (T(1) + slope * std::abs(theta[i]));
        theta[i] *= factor, damping[i] = factor * factor;
      }
    }
    for (int side = 0; side < 2; side++) {
      T* z = &theta[side * bins * WIDTH];
      T most[WIDTH], sum[WIDTH];
      for (int i = 0; i < WIDTH; i++) most[i] = z[i], sum[i] = 0;
      for (int64_t k = 1; k < bins; k++)
        for (int i = 0; i < WIDTH; i++) most[i] = z[k * WIDTH + i] > most[i] ? z[k * WIDTH + i] : most[i];
      for (int64_t k = 0; k < bins; k++)
        for (int i = 0; i < WIDTH; i++) sum[i] += z[k * WIDTH + i] = exp_of(z[k * WIDTH + i] - most[i]);
      for (int i = 0; i < WIDTH; i++) sum[i] = T(1) / sum[i];
      for (int64_t k = 0; k < bins; k++)
        for (int i = 0; i < WIDTH; i++) z[k * WIDTH + i] *= sum[i];
    }
    const T *w = &theta[0], *h = &theta[bins * WIDTH], *slopes = &theta[2 * bins * WIDTH];
    const T *along = axis ? h : w;
    const T share = T(s.share[axis]), least = T(s.least[axis]);
    T end[WIDTH];
    for (int i = 0; i < WIDTH; i++) {
      end[i] = -bound, index[i] = before[0][i] = before[1][i] = number[0][i] = 0;
      own[0][i] = w[i], own[1][i] = h[i], number[1][i] = slopes[i];
    }
    for (int64_t k = 1; k < bins; k++) {
      const T *w0 = w + (k - 1) * WIDTH, *h0 = h + (k - 1) * WIDTH, *w1 = w + k * WIDTH, *h1 = h + k * WIDTH;
      const T *last = along + (k - 1) * WIDTH, *low = slopes + (k - 1) * WIDTH;
      const T* high = k + 1 < bins ? slopes + k * WIDTH : nullptr;
      for (int i = 0; i < WIDTH; i++) {
        end[i] += share * last[i] + least;
        const bool reached = value[i] >= end[i];
        index[i] += reached ? T(1) : T(0);
        before[0][i] += reached ? w0[i] : T(0);
        before[1][i] += reached ? h0[i] : T(0);
        own[0][i] = reached ? w1[i] : own[0][i];
        own[1][i] = reached ? h1[i] : own[1][i];
        number[0][i] = reached ? low[i] : number[0][i];
      }
      if (high)
        for (int i = 0; i < WIDTH; i++) number[1][i] = value[i] >= end[i] ? high[i] : number[1][i];
    }
    const T last = T(bins - 1), shift = T(s.shift), floor = T(s.min_derivative), most = T(s.max_derivative);
    const T soft = s.soft ? T(1 / s.soft) : T(0);
    for (int side = 0; side < 2; side++)
      for (int i = 0; i < WIDTH; i++) {
        start[side][i] = T(s.share[side] * before[side][i] + (s.least[side] * index[i] - s.bound));
        size[side][i] = T(s.share[side]) * own[side][i] + T(s.least[side]);
        const bool at_end = index[i] == (side ? last : T(0));
        const T x = number[side][i] + shift, far = x > T(20) ? T(20) : x;
        const T power = exp_of(soft ? x / (T(1) + soft * std::abs(x)) : far);
        T found = soft ? power : (x > T(20) ? x : log1p_of(power)) + floor;
        found = found > most ? most : found;
        slope[side][i] = at_end ? T(1) : found;
      }
    for (int i = 0; i < WIDTH; i++) {
      T part = (value[i] - start[axis][i]) / size[axis][i];
      t[i] = part < T(0) ? T(0) : part > T(1) ? T(1) : part;
    }
    if (!axis) return;
    for (int i = 0; i < WIDTH; i++) {  // t holds the rise: solve for the position
      const T rise = t[i], mean = size[1][i] / size[0][i];
      const T tilt = slope[0][i] * (T(1) - rise) - slope[1][i] * rise;
      const T root = std::sqrt(tilt * tilt + T(4) * mean * mean * rise * (T(1) - rise));
      const T sum = root + (tilt >= T(0) ? tilt : -tilt);
      const T done = tilt >= T(0) ? T(2) * mean * rise : sum;
      const T rest = tilt >= T(0) ? sum : T(2) * mean * (T(1) - rise);
      t[i] = done / (done + rest);
    }
  }
};

template <class T>
void run(const T* values, T* out, T* log_slope, int64_t first, int64_t last, const Layout& at, const Settings& s,
         int inverse) {
  Block<T> block(s);
  for (int64_t from = first; from < last; from += WIDTH) {
    const int count = last - from < WIDTH ? int(last - from) : WIDTH;
    block.load(from, count, parameters_of(s), at);
    block.find(s, values + from, count, inverse);
    T y[WIDTH], slope[WIDTH];
    for (int i = 0; i < WIDTH; i++) {
      const T t = block.t[i], u = T(1) - t, mean = block.size[1][i] / block.size[0][i];
      const T first = mean * t + block.slope[0][i] * u, second = mean * u + block.slope[1][i] * t;
      const T done = t * first, whole = done + u * second, ratio = mean / whole;
      slope[i] = log_of(ratio * ratio * (u * first + t * second));
      y[i] = inverse ? block.start[0][i] + block.size[0][i] * t : block.start[1][i] + block.size[1][i] * (done / whole);
    }
    for (int i = 0; i < count; i++) {
      const bool inside = values[from + i] == block.value[i];
      out[from + i] = inside ? y[i] : values[from + i];
      log_slope[from + i] = inside ? (inverse ? -slope[i] : slope[i]) : T(0);
    }
  }
}

// The gradients of values and θ, given those of both results.
template <class T>
void run_backward(const T* values, const T* grad_out, const T* grad_log, T* grad_values, int64_t first, int64_t last,
                  const Layout& at, const Settings& s, int inverse) {
  const int64_t bins = int64_t(s.bins), parameters = parameters_of(s);
  Block<T> block(s);
  std::vector<T> grad(parameters * WIDTH);
  for (int64_t from = first; from < last; from += WIDTH) {
    const int count = last - from < WIDTH ? int(last - from) : WIDTH;
    block.load(from, count, parameters, at);
    block.find(s, values + from, count, inverse);
    T of_start[2][WIDTH], of_size[2][WIDTH], of_number[2][WIDTH], dot[2][WIDTH], of_value[WIDTH];
    bool inside[WIDTH];
    T a_out[WIDTH], a_log[WIDTH];
    for (int i = 0; i < WIDTH; i++) {
      const int j = i < count ? i : 0;
      inside[i] = i < count && values[from + j] == block.value[j];
      a_out[i] = grad_out[from + j], a_log[i] = grad_log[from + j];
    }
    for (int i = 0; i < WIDTH; i++) {
      const T t = block.t[i], u = T(1) - t, w = block.size[0][i], h = block.size[1][i], mean = h / w;
      const T s0 = block.slope[0][i], s1 = block.slope[1][i];
      const T low = mean * t + s0 * u, high = mean * u + s1 * t, whole = t * low + u * high, q = u * low + t * high;
      const T rise = t * low / whole, per_q = T(1) / q, per_whole = T(1) / whole, per_w = T(1) / w;
      // derivatives of the rise, and of the logarithm of the slope, in t, mean, s0 and s1
      const T whole_t = (u - t) * (s0 + s1 - T(2) * mean), whole_mean = t * t + u * u, tu = t * u;
      const T log_t = T(2) * (s1 * t - s0 * u + mean * (u - t)) * per_q - T(2) * whole_t * per_whole;
      const T log_mean = T(2) * (tu * per_q - whole_mean * per_whole + T(1) / mean);
      const T log_s0 = u * u * per_q - T(2) * tu * per_whole, log_s1 = t * t * per_q - T(2) * tu * per_whole;
      const T rise_t = q * mean * per_whole * per_whole;
      const T rise_mean = (t * t - rise * whole_mean) * per_whole;
      const T rise_s0 = tu * (T(1) - rise) * per_whole, rise_s1 = -tu * rise * per_whole;
      T a = a_out[i], b = a_log[i];
      if (inverse) {  // x moves against what moves y at x: dx = (dy − ∂y/∂θ dθ)/slope, and the logarithm is −log slope
        const T slope = mean * rise_t;
        a = -(a - b * log_t * per_w) / slope;
        b = -b;
      }
      const T of_t = a * h * rise_t + b * log_t, of_mean = a * h * rise_mean + b * log_mean;
      of_value[i] = inverse ? -a : of_t * per_w;
      of_start[0][i] = -of_t * per_w;
      of_size[0][i] = -(of_t * t + of_mean * mean) * per_w;
      of_start[1][i] = a;
      of_size[1][i] = a * rise + of_mean * per_w;
      of_number[0][i] = a * h * rise_s0 + b * log_s0;
      of_number[1][i] = a * h * rise_s1 + b * log_s1;
    }
    const T shift = T(s.shift), most = T(s.max_derivative), last_bin = T(bins - 1);
    const T soft = s.soft ? T(1 / s.soft) : T(0);
    for (int side = 0; side < 2; side++)
      for (int i = 0; i < WIDTH; i++) {
        const T x = block.number[side][i] + shift;
        const T clipped = x > T(80) ? T(80) : x < T(-80) ? T(-80) : x;
        const bool fixed = block.index[i] == (side ? last_bin : T(0)) || block.slope[side][i] >= most || !inside[i];
        const T factor = T(1) / (T(1) + soft * std::abs(x));
        const T rate = soft ? block.slope[side][i] * factor * factor : T(1) / (T(1) + exp_of(-clipped));
        of_number[side][i] = fixed ? T(0) : of_number[side][i] * rate;
        const T share = T(s.share[side]);
        of_start[side][i] = inside[i] ? share * of_start[side][i] : T(0);
        of_size[side][i] = inside[i] ? share * of_size[side][i] : T(0);
        dot[side][i] = of_start[side][i] * T(block.before[side][i]) + of_size[side][i] * block.own[side][i];
      }
    for (int64_t k = 0; k < bins; k++) {
      const T at_bin = T(k);
      for (int side = 0; side < 2; side++) {
        const T* share = &block.theta[(side * bins + k) * WIDTH];
        T* to = &grad[(side * bins + k) * WIDTH];
        for (int i = 0; i < WIDTH; i++) {
          const T past = block.index[i] > at_bin ? of_start[side][i] : T(0);
          const T here = block.index[i] == at_bin ? of_size[side][i] : past;
          to[i] = share[i] * (here - dot[side][i]);
        }
        if (s.soft)
          for (int i = 0; i < WIDTH; i++) to[i] *= block.damping[(side * bins + k) * WIDTH + i];
      }
      if (k + 1 == bins) break;
      T* to = &grad[(2 * bins + k) * WIDTH];
      for (int i = 0; i < WIDTH; i++) {
        const T low = block.index[i] == at_bin + T(1) ? of_number[0][i] : T(0);
        to[i] = block.index[i] == at_bin ? of_number[1][i] : low;
      }
    }
    for (int i = 0; i < count; i++) grad_values[from + i] = inside[i] ? of_value[i] : a_out[i];
    block.store(grad, count, parameters);
  }
}

}  // namespace

// The numbers of each part have a layout of their own, since each adds up the gradients of a shared θ in its own place.
#define EXPORT(NAME, T)                                                                                               \
  extern "C" void forward_##NAME(const T* values, T* out, T* log_slope, int64_t count, int64_t parts,                 \
                                 const Layout* at, const Settings* settings, int inverse) {                           \
    in_parts(count, parts, [=](int64_t part, int64_t first, int64_t last) {                                           \
      run<T>(values, out, log_slope, first, last, at[part], *settings, inverse);                                      \
    });                                                                                                               \
  }                                                                                                                   \
  extern "C" void backward_##NAME(const T* values, const T* grad_out, const T* grad_log, T* grad_values,              \
                                  int64_t count, int64_t parts, const Layout* at, const Settings* settings,           \
                                  int inverse) {                                                                      \
    in_parts(count, parts, [=](int64_t part, int64_t first, int64_t last) {                                           \
      run_backward<T>(values, grad_out, grad_log, grad_values, first, last, at[part], *settings, inverse);            \
    });                                                                                                               \
  }

EXPORT(float32, float)
EXPORT(float64, double)
